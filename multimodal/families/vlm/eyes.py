"""Where language models with eyes have these: one entry for each type of transformers' networks.

Image towers whose tokens are packed (Qwen) see all patches of a batch as one sequence (N, d), in which those of one image attend
to each other; the others have a row for each image, (images, n, d).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.errors import DataError
from zoo.points.rows import Row

__all__ = ["EYES", "VISION_OPTIONS", "Eyes", "in_one_row"]

# What a saved adapter may say of the image tower: fields of its configuration
VISION_OPTIONS: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "embed_dim", "out_hidden_size", "intermediate_size", "image_size"), range(1, 65537)
    ),
    **dict.fromkeys(("num_heads", "num_attention_heads", "in_channels", "num_channels", "patch_size"), range(1, 4097)),
    **dict.fromkeys(("depth", "num_hidden_layers", "temporal_patch_size", "spatial_merge_size"), range(1, 257)),
    **dict.fromkeys(("window_size", "num_position_embeddings", "projection_dim"), range(1, 65537)),
    **dict.fromkeys(("fullatt_block_indexes", "deepstack_visual_indexes"), range(257)),
    **dict.fromkeys(("mlp_ratio", "layer_norm_eps", "initializer_range", "attention_dropout"), float),
    "hidden_act": ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu"),
    "model_type": ("clip_vision_model", "siglip_vision_model"),
}
PACKED = (
    Row("norm", "norm", "norm1", "norm1"),
    Row("linear", "q", "attn.q", "attn.qkv", part=(0, 3)),
    Row("linear", "k", "attn.k", "attn.qkv", part=(1, 3)),
    Row("linear", "v", "attn.v", "attn.qkv", part=(2, 3)),
    Row("linear", "o", "attn.o", "attn.proj"),
    Row("sublayer", "attn", "attn", "attn", entry="norm1", exit="attn:output"),
    Row("norm", "norm", "norm2", "norm2"),
    Row("linear", "gate", "mlp.gate", "mlp.gate_proj"),
    # the same by the name that each of the three types has for it
    Row("linear", "up", "mlp.up", "mlp.fc1"),
    Row("linear", "up", "mlp.up", "mlp.linear_fc1"),
    Row("linear", "up", "mlp.up", "mlp.up_proj"),
    Row("linear", "down", "mlp.down", "mlp.fc2"),
    Row("linear", "down", "mlp.down", "mlp.linear_fc2"),
    Row("linear", "down", "mlp.down", "mlp.down_proj"),
    Row("sublayer", "mlp", "mlp", "mlp", entry="norm2", exit="mlp:output"),
    Row("block", "block", "", ""),
)
BY_IMAGE = (
    Row("norm", "norm", "norm1", "layer_norm1"),
    Row("linear", "q", "attn.q", "self_attn.q_proj"),
    Row("linear", "k", "attn.k", "self_attn.k_proj"),
    Row("linear", "v", "attn.v", "self_attn.v_proj"),
    Row("attention", "attn", "attn.product", "self_attn"),
    Row("linear", "o", "attn.o", "self_attn.out_proj"),
    Row("sublayer", "attn", "attn", "self_attn", entry="layer_norm1", exit="self_attn:output"),
    Row("norm", "norm", "norm2", "layer_norm2"),
    Row("linear", "up", "mlp.up", "mlp.fc1"),
    Row("linear", "down", "mlp.down", "mlp.fc2"),
    Row("sublayer", "mlp", "mlp", "mlp", entry="layer_norm2", exit="mlp:output"),
    Row("block", "block", "", ""),
)


@dataclass(frozen=True)
class Eyes:
    """The parts of one type of network.

    Args:
        language: path of the language network without its output.
        body: path of the image tower, inside of which the following stand.
        patch, blocks: the patch projection, and the list of blocks.
        before, behind: (name of the point, path) of norms in front of the blocks and behind them.
        table: of a block. width: the field of the tower's configuration that is the width of its tokens.
        projector: (name, kind, path in the network) of the projections and norms between tower and language.
        visual: the library's names of the inputs behind text and answer.
        packed: the tower's tokens are one sequence.
    """

    language: str
    body: str
    patch: str
    blocks: str
    table: Sequence[Row]
    projector: tuple[tuple[str, str, str], ...]
    visual: tuple[str, ...]
    before: tuple[tuple[str, str], ...] = ()
    behind: tuple[tuple[str, str], ...] = ()
    width: str = "hidden_size"
    packed: bool = False


def _qwen(norm: str, first: str, second: str, **more: Any) -> Eyes:
    merger = "model.visual.merger"
    return Eyes(
        language="model.language_model",
        body="model.visual",
        patch="patch_embed.proj",
        blocks="blocks",
        table=PACKED,
        projector=(
            ("projector.norm", "norm", f"{merger}.{norm}"),
            ("projector.fc1", "proj", f"{merger}.{first}"),
            ("projector.fc2", "proj", f"{merger}.{second}"),
        ),
        visual=("pixel_values", "image_grid_thw"),
        packed=True,
        **more,
    )


_IDEFICS = Eyes(
    language="model.text_model",
    body="model.vision_model",
    patch="embeddings.patch_embedding",
    blocks="encoder.layers",
    table=BY_IMAGE,
    behind=(("visual.norm", "post_layernorm"),),
    projector=(("projector", "proj", "model.connector.modality_projection.proj"),),
    visual=("pixel_values", "pixel_attention_mask"),
)

EYES: dict[str, Eyes] = {
    "qwen2_vl": _qwen("ln_q", "mlp.0", "mlp.2", width="embed_dim"),
    "qwen2_5_vl": _qwen("ln_q", "mlp.0", "mlp.2"),
    "qwen3_vl": _qwen("norm", "linear_fc1", "linear_fc2"),
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "llava": Eyes(
        language="model.language_model",
        body="model.vision_tower",
        patch="embeddings.patch_embedding",
        blocks="encoder.layers",
        table=BY_IMAGE,
        before=(("visual.norm_pre", "pre_layrnorm"),),
        projector=(
            ("projector.fc1", "proj", "model.multi_modal_projector.linear_1"),
            ("projector.fc2", "proj", "model.multi_modal_projector.linear_2"),
        ),
        visual=("pixel_values",),
    ),
}


def in_one_row(pixels: Tensor, grid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Patches (B, N, p) and grids (B, 3) or (B, I, 3) by sample -> those of all images, (sum of n, p) and (images, 3).

    Raises:
        DataError: no grids, or more patches than there are.
    """
    if grid is None or grid.shape[-1] != 3 or len(grid) != len(pixels):
        raise DataError(
            f"pixel_values {tuple(pixels.shape)} are patches by sample, and image_grid_thw is "
            f"{None if grid is None else tuple(grid.shape)}; expected ({len(pixels)}, 3), or (B, I, 3) for I images each."
        )
    sizes = grid.flatten(1).unflatten(1, (-1, 3))
    counts = sizes.prod(-1).sum(-1)
    if pixels.device.type == "meta":
        return pixels.flatten(0, 1), sizes.flatten(0, 1)
    if int(counts.max()) > pixels.shape[1]:
        raise DataError(
            f"image_grid_thw tells of {int(counts.max())} patches in one sample, and pixel_values has {pixels.shape[1]}: they "
            "are of different images."
        )
    real = torch.arange(pixels.shape[1], device=pixels.device) < counts[:, None]
    flat = sizes.flatten(0, 1)
    return pixels[real], flat[flat.prod(-1) > 0]
