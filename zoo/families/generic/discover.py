"""What can be found in a network without knowing it: projections, norms, blocks, sublayers.

Projections and norms are found by their type, roles by usual names. What depends on how modules are called (that they are
called at all, that blocks follow each other, that a sublayer is a function of the tokens) is only believed where a pass has
shown it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoo.engine.sites import site_at
from zoo.families.generic.roles import is_norm, linear_role
from zoo.families.generic.watch import Pass
from zoo.points import BlockPoint, ConditionPoint, NormPoint, Point, SublayerPoint
from zoo.points.foreign import is_packed, kept_by
from zoo.points.rows import is_conv, is_transposed, make_linear

SUBLAYERS = {
    "attn": ("attn", "attention", "self_attn", "self_attention", "attn1", "token_mixer", "mixer"),
    "mlp": ("mlp", "ffn", "ff", "feed_forward", "feedforward", "channel_mixer"),
}
SUBLAYER = {name: role for role, names in SUBLAYERS.items() for name in names}


@dataclass
class Found:
    """The points of a network, and what is none of them: module path -> why."""

    points: list[Point] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def discover(root: nn.Module, seen: Pass | None, head: nn.Module | None = None) -> Found:
    """All points of a network, in the order in which a pass met them (else in the order of its modules).

    Args:
        seen: a pass; None: not looked at, so blocks and sublayers are not known.
        head: what is taken for the classifier, and is no point.
    """
    found = Found()
    paths = {m: path for path, m in root.named_modules()}
    shared = _shared(root)
    blocks = dict(_blocks(root, seen, paths))
    points: list[tuple[int, Point]] = []
    for module, path in paths.items():
        if path == "" or module is head:
            continue
        point = _point(root, module, path, shared, found.refused)
        if point is None:
            continue
        if seen is not None and path not in seen.modules:
            found.refused[path] = "it is never called: its weight is read directly, or the example does not reach it"
            continue
        if seen is not None and path in seen.read:
            found.refused[path] = (
                "its weight is also read besides its call, and a merge would change what is read there"
            )
            continue
        index, stage = _place(path, blocks)
        point.block, point.stage = index, stage
        points.append((seen.modules[path].order if seen is not None else len(points), point))
    points.sort(key=lambda item: item[0])
    found.points = [*_words(root, seen, paths), *(point for _, point in points)]
    found.points += _larger(root, seen, blocks, found.points)
    return found


# -- projections and norms --------------------------------------------------------------------------------------------


def _point(
    root: nn.Module, module: nn.Module, path: str, shared: dict[int, list[str]], refused: dict[str, str]
) -> Point | None:
    parent = root.get_submodule(path.rpartition(".")[0])
    weight = module._parameters.get("weight")
    what = type(module).__name__
    if isinstance(parent, nn.MultiheadAttention):
        refused[path] = "nn.MultiheadAttention reads its weight without calling it"
        return None
    if isinstance(module, nn.MultiheadAttention):
        refused[f"{path}.in_proj"] = "nn.MultiheadAttention keeps q, k and v in one parameter that is no module"
        return None
    projection = isinstance(module, nn.Linear) or is_conv(module) or is_transposed(module) or is_packed(module)
    if not projection and not is_norm(module):
        widths = hasattr(module, "in_features") and hasattr(module, "out_features")
        if widths and (not list(module.children()) or next(module.parameters(), None) is None):
            refused[path] = f"{what} keeps no (out, in) matrix of floats (a quantised projection?)"
        return None
    if weight is None and not (getattr(module, "kept_in", "") or is_packed(module)):  # nothing to merge into is no harm
        refused[path] = f"the weight of this {what} is made of other parameters (a parametrisation?)"
        return None
    kept = kept_by(module)
    if weight is not None and not kept and _quantised(weight):
        if weight.is_complex():
            refused[path] = (
                f"the weight of this {what} is of complex numbers ({str(weight.dtype).removeprefix('torch.')})"
            )
            return None
        refused[path] = f"the weight of this {what} is quantised ({str(weight.dtype).removeprefix('torch.')})"
        return None
    for name, parameter in module._parameters.items():
        places = shared.get(id(parameter), ())
        other = next((p for p in places if p != f"{path}.{name}"), None)
        if other is not None:
            refused[path] = f"its {name} is tied: it is '{other}', too"
            return None
    common: dict[str, Any] = {"name": path, "path": path, "module": module}
    if not projection:
        assert weight is not None
        width = len(weight)
        return NormPoint(
            **common,
            role="norm",
            dim_in=width,
            dim_out=width,
            unmergeable=_odd(module),
            channels_first=_channels_first(module),
        )
    siblings = frozenset(n for n, _ in parent.named_children()) | frozenset(parent._parameters)
    role = linear_role(path, module, siblings)
    point = make_linear(module, None, "", 0, {**common, "role": role})
    assert point is not None
    point.unmergeable = f"its weight is kept {kept}" if kept else _odd(module)
    return point


def _words(root: nn.Module, seen: Pass | None, paths: dict[nn.Module, str]) -> list[Point]:
    """The embedding of a text's words, where a network of transformers says which module it is, and a pass has called it."""
    try:
        table = root.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return []
    if not isinstance(table, nn.Embedding) or seen is None:
        return []
    for module, path in paths.items():  # the one that is called may be another with the same weight
        if isinstance(module, nn.Embedding) and module.weight is table.weight and path in seen.modules:
            width = table.embedding_dim
            return [ConditionPoint(name=path, role="words", path=path, module=module, dim_in=0, dim_out=width)]
    return []


