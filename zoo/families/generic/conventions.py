"""How a library's networks are called, what comes out, and where their classifier stands.

| convention | networks | pooled features | classifier |
| --- | --- | --- | --- |
| `Timm` | with `forward_features`, `reset_classifier` | `forward_head(..., pre_logits=True)` | `get_classifier()` |
| `Transformers` | with a `config` and an output class | `pooler_output`, else the mean of `last_hidden_state` | as `Plain` |
| `Plain` | any other | the output itself where it is (B, d) | `fc`, `head`, `classifier`, ..., if it makes the output |

A user who says `features=` (a function, or a field of the output) is believed. A classifier is only taken where it, on the
features, gives what the network itself gives on the example (`heads.py`); elsewhere the network's own output comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError, MergeError, MismatchError, nearest
from zoo.families.generic.watch import Pass, first_tensor

HEADS = ("fc", "head", "classifier", "head.fc", "heads.head", "score", "classification_head", "classif")
POOLED = ("pooler_output", "image_embeds", "text_embeds", "audio_embeds", "embeddings")
SEQUENCES = ("last_hidden_state", "sample", "logits")

Features = Callable[..., Tensor] | str | None


def convention_of(module: nn.Module, features: Features = None, head: str | None = None) -> Plain:
    """The convention that a network follows."""
    says = features is not None or head is not None
    # A forward of somebody's own may do more than timm's
    timms = type(module).forward.__module__.startswith("timm.") and "forward" not in module.__dict__
    if (
        not says
        and timms
        and all(map(partial(hasattr, module), ("forward_features", "forward_head", "reset_classifier")))
    ):
        return Timm()
    if hasattr(module, "config") and hasattr(module, "main_input_name"):
        return Transformers(features, head)
    return Plain(features, head)


class Plain:
    """A network of no library that is known: its output is what comes out."""

    pools = True

    def __init__(self, features: Features = None, head: str | None = None) -> None:
        self.says, self.head = features, head
        self.path: str | None = None  # where the classifier stood
        self.whole = False  # nothing is taken off: what the network itself gives comes out

    # -- features -----------------------------------------------------------------------------------------------------

    def call(self, module: nn.Module, *inputs: Any, **kwargs: Any) -> Tensor:
        """The pooled features, or what comes out where nothing is pooled.

        Raises:
            ConfigError: `features` names no field of the output, or gives no tensor.
        """
        if callable(self.says):
            found: Any = self.says(module, *inputs, **kwargs)
        else:
            output = module(*inputs, **kwargs)
            found = self.pick(output) if self.says is None else self._field(output, self.says)
        if not isinstance(found, Tensor):
            raise ConfigError(
                f"The features of this {type(module).__name__} came out as {type(found).__name__}; expected a tensor (B, d). Say "
                "how they are made: features=lambda module, x: ..."
            )
        return found

    def own(self, module: nn.Module, *inputs: Any, **kwargs: Any) -> Tensor:
        """What the network itself gives, with its classifier."""
        return self.call(module, *inputs, **kwargs)

    def pick(self, output: Any) -> Tensor | None:
        """The tensor of an output on which a classifier would stand."""
        return first_tensor(output)

    def _field(self, output: Any, name: str) -> Any:
        fields = dict(output) if isinstance(output, Mapping) else {}
        value = fields.get(name, getattr(output, name, None) if name.isidentifier() else None)
        if value is None:
            have = ", ".join(fields) or type(output).__name__
            raise ConfigError(
                f"features='{name}' is no field of what the network gives. {nearest(name, fields)} It has: {have}."
            )
        return value if value.ndim == 2 else averaged(value)

    # -- the classifier -----------------------------------------------------------------------------------------------

    def take_head(self, module: nn.Module, seen: Pass | None) -> nn.Linear | None:
        """Take the classifier off, if there is one, so that features come out."""
        found: nn.Module | None
        if self.head is not None:
            try:
                found = module.get_submodule(self.head)
            except AttributeError as error:
                names = [p for p, m in module.named_modules() if isinstance(m, nn.Linear)]
                raise ConfigError(
                    f"head='{self.head}' is no module of this network. {nearest(self.head, names)}"
                ) from error
            if not isinstance(found, nn.Linear):
                raise ConfigError(
                    f"head='{self.head}' is a {type(found).__name__}; expected an nn.Linear that stands on the features."
                )
        else:
            found = self._usual_head(module, seen)
        if not isinstance(found, nn.Linear) or self.says is not None:
            return None
        self.path = next(p for p, m in module.named_modules() if m is found)
        place(module, self.path, nn.Identity())
        return found

    def stands(self, module: nn.Module, seen: Pass | None) -> bool:
        """Whether there may be a classifier to take."""
        return self.says is None and (self.head is not None or self._usual_head(module, seen) is not None)

    def _usual_head(self, module: nn.Module, seen: Pass | None) -> nn.Linear | None:
        """A Linear of a usual name that makes the network's output, as the pass has shown."""
        if seen is None:
            return None
        made = first_tensor(seen.output)
        for path, part in module.named_modules():
            named = path in HEADS or any(path.startswith(f"{h}.") for h in HEADS)
            run = seen.modules.get(path)
            if named and isinstance(part, nn.Linear) and run is not None and run.left is made and made is not None:
                return part if made.ndim == 2 else None
        return None

    def put_head(self, module: nn.Module, head: nn.Module) -> None:
        """Put a classifier where the network's own stood.

        Raises:
            MergeError: it had none.
        """
        if self.path is None:
            raise MergeError(
                f"This {type(module).__name__} has no place for a classifier. Merge without it (model.reset_head(0)) and keep "
                "`model.head` beside the merged module."
            )
        place(module, self.path, head)

    # -- inputs ---------------------------------------------------------------------------------------------------------

    def example(self, module: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Inputs of one sample that the network itself describes (Lightning's `example_input_array`); None: none."""
        given = getattr(module, "example_input_array", None)
        if given is None:
            return None
        return (
            ((), dict(given)) if isinstance(given, Mapping) else (given if isinstance(given, tuple) else (given,), {})
        )

    def data_config(self, module: nn.Module) -> dict[str, Any]:
        """Size and normalisation of its images, as the library states them."""
        return {}


class Timm(Plain):
    """timm's conventions."""

    def call(self, module: Any, *inputs: Any, **kwargs: Any) -> Tensor:
        """Features in front of the classifier."""
        if self.whole:
            return self.own(module, *inputs, **kwargs)
        tokens = module.forward_features(*inputs, **kwargs)
        found = first_tensor(module.forward_head(tokens, pre_logits=True))
        assert found is not None
        return (found if found.ndim == 2 or unpooled(module) else averaged(found)).contiguous()

    def own(self, module: Any, *inputs: Any, **kwargs: Any) -> Tensor:
        """What timm's forward gives."""
        found = first_tensor(module(*inputs, **kwargs))
        assert found is not None
        return found

    def take_head(self, module: Any, seen: Pass | None) -> nn.Linear | None:
        """timm's `get_classifier`, and `reset_classifier(0)`."""
        head = module.get_classifier()
        self.path = next((p for p, m in module.named_modules() if m is head), None)
        module.reset_classifier(0)
        return head if isinstance(head, nn.Linear) else None

    def stands(self, module: Any, seen: Pass | None) -> bool:
        """Whether `get_classifier` gives one."""
        return isinstance(module.get_classifier(), nn.Linear)

    def put_head(self, module: Any, head: nn.Module) -> None:
        """timm's `reset_classifier`, with these numbers."""
        if not isinstance(head, nn.Linear):
            raise MismatchError(
                "the head is no nn.Linear on the backbone's own features, so timm's classifier cannot hold it."
            )
        if self.whole:
            raise MergeError(
                f"The classifier of a {type(module).__name__} is no nn.Linear on its features, and this head stands on what it "
                "gives. Merge without it (model.reset_head(0)) and keep `model.head` beside the merged module."
            )
        absent = [name for name, part in module._modules.items() if part is None]
        module.reset_classifier(head.out_features)
        own = module.get_classifier()
        for name in absent:  # a second classifier beside this one, which nobody trained
            part = module._modules[name]
            if part is not None and own not in list(part.modules()):
                module._modules[name] = None
        if not isinstance(own, nn.Linear) or own.weight.shape != head.weight.shape:
            raise MergeError(
                f"timm's classifier of a {type(module).__name__} is a {type(own).__name__}, which cannot hold the head. Merge "
                "without it (model.reset_head(0)) and keep `model.head` beside the merged module."
            )
        if (own.bias is None) != (head.bias is None):  # as the head that was trained, not as timm makes one
            own.register_parameter("bias", None if head.bias is None else nn.Parameter(head.bias.detach().clone()))
        own.load_state_dict(head.state_dict())
        own.to(device=head.weight.device, dtype=head.weight.dtype)

    def example(self, module: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """An image of the size that the network is built for."""
        config = self.data_config(module)
        return ((torch.randn(1, *config["input_size"]),), {}) if "input_size" in config else None

    def data_config(self, module: Any) -> dict[str, Any]:
        """timm's data configuration, at the image size and channels that the network was built for."""
        from zoo.families.timm_names import image_config

        return image_config(module)


class Transformers(Plain):
    """transformers' conventions."""

    def pick(self, output: Any) -> Tensor | None:
        """`pooler_output` and the like; else the mean of the last hidden states; else the first tensor."""
        for name in POOLED:
            value = getattr(output, name, None)
            if isinstance(value, Tensor):
                return value.flatten(1)  # convolutional ones keep two axes of length one
        for name in SEQUENCES:
            value = getattr(output, name, None)
            if isinstance(value, Tensor):
                return averaged(value) if name == "last_hidden_state" else value
        return first_tensor(output)

    def example(self, module: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """What `main_input_name` and the configuration say."""
        return transformers_example(module)


def unpooled(module: nn.Module) -> bool:
    """Whether a network of timm was built with `global_pool=""`: tokens or a map come out, and no classifier stands on these."""
    own = getattr(module, "global_pool", None)
    own = getattr(own, "pool_type", own)
    own = getattr(getattr(getattr(module, "head", None), "global_pool", None), "pool_type", own) if own is None else own
    return own == ""


def averaged(value: Tensor) -> Tensor:
    """(B, N, d) -> the mean over N; (B, C, H, W) -> the mean over places."""
    if value.ndim <= 2:
        return value
    return value.mean(1) if value.ndim == 3 else value.flatten(2).mean(2)


def place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path."""
    parent, _, name = path.rpartition(".")
    root.get_submodule(parent)._modules[name] = module


def transformers_example(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Inputs of one sample for a network of transformers, by its main input and its configuration; None: not known."""
    config, name = module.config, module.main_input_name
    if name == "pixel_values":
        parts = [config, getattr(config, "vision_config", None), getattr(config, "backbone_config", None)]
        size = next((s for c in parts if (s := getattr(c, "image_size", None)) is not None), 224)
        channels = next((n for c in parts if (n := getattr(c, "num_channels", None)) is not None), 3)
        side = (
            tuple(size.values())
            if isinstance(size, Mapping)
            else size
            if isinstance(size, (tuple, list))
            else (size, size)
        )
        return (torch.randn(1, channels, *side),), {}
    if name == "input_values":
        if hasattr(config, "num_mel_bins"):
            return (torch.randn(1, getattr(config, "max_length", 1024), config.num_mel_bins),), {}
        return (torch.randn(1, 16_000),), {}
    if name == "input_features":
        bins = getattr(config, "num_mel_bins", 80)
        return (torch.randn(1, bins, 2 * getattr(config, "max_source_positions", 1500)),), {}
    if name == "input_ids":
        vocabulary = getattr(config, "vocab_size", None)
        return None if vocabulary is None else ((torch.arange(8)[None] % vocabulary,), {})
    return None
