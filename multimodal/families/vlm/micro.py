"""Network and processor of `vlm-micro`, the small Qwen2-VL that ships with the repository: no download, all can be read.

The classes are transformers' own (`Qwen2VLForConditionalGeneration`, `Qwen2VLProcessor`), only small:

    eyes:     patches of 8 x 8, 3 blocks of width 64; 2 x 2 patches become one token of the text
    language: 4 blocks of width 96, 3 heads that share one pair of keys and values, word table tied to the output
    words:    bytes, and the pairs of `multimodal/weights/vlm-micro.merges.txt`, so that every text can be written

An image of 64 x 64 is 16 tokens; sides may be 32 to 128 pixels long (a multiple of 16, others are resized by the processor).
The tags `<think>`, `</think>`, `<answer>`, `</answer>` are one token each and are no special tokens: decoding keeps them.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from safetensors.torch import load
from torch import nn

from zoo.errors import ConfigError
from zoo.library import library

__all__ = ["MICRO", "NAME", "micro_merges", "micro_processor", "micro_tokenizer", "micro_weights"]

NAME = "zoo:vlm-micro"

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
ROWS = 512  # of the word table: 256 bytes, the merged pairs, the marks above

FIRST = 397  # id of the first mark: behind 256 bytes and the merged pairs

# Fields of its configuration that are not the library's defaults
MICRO: dict[str, Any] = {
    "vision_config": {
        "depth": 3,
        "embed_dim": 64,
        "hidden_size": 96,
        "num_heads": 2,
        "mlp_ratio": 4,
        "patch_size": 8,
        "spatial_merge_size": 2,
    },
    "text_config": {
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "vocab_size": ROWS,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
        "bos_token_id": None,
        "eos_token_id": FIRST + SPECIAL.index("<|im_end|>"),
        "pad_token_id": FIRST + SPECIAL.index("<|endoftext|>"),
    },
    "image_token_id": FIRST + SPECIAL.index("<|image_pad|>"),
    "video_token_id": FIRST + SPECIAL.index("<|video_pad|>"),
    "vision_start_token_id": FIRST + SPECIAL.index("<|vision_start|>"),
    "vision_end_token_id": FIRST + SPECIAL.index("<|vision_end|>"),
    "eos_token_id": FIRST + SPECIAL.index("<|im_end|>"),
    "pad_token_id": FIRST + SPECIAL.index("<|endoftext|>"),
    "tie_word_embeddings": True,
}

# Qwen's chat format without its default system message
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' or 'image' in c %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'video' or 'video' in c %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def micro_merges() -> list[tuple[str, str]]:
    """The pairs of the shipped vocabulary, in the order in which they are merged."""
    lines = (files("multimodal") / "weights" / "vlm-micro.merges.txt").read_text(encoding="utf-8").splitlines()
    return [(left, right) for left, right in (line.split(" ") for line in lines if line)]


def micro_tokenizer(merges: Sequence[tuple[str, str]] | None = None) -> Any:
    """A `Qwen2Tokenizer` of `merges` (default: the shipped ones); texts are padded with `<|endoftext|>`."""
    transformers, tokenizers = library("transformers", "multimodal"), library("tokenizers", "multimodal")
    merges = micro_merges() if merges is None else merges
    names = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    names += list(dict.fromkeys(left + right for left, right in merges))
    vocabulary = {name: i for i, name in enumerate([*names, *SPECIAL, *TAGS])}
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=vocabulary, merges=list(merges), eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )
    tokenizer.add_tokens([tokenizers.AddedToken(name, special=True) for name in SPECIAL], special_tokens=True)
    tokenizer.add_tokens([tokenizers.AddedToken(name, special=False, normalized=False) for name in TAGS])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def micro_processor(merges: Sequence[tuple[str, str]] | None = None) -> Any:
    """A `Qwen2VLProcessor`: the tokenizer, and images as patches of 8 x 8."""
    transformers = library("transformers", "multimodal")
    patch, merge = MICRO["vision_config"]["patch_size"], MICRO["vision_config"]["spatial_merge_size"]
    sizes = {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
    images = transformers.Qwen2VLImageProcessor(patch_size=patch, merge_size=merge, size=sizes)
    videos = transformers.Qwen2VLVideoProcessor(patch_size=patch, merge_size=merge, size=sizes)
    return transformers.Qwen2VLProcessor(
        image_processor=images, tokenizer=micro_tokenizer(merges), video_processor=videos, chat_template=TEMPLATE
    )


def micro_weights(module: nn.Module) -> None:
    """Put the weights that come with the package into a network of the same fields.

    Raises:
        ConfigError: there are none, or the network has other sizes.
    """
    file = files("multimodal") / "weights" / "vlm-micro.safetensors"
    if not file.is_file():
        raise ConfigError("There are no trained weights of 'vlm-micro'; pass pretrained=False for random ones.")
    weights = {k: v.float() for k, v in load(file.read_bytes()).items()}
    own = module.state_dict()
    differing = [k for k, v in weights.items() if k not in own or own[k].shape != v.shape]
    missing = [k for k in own if k not in weights and k != "lm_head.weight"]  # tied to the table of words
    if differing or missing:
        raise ConfigError(
            f"The weights of 'vlm-micro' do not fit these options, first '{[*differing, *missing][0]}'. Leave the options out, "
            "or pass pretrained=False for random weights."
        )
    module.load_state_dict(weights, strict=False)
