"""WavLM, as transformers builds it (`WavLMForSequenceClassification`): wav2vec 2.0's network with gated relative positions.

Every block adds to its scores a bias of relative positions, which the first one makes and hands on, times a gate of each token
(`audio.families.parts.wavlm_attention`). Blocks hand on more than their tokens, so they cannot be run by hand. Prompts that flow
stand in front of the steps and have places there; those of one block, and prefixes, have none.

Source: Chen et al., "WavLM", IEEE JSTSP 2022 (microsoft/unilm). Count without classifier: WavLM-base 94,381,936.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from audio.families.wav2vec2 import LARGE, Wav2Vec2
from zoo.backbone import Backbone
from zoo.registry import register_backbone


@register_backbone
class WavLM(Wav2Vec2):
    """`wavlm-b`, `wavlm-l`, or `transformers:<repository or folder>` of this model type."""

    family = "wavlm"
    library_classes = {"wavlm": ("WavLMConfig", "WavLMForSequenceClassification")}
    configs = {
        "microsoft/wavlm-base": ("wavlm", {}),
        "microsoft/wavlm-base-plus": ("wavlm", {}),
        "microsoft/wavlm-large": ("wavlm", {k: v for k, v in LARGE.items() if k != "conv_bias"}),
    }
    aliases = {
        "wavlm-b": "transformers:microsoft/wavlm-base",
        "wavlm-b-plus": "transformers:microsoft/wavlm-base-plus",
        "wavlm-l": "transformers:microsoft/wavlm-large",
    }
    plain_blocks = False
    tiny = ("wavlm-b", Wav2Vec2.tiny[1])

    @classmethod
    def build(cls, name: str, *, pretrained: bool, **kwargs: Any) -> nn.Module:
        """The library's module with attentions whose projections are modules."""
        from audio.families.parts.wavlm_attention import opened

        return opened(super().build(name, pretrained=pretrained, **kwargs))

    @classmethod
    def half(cls, block: Any, role: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Never: a block hands on its bias of relative positions."""
        return Backbone.half(block, role, x)

    @property
    def attention_site(self) -> Any:
        """The site of an attention whose keys are extended."""
        from audio.families.parts.wavlm_attention import GatedSite

        return GatedSite

    def masked(self, block: Any) -> tuple[nn.Module, ...]:
        """Behind the first block the bias of relative positions is made already."""
        return () if block is self.body.encoder.layers[0] else (block.attention,)

    def restore(self, module: nn.Module) -> nn.Module:
        """The library's own attentions again."""
        from audio.families.parts.wavlm_attention import closed

        return closed(module)

    def licence(self) -> str | None:
        """Microsoft states none at the weights."""
        return None
