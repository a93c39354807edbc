"""wav2vec 2.0, HuBERT and data2vec-audio, as transformers builds them (`Wav2Vec2ForSequenceClassification` and so on).

A waveform (B, n) at 16 kHz goes through seven convolutions (one step of 20 ms each) and a projection; a wide convolution over the
steps is added for their positions; then come transformer blocks on tokens (B, N, d) without any class token. The mean over
the steps is the pooled feature. Base models are post-norm, `u = LN(x + A(x))`, `y = LN(u + M(u))`, behind one norm of the
positions; large ones (`do_stable_layer_norm`) are pre-norm with a final norm.

The library's classifier is a projection d -> 256 of every step, their mean, and a linear map. Linear maps and means commute, so
the head here has the same parameters and works on the mean of the steps; it agrees with the library's to rounding.

`seconds` (of `zoo.load`, by default 5) says how much of a sound the preprocessing hands over: a longer one is cut, a
shorter one filled up with silence. The model itself takes any length.

The convolutions have norms, too: a group norm behind the first one (base models), or a layer norm behind each.

Sources: Baevski et al., "wav2vec 2.0", NeurIPS 2020; Hsu et al., "HuBERT", IEEE/ACM TASLP 2021; Baevski et al., "data2vec", ICML
2022 (facebookresearch/fairseq).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from audio.families.parts.projected import Projected
from audio.families.parts.transformers_family import Fields, TransformersAudio
from zoo.errors import AttachError, ConfigError, DataError
from zoo.families.names import check_names
from zoo.points import Layout, Point
from zoo.points.rows import Row
from zoo.registry import register_backbone

if TYPE_CHECKING:
    from zoo.points.recorder import Recorder

SHORTEST = 400  # samples that the convolutions need
WIDE: Fields = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
LARGE: Fields = {
    **WIDE,
    "do_stable_layer_norm": True,
    "feat_extract_norm": "layer",
    "conv_bias": True,
}


def _table(stable: bool) -> tuple[Row, ...]:
    """Rows of a block; the norms stand in front of the branches, or behind the sums."""
    norms = (
        Row("norm", "norm", "norm1", "layer_norm"),
        Row("norm", "norm", "norm2", "final_layer_norm"),
    )
    before = {"attn": "layer_norm", "mlp": "final_layer_norm"} if stable else {"attn": "", "mlp": ""}
    attention = (
        Row("linear", "q", "attn.q", "attention.q_proj"),
        Row("linear", "k", "attn.k", "attention.k_proj"),
        Row("linear", "v", "attn.v", "attention.v_proj"),
        Row("attention", "attn", "attn.product", "attention"),
        Row("linear", "o", "attn.o", "attention.out_proj"),
        Row(
            "sublayer",
            "attn",
            "attn",
            "attention",
            entry="attention:input",
            exit="attention:output",
            stream=before["attn"],
        ),
    )
    mlp = (
        Row("linear", "up", "mlp.up", "feed_forward.intermediate_dense"),
        Row("linear", "down", "mlp.down", "feed_forward.output_dense"),
        Row(
            "sublayer",
            "mlp",
            "mlp",
            "feed_forward",
            entry="feed_forward:input",
            exit="feed_forward:output",
            stream=before["mlp"],
        ),
    )
    ordered = (norms[0], *attention, norms[1], *mlp) if stable else (*attention, norms[0], *mlp, norms[1])
    return (Row("tokens", "tokens", "tokens", ""), *ordered, Row("block", "block", "", ""))


@register_backbone
class Wav2Vec2(Projected, TransformersAudio):
    """`wav2vec2-b`, `hubert-b`, `data2vec-audio-b`, larger ones, or `transformers:<repository or folder>` of these types."""

    family = "wav2vec2"
    library_classes = {
        "wav2vec2": ("Wav2Vec2Config", "Wav2Vec2ForSequenceClassification"),
        "hubert": ("HubertConfig", "HubertForSequenceClassification"),
        "data2vec-audio": ("Data2VecAudioConfig", "Data2VecAudioForSequenceClassification"),
    }
    configs = {
        "facebook/wav2vec2-base": ("wav2vec2", {}),
        "facebook/wav2vec2-large-lv60": ("wav2vec2", LARGE),
        "facebook/wav2vec2-large-xlsr-53": ("wav2vec2", LARGE),
        "facebook/hubert-base-ls960": ("hubert", {}),
        "facebook/hubert-large-ll60k": ("hubert", LARGE),
        "facebook/data2vec-audio-base": ("data2vec-audio", {}),
        "facebook/data2vec-audio-large": ("data2vec-audio", WIDE),
    }
    head_parts = ("projector", "classifier")
    aliases = {
        "wav2vec2-b": "transformers:facebook/wav2vec2-base",
        "wav2vec2-l": "transformers:facebook/wav2vec2-large-lv60",
        "wav2vec2-xlsr53": "transformers:facebook/wav2vec2-large-xlsr-53",
        "hubert-b": "transformers:facebook/hubert-base-ls960",
        "hubert-l": "transformers:facebook/hubert-large-ll60k",
        "data2vec-audio-b": "transformers:facebook/data2vec-audio-base",
        "data2vec-audio-l": "transformers:facebook/data2vec-audio-large",
    }
    elementwise = ("feed_forward.intermediate_act_fn",)
    plain_blocks = True
    tiny = (
        "wav2vec2-b",
        {
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "intermediate_size": 96,
            "conv_dim": [16] * 7,
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 4,
            "classifier_proj_size": 24,
            "mask_time_prob": 0.0,
            "layerdrop": 0.0,
        },
    )
    seconds = 5.0

    @classmethod
    def half(cls, block: Any, role: str, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Norms stand in front of the branches, or behind the sums: `LN(x + attention(x))`, `LN(x + MLP(x))`."""
        stable = "StableLayerNorm" in type(block).__name__
        if role == "attn":
            attended = block.attention(block.layer_norm(x) if stable else x, attention_mask=attention_mask, **kwargs)
            x = x + block.dropout(attended[0])
            return x if stable else block.layer_norm(x)
        if not stable:
            return block.final_layer_norm(x + block.feed_forward(x))
        x = x + block.feed_forward(block.final_layer_norm(x))
        own = getattr(block, "adapter_layer", None)
        return x if own is None else x + own(x)

    # -- building ---------------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, name: str, *, pretrained: bool, **kwargs: Any) -> nn.Module:
        """The library's module; `kwargs` are fields of its configuration, `attn_implementation` and `seconds`.

        Raises:
            ConfigError: an unknown field, or weights that cannot be had.
        """
        return super().build(name, pretrained=pretrained, **{k: v for k, v in kwargs.items() if k != "seconds"})

    def configure(self, **options: Any) -> None:
        """`seconds` of a sound that the preprocessing hands over."""
        seconds = options.get("seconds")
        if seconds is None:
            return
        if not isinstance(seconds, (int, float)) or seconds * 16_000 < SHORTEST:
            raise ConfigError(f"seconds is {seconds!r}; expected a number from {SHORTEST / 16_000}.")
        self.seconds = float(seconds)

    # -- what the model asks ----------------------------------------------------------------------------------------

    @property
    def body_path(self) -> str:
        """Where the network without its classifier is."""
        return str(self.module.base_model_prefix)

    @property
    def body(self) -> Any:
        """The `Wav2Vec2Model` or `HubertModel`."""
        return self.module.get_submodule(self.body_path)

    @property
    def attention_site(self) -> Any:
        """The site of an attention whose keys are extended."""
        from zoo.families.split_attention import SplitAttention

        return SplitAttention

    def masked(self, block: Any) -> tuple[nn.Module, ...]:
        """Attentions whose bias must grow with prompts that come in at a block."""
        return ()

    @property
    def stable(self) -> bool:
        """Whether blocks are pre-norm."""
        return bool(getattr(self.body.config, "do_stable_layer_norm", False))

    def points(self) -> list[Point]:
        """Points of the convolutions' norms, of the projection behind them, of every block, and of the norm around the blocks."""
        body, path, dim = self.body, self.body_path, self.feature_dim
        found: list[Point] = []
        for i in range(len(body.feature_extractor.conv_layers)):
            found += self.norm_at(f"patch_embed.conv.{i}.norm", f"{path}.feature_extractor.conv_layers.{i}.layer_norm")
        found += self.norm_at("patch_embed.norm", f"{path}.feature_projection.layer_norm")
        found += self.linear_at("patch_embed", "patch", f"{path}.feature_projection.projection")
        around = self.norm_at("norm" if self.stable else "norm_pre", f"{path}.encoder.layer_norm")
        found += [] if self.stable else around
        table = _table(self.stable)
        for i, layer in enumerate(body.encoder.layers):
            found += self.points_of_block(
                layer,
                f"blocks.{i}",
                f"{path}.encoder.layers.{i}",
                dim,
                layer.attention.num_heads,
                block=i,
                layout=Layout(),
                table=table,
                attention={"head_dim": layer.attention.head_dim},
                tokens={"num_prefix": 0, "first": i == 0},
            )
        return [*found, *around] if self.stable else found

    def features(self, *inputs: Tensor, **kwargs: Any) -> Tensor:
        """Waveforms (B, n), n >= 400 -> (B, d), the mean over the steps.

        Raises:
            DataError: no waveforms, or too short ones.
        """
        (waves,) = inputs
        if waves.ndim != 2 or waves.shape[1] < SHORTEST:
            raise DataError(
                f"waveforms of shape {tuple(waves.shape)}; expected (B, samples), at least {SHORTEST} samples at 16 kHz."
            )
        check_names(self.name, self.module, kwargs)
        # its projector and classifier were taken off, so the library's own pooling comes out
        return self.module(waves, **kwargs).logits  # type: ignore[no-any-return]

    @property
    def feature_dim(self) -> int:
        """Width of the pooled features."""
        return int(self.body.config.hidden_size)

    def record(self, session: Recorder, point: Point, verb: str, module: nn.Module, **options: Any) -> None:
        """Verbs of attention and tokens points: more keys, and prompts."""
        from zoo.families.split_attention import record

        path = point.path if point.kind == "tokens" else point.path.rpartition(".")[0]
        block: Any = self.module.get_submodule(path)
        encoder = self.body.encoder
        last = encoder.layers[-1]
        pooled = options.get("pooled", False)
        if pooled and block is last:
            options["keep"] = True
        if options.get("keep") and self.body.config.use_weighted_layer_sum:
            raise AttachError(
                f"prompts that flow from '{point.name}' are not available with use_weighted_layer_sum: what is pooled is a sum "
                "over all blocks, and they would be in some of its terms only."
            )
        leave = (encoder.layer_norm, "input") if self.stable else (last, "output")
        record(
            session,
            point,
            verb,
            module,
            block=block,
            attention=block.attention,
            norm=block.layer_norm if self.stable else None,
            leave=None if pooled else leave,
            options=options,
            kind=self.attention_site,
            masked=self.masked(block),
        )

    # -- data -------------------------------------------------------------------------------------------------------

    def data_config(self) -> dict[str, Any]:
        """`sampling_rate` (Hz), `samples` that are handed over, and whether a sound is brought to mean 0 and variance 1."""
        normalize = bool(self.preprocessor().get("do_normalize", True))
        return {"sampling_rate": 16_000, "samples": round(self.seconds * 16_000), "normalize": normalize}

    def preprocess(self, train: bool, **options: Any) -> Callable[[Any], Tensor]:
        """`audio.data.features.WaveTransform`: sound -> (samples,)."""
        from audio.data.features import WaveTransform

        return WaveTransform(self.data_config(), train, **options)

    def licence(self) -> str | None:
        """Licence of the weights; None for random ones, or where none is known."""
        return "apache-2.0" if self.pretrained and self.source.startswith("facebook/") else None

    def tiny_batch(self) -> tuple[Tensor, ...]:
        """Two random waveforms of a tenth of a second."""
        return (torch.randn(2, 1_600),)

    def example_batch(self, size: int = 2, classify: bool = False) -> tuple[Tensor, ...]:
        """Random waveforms of the length that the preprocessing gives."""
        return (torch.randn(size, self.data_config()["samples"]),)
