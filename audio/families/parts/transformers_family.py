"""What the audio families on transformers share: tasks on the Hub, data, what a card says."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import nn

from zoo.backbone import told
from zoo.families.transformers_family import COMMON, Fields, TransformersBackbone

if TYPE_CHECKING:
    from zoo.data import ImageDataset
    from zoo.data.medium import Medium

__all__ = ["OPTIONS", "Fields", "TransformersAudio"]

_SIZES = (
    *("frequency_stride", "time_stride", "max_length", "num_mel_bins"),
    *("conv_dim", "conv_stride", "conv_kernel", "num_conv_pos_embeddings", "num_conv_pos_embedding_groups"),
    *("classifier_proj_size", "mask_time_length", "mask_feature_length", "num_feat_extract_layers"),
)
_NUMBERS = (
    *("hidden_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout", "layerdrop"),
    *("mask_time_prob", "mask_feature_prob", "seconds"),
)
OPTIONS: dict[str, Any] = {
    **COMMON,
    **dict.fromkeys(_SIZES, range(1, 65537)),
    **dict.fromkeys(_NUMBERS, float),
    **dict.fromkeys(("qkv_bias", "conv_bias", "do_stable_layer_norm", "apply_spec_augment"), bool),
    "feat_extract_norm": ("group", "layer"),
}


class TransformersAudio(TransformersBackbone):
    """A `...Classification` model of transformers; `transformers:<repository or folder>` is any of the family's types."""

    modality, noun = "audio", "sounds"
    extra = "audio"
    saved_options = OPTIONS

    @classmethod
    def spare(cls, module: nn.Module) -> tuple[str, ...]:
        """What other tasks have besides the body (a vocabulary, a quantiser) is of no use here; parts of the body are."""
        return (f"^(?!{re.escape(str(module.base_model_prefix))}\\.)",)

    def hub_task(self, num_classes: int) -> str | None:
        """Sounds have one task on the Hub; features have none."""
        return "audio-classification" if num_classes else None

    def usage(self, num_classes: int) -> tuple[list[str], list[str]]:
        """As `Backbone.usage`, from a file of sound."""
        lines = ['sound = model.preprocess()(soundfile.read("sound.wav"))', told("sound", self, num_classes)]
        return ["import soundfile"], lines

    @classmethod
    def open_dataset(cls, data: Any, split: str | None = None, **options: Any) -> ImageDataset:
        """Sounds with labels, `audio.data.sounds.open_audio`."""
        from audio.data.sounds import open_audio

        return open_audio(data, split=split, **options)

    @classmethod
    def medium(cls) -> Medium:
        """Files of sound."""
        from audio.data.sounds import SOUNDS

        return SOUNDS
