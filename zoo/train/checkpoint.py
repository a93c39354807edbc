"""Checkpoints of a run: one safetensors file, replaced in one step, from which training goes on exactly.

The file holds what is trained, the buffers of the adapters and the optimizer's state as tensors, and everything else as JSON in
the file's metadata. The best weights so far are a file of their own, written before the checkpoint that names it. Both are
written under a temporary name and then renamed, so a kill at any moment leaves a whole checkpoint. Random numbers need no
place in it (see `zoo.data.seeds`). Nothing is ever pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as dump
from torch import Tensor
from torch.nn import Module, Parameter

from zoo.disk import write_file
from zoo.errors import ConfigError, MismatchError, WeightsError
from zoo.train.identity import differences
from zoo.train.settings import CHANGEABLE

if TYPE_CHECKING:
    from zoo.model import Model
    from zoo.train.optimizer import OptimizerService

__all__ = [
    "Run",
    "Saved",
    "Snapshot",
    "Store",
    "pack_extra",
    "parameters_of",
    "read_state",
    "restore",
    "restore_plans",
    "snapshot",
    "unpack_extra",
    "write_state",
]

LAST = "last.safetensors"
FORMAT = 2
EXTRA = "extra:"
OPTIMIZER = "optimizer:"
CALLBACK = "callback:"
_BEST = re.compile(r"best-\d+\.safetensors")
_TEMPORARY = re.compile(r"\.(last|best-\d+)\.safetensors\.[0-9a-f]+\.tmp")


@dataclass
class Run:
    """How far a run is. All of it is JSON."""

    epoch: int = 0
    batch: int = 0
    """Batches of the present epoch that are done."""
    step: int = 0
    images: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    """What the layers had at the end of epochs in which it changed (`zoo.train.report`)."""
    best: dict[str, Any] | None = None
    waited: int = 0
    """Epochs since the best one."""
    stopped: bool = False
    seconds: float = 0.0
    training_seconds: float = 0.0
    epoch_seconds: float = 0.0
    sums: list[float] = field(default_factory=list)
    scale: dict[str, float] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    finished: bool = False
    batches: int = 0
    """Batches of a whole epoch."""
    leg_step: int = 0
    """Where batches of the present size began (`zoo.train.resuming`)."""
    leg_epoch: int = 0
    begun: list[int] = field(default_factory=lambda: [0, 0])
    """Epoch and step where the present schedule began."""
    birth: int = 0
    """From which step on the schedule counts; where it was shifted, not where it began."""
    lr: Any = None
    """What a search found, and what it tried (`zoo.train.rates`)."""
    lr_search: list[dict[str, float]] = field(default_factory=list)
    cut: dict[str, Any] = field(default_factory=dict)
    """Of a last epoch that ended with the run's steps, in its middle: `batch`, `sums` and `epoch_seconds` at its end."""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """Which settings were changed on the way, and where."""


class Snapshot(dict[str, Tensor]):
    """The tensors of a model that training may change, on the CPU; `adapters` is what adapters say of themselves."""

    def __init__(self, tensors: Mapping[str, Tensor], adapters: dict[str, Any]) -> None:
        super().__init__(tensors)
        self.adapters = adapters


def snapshot(model: Model, callbacks: Sequence[Any] = ()) -> Snapshot:
    """Copies of everything that training may change: parameters and buffers of the active adapters and of the head.

    Also of each adapter its `plan`, and what its `extra_state()` returns: numbers, text and tensors in dicts and lists, for what
    lives neither in parameters nor in buffers. So do callbacks that have one.
    """
    tensors: dict[str, Tensor] = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in _tensors(model).items()}
    adapters: dict[str, Any] = {}
    for name in model.active:
        adapter: Any = model.adapters[name]
        adapters[name] = {"plan": adapter.plan}
        if (extra := adapter.extra_state()) is not None:
            adapters[name]["extra"] = pack_extra(extra, name, tensors)
    for number, callback in enumerate(callbacks):
        if hasattr(callback, "extra_state"):
            name = f"{CALLBACK}{number}"
            adapters[name] = {"extra": pack_extra(callback.extra_state(), name, tensors)}
    return Snapshot(tensors, adapters)


def restore_plans(model: Model, adapters: Mapping[str, Any]) -> None:
    """Attach adapters again as the calibration of the run decided, before an optimizer is made.

    Raises:
        MismatchError: the run had other adapters.
    """
    adapters = {name: saved for name, saved in adapters.items() if not name.startswith(CALLBACK)}
    if list(adapters) != list(model.active):
        raise MismatchError(
            f"The checkpoint is of a model with the adapters {', '.join(adapters) or 'none'}; this one has "
            f"{', '.join(model.active) or 'none'}. Build the same model, or pass resume=False to begin anew."
        )
    for name, saved in adapters.items():
        adapter: Any = model.adapters[name]
        if saved["plan"] != adapter.plan:
            adapter.plan = saved["plan"]
            model.reattach(name)


