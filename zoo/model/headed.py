"""A backbone with heads: which one is in use, and how it is made anew. The part of a model that knows features and classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from zoo.adapters.base import Adapter
from zoo.arguments import whole
from zoo.backbone import Backbone
from zoo.engine.sharded import refuse
from zoo.engine.sites import State
from zoo.errors import AttachError, ConfigError
from zoo.heads import Head, make_head
from zoo.heads.growing import grown
from zoo.heads.names import check_texts, class_names
from zoo.registry import head_class

HALVES = (torch.float16, torch.bfloat16)
WIDTH = whole(0, 10_000_000)  # of a head; 0: none


class Headed(nn.Module):
    """Base of `AdapterHost`."""

    backbone: nn.Module
    family: Backbone
    adapters: nn.ModuleDict
    heads: nn.ModuleDict
    _state: State
    _classes: dict[str, list[str]]  # of each head
    _records: dict[str, dict[str, Any]]  # of each set of adapters, and the head that they use
    _answers: bool  # the head needs named outputs, or an adapter stands behind it (`zoo.model.answering`)

    def train(self, mode: bool = True) -> Any:
        """As torch's, but for the backbone (`Model.train`); every change of heads and adapters ends here."""
        self._answers = isinstance(self.head, Head) or any(a.behind_head for a in self._active_adapters())
        self.training = mode
        for name, child in self.named_children():
            if name != "backbone":
                child.train(mode)
        return self

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return next(self.backbone.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the backbone."""
        return next(self.backbone.parameters()).dtype

    @property
    def adapter_dtype(self) -> torch.dtype:
        """Precision of adapters and heads: the backbone's, but float32 where that is half precision, too coarse for steps."""
        dtype = self.dtype
        wide = dtype in HALVES and torch.amp.is_autocast_available(self.device.type)
        return torch.float32 if wide else dtype

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the adapters in use, in order of application."""
        return self._state.active

    def _active_adapters(self) -> list[Adapter]:
        return [self.adapters[n] for n in self._state.active]  # type: ignore[misc]

    @property
    def head_name(self) -> str:
        """Which head is in use: that of the last active adapter that has one of its own, else "default"."""
        return self.head_for(self._state.active)

    @property
    def head(self) -> nn.Module:
        """The head in use; `nn.Identity` without classes."""
        return self.heads[self.head_name]

    @property
    def num_classes(self) -> int:
        """Width of the head in use; 0 without one."""
        return int(getattr(self.head, "out_features", 0))

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes of the head in use, in the order of its outputs; None: they have no names."""
        return self._classes.get(self.head_name)

    @classes.setter
    def classes(self, names: Sequence[str] | None) -> None:
        self.take_names(None if names is None else class_names(names, self.num_classes))

    def take_names(self, names: Sequence[str] | None) -> None:
        """As `classes = names`, also where two classes share a name, as data and files may have it.

        A head that compares with texts of the names it had writes them anew, or raises ConfigError if it cannot.
        """
        if names is None:
            self._classes.pop(self.head_name, None)
            return
        check_texts(names)
        head = self.head
        if isinstance(head, Head) and head.reads_names and head.classes not in (None, [str(name) for name in names]):
            head.name_classes(names)
        self._classes[self.head_name] = list(names)

    @property
    def record(self) -> dict[str, Any]:
        """What is known of the adapters in use together, and of their head: metrics, data, licence (`zoo.disk.cards`)."""
        return self._records.setdefault(_key(self._state.active), {})

    @record.setter
    def record(self, record: dict[str, Any]) -> None:
        self._records[_key(self._state.active)] = record

    def record_of(self, names: str | Sequence[str]) -> dict[str, Any]:
        """The record of these adapters together (or of one by its name); empty where they were never measured or trained so."""
        return self._records.get(_key(self._acting(_several(names)))) or {}

    def set_record(self, names: str | Sequence[str], record: Mapping[str, Any]) -> None:
        """Keep a record of these adapters together, whoever is in use now."""
        self._records[_key(self._acting(_several(names)))] = dict(record)

    def _acting(self, names: Sequence[str]) -> Sequence[str]:
        """Those that are in use when these are attached; what another one runs itself is not."""
        return names

    def name_readers(self, names: Sequence[str]) -> None:
        """Name the classes of all heads that compare with texts of names, are of this width and have none yet."""
        for key, head in self.heads.items():
            reads = isinstance(head, Head) and head.reads_names and head.out_features == len(names)
            if reads and self.classes_of(key) is None:
                self._classes[key] = [str(name) for name in names]

    def classes_of(self, head: str) -> list[str] | None:
        """Names of the classes of a head, its own or those given for it."""
        return getattr(self.heads[head], "classes", None) or self._classes.get(head)

    def head_for(self, names: Sequence[str]) -> str:
        """The head that is used when exactly these adapters are: that of the last one that has its own, else "default"."""
        return next((name for name in reversed(names) if name in self.heads), "default")

    def _forget_head(self, name: str) -> None:
        self._classes.pop(name, None)
        self._records = {key: record for key, record in self._records.items() if name not in key.split("+")}

    def _rich(self, name: str | None) -> bool:
        """Whether an adapter (None: the bare backbone) needs named outputs at its head, or stands behind it."""
        adapter: Any = None if name is None else self.adapters[name]
        return (adapter is not None and adapter.behind_head) or isinstance(self.heads[self._head_of(name)], Head)

    def _head_of(self, name: str | None) -> str:
        """The head that serves an adapter alone."""
        return name if name is not None and name in self.heads else "default"

    def reset_head(
        self, num_classes: int, classes: Sequence[str] | None = None, kind: str = "linear", **settings: Any
    ) -> None:
        """A new, untrained head of another width in place of the one in use; `kind` is a name of `zoo.heads.HEADS`.

        `settings` are those of the kind (`kind="cosface", margin=0.3`).

        Raises:
            ConfigError: there is no name for each class, no such kind, or a setting that it does not have.
        """
        num_classes = WIDTH.of("num_classes", num_classes)
        if classes is not None and (isinstance(classes, str) or len(classes) != num_classes):
            raise ConfigError(
                f"num_classes is {num_classes}, and classes {classes!r}; expected a list of as many names."
            )
        check_texts(classes or ())
        refuse(
            self, ConfigError, "a new head would not be spread with the rest", "Make it first, then call fully_shard."
        )
        dim, name = self._feature_dim(self._active_adapters()), self._place_of_head()
        made_for: Any = dict(self.adapters.items()).get(name)
        if num_classes and kind == "linear" and made_for is not None:
            kind = made_for.head_kind or kind
        self.heads[name] = head = self._new_head(num_classes, dim, made_for, kind, settings)
        if isinstance(head, Head) and classes is not None:
            head.name_classes(classes)
        self.take_names(classes)
        self.train(self.training)

    def set_head(self, head: nn.Linear, classes: Sequence[str] | None = None) -> None:
        """Put a head (one of `zoo.heads`) in place of the one in use, with the names of its classes.

        Raises:
            ConfigError: it does not stand on features of this width, or has no name for each class.
        """
        refuse(
            self, ConfigError, "a new head would not be spread with the rest", "Put it first, then call fully_shard."
        )
        dim = self._feature_dim(self._active_adapters())
        if head.in_features != dim:
            raise ConfigError(f"the head takes features of width {head.in_features}; the model gives {dim}.")
        if classes is not None and len(classes) != head.out_features:
            raise ConfigError(
                f"the head has {head.out_features} outputs, and there are {len(classes)} names of classes."
            )
        self.heads[self._place_of_head()] = head.to(device=self.device, dtype=self.adapter_dtype)
        self.classes = list(classes) if classes is not None else None
        self.train(self.training)

    def grow_head(self, classes: Sequence[str], std: float = 0.02) -> None:
        """Further classes for the head in use: their rows are new, N(0, std^2), those that it has stay to the bit.

        A model without a head gets one. All adapters that use this head see the new classes.

        Raises:
            ConfigError: no class, one that the head has already, or a head whose classes have no names or cannot grow.
        """
        if isinstance(classes, str):
            raise ConfigError(f"classes is '{classes}'; expected a list of names, ['{classes}'].")
        names, width = [str(c) for c in classes], self.num_classes
        check_texts(names)
        own = self.classes or []
        if width and len(own) != width:
            raise ConfigError(
                f"The head has {width} outputs whose classes have no names, so it cannot be told which ones are new. Name them: "
                "model.classes = [...]."
            )
        double = [n for i, n in enumerate(names) if n in own or n in names[:i]]
        if double or not names:
            what = f"'{double[0]}' is a class that it has already" if double else "no class is named"
            raise ConfigError(f"The head cannot grow: {what}. Give the names of classes that are new, each once.")
        if width:
            self.heads[self.head_name] = grown(self.head, len(names), std)
        else:
            self.reset_head(len(names))
            with torch.no_grad():
                for part in self.head.modules():
                    if isinstance(part, nn.Linear) and part.weight.device.type != "meta":
                        nn.init.normal_(part.weight, std=std)
        self.classes = [*own, *names]
        self.train(self.training)

    def _place_of_head(self) -> str:
        if self.head_name == "default" and self._feature_dim(self._active_adapters()) != self.family.feature_dim:
            return self._state.active[-1]  # the bare backbone needs its own
        if self.head_name == "default" and self._active_adapters() and self._active_adapters()[-1].head_kind:
            return self._state.active[-1]
        return self.head_name

    def _feature_dim(self, adapters: Sequence[Adapter]) -> int:
        own = dim = self.family.feature_dim
        for adapter in adapters:
            dim = adapter.feature_dim(dim)
            if dim != own and not self.family.pools:
                raise AttachError(
                    f"'{adapter.method}' puts features of its own beside pooled ones, and '{self.family.name}' pools nothing. "
                    "Load it with a pooling (global_pool), or use another method."
                )
        return dim

    def _new_head(
        self,
        num_classes: int,
        dim: int,
        adapter: Adapter | None = None,
        kind: str = "linear",
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> nn.Module:
        num_classes = WIDTH.of("num_classes", num_classes)
        if num_classes == 0:
            return nn.Identity()
        own, factory = dim == self.family.feature_dim, {"device": self.device, "dtype": self.adapter_dtype}
        plain = kind == "linear" and own and not settings
        made: type[Any] = nn.Linear if plain else head_class(kind)
        if not self.family.pools and "pooled" in getattr(made, "needs", ("pooled",)):
            raise ConfigError(
                f"'{self.family.name}' has no pooled features that a classifier could stand on: its own output comes out. Leave "
                "num_classes out."
            )
        if issubclass(made, Head):
            self.family.check_wanted(made.needs, f"a head of the kind '{kind}'")
            if made.of_maps:
                factory["channels"] = self.family.map_channels
        head = (
            self.family.new_head(num_classes, **factory)
            if plain
            else make_head(kind, dim, num_classes, settings, **factory)
        )
        if self.device.type != "meta" and not getattr(head, "own_start", False):
            for part in head.modules():
                if isinstance(part, nn.Linear):
                    nn.init.trunc_normal_(part.weight, std=0.02)
                    nn.init.zeros_(part.bias)
        widened = isinstance(head, nn.Linear) and not own and self.device.type != "meta"
        if adapter is not None and (adapter.head_kind == kind or widened):
            adapter.init_head(head)
        return head


def _several(names: str | Sequence[str]) -> Sequence[str]:
    return (names,) if isinstance(names, str) else names


def _key(names: Sequence[str]) -> str:
    return "+".join(names)
