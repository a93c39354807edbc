"""What is said of each class of diffusers: an entry (`Member`) of lists of blocks, conditions, what stands around, and sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from multimodal.families.diffusion.family import OPTIONS, Outside
from zoo.points.rows import Row

# Fields of the classes' configurations that a saved adapter may give, besides `OPTIONS`
_SIZES = (
    *("added_kv_proj_dim", "all_f_patch_size", "all_patch_size", "approximator_hidden_dim", "approximator_layers"),
    *("approximator_num_channels", "axes_dim_rope", "axes_dims", "axes_lens", "cap_feat_dim", "condition_dim"),
    *("cross_attention_dim_t5", "cross_attention_head_dim", "dim", "ffn_dim", "freq_dim", "hidden_size", "image_dim"),
    *("image_embed_dim", "max_sequence_length", "multiple_of", "n_heads", "n_kv_heads", "num_cross_attention_heads"),
    *("num_frame_per_block", "num_kv_heads", "pos_embed_seq_len", "rope_axes_dim", "rope_max_seq_len"),
    *("siglip_feat_dim", "target_size", "text_dim", "text_embed_2_dim", "text_len", "text_len_t5"),
    *("timestep_guidance_channels", "video_length", "axes_dims_rope"),
)
_LAYERS = (
    *("n_layers", "n_refiner_layers", "num_mmdit_layers", "num_refiner_layers", "num_single_dit_layers"),
    "num_single_layers",
)
_NUMBERS = (
    *("eps", "ffn_dim_multiplier", "guidance_embeds_scale", "mlp_ratio", "rope_theta", "scaling_factor", "t_scale"),
    *("time_theta", "timestep_scale"),
)
_YES_NO = (
    *("attention_out_bias", "cross_attn_norm", "inject_sample_info", "learn_sigma", "use_additional_t_cond"),
    *("use_layer3d_rope", "use_meanflow", "use_style_cond_and_image_meta_size", "zero_cond_t"),
)
MORE_OPTIONS: dict[str, Any] = {
    **OPTIONS,
    **dict.fromkeys(_SIZES, range(65537)),
    **dict.fromkeys(_LAYERS, range(257)),
    **dict.fromkeys(_NUMBERS, float),
    **dict.fromkeys(_YES_NO, bool),
    "activation_fn": ("gelu", "gelu-approximate", "geglu", "swiglu"),
    "qk_norm": ("rms_norm", "rms_norm_across_heads", "layer_norm"),
    "norm_type": ("ada_norm_zero", "ada_norm_single", "layer_norm"),
    "image_condition_type": ("latent_concat", "token_replace"),
    "task_type": ("i2v", "t2v"),
    "pixels": range(8, 16385),
    "frames": range(1, 4097),
}
FLOW = ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})


@dataclass(frozen=True)
class Input:
    """A condition: an argument of the library's forward.

    `kind`: "text" and "image" (B, L, width), "pooled" (B, width), "mask" (B, L) of the text before it, "latents" (B, C, ...)
    that are joined to the noisy ones where the network takes more channels than it gives. `width`: the field of the
    configuration that says how wide; the input is there only if that is set.
    """

    name: str
    kind: str
    width: str = ""
    length: str = ""  # field of the number of words, where that is fixed


@dataclass(frozen=True)
class Blocks:
    """A list of blocks: the name of its points, its module path, and its table."""

    name: str
    path: str
    table: Sequence[Row]


@dataclass(frozen=True)
class Released:
    """A checkpoint with an alias: its repository, what of its configuration is not the class's default, its licence."""

    source: str
    config: Mapping[str, Any] = field(default_factory=dict)
    licence: str = "other"


Call = Callable[..., Tensor]  # (family, module, latents, steps, **conditions) -> the prediction


@dataclass(frozen=True)
class Member:
    """A class of diffusers."""

    blocks: tuple[Blocks, ...]
    call: Call
    inputs: tuple[Input, ...]
    tiny: Mapping[str, Any]
    front: tuple[Outside, ...] = ()
    back: tuple[Outside, ...] = ()
    released: Mapping[str, Released] = field(default_factory=dict)
    schedule: tuple[str, Mapping[str, Any]] = FLOW
    pipeline: str = ""
    heads: tuple[str, str] = ("num_attention_heads", "attention_head_dim")  # fields: heads, and the width of one
    width: str = ""  # field of the width of the stream, if it is not heads * width of one
    text_width: str = ""  # field of the width of the text's stream, where that is another one
    text_first: tuple[str, ...] = ()  # classes of blocks that give (text, image) rather than (image, text)
    channels: str = "in_channels"  # field of the channels of the latents
    packed: int = 1  # latents in one channel of the configuration: the class takes them packed 2 x 2
    patch: int = 0  # latents along a side of a patch; 0: the configuration's `patch_size`
    variance: bool = False  # a variance is predicted in as many channels more
    parts: Mapping[str, Callable[[Any], tuple[tuple[str, str, int], ...]]] = field(default_factory=dict)
    text_tokens: int = 256
    pixels: tuple[int, int] = (1024, 1024)
    ratio: int = 8  # pixels of the autoencoder along a side of a latent
    frames: int = 0  # frames of pixels; 0: images
    frame_ratio: int = 1  # of which so many make a latent frame, the first one aside


def aliases_of(members: Mapping[str, Member]) -> dict[str, str]:
    """Short names of the members' checkpoints."""
    return {alias: f"diffusers:{r.source}" for m in members.values() for alias, r in m.released.items()}


def tiny_of(members: Mapping[str, Member], made: str) -> tuple[str, dict[str, Any]]:
    """The tiny member of a class: its name, and options."""
    return f"diffusers:{made}", dict(members[made].tiny)
