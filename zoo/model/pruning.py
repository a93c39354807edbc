"""Changed backbones: heads, neurons and blocks taken out, with all attached adapters cut to fit; sparse and quantised weights.

    smaller = zoo.prune(model, heads={"blocks.3": [0, 2]}, neurons={"blocks.3": [5, 6]}, blocks=["blocks.5"])
    sparse = zoo.sparsify(model, "mlp", sparsity=0.5)             # zeros that merging keeps
    small = zoo.quantise(model, to="nf4")                         # frozen projections in 4 bits
    zoo.save_backbone(smaller, "smaller/");  zoo.load("smaller/", "lora", num_classes=10)

Each returns a new model and leaves the given one as it is. A changed backbone is one of its own: another name and fingerprint,
and a folder with a recipe (JSON) and weights (safetensors).

Taking out is exact: the new model computes what the old one does when the outputs of these heads and neurons are zero, and
the blocks hand on their input. Adapters are attached anew and their tensors cut by one rule: an axis that is shorter now, and
as long as the point's input, output or heads were, keeps the entries of what stays. Then each adapter is run on both models;
one for which they differ (DoRA, whose row norms hold what is gone) or whose tensors the rule does not fit is refused by name,
and nothing has happened.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.adapters.base import Adapter
from zoo.arguments import MODEL, NOTHING, Kind, typed
from zoo.backbone import Backbone, Cut
from zoo.errors import ConfigError, SelectionError, ZooError, nearest
from zoo.model.model import Model
from zoo.model.packed import PackedLinear
from zoo.model.quantised import FORMATS, lightened
from zoo.points import LinearPoint, Point

__all__ = ["apply", "changed", "prune"]

Which = Mapping[int | str, Iterable[int]]


def _which(value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise TypeError
    return value


WHICH = Kind("a dict from blocks (a name or an index) to the indices that are taken out there", _which)


@typed(model=MODEL, heads=WHICH | NOTHING, neurons=WHICH | NOTHING)
def prune(
    model: Model,
    *,
    heads: Which | None = None,
    neurons: Which | None = None,
    blocks: Iterable[int | str] | int | str = (),
) -> Model:
    """A model without these parts of its backbone; adapters, heads and what is active come along.

    Args:
        heads, neurons: block (by name, or by index where that is one block) -> indices of attention heads, of hidden
            channels of the MLP, that are taken out.
        blocks: that are taken out; those behind them move up (`blocks.5` becomes `blocks.4`).

    Raises:
        ConfigError: a family or part for which this is not described, nothing would be left, or an adapter that cannot be cut.
        SelectionError: no such block, head or neuron.
    """
    edit: dict[str, Any] = {
        "heads": {_block(model, k).name: _whole(v, "heads", k) for k, v in (heads or {}).items()},
        "neurons": {_block(model, k).name: _whole(v, "neurons", k) for k, v in (neurons or {}).items()},
        "blocks": list(
            dict.fromkeys(_block(model, k).name for k in ((blocks,) if isinstance(blocks, (int, str)) else blocks))
        ),
    }
    if not any(edit.values()):
        raise ConfigError("There is nothing to take out: give heads=, neurons= or blocks=.")
    return changed(model, edit)


# -- a backbone of its own ------------------------------------------------------------------------------------------------


@dataclass
class Moved:
    """Where what an adapter has at a point of the old backbone belongs in the new one."""

    names: dict[str, str] = field(default_factory=dict)  # of blocks that stay: old -> new
    gone: tuple[str, ...] = ()
    cuts: dict[str, list[Cut]] = field(default_factory=dict)  # old name of a point (or fused projection) -> its cuts

    def name(self, key: str) -> str | None:
        """The new name of a point or key; None if it is gone."""
        for block in self.gone:
            if key == block or key.startswith(f"{block}."):
                return None
        for old, new in self.names.items():
            if key == old or key.startswith(f"{old}."):
                return new + key[len(old) :]
        return key

    def entries(self, before: LinearPoint, after: LinearPoint, index: Tensor) -> tuple[Tensor, Tensor]:
        """Of flat places (n,) in a point's weight: numbers of those that stay, and their places in the smaller weight."""
        row, column = (index // before.dim_in).long(), (index % before.dim_in).long()
        stays = torch.ones_like(row, dtype=torch.bool)
        for place, was, now in ((row, before.dim_out, after.dim_out), (column, before.dim_in, after.dim_in)):
            cuts = self.cuts.get(before.name, ())
            kept = next((c.kept for c in cuts if (c.before, len(c.kept)) == (was, now)), None) if was != now else None
            if kept is not None:
                to = torch.full((was,), -1, device=index.device)
                to[list(kept)] = torch.arange(now, device=index.device)
                place.copy_(to[place])
                stays &= place >= 0
        return stays.nonzero()[:, 0], (row * after.dim_in + column)[stays].to(index.dtype)


def apply(module: nn.Module, family: type[Backbone], points: Sequence[Point], edit: Mapping[str, Any]) -> Moved:
    """Make a change to a plain module of a family; `points` are those of the module before."""
    moved = Moved()
    at = {p.name: p for p in points if p.kind == "block"}
    for kind in ("heads", "neurons"):
        for name, indices in edit.get(kind, {}).items():
            if indices:
                cutting = family.surgery()
                cutter = cutting.cut_heads if kind == "heads" else cutting.cut_neurons
                for key, cut in cutter(name, module.get_submodule(at[name].path), indices).items():
                    moved.cuts.setdefault(f"{name}.{key}", []).append(cut)
    if edit.get("blocks"):
        moved.names, moved.gone = family.surgery().cut_blocks(module, list(at.values()), edit["blocks"])
    for name, form in edit.get("children", {}).items():
        block, _, role = name.rpartition(".")
        family.children().put(block, module.get_submodule(at[block].path), role, form)
    for to in FORMATS:
        for path in edit.get(to, ()):
            parent, _, last = path.rpartition(".")
            setattr(module.get_submodule(parent), last, lightened(module.get_submodule(path), path, to))  # type: ignore[arg-type]
    for path, of in edit.get("packed", {}).items():
        parent, _, last = path.rpartition(".")
        linear: Any = module.get_submodule(path)
        setattr(module.get_submodule(parent), last, PackedLinear.empty(linear, of["bits"], of["groups"]))
    for path in edit.get("masked", ()):
        linear = module.get_submodule(path)
        if "weight_mask" not in linear._buffers:
            linear.register_buffer("weight_mask", torch.ones_like(linear.weight, dtype=torch.bool))
    return moved


def wrap(model_class: type[Model], family: Any, recipe: dict[str, Any], **options: Any) -> Model:
    """A model on a changed module, under its own name."""
    made = model_class(family, num_classes=0, **options)
    made.backbone_name = family.name = f"{recipe['base']}~{(made.fingerprint or 'v1:meta')[3:11]}"
    made.points.backbone = family.name
    made.recipe = recipe  # type: ignore[assignment]
    return made


def changed(
    model: Model,
    edit: dict[str, Any],
    masks: Mapping[str, Tensor] | None = None,
    values: Mapping[str, Tensor] | None = None,
    without: str = "",
) -> Model:
    """A new model whose backbone has this change; heads and adapters come along, but the one `without`, or it is refused.

    `masks` are of sparse weights, `values` of packed ones.
    """
    former = getattr(model, "recipe", None)
    base = former["base"] if former else model.backbone_name
    recipe = {
        "base": base,
        "kwargs": dict(model.backbone_kwargs),
        "edits": [*(former["edits"] if former else ()), edit],
    }
    with model._bare():
        plain = copy.deepcopy(model.backbone)
    moved = apply(plain, type(model.family), model.points, edit)
    with torch.no_grad():
        for path, mask in (masks or {}).items():
            linear: Any = plain.get_submodule(path)
            linear.weight_mask.logical_and_(mask)
            linear.weight.mul_(linear.weight_mask)
        if values:
            plain.load_state_dict(values, strict=False)
    family = model.family.again(plain, base)
    family.configure(**model.backbone_kwargs)
    new = wrap(type(model), family, recipe, memory=model.memory, kwargs=model.backbone_kwargs)
    new.heads = copy.deepcopy(model.heads)
    new._classes = copy.deepcopy(model._classes)
    exact = not any(edit.get(to) for to in (*FORMATS, "masked", "packed"))
    for name, adapter in model.adapters.items():
        if name != without:
            _bring(new, name, adapter, moved, model)
    new.to(device=model.device, dtype=model.dtype)
    if exact and model.device.type != "meta":
        _prove(model, new, edit)
    new.set_active(*(name for name in model.active if name != without))
    return new.train(model.training)


def _bring(new: Model, name: str, adapter: Any, moved: Moved, model: Model) -> None:
    """Attach an adapter to the new model, with the tensors that it has in the old one, cut to fit."""
    sorry = f"the adapter '{name}' ({adapter.method}) cannot be cut to fit"
    own: tuple[Any, dict[str, Tensor | None]] | None = None  # what it cuts itself
    if moved.cuts or moved.gone:
        own = adapter.cut(moved, model.points, new.points)
    if adapter.plan is not None and (moved.cuts or moved.gone) and own is None:
        raise ConfigError(f"{sorry}: its plan names single points and weights of this backbone. {_way(adapter)}")
    try:
        cut = (adapter if own is None else own[0]).fresh()
        cut.of_values = True
        twin = new.add_adapter(cut, name, num_classes=None, activate=False)
    except ZooError as error:
        raise ConfigError(f"{sorry}: {error}") from error
    old = {
        new_key: (key, value) for key, value in adapter.state_dict().items() if (new_key := moved.name(key)) is not None
    }
    fresh, given = twin.state_dict(), {} if own is None else own[1]
    gone = {key for key, value in given.items() if value is None}
    if old.keys() - gone != fresh.keys():
        odd = sorted(old.keys() - gone ^ fresh.keys())[0]
        raise ConfigError(f"{sorry}: attached to the smaller backbone it has other tensors ('{odd}'). {_way(adapter)}")
    ready = {key: value for key, value in given.items() if value is not None}
    for key, (before, value) in old.items():
        if key in given:
            continue
        cuts = [c for point, found in moved.cuts.items() if before.startswith(f"{point}.") for c in found]
        fitted = _fit(value, tuple(fresh[key].shape), cuts)
        if fitted is None:
            raise ConfigError(
                f"{sorry}: '{before}' is {tuple(value.shape)} and would have to be {tuple(fresh[key].shape)}, along an axis "
                f"that belongs to neither its point's input nor its output. {_way(adapter)}"
            )
        ready[key] = fitted
    try:
        twin.load_state_dict(ready)
    except ZooError as error:  # what it learned belongs to the weights as they were
        raise ConfigError(f"{sorry}: {error} {_way(adapter)}") from error
    if name in new.heads and name not in model.heads:
        raise ConfigError(f"{sorry}: the head reads its features, which are of another width now. Remove it.")


def _way(adapter: Any) -> str:
    """What to do with an adapter that stays behind."""
    return "Merge it, or remove it." if type(adapter).merge is not Adapter.merge else "Remove it."


def _fit(value: Tensor, shape: tuple[int, ...], cuts: Sequence[Cut]) -> Tensor | None:
    """A tensor with the axes that are shorter now cut; None if no cut of its point explains one."""
    if value.dim() != len(shape):
        return None
    for axis, (now, wanted) in enumerate(zip(value.shape, shape)):
        if now != wanted:
            index = next((c.kept for c in cuts if (c.before, len(c.kept)) == (now, wanted)), None)
            if index is None:
                return None
            value = value.index_select(axis, torch.tensor(index, device=value.device))
    return value


@torch.no_grad()
def _prove(old: Model, new: Model, edit: Mapping[str, Any]) -> None:
    """Run the bare backbones and each adapter: the new model must compute what the old one does without the parts."""
    mode, active = old.training, old.active
    inputs = old.example_batch(2)
    try:
        old.eval()
        new.eval()
        for names in ((), *((name,) for name in old.adapters)):
            old.set_active(*names)
            new.set_active(*names)
            try:
                with _without(old, edit):
                    expected = old(*inputs, **_given(old, inputs))
                found = new(*inputs, **_given(old, inputs))
            except ZooError as error:
                raise ConfigError(f"the adapter '{names[0] if names else ''}' cannot be cut to fit: {error}") from error
            close = 1e-4 if old.dtype == torch.float32 else 5e-2
            if not torch.allclose(found, expected, rtol=close, atol=close * float(expected.abs().amax())):
                if not names:
                    raise ConfigError(
                        f"A smaller '{old.backbone_name}' does not compute what it does without these parts; the family "
                        f"'{old.family.family}' cannot be cut like this."
                    )
                raise ConfigError(
                    f"the adapter '{names[0]}' cannot be cut to fit: what it computes depends on the parts that are taken out. "
                    f"{_way(old.adapters[names[0]])}"
                )
    finally:
        old.set_active(*active)
        old.train(mode)


def _given(model: Model, inputs: tuple[Any, ...]) -> dict[str, Any]:
    values = model.example_context(*inputs) if model.wanted else {}
    return {"context": values} if values else {}


@contextmanager
def _without(model: Model, edit: Mapping[str, Any]) -> Iterator[None]:
    """The old model with these heads and neurons at zero and these blocks passed over."""
    at = {p.name: p for p in model.points if p.kind == "block"}
    with ExitStack() as stack:
        for name in edit.get("blocks", ()):
            stack.callback(at[name].module.register_forward_hook(_passed_over).remove)
        for kind in ("heads", "neurons"):
            for name, indices in edit.get(kind, {}).items():
                reader, channels = model.family.surgery().parts_of(kind, at[name].module, indices)
                stack.callback(reader.register_forward_pre_hook(partial(_zeroed, channels)).remove)
        yield


def _passed_over(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return args[0]


def _zeroed(channels: Sequence[int], module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x = args[0].clone()
    x[..., list(channels)] = 0
    return (x, *args[1:])


def _whole(given: Iterable[int], what: str, key: int | str) -> list[int]:
    """Indices, each once, in order."""
    try:
        return sorted({operator.index(i) for i in given})
    except TypeError:
        raise ConfigError(f"{what}[{key!r}] is {given!r}; expected a list of whole numbers.") from None


def _block(model: Model, key: int | str) -> Point:
    """A block by name, or by an index that only one block has."""
    blocks = [p for p in model.points if p.kind == "block"]
    found = [p for p in blocks if key == p.name or (not isinstance(key, bool) and key == p.block)]
    if len(found) != 1:
        why = f"{len(found)} blocks have the index {key}; give the name" if found else f"there is no block {key!r}"
        raise SelectionError(f"{model.backbone_name}: {why}. {nearest(str(key), [p.name for p in blocks])}")
    return found[0]
