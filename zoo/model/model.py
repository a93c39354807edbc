"""The model: a frozen backbone, its adapters and a head, as one ordinary `nn.Module`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.backbone import Backbone
from zoo.engine.memory import MEMORY_SETTINGS, Saver
from zoo.engine.sharded import refuse
from zoo.engine.sites import Op, Site, State
from zoo.engine.swaps import Swap
from zoo.errors import AbsentError, ConfigError, MergeError
from zoo.heads.folded import folded
from zoo.model.answering import answer, apart, called, kept_buffers, named_outputs
from zoo.model.fingerprint import Watched
from zoo.model.routing import Route, forward_routed, routed_parameters
from zoo.model.stated import Stated
from zoo.points import Points
from zoo.points.merger import Merger

# Properties that come of the backbone's data configuration: its word there, and ours
OF_DATA = {"image_size": ("input_size", "image size"), "mean": ("mean", "mean"), "std": ("std", "std")}


class Model(Stated):
    """What `zoo.load` returns. Call it on a batch; train `parameters_to_train()`; `merge()` gives the plain module back.

    Args:
        family: the backbone, wrapped in its declaration; its classifier is taken off and becomes the head.
        num_classes: width of a new head; None keeps the backbone's own classifier; 0 means no head (features come out).
        memory: "default", "low", "min" or "off", see `zoo.engine.memory`.
        kwargs: how the backbone was built, recorded in saved adapters.
    """

    def __init__(
        self,
        family: Backbone,
        *,
        num_classes: int | None = None,
        memory: str = "default",
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        family.asked = num_classes
        own_head = family.take_head()
        self.backbone = family.module
        self.family = family
        self.backbone_name = family.name
        self.backbone_kwargs = dict(kwargs or {})
        if family.own_output:
            self.backbone_kwargs["own_output"] = True
        self._weights = Watched(self.backbone)
        self.backbone.requires_grad_(False)
        self.points = Points(family.points(), family.name, family.refused)
        self.adapters = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        self._classes, self._records = {}, {}
        self._state = State(Saver(), switch=self._switch)
        self._sites: dict[int, Site] = {}
        self._ops: dict[str, list[tuple[Site, Op]]] = {}
        self._swaps: dict[str, list[Swap]] = {}
        self._resting: dict[str, set[str]] = {}  # parameters that are frozen only because their adapter or head rests
        self._wants, self._by_hand = {}, []
        self._beside = False
        self._answers = False
        self._outside = ""
        self._plan = ""  # read in forward, so that a compiled model notices another set of adapters
        if num_classes is None and own_head is not None:
            self.heads["default"] = own_head
        else:
            self.heads["default"] = self._new_head(num_classes or 0, family.feature_dim)
        self._memory = ""
        self.memory = memory
        self.train(False)

    # -- forward ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        *inputs: Any,
        adapters: Sequence[str | None] | Route | None = None,
        context: Mapping[str, Any] | None = None,
        targets: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Logits (B, num_classes), or features (B, d) without a head (the network's own output if it does not pool).

        Args:
            inputs: what the backbone takes; images (B, 3, H, W) for vision.
            adapters: one adapter name (or None for the bare backbone) for each sample, instead of the active ones.
            context: values that adapters read in this pass, by name (`model.wanted`): one for the batch or for each sample.
            targets: of the batch, for heads that see them in training (`zoo.Head.sees_targets`).

        Raises:
            ContextError: a value that an active adapter needs is missing, or is not one for each sample.
            ConfigError: inputs that do not give what the head stands on (images and texts together, to a classifier).
        """
        if adapters is not None:
            return forward_routed(self, inputs, adapters, kwargs, context, targets)
        if self._answers or targets is not None:
            return self._framed(answer, (self, self.head, inputs, targets, kwargs), {}, context, call=(inputs, kwargs))  # type: ignore[no-any-return]
        if self._needs_frame(context):
            return self._framed(self._logits, inputs, kwargs, context)  # type: ignore[no-any-return]
        return self._logits(*inputs, **kwargs)

    def route(self, names: Sequence[str | None]) -> Route:
        """Which adapter serves which sample, made once: `compiled(x, adapters=model.route(names))`, one name for each sample.

        A compiled model needs it, and runs one graph for each set of adapters, whichever samples they serve. Made before the
        call, it also lets all of them learn (as `parameters_to_train(*names)` does).
        """
        return Route.of(self, names, len(names), plan=True)

    def _logits(self, *inputs: Any, **kwargs: Any) -> Tensor:
        features, head = self._pooled(*inputs, **kwargs), self.head
        self.check_width(features, head)
        return self._state.run(head, features)  # type: ignore[no-any-return]

    def check_width(self, features: Tensor, head: nn.Module) -> None:
        """Raise ConfigError unless the head takes features of this width."""
        width = getattr(head, "in_features", None)
        if width is not None and features.shape[-1:] != (width,):
            raise ConfigError(
                f"The head takes features of width {width}; these inputs give {tuple(features.shape)}. model.features(...) gives "
                "what stands in front of the head, and zoo.load(..., num_classes=0) a model without one."
            )

    def features(self, *inputs: Any, context: Mapping[str, Any] | None = None, **kwargs: Any) -> Tensor:
        """Pooled features (B, d) with the active adapters, in front of the head; `context` as in a call."""
        if self._needs_frame(context):
            return self._framed(self._pooled, inputs, kwargs, context)  # type: ignore[no-any-return]
        return self._pooled(*inputs, **kwargs)

    def _pooled(self, *inputs: Any, **kwargs: Any) -> Tensor:
        risen = self._enter()
        try:
            if torch.compiler.is_compiling():
                return self._features(*inputs, **kwargs)
            return self._recorded(*inputs, **kwargs)
        finally:
            self._state.settle(risen)

    def _recorded(self, *inputs: Any, **kwargs: Any) -> Tensor:
        try:
            with called(self, inputs, kwargs), self._state.saver.record(self.device):
                return self._features(*inputs, **kwargs)
        finally:
            for name in self._state.active:
                self.adapters[name].release()  # type: ignore[operator]

    def outputs(
        self,
        *inputs: Any,
        want: Sequence[str] = ("pooled",),
        context: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Named outputs of the backbone with the active adapters, all of one pass: "pooled", "tokens", "maps", "text".

        `zoo.backbone.OUTPUTS` describes each, and `model.family.gives` lists those that this backbone has.

        Raises:
            ConfigError: a name that there is not. MismatchError: one that this backbone does not give.
        """
        arguments = (self, inputs, want, kwargs)
        if self._state.context.frame is None and self._needs_frame(context):
            return self._framed(named_outputs, arguments, {}, context, call=(inputs, kwargs))  # type: ignore[no-any-return]
        return named_outputs(*arguments)

    def _features(self, *inputs: Any, **kwargs: Any) -> Tensor:
        names = [] if self._plan == "" else list(self._state.active)
        if self._beside:
            inputs, kwargs = apart(inputs, kwargs)
        for name in names:
            if self.adapters[name].own_features:
                self.family.check_pooled(self.adapters[name].method, *inputs, **kwargs)  # type: ignore[arg-type]
        pooled = self.family.features(*inputs, **kwargs)
        for name in names:
            pooled = self._state.change(self.adapters[name].features, pooled)  # type: ignore[arg-type]
        return pooled

    def train(self, mode: bool = True) -> Model:
        """Adapters and head follow `mode`; the frozen backbone stays in eval mode (no dropout, no stochastic depth)."""
        super().train(mode)
        learns = mode and any(a.trains_backbone for a in self._active_adapters())
        if learns or any(module.training for module in self.backbone.modules()):
            self.backbone.train(learns)
        for module in self.backbone.modules() if learns else ():
            # running statistics are part of the frozen backbone; no adapter holds them
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        for where in self._sites.values():
            where.reset()
        return self

    # -- parameters and memory --------------------------------------------------------------------------------------

    def parameters_to_train(self, *adapters: str) -> dict[str, nn.Parameter]:
        """Trainable parameters of the active adapters (`<adapter>/<point>.<name>`) and of the head (`head/<name>`).

        With names of adapters: those of a batch that is served by them (`model(x, adapters=[...])`), active or not, and of the
        heads that serve them, which then are `head/<name>` ("default" for adapters without one of their own), each head's own.
        """
        if adapters:
            return routed_parameters(self, adapters)
        named = {f"{n}/{k}": p for n in self._state.active for k, p in self.adapters[n].named_parameters()}
        named |= {f"head/{k}": p for k, p in self.head.named_parameters()}
        return {k: p for k, p in named.items() if p.requires_grad}

    def num_parameters(self, trainable: bool = False, head: bool = True) -> int:
        """How many parameters there are: all, or those that are trained; with or without the head."""
        if trainable:
            return sum(p.numel() for k, p in self.parameters_to_train().items() if head or not k.startswith("head/"))
        mine = [*self.backbone.parameters(), *self.adapters.parameters(), *(self.head.parameters() if head else ())]
        count = sum(p.numel() for p in {id(p): p for p in mine}.values())
        return count - sum(p.numel() for p in {id(s.frozen): s.frozen for s in self._state.swaps}.values())

    @property
    def memory(self) -> str:
        """ "default", "low", "min" or "off": what is kept for backward (`zoo.engine.memory`)."""
        return self._memory

    @memory.setter
    def memory(self, value: str) -> None:
        if value not in MEMORY_SETTINGS:
            raise ConfigError(f"memory is {value!r}; expected one of {', '.join(MEMORY_SETTINGS)}.")
        self._memory = value
        self._state.saver.off = value == "off"
        self._watch_memory()

    def saved_bytes(self, *batch: Any, **kwargs: Any) -> int:
        """Bytes kept for the backward of one training forward pass: distinct storages, exact and repeatable.

        Parameters, buffers and the batch itself are left out. The model's mode and random state are restored.
        """
        mode = self.training
        ignore = [*self.parameters(), *self.buffers(), *(b for b in batch if isinstance(b, Tensor))]
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.enable_grad(), kept_buffers(self.adapters):
            try:
                self.train(True)
                return self._state.saver.count(lambda: self(*batch, **kwargs), ignore)
            finally:
                self.train(mode)

    # -- checks, merging, disk --------------------------------------------------------------------------------------

    def probe(self, *batch: Any, **kwargs: Any) -> list[str]:
        """Prove that nothing is dead: run a batch forward and backward and list what was not reached.

        Values that adapters need and that nobody gives are those that they name as examples.

        Returns:
            `<adapter>/<point>` of every op that did not run, and names of trainable parameters without a gradient.
        """
        self._state.watching = set()
        before = {k: p.grad for k, p in self.parameters_to_train().items()}
        try:
            for parameter in self.parameters_to_train().values():
                parameter.grad = None
            examples = self.example_context(*batch, **kwargs)
            with (
                torch.enable_grad(),
                kept_buffers(self.adapters),
                self.context(**{**examples, **self._state.context.given}),
            ):
                output = self(*batch, **kwargs)
                if output.requires_grad:  # or all of it is frozen, and only the hooks can be seen
                    weights = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
                    (output.float() * weights).sum().backward()
            ops = {f"{op.owner}/{op.point}" for n in self._state.active for _, op in self._ops[n]}
            dead = sorted(ops - self._state.watching)
            dead += [k for k, p in self.parameters_to_train().items() if p.grad is None]
        finally:
            self._state.watching = None
            for name, parameter in self.parameters_to_train().items():
                parameter.grad = before[name]
        return dead

    def merge(self) -> nn.Module:
        """A plain module of the library with the active adapters folded in and the head in its place; the model stays.

        Raises:
            MergeError: a method whose mathematics does not allow it, or that other active methods forbid.
        """
        refuse(
            self,
            MergeError,
            "nothing is folded in here",
            "Save the adapter, and merge it in one process that loads it.",
        )
        active, head = self._active_adapters(), self.head
        trained = [(s.module, s.name, s.trained) for n in self._state.active for s in self._swaps[n]]
        paths = {id(m): p for p, m in self.backbone.named_modules()}
        with self._bare():
            plain = copy.deepcopy(self.backbone)
        for module, name, parameter in trained:
            plain.get_submodule(paths[id(module)])._parameters[name].data.copy_(parameter.data)  # type: ignore[union-attr]
        Merger(plain, self.points, self.family.fold_shift).run(active)
        if not isinstance(head, nn.Identity):
            self.family.put_head(plain, copy.deepcopy(folded(head)).to(dtype=self.dtype))
            if self.classes is not None:
                self.family.name_classes(plain, self.classes)
        return self.family.restore(plain).requires_grad_(True).eval()

    def save_adapter(
        self,
        folder: str | Path,
        adapters: str | Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        codec: str = "plain",
        *,
        encoding: str | None = None,
        **settings: Any,
    ) -> Path:
        """Write the active (or the named) adapters and the head to a folder: config, weights, card, metrics.

        `dtype` is the precision of the stored numbers, by default that in which they are trained (float32 under a
        half-precision backbone); `codec`, which may also be called `encoding`, how they are encoded: "plain", "fp16", "int8",
        "sparse", "compeft" (settings `k`, `alpha`), or one of another package (`zoo.disk.codecs`).
        """
        from zoo.disk import save

        if encoding is not None and codec not in ("plain", encoding):
            raise ConfigError(
                f"codec='{codec}' and encoding='{encoding}' were both given; they are one thing. Give one."
            )
        return save(self, folder, adapters, dtype=dtype, codec=encoding or codec, settings=settings)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Publish the active adapters, head and card to a Hub repository; options as `zoo.hub.push`. Returns its address."""
        from zoo.hub import push

        return push(self, repo_id, **options)

    # -- data -------------------------------------------------------------------------------------------------------

    def preprocess(self, train: bool = False, augment: str | None = None) -> Callable[[Any], Tensor]:
        """The backbone's own preprocessing: from a PIL image to a tensor (3, H, W), from a waveform to (frames, bands).

        In training an image is cropped at random and flipped; `augment="crop"` does not flip (digits, letters), "none" does
        neither. Backbones of other kinds have their own words (sounds: "mask", "shift", "none").
        """
        return self.family.preprocess(train, **({} if augment is None else {"augment": augment}))

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images that the backbone takes. Raises ConfigError if it takes none."""
        _, height, width = self._of_data(*OF_DATA["image_size"])
        return height, width

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel that the preprocessing subtracts; of a spectrogram one number. Raises ConfigError if none is."""
        return self._of_channels("mean")

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel that the preprocessing divides by, as `mean`."""
        return self._of_channels("std")

    def _of_channels(self, key: str) -> tuple[float, ...]:
        value = self._of_data(key, key)
        return tuple(value) if isinstance(value, (tuple, list)) else (float(value),)

    def _of_data(self, key: str, what: str) -> Any:
        config = self.family.data_config()
        if key not in config:
            shapes = ", ".join(str(tuple(x.shape)) for x in self.family.example_batch(1))
            known = f", model.family.data_config() has {', '.join(config)}" if config else ""
            raise AbsentError(
                f"'{self.backbone_name}' ({self.family.modality}) has no {what}. It takes inputs of the shapes {shapes} "
                f"(model.example_batch()){known}."
            )
        return config[key]

    def __getattr__(self, name: str) -> Any:
        """As torch's; a property that is absent gives its own reason."""
        if name in OF_DATA:  # it has raised an AttributeError, which Python follows up by asking here
            self._of_data(*OF_DATA[name])
        return super().__getattr__(name)

    def example_batch(self, size: int = 2) -> tuple[Tensor, ...]:
        """Inputs of the shapes that the model is made for, on its device and in its precision: model(*model.example_batch())."""
        found = self.family.example_batch(size, classify=bool(self.num_classes))
        return tuple(x.to(self.device, self.dtype if x.is_floating_point() else x.dtype) for x in found)

    def extra_repr(self) -> str:
        """Backbone, adapters and counts in one line."""
        return (
            f"backbone={self.backbone_name!r}, active={self.active}, trainable={self.num_parameters(trainable=True):,}"
        )
