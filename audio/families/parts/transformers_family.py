"""What the audio families on transformers share: names, building, loading, licences, data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.backbone import Backbone, told
from zoo.errors import ConfigError, nearest
from zoo.library import check_loaded, library, pretrained_config

if TYPE_CHECKING:
    from zoo.data import ImageDataset

Fields = dict[str, Any]


_SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("patch_size", "frequency_stride", "time_stride", "max_length", "num_mel_bins"),
    *("conv_dim", "conv_stride", "conv_kernel", "num_conv_pos_embeddings", "num_conv_pos_embedding_groups"),
    *("classifier_proj_size", "mask_time_length", "mask_feature_length", "num_feat_extract_layers"),
)
_NUMBERS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps", "initializer_range", "hidden_dropout"),
    *("activation_dropout", "attention_dropout", "feat_proj_dropout", "final_dropout", "layerdrop"),
    *("mask_time_prob", "mask_feature_prob", "seconds"),
)
# What a saved adapter may say of its backbone: fields of the configuration, nothing that `from_pretrained` itself takes
OPTIONS: dict[str, Any] = {
    **dict.fromkeys(_SIZES, range(1, 65537)),
    "num_hidden_layers": range(1, 257),
    "num_labels": range(1, 1_000_001),
    **dict.fromkeys(_NUMBERS, float),
    **dict.fromkeys(("qkv_bias", "conv_bias", "do_stable_layer_norm", "apply_spec_augment"), bool),
    "hidden_act": ("gelu", "gelu_new", "relu", "silu"),
    "feat_extract_norm": ("group", "layer"),
    "attn_implementation": ("eager", "sdpa"),  # any other name may be that of a repository with code
}


class TransformersAudio(Backbone):
    """A `...Classification` model of transformers; `transformers:<repository or folder>` is any of the family's types."""

    modality, noun = "audio", "sounds"
    saved_options = OPTIONS
    # model_type of a configuration -> the library's classes of configuration and model
    library_classes: ClassVar[dict[str, tuple[str, str]]] = {}
    # source -> model_type and the fields in which its configuration differs from the library's defaults
    configs: ClassVar[dict[str, tuple[str, Fields]]] = {}
    head_parts: ClassVar[Sequence[str]] = ("classifier",)  # children of the module that are its classifier

    @classmethod
    def accepts(cls, name: str) -> bool | str:
        """True for `transformers:<repository or folder>` of this family; a string says why its configuration is not read."""
        if not name.startswith("transformers:"):
            return False
        source = name.removeprefix("transformers:")
        if source in cls.configs:
            return True
        config = pretrained_config(source)
        return config if isinstance(config, str) else config.get("model_type") in cls.library_classes

    @classmethod
    def known(cls, name: str) -> bool:
        """Also the repositories whose configurations are listed here."""
        return super().known(name) or (
            name.startswith("transformers:") and name.removeprefix("transformers:") in cls.configs
        )

    @classmethod
    def described(cls, source: str) -> tuple[str, Fields]:
        """model_type and configuration of a source; without a network for the names that are known here.

        Raises:
            ConfigError: its configuration cannot be read.
        """
        if source in cls.configs:
            return cls.configs[source]
        config = pretrained_config(source)
        if isinstance(config, str):
            raise ConfigError(config)
        return str(config.get("model_type")), config

    @classmethod
    def check_options(cls, model_type: str, options: Fields) -> None:
        """Raise ConfigError for an option that is no field of the configuration."""
        known = {*vars(getattr(library("transformers", "audio"), cls.library_classes[model_type][0])()), "num_labels"}
        fields = sorted(k for k in known if not k.startswith("_"))
        if wrong := [k for k in options if k not in fields]:
            raise ConfigError(f"the family '{cls.family}' has no option '{wrong[0]}'. {nearest(wrong[0], fields)}")

    @classmethod
    def random(cls, model_type: str, fields: Fields, attention: str | None) -> Any:
        """A model with random weights.

        Raises:
            ConfigError: transformers does not take the fields.
        """
        transformers = library("transformers", "audio")
        config_name, model_name = cls.library_classes[model_type]
        try:
            config = getattr(transformers, config_name).from_dict(fields)
            module = getattr(transformers, model_name)._from_config(config, attn_implementation=attention)
        except Exception as error:  # what checks a field raises classes of its own
            raise ConfigError(f"transformers does not take these options for '{model_type}': {error}") from error
        return module.eval()

    @classmethod
    def load(cls, source: str, options: Fields, attention: str | None) -> Any:
        """A model with the weights of a repository or folder; without a classifier if these have none.

        Raises:
            ConfigError: the weights cannot be had, or are not all there. WeightsError: they are of another body.
        """
        transformers = library("transformers", "audio")
        model = getattr(transformers, cls.library_classes[cls.described(source)[0]][1])
        try:
            module, report = model.from_pretrained(
                source, dtype=torch.float32, attn_implementation=attention, output_loading_info=True, **options
            )
        except Exception as error:  # a class of its own for each way in which network, files and shapes can fail
            raise ConfigError(
                f"The pretrained weights of '{source}' could not be loaded: {type(error).__name__}: "
                f"{str(error).splitlines()[0][:300]}. Check the network and the name, or pass pretrained=False for random "
                "weights."
            ) from error
        own = [k for k in report["missing_keys"] if k.split(".")[0] in cls.head_parts]
        missing = sorted(set(report["missing_keys"]) - set(own))
        if missing:
            raise ConfigError(
                f"'{source}' holds no weights for {', '.join(missing[:3])} ({len(missing)} tensors in all): it is not what "
                f"transformers saves of a {model.__name__}."
            )
        # What other tasks have besides the body (a vocabulary, a quantiser) is of no use here; parts of the body are
        body = f"{module.base_model_prefix}."
        check_loaded(
            source, model.__name__, {"unexpected_keys": report["unexpected_keys"]}, spare=(f"^(?!{re.escape(body)})",)
        )
        if own:
            for part in cls.head_parts:
                setattr(module, part, nn.Identity())
        return module.eval()

    # -- what the model asks ----------------------------------------------------------------------------------------

    @property
    def source(self) -> str:
        """The repository or folder that the weights are of."""
        return self.aliases.get(self.name, self.name).removeprefix("transformers:")

    def hub_id(self) -> str | None:
        """Hub repository of the weights; None for random and for local ones."""
        local = self.source.startswith("zoo:") or Path(self.source).expanduser().is_dir()
        return self.source if self.pretrained and not local else None

    def preprocessor(self) -> dict[str, Any]:
        """What the source says of its own preprocessing; {} if nothing is known."""
        if self.source in self.configs:
            return {}
        found = pretrained_config(self.source, "preprocessor_config.json")
        return {} if isinstance(found, str) else found

    def hub_task(self, num_classes: int) -> str | None:
        """Sounds have one task on the Hub; features have none."""
        return "audio-classification" if num_classes else None

    def usage(self, num_classes: int) -> tuple[list[str], list[str]]:
        """As `Backbone.usage`, from a file of sound."""
        lines = ['sound = model.preprocess()(soundfile.read("sound.wav"))', told("sound", self, num_classes)]
        return ["import soundfile"], lines

    def packs(self, module: nn.Module) -> bool:
        """The library's attentions give (y, weights)."""
        return hasattr(module, "q_proj")

    def run(self, module: nn.Module, *inputs: Any) -> Tensor:
        """Logits (or pooled features) of a merged module."""
        return module(*inputs).logits  # type: ignore[no-any-return]

    @classmethod
    def open_dataset(cls, data: Any, split: str | None = None, **options: Any) -> ImageDataset:
        """Sounds with labels, `audio.data.sounds.open_audio`."""
        from audio.data.sounds import open_audio

        return open_audio(data, split=split, **options)
