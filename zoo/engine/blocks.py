"""Blocks by hand: blocks and half blocks as callables, a forward pass in slices with a cursor, a block without our hooks.

    run = zoo.blocks(model)             the blocks of a tower and stage that follow each other
    here = run.start(images)            a cursor: the tokens in front of the first block, and the further arguments of its call
    here = run.advance(here, 3)         three blocks on; to the end without a number
    features = run.finish(here)         what stands behind the blocks; equal to model.features(images), to the bit

    run.block(2)(tokens)                one block, with what adapters do there
    run.half(2, "attn")(tokens)         its attention half with the residual sum, then run.half(2, "mlp")
    run.clone(2)                        the library's block alone: frozen weights, no hooks, nothing of the model

Blocks take further arguments (masks, rotary tables): `start` captures those of the model's own call, a cursor carries them, and
`block` and `half` take `call=cursor`. Only where blocks are a plain sequence (`Backbone.plain_blocks`). A cursor is a value: it
can be kept, advanced twice, differentiated through. Adapters that collect along the way (VQT) or run the blocks themselves
(MEFT) are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from zoo.adapters.base import Adapter
from zoo.backbone import Backbone
from zoo.engine.sites import Site
from zoo.engine.swaps import ByHand
from zoo.errors import AttachError, CombinationError, ConfigError
from zoo.points import Point

__all__ = ["BlockRunner", "Cursor", "blocks", "require_plain", "sequences"]


def require_plain(family: Backbone, method: str) -> None:
    """Raise AttachError unless the family's blocks can be run by hand."""
    if not family.plain_blocks:
        raise AttachError(
            f"'{method}' runs blocks by hand, and those of the family '{family.family}' are not a plain sequence: they hand on "
            "more than their tokens, each is called with something of its own, or something stands between them. Families that "
            "are: vit, eva (but for learned rotations), beit, swin, swinv2, clip, ast, wav2vec2, whisper-encoder, "
            "videomae, and the vision transformers of transformers (hf-vit, hf-dinov2, hf-clip, hf-sam)."
        )


def sequences(points: Iterable[Point]) -> list[list[Any]]:
    """Block points in runs of neighbours: same tower and stage, one behind the other."""
    found: list[list[Point]] = []
    for point in points:
        last = found[-1][-1] if found else None
        after = last is not None and last.block is not None and point.block == last.block + 1
        if last is not None and after and (last.tower, last.stage) == (point.tower, point.stage):
            found[-1].append(point)
        else:
            found.append([point])
    return found


@dataclass(frozen=True)
class Cursor:
    """A forward pass that stands in front of block `at` of its sequence."""

    tokens: Tensor
    at: int
    args: tuple[Any, ...]  # further arguments of the blocks
    kwargs: dict[str, Any]
    inputs: tuple[Any, ...]  # of the model


