"""Starting an adapter from the values of a published one, instead of random ones (PVP).

    phi_0 = argmin_phi min_h CE(h(f_{theta, phi}(x)), y)    on a large labelled set, backbone theta frozen, head h thrown away
    min_{phi, h'}                                           on the task of few examples, from phi_0, with a new head h'

The first line is an ordinary run of a method, saved or published; `zoo.adapter("vpt", init=<that>)` begins the second. The
modules are those of the method, and so are the counts.

- Settings that are not given are the source's. Those that are may differ only where a rule says what becomes of the values:
  a length of prompts (`zoo.adapters.parts.starting.of_length`), a rank or scale of LoRA (`of_rank`), dropout. Any other
  difference would give the values another meaning, and is refused.
- The head is never carried over. The backbone must be the same, to its weights.
- `like="scale"` takes only mean and standard deviation of each tensor from the source, and draws the values anew: the control
  that tells what was learned from how large it is.

From Song et al., "PVP: Pre-trained Visual Parameter-Efficient Tuning", 2023, of which no code is public; the rules for another
length and rank are ours.
"""

from __future__ import annotations

import fnmatch
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo import registry
from zoo.adapters.parts.starting import of_length
from zoo.disk.attaching import check_backbone
from zoo.disk.budget import budget
from zoo.disk.layout import check_kind
from zoo.disk.saved import SavedAdapter
from zoo.errors import ConfigError, MismatchError

if TYPE_CHECKING:
    from zoo.adapters.base import Adapter
    from zoo.host import Host

__all__ = ["LIKE", "Start", "start_from"]

LIKE = ("values", "scale")
FREE = ("dropout", "targets")  # what is only of training; what the names of the tensors tell


@dataclass(frozen=True, eq=False)
class Start:
    """The values with which a fresh adapter starts; `Adapter.initial` holds it until it is attached."""

    saved: SavedAdapter
    source: Adapter  # the method with the settings of the source, never attached
    tensors: dict[str, Tensor] = field(repr=False)
    like: str = "values"
    changed: dict[str, Any] = field(default_factory=dict)  # settings that are not the source's

    def room(self, model: Host) -> AbstractContextManager[Any]:
        """A context in which attaching takes no more memory than the source's file justifies."""
        return budget(self.saved.folder, self.saved.tensors, model.backbone, self.changed)

    def fill(self, model: Host, adapter: Adapter) -> None:
        """Put the values into an adapter that has attached.

        Raises:
            MismatchError: another backbone, or tensors that no rule makes fit.
        """
        folder, own = self.saved.folder, adapter.state_dict()
        self._check_backbone(model)
        tensors = adapter.started(self.source, dict(self.tensors), model.points)
        patterns = [pattern for names in adapter.lengths.values() for pattern in names]
        for name in [*own, *tensors]:
            if name not in own or name not in tensors:
                where = "the source" if name in tensors else "this adapter"
                raise MismatchError(
                    f"'{folder}' cannot start this '{adapter.method}': tensor '{name}' is only in {where}. They are not at the "
                    "same points: leave the settings out, so that they are the source's."
                )
            mine, theirs = own[name], tensors[name]
            check_kind(name, mine, theirs, f"The adapter in '{folder}'")
            if mine.shape == theirs.shape:
                continue
            if any(fnmatch.fnmatchcase(name, p) for p in patterns) and mine.shape[1:] == theirs.shape[1:]:
                tensors[name] = of_length(theirs, len(mine))
                continue
            raise MismatchError(
                f"'{folder}' cannot start this '{adapter.method}': tensor '{name}' has shape {tuple(theirs.shape)} there and "
                f"{tuple(mine.shape)} here, and there is no rule for such a change. Take the source's settings, or train a "
                "source of this shape."
            )
        if self.like == "scale":
            for name, _ in adapter.named_parameters():
                tensors[name] = _drawn_like(tensors[name])
        if model.device.type != "meta":
            adapter.load_state_dict(tensors)

    def told(self) -> str:
        """What a card says of it."""
        data = (self.saved.record.get("data") or {}).get("name")
        trained = f", trained on {data}," if isinstance(data, str) else ""
        what = (
            "Training started from" if self.like == "values" else "Training started from random values of the scale of"
        )
        return f"{what} the values of '{self.saved.folder.resolve().name}'{trained} with a new head."

    def _check_backbone(self, model: Host) -> None:
        try:
            check_backbone(model, self.saved)
        except MismatchError as error:
            same = registry.library_name(self.saved.backbone_name) == registry.library_name(model.backbone_name)
            theirs = f"other weights of '{model.backbone_name}'" if same else f"'{self.saved.backbone_name}'"
            raise MismatchError(
                f"'{self.saved.folder}' cannot start an adapter of '{model.backbone_name}': its values were trained on {theirs}, "
                f"and mean nothing elsewhere. Train a source on this backbone: zoo fit {model.backbone_name} "
                f"{self.source.method} --data <a large set> -o <folder>, and name its folder."
            ) from error


def start_from(saved: SavedAdapter, method: str, given: dict[str, Any], like: str = "values") -> Adapter:
    """A fresh adapter of `method` that will start with the values of a saved one; settings not `given` are the source's.

    Raises:
        MismatchError: the folder holds another method. ConfigError: several of this method, or settings under which the values
        would mean something else.
    """
    cls = registry.adapter_class(method)
    entries = [entry for entry in saved.adapters if entry.method == method]
    held = ", ".join(f"'{entry.method}'" for entry in saved.adapters)
    if not entries:
        raise MismatchError(
            f"'{saved.folder}' holds {held}, and '{method}' cannot start from that: its tensors are others. Name an adapter of "
            f"the same method, or use zoo.adapter('{saved.adapters[0].method}', init=...)."
            if saved.adapters
            else f"'{saved.folder}' holds a head and no adapter, so '{method}' has nothing to start from."
        )
    if len(entries) > 1:
        raise ConfigError(
            f"'{saved.folder}' holds several adapters of the method '{method}' ({', '.join(e.name for e in entries)}); save the "
            "one to start from alone: model.save_adapter(folder, name)."
        )
    (entry,) = entries
    if any(key.startswith(f"{entry.name}/") for key in saved.moved):
        raise ConfigError(
            f"'{saved.folder}' holds changes of the backbone's own values ({saved.codec}), which are no values to start from. "
            "Load it and save it plain: zoo.load(adapter=folder).save_adapter(other)."
        )
    config, tensors = cls.load_saved(dict(entry.config), saved.adapter_tensors(entry.name))
    source = cls.from_config(config, strict=True)
    source.plan = entry.plan
    source.check_structure(tensors)
    made = cls.from_config({**source.config(), **given})
    theirs, mine = source.config(), made.config()
    changed = [name for name in theirs if theirs[name] != mine[name]]
    for name in changed:
        if name not in (*FREE, *cls.lengths, *cls.translated):
            raise ConfigError(
                f"'{saved.folder}' was trained with {name}={theirs[name]!r}, and this '{method}' has {name}={mine[name]!r}: its "
                f"values would mean something else. Leave {name} out, and the source's is taken; or train a source with it."
            )
    if entry.plan is not None and any(name != "dropout" for name in changed):
        raise ConfigError(
            f"'{saved.folder}' brings a plan that belongs to its settings (which points it chose, which shapes they have), so "
            f"{', '.join(changed)} cannot differ. Leave them out."
        )
    made.plan = entry.plan
    made.initial = Start(saved, source, tensors, like, {name: mine[name] for name in changed})
    return made


def _drawn_like(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.float().mean() + tensor.float().std(correction=0) * torch.randn(tensor.shape)
