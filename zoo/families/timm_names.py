"""What timm's names mean, and what its networks take: for all families of its classes, and for the generic one."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from zoo.errors import nearest
from zoo.library import library, pretrained_config

__all__ = ["architecture", "channels_of", "image_config", "other_channels", "per_channel", "resampled"]

PLACES = ("hf-hub:", "hf_hub:", "local-dir:")  # somebody's repository, or a folder


def architecture(name: str) -> tuple[str, str]:
    """(timm's architecture, "") of a name `timm:...`; ("", why) where there is none.

    `timm:<architecture>[.tag]` is one of timm's own; of `timm:hf-hub:<repository>` and `timm:local-dir:<folder>` the file
    `config.json` says it.
    """
    timm = library("timm", "vision")
    source = name.removeprefix("timm:")
    place = next((p for p in PLACES if source.startswith(p)), "")
    if not place:
        model = source.split(".")[0]
        return (model, "") if timm.is_model(model) else ("", nearest(name, [f"timm:{m}" for m in timm.list_models()]))
    config = pretrained_config(source.removeprefix(place).split("@")[0])
    if isinstance(config, str):
        return "", config
    named: Any = config.get("architecture") or config.get("model_name")
    if not isinstance(named, str) or not timm.is_model(named.split(".")[0]):
        return "", f"'config.json' of '{source}' names the architecture {named!r}, and timm has no such network."
    return named.split(".")[0], ""


def channels_of(module: nn.Module) -> int | None:
    """Channels of the images that a network takes: those of its first convolution."""
    first = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    return None if first is None else first.in_channels


def image_config(module: Any) -> dict[str, Any]:
    """timm's data configuration of the checkpoint, at the image size and the channels that the network was built for.

    timm makes the weights of other channels of those of red, green and blue: their mean, or each in turn. So are mean and std.
    """
    from timm.data import resolve_model_data_config

    config = dict(resolve_model_data_config(module))
    size = getattr(getattr(module, "patch_embed", None), "img_size", None) or config["input_size"][1:]
    channels = channels_of(module) or config["input_size"][0]
    config["input_size"] = (channels, *size)
    for key in ("mean", "std"):
        config[key] = per_channel(config[key], channels)
    return config


def per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """As many numbers as channels: the mean for one, else those that there are in turn."""
    if channels == 1:
        return (sum(values) / len(values),)
    return tuple(values[i % len(values)] for i in range(channels))


def resampled(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Weights of timm's classes for a network of another resolution or other channels, as timm does it with its own.

    A class of ours that others have released, too, knows their names (`renamed`).
    """
    if hasattr(type(module), "renamed"):
        state = module.renamed(state)  # type: ignore[operator]
    own = module.state_dict()
    heads = ("head.", "fc.", "classifier.", "head_dist.")
    if all(k in state and state[k].shape == v.shape for k, v in own.items() if not k.startswith(heads)):
        return state
    if not type(module).__module__.startswith("timm."):
        return state
    fit = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
    if fit is not None:
        with contextlib.suppress(
            Exception
        ):  # made for names that these do not have: what is missing is named by the caller
            state = dict(fit(dict(state), module))
    return other_channels(state, module)


def other_channels(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The first convolution's weight for a network of other input channels, made of that for three as timm does it."""
    own = module.state_dict()
    first = next((n for n, m in module.named_modules() if isinstance(m, nn.Conv2d)), None)
    key = f"{first}.weight"
    if first is not None and key in state and state[key].ndim == 4 and state[key].shape[1] != own[key].shape[1]:
        from timm.models._manipulate import adapt_input_conv

        with contextlib.suppress(NotImplementedError):  # timm converts from three channels
            state = {**state, key: adapt_input_conv(own[key].shape[1], state[key])}
    return state
