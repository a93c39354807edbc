"""The generic family: networks that no family describes, and any `nn.Module` of the user's.

Its points are what can be found (`discover.py`): projections and norms by their type, roles by usual names, blocks and
sublayers where a pass has shown them. Methods that need these work as on any other family; those that need attention or tokens
points are refused, since what these mean depends on a forward that nobody described.

A small forward pass shows that every hook fires. What it does not reach is no point, and choosing it by name says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.backbone import WRAPPED, Backbone
from zoo.errors import AttachError, ConfigError
from zoo.families.generic import sources
from zoo.families.generic.conventions import Features, Plain, Timm, convention_of, unpooled
from zoo.families.generic.discover import Found, discover
from zoo.families.generic.heads import Taken, told
from zoo.families.generic.roles import activates
from zoo.families.generic.watch import Pass, first_tensor, reading, run, silent, watching
from zoo.points import Point
from zoo.registry import register_backbone


@register_backbone
class Generic(Backbone):
    """`timm:`, `transformers:` and `diffusers:` names that no other family takes, and `zoo.wrap(module)`."""

    family = "generic"
    fallback = True
    tiny = ("zoo:any-micro", {})
    saved_options = sources.OPTIONS
    pools: bool = True  # type: ignore[misc]
    modality: str = "image"  # type: ignore[misc]

    def __init__(
        self,
        module: nn.Module,
        name: str,
        *,
        example: Any = None,
        features: Features = None,
        head: str | None = None,
        probe: bool = True,
    ) -> None:
        super().__init__(module, name)
        self.convention: Plain = convention_of(module, features, head)
        self.probes = probe
        given = as_call(example)
        self.said = given is not None  # the example is the user's, not made up
        self.inputs, self.kwargs = given or self.convention.example(module) or ((), {})
        self.known_example = bool(self.inputs or self.kwargs)
        self._found: Found | None = None
        self._pass: Pass | None = None  # of the network as it stands now
        self._width: int | None = None
        self.proven = False
        self._rows = False  # a pass has shown that rows belong to one sample each
        if isinstance(self.convention, Timm):
            self.pools = not unpooled(module)
        if name.startswith("diffusers:"):
            self.modality, self.pools = "diffusion-image", False

    # -- building -----------------------------------------------------------------------------------------------------

    @classmethod
    def accepts(cls, name: str) -> bool | str:
        """True for what a library can build by this name; a string says why it cannot."""
        return sources.accepts(name)

    @classmethod
    def build(
        cls, name: str, *, pretrained: bool, probe: bool = True, own_output: bool = False, **kwargs: Any
    ) -> nn.Module:
        """The library's own network; `probe=False` leaves out the pass that shows what is called (`configure`).

        `own_output` is what a saved adapter says of one whose classifier was not taken off.
        """
        return sources.build(name, pretrained=pretrained, options=kwargs)

    def configure(self, probe: bool = True, **options: Any) -> None:
        """Take up whether the pass is made."""
        self.probes = probe

    def again(self, module: nn.Module, name: str) -> Generic:
        """Of a changed copy: the same example and conventions; its classifier is off already."""
        twin = Generic(
            module, name, example=self.kwargs or self.inputs or None, features=self.convention.says, probe=self.probes
        )
        twin.convention.whole = self.convention.whole
        twin.convention.path, twin._width, twin.pools, twin.said = (
            self.convention.path,
            self._width,
            self.pools,
            self.said,
        )
        return twin

    # -- the pass ---------------------------------------------------------------------------------------------------------

    def _look(self) -> Pass | None:
        """A pass on the example, of the network as it stands; None if there is no example, or none is wanted.

        Raises:
            ConfigError: the user's own example does not run.
        """
        if self._pass is not None or not self.probes or not self.known_example:
            return self._pass
        try:
            inputs, kwargs = self._placed(self.inputs), self._placed(self.kwargs)
            self._pass = run(self.module, self._call, inputs, kwargs)
        except Exception as error:
            if not self.said:  # ours may be wrong; the first real batch shows what runs
                self.known_example = False
                return None
            raise ConfigError(self._why(error)) from error
        return self._pass

    def _call(self, *inputs: Any, **kwargs: Any) -> Tensor:
        return self.convention.call(self.module, *inputs, **kwargs)

    def _why(self, error: Exception) -> str:
        given = ", ".join(_told(v) for v in (*self.inputs, *self.kwargs.values())) or "nothing"
        return (
            f"The example does not run through this {type(self.module).__name__}: {type(error).__name__}: "
            f"{str(error).splitlines()[0][:300] if str(error) else ''}. It was given {given}. Give everything that its forward "
            "needs: example=(x, y) for several inputs, example={'pixel_values': x, ...} for inputs by name; probe=False leaves "
            "the pass out."
        )

    def _placed(self, value: Any) -> Any:
        """The example where the network is, and in its precision."""
        like = next((p for p in self.module.parameters() if p.is_floating_point()), None)
        if isinstance(value, Mapping):
            return {k: self._placed(v) for k, v in value.items()}
        if isinstance(value, (tuple, list)):
            return tuple(self._placed(v) for v in value)
        if not isinstance(value, Tensor) or like is None:
            return value
        return value.to(like.device, like.dtype if value.is_floating_point() else None)

    # -- what the model asks --------------------------------------------------------------------------------------------

    def take_head(self) -> nn.Module | None:
        """The library's classifier, or the one that the user named."""
        self._check_place()
        seen = None if isinstance(self.convention, Timm) else self._look()
        kept = self.convention.whole  # a changed copy: nothing was taken of the first one
        asked = self.asked is not None or not self.pools
        taken = None if kept else Taken(self.convention, self.module, seen, self._numbered(), asked)
        head = None if taken is None else taken.head
        if taken is not None and taken.why:
            if self.convention.head is not None:
                raise ConfigError(
                    f"head='{self.convention.head}': {taken.why} on the example. Name the nn.Linear that comes last, or say "
                    "how the features are made: features=lambda module, x: ..."
                )
            told(self.module, self.name, taken.why)
        self.own_output = self.convention.whole
        if not self.pools:
            return None
        if head is not None:
            self._width = head.in_features
        if seen is not None and head is None:
            self._measure(seen)
        return head

    def _numbered(self) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The example, where a pass with numbers may be made."""
        if not self.probes or not self.known_example:
            return None
        return self._placed(self.inputs), self._placed(self.kwargs)

    def _check_place(self) -> None:
        device = next((p.device for p in self.module.parameters()), None)
        if device is None:
            quantised = [p for p, m in self.module.named_modules() if hasattr(m, "in_features")]
            why = f" (the weights of '{quantised[0]}' are quantised)" if quantised else ""
            raise ConfigError(
                f"This {type(self.module).__name__} has no parameters{why}, so there is nothing to adapt. Wrap the network "
                "itself, in floating point."
            )
        tensors = [v for v in (*self.inputs, *self.kwargs.values()) if isinstance(v, Tensor)]
        elsewhere = next((t.device for t in tensors if t.device != device), None)
        if self.said and elsewhere is not None and device.type != "meta":
            raise ConfigError(
                f"The example is on {elsewhere}, the network on {device}. Move one of them: example.to('{device}'), or "
                f"module.to('{elsewhere}')."
            )

    def _measure(self, seen: Pass) -> None:
        output = first_tensor(seen.output)
        if output is None:
            return
        self._width = int(output.shape[-1]) if output.ndim else None
        self.pools = self.pools and output.ndim == 2 and output.is_floating_point()

    @property
    def feature_dim(self) -> int:
        """Width of what comes out."""
        if self._width is None:
            seen = self._look()
            if seen is not None:
                self._measure(seen)
        if self._width is None:
            width = next((getattr(self.module, n, None) for n in ("head_hidden_size", "num_features")), None)
            config = getattr(self.module, "config", None)
            width = width or getattr(config, "hidden_size", None) or getattr(config, "out_channels", None)
            self._width = int(width) if isinstance(width, int) else 0
            self.pools = self.pools and bool(self._width)
        return self._width

    def put_head(self, module: nn.Module, head: nn.Module) -> None:
        """Where the network's own classifier stood."""
        self.convention.put_head(module, head)

    def head_path(self) -> str | None:
        """Where the network's own classifier stood."""
        return self.convention.path

    def points(self) -> list[Point]:
        """Everything that can be found.

        Raises:
            AttachError: nothing at all.
        """
        seen = self._look()
        self._found = discover(self.module, seen)
        self.proven = seen is not None or not self.probes
        if seen is not None:
            seen.forget()
        if not self._found.points:
            why = "; ".join(f"'{p}': {w}" for p, w in list(self._found.refused.items())[:3])
            raise AttachError(
                f"This {type(self.module).__name__} has no projection, convolution or norm that a method could change"
                f"{f' ({why})' if why else ''}. Wrap a network that has nn.Linear, nn.Conv or norm modules in it (one that "
                "is itself such a module: in an nn.Sequential)."
            )
        return self._found.points

    def blocks(self) -> list[nn.Module]:
        """The blocks that the pass has shown."""
        found = [] if self._found is None else self._found.points
        return [self.module.get_submodule(p.path) for p in found if p.kind == "block"]

    def elementwise_modules(self) -> list[nn.Module]:
        """Activations of the libraries' own that ran, and do not write into their input."""
        ran = [] if self._pass is None else self._pass.modules
        return [m for m in map(self.module.get_submodule, ran) if activates(m)]

    @property
    def refused(self) -> dict[str, str]:
        """Projections that are no points: module path -> why."""
        return {} if self._found is None else self._found.refused

    def features(self, *inputs: Any, **kwargs: Any) -> Tensor:
        """Pooled features (B, d), or what comes out of the network where nothing is pooled.

        Raises:
            AttachError: the first batch shows that an adapter stands where nothing ever runs.
        """
        if self.proven or torch.compiler.is_compiling():
            return self._named(*inputs, **kwargs)
        with watching(self.module) as seen:
            output = self._named(*inputs, **kwargs)
        self._prove(seen)
        return output

    def _named(self, *inputs: Any, **kwargs: Any) -> Tensor:
        """An example by names: further batches, by position, in the same order."""
        if self.kwargs and inputs and not self.inputs:
            return self._call(**{**dict(zip(self.kwargs, inputs)), **kwargs})
        return self._call(*inputs, **kwargs)

    def _prove(self, seen: Pass) -> None:
        """The first batch takes the place of the pass at attach."""
        from zoo.engine.sites import site_at

        dead = [p.path for p in self._found.points if p.path not in seen.modules] if self._found else []
        held = [path for path in dead if (site := site_at(self.module.get_submodule(path))) is not None and site.ops]
        if held:
            raise AttachError(
                f"'{held[0]}' ({len(held)} such) was never called in this pass, so the adapter there does nothing, and a merge "
                "would change what it did not. Leave it out of the targets; zoo.wrap(module, example=batch) finds such places "
                "when it attaches."
            )
        self.proven = True

    def run(self, module: nn.Module, *inputs: Any) -> Tensor:
        """What a plain (merged) module answers."""
        if self.kwargs and not self.inputs:
            return self.convention.call(module, **dict(zip(self.kwargs, inputs)))
        if self.convention.path is not None and isinstance(self.convention, Timm):
            return module(*inputs)  # type: ignore[no-any-return]
        return self.convention.call(module, *inputs)

    def check_routed(self, *inputs: Any) -> None:
        """Raise ConfigError unless the rows of what passes at points belong to one sample each, as a pass of two shows."""
        batch = next((t.shape[0] for t in inputs if isinstance(t, Tensor)), None)
        if batch is None:
            raise ConfigError(
                "Adapters for each sample need the batch by position: model(x, adapters=[...]); inputs by name come in the "
                "order of the example."
            )
        if self._rows or batch < 2 or torch.compiler.is_compiling():
            return
        with silent(self.module), torch.no_grad():
            picks = self._picks(inputs)
            if picks:
                raise ConfigError(
                    f"This {type(self.module).__name__} chooses rows by their values ({', '.join(sorted(picks))}), so which "
                    "rows belong to which sample changes with the batch. Call the model once for each adapter "
                    "(model.set_active)."
                )
            both, one = (self._rows_of(inputs, batch, part) for part in (slice(0, 2), slice(1, 2)))
        for point in self._found.points if self._found is not None else ():
            first, second = (seen.modules.get(point.path) for seen in (both, one))
            if first is None or second is None or first.entered is None or second.entered is None:
                continue
            x, y = first.entered, second.entered
            if len(x) != 2 * len(y) or not torch.allclose(x[len(y) :].double(), y.double(), rtol=1e-3, atol=1e-4):
                raise ConfigError(
                    f"The rows at '{point.path}' do not belong to one sample each in this {type(self.module).__name__}, so "
                    "adapters cannot be chosen for each sample. Call the model once for each adapter (model.set_active)."
                )
        self._rows = True

    def _picks(self, inputs: tuple[Any, ...]) -> set[str]:
        seen = Pass()
        with reading(self.module, seen):
            self._named(*inputs)
        return seen.picks

    def _rows_of(self, inputs: tuple[Any, ...], batch: int, part: slice) -> Pass:
        rows = tuple(v[part] if isinstance(v, Tensor) and v.ndim and len(v) == batch else v for v in inputs)
        with watching(self.module) as seen:
            self._named(*rows)
        return seen

    # -- data -------------------------------------------------------------------------------------------------------------

    def data_config(self) -> dict[str, Any]:
        """As the library states it; {} for a network of the user's."""
        return self.convention.data_config(self.module)

    def tiny_batch(self) -> tuple[Tensor, ...]:
        """The example, twice.

        Raises:
            ConfigError: there is none.
        """
        values = [v for v in (self.inputs or self.kwargs.values()) if isinstance(v, Tensor)]
        if not values:
            raise ConfigError(
                f"'{self.name}' has no example of its inputs. Give one: zoo.wrap(module, example=batch), or a real batch."
            )
        return tuple(torch.cat([v, v])[:2].cpu() for v in values)

    def hub_task(self, num_classes: int) -> str | None:
        """Not known for a network of the user's."""
        return None if self.name.startswith(WRAPPED) else super().hub_task(num_classes)

    def usage(self, num_classes: int) -> tuple[list[str], list[str]]:
        """As `Backbone.usage`; of a network of the user's on a batch of its own."""
        if not self.brought:
            return super().usage(num_classes)
        return [], [f"{'logits' if num_classes else 'features'} = model(batch)  # as the network is called"]

    def licence(self) -> str | None:
        """As timm's pretrained configuration states it; else not known."""
        return self._source().get("license")

    def hub_id(self) -> str | None:
        """Hub repository of the checkpoint; None for random weights, folders and networks of the user's."""
        return self._source().get("hf_hub_id")

    def _source(self) -> dict[str, Any]:
        return sources.described(self.module, self.name) if self.pretrained else {}


def as_call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """An example as positional and named inputs; None: there is none."""
    if example is None:
        return None
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    return (example,), {}


def _told(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