def _shared(root: nn.Module) -> dict[int, list[str]]:
    """Parameters that stand in more than one module: identity -> all of their places."""
    owners: dict[int, list[str]] = {}
    for path, module in root.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{path}.{name}".lstrip("."))
    return {key: places for key, places in owners.items() if len(places) > 1}


def _quantised(weight: Tensor) -> bool:
    return not weight.is_floating_point() or type(weight.data) is not Tensor or hasattr(weight, "quant_state")


_PLAIN: dict[type, str] = {}
IMAGES = (nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
OWN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d)


def _odd(module: nn.Module) -> str:
    """Why a class does not use its weight as it stands; "" if it does. Tried once for each class, on a small copy."""
    kind = type(module)
    if getattr(module, "kept_in", ""):  # `zoo.quantise`: F.linear with the rounded weight
        return ""
    if module._forward_hooks and site_at(module) is None:
        return "a forward hook of the user's stands on it and changes its output before an adapter does"
    if kind in OWN or (kind.forward in {o.forward for o in OWN} and not module._forward_pre_hooks):
        return ""
    if kind not in _PLAIN:
        _PLAIN[kind] = _tried(module)
    return _PLAIN[kind]


def _tried(module: nn.Module) -> str:
    """Of a class that uses them as they stand, twice the weight and bias give twice the output, and one more of bias one more."""
    words = f"the class {type(module).__name__} does not use its weight as it stands"
    try:
        twin = copy.deepcopy(module).to_empty(device="cpu").float().eval()
        twin._forward_hooks.clear()
        twin._forward_pre_hooks.clear()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for tensor in (*twin.parameters(), *twin.buffers()):
                if tensor.is_floating_point():
                    tensor.copy_(torch.rand_like(tensor) + 0.5)
            x = _sample(twin)
            once = twin(x)
            for parameter in twin.parameters():
                parameter.mul_(2)
            twice = twin(x)
            fits = torch.allclose(twice, 2 * once, rtol=1e-4, atol=1e-5)
            bias = twin._parameters.get("bias")
            if bias is not None:
                bias.sub_(100)
                fits = fits and torch.allclose(twin(x), twice - 100, rtol=1e-4, atol=1e-3)
            return "" if fits else words
    except Exception:  # it takes other arguments, or other parameters: what it does with its weight is not known
        return words


