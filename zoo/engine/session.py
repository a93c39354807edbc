"""A session records what one adapter asks for while it attaches, and installs it afterwards, all or nothing.

Verbs become ops at sites here; the verbs of `attention` and `tokens` points are translated by the backbone family, since
what "more keys" means depends on its attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from zoo.engine.around import Around, Entering
from zoo.engine.blocks import require_plain
from zoo.engine.changes import AddGroup, BiasDelta, LinearGroup, OnOutput, RescaleGroup, Skip, Stash, places
from zoo.engine.context import Carried, Context, Value, Want, make_want
from zoo.engine.generated import Made
from zoo.engine.mixing import Installed, mix
from zoo.engine.reversible import ALONE
from zoo.engine.sites import BlockSite, LinearSite, Op, Site, parts
from zoo.engine.swaps import Swap
from zoo.errors import AttachError, CombinationError
from zoo.points import LinearPoint, Point, Points, TokensPoint
from zoo.points.foreign import kept_by
from zoo.points.point import is_pointwise

if TYPE_CHECKING:
    from zoo.adapters.base import Adapter
    from zoo.backbone import Backbone


@dataclass(eq=False)
class Session:
    """What one adapter asked for."""

    owner: str
    adapter: Adapter
    family: Backbone
    site: Callable[[nn.Module, type[Site]], Site]  # the model's site at a module, made if need be
    points: Points
    ops: list[tuple[Site, Op]] = field(default_factory=list)
    swaps: list[Swap] = field(default_factory=list)
    touched: list[Point] = field(default_factory=list)
    context: Context = field(default_factory=Context)  # the model's
    wants: list[Want] = field(default_factory=list)
    others: Installed = field(default_factory=dict)  # ops of the model's other adapters
    readers: Mapping[str, Any] = field(default_factory=dict)  # which of them read values of a forward pass
    _groups: dict[tuple[int, str, type], list[tuple[LinearPoint, nn.Module]]] = field(default_factory=dict)
    _trained: dict[tuple[int, str], list[Point]] = field(default_factory=dict)
    _shared: dict[str, nn.Module] = field(default_factory=dict)

    def skippable(self, point: Point) -> bool:
        """Called by `point.skippable`."""
        return self.family.hands_on(point) is not None

    def data_config(self) -> Mapping[str, Any]:
        """Called by `points.normalised`: of images, not of clips."""
        return {} if "video" in self.family.modality else self.family.data_config()

    @property
    def gives(self) -> tuple[str, ...]:
        """Called by `points.gives`: an output that this network has."""
        return tuple(name for name in self.family.gives if name != "pooled" or self.family.pools)

    @property
    def feature_dim(self) -> int:
        """Called by `points.feature_dim`."""
        return self.family.feature_dim

    def first_blocks(self, blocks: int, **options: Any) -> nn.Module:
        """Called by `points.first_blocks`."""
        return self.family.first_blocks(blocks, **options)  # type: ignore[no-any-return]

    # -- recording --------------------------------------------------------------------------------------------------

    def keep(self, point: Point | None, name: str, value: nn.Parameter | nn.Module) -> None:
        """Register a parameter or module of the adapter under the point's name."""
        path = [*(point.name.split(".") if point is not None else ()), *name.split(".")]
        self._put(path, value)

    def _put(self, path: list[str], value: nn.Parameter | nn.Module) -> nn.Module:
        """Returns the module that now holds it."""
        node: nn.Module = self.adapter
        for part in path[:-1]:
            # not `add_module`: a path of the network may have a word of ours, `features.0`
            if part not in node._modules:
                node._modules[part] = Place()
            node = node._modules[part]  # type: ignore[assignment]
        last = path[-1]
        held = node._modules.get(last)
        if last in node._parameters or (
            held is not None and not (isinstance(held, Place) and isinstance(value, nn.Module))
        ):
            raise CombinationError(f"'{self.owner}' uses point '{'.'.join(path)}' twice; one module for each point.")
        if isinstance(value, nn.Parameter):
            node.register_parameter(last, value)
            return node
        if held is not None:  # modules of points inside this one are there already: they stand inside it
            for name, child in held._modules.items():
                value.add_module(name, child)
            for name, parameter in held._parameters.items():
                value.register_parameter(name, parameter)
        node._modules[last] = value
        return node

    def share(self, name: str, module: nn.Module) -> None:
        """Register a module that several points have in common, once, under this name."""
        self._put([name], module)
        self._shared[name] = module

    def own(self, point: Point, module: nn.Module) -> None:
        """Register an adapter's module under the point's name: its keys are `<point>.<its own keys>`."""
        self._put(point.name.split("."), module)

    def op(self, site_module: nn.Module, op: Op, kind: type[Site] = Site) -> None:
        """Record an op at a module; used by backbone families for the verbs that they translate."""
        self.ops.append((self.site(site_module, kind), op))

    def record(self, point: Point, verb: str, module: nn.Module | None, **options: Any) -> None:
        """Called by the verbs of points."""
        self.touched.append(point)
        if verb == "train":
            for name in options["names"]:
                at = point.holder(name) or (point.module, name)
                self._trained.setdefault((id(at[0]), at[1]), []).append(point)
            return
        assert module is not None
        self.own(point, module)
        if point.kind in ("attention", "tokens"):
            self.family.record(self, point, verb, module, **options)
            return
        getattr(self, f"_{point.kind}")(point, verb, module, **options)

    def want(
        self, name: str, per: str, *, required: bool = True, choices: Sequence[str] = (), example: Any = None
    ) -> Value | Carried:
        """Called by `points.context` and `points.carried`."""
        want = make_want(self.owner, name, per, required, choices, example, self._windows())
        known = next((w for w in self.wants if w.name == name and (w.per == "forward") == (per == "forward")), None)
        if known is None:
            self.wants.append(want)
        elif (known.per, known.required, known.choices) != (want.per, want.required, want.choices):
            raise AttachError(f"'{self.owner}' asks for the context value '{name}' twice, and differently.")
        return Carried(self.context, want) if per == "forward" else Value(self.context, want)

    def _windows(self) -> bool:
        """Whether a sample may have several rows, one after another: windows of its image, beams of its text."""
        return self.family.beams or any(getattr(p, "window", None) is not None for p in self.points)

    def generate(self, name: str, generator: nn.Module, values: Sequence[Value]) -> Made:
        """Called by `points.generate`."""
        self.share(name, generator)
        made = Made(self.context, self.owner, name, generator, tuple(values), self._windows())
        self.wants.append(Want(self.owner, made.key[1], "made", made=made))
        return made

    def _make(self, point: Point, verb: str, where: str, fn: Callable[..., Any], *modules: nn.Module, **kw: Any) -> Op:
        return Op(self.owner, where, fn, point.name, verb=verb, modules=parts(*modules), **kw)

    def _linear(self, point: LinearPoint, verb: str, module: nn.Module) -> None:
        if verb in ("add", "rescale") or (verb == "reparametrize" and hasattr(type(module), "linear_group")):
            self._groups.setdefault((id(point.module), verb, type(module)), []).append((point, module))
        elif verb == "after":
            parts = ((module, point.start, point.stop),)
            self.op(point.module, self._make(point, verb, "output", RescaleGroup(parts), module), LinearSite)
        elif verb == "rescale_input":
            fn: Any = module
            if is_pointwise(point.module):
                fn = partial(RescaleGroup(((module, 0, point.dim_in),), True, places(point.module)), None)
            self.op(point.module, self._make(point, verb, "input", fn, module), LinearSite)
        else:
            rows = (point.start, point.stop)
            op = self._make(point, verb, "forward", module, module, rows=rows, per_row=False)
            self.op(point.module, op, LinearSite)

    def _norm(self, point: Any, verb: str, module: nn.Module) -> None:
        whole = ((module, 0, point.dim_out),)
        fn = RescaleGroup(whole, channels_first=True) if point.channels_first else OnOutput(module)
        self.op(point.module, self._make(point, verb, "output", fn, module))

    def _condition(self, point: Point, verb: str, module: nn.Module) -> None:
        if verb == "before":
            self.op(point.module, self._make(point, verb, "input", module, module))
        elif verb == "replace":
            self.op(point.module, self._make(point, verb, "around", module, module, per_row=False))
        else:
            self.op(point.module, self._make(point, verb, "output", OnOutput(module), module))

    def _sublayer(self, point: Any, verb: str, module: nn.Module, source: str = "input") -> None:
        def change(side: str, at: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
            call = fn if side == "input" else OnOutput(fn)
            self.op(at, self._make(point, verb, side, call, module))

        if verb == "replace":
            if not self.family.bare_sublayers:
                raise AttachError(
                    f"sublayers of the family '{self.family.family}' hand on more than one tensor, so '{point.name}' cannot be "
                    "replaced. Use before, after or parallel there."
                )
            around = Around(module, self.family.packs(point.module))
            self.op(point.module, self._make(point, verb, "around", around, module, per_row=False))
        elif verb == "before":
            change("input" if point.inner else point.entry_side, point.inner or point.entry, module)
        elif verb == "watch":
            at, side = point.inner or point.entry, "input" if point.inner else point.entry_side
            self.op(at, self._make(point, verb, f"watch_{side}", module, module, last=2))
        elif verb == "after":
            change(point.exit_side, point.exit, module)
        elif verb == "enter":
            entering = Entering(module)
            at = point.entry if point.stream is None else point.stream
            change("input", at, entering.enter)
            change(point.exit_side, point.exit, entering.join)
        else:
            stash = Stash(module)
            # without a norm in front of F (post-norm blocks) its input is the residual stream itself
            at, side = point.entry, point.entry_side
            if source == "residual":
                at, side = point.entry if point.stream is None else point.stream, "input"
            self.op(at, self._make(point, verb, f"watch_{side}", stash.watch))
            change(point.exit_side, point.exit, stash.join)

    def _block(self, point: Point, verb: str, module: Any, changes: bool = False, run: Any = None) -> None:
        if verb == "run":
            require_plain(self.family, self.owner)
            turn = run.join(self.site(point.module, BlockSite), module, self.family.half)
            op = self._make(point, verb, "forward", turn, module, per_row=False, excludes=ALONE)
            self.op(point.module, op, BlockSite)
        elif verb == "skip":
            hand = self.family.hands_on(point)
            if hand is None:
                raise AttachError(
                    f"the block '{point.name}' of {self.points.backbone} cannot be skipped: those behind it read something that "
                    "it makes, or how they are called is not described. Leave it out of the targets."
                )
            op = self._make(point, "replace", "forward", Skip(module, hand), module, per_row=False)
            self.op(point.module, op, BlockSite)
        elif verb == "before":
            self.op(point.module, self._make(point, verb, "input", module, module), BlockSite)
        elif verb == "after":
            self.op(point.module, self._make(point, verb, "output", module, module), BlockSite)
        elif verb == "watch":
            self.op(point.module, self._make(point, verb, "watch_output", module, module), BlockSite)
        elif verb == "replay":
            self.op(point.module, self._make(point, verb, "watch_call", module.enter, module), BlockSite)
            where, leave = ("output", OnOutput(module.leave)) if changes else ("watch_output", module.leave)
            self.op(point.module, self._make(point, verb, where, leave, module, last=1 if changes else 2), BlockSite)
        else:
            self.op(point.module, self._make(point, verb, "forward", module, module, per_row=False), BlockSite)

    def mix(self, names: Sequence[str], make: Callable[[Any], nn.Module]) -> None:
        """See `zoo.engine.mixing`."""
        mix(self, self.others, self.points, names, make)

    def train_everything(self, within: Sequence[str] | None = None) -> None:
        """Trainable copies of all parameters of the backbone, or of these modules, under `backbone.` and the library's names.

        A parameter of these modules that also stands outside of them (words, in a table that is tied to them) is not among them.
        """
        copies: dict[int, tuple[nn.Module, str]] = {}  # of tied parameters one
        found = [
            (path, module, within is None or any(f"{path}.".startswith(f"{inside}.") for inside in within))
            for path, module in self.family.modules_to_train()
        ]
        outside = {id(p) for _, module, inside in found if not inside for p in module._parameters.values()}
        for path, module, inside in found:
            if not inside:
                continue
            if kept := getattr(module, "kept_in", "") or kept_by(module):
                how = kept if kept.startswith("as ") else f"in {kept}"
                raise AttachError(
                    f"'{self.owner}' trains every parameter, and the weight of '{path}' is kept {how}, which is not trained. "
                    "Use a method that adds to frozen weights, such as lora, or the backbone that was not quantised."
                )
            for name, frozen in module._parameters.items():
                if frozen is None or id(frozen) in outside or not self.family.reads(path, name):
                    continue
                if id(frozen) not in copies:
                    place = ["backbone", *filter(None, path.split(".")), name]
                    copies[id(frozen)] = self._put(place, nn.Parameter(frozen.detach().clone())), name
                    self.adapter.stand_ins.add(".".join(place))
                self.swaps.append(Swap(self.owner, module, name, *copies[id(frozen)]))

    # -- finishing --------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Turn groups into ops and trained parameters into swaps. Nothing is installed yet."""
        for (_, verb, _), members in self._groups.items():
            members.sort(key=lambda m: m[0].start)
            parts = tuple((module, point.start, point.stop) for point, module in members)
            first = members[0][0]
            modules = [module for _, module in members]
            if verb == "reparametrize":
                op = self._make(first, verb, "forward", LinearGroup(parts), *modules, per_row=False)
            else:
                convolved = isinstance(first.module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
                fn = AddGroup(parts) if verb == "add" else RescaleGroup(parts, convolved, places(first.module))
                op = self._make(first, verb, "output", fn, *modules)
            self.op(first.module, op, LinearSite)
        for (_, name), points in self._trained.items():
            self._train(name, points)
        used = {module for _, op in self.ops for module in op.modules}
        for name, shared in self._shared.items():
            if used.isdisjoint(shared.modules()):
                raise AttachError(
                    f"'{self.owner}' shares '{name}', and no module at a point uses it: it would never be trained. "
                    "Name it in the `shared` (a tuple) of the modules that use it."
                )
        elsewhere = self.adapter.stateless or self.adapter.own_features or self.adapter.behind_head
        if not self.ops and not self.swaps and not elsewhere:
            raise AttachError(
                f"'{self.owner}' attached to no point of {self.points.backbone}: nothing would be trained."
            )

    def _train(self, name: str, points: list[Point]) -> None:
        point, module = points[0], points[0].module
        if isinstance(point, TokensPoint):  # a token belongs to the backbone, not to the block that it enters
            path, _, name = name.rpartition(".")
            module = self.family.module.get_submodule(path)
        held, beside = name, getattr(point, "beside", None)
        if beside is not None and beside[1] == name:  # a bias that is this point's alone
            module, name, points = beside[0], "bias", []
        frozen = module._parameters.get(held)
        if frozen is None:
            raise AttachError(f"point '{point.name}' has no parameter '{name}' to train.")
        if name == "weight" and (kept := kept_by(module)):
            raise AttachError(f"the weight of point '{point.name}' is kept {kept}, and is not trained.")
        whole, key = True, point.name
        if points and isinstance(point, LinearPoint) and not point.whole:
            rows = sum(p.stop - p.start for p in points)  # type: ignore[attr-defined]
            whole, key = rows == len(frozen), point.fused
        if whole:
            holder = self._put([*key.split("."), name], nn.Parameter(frozen.detach().clone()))
            self.adapter.stand_ins.add(f"{key}.{name}")
            self.swaps.append(Swap(self.owner, module, held, holder, name))
            return
        if name != "bias":
            raise AttachError(f"'{name}' of '{point.name}' is fused: train it for all slices of '{key}', or for none.")
        for p in points:
            assert isinstance(p, LinearPoint) and p.bias is not None
            shift = BiasDelta(p.bias)
            self.own(p, shift)
            fn = AddGroup(((shift, p.start, p.stop),))
            self.op(p.module, self._make(p, "train", "output", fn, shift), LinearSite)


class Place(nn.Module):
    """A node of the tree of names at which no module of the adapter stands."""
