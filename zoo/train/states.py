"""The state of a whole model: the tensors of all adapters and heads, in use or not, and what adapters say of themselves.

A `Snapshot` (`zoo.train.checkpoint`) holds what a fit may change; a `State` everything that a regime may.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.errors import MismatchError
from zoo.train.checkpoint import pack_extra, unpack_extra

if TYPE_CHECKING:
    from zoo.model import Model

__all__ = ["State", "take"]


class State:
    """Tensors of all adapters and heads of a model, on the CPU, and what adapters say of themselves."""

    def __init__(self, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        self.tensors, self.about = tensors, about

    def put(self, model: Model) -> None:
        """Put it back into a model of the same structure.

        Raises:
            MismatchError: the model has other adapters or heads, or of other shapes.
        """
        if list(self.about["adapters"]) != list(model.adapters):
            raise MismatchError(
                f"The state is of a model with the adapters {', '.join(self.about['adapters']) or 'none'}; this one has "
                f"{', '.join(model.adapters) or 'none'}. Give the same model as before, or pass resume=False."
            )
        for name, about in self.about["adapters"].items():
            adapter: Any = model.adapters[name]
            if about["plan"] != adapter.plan:
                adapter.plan = about["plan"]
                model.reattach(name)
            if "extra" in about:
                adapter.load_extra_state(model, unpack_extra(about["extra"], self.tensors))
        own = _tensors(model)
        for name, value in self.tensors.items():
            if name.startswith("extra:"):
                continue
            mine = own.get(name)
            if mine is None or mine.shape != value.shape:
                found = "is missing" if mine is None else f"has shape {tuple(mine.shape)}"
                raise MismatchError(
                    f"The state holds '{name}' of shape {tuple(value.shape)}; in this model it {found}. Give the "
                    "same model as before, or pass resume=False."
                )
            with torch.no_grad():
                mine.copy_(value)
        model._classes, model._records = copy.deepcopy((self.about["classes"], self.about["records"]))


def take(model: Model) -> State:
    """The present state of a model: copies."""
    tensors = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in _tensors(model).items()}
    adapters: dict[str, Any] = {}
    for name in model.adapters:
        adapter: Any = model.adapters[name]
        adapters[name] = {"plan": adapter.plan}
        if (extra := adapter.extra_state()) is not None:
            adapters[name]["extra"] = pack_extra(extra, name, tensors)
    known = copy.deepcopy({"classes": model._classes, "records": model._records})
    return State(tensors, {"adapters": adapters, **known})


def _tensors(model: Model) -> dict[str, Tensor]:
    owners = [(name, model.adapters[name]) for name in model.adapters]
    owners += [(f"head:{name}", head) for name, head in model.heads.items()]
    return {
        f"{owner}/{name}": tensor
        for owner, module in owners
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }
