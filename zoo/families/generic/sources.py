"""Networks of timm, transformers and diffusers by name, where no family describes them.

Only the library's own classes are built, and weights are read as tensors: no code of a repository, no pickle.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from torch import nn

from zoo.errors import ConfigError, ZooError, nearest
from zoo.families.generic.conventions import place
from zoo.families.generic.micro import Micro
from zoo.families.timm_names import architecture
from zoo.library import check_loaded, kernels, library, pretrained_config

# What a saved adapter may say of its backbone: sizes of the libraries' classes, never what is read and how
_SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels", "vocab_size"),
    *("max_position_embeddings", "num_mel_bins", "max_length", "num_layers", "attention_head_dim", "in_channels"),
    *("out_channels", "patch_size", "sample_size", "num_key_value_heads", "head_dim", "image_size", "width", "depth"),
)
OPTIONS: dict[str, Any] = {
    **dict.fromkeys(_SIZES, range(1, 65537)),
    **dict.fromkeys(("embed_dim", "embed_dims", "dims", "channels"), range(1, 16385)),
    **dict.fromkeys(("depths", "num_heads", "layers"), range(1, 257)),
    "img_size": range(1, 8193),
    "in_chans": range(1, 1025),
    "window_size": range(1, 513),
    "global_pool": ("", "avg", "avgmax", "max", "token", "map"),
    **dict.fromkeys(("drop_rate", "drop_path_rate", "mlp_ratio", "init_values"), float),
    **dict.fromkeys(("dynamic_img_size", "strict_img_size", "qkv_bias", "probe", "own_output"), bool),
}
TASKS = ("ImageClassification", "AudioClassification", "VideoClassification")
# Of types that the library has no bare network of
OTHERS = ("DepthEstimation", "SpeechSeq2Seq", "Seq2SeqLM", "MaskedImageModeling", "CTC", "ImageSegmentation")


def accepts(name: str) -> bool | str:
    """Whether a library can build a network by this name; a string says why not."""
    kind, _, source = name.partition(":")
    if name == "zoo:any-micro":
        return True
    if kind == "timm":
        model, why = architecture(name)
        return True if model else why
    if kind == "transformers":
        config = pretrained_config(source)
        if isinstance(config, str):
            return config
        known = config.get("model_type")
        if not isinstance(known, str):
            return f"'config.json' of '{source}' names no model_type, by which transformers' networks are known."
        auto = library("transformers", "multimodal").CONFIG_MAPPING
        return True if known in auto else f"transformers has no model type '{known}' (config.json of '{source}')."
    if kind == "diffusers":
        config, _ = _diffusers_config(source)
        if isinstance(config, str):
            return config
        known = str(config.get("_class_name", "?"))
        made = getattr(library("diffusers", "multimodal"), known, None)
        return True if made is not None else f"diffusers has no class '{known}' (config.json of '{source}')."
    return False


def build(name: str, *, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """The library's network.

    Raises:
        ConfigError: an option that it does not take, or weights that cannot be had.
        MissingPackageError: the library is not installed.
    """
    kind, _, source = name.partition(":")
    given = {k: v for k, v in options.items() if v is not None}
    make = {"zoo": _micro, "timm": _timm, "transformers": _transformers, "diffusers": _diffusers}[kind]
    try:
        return make(source, pretrained, given)
    except (TypeError, AttributeError, AssertionError) as error:
        raise ConfigError(f"{kind} does not take these options for '{name}' ({given}): {error}") from error
    except ZooError:
        raise
    except Exception as error:  # a class of its own for each way in which network, files and shapes can fail
        if not pretrained:
            raise ConfigError(
                f"{kind} cannot build '{name}' with {given or 'its own options'}: {type(error).__name__}: "
                f"{str(error).splitlines()[0][:300]}"
            ) from error
        raise ConfigError(
            f"The pretrained weights of '{name}' could not be loaded: {type(error).__name__}: "
            f"{str(error).splitlines()[0][:300] if str(error) else ''}. Check the network and the name, or pass pretrained=False "
            "for random weights."
        ) from error


def _micro(source: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    if pretrained:
        raise ConfigError(f"'zoo:{source}' has no weights: it is made for tests. Pass pretrained=False.")
    return Micro(**options)


def _timm(source: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    module: nn.Module = library("timm", "vision").create_model(source, pretrained=pretrained, **options)
    return module


def _transformers(source: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    transformers = library("transformers", "multimodal")
    fields = pretrained_config(source)
    if isinstance(fields, str):
        raise ConfigError(fields)
    made = transformers_class(transformers, str(fields.get("model_type")))
    wrong = [
        k for k in options if k not in fields and not hasattr(transformers.CONFIG_MAPPING[fields["model_type"]](), k)
    ]
    if wrong:
        raise ConfigError(f"'{source}' has no option '{wrong[0]}'. {nearest(wrong[0], fields)}")
    if not pretrained:
        plain = {k: v for k, v in fields.items() if k not in ("model_type", "auto_map")}
        config = transformers.AutoConfig.for_model(fields["model_type"], **{**plain, **options})
        config.architectures = (
            config.architectures or []
        )  # the library looks through them where a type has several classes
        return made.from_config(config).eval()  # type: ignore[no-any-return]
    given = {**kernels(source), **options}
    module, report = made.from_pretrained(source, output_loading_info=True, use_safetensors=True, **given)
    classifiers = r"^(classifier|score|head|classification_head|projector)\."
    check_loaded(source, type(module).__name__, report, optional=(classifiers, r"\bpooler\."), spare=(r"^(?!.*\d)",))
    for key in report["missing_keys"]:
        path = str(key).rpartition(".")[0]
        if re.match(classifiers, str(key)) and isinstance(module.get_submodule(path), nn.Linear):
            place(module, path, nn.Identity())  # random: it is no classifier of the checkpoint's
    return module.eval()  # type: ignore[no-any-return]


def transformers_class(transformers: Any, model_type: str) -> Any:
    """The library's class for a type of model: that of a classification where there is one, else the bare network."""
    config = transformers.CONFIG_MAPPING[model_type]
    autos = [getattr(transformers, f"AutoModelFor{task}") for task in (*TASKS, *OTHERS)]
    autos.insert(len(TASKS), transformers.AutoModel)
    return next((auto for auto in autos if config in auto._model_mapping), transformers.AutoModel)


