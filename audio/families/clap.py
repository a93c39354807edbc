"""CLAP's tower of sounds, as transformers builds it (`ClapAudioModelWithProjection`): HTSAT, a Swin of spectrograms.

Log-mel features (B, 1, T, mel) of 10 s are folded into a square map, cut into patches of 4 x 4, and go through stages of growing
width whose blocks see windows of 8 x 8 patches, every second one turned round:

    u = x + W_o Attn(LN1 x),  y = u + W_2 f(W_1 LN2 u)          tokens (B, H H, d); between stages 4 d -> 2 d

Pooled is the mean behind the final norm, in the space that it shares with texts (`audio_projection`). Networks with feature
fusion take (B, 4, T, mel), and hear one part of a long sound here. The text tower is left out; the library has no classifier.

Source: Wu et al., "Large-Scale Contrastive Language-Audio Pretraining", ICASSP 2023 (LAION-AI/CLAP). Count: 28,190,872,
with fusion 28,205,512.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from audio.families.parts.transformers_family import OPTIONS, Fields, TransformersAudio
from zoo.errors import DataError
from zoo.families.names import check_names
from zoo.points import Layout, Point
from zoo.points.rows import Row
from zoo.registry import register_backbone

FUSED: Fields = {"enable_fusion": True, "fusion_type": "aff_2d"}
BODY = "audio_model.audio_encoder"


@register_backbone
class CLAP(TransformersAudio):
    """`clap-htsat`, `clap-htsat-fused`, or `transformers:<repository or folder>` of these types."""

    family = "clap"
    gives = ("pooled",)
    library_classes = {
        "clap": ("ClapAudioConfig", "ClapAudioModelWithProjection"),
        "clap_audio_model": ("ClapAudioConfig", "ClapAudioModelWithProjection"),
    }
    nested = {"clap": "audio_config"}
    configs = {
        "laion/clap-htsat-unfused": ("clap", {}),
        "laion/clap-htsat-fused": ("clap", FUSED),
    }
    aliases = {
        "clap-htsat": "transformers:laion/clap-htsat-unfused",
        "clap-htsat-fused": "transformers:laion/clap-htsat-fused",
    }
    saved_options = {
        **OPTIONS,
        **dict.fromkeys(("window_size", "spec_size", "patch_embeds_hidden_size", "projection_dim"), range(1, 65537)),
        "depths": range(1, 257),
        "patch_stride": range(1, 513),
        "enable_fusion": bool,
        "fusion_type": ("aff_2d",),
        **dict.fromkeys(("mlp_ratio", "drop_path_rate"), float),
    }
    head_parts = ()
    layout = (f"{BODY}.layers.0.blocks.0.attention.self.query",)
    unread = ("*.fusion_model.*", "*.mel_conv2d.*")  # for parts of long sounds, which are not given
    block_table = (
        Row("tokens", "tokens", "tokens", ""),
        Row("norm", "norm", "norm1", "layernorm_before"),
        Row("linear", "q", "attn.q", "attention.self.query"),
        Row("linear", "k", "attn.k", "attention.self.key"),
        Row("linear", "v", "attn.v", "attention.self.value"),
        Row("attention", "attn", "attn.product", "attention.self"),
        Row("linear", "o", "attn.o", "attention.output.dense"),
        Row("sublayer", "attn", "attn", "attention", entry="layernorm_before", exit="attention:output"),
        Row("norm", "norm", "norm2", "layernorm_after"),
        Row("linear", "up", "mlp.up", "intermediate.dense"),
        Row("linear", "down", "mlp.down", "output.dense"),
        # The MLP is no module of its own: its two halves stand in the block
        Row("sublayer", "mlp", "mlp", "", entry="layernorm_after", exit="output:output"),
        Row("block", "block", "", ""),
    )
    elementwise = ("intermediate.intermediate_act_fn",)
    tiny_classes = None
    tiny = (
        "clap-htsat",
        {
            "spec_size": 32,
            "num_mel_bins": 16,
            "window_size": 4,
            "patch_embeds_hidden_size": 24,
            "depths": [2, 2],
            "num_attention_heads": [2, 4],
            "hidden_size": 48,
            "projection_dim": 20,
        },
    )

    @classmethod
    def build(cls, name: str, *, pretrained: bool, **kwargs: Any) -> nn.Module:
        """The library's module with attentions whose input and output are whole maps."""
        from audio.families.parts.clap_attention import opened

        return opened(super().build(name, pretrained=pretrained, **kwargs))

    @classmethod
    def spare(cls, module: nn.Module) -> tuple[str, ...]:
        """The text tower."""
        return (r"^text_", r"^logit_scale", r"relative_position_index$")

    def restore(self, module: nn.Module) -> nn.Module:
        """The library's own attentions again."""
        from audio.families.parts.clap_attention import closed

        return closed(module)

    def packs(self, module: nn.Module) -> bool:
        """The library's attentions give a tuple."""
        return hasattr(module, "self")

    @property
    def body(self) -> Any:
        """The library's encoder."""
        return self.module.get_submodule(BODY)

    @property
    def feature_dim(self) -> int:
        """Width of the pooled features."""
        return int(self.config.projection_dim)

    # -- points -----------------------------------------------------------------------------------------------------

    def points(self) -> list[Point]:
        """The norm of mel bands, the patch embedding, every stage with the merging behind it, final norm and projection."""
        found = self.norm_at("bands.norm", f"{BODY}.batch_norm", first=True)
        found += self.linear_at("patch_embed", "patch", f"{BODY}.patch_embed.proj")
        found += self.norm_at("patch_embed.norm", f"{BODY}.patch_embed.norm")
        for s, stage in enumerate(self.body.layers):
            for i, block in enumerate(stage.blocks):
                attention = block.attention
                inner = attention.self
                found += self.points_of_block(
                    block,
                    f"stages.{s}.blocks.{i}",
                    f"{BODY}.layers.{s}.blocks.{i}",
                    inner.all_head_size,
                    inner.num_attention_heads,
                    block=i,
                    stage=s,
                    layout=Layout(0, (attention.side,) * 2, (attention.window,) * 2, (attention.shift,) * 2),
                    attention={"head_dim": inner.attention_head_size, "window": attention.window**2},
                    tokens={"first": s == 0 and i == 0},
                )
            merge = f"{BODY}.layers.{s}.downsample"
            found += self.norm_at(f"stages.{s}.merge.norm", f"{merge}.norm", stage=s)
            found += self.linear_at(f"stages.{s}.merge", "merge", f"{merge}.reduction", stage=s)
        found += self.norm_at("norm", f"{BODY}.norm")
        for name in ("linear1", "linear2"):
            found += self.linear_at(f"proj.{name}", "proj", f"audio_projection.{name}")
        return found

    def record(self, session: Any, point: Point, verb: str, module: nn.Module, **options: Any) -> None:
        """Verbs of attention and tokens points: more keys, and prompts of one block each."""
        from audio.families.parts.clap_attention import record

        block = self.body.layers[point.stage].blocks[point.block]
        record(session, point, verb, module, block, **options)

    def fold_shift(self, module: nn.Module, point: Point, shift: Tensor) -> bool:
        """None: every projection but that of the merging has a bias."""
        return False

    # -- running ----------------------------------------------------------------------------------------------------

    @property
    def frames(self) -> int:
        """Of the log-mel features: 10 s in steps of 10 ms, or as many as the map has room for."""
        config = self.config
        return min(1001, int(config.spec_size) * (int(config.spec_size) // int(config.num_mel_bins)))

    def features(self, *inputs: Tensor, **kwargs: Any) -> Tensor:
        """Log-mel features (B, 1 or 4, T, mel) -> (B, d), in the space of texts.

        Raises:
            DataError: features of another size.
        """
        check_names(self.name, None, kwargs)
        return self.run(self.module, *inputs)

    def run(self, module: Any, *inputs: Tensor) -> Tensor:
        """As `features`, of a plain module."""
        (features,) = inputs
        config = self.config
        wanted = (4 if config.enable_fusion else 1, self.frames, int(config.num_mel_bins))
        if features.ndim != 4 or tuple(features.shape[1:]) != wanted:
            raise DataError(
                f"log-mel features of shape {tuple(features.shape)}; expected (B, {', '.join(map(str, wanted))}). "
                "model.preprocess() makes them out of a waveform."
            )
        longer = torch.zeros(len(features), 1, dtype=torch.bool, device=features.device)
        return module(features, is_longer=longer).audio_embeds  # type: ignore[no-any-return]

    # -- data -------------------------------------------------------------------------------------------------------

    def data_config(self) -> dict[str, Any]:
        """`sampling_rate` (Hz), `num_mel_bins`, `frames`, and whether the network has feature fusion."""
        config = self.config
        found = {"sampling_rate": 48_000, "num_mel_bins": int(config.num_mel_bins), "frames": self.frames}
        return {**found, "fused": bool(config.enable_fusion)}

    def preprocess(self, train: bool, **options: Any) -> Callable[[Any], Tensor]:
        """`audio.data.clap_features.ClapTransform`: sound -> (1 or 4, frames, num_mel_bins)."""
        from audio.data.clap_features import ClapTransform

        return ClapTransform(self.data_config(), train, **options)

    def tiny_batch(self) -> tuple[Tensor, ...]:
        """Two random spectrograms."""
        config = self.config
        return (torch.randn(2, 4 if config.enable_fusion else 1, self.frames, int(config.num_mel_bins)),)

    def licence(self) -> str | None:
        """Licence of the weights; None for random ones, or where none is known."""
        return "apache-2.0" if self.pretrained and self.source.startswith("laion/") else None
