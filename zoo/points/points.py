"""All points of a backbone, and the one way to choose among them."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from zoo.errors import AttachError, SelectionError, nearest
from zoo.points.kinds import KINDS
from zoo.points.point import Point
from zoo.points.selectors import LONGEST, expand, matcher

if TYPE_CHECKING:
    from zoo.points.recorder import Carried, Made, Recorder, Value

_LOG = logging.getLogger("zoo")
M = TypeVar("M", bound=nn.Module)
PROJECTIONS = ("q", "k", "v", "o", "in", "out", "gate", "up", "down", "qkv", "linear")  # what "all-linear" stands for
# What stands in for roles that a network has none of: the first that it has
USUAL = (("in",), ("up", "down"), ("linear",), ("conv",))


class Points(Sequence[Point]):
    """All points of a model, in forward order. Prints as a table; `select` is the one way to choose."""

    def __init__(
        self, points: Iterable[Point], backbone: str = "", refused: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self._points = list(points)
        self.refused = dict(refused)  # projections that are no points: name -> why
        self._by_name = {p.name: p for p in self._points}
        self.backbone = backbone
        self.session: Recorder | None = None
        self.num_classes = 0  # width of the head that the adapter now attaching is going to have; 0: none
        if len(self._by_name) != len(self._points):
            names = [p.name for p in self._points]
            raise AttachError(
                f"two points of {backbone} have one name: {sorted({n for n in names if names.count(n) > 1})}"
            )

    def __len__(self) -> int:
        return len(self._points)

    def __iter__(self) -> Iterator[Point]:
        return iter(self._points)

    def __getitem__(self, key: Any) -> Any:
        """A point by name, or by position."""
        if isinstance(key, str):
            if key not in self._by_name:
                raise SelectionError(f"{self.backbone} has no point '{key}'. {nearest(key, self._by_name)}")
            return self._by_name[key]
        return self._points[key]

    def __contains__(self, key: object) -> bool:
        return key in self._by_name if isinstance(key, str) else key in self._points

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds that this backbone has."""
        return tuple(k for k in KINDS if any(p.kind == k for p in self._points))

    def roles(self, kind: str | None = None) -> tuple[str, ...]:
        """Roles that occur, optionally among the points of one kind."""
        return tuple(dict.fromkeys(p.role for p in self._points if kind is None or p.kind == kind))

    def usual(self, roles: tuple[str, ...]) -> tuple[str, ...]:
        """Roles of linear points that a method takes by default, or what a network without any of them has in their place.

        A network that nobody described (`Backbone.fallback`) may have `qkv` as one projection. Without attention it is `in`, by
        which a mixer reads its tokens, then the projections of MLPs, any other projection, convolutions.
        """
        have = self.roles("linear")
        if "q" not in roles:  # what scales keys and values has no meaning at another place
            return ("in",) if "in" in have and not set(roles) & set(have) else roles
        found = tuple(r for r in (*roles, "qkv") if r in have)
        return found or next((fit for c in USUAL if (fit := tuple(r for r in c if r in have))), roles)

    def by_sample(self) -> Points:
        """Those alone at which a value of each sample can act; of a language model with eyes the points of its language."""
        if all(p.by_sample for p in self._points):
            return self
        found = Points([p for p in self._points if p.by_sample], self.backbone, self.refused)
        found.session, found.num_classes = self.session, self.num_classes
        return found

    def linears(self, targets: str | Sequence[str], usual: tuple[str, ...] = ()) -> list[Any]:
        """The linear points that a method's `targets` name, in forward order.

        Args:
            targets: a selector; or "all-linear": q, k, v, o, in, out, gate, up and down, those that there are.
            usual: the method's default. On a backbone without attention it stands for the projection by which the mixer reads.

        Raises:
            SelectionError: as `select`.
        """
        if targets in ("all-linear", ("all-linear",)):
            have = self.roles("linear")
            chosen = [role for role in PROJECTIONS if role in have]
            if not chosen:
                raise SelectionError(
                    f"{self.backbone} has no projection that 'all-linear' could stand for; its linear points are "
                    f"{', '.join(have) or 'none'}. Name one of these roles as targets."
                )
            if self.refused:
                first, why = next(iter(self.refused.items()))
                _LOG.warning("'all-linear' leaves out %d projections, first '%s': %s.", len(self.refused), first, why)
            found = self.select(kind="linear", role=chosen)
            if lacking := [t for t in self._towers if t not in {p.tower for p in found}]:
                self._left_out("projection for 'all-linear'", lacking[0], found[0].tower)
            return found
        if targets == usual and (apart := self._by_tower(usual)) is not None:
            return apart
        return self.select(self.usual(usual) if targets == usual else targets, kind="linear")

    def _by_tower(self, usual: tuple[str, ...]) -> list[Any] | None:
        """What a method takes by default of each of several towers; None: no one of them lacks what the others have."""
        parts = [Points([p for p in self._points if p.tower == t], self.backbone) for t in self._towers]
        chosen = {part.usual(usual) for part in parts}
        cut = any(
            set(roles) & set(usual) and not set(usual) <= set(roles) for roles in chosen
        )  # a part of them is missing
        if len(chosen) < 2 or cut or any(not set(part.usual(usual)) & set(part.roles("linear")) for part in parts):
            return None
        taken = {id(p) for part in parts for p in part.select(part.usual(usual), kind="linear")}
        return [p for p in self._points if id(p) in taken]

    def sublayers(self, targets: str | Sequence[str], usual: tuple[str, ...]) -> list[Any]:
        """The sublayers that a method's `targets` name, in forward order.

        Its default, `usual`, stands for what the backbone has of attention (or a mixer in its place) and MLP.
        """
        if targets == usual:
            targets = tuple(r for r in ("attn", "mixer", "mlp") if r in self.roles("sublayer")) or targets
        return self.select(targets, kind="sublayer")

    def select(
        self,
        selector: str | Sequence[str] | None = None,
        *,
        kind: str | Sequence[str] | None = None,
        role: str | Sequence[str] | None = None,
        stage: int | Sequence[int] | None = None,
        block: int | Sequence[int] | None = None,
        tower: str | None = None,
    ) -> list[Any]:
        """The points that a selector names, in forward order.

        A selector is a name with `*` (within a component), `**`, `{q,v}` and `{0..5}`, or a bare role such as `q`, or a list
        of these (also in one string, comma-separated). Every alternative of it must match.

        Raises:
            SelectionError: nothing matches, or a part of the selector or a value of `role`, `stage` or `block` does not.
        """
        pool = self._points
        for key, wanted in (("kind", kind), ("role", role), ("stage", stage), ("block", block), ("tower", tower)):
            if wanted is None:
                continue
            values = list(wanted) if isinstance(wanted, (list, tuple, range, set)) else [wanted]
            for value in values:
                if not any(getattr(p, key) == value for p in pool):
                    have = sorted({str(getattr(p, key)) for p in pool if getattr(p, key) is not None})
                    raise SelectionError(
                        f"{self.backbone} has no {'/'.join(filter(None, [kind if isinstance(kind, str) else '', 'point']))} "
                        f"with {key}={value!r}; it has {', '.join(have) or 'none'}."
                    )
            pool = [p for p in pool if getattr(p, key) in values]
        if selector is None:
            if tower is None:
                self._both_have(kind)
            return list(pool)
        chosen: set[int] = set()
        texts = [selector] if isinstance(selector, str) else list(selector)
        for text in texts:
            if not isinstance(text, str) or len(text) > 10 * LONGEST:
                raise SelectionError(
                    f"a selector is {repr(text)[:60]}; expected a name or pattern of at most {10 * LONGEST:,} characters."
                )
            # split at commas outside of braces
            for pattern in filter(None, (s.strip() for s in re.split(r",(?![^{}]*\})", text))):
                for single in expand(pattern):
                    match = matcher(single)
                    roles = "." not in single and any(p.role == single for p in pool)
                    if not roles and self.refused and "*" not in single.rpartition(".")[2]:
                        self._reachable(single, match)
                    hits = [p for p in pool if (p.role == single if roles else match(p.name))]
                    if not hits:
                        among = f" {kind}" if isinstance(kind, str) else ""
                        part = "" if single == text else f" (a part of '{text}')"
                        known = [p.name for p in pool] + [p.role for p in pool]
                        raise SelectionError(
                            f"'{single}'{part} matches no{among} point of {self.backbone}. {nearest(single, set(known))} "
                            "`zoo points` lists them."
                        )
                    if tower is None:
                        self._both_hit(single, hits)
                    chosen.update(id(p) for p in hits)
        return [p for p in pool if id(p) in chosen]

    @functools.cached_property
    def _towers(self) -> tuple[str, ...]:
        """Towers side by side that each have blocks; an encoder and a decoder that reads it are one network."""
        if any(p.role == "cross" for p in self._points):
            return ()
        found = tuple(dict.fromkeys(p.tower for p in self._points if p.tower and p.block is not None))
        return found if len(found) > 1 else ()

    def _both_have(self, kind: str | Sequence[str] | None) -> None:
        """Raise SelectionError if one tower has no point of a kind that another has: a method would leave it out in silence."""
        for one in [kind] if isinstance(kind, str) else kind or ():
            having = {p.tower for p in self._points if p.kind == one}
            lacking = [t for t in self._towers if t not in having]
            if having & set(self._towers) and lacking:
                self._left_out(f"{one} points", lacking[0], next(t for t in self._towers if t in having))

    def _both_hit(self, single: str, hits: Sequence[Point]) -> None:
        """Raise SelectionError if a selector that names no tower matches inside of the blocks of one alone."""
        if not self._towers or single.partition(".")[0] in self._towers:
            return
        inside = {p.tower for p in hits if p.block is not None}
        lacking = [t for t in self._towers if t not in inside]
        if inside and lacking:
            self._left_out(f"point for '{single}'", lacking[0], next(t for t in self._towers if t in inside))

    def _left_out(self, what: str, lacking: str, having: str) -> None:
        raise SelectionError(
            f"the {lacking} tower of {self.backbone} has no {what}, so it would be left out while the {having} tower is adapted. "
            f"Name the tower ('{having}.**'), or take a backbone of it alone (of a CLIP: tower='{having}')."
        )

    def _reachable(self, pattern: str, match: Callable[[str], Any]) -> None:
        """Raise SelectionError if a pattern names a projection that is no point."""
        for name, why in self.refused.items():
            if match(name):
                raise SelectionError(
                    f"'{name}' cannot be chosen (by '{pattern}'): {why}. An adapter there would do nothing, or a merge would "
                    "change something else. Leave it out of the targets."
                )

    def readers(self, sublayer: Point) -> list[Any]:
        """The linear points that read a sublayer's input: q, k and v of an attention (of a cross-attention q alone), up and gate
        of an MLP, the input projection of a mixer; of a mixer beside which the block has no other sublayer, those of its
        attention, too."""
        roles = ("q",) if sublayer.role == "cross" else ("q", "k", "v", "up", "gate", "in")
        inside, block = f"{sublayer.name}.", f"{sublayer.name.rpartition('.')[0]}."
        alone = not any(p.kind == "sublayer" and p is not sublayer and p.name.startswith(block) for p in self._points)
        within = block if sublayer.role == "mixer" and alone else inside
        return [p for p in self._points if p.kind == "linear" and p.role in roles and p.name.startswith(within)]

    def norm_before(self, sublayer: Point) -> Any:
        """The norm point whose output is a sublayer's input, or None: there is none in front, or it is no point."""
        entry = getattr(sublayer, "entry", None)
        if entry is None or getattr(sublayer, "entry_side", "") != "output":
            return None
        return next((p for p in self._points if p.kind == "norm" and p.module is entry), None)

    def train_everything(self, within: Sequence[Point] | None = None) -> None:
        """Train every parameter of the backbone, or of what stands at these points (inside `Adapter.attach`)."""
        paths = None if within is None else [p.path for p in within]
        self._session("train_everything").train_everything(paths)

    def context(
        self,
        name: str,
        per: str = "sample",
        *,
        required: bool = True,
        choices: Sequence[str] = (),
        example: Any = None,
    ) -> Value:
        """A value of the forward context for the adapter that attaches; its modules keep it and read it in their forward.

        Args:
            name: under which it is given (`model(x, context={name: ...})`); "inputs" is the call's first tensor, "inputs.1" its
                second argument, "inputs.mask" its keyword `mask`: these are there by themselves.
            per: "sample": a tensor or list of B, read by `value.rows(x)`; "batch": anything, read by `value.get()`.
            required: refuse a forward pass without it; otherwise look at `value.given`.
            choices: names that it may have; per sample they are read as their numbers (B,).
            example: a value, or a function of B that gives one, for probes and tables.
        """
        return self._session("context").want(name, per, required=required, choices=choices, example=example)  # type: ignore[no-any-return]

    @property
    def normalised(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """(mean, std) of each channel with which the backbone's images were normalised; None: it takes no images.

        Inside of `Adapter.attach` alone.
        """
        config = self._session("normalised").data_config()
        mean, std = config.get("mean"), config.get("std")
        return (tuple(mean), tuple(std)) if isinstance(mean, Sequence) and isinstance(std, Sequence) else None

    def carried(self, name: str) -> Carried:
        """A place for a tensor that ops of this adapter hand on along the blocks within one forward pass."""
        return self._session("carried").want(name, "forward")  # type: ignore[no-any-return]

    def _session(self, verb: str) -> Recorder:
        if self.session is None:
            raise AttachError(f"'{verb}' was called outside of Adapter.attach.")
        return self.session

    def first_blocks(self, blocks: int, **options: Any) -> Any:
        """A copy of what stands in front of the backbone's blocks, and of the first `blocks` of these, as a network of its own.

        Raises:
            AttachError: the family has none (those of videos have: `multimodal.families.diffusion.front`).
        """
        return self._session("first_blocks").first_blocks(blocks, **options)

    def share(self, name: str, module: M) -> M:
        """Register a module that several points use, once, under this name (inside `Adapter.attach`); returns it.

        It is saved under `<name>.`; every module of the adapter that uses it names it in `module.shared`, a tuple.

        Raises:
            AttachError: the name is one of the points' own, or taken; nothing at a point uses the module (when `attach` is over).
        """
        session = self._session("share")
        self._free(name)
        session.share(name, module)
        return module

    def beside(self, name: str, module: M) -> M:
        """Register a module that stands at no point, but in front of the head (`Adapter.features`) or behind it
        (`Adapter.logits`), under this name (inside `Adapter.attach`); returns it. It is saved under `<name>.`.

        Raises:
            AttachError: the name is one of the points' own.
        """
        session = self._session("beside")
        self._free(name)
        session.keep(None, name, module)
        return module

    @property
    def gives(self) -> tuple[str, ...]:
        """Names of the outputs that the backbone gives (`Backbone.outputs`). Inside of `Adapter.attach` alone."""
        return self._session("gives").gives

    @property
    def feature_dim(self) -> int:
        """Width d of the backbone's pooled features. Inside of `Adapter.attach` alone."""
        return self._session("feature_dim").feature_dim

    def _free(self, name: str) -> None:
        taken = {p.name.split(".")[0] for p in self._points} | {"backbone"}
        if not name.isidentifier() or name in taken:
            raise AttachError(
                f"'{name}' cannot name a shared module: expected a word other than {', '.join(sorted(taken))}, under which the "
                f"points of {self.backbone} are saved."
            )

    def generate(self, name: str, generator: nn.Module, *values: Value) -> Made:
        """Register a module that makes the weights of many points, shared as by `share`; it runs once for each forward pass.

        Args:
            name: under which the generator is saved.
            generator: called with what `values` are in this pass (None for one that is not given) before the backbone runs. The
                modules at the points, which name it in their `shared`, read what it returns by `made.get()`.
            values: of `points.context`. What is made of values for each sample is read by `made.rows(x)`.
        """
        session = self._session("generate")
        self._free(name)
        return session.generate(name, generator, values)  # type: ignore[no-any-return]

    def mix(self, names: Sequence[str], make: Callable[[Any], nn.Module]) -> None:
        """Mix other adapters of the model by `make(point)` wherever all of them act (`zoo.engine.mixing`).

        `module(y, outputs)` gets the activation and what each adapter makes of it; the adapters are not in use themselves.
        """
        self._session("mix").mix(names, make)

    def require(self, kind: str, method: str, *, each_tower: bool = False) -> list[Any]:
        """All points of a kind, or an AttachError that says that this backbone has none.

        Args:
            each_tower: the method acts wherever there are any, so a SelectionError if one of several towers has none.
        """
        found = [p for p in self._points if p.kind == kind]
        if not found:
            raise AttachError(
                f"'{method}' needs {kind} points, and {self.backbone} has none (it has {', '.join(self.kinds)} points)."
            )
        if each_tower:
            self._both_have(kind)
        return found

    def __repr__(self) -> str:
        rows = [("name", "kind", "role", "in", "out", "verbs")]
        rows += [(p.name, p.kind, p.role, str(p.dim_in), str(p.dim_out), " ".join(p.verbs)) for p in self._points]
        widths = [max(len(r[i]) for r in rows) for i in range(6)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows)