def _sample(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    if is_conv(module):
        channels: Any = module.in_channels
        return torch.randn(2, channels, *(7 for _ in module.kernel_size))  # type: ignore[union-attr]
    if weight.ndim == 2:
        return torch.randn(2, weight.shape[0] if is_transposed(module) else weight.shape[1])
    return torch.randn(2, len(weight), 3, 3) if _channels_first(module) else torch.randn(2, len(weight))


def _channels_first(module: nn.Module) -> bool:
    """Whether a norm's channels are the second axis, as of images."""
    return isinstance(module, IMAGES) or "2d" in type(module).__name__.lower()


# -- blocks and sublayers ---------------------------------------------------------------------------------------------


def _blocks(root: nn.Module, seen: Pass | None, paths: dict[nn.Module, str]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Path of every block -> (its number, that of its list): items of a list that hand their output to the next one.

    Of lists inside of lists the innermost whose items have children of their own. Experts of a mixture are items of a list,
    too, and do not follow each other.
    """
    chains: list[list[tuple[int, str]]] = []
    for module, path in paths.items():
        items = list(module.named_children())
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not items:
            continue
        if any(next(iter(item.children()), None) is None for _, item in items):
            continue
        chain = [(item, f"{path}.{name}".lstrip(".")) for name, item in items]
        if seen is not None:
            if not all(where in seen.modules for _, where in chain):
                continue
            runs = [seen.modules[where] for _, where in chain]
            if any(b.entered is None or b.entered is not a.left for a, b in itertools.pairwise(runs)):
                continue
            chains.append([(run.order, path) for run, (_, path) in zip(runs, chain)])
        elif len({type(item) for item, _ in chain}) == 1 and len(chain) > 1:
            chains.append([(len(chains), path) for _, path in chain])
    inner = [
        c
        for c in chains
        if not any(o is not c and o[0][1].startswith(c[0][1] + ".") and _blocklike(root, o) for o in chains)
    ]
    inner = [c for c in inner if _blocklike(root, c) or len(inner) == 1]
    inner.sort(key=lambda c: c[0][0])
    number = 0
    for stage, chain_ in enumerate(inner):
        for _, path in chain_:
            yield path, (number, stage if len(inner) > 1 else -1)
            number += 1


def _blocklike(root: nn.Module, chain: list[tuple[int, str]]) -> bool:
    """Whether each item has projections at two places at least, as a residual block has, and the items are of one class."""
    items = [root.get_submodule(path) for _, path in chain]
    heavy = all(sum(isinstance(m, nn.Linear) or is_conv(m) for m in item.modules()) > 1 for item in items)
    return heavy and len({type(i) for i in items}) == 1


def _place(path: str, blocks: dict[str, tuple[int, int]]) -> tuple[int | None, int | None]:
    words = path.split(".")
    for end in range(len(words), 0, -1):
        place = blocks.get(".".join(words[:end]))
        if place is not None:
            return place[0], None if place[1] < 0 else place[1]
    return None, None


def _larger(root: nn.Module, seen: Pass | None, blocks: dict[str, tuple[int, int]], inside: list[Point]) -> list[Point]:
    """Blocks and sublayers over tokens (B, N, d): those that a pass has shown to be functions of the tokens alone."""
    found: list[Point] = []
    if seen is None:
        return found
    for path, (index, stage) in blocks.items():
        block = root.get_submodule(path)
        width = _tokens(seen, path)
        if not width:
            continue
        place: dict[str, Any] = {
            "block": index,
            "stage": None if stage < 0 else stage,
            "dim_in": width,
            "dim_out": width,
        }
        for name, part in block.named_children():
            role = SUBLAYER.get(name.lower())
            full = f"{path}.{name}"
            if role is None or _tokens(seen, full) != width or not _ends_in_projection(seen, full, inside):
                continue
            found.append(
                SublayerPoint(
                    name=full,
                    role=role,
                    path=full,
                    module=part,
                    entry=part,
                    entry_side="input",
                    exit=part,
                    exit_side="output",
                    **place,
                )
            )
        found.append(BlockPoint(name=path, role="block", path=path, module=block, **place))
    return found


def _tokens(seen: Pass, path: str) -> int:
    """d of a module that ran once, on (B, N, d), and gave as much; else 0."""
    run = seen.modules.get(path)
    if run is None or run.calls != 1 or run.entered is run.left:
        return 0
    before, after = run.shapes
    return before[-1] if before == after and len(before) == 3 else 0


def _ends_in_projection(seen: Pass, path: str, points: list[Point]) -> bool:
    """Whether the last thing that a branch does is a projection: behind a norm, its residual sum may be inside."""
    mine = [p for p in points if p.path.startswith(path + ".")]
    last = max(mine, key=lambda p: seen.modules[p.path].order, default=None)
    return last is not None and last.kind == "linear"
