"""What the two families of Whisper share: rows of its blocks, attention with more keys, places, preprocessing.

    encoder: u = x + Attn(LN x), y = u + W_2 f(W_1 LN u);   decoder: the same with a cross-attention between the two

Keys have no bias. The library multiplies queries by 1 / sqrt(c) in front of the product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from audio.families.parts.transformers_family import OPTIONS as AUDIO_OPTIONS
from audio.families.parts.transformers_family import Fields, TransformersAudio
from zoo.engine.attention import SplitKeys, by_head
from zoo.errors import DataError
from zoo.families.cached_keys import keys_values, pair_bias
from zoo.families.split_attention import SplitAttention
from zoo.points import Layout, Point
from zoo.points.rows import Row

if TYPE_CHECKING:
    from zoo.points.recorder import Recorder


def _attention(name: str, norm: str, path: str) -> tuple[Row, ...]:
    """Rows of one attention behind its norm."""
    return (
        Row("norm", "norm", norm, f"{path}_layer_norm"),
        Row("linear", "q", f"{name}.q", f"{path}.q_proj"),
        Row("linear", "k", f"{name}.k", f"{path}.k_proj"),
        Row("linear", "v", f"{name}.v", f"{path}.v_proj"),
        Row("attention", name, f"{name}.product", path),
        Row("linear", "o", f"{name}.o", f"{path}.out_proj"),
        Row("sublayer", name, name, path, entry=f"{path}_layer_norm", exit=f"{path}:output"),
    )


_MLP = (
    Row("norm", "norm", "norm2", "final_layer_norm"),
    Row("linear", "up", "mlp.up", "fc1"),
    Row("linear", "down", "mlp.down", "fc2"),
    # The MLP is no module of its own: its two projections stand in the block
    Row("sublayer", "mlp", "mlp", "", entry="final_layer_norm", exit="fc2:output"),
    Row("block", "block", "", ""),
)
ENCODER = (Row("tokens", "tokens", "tokens", ""), *_attention("attn", "norm1", "self_attn"), *_MLP)
DECODER = (*_attention("attn", "norm1", "self_attn"), *_attention("cross", "norm_cross", "encoder_attn"), *_MLP)


def _sizes(layers: int, width: int, heads: int, **more: Any) -> Fields:
    both = ("encoder", "decoder")
    return {
        "d_model": width,
        **{f"{side}_layers": layers for side in both},
        **{f"{side}_attention_heads": heads for side in both},
        **{f"{side}_ffn_dim": 4 * width for side in both},
        **more,
    }


# Fields in which the published checkpoints differ from the library's defaults
PUBLISHED: dict[str, Fields] = {
    "openai/whisper-tiny": _sizes(4, 384, 6),
    "openai/whisper-base": _sizes(6, 512, 8),
    "openai/whisper-small": _sizes(12, 768, 12),
    "openai/whisper-medium": _sizes(24, 1024, 16),
    "openai/whisper-large-v2": _sizes(32, 1280, 20),
    "openai/whisper-large-v3": _sizes(32, 1280, 20, num_mel_bins=128, vocab_size=51866),
    "openai/whisper-large-v3-turbo": _sizes(32, 1280, 20, num_mel_bins=128, vocab_size=51866, decoder_layers=4),
}
SHORT = {
    "ti": "openai/whisper-tiny",
    "b": "openai/whisper-base",
    "s": "openai/whisper-small",
    "m": "openai/whisper-medium",
    "l": "openai/whisper-large-v3",
}
OPTIONS: dict[str, Any] = {
    **AUDIO_OPTIONS,
    **dict.fromkeys(("d_model", "max_source_positions", "max_target_positions"), range(1, 65537)),
    **dict.fromkeys((f"{side}_layers" for side in ("encoder", "decoder")), range(1, 257)),
    **dict.fromkeys((f"{side}_attention_heads" for side in ("encoder", "decoder")), range(1, 257)),
    **dict.fromkeys((f"{side}_ffn_dim" for side in ("encoder", "decoder")), range(1, 65537)),
    "vocab_size": range(1, 1_000_001),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), range(1_000_001)),
    **dict.fromkeys(("dropout", "encoder_layerdrop", "decoder_layerdrop", "init_std"), float),
    "activation_function": ("gelu", "gelu_new", "relu", "silu"),
}


@dataclass(eq=False)
class WhisperSite(SplitAttention):
    """Whisper's attention: self-attention of the encoder, causal self-attention, cross-attention."""

    @property
    def scale(self) -> float:
        """Queries are multiplied in front of the product."""
        return 1.0

    def extended(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """(output (B, M, d), no weights)."""
        attention: Any = self.module
        held = past_key_values if cache is None else cache
        width, cross = attention.head_dim, key_value_states is not None
        q = by_head(attention.q_proj(hidden_states) * attention.scaling, width)
        project = SplitKeys(None, attention.k_proj, attention.v_proj, width)
        states = hidden_states if key_value_states is None else key_value_states
        k, v = keys_values(states, held, attention.layer_idx, cross, project)
        bias = pair_bias(attention_mask, None, attention.is_causal and not cross, q, k.shape[2])
        y = self.attend(q, k, v, q.shape[0], bias).transpose(1, 2).flatten(2)
        return attention.out_proj(y), None


class WhisperFamily(TransformersAudio):
    """Base of Whisper's families."""

    saved_options = OPTIONS
    encoder_path = "encoder"

    @property
    def encoder(self) -> Any:
        """The library's encoder."""
        return self.module.get_submodule(self.encoder_path)

    @property
    def frames(self) -> int:
        """Of the log-mel features: two for each token."""
        return 2 * int(self.config.max_source_positions)

    def encoder_points(self, prefix: str = "", tower: str = "") -> list[Point]:
        """Points of the two convolutions, of every block of the encoder, and of its norm."""
        path, config = self.encoder_path, self.config
        found: list[Point] = []
        for name in ("conv1", "conv2"):
            found += self.linear_at(f"{prefix}patch_embed.{name}", "patch", f"{path}.{name}", tower=tower)
        for i, block in enumerate(self.encoder.layers):
            found += self.points_of_block(
                block,
                f"{prefix}blocks.{i}",
                f"{path}.layers.{i}",
                config.d_model,
                config.encoder_attention_heads,
                block=i,
                tower=tower,
                table=ENCODER,
                layout=Layout(0, (int(config.max_source_positions),)),
                attention={"head_dim": block.self_attn.head_dim},
                tokens={"first": i == 0, "accumulates": True},
            )
        return found + self.norm_at(f"{prefix}norm", f"{path}.layer_norm", tower=tower)

    def record(self, session: Recorder, point: Point, verb: str, module: nn.Module, **options: Any) -> None:
        """Verbs of attention and tokens points: more keys, and prompts of the encoder."""
        from zoo.families.split_attention import record

        attention = point.module if point.kind == "attention" else point.module.self_attn
        pooled, blocks = options.get("pooled", False), list(self.encoder.layers)
        if pooled and point.module is blocks[-1]:
            options["keep"] = True
        record(
            session,
            point,
            verb,
            module,
            block=point.module,
            attention=attention,
            norm=getattr(point.module, "self_attn_layer_norm", None),
            leave=None if pooled else (self.encoder.layer_norm, "input"),
            options=options,
            kind=WhisperSite,
            blocks=blocks,
        )

    def fold_shift(self, module: nn.Module, point: Point, shift: Tensor) -> bool:
        """Keys have no bias, and a shift of all of them changes no attention."""
        return point.role == "k"

    def check_features(self, features: Tensor) -> None:
        """Raise DataError unless these are log-mel features of the network's size."""
        wanted = (int(self.config.num_mel_bins), self.frames)
        if features.ndim != 3 or tuple(features.shape[1:]) != wanted:
            raise DataError(
                f"log-mel features of shape {tuple(features.shape)}; expected (B, {wanted[0]}, {wanted[1]}). model.preprocess() "
                "makes them out of a waveform."
            )

    def data_config(self) -> dict[str, Any]:
        """`sampling_rate` (Hz), `num_mel_bins`, and `frames` of the log-mel features, of 10 ms each."""
        return {"sampling_rate": 16_000, "num_mel_bins": int(self.config.num_mel_bins), "frames": self.frames}

    def preprocess(self, train: bool, **options: Any) -> Callable[[Any], Tensor]:
        """`audio.data.whisper_features.WhisperTransform`: sound -> (num_mel_bins, frames)."""
        from audio.data.whisper_features import WhisperTransform

        return WhisperTransform(self.data_config(), train, **options)

    def example_features(self, size: int) -> Tensor:
        """Random log-mel features."""
        return torch.randn(size, int(self.config.num_mel_bins), self.frames)

    def licence(self) -> str | None:
        """Licence of the weights; None for random ones, or where none is known."""
        if not self.pretrained or not self.source.startswith("openai/"):
            return None
        return "mit" if "turbo" in self.source else "apache-2.0"
