"""Building VL-T5, VL-BART, T5 and BART: configuration, pretrained weights, released checkpoints, tokenizers.

The configuration is that of the library and, with visual input, the options of the visual embedding by the names that the
authors' configurations use; a network saved with `save_pretrained` has them in its `config.json` and comes back whole.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from multimodal.families.seq2seq import released, words
from zoo.errors import ConfigError, MismatchError, WeightsError
from zoo.library import check_loaded, library, pretrained_config, reaching

VISUAL: dict[str, Any] = {
    "feat_dim": 2048,
    "n_images": 2,
    "use_vis_order_embedding": True,
    "use_vis_layer_norm": True,
    "individual_vis_layer_norm": True,
}
# Entries of a configuration file that say nothing about the network's shape
NOTES = ("architectures", "transformers_version", "model_type", "torch_dtype", "dtype")


def build(cls: Any, name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """The library's network, or ours with a visual embedding.

    Args:
        cls: the family. name: the target of an alias, or `transformers:<source>`.
        kwargs: fields of the library's configuration and of the visual embedding (`feat_dim=None`: none), `words` (the
            vocabulary of a small network), `checkpoint` (a released file in safetensors format).

    Raises:
        ConfigError: an unknown option, or weights that cannot be had.
        WeightsError, MismatchError: the checkpoint does not fit, or is damaged.
    """
    given = {k: v for k, v in kwargs.items() if v is not None or k == "feat_dim"}
    device, checkpoint, own_words = (given.pop(k, None) for k in ("device", "checkpoint", "words"))
    state = None
    if checkpoint is not None:
        state = released.read(checkpoint)
        told = released.settings(state, cls.encoder_path + ".", cls.word_key)
        if other := [k for k, v in told.items() if k in given and given[k] != v]:
            raise MismatchError(f"The checkpoint says {other[0]}={told[other[0]]}, and you say {given[other[0]]}.")
        given |= told
    if own_words is not None:
        given["vocab_size"] = words.vocabulary_size(own_words)
    source, options, visual = plan(cls, name, given)
    if pretrained and state is None and source is not None:
        module = from_source(cls, name, source, options, visual)
    else:
        module = fresh(cls, name, {**options, **(visual or {})}, visual is not None)
        if pretrained and state is None:
            embedded(cls, module, name, own_words)
    if state is not None:
        released.load(module, state, cls.word_key)
    return module.to(device) if device is not None else module


def plan(cls: Any, name: str, given: dict[str, Any]) -> tuple[str | None, dict[str, Any], dict[str, Any] | None]:
    """Where the weights are, the library's options, and those of the visual embedding (None: there is none)."""
    source: str | None
    if name in cls.members:
        source, own = cls.members[name]
        options = {**VISUAL, **own}
    else:
        source = name.partition(":")[2]
        found = pretrained_config(source)
        if isinstance(found, str):
            raise ConfigError(found)
        options = {k: v for k, v in found.items() if k not in NOTES}
        if given.get("feat_dim") is not None:
            options = {**VISUAL, **options}
    config = getattr(library("transformers", "multimodal"), cls.config_class)()
    for key in given:
        if key not in VISUAL and not hasattr(config, key):
            raise ConfigError(
                f"'{key}' is no option of '{name}'. Known: the fields of transformers' {cls.config_class}, "
                f"{', '.join(VISUAL)}, checkpoint, words."
            )
    had_visual = "feat_dim" in options and name not in cls.members
    options |= given
    visual = {k: options.pop(k) for k in VISUAL if k in options}
    if visual.get("feat_dim") is None:
        return source, options, None
    if "vocab_size" not in given and not had_visual:
        options["vocab_size"] = cls.vocabularies.get(options["vocab_size"], options["vocab_size"])
    return source, options, visual


def network(cls: Any, visual: bool) -> Any:
    """The class of the network."""
    if visual:
        return getattr(library("multimodal.families.seq2seq.vl_models", "multimodal"), cls.classes[1])
    return getattr(library("transformers", "multimodal"), cls.classes[0])


