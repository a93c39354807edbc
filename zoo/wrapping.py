"""`zoo.wrap`: a network that the user has built, with adapters and a head.

    model = zoo.wrap(network, example=batch)                # what can be found without knowing it
    model.add_adapter("lora")
    model.save_adapter("out/")
    model = zoo.load(network, adapter="out/", example=batch)  # the network comes from the user again

What is saved names the class of the network and its settings as text, for people. Nothing is built or imported by that text.
"""

from __future__ import annotations

import re
import weakref
from typing import Any

import torch
from torch import nn

from zoo import registry
from zoo.backbone import WRAPPED, Backbone, OwnWeights
from zoo.engine.sites import site_at
from zoo.errors import ConfigError
from zoo.model import Model

__all__ = ["wrap"]

# Networks that a model stands on, while it lives
_HELD: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Model]] = weakref.WeakKeyDictionary()
_NAME = re.compile(r"[\w.-]+")


def wrap(
    module: nn.Module,
    *,
    example: Any = None,
    name: str | None = None,
    features: Any = None,
    head: str | None = None,
    probe: bool = True,
    num_classes: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    memory: str = "default",
    source: str | None = None,
    licence: str | None = None,
) -> Model:
    """A model around any network. It takes the network itself, which is frozen and whose classifier becomes the model's head.

    A network of a class that a family describes (timm's ViT, Swin, EVA, ConvNeXt ...) has that family's points, all others what
    can be found.

    Args:
        module: the network.
        example: a small batch that it takes: a tensor, a tuple of inputs, or a mapping of inputs by name. One forward pass on it
            shows that every place that can be chosen is really called; without one, the first real batch shows it.
        name: of the network, for messages and saved adapters; by default that of its class.
        features: what stands in front of a classifier: a function `(module, *inputs) -> (B, d)`, or the name of a field of the
            network's output. By default the library's convention, else the output itself.
        head: path of the nn.Linear that is the classifier, `"fc"`. By default a Linear of a usual name that makes the output.
        probe: make the pass.
        num_classes: width of a new head; None keeps the network's own; 0 means features.
        device, dtype, memory: as in `zoo.load`.
        source, licence: where its weights are from (a Hub repository), for cards.

    Raises:
        ConfigError: no network, an example that does not run or is on another device, a head that is none.
        AttachError: there is nothing in it that a method could change.
    """
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"zoo.wrap takes a network (nn.Module), not {type(module).__name__}. Name backbones to zoo.load: zoo.load('vit-b16')."
        )
    if isinstance(module, Model):
        raise ConfigError(
            "This is a model of zoo already; add adapters to it (model.add_adapter), or wrap its `merge()`."
        )
    if isinstance(module, type):
        raise ConfigError(f"zoo.wrap takes a built network: {module.__name__}(...).")
    if hasattr(module, "_orig_mod"):
        raise ConfigError(
            "This network is compiled. Wrap the network itself, and compile the model: torch.compile(zoo.wrap(...))."
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise ConfigError(
            "This network is a graph of TorchScript, whose modules no adapter can stand at. Wrap the network that it was made of."
        )
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ConfigError(
            f"This network stands in {type(module).__name__}, whose copies adapters would not reach. Wrap the network itself "
            f"(module.module), and put the model into {type(module).__name__}."
        )
    _check_free(module)
    label = name or type(module).__name__
    if not _NAME.fullmatch(label):
        raise ConfigError(f"name={label!r}; expected letters, digits, '.', '-' and '_'.")
    if device is not None or dtype is not None:
        module.to(device=device, dtype=dtype)
    own_words = features is not None or head is not None
    known = (
        None if own_words else next((f for f in map(registry.family, registry.families()) if f.describes(module)), None)
    )
    family: Backbone
    if known is not None:
        family = known(module, f"{WRAPPED}{label}")
    else:
        made: Any = registry.family("generic")
        family = made(module, f"{WRAPPED}{label}", example=example, features=features, head=head, probe=probe)
    family.pretrained = next((p.device.type != "meta" for p in module.parameters()), False)
    family.own_weights = OwnWeights(label, source, licence)
    model = Model(family, num_classes=num_classes, memory=memory, kwargs={"recipe": recipe(module)})
    _HELD[module] = weakref.ref(model)
    return model


def _check_free(module: nn.Module) -> None:
    """Raise ConfigError if a model stands on this network, or on a part of it, already."""
    for path, part in module.named_modules():
        held = _HELD.get(part)
        if site_at(part) is not None or (held is not None and held() is not None):
            where = f"Its part '{path}' is" if path and site_at(part) is None else "This network is"
            raise ConfigError(
                f"{where} in a model of zoo already, which took off its classifier, and adapters of both would act on each "
                "other. Add adapters to that model (model.add_adapter), wrap its `merge()`, or hand over a copy of the network "
                "that was made before (copy.deepcopy)."
            )


def recipe(module: nn.Module) -> str:
    """What a network is, for a person who reads a saved adapter: its class, and its settings where it knows them."""
    kind = type(module)
    config = getattr(module, "config", None)
    settings = next((f for n in ("to_diff_dict", "items") if (f := getattr(config, n, None)) is not None), None)
    told = ""
    if settings is not None:
        told = ", ".join(f"{k}={v!r:.60}" for k, v in sorted(dict(settings()).items()) if not str(k).startswith("_"))
    return f"{kind.__module__}.{kind.__qualname__}({told})"[:2000]
