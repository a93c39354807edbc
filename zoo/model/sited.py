"""The sites of a model: who is active at them, what they recompute, and which parameters rest."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import nn

from zoo.engine.sharded import refuse
from zoo.engine.sites import BlockSite, Op, Place, Site
from zoo.engine.swaps import ByHand, Risen, Swap
from zoo.errors import ConfigError
from zoo.model.headed import HALVES, Headed
from zoo.points import Points

_LOG = logging.getLogger("zoo")
OUTSIDE = (
    "run",
    "query",
)  # verbs of ops that compute with frozen weights while their block does not run, in backward too
# how timm and open_clip, and how transformers and diffusers call the switch
CHECKPOINTING = ("grad_checkpointing", "gradient_checkpointing")


class Sited(Headed):
    """Base of `AdapterHost`."""

    points: Points
    _sites: dict[int, Site]
    _ops: dict[str, list[tuple[Site, Op]]]
    _swaps: dict[str, list[Swap]]
    _memory: str
    memory: Any
    _resting: dict[str, set[str]]
    _by_hand: list[Any]
    _outside: str  # an active adapter with ops of these verbs

    def _replace_site(self, old: Site, new: Site) -> None:
        ops, recompute = old.ops, old.recompute
        old.ops, old.recompute = [], ""
        old.refresh()
        new.ops, new.recompute = ops, recompute
        self._sites[id(old.module)] = new
        new.refresh()

    def _rest(self, key: str, module: nn.Module, resting: bool) -> None:
        """Freeze what is not in use, and unfreeze what this froze: what a method or the user froze stays frozen."""
        frozen = self._resting.setdefault(key, set())
        for name, parameter in module.named_parameters():
            if resting and parameter.requires_grad:
                frozen.add(name)
                parameter.requires_grad_(False)
            elif not resting and name in frozen:
                parameter.requires_grad_(True)
        if not resting:
            frozen.clear()

    def _in_training(self) -> list[str]:
        """Which of the adapters in use are trained (`set_active(..., train=...)`)."""
        return [name for name in self._state.active if not self._resting.get(name)]

    def _switch(self, place: Place) -> None:
        """For recomputation in backward: the adapters of another time run, and nothing else about the model changes."""
        self._put(place)
        for where in self._sites.values():
            where.refresh()

    def _serve(self, place: Place) -> None:
        """For a part of a routed batch: other adapters run, with their settings of memory; what is trained stays as it is."""
        self._put(place)
        self._watch_memory()

    def _put(self, place: Place) -> None:
        self._state.put(place)
        self._stand_in()

    def _stand_in(self) -> None:
        """What stands in for the backbone's parameters in each pass from now on: the copies of the active adapters."""
        active = self._state.active
        swaps = tuple(swap for name in active for swap in self._swaps.get(name, ()))
        self._outside = next((n for n in active if any(op.verb in OUTSIDE for _, op in self._ops.get(n, ()))), "")
        if swaps or self._state.swaps:
            self._state.stand(swaps)

    def in_use(self, module: nn.Module, name: str) -> nn.Parameter | None:
        """The parameter that a module of the backbone reads under this name: its own, or an active adapter's copy of it."""
        mine = (s.trained for s in self._state.swaps if s.module is module and s.name == name)
        return next(mine, module._parameters.get(name))

    def _hook_by_hand(self, on: bool = True) -> None:
        """Hooks at what may be called outside of a pass: the backbone, its blocks, and what has copies outside of them."""
        for handle in self._by_hand:
            handle.remove()
        self._by_hand = []
        changed = {id(swap.module): swap.module for swaps in self._swaps.values() for swap in swaps}
        if not changed or not on:
            return
        blocks = {p.path: p.module for p in self.points if p.kind == "block"}
        inside = {id(m) for block in blocks.values() for m in block.modules()}
        chosen = [self.backbone, *blocks.values(), *(m for key, m in changed.items() if key not in inside)]
        for module in {id(m): m for m in chosen}.values():
            hooks = ByHand(self._state)
            self._by_hand.append(module.register_forward_pre_hook(hooks.before, prepend=True))
            self._by_hand.append(module.register_forward_hook(hooks.after))

    # -- passes -----------------------------------------------------------------------------------------------------

    def _enter(self) -> Risen | None:
        """A pass of the backbone begins; what it returns goes to `_state.settle` when the pass is over."""
        if self._outside and not torch.compiler.is_compiling():
            why = f"'{self._outside}' reads weights of the backbone outside of the blocks' own passes"
            refuse(
                self, ConfigError, why, "Train it without sharding (DDP, or model.memory = 'min'), or another method."
            )
        if self.adapters and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._take_over()
        return self._state.rise()

    def _take_over(self) -> None:
        """The library's own checkpointing would run blocks again with whatever adapters are in use by then: ours, instead.

        Raises:
            ConfigError: this family's blocks are not known, so that there is nothing to checkpoint instead.
        """
        on = [(m, flag) for m in self._checkpointing for flag in CHECKPOINTING if getattr(m, flag, False) is True]
        if not on:
            return
        if not any(p.kind == "block" for p in self.points):
            raise ConfigError(
                f"The library's checkpointing is on in '{self.family.name}', and adapters are attached: blocks would run again "
                "with whatever adapters are in use by then, and gradients could be wrong. Switch it off; there is no "
                "memory='min' in its place, since the blocks of this network are not known."
            )
        for module, flag in on:
            setattr(module, flag, False)
        self.memory = "min"
        _LOG.warning(
            "The library's own checkpointing of '%s' is off, and memory='min' is on instead: it runs blocks again with the "
            "adapters of their forward pass. Set model.memory yourself to choose.",
            self.family.name,
        )

    @functools.cached_property
    def _checkpointing(self) -> list[nn.Module]:
        """Modules of the backbone that have a switch for checkpointing."""
        return [m for m in self.backbone.modules() if any(hasattr(m, flag) for flag in CHECKPOINTING)]

    # -- precision --------------------------------------------------------------------------------------------------

    def _note_precision(self) -> None:
        narrow = self.dtype in HALVES and torch.amp.is_autocast_available(self.device.type)
        self._state.narrow = (self.device.type, self.dtype) if narrow else None

    def _watch_memory(self) -> None:
        """Bring all sites up to date: who is active, and whose outputs are recomputed."""
        self._note_precision()
        wanted: dict[int, tuple[nn.Module, str, bool]] = {}
        if (self._state.active or self._state.route) and self._memory != "off":
            running = self._state.active if self._state.route is None else tuple(self._state.route)
            again = {name for n in running if n in self.adapters for name in self.adapters[n].reruns}  # type: ignore[union-attr]
            for point in self.points:
                if point.kind == "norm":
                    wanted[id(point.module)] = (point.module, "cheap", False)
                elif self._memory == "low" and point.role in self.family.cheap_products and point.kind == "linear":
                    wanted[id(point.module)] = (point.module, "product", False)
                elif point.kind == "block" and (self._memory == "min" or point.name in again):
                    wanted[id(point.module)] = (point.module, "", True)
            for module in self.family.elementwise_modules():
                wanted[id(module)] = (module, "cheap", False)
        for key, (module, _, block) in wanted.items():
            if key not in self._sites:
                self._sites[key] = self.family.site_kind(module, BlockSite if block else Site)(module, self._state)
        for key, where in list(self._sites.items()):
            _, where.recompute, checkpointed = wanted.get(key, (None, "", False))
            if isinstance(where, BlockSite):
                where.checkpointed = checkpointed
                where.learns = checkpointed and self._learns(where.module)
            where.refresh()
            if not where.ops and not where.recompute and not where.replaces():
                del self._sites[key]

    def _learns(self, block: nn.Module) -> bool:
        """Whether an active adapter has a parameter inside a block: an op at one of its modules, or a trained copy."""
        inside = set(block.modules())
        # what only watches gives nothing back, and hooks at the block itself run outside of its forward
        ops = (
            op
            for n in self._state.active
            for where, op in self._ops[n]
            if where.module in inside
            and not op.where.startswith("watch")
            and (where.module is not block or op.where == "forward")
        )
        trained = any(p.requires_grad for op in ops for m in op.modules for p in m.parameters())
        swaps = (s for n in self._state.active for s in self._swaps[n] if s.module in inside)
        return trained or any(s.trained.requires_grad for s in swaps)