class _Stop(Exception):
    def __init__(self, tokens: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.caught = tokens, args, kwargs


class BlockRunner:
    """The blocks of one sequence, with the adapters that are active when they run. Made by `zoo.blocks`."""

    def __init__(self, model: Any, points: list[Point]) -> None:
        self.model = model
        self.names = [p.name for p in points]
        self._modules: list[nn.Module] = [p.module for p in points]

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"BlockRunner({self.names[0]} ... {self.names[-1]}, {len(self)} blocks of {self.model.backbone_name})"

    # -- in slices --------------------------------------------------------------------------------------------------

    def start(self, *inputs: Any) -> Cursor:
        """Everything in front of the first block.

        Raises:
            CombinationError: an active adapter that collects along the way, or runs the blocks itself.
            ConfigError: these inputs do not reach the blocks.
        """
        self._check_adapters()

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Stop(args[0], args[1:], kwargs)

        # in front of the adapters' own hooks: what they do at the block belongs to the block
        handle = self._modules[0].register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
        try:
            self.model.features(*inputs)
        except _Stop as reached:
            tokens, args, kwargs = reached.caught
            return Cursor(tokens, 0, args, kwargs, inputs)
        finally:
            handle.remove()
        raise ConfigError(f"these inputs did not reach '{self.names[0]}'; give those of the blocks' tower.")

    def advance(self, cursor: Cursor, count: int | None = None) -> Cursor:
        """The next `count` blocks; all that are left without a number."""
        left = len(self) - cursor.at
        count = left if count is None else count
        if not 0 <= count <= left:
            raise ConfigError(f"advance({count}) from block {cursor.at}: there are {left} blocks left.")
        self._check_adapters()
        tokens = cursor.tokens
        with self.model._state.saver.record(self.model.device):
            for module in self._modules[cursor.at : cursor.at + count]:
                tokens = module(tokens, *cursor.args, **cursor.kwargs)
        return replace(cursor, tokens=tokens, at=cursor.at + count)

    def finish(self, cursor: Cursor) -> Tensor:
        """What stands behind the last block: `model.features` of the cursor's inputs. The front is run once more, unused."""
        if cursor.at != len(self):
            raise ConfigError(f"the cursor stands in front of block {cursor.at} of {len(self)}; advance(cursor) first.")
        self._check_adapters()
        with self._bypassed(cursor.tokens):
            return self.model.features(*cursor.inputs)  # type: ignore[no-any-return]

    @contextmanager
    def _bypassed(self, tokens: Tensor) -> Iterator[None]:
        def passed(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return x

        before = [m.__dict__.get("forward") for m in self._modules]
        # behind the hooks of adapters, which the blocks' own run has had already
        handle = self._modules[-1].register_forward_hook(lambda module, args, output: tokens)
        try:
            for module in self._modules:
                module.__dict__["forward"] = passed
            yield
        finally:
            handle.remove()
            for module, own in zip(self._modules, before):
                module.__dict__.pop("forward", None)
                if own is not None:
                    module.__dict__["forward"] = own

    def _check_adapters(self) -> None:
        for name in self.model.active:
            adapter = self.model.adapters[name]
            if type(adapter).release is not Adapter.release:
                raise CombinationError(
                    f"'{name}' keeps something from block to block within a forward pass, so its blocks cannot be run by hand. "
                    "Switch it off (model.set_active(...)), or call the model as a whole."
                )
            if self.model._wants.get(name):
                raise CombinationError(
                    f"'{name}' reads values that are there only within a forward pass of the model, so its blocks cannot be run "
                    "by hand. Switch it off (model.set_active(...)), or call the model as a whole."
                )

    # -- one at a time ----------------------------------------------------------------------------------------------

    def block(self, at: int, call: Cursor | None = None) -> Callable[[Tensor], Tensor]:
        """tokens -> tokens: block `at`, with what adapters do there and the further arguments of `call`."""
        module, args, kwargs = self._at(at), *_further(call)
        return lambda tokens: module(tokens, *args, **kwargs)

    def half(self, at: int, role: str, call: Cursor | None = None) -> Callable[[Tensor], Tensor]:
        """tokens -> tokens: the "attn" or "mlp" half of block `at` with its residual sum, with what adapters do inside.

        Raises:
            AttachError: this family's blocks are not described in halves. ConfigError: another role.
        """
        if role not in ("attn", "mlp"):
            raise ConfigError(f"role is {role!r}; a block's halves are 'attn' and 'mlp'.")
        module, family, (args, kwargs) = self._at(at), self.model.family, _further(call)
        state = self.model._state

        def half(tokens: Tensor) -> Tensor:
            risen = state.rise()
            try:
                return family.half(module, role, tokens, *args, **kwargs)
            finally:
                state.settle(risen)

        return half

    def clone(self, at: int) -> nn.Module:
        """A copy of block `at` as the library made it: frozen weights, no hooks of ours, in evaluation mode."""
        module = self._at(at)
        twin = copy.deepcopy(module)
        for part in twin.modules():
            after, before = part._forward_hooks_with_kwargs, part._forward_pre_hooks_with_kwargs
            for hooks, marks in ((part._forward_hooks, after), (part._forward_pre_hooks, before)):
                for key in [
                    k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), (Site, ByHand))
                ]:
                    del hooks[key]
                    marks.pop(key, None)
            if isinstance(getattr(part.__dict__.get("forward"), "__self__", None), Site):
                del part.__dict__["forward"]
        return twin.requires_grad_(False).eval()

    def _at(self, at: int) -> nn.Module:
        if not -len(self) <= at < len(self):
            raise ConfigError(f"there is no block {at}; there are {len(self)} ({self.names[0]} ... {self.names[-1]}).")
        return self._modules[at]


def _further(call: Cursor | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), {}) if call is None else (call.args, call.kwargs)


def blocks(model: Any, where: str | None = None) -> BlockRunner:
    """The blocks of a model to be run by hand.

    Args:
        where: the tower ("image", "text") or stage ("stages.2"), where there are several: the beginning of the blocks' names.

    Raises:
        AttachError: the family's blocks are not a plain sequence. ConfigError: no or several sequences of that name.
    """
    require_plain(model.family, "zoo.blocks")
    runs = sequences(p for p in model.points if p.kind == "block")
    fitting = [r for r in runs if where is None or r[0].name.startswith(f"{where}.")]
    if len(fitting) != 1:
        starts = ", ".join(f"'{r[0].name.rpartition('blocks.')[0].rstrip('.')}' ({len(r)} blocks)" for r in runs)
        raise ConfigError(f"where is {where!r}; expected the name of one sequence of {model.backbone_name}: {starts}.")
    return BlockRunner(model, fitting[0])