def _diffusers_config(source: str) -> tuple[dict[str, Any] | str, str]:
    """The configuration of a transformer or UNet in a pipeline, or in a folder of its own; and the subfolder it is in."""
    last: dict[str, Any] | str = ""
    for folder in ("transformer", "unet", ""):
        last = pretrained_config(source, f"{folder}/config.json".lstrip("/"))
        if isinstance(last, dict):
            return last, folder
    return last, ""


def _diffusers(source: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    config, folder = _diffusers_config(source)
    if isinstance(config, str):
        raise ConfigError(config)
    made = getattr(library("diffusers", "multimodal"), str(config["_class_name"]))
    if not pretrained:
        takes = inspect.signature(made.__init__).parameters
        module: nn.Module = made(**{**{k: v for k, v in config.items() if k in takes}, **options})
        return module.eval()
    place = {"subfolder": folder} if folder else {}
    module, report = made.from_pretrained(source, use_safetensors=True, output_loading_info=True, **place, **options)
    check_loaded(source, type(module).__name__, report)
    return module.eval()


def described(module: nn.Module, name: str) -> dict[str, Any]:
    """What the library says of the weights: `license` and `hf_hub_id`."""
    kind, _, source = name.partition(":")
    if kind == "timm":
        config = dict(getattr(module, "pretrained_cfg", None) or {})
        return {**config, "hf_hub_id": None} if source.startswith("local-dir:") else config
    local = Path(source).expanduser().exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source)
    return {} if local else {"hf_hub_id": source}
