"""What the diffusers families share: names, building, checks of inputs, preprocessing, licences.

A diffusion transformer takes noisy latents, a time step and a condition, and answers with a prediction of the latents' shape
(the noise, the velocity, or the flow; some predict a variance in as many channels more). That prediction is what `features`
returns: there is nothing to pool and no classifier. A text encoder and the autoencoder between pixels and latents are modules
of their own, which the library's pipelines hold (`multimodal.families.diffusion.pipelines`).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from multimodal.families.diffusion.names import FAMILIES, source_class, source_config
from zoo.backbone import Backbone
from zoo.errors import ConfigError, DataError, WeightsError
from zoo.library import library
from zoo.points import ConditionPoint, NormPoint, Point
from zoo.points.rows import Row, find, make_linear

if TYPE_CHECKING:
    from zoo.engine.sites import Site
    from zoo.points.recorder import Recorder

# An MLP of the library: up, activation, dropout, down
FEED_FORWARD = (
    Row("linear", "up", "mlp.up", "ff.net.0.proj"),
    Row("linear", "down", "mlp.down", "ff.net.2"),
)

Outside = tuple[str, str, str, str]  # a point outside of the blocks: kind, role, name, module path


def embedder(role: str, path: str, name: str = "") -> tuple[Outside, ...]:
    """Points of an embedding by a small MLP, `condition.<name or role>`, and of its two projections."""
    point = f"condition.{name or role}"
    return (
        ("condition", role, point, path),
        ("linear", role, f"{point}.in", f"{path}.linear_1"),
        ("linear", role, f"{point}.out", f"{path}.linear_2"),
    )


_SIZES = (
    *("num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "sample_size", "patch_size"),
    *("patch_size_t", "sample_width", "sample_height", "sample_frames", "norm_num_groups", "num_embeds_ada_norm"),
    *("time_embed_dim", "ofs_embed_dim", "text_embed_dim", "max_text_seq_length", "temporal_compression_ratio"),
    *("cross_attention_dim", "caption_channels", "joint_attention_dim", "pooled_projection_dim"),
    *("caption_projection_dim", "pos_embed_max_size"),
)
_YES_NO = (
    *("attention_bias", "upcast_attention", "norm_elementwise_affine", "flip_sin_to_cos", "guidance_embeds"),
    *("use_rotary_positional_embeddings", "use_learned_positional_embeddings", "patch_bias"),
    *("use_additional_conditions", "double_self_attention", "only_cross_attention"),
)
_NUMBERS = (
    *("dropout", "norm_eps", "spatial_interpolation_scale", "temporal_interpolation_scale", "interpolation_scale"),
    "freq_shift",
)
# What a saved adapter may say of its backbone: fields of the classes' configurations, nothing that `from_pretrained` itself takes
OPTIONS: dict[str, Any] = {
    **dict.fromkeys(_SIZES, range(1, 65537)),
    **dict.fromkeys(("num_layers", "num_single_layers"), range(257)),
    **dict.fromkeys(("dual_attention_layers", "axes_dims_rope"), range(65537)),
    **dict.fromkeys(_NUMBERS, float),
    **dict.fromkeys(_YES_NO, bool),
    "activation_fn": ("gelu", "gelu-approximate", "geglu"),
    "timestep_activation_fn": ("silu",),
    "norm_type": ("ada_norm_zero", "ada_norm_single"),
    "qk_norm": ("rms_norm",),
    "attention_type": ("default",),
}


class DiffusersBackbone(Backbone):
    """A transformer of diffusers; `diffusers:<repository or folder>` is any one of the family's class."""

    modality = "diffusion-image"
    saved_options = OPTIONS
    pools = False
    bare_sublayers = False
    tiny_classes = None
    task = "diffuse"
    loads_in_dtype = True
    diffusers_class: ClassVar[str] = ""
    pipeline_class: ClassVar[str] = ""  # the pipeline of diffusers that it belongs to
    part: ClassVar[str] = "transformer"  # what the pipeline calls it
    frames_axis: ClassVar[int] = 1  # of the latents of a video
    # What the pipeline gives and how it is called, for cards
    sample, request = "image", '("a photo of a cat").images[0]'
    text_tokens: ClassVar[int] = 0  # of the text embeddings that the library's pipeline makes, where that is fixed
    # Settings of the transformers that have an alias, so that they are built without a network
    configs: ClassVar[dict[str, dict[str, Any]]] = {}
    licences: ClassVar[dict[str, str]] = {}
    # The noise schedule that the checkpoints were trained with: a scheduler class of diffusers and its settings
    schedule: ClassVar[tuple[str, dict[str, Any]]] = ("DDPMScheduler", {})
    # Points in front of the blocks and behind
    front: ClassVar[tuple[Outside, ...]] = ()
    back: ClassVar[tuple[Outside, ...]] = ()

    # -- building ---------------------------------------------------------------------------------------------------

    @classmethod
    def accepts(cls, name: str) -> bool | str:
        """True for `diffusers:<repository or folder>` whose transformer is of this family's class."""
        if not name.startswith("diffusers:"):
            return False
        if name in cls.configs:
            return True
        known = source_class(name.removeprefix("diffusers:"))
        if " " in known:
            return known
        if known not in FAMILIES:
            return (
                f"Its transformer is a {known}, which no family here describes (they describe {', '.join(FAMILIES)})."
            )
        return known == cls.diffusers_class

    @classmethod
    def known(cls, name: str) -> bool:
        """Also the repositories whose settings are listed here."""
        return super().known(name) or name in cls.configs or name == f"diffusers:{cls.diffusers_class}"

    @classmethod
    def build(cls, name: str, *, pretrained: bool, dtype: torch.dtype | None = None, **kwargs: Any) -> nn.Module:
        """The library's transformer; `kwargs` are settings of its class and replace those of the checkpoint.

        `dtype`: in which the checkpoint is read, where that is exact (`multimodal.families.diffusion.weights`).

        Raises:
            ConfigError: a setting that the class does not have or take, or weights that cannot be had.
            WeightsError: weights that lack a tensor of the network, or have one over.
            MissingPackageError: diffusers is not installed.
        """
        options = {k: v for k, v in kwargs.items() if v is not None}
        made = getattr(library("diffusers", "multimodal"), cls.diffusers_class)
        named = name.removeprefix("diffusers:") in FAMILIES
        if pretrained and named:
            raise ConfigError(
                f"'{name}' is a class of diffusers, of the sizes that it has by default: it has no weights. Pass "
                "pretrained=False for random ones, or name a repository or folder (diffusers:<source>)."
            )
        if pretrained:
            return cls._load(made, name, options, dtype)
        config = {} if named else cls.configs.get(name)
        if config is None:
            found, _ = source_config(name.removeprefix("diffusers:"))
            if isinstance(found, str):
                raise ConfigError(f"'{name}' cannot be built: {found}")
            takes = inspect.signature(made.__init__).parameters
            config = {k: v for k, v in found.items() if k in takes}
        try:
            return made(**{**config, **options})
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ConfigError(f"diffusers does not take these options for '{name}': {error}") from error

    @classmethod
    def _load(cls, made: Any, name: str, options: dict[str, Any], dtype: torch.dtype | None) -> nn.Module:
        from multimodal.families.diffusion.weights import load

        source = name.removeprefix("diffusers:")
        _, folder = source_config(source)
        try:
            return load(made, source, folder, options, dtype)
        except WeightsError:
            raise
        except Exception as error:
            raise ConfigError(
                f"The pretrained weights of '{name}' could not be loaded: {type(error).__name__}: {str(error)[:300]}. Check the "
                "network and the name, or pass pretrained=False for random weights."
            ) from error

    def licence(self) -> str | None:
        """Licence of the checkpoints that have an alias; None for random weights and others."""
        return self.licences.get(self._library_name) if self.pretrained else None

    def hub_id(self) -> str | None:
        """Hub repository of the checkpoint; None for random weights and local folders."""
        source = self._library_name.removeprefix("diffusers:")
        local = not self.pretrained or ":" in source or Path(source).expanduser().exists()
        return None if local else source

    @property
    def _library_name(self) -> str:
        return self.aliases.get(self.name, self.name)

    # -- what the model asks ----------------------------------------------------------------------------------------

    @property
    def config(self) -> Any:
        """The library's configuration of the transformer."""
        return self.module.config

    @property
    def feature_dim(self) -> int:
        """Channels of the prediction."""
        return int(self.config.out_channels or self.config.in_channels)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that are denoised."""
        return int(self.config.in_channels)

    def features(self, *inputs: Any, **kwargs: Any) -> Tensor:
        """The transformer's prediction; see `run`."""
        return self.run(self.module, *inputs, **kwargs)

    def data_config(self) -> dict[str, Any]:
        """Pixels in [-1, 1], eight for each latent along a side; a transformer of three channels works on pixels themselves."""
        size = int(self.config.sample_size) * (1 if self.latent_channels == 3 else 8)
        return pixel_config(size, size)

    def example_batch(self, size: int = 2, classify: bool = False) -> tuple[Tensor, ...]:
        """As `tiny_batch`, with latents of the checkpoint's resolution and as many words as its pipeline hands over."""
        latents, *rest = super().example_batch(size)
        pixels = 1 if self.latent_channels == 3 else 8
        height, width = (side // pixels for side in self.data_config()["input_size"][1:])
        words = [
            torch.randn(size, self.text_tokens, x.shape[2]) if x.ndim == 3 and self.text_tokens else x for x in rest
        ]
        return torch.randn(*latents.shape[:-2], height, width), *words

    def hub_task(self, num_classes: int) -> str | None:
        """Images of a text, if the family does not say otherwise."""
        return "text-to-image"

    def usage(self, num_classes: int) -> tuple[list[str], list[str]]:
        """As `Backbone.usage`: the library's pipeline around the model, where the checkpoint has one."""
        if self.hub_id() is None:
            return [], [
                "prediction = model(*model.example_batch())  # multimodal.families.diffusion.pipelines makes a pipeline of it"
            ]
        return ["from multimodal.families.diffusion.pipelines import pipeline"], [
            f"{self.sample} = pipeline(model){self.request}"
        ]

    def preprocess(self, train: bool, **options: Any) -> Any:
        """PIL image -> pixels in [-1, 1]: the centre, flipped at random in training. No random crops: they would be generated."""
        from multimodal.data.pixels import Pixels

        return Pixels(self.data_config(), train and options.get("augment", "crop-flip") == "crop-flip")

    def write_lora(self, model: Any, folder: Path, adapter: str | None = None) -> Path:
        """A LoRA in diffusers' format (`multimodal.families.diffusion.lora`)."""
        from multimodal.families.diffusion.lora import save_lora_weights

        return save_lora_weights(model, folder, adapter, self.part)

    def read_lora(self, model: Any, source: str, name: str | None = None, leave_out: bool = False) -> str:
        """Attach a LoRA of diffusers' format or kohya's."""
        from multimodal.families.diffusion.lora import load_lora_weights

        return load_lora_weights(model, source, name, self.part, leave_out=leave_out)

    def scheduler(self) -> Any:
        """A fresh scheduler of diffusers with the noise that the family's checkpoints were trained with."""
        name, settings = self.schedule
        return getattr(library("diffusers", "multimodal"), name)(**settings)

    # -- points -----------------------------------------------------------------------------------------------------

    def points(self) -> list[Point]:
        """Points of the embeddings, of every block, and of the final projection."""
        dim = int(self.config.num_attention_heads * self.config.attention_head_dim)
        found = [p for line in self.front for p in self.outside(dim, *line)]
        for i, block in enumerate(self.module.transformer_blocks):  # type: ignore[arg-type]
            found += self.points_at(block, f"blocks.{i}", f"transformer_blocks.{i}", i)
        return found + [p for line in self.back for p in self.outside(dim, *line)]

    def points_at(
        self, block: nn.Module, name: str, path: str, index: int, table: Sequence[Row] | None = None
    ) -> list[Point]:
        """Points of one block by the family's table, or another one; norms without parameters are no points."""
        heads, width = int(self.config.num_attention_heads), int(self.config.attention_head_dim)
        options: dict[str, Any] = {"block": index, "attention": {"head_dim": width}}
        found = self.points_of_block(
            block, name, path, heads * width, heads, table=table or self.block_table, **options
        )
        return [_sized(p) for p in found if p.kind != "norm" or p.dim_out]

    def elementwise_modules(self) -> list[nn.Module]:
        """As `Backbone.elementwise_modules`, and the MLPs' activations."""
        activations = [m for m in self.module.modules() if type(m).__name__ == "GELU" and hasattr(m, "proj")]
        return [*super().elementwise_modules(), *activations]

    def site_kind(self, module: nn.Module, kind: type[Site]) -> type[Site]:
        """An activation that holds the projection in front of it."""
        if type(module).__name__ != "GELU" or not hasattr(module, "proj"):
            return kind
        from multimodal.families.diffusion.attention import Activated

        return Activated

    def outside(self, dim: int, kind: str, role: str, name: str, path: str) -> list[Point]:
        """A point outside of the blocks, if the module has it."""
        module = find(self.module, path)
        if module is None:
            return []
        common: dict[str, Any] = {"name": name, "role": role, "path": path, "module": module}
        if kind == "linear":
            point = make_linear(module, None, "", 0, common)
            return [] if point is None else [point]
        if kind == "norm":
            weight = getattr(module, "weight", None)
            return [] if weight is None else [NormPoint(**common, dim_in=dim, dim_out=len(weight))]
        return [_sized(ConditionPoint(**common, dim_in=dim, dim_out=dim))]

    def record(self, session: Recorder, point: Point, verb: str, module: nn.Module, **options: Any) -> None:
        """`extend` of attention points (`multimodal.families.diffusion.attention`).

        Raises:
            AttachError: a processor that is not described there, or another verb.
        """
        if verb not in ("extend", "gate", "again"):
            super().record(session, point, verb, module, **options)
            return
        from multimodal.families.diffusion.attention import record

        record(session, point, module, verb)

    # -- checks of inputs -------------------------------------------------------------------------------------------

    def check_latents(self, latents: Any, layout: str, channels: int, patch: int | None = None) -> None:
        """Raise DataError unless latents have the dimensions of `layout` ("B C H W"), as many channels, and whole patches."""
        axes = layout.split()
        if not isinstance(latents, Tensor) or latents.ndim != len(axes):
            shape = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise DataError(f"latents are {shape}; '{self.name}' takes ({', '.join(axes)}).")
        given, patch = latents.shape[axes.index("C")], patch or int(self.config.patch_size)
        if given != channels:
            raise DataError(
                f"latents of shape {tuple(latents.shape)} have {given} channels; '{self.name}' takes {channels}, in the order "
                f"({', '.join(axes)}). Encode pixels with the autoencoder that belongs to it (zoo.fit(..., "
                f"task=Diffuse(vae=...))), or build it with in_channels={given}."
            )
        if latents.shape[-1] % patch or latents.shape[-2] % patch:
            raise DataError(
                f"latents of {latents.shape[-2]} x {latents.shape[-1]} cannot be cut into patches of {patch} x {patch}; pad or "
                "resize them to a multiple."
            )

    def check_text(self, text: Any, latents: Tensor, width: int, what: str = "encoder_hidden_states") -> None:
        """Raise DataError unless text embeddings are (B, tokens, width), or (B, width) if `what` is "pooled_projections"."""
        axes = 2 if what == "pooled_projections" else 3
        shape = tuple(text.shape) if isinstance(text, Tensor) else type(text).__name__
        if (
            not isinstance(text, Tensor)
            or text.ndim != axes
            or text.shape[0] != latents.shape[0]
            or text.shape[-1] != width
        ):
            expected = f"({latents.shape[0]}, {width})" if axes == 2 else f"({latents.shape[0]}, tokens, {width})"
            raise DataError(
                f"{what} are {shape}; '{self.name}' takes {expected}, as its text encoder makes them "
                "(pipeline.encode_prompt)."
            )


def pixel_config(height: int, width: int) -> dict[str, Any]:
    """The `data_config` of RGB pixels in [-1, 1]."""
    half = (0.5, 0.5, 0.5)
    return {"input_size": (3, height, width), "mean": half, "std": half, "crop_pct": 1.0, "interpolation": "bicubic"}


def timesteps(value: Any, latents: Tensor) -> Tensor:
    """(B,) time steps on the device of the latents, from a number, a scalar tensor or (B,).

    Raises:
        DataError: another number of them than latents.
    """
    steps = value if isinstance(value, Tensor) else torch.tensor(value, device=latents.device)
    steps = steps.to(latents.device)
    if steps.ndim == 0 or steps.numel() == 1:
        return steps.reshape(1).expand(latents.shape[0])
    if steps.shape != (latents.shape[0],):
        raise DataError(
            f"timestep has shape {tuple(steps.shape)} for {latents.shape[0]} latents; give one for each, or one."
        )
    return steps


def _sized(point: Point) -> Point:
    """The widths that are the point's own: a table of embeddings takes indices, a norm of queries sees heads."""
    if point.kind == "condition":
        linears = [m for m in point.module.modules() if isinstance(m, (nn.Linear, nn.Embedding))]
        first, last = linears[0], linears[-1]
        point.dim_in = first.in_features if isinstance(first, nn.Linear) else 0
        point.dim_out = last.out_features if isinstance(last, nn.Linear) else last.embedding_dim
    elif point.kind == "norm":
        point.dim_in = point.dim_out
    return point
