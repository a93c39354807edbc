"""Attaching, switching and removing adapters and their heads: the part of a model that changes."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from zoo.adapters.base import Adapter
from zoo.engine import mixing
from zoo.engine.context import Want
from zoo.engine.session import Session
from zoo.engine.sharded import refuse, reshard
from zoo.engine.sites import Op, Site
from zoo.engine.swaps import ByHand, Swap
from zoo.errors import AttachError, CombinationError, ConfigError, UnknownNameError, nearest
from zoo.model.compiled import one_more_set
from zoo.model.headed import HALVES, WIDTH
from zoo.model.sited import Sited

BEFORE = "Attach, calibrate and load adapters and make heads first, then call fully_shard."


class AdapterHost(Sited):
    """Base of `Model`: keeps adapters, heads, and the sites at which the adapters' ops run."""

    _wants: dict[str, tuple[Want, ...]]  # only of adapters that read values of the forward pass
    _plan: str
    _beside: bool  # all active adapters are side networks

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """A cast to half precision is one of the backbone: adapters and heads stay in float32, too fine for its steps."""
        parts = [self.adapters, self.heads]
        probe = next((p for part in parts for p in part.parameters() if p.is_floating_point()), None)
        if probe is None or fn(probe.new_empty(0)).dtype not in HALVES:
            super()._apply(fn, recurse)
        else:
            for name, part in self.named_children():
                part._apply(_kept_wide(fn) if name in ("adapters", "heads") else fn)
        self._note_precision()
        return self

    # -- copies -----------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterHost:
        for where in self._sites.values():  # a block may have been copied in front of us, by who holds both
            memo.pop(id(where), None)
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__setstate__({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items()})
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is a model of its own: its sites stand under its own modules."""
        super().__setstate__(state)
        self._sites = {id(where.module): where for where in self._sites.values()}
        for where in self._sites.values():
            where.settle()
        for module in self.backbone.modules():  # of a block that was copied in front of us
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), ByHand)]:
                    del hooks[key]
        self._by_hand = []
        self._hook_by_hand()

    # -- adapters ---------------------------------------------------------------------------------------------------

    def add_adapter(
        self, adapter: Adapter | str, name: str | None = None, *, num_classes: int | None = None, activate: bool = True
    ) -> Adapter:
        """Attach a fresh copy of an adapter and return it; all or nothing.

        Args:
            adapter: a method's name or a config object (which is copied, so it can be used again).
            name: under which it is switched and saved; by default the method's name.
            num_classes: a head of its own of this width.
            activate: use it together with the ones active now.

        Raises:
            AttachError, SelectionError, ConfigError: it does not fit; the model is as it was before.
            CombinationError: it and an active one cannot work together.
        """
        from zoo import registry

        if not isinstance(adapter, (str, Adapter)):
            raise ConfigError(f"adapter is {adapter!r:.80}; expected a method's name or a config object (zoo.adapter).")
        fresh: Adapter = registry.adapter(adapter) if isinstance(adapter, str) else adapter.fresh()
        name = self._free_name(fresh.method) if name is None or name == "" else name
        if (
            not isinstance(name, str)
            or not name.replace("_", "").replace("-", "").replace("+", "").isalnum()
            or name in ("default", "head")
        ):
            raise ConfigError(
                f"'{name}' cannot name an adapter: use letters, digits, '-', '_' and '+' (not 'default', 'head')."
            )
        if hasattr(nn.ModuleDict(), name):  # or torch would say that the attribute exists
            raise ConfigError(
                f"'{name}' cannot name an adapter: it is a word of torch's own modules. Give another name=."
            )
        if name in self.adapters:
            raise ConfigError(f"there is an adapter '{name}' already; remove it, or give another name=.")
        fresh.name = name
        width = self.num_classes if num_classes is None else WIDTH.of("num_classes", num_classes)
        self.points.num_classes = width
        head = None
        initial, fresh.initial = fresh.initial, None
        host: Any = self
        try:
            with initial.room(host) if initial is not None else nullcontext():
                session = self._attach(name, fresh, activate)
            if initial is not None:
                initial.fill(host, fresh)
            dim = self._feature_dim([*(self._active_adapters() if activate else []), fresh])
            other = dim != _in_features(self.head if activate else self.heads["default"]) or fresh.head_kind
            if num_classes is not None or (width and other):
                head = self._new_head(width, dim, fresh, fresh.head_kind or "linear")
        except BaseException as error:
            self._watch_memory()  # clears the sites that were made
            if isinstance(error, RuntimeError) and re.search(r"allocate|out of memory", str(error)):
                raise ConfigError(
                    f"{fresh!r}, with a head of {width} classes, asks for more memory than there is: {error}. Choose smaller "
                    "settings."
                ) from error
            raise
        self.adapters[name] = fresh
        if head is not None:
            known = self.classes or self._classes.get("default")
            self.heads[name] = head
            if num_classes is None and known is not None and len(known) == width:
                self._classes[name] = list(known)  # a head of another kind or width of features, for the same classes
        self._install(name, session)
        mixed = mixing.mixed_by(session.ops) if activate else ()
        self.set_active(*(n for n in self._state.active if n not in mixed), *([name] if activate else []))
        if initial is not None:
            known_of = self.record_of(name)
            self.set_record(name, {**known_of, "notes": [*known_of.get("notes", []), initial.told()]})
        return fresh

    def reattach(self, name: str, check: Callable[[Adapter], None] | None = None) -> Adapter:
        """Attach an adapter anew after its `plan` was decided (by a calibration); its old parameters are dropped.

        `check` sees what would take their place, and may raise: the model is as it was, then.
        """
        self._known(name)
        adapter: Adapter = self.adapters[name]  # type: ignore[assignment]
        twin, active, trained = adapter.fresh(), self._state.active, self._in_training()
        resting = self._resting.get(name, set())
        frozen = {n for n, p in adapter.named_parameters() if not p.requires_grad and n not in resting}
        twin.name = name
        self.points.num_classes = self.num_classes
        head, known = dict(self.heads.items()).get(name), (dict(self._classes), dict(self._records))
        session = self._attach(name, twin, activate=name in active)
        if check is not None:
            try:
                check(twin)
            except BaseException:
                self._watch_memory()  # clears the sites that were made
                raise
        self.remove_adapter(name)
        self._classes, self._records = known
        # The instance stays the same, since the caller is usually one of its own methods.
        adapter._modules, adapter._parameters, adapter._buffers = twin._modules, twin._parameters, twin._buffers
        adapter.stand_ins = twin.stand_ins
        self.adapters[name] = adapter
        if head is not None:
            self.heads[name] = head
        self._install(name, session)
        for key, parameter in adapter.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and key not in frozen)
        self.set_active(*active, train=trained)
        return adapter

    def _install(self, name: str, session: Session) -> None:
        self._ops[name], self._swaps[name] = session.ops, session.swaps
        if session.wants:
            self._wants[name] = tuple(session.wants)
        for i, (where, op) in enumerate(session.ops):
            if id(where.module) not in self._sites:
                self._sites[id(where.module)] = where
            self._sites[id(where.module)].ops.append(op)
            session.ops[i] = (self._sites[id(where.module)], op)
        if session.swaps:
            self._hook_by_hand()

    def _attach(self, name: str, fresh: Adapter, activate: bool) -> Session:
        """Run `fresh.attach` and return what it asked for; the model is unchanged."""
        refuse(self, AttachError, f"'{name}' would not be spread with the others", BEFORE)
        made: list[int] = []

        def site(module: nn.Module, kind: type[Site]) -> Site:
            kind = self.family.site_kind(module, kind)
            known = self._sites.get(id(module))
            if known is None:
                made.append(id(module))
                known = self._sites[id(module)] = kind(module, self._state)
            elif not isinstance(known, kind):  # a plain site here so far; keep what it has
                upgraded = kind(module, self._state, known.ops, recompute=known.recompute, _handles=[])
                self._replace_site(known, upgraded)
                known = upgraded
            return known

        context, others, readers = self._state.context, self._ops, self._wants
        session = Session(name, fresh, self.family, site, self.points, context=context, others=others, readers=readers)
        self.points.session = session
        for point in self.points:
            point.session = session
        try:
            fresh.attach(self.points)
            session.finish()
            fresh.restructure()
            self._check_combination(name, session, activate)
            self._feature_dim([*self._active_adapters(), fresh])
        except BaseException:
            for key in made:
                del self._sites[key]
            raise
        finally:
            self.points.session = None
            for point in self.points:
                point.session = None
        fresh.to(device=self.device, dtype=self.adapter_dtype)
        fresh.train(self.training)
        return session

    def _check_combination(self, name: str, session: Session, activate: bool) -> None:
        if not activate:
            return
        for other in self._state.active:
            if other != name and other not in mixing.mixed_by(session.ops):  # attached anew, or not in use from now on
                self._check_pair(name, session.ops, session.swaps, other)

    def _check_pair(self, name: str, ops: list[tuple[Site, Op]], swaps: list[Swap], other: str) -> None:
        """Raise CombinationError if an adapter with these ops and swaps cannot be active together with another."""
        mixing.check_pair(name, ops, other, self._ops[other])
        advice = "Use one of them at a time (model.set_active(...)); attach the second with activate=False."
        trained = {(id(s.module), s.name) for s in swaps}
        for swap in self._swaps[other]:
            if (id(swap.module), swap.name) in trained:
                raise CombinationError(
                    f"'{name}' and '{other}' would both train the same '{swap.name}' of the backbone. {advice}"
                )
        theirs: dict[int, list[Op]] = {}
        for where, op in self._ops[other]:
            theirs.setdefault(id(where.module), []).append(op)
        for where, op in ops:
            for rival in theirs.get(id(where.module), ()):
                if op.verb == rival.verb == "replace":
                    raise CombinationError(
                        f"'{name}' and '{other}' would both replace what is at '{op.point}'. {advice}"
                    )
                if op.verb in rival.excludes or rival.verb in op.excludes:
                    raise CombinationError(
                        f"'{name}' ({op.verb} at '{op.point}') and '{other}' ({rival.verb} at '{rival.point}') need the "
                        f"same module for themselves. {advice}"
                    )

    def remove_adapter(self, name: str) -> None:
        """Take an adapter away; without any adapter the backbone is as it came, to the bit."""
        self._known(name)
        mixing.check_removal(name, self._ops)
        self.set_active(*(n for n in self._state.active if n != name))
        gone = {id(op) for _, op in self._ops.pop(name)}
        if self._swaps.pop(name):
            self._hook_by_hand()
        del self.adapters[name], self._resting[name]
        self._wants.pop(name, None)
        if name in self.heads:
            self._resting.pop(f"head/{name}", None)
            del self.heads[name]
        self._forget_head(name)
        for key, where in list(self._sites.items()):
            where.ops = [op for op in where.ops if id(op) not in gone]
            where.refresh()
            if not where.ops and not where.recompute and not where.replaces():
                del self._sites[key]
        if not self.adapters:
            self._watch_memory()

    def set_active(self, *names: str, train: str | Sequence[str] | None = None) -> None:
        """Use exactly these adapters, in this order; the others stay attached and cost nothing.

        Args:
            names: none at all switches every adapter off.
            train: which of them are trained; by default all. What a method froze inside its adapter, or you in an adapter or a
                head, stays frozen.

        Raises:
            CombinationError: two of them cannot work together; nothing is changed.
            UnknownNameError, ConfigError: there is no such adapter, or one to train is not among those in use.
        """
        wanted = names if train is None else ((train,) if isinstance(train, str) else tuple(train))
        for name in (*names, *wanted):
            self._known(name)
            if name not in names:
                raise ConfigError(
                    f"'{name}' is to be trained but not used (train={train!r}); name it among the adapters too: "
                    f"model.set_active({', '.join(map(repr, [*names, name]))}, train={train!r})."
                )
        for name, other in itertools.combinations(dict.fromkeys(names), 2):
            self._check_pair(other, self._ops[other], self._swaps[other], name)
        reshard(self)
        self._state.active = tuple(dict.fromkeys(names))
        trained = set(wanted)
        for name, adapter in self.adapters.items():
            self._rest(name, adapter, name not in trained)
        self._stand_in()
        current = self.head_name
        for name, head in self.heads.items():
            self._rest(f"head/{name}", head, name != current)
        self._plan = "+".join(self._state.active)
        one_more_set(self, self._state.active)
        self._beside = bool(self._state.active) and all(a.side_network for a in self._active_adapters())
        self._watch_memory()
        self.train(self.training)

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """A failure inside takes out the adapters that came in, and puts back heads, classes and who was active."""
        before, heads = list(self.adapters), dict(self.heads.items())
        known, active = (dict(self._classes), dict(self._records)), self._state.active
        try:
            yield
        except BaseException:
            for name in [n for n in self.adapters if n not in before]:
                self.remove_adapter(name)
            for name, head in heads.items():
                self.heads[name] = head
            self._classes, self._records = known
            self.set_active(*active)
            raise

    @contextmanager
    def disable(self) -> Iterator[None]:
        """A context without any adapter: the bare backbone and the default head."""
        active, trained = self._state.active, self._in_training()
        self.set_active()
        try:
            yield
        finally:
            self.set_active(*active, train=trained)

    def _known(self, name: str) -> None:
        if not isinstance(name, str) or name not in self.adapters:
            raise UnknownNameError(f"The model has no adapter '{name}'. {nearest(name, self.adapters.keys())}")

    def _acting(self, names: Sequence[str]) -> Sequence[str]:
        mixed = {m for n in names for m in mixing.mixed_by(self._ops.get(n, ()))}
        return [n for n in names if n not in mixed]

    def _free_name(self, method: str) -> str:
        if method not in self.adapters:
            return method
        return next(name for i in itertools.count(2) if (name := f"{method}-{i}") not in self.adapters)

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """The backbone without hooks, replacements and stand-ins."""
        active, sites = self._state.active, dict(self._sites)
        kept = {k: (s.ops, s.recompute) for k, s in sites.items()}
        self.set_active()
        self._hook_by_hand(on=False)
        for where in sites.values():
            where.ops, where.recompute = [], ""
            where.refresh()
        try:
            yield
        finally:
            for key, where in sites.items():
                where.ops, where.recompute = kept[key]
            self._sites = sites
            self._hook_by_hand()
            self.set_active(*active)


def _kept_wide(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A move to another device, without the cast to half precision that comes with it."""

    def moved(tensor: Tensor) -> Tensor:
        new = fn(tensor)
        return (
            new if new.dtype not in HALVES else tensor.to(new.device, torch.promote_types(tensor.dtype, torch.float32))
        )

    return moved


def _in_features(head: nn.Module) -> int | None:
    return getattr(head, "in_features", None)
