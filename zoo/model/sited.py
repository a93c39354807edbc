"""The sites of a model: who is active at them, what they recompute, and which parameters rest."""

from __future__ import annotations

from torch import nn

from zoo.engine.session import Swap
from zoo.engine.sites import BlockSite, Op, Place, Site
from zoo.model.headed import Headed
from zoo.points import Points


class Sited(Headed):
    """Base of `AdapterHost`."""

    points: Points
    _sites: dict[int, Site]
    _ops: dict[str, list[tuple[Site, Op]]]
    _swaps: dict[str, list[Swap]]
    _memory: str
    _resting: dict[str, set[str]]

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
        for swaps in self._swaps.values():  # of all: whoever was interrupted may have left one in
            for swap in swaps:
                swap.put(False)
        self._state.put(place)
        for name in self._state.active:
            for swap in self._swaps.get(name, ()):
                swap.put(True)

    def _watch_memory(self) -> None:
        """Bring all sites up to date: who is active, and whose outputs are recomputed."""
        wanted: dict[int, tuple[nn.Module, str, bool]] = {}
        if (self._state.active or self._state.route) and self._memory != "off":
            for point in self.points:
                if point.kind == "norm":
                    wanted[id(point.module)] = (point.module, "cheap", False)
                elif self._memory == "low" and point.role in self.family.cheap_products and point.kind == "linear":
                    wanted[id(point.module)] = (point.module, "product", False)
                elif self._memory == "min" and point.kind == "block":
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
        return trained or any(s.module in inside for n in self._state.active for s in self._swaps[n])
