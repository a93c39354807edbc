"""Whisper, as transformers builds it (`WhisperForConditionalGeneration`): sound in, words out.

    features(log-mel (B, mel, 2 N), decoder_input_ids (B, T)) -> scores of all words (B, T, V)

`decoder_input_ids` are the words that are there already: the text one place to the right, behind the start word (`shift`).
`model(sounds, labels=labels)` shifts the labels itself. Points: `encoder.*` and `decoder.*`; the table of words, to which the
output is tied, and the tables of positions are no points. Prefixes and prompts have no place; in the decoder they stand in front
of what its cache holds, and are no part of it.

Training on (sound, text) and writing: the task "transcribe" (`audio.tasks.transcribe`).

Source: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision", ICML 2023. Count: Whisper-base 72,593,920.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from audio.families.parts.whisper_parts import DECODER, PUBLISHED, SHORT, WhisperFamily
from zoo.errors import ConfigError
from zoo.library import library, pretrained_config, reaching
from zoo.points import Point
from zoo.registry import register_backbone

NONE = -100  # where there is no label


@register_backbone
class Whisper(WhisperFamily):
    """`whisper-ti`, `whisper-b`, ..., or `transformers:<repository or folder>` of this model type."""

    family = "whisper"
    task = "transcribe"
    pools = False
    gives = ()
    tiny_classes = None
    library_classes = {"whisper": ("WhisperConfig", "WhisperForConditionalGeneration")}
    configs = {source: ("whisper", fields) for source, fields in PUBLISHED.items()}
    aliases = {f"whisper-{size}": f"transformers:{source}" for size, source in SHORT.items()}
    head_parts = ()
    layout = ("model.encoder.layers.0.self_attn.q_proj",)
    encoder_path, decoder_path = "model.encoder", "model.decoder"
    elementwise = ("activation_fn",)
    tiny = (
        "whisper-b",
        {
            "d_model": 48,
            **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 96))},
            **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 3),
            "max_source_positions": 20,
            "max_target_positions": 16,
            "num_mel_bins": 16,
            "vocab_size": 60,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 1,
            "decoder_start_token_id": 2,
        },
    )

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, name)
        self._tokenizer: Any = None

    # -- names ------------------------------------------------------------------------------------------------------

    @classmethod
    def accepts(cls, name: str) -> bool | str:
        """True for `transformers:<repository or folder>` of this type, unless it was saved with a classifier."""
        found = super().accepts(name)
        source = name.removeprefix("transformers:")
        if found is not True or source in cls.configs:
            return found
        config = pretrained_config(source)
        return not isinstance(config, dict) or "WhisperForAudioClassification" not in (
            config.get("architectures") or ()
        )

    @classmethod
    def spare(cls, module: nn.Module) -> tuple[str, ...]:
        """The output is the table of words: a file may hold it twice."""
        return (r"^proj_out\.weight$",)

    # -- parts ------------------------------------------------------------------------------------------------------

    @property
    def decoder(self) -> Any:
        """The library's decoder."""
        return self.module.get_submodule(self.decoder_path)

    @property
    def feature_dim(self) -> int:
        """V, the size of the vocabulary."""
        return int(self.config.vocab_size)

    def points(self) -> list[Point]:
        """Those of the encoder, then of the decoder."""
        found = self.encoder_points("encoder.", "encoder")
        for i, block in enumerate(self.decoder.layers):
            found += self.points_of_block(
                block,
                f"decoder.blocks.{i}",
                f"{self.decoder_path}.layers.{i}",
                self.config.d_model,
                self.config.decoder_attention_heads,
                block=i,
                tower="decoder",
                table=DECODER,
                attention={"head_dim": block.self_attn.head_dim, "causal": True},
            )
        for point in found:
            if point.kind == "attention" and point.role == "cross":
                point.causal = False  # type: ignore[attr-defined]
        return found + self.norm_at("decoder.norm", f"{self.decoder_path}.layer_norm", tower="decoder")

    def take_head(self) -> nn.Module | None:
        """It has none."""
        return None

    def head_path(self) -> str | None:
        """It has none."""
        return None

    # -- running ----------------------------------------------------------------------------------------------------

    def features(
        self, features: Tensor, decoder_input_ids: Tensor | None = None, *, labels: Tensor | None = None
    ) -> Tensor:
        """Scores (B, T, V) of the word behind each of `decoder_input_ids`, or at each of `labels` (-100: none there).

        Raises:
            ConfigError: neither words nor labels, or both. DataError: features of another size.
        """
        return self._run(self.module, features, decoder_input_ids, labels)

    def run(self, module: nn.Module, *inputs: Any) -> Tensor:
        """As `features`, of a plain module."""
        return self._run(module, *inputs)

    def _run(self, module: Any, features: Tensor, words: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        self.check_features(features)
        if (words is None) == (labels is None):
            raise ConfigError(
                "Give either decoder_input_ids, the words shifted to the right (model.family.shift(labels)), or labels=..., "
                "which are shifted here; a text is written by audio.tasks.transcribe."
            )
        given = self.shift(labels) if words is None and labels is not None else words
        # A cache would be filled twice by blocks that are run again for their gradients
        return module(features, decoder_input_ids=given, use_cache=False).logits  # type: ignore[no-any-return]

    def shift(self, labels: Tensor) -> Tensor:
        """Labels (B, T), -100 where there is none -> decoder input (B, T): the start word, then all but the last."""
        moved = labels.roll(1, dims=-1)
        moved[..., 0] = self.config.decoder_start_token_id
        return moved.masked_fill(moved == NONE, self.config.pad_token_id)

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Mean over all labels of -log p, as the library's `loss`: scores (B, T, V) of `model(..., labels=labels)`."""
        return nn.functional.cross_entropy(scores.float().flatten(0, 1), labels.flatten(), ignore_index=NONE)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the weights; another one can be set.

        Raises:
            ConfigError: it cannot be had.
        """
        if self._tokenizer is None:
            try:
                made: Any = library("transformers", self.extra).AutoTokenizer
                with reaching():
                    self._tokenizer = made.from_pretrained(self.source, trust_remote_code=False)
            except Exception as error:  # a class of its own for each way in which network and files can fail
                raise ConfigError(
                    f"The tokenizer of '{self.name}' could not be loaded: {type(error).__name__}: "
                    f"{str(error).splitlines()[0][:250]}. Check the network, or set model.family.tokenizer."
                ) from error
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        self._tokenizer = value

    # -- data -------------------------------------------------------------------------------------------------------

    def preprocess(self, train: bool, **options: Any) -> Callable[[Any], Tensor]:
        """Sound -> (num_mel_bins, frames), from its beginning in training, too: all that is said belongs to the text."""
        return super().preprocess(train, **{"augment": "none", **options})

    def hub_task(self, num_classes: int) -> str | None:
        """The Hub's word for it."""
        return "automatic-speech-recognition"

    def usage(self, num_classes: int) -> tuple[list[str], list[str]]:
        """As `Backbone.usage`: what is said in a file."""
        return (
            ["from audio.tasks.transcribe import Transcribe"],
            ['texts = Transcribe().transcribe(model, ["sound.wav"])'],
        )

    def tiny_batch(self) -> tuple[Tensor, ...]:
        """Two random spectrograms, and the beginning of a text for each."""
        return self.example_features(2), torch.randint(3, self.feature_dim, (2, 4))

    def example_batch(self, size: int = 2, classify: bool = False) -> tuple[Tensor, ...]:
        """Random log-mel features, and texts of ten tokens."""
        return self.example_features(size), torch.randint(3, self.feature_dim, (size, 10))
