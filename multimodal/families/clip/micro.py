"""`clip-micro`: a small CLIP for images of 32 x 32 pixels, built of open_clip's own classes.

| part | size |
| --- | --- |
| image tower | open_clip's `VisionTransformer`, patch 4, width 192, 6 blocks, 3 heads, no norm in front: `vit-micro` fits in |
| text tower | width 128, 4 blocks, 4 heads, 64 positions, causal |
| common space | 128 |
| vocabulary | 3,072: bytes, and the first 2,558 merges of CLIP's own byte pair encoding |

CLIP's vocabulary of 49,408 would be two thirds of the model. Its merges are in the order in which they were found, the most
frequent first, so a beginning of the list is a byte pair encoding too: every text has its tokens, frequent words stay whole,
and rare ones fall into more pieces. 3,927,169 parameters, 7.9 MB in float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP, set_model_preprocess_cfg
from open_clip.tokenizer import SimpleTokenizer, bytes_to_unicode
from torch import Tensor, nn

from zoo.errors import ConfigError

WEIGHTS = Path(__file__).parents[2] / "weights" / "clip-micro.safetensors"
CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": 32,
        "patch_size": 4,
        "width": 192,
        "layers": 6,
        "head_width": 64,
        "no_ln_pre": True,
        "norm_kwargs": {"eps": 1e-6},
    },
    "text_cfg": {"context_length": 64, "vocab_size": 3072, "width": 128, "heads": 4, "layers": 4},
}
PREPROCESSING: dict[str, Any] = {
    "size": (32, 32),
    "mode": "RGB",
    "mean": (0.5071, 0.4866, 0.4409),
    "std": (0.2673, 0.2564, 0.2762),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}


def build(pretrained: bool, **options: Any) -> nn.Module:
    """open_clip's `CLIP` of this size. `vision_cfg` and `text_cfg` override single fields, other options whole ones.

    Raises:
        ConfigError: an option that open_clip does not have, or weights that are not there.
    """
    config = {**CONFIG, **options}
    for part in ("vision_cfg", "text_cfg"):
        config[part] = {**CONFIG[part], **options.get(part, {})}
    if pretrained and not WEIGHTS.is_file():
        raise ConfigError(
            "The weights of 'clip-micro' are not part of this installation (multimodal/weights/clip-micro.safetensors is "
            "missing). Pass pretrained=False for random ones, or load another model, such as 'clip-vit-b32'."
        )
    try:
        module = CLIP(**config)
    except TypeError as error:
        raise ConfigError(f"open_clip does not take these options for 'clip-micro': {error}") from error
    size = module.visual.image_size
    set_model_preprocess_cfg(module, {**PREPROCESSING, "size": size})
    if pretrained:
        from safetensors.torch import load_file

        module.load_state_dict({key: value.float() for key, value in load_file(WEIGHTS).items()})
    return module


class ShortTokenizer(SimpleTokenizer):
    """CLIP's byte pair encoding with the first merges only: `size` tokens, 512 for bytes and 2 for start and end."""

    def __init__(self, size: int, context_length: int) -> None:
        super().__init__(context_length=context_length)
        symbols = list(bytes_to_unicode().values())
        symbols += [symbol + "</w>" for symbol in symbols]
        special = ["<start_of_text>", "<end_of_text>"]
        if size < len(symbols) + len(special):
            raise ConfigError(
                f"a vocabulary of {size} tokens is too small; bytes, start and end need {len(symbols) + 2}."
            )
        ranks: dict[Any, int] = self.bpe_ranks  # type: ignore[has-type]
        merges = list(ranks)[: size - len(symbols) - len(special)]
        vocabulary = [*symbols, *map("".join, merges), *special]
        self.encoder = {token: number for number, token in enumerate(vocabulary)}
        self.decoder = dict(enumerate(vocabulary))
        self.bpe_ranks = {merge: rank for rank, merge in enumerate(merges)}
        self.cache = {token: token for token in special}
        self.vocab_size = len(vocabulary)
        self.all_special_ids = [self.encoder[token] for token in special]
        self.sot_token_id, self.eot_token_id = self.all_special_ids


@torch.no_grad()
def load_vit(tower: Any, state: Mapping[str, Tensor]) -> None:
    """Put the weights of a timm `VisionTransformer` with a class token into an open_clip image tower without `ln_pre`.

    The tower's tokens behind `ln_post` are then those of the other behind `norm`. The bias of timm's patch embedding goes into
    the positions; the projection to the common space stays as it is.
    """
    positions, biases = state["pos_embed"][0].clone(), state["patch_embed.proj.bias"]
    positions[1:] += biases
    new = {
        "conv1.weight": state["patch_embed.proj.weight"],
        "class_embedding": state["cls_token"][0, 0],
        "positional_embedding": positions,
        "ln_post.weight": state["norm.weight"],
        "ln_post.bias": state["norm.bias"],
        "proj": tower.proj,
    }
    names = {"norm1.": "ln_1.", "norm2.": "ln_2.", "attn.qkv.": "attn.in_proj_", "attn.proj.": "attn.out_proj."}
    names |= {"mlp.fc1.": "mlp.c_fc.", "mlp.fc2.": "mlp.c_proj."}
    for key, value in state.items():
        if key.startswith("blocks."):
            number, inner = key.removeprefix("blocks.").split(".", 1)
            old = next(name for name in names if inner.startswith(name))
            new[f"transformer.resblocks.{number}.{names[old]}{inner.removeprefix(old)}"] = value
    tower.load_state_dict(new)
