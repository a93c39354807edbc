"""Tiny members of every type of language model with eyes, and the library's inputs of a batch that is given by sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import zoo
from zoo import registry

_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 60,
    "initializer_range": 0.3,
}
_TURNED = {"rope_parameters": {"mrope_section": [2, 1, 1]}}
_MARKS = {"image_token_id": 4, "video_token_id": 3, "vision_start_token_id": 2, "vision_end_token_id": 1}
_PACKED = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4}
_BY_IMAGE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.2,
}
TINY: dict[str, dict[str, Any]] = {
    "qwen2-vl-2b": dict(registry.family("vlm").tiny[1]),  # type: ignore[index]
    "qwen2.5-vl-3b": {
        "text_config": {**_TEXT, **_TURNED},
        "vision_config": {"depth": 2, **_PACKED, "window_size": 16, "fullatt_block_indexes": [1]},
        **_MARKS,
    },
    "qwen3-vl-2b": {
        "text_config": {**_TEXT, "head_dim": 8, **_TURNED},
        "vision_config": {"depth": 3, **_PACKED, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        **_MARKS,
    },
    "smolvlm-256m": {"text_config": _TEXT, "vision_config": _BY_IMAGE, "scale_factor": 2, "image_token_id": 4},
    "smolvlm2-2.2b": {"text_config": _TEXT, "vision_config": _BY_IMAGE, "scale_factor": 2, "image_token_id": 4},
    "llava-1.5-7b": {"text_config": _TEXT, "vision_config": _BY_IMAGE, "image_token_index": 4, "image_seq_length": 16},
}
QWEN = [name for name in TINY if name.startswith("qwen")]


def tiny(name: str = "qwen2-vl-2b", adapter: Any = None, **more: Any) -> zoo.Model:
    """A tiny random member, the same each time."""
    return zoo.load(name, adapter, pretrained=False, seed=0, **{**TINY[name], **more}).eval()


def of_library(model: zoo.Model, ids: Tensor, mask: Tensor | None, *seen: Tensor) -> dict[str, Tensor]:
    """The inputs as the library's processors give them: images of all samples in one row, all of them real."""
    family: Any = model.family
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if family.eyes.packed:
        patches, grid = seen
        grid = grid.reshape(len(ids), -1, 3)
        rows = [x[: int(g.prod(-1).sum())] for x, g in zip(patches, grid, strict=True)]
        given |= {
            "pixel_values": torch.cat(rows),
            "image_grid_thw": grid.flatten(0, 1)[grid.flatten(0, 1).prod(-1) > 0],
        }
        return {**given, "mm_token_type_ids": ids.eq(family.image_token).int()}
    if family.model_type == "llava":
        given["pixel_values"] = seen[0].flatten(0, 1)
    else:
        given |= {"pixel_values": seen[0], "pixel_attention_mask": seen[1]}
    return {**given, **({} if mask is None else {"position_ids": (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)})}


CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}\n{% endfor %}assistant:"
)


def small_qwen(seed: int = 0) -> zoo.Model:
    """`vlm-micro` with two blocks each and random numbers: texts of any words, images of 32 to 128 pixels a side."""
    sizes: dict[str, Any] = {"text_config": {"num_hidden_layers": 2}, "vision_config": {"depth": 2}}
    return zoo.load("vlm-micro", pretrained=False, seed=seed, **sizes).eval()


def words(*special: str) -> Any:
    """A tokenizer of single characters with special words, which starts texts with <s>."""
    import tokenizers
    import transformers

    letters = "abcdefghijklmnopqrstuvwxyz ?.:\n"
    names = ["<pad>", "</s>", "<s>", *special, "<unk>", *letters]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )
    found.add_special_tokens({"additional_special_tokens": list(special)})
    return found
