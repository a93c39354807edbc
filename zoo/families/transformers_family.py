"""What the families on transformers share: names, building, loading, labels, heads, points.

Configurations are read from the source's `config.json` (nothing of remote code); those of the repositories that a family lists
are here, so that these are known without a network. Weights must be all there: what is missing is named and refused, and so is
what the network has no place for, unless it belongs to a part that is left out (`left_out`: decoders of pretraining, other
towers, poolers).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo import registry
from zoo.backbone import Backbone
from zoo.errors import ConfigError, MissingPackageError, nearest
from zoo.heads.base import not_held
from zoo.library import check_loaded, kernels, library, pretrained_config
from zoo.points import NormPoint, Point
from zoo.points.rows import find, make_linear, norm_dim

Fields = dict[str, Any]

# What a saved adapter may say of its backbone: fields of the configuration, nothing that `from_pretrained` itself takes
COMMON: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "num_attention_heads", "intermediate_size", "patch_size"), range(1, 65537)),
    "num_hidden_layers": range(1, 257),
    "num_labels": range(1, 1_000_001),
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout"), float),
    **dict.fromkeys(("layer_norm_eps", "initializer_range"), float),
    "hidden_act": ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu"),
    "attn_implementation": ("eager", "sdpa"),  # any other name may be that of a repository with code
}


def described_types() -> list[str]:
    """Every `model_type` of transformers that a family describes."""
    found: set[str] = set()
    cls: Any
    for cls in registry.described():
        found |= set(getattr(cls, "library_classes", ()))
        found |= {cls.model_type} if isinstance(getattr(cls, "model_type", None), str) else set()
    return sorted(found)


class TransformersBackbone(Backbone):
    """A model of transformers; `transformers:<repository or folder>` is any of the family's types."""

    saved_options = COMMON
    extra: ClassVar[str] = "multimodal"  # which extra of this package brings transformers
    # model_type of a configuration -> the library's classes of configuration and model
    library_classes: ClassVar[dict[str, tuple[str, str]]] = {}
    # model_type -> where its configuration holds that of the network, if it is that of several
    nested: ClassVar[dict[str, str]] = {}
    # `architectures` of a configuration -> the key above of the network that has its classifier, if that is another class
    classifiers: ClassVar[dict[str, str]] = {}
    # source -> model_type and the fields in which its configuration differs from the library's defaults
    configs: ClassVar[dict[str, tuple[str, Fields]]] = {}
    head_parts: ClassVar[Sequence[str]] = ("classifier",)  # children of the module that are its classifier
    # Patterns of the names of tensors that a checkpoint may hold besides: parts that the network here does not have
    left_out: ClassVar[Sequence[str]] = ("*.position_ids",)
    # Patterns of norms behind the blocks that pretraining does not have: where a checkpoint lacks them they start as the identity
    started: ClassVar[Sequence[str]] = ()
    layout: ClassVar[Sequence[str]] = ()  # paths of which one must be there in a block: else the library is too old

    # -- names ------------------------------------------------------------------------------------------------------

    @classmethod
    def accepts(cls, name: str) -> bool | str:
        """True for `transformers:<repository or folder>` of this family; a string says why its configuration is not served."""
        if not name.startswith("transformers:"):
            return False
        source = name.removeprefix("transformers:")
        if source in cls.configs:
            return True
        config = pretrained_config(source)
        if isinstance(config, str):
            return config
        kind = config.get("model_type")
        if not isinstance(kind, str):
            return f"'config.json' of '{source}' names no model_type, by which transformers' networks are known."
        if kind in cls.library_classes:
            return True
        return f"'{source}' is of the type '{kind}', which no family describes; described are {', '.join(described_types())}."

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
        kind = str(config.get("model_type"))
        saved = config.get("architectures")
        if isinstance(saved, list) and saved and str(saved[0]) in cls.classifiers:
            return cls.classifiers[str(saved[0])], config
        part = config.get(cls.nested.get(kind, ""), config)
        return kind, part if isinstance(part, dict) else config

    # -- building ---------------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, name: str, *, pretrained: bool, **kwargs: Any) -> nn.Module:
        """The library's module; `kwargs` are fields of its configuration, and `attn_implementation`.

        Raises:
            ConfigError: an unknown field, or weights that cannot be had.
            MissingPackageError: no transformers, or one from before these networks were laid out as here.
        """
        options = {k: v for k, v in kwargs.items() if v is not None}
        device, attention = options.pop("device", None), options.pop("attn_implementation", None)
        source = name.removeprefix("transformers:")
        model_type, fields = cls.described(source)
        cls.check_options(model_type, options)
        if pretrained:
            module = cls.load(source, options, attention)
        else:
            module = cls.random(model_type, {**fields, **options}, attention)
        cls.check_layout(module)
        return module if device is None else module.to(device)  # type: ignore[no-any-return]

    @classmethod
    def check_layout(cls, module: nn.Module) -> None:
        """Raise MissingPackageError if the library lays the network out in another way."""
        if cls.layout and not any(find(module, path) is not None for path in cls.layout):
            version = library("transformers", cls.extra).__version__
            raise MissingPackageError(
                f"transformers {version} lays {type(module).__name__} out in another way than described here. Install a newer "
                f"one with: pip install 'adapter-zoo[{cls.extra}]'"
            )

    @classmethod
    def check_options(cls, model_type: str, options: Fields) -> None:
        """Raise ConfigError for an option that is no field of the configuration."""
        known = {*vars(getattr(library("transformers", cls.extra), cls.library_classes[model_type][0])()), "num_labels"}
        fields = sorted(k for k in known if not k.startswith("_"))
        if wrong := [k for k in options if k not in fields]:
            raise ConfigError(f"the family '{cls.family}' has no option '{wrong[0]}'. {nearest(wrong[0], fields)}")

    @classmethod
    def random(cls, model_type: str, fields: Fields, attention: str | None) -> Any:
        """A model with random weights.

        Raises:
            ConfigError: transformers does not take the fields.
        """
        transformers = library("transformers", cls.extra)
        config_name, model_name = cls.library_classes[model_type]
        try:
            config = getattr(transformers, config_name).from_dict(
                {k: v for k, v in fields.items() if k != "model_type"}
            )
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
        transformers = library("transformers", cls.extra)
        model = getattr(transformers, cls.library_classes[cls.described(source)[0]][1])
        try:
            given = {"dtype": torch.float32, **kernels(source), **options}
            module, report = model.from_pretrained(
                source, attn_implementation=attention, output_loading_info=True, **given
            )
        except Exception as error:  # a class of its own for each way in which network, files and shapes can fail
            raise ConfigError(
                f"The pretrained weights of '{source}' could not be loaded: {type(error).__name__}: "
                f"{str(error).splitlines()[0][:300]}. Check the network and the name, or pass pretrained=False for random "
                "weights."
            ) from error
        own = [k for k in report["missing_keys"] if k.split(".")[0] in cls.head_parts]
        missing = sorted(k for k in set(report["missing_keys"]) - set(own) if not _any(k, cls.started))
        head = [k for k in module.state_dict() if k.split(".")[0] in cls.head_parts]
        if own and set(own) != set(head):  # of a classifier a part alone: it is no checkpoint without one
            missing = sorted([*missing, *own])
        if missing:
            raise ConfigError(
                f"'{source}' holds no weights for {', '.join(missing[:3])} ({len(missing)} tensors in all): it is not what "
                f"transformers saves of a {model.__name__}."
            )
        check_loaded(source, model.__name__, {"unexpected_keys": report["unexpected_keys"]}, spare=cls.spare(module))
        if own:
            for part in cls.head_parts:
                setattr(module, part, nn.Identity())
        vars(module.config).pop(
            "model_type", None
        )  # of the file, where it names another class than the one that was built
        return module.eval()

    @classmethod
    def spare(cls, module: nn.Module) -> tuple[str, ...]:
        """Regular expressions of tensors that a checkpoint may have over."""
        return tuple(f"^{fnmatch.translate(pattern)}" for pattern in cls.left_out)

    # -- what the model asks ----------------------------------------------------------------------------------------

    @property
    def source(self) -> str:
        """The repository or folder that the weights are of, or were of before the backbone was changed."""
        name = self.name.partition("~")[0]  # `zoo.model.pruning`
        return self.aliases.get(name, name).removeprefix("transformers:")

    @property
    def model_type(self) -> str:
        """The library's word for the kind of network."""
        return str(self.config.model_type)

    @property
    def config(self) -> Any:
        """The library's configuration."""
        return self.module.config

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

    def packs(self, module: nn.Module) -> bool:
        """The library's attentions give (y, weights)."""
        return hasattr(module, "q_proj")

    def run(self, module: nn.Module, *inputs: Any) -> Tensor:
        """Logits (or pooled features) of a merged module."""
        return module(*inputs).logits  # type: ignore[no-any-return]

    @property
    def feature_dim(self) -> int:
        """Width of the pooled features."""
        return int(self.config.hidden_size)

    # -- the classifier ---------------------------------------------------------------------------------------------

    def take_head(self) -> nn.Module | None:
        """Take the library's classifier off; without one its module answers with the pooled features."""
        own = find(self.module, "classifier")
        if own is None:
            return None
        self.module.classifier = nn.Identity()
        return own if isinstance(own, nn.Linear) else None

    def put_head(self, module: nn.Module, head: nn.Module) -> None:
        """Make `head` (an nn.Linear on the pooled features) the classifier of a merged module."""
        if "classifier" not in module._modules:
            super().put_head(module, head)
        if not isinstance(head, nn.Linear) or head.in_features != self.feature_dim:
            raise not_held()
        merged: Any = module
        merged.num_labels = merged.config.num_labels = head.out_features
        merged.classifier = head

    def head_path(self) -> str | None:
        """Where the library keeps the classifier."""
        return "classifier" if "classifier" in self.module._modules else None

    def name_classes(self, module: nn.Module, classes: Sequence[str]) -> None:
        """Write the names of the classes where the library's `save_pretrained` and pipelines look for them."""
        config: Any = module.config
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: i for i, name in enumerate(classes)}

    # -- points outside of the blocks -------------------------------------------------------------------------------

    def norm_at(self, name: str, path: str, first: bool = False, **place: Any) -> list[Point]:
        """The point of a norm with a scale of its own, if it is there; `first`: channels stand in front of the places."""
        module = find(self.module, path)
        if module is None or not isinstance(getattr(module, "weight", None), Tensor):
            return []
        width = norm_dim(module)
        common: dict[str, Any] = {"name": name, "role": "norm", "path": path, "module": module, **place}
        first = first or isinstance(module, nn.GroupNorm)  # of convolutions: (B, channels, steps)
        return [NormPoint(**common, dim_in=width, dim_out=width, channels_first=first)]

    def linear_at(self, name: str, role: str, path: str, **place: Any) -> list[Point]:
        """The point of a projection, if it is there."""
        module = find(self.module, path)
        common: dict[str, Any] = {"name": name, "role": role, "path": path, "module": module, **place}
        point = None if module is None else make_linear(module, None, "", 0, common)
        return [] if point is None else [point]


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