def fresh(cls: Any, name: str, options: dict[str, Any], visual: bool) -> nn.Module:
    """Random weights."""
    try:
        config = getattr(library("transformers", "multimodal"), cls.config_class)(**options)
        module = network(cls, visual)(config)
    except (TypeError, ValueError, AssertionError, ZeroDivisionError) as error:
        raise ConfigError(f"transformers does not take these options for '{name}': {error}") from error
    module.tie_weights()  # which older releases leave out on the meta device
    return module  # type: ignore[no-any-return]


def from_source(cls: Any, name: str, source: str, options: dict[str, Any], visual: dict[str, Any] | None) -> nn.Module:
    """`from_pretrained`; the vocabulary then grows by the words that name visual tokens.

    A visual embedding that the source never had starts at random; every other tensor comes from its files.

    Raises:
        ConfigError: weights that cannot be had. WeightsError: they lack a tensor of the network, or have one over.
    """
    transformers = library("transformers", "multimodal")
    saved = pretrained_config(source)
    fresh_visual = isinstance(saved, dict) and "feat_dim" not in saved
    optional = [*(rf"(^|\.){re.escape(key)}$" for key in released.OPTIONAL), *([r"visual_embedding\."] * fresh_visual)]
    try:
        config = getattr(transformers, cls.config_class).from_pretrained(source)
        size = options.get("vocab_size", config.vocab_size)
        for key, value in {**options, **(visual or {})}.items():
            if key != "vocab_size":
                setattr(config, key, value)
        made = network(cls, visual is not None)
        module, report = made.from_pretrained(source, config=config, dtype=torch.float32, output_loading_info=True)
        check_loaded(source, cls.classes[0 if visual is None or fresh_visual else 1], report, optional)
        if size != config.vocab_size:
            module.resize_token_embeddings(size, mean_resizing=False)
    except WeightsError:
        raise
    except Exception as error:
        raise ConfigError(
            f"The pretrained weights of '{name}' could not be loaded: {_reason(error)}. Check the network and the name, or "
            "pass pretrained=False for random weights."
        ) from error
    return module  # type: ignore[no-any-return]


def embedded(cls: Any, module: nn.Module, name: str, own_words: Sequence[str] | None) -> None:
    """Weights that come with the package."""
    file = Path(__file__).parents[2] / "weights" / f"{name.partition(':')[2]}.safetensors"
    if own_words is not None:
        raise ConfigError(f"'{name}' was trained with its own words; pass pretrained=False to use others.")
    if not file.is_file():
        raise ConfigError(f"There are no trained weights of '{name}'; pass pretrained=False for random ones.")
    released.load(module, {k: v.float() for k, v in released.read(file).items()}, cls.word_key)


def tokenizer(family: Any, own_words: Sequence[str] | None) -> Any:
    """The tokenizer of the pretrained weights, with the words that name visual tokens if there are any.

    Raises:
        ConfigError: it cannot be had.
    """
    name = family.aliases.get(family.name, family.name)
    source = family.members[name][0] if name in family.members else name.partition(":")[2]
    if own_words is not None or source is None:
        return words.tokenizer(own_words or words.EASY_VQA)
    try:
        made = library("transformers", "multimodal").AutoTokenizer
        with reaching():
            found: Any = made.from_pretrained(source, trust_remote_code=False)  # or it asks, and waits for an answer
    except Exception as error:
        raise ConfigError(
            f"The tokenizer of '{family.name}' could not be loaded: {_reason(error)}. Check the network, or set "
            "model.family.tokenizer."
        ) from error
    if family.feat_dim is not None:
        known = inspect.signature(found.add_special_tokens).parameters
        # or the tokenizer would forget the special words that it has
        keep = {k: False for k in known if k.startswith("replace_")}
        found.add_special_tokens({"additional_special_tokens": family.visual_words()}, **keep)
    return found


def _reason(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:250] if lines else ''}"