def restore(model: Model, saved: Snapshot, callbacks: Sequence[Any] = (), *, complete: bool = False) -> None:
    """Put a snapshot back.

    Shapes that an adapter has changed since (`zoo.adapters.structure`) are made anew. `load_extra_state(model, state)` is called
    before tensors return to their places. `complete`: every tensor of the model must be in it.

    Raises:
        MismatchError: the model has other parameters, or of other shapes.
    """
    for name, state in saved.adapters.items():
        number = name.removeprefix(CALLBACK)
        if number != name:
            receiver: Any = dict(enumerate(callbacks)).get(int(number))
            if not hasattr(receiver, "load_extra_state"):
                raise MismatchError(
                    f"The checkpoint holds the state of callbacks[{number}], and no such callback is given. Resume with the "
                    "callbacks that the run began with, or pass resume=False."
                )
        else:
            receiver = model.adapters[name]
            if state["plan"] != receiver.plan:
                receiver.plan = state["plan"]
                receiver.restructure({n[len(name) + 1 :]: t for n, t in saved.items() if n.startswith(f"{name}/")})
        if "extra" in state:
            receiver.load_extra_state(model, unpack_extra(state["extra"], saved))
    tensors = _tensors(model)
    for name, value in saved.items():
        if name.startswith(EXTRA):
            continue
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != value.shape:
            found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
            raise MismatchError(
                f"The checkpoint holds '{name}' of shape {tuple(value.shape)}; in this model it {found}. Resume with the model "
                "that the run began with, or pass resume=False."
            )
    if complete and (missing := [name for name in tensors if name not in saved]):
        raise MismatchError(
            f"The checkpoint lacks {len(missing)} tensors that this model has, first '{missing[0]}': they would be left as "
            "they were drawn. Resume with the model that the run began with, or pass resume=False."
        )
    with torch.no_grad():
        for name, value in saved.items():
            if not name.startswith(EXTRA):
                tensors[name].copy_(value)


def parameters_of(model: Model) -> dict[str, Parameter]:
    """All parameters of the active adapters and of the head, frozen ones too, by the names of `parameters_to_train()`."""
    return {n: t for n, t in _tensors(model).items() if isinstance(t, Parameter)}


def _tensors(model: Model) -> dict[str, Tensor]:
    owners: list[tuple[str, Module]] = [(name, model.adapters[name]) for name in model.active]
    return {
        f"{owner}/{name}": tensor
        for owner, module in [*owners, ("head", model.head)]
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }


