"""Whisper's encoder with a classifier, as transformers builds it (`WhisperForAudioClassification`).

Log-mel features (B, mel, 2 N) of 30 s go through two convolutions to N = 1500 tokens (B, N, d) without any class token, fixed
positions, pre-norm blocks and a norm. The mean over the tokens is the pooled feature. The library's classifier is a projection
d -> 256 of every token, their mean, and a linear map; here it works on the mean, and agrees with the library's to rounding.

`whisper-encoder-b` and so on take the encoder out of a network of transcription; so does
`whisper-encoder:<repository or folder>`.

Source: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision", ICML 2023. Count without classifier:
Whisper-base 20,590,592.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from audio.families.parts.projected import Projected
from audio.families.parts.whisper_parts import PUBLISHED, SHORT, WhisperFamily
from zoo.errors import AttachError
from zoo.families.names import check_names
from zoo.library import pretrained_config
from zoo.points import Point
from zoo.registry import register_backbone


@register_backbone
class WhisperEncoder(Projected, WhisperFamily):
    """`whisper-encoder-b` and others, `whisper-encoder:<repository or folder>`, or `transformers:` of one with a classifier."""

    family = "whisper-encoder"
    gives = ("pooled", "tokens")
    library_classes = {"whisper": ("WhisperConfig", "WhisperForAudioClassification")}
    configs = {source: ("whisper", fields) for source, fields in PUBLISHED.items()}
    head_parts = ("projector", "classifier")
    layout = ("encoder.layers.0.self_attn.q_proj",)
    aliases = {f"whisper-encoder-{size}": f"whisper-encoder:{source}" for size, source in SHORT.items()}
    elementwise = ("activation_fn",)
    plain_blocks = True
    tiny = (
        "whisper-encoder-b",
        {
            "d_model": 48,
            "encoder_layers": 2,
            "encoder_attention_heads": 3,
            "encoder_ffn_dim": 96,
            "max_source_positions": 20,
            "num_mel_bins": 16,
            "classifier_proj_size": 24,
        },
    )

    # -- names ------------------------------------------------------------------------------------------------------

    @classmethod
    def accepts(cls, name: str) -> bool | str:
        """True for `whisper-encoder:<source>`, and for `transformers:<source>` that was saved with a classifier."""
        if name.startswith("whisper-encoder:"):
            return super().accepts(f"transformers:{name.removeprefix('whisper-encoder:')}")
        found = super().accepts(name) if name.startswith("transformers:") else False
        if found is not True:
            return found
        config = {} if name.removeprefix("transformers:") in cls.configs else pretrained_config(name.partition(":")[2])
        return isinstance(config, dict) and cls.library_classes["whisper"][1] in (config.get("architectures") or ())

    @classmethod
    def known(cls, name: str) -> bool:
        """Of the sources that are listed."""
        return name.removeprefix("whisper-encoder:") in cls.configs if name.startswith("whisper-encoder:") else False

    @classmethod
    def build(cls, name: str, *, pretrained: bool, **kwargs: Any) -> nn.Module:
        """The encoder with a classifier, or without one where the weights have none."""
        return super().build(name.removeprefix("whisper-encoder:"), pretrained=pretrained, **kwargs)

    @classmethod
    def spare(cls, module: nn.Module) -> tuple[str, ...]:
        """The decoder."""
        return (r"(^|\.)decoder\.", r"proj_out\.weight$")

    @property
    def source(self) -> str:
        """The repository or folder that the weights are of."""
        return super().source.removeprefix("whisper-encoder:")

    @classmethod
    def half(cls, block: Any, role: str, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """`x + attention(LN x)`, or `x + MLP(LN x)`."""

        def dropped(y: Tensor, rate: float) -> Tensor:
            return nn.functional.dropout(y, p=rate, training=block.training)

        if role == "attn":
            attended = block.self_attn(block.self_attn_layer_norm(x), attention_mask=attention_mask, **kwargs)
            return x + dropped(attended[0], block.dropout)
        hidden = dropped(block.activation_fn(block.fc1(block.final_layer_norm(x))), block.activation_dropout)
        return x + dropped(block.fc2(hidden), block.dropout)

    # -- what the model asks ----------------------------------------------------------------------------------------

    def points(self) -> list[Point]:
        """Points of the encoder."""
        return self.encoder_points()

    def record(self, session: Any, point: Point, verb: str, module: nn.Module, **options: Any) -> None:
        """As every Whisper's; prompts that flow need what is pooled to come of the last block alone."""
        if (options.get("keep") or options.get("pooled")) and self.config.use_weighted_layer_sum:
            raise AttachError(
                f"prompts that flow from '{point.name}' are not available with use_weighted_layer_sum: what is pooled is a sum "
                "over all blocks, and they would be in some of its terms only."
            )
        super().record(session, point, verb, module, **options)

    def features(self, *inputs: Tensor, **kwargs: Any) -> Tensor:
        """Log-mel features (B, mel, 2 N) -> (B, d), the mean over the tokens.

        Raises:
            DataError: features of another size.
        """
        (features,) = inputs
        self.check_features(features)
        check_names(self.name, self.module, kwargs)
        # its projector and classifier were taken off, so the library's own pooling comes out
        return self.module(features, **kwargs).logits  # type: ignore[no-any-return]

    def outputs(self, *inputs: Tensor, want: Sequence[str] = ("pooled",), **kwargs: Any) -> dict[str, Any]:
        """Tokens behind the final norm, one for every 20 ms."""
        self.check_wanted(want)
        if tuple(want) == ("pooled",):
            return {"pooled": self.features(*inputs, **kwargs)}
        (features,) = inputs
        self.check_features(features)
        check_names(self.name, self.encoder, kwargs)
        tokens = self.encoder(features, **kwargs).last_hidden_state
        everything = {"pooled": tokens.mean(1), "tokens": tokens}
        return {name: everything[name] for name in want}

    @property
    def feature_dim(self) -> int:
        """Width of the pooled features."""
        return int(self.config.d_model)

    def head_path(self) -> str | None:
        """It is two modules."""
        return None

    def tiny_batch(self) -> tuple[Tensor, ...]:
        """Two random spectrograms."""
        return (self.example_features(2),)