def pack_extra(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """JSON in which tensors are references to entries of `tensors`."""
    if isinstance(value, Tensor):
        tensors[EXTRA + place] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": EXTRA + place}
    if isinstance(value, Mapping):
        return {"map": {str(k): pack_extra(v, f"{place}.{k}", tensors) for k, v in value.items()}}
    if isinstance(value, (list, tuple)):
        return [pack_extra(v, f"{place}.{i}", tensors) for i, v in enumerate(value)]
    return value


def unpack_extra(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `pack_extra` was given."""
    if isinstance(value, list):
        return [unpack_extra(v, tensors) for v in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]].clone()
        return {k: unpack_extra(v, tensors) for k, v in value["map"].items()}
    return value


@dataclass
class Saved:
    """A checkpoint that was read."""

    model: Snapshot
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    different: dict[str, str] = field(default_factory=dict)
    """What differs from the run that asks for it, and may."""


class Store:
    """The checkpoint folder of a run; None writes and reads nothing. Only the main process writes."""

    def __init__(self, folder: Path | None, main: bool, callbacks: Sequence[Any] = ()) -> None:
        self.folder, self.main, self.callbacks = folder, main, callbacks

    def write(
        self,
        model: Model,
        service: OptimizerService,
        run: Mapping[str, Any],
        identity: Mapping[str, Any],
        chosen: Snapshot | None,
        best: int | None,
    ) -> None:
        """Replace the checkpoint.

        Args:
            run: how far the run is; identity: what makes it this run and no other. Both JSON.
            chosen, best: the best weights so far and their step.

        Raises:
            SaveError: the file system refused; the checkpoint before is whole.
        """
        if self.folder is None or not self.main:
            return
        if chosen is not None and not (best_file := self.folder / _best(best)).exists():
            write_state(best_file, chosen, {"adapters": chosen.adapters})
        taken = snapshot(model, self.callbacks)
        plain, tensors = service.save()
        state = {"run": run, "identity": identity, "service": plain, "adapters": taken.adapters}
        write_state(self.folder / LAST, {**taken, **{OPTIMIZER + n: t for n, t in tensors.items()}}, state)
        self._sweep(best)

    def read(
        self, identity: Mapping[str, Any], may_differ: Callable[[Saved, dict[str, str]], Iterable[str]]
    ) -> Saved | None:
        """The checkpoint, if there is one.

        Args:
            may_differ: of the checkpoint and of what differs (`zoo.train.identity.differences`), the names that may.

        Raises:
            ConfigError: it is of another run.
            WeightsError: it is damaged.
        """
        found = None if self.folder is None else read_state(self.folder / LAST)
        if found is None:
            return None
        tensors, state = found
        saved = self._parts(tensors, state)
        different = differences(state["identity"], json.loads(json.dumps(identity)))
        allowed = set(may_differ(saved, different))
        if wrong := [words for name, words in different.items() if name not in allowed]:
            names = [f"'{name}'" for name in different if name in CHANGEABLE]
            ask = f"ask for the change (resume=[{', '.join(names)}]), " if len(names) == len(different) else ""
            raise ConfigError(
                f"The checkpoint in '{self.folder}' is of another run: {'; '.join(wrong)}. Resume with the same settings, {ask}"
                "choose another checkpoint folder, or pass resume=False to begin anew."
            )
        saved.different = {name: words for name, words in different.items() if name in allowed}
        return saved

    @staticmethod
    def _parts(tensors: Mapping[str, Tensor], state: dict[str, Any]) -> Saved:
        optimizer = {n[len(OPTIMIZER) :]: t for n, t in tensors.items() if n.startswith(OPTIMIZER)}
        model = {n: t for n, t in tensors.items() if not n.startswith(OPTIMIZER)}
        return Saved(Snapshot(model, state["adapters"]), optimizer, state)

    def read_best(self, step: int) -> Snapshot | None:
        """The best weights that the checkpoint names."""
        if self.folder is None:
            return None
        found = read_state(self.folder / _best(step))
        if found is None:
            raise WeightsError(
                f"The checkpoint in '{self.folder}' names best weights ({_best(step)}) that are gone. Pass resume=False to "
                "begin anew."
            )
        return Snapshot(found[0], found[1]["adapters"])

    def clear(self) -> None:
        """Begin anew: remove the checkpoint of a former run."""
        if self.folder is not None and self.main:
            with contextlib.suppress(FileNotFoundError):
                (self.folder / LAST).unlink()
            self._sweep(None)

    def _sweep(self, best: int | None) -> None:
        """Remove what killed runs left: temporary files, and best weights that the checkpoint does not name."""
        if self.folder is None or not self.main or not self.folder.is_dir():
            return
        for entry in self.folder.iterdir():
            if _TEMPORARY.fullmatch(entry.name) or (_BEST.fullmatch(entry.name) and entry.name != _best(best)):
                with contextlib.suppress(OSError):
                    entry.unlink()


def _best(step: int | None) -> str:
    return f"best-{step}.safetensors"


def write_state(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """One safetensors file with `state` as JSON in its metadata, and a checksum of every byte."""
    plain = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    about = {"format": "pt", "zoo.format": str(FORMAT), "zoo.state": json.dumps(state), "zoo.checksum": _BLANK.decode()}
    data = dump(plain, about)
    write_file(path, data.replace(_CHECKSUM % _BLANK, _CHECKSUM % _checksum(data), 1))


_BLANK = b"0" * 64
_CHECKSUM = b'"zoo.checksum":"%s"'


def _checksum(data: bytes) -> bytes:
    """Of a file in which the place of the checksum is blank."""
    return hashlib.sha256(data).hexdigest().encode()


def _check_whole(data: bytes) -> None:
    """Raise ValueError unless the bytes are those that were written."""
    found = re.search(rb'"zoo\.checksum":"([0-9a-f]{64})"', data)
    if found is None:
        raise ValueError("it has no checksum: not a checkpoint of this version")
    if _checksum(data[: found.start(1)] + _BLANK + data[found.end(1) :]) != found[1]:
        raise ValueError("its bytes are not those that were written")


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """(tensors, state), or None if there is no such file.

    Raises:
        WeightsError: it is damaged or of another program.
    """
    if not path.exists():
        return None
    try:
        _check_whole(path.read_bytes())
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("zoo.format") != str(FORMAT):
            raise ValueError("not a checkpoint of this version")
        return tensors, json.loads(metadata["zoo.state"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise WeightsError(
            f"'{path}' is not a whole checkpoint ({error}). Delete it, or pass resume=False, to begin anew."
        ) from error
