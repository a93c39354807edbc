"""A head that gets further outputs and keeps those that it has: for classes that come in sessions."""

from __future__ import annotations

import copy

import torch
from torch import nn

from zoo.errors import ConfigError
from zoo.heads.text import TextHead

__all__ = ["grown"]


def grown(head: nn.Module, more: int, std: float = 0.02) -> nn.Module:
    """A copy of a head with `more` further outputs behind its own: weight (K + more, d), bias (K + more,).

    The old rows are kept to the bit; the new ones are N(0, std^2), their biases 0.

    Raises:
        ConfigError: a head whose rows are not its classes.
    """
    width = int(getattr(head, "out_features", 0))
    if isinstance(head, TextHead):  # its classes are names
        if head.specific:
            raise ConfigError(
                "The head cannot grow: its classes have contexts of their own, and new ones would have none."
            )
        named = copy.deepcopy(head)
        named.out_features, named.classes = width + more, None
        return named
    twin = copy.deepcopy(head)
    layers = [m for m in twin.modules() if isinstance(m, nn.Linear) and len(m.weight) == width]
    if not layers or sum(len(m._parameters) for m in twin.modules()) != sum(len(m._parameters) for m in layers):
        raise ConfigError(
            f"A head of the kind {type(head).__name__} cannot grow: its classes are not the rows of linear layers. Put a linear "
            "head in its place: model.reset_head(...)."
        )
    for layer in layers:
        for name, parameter in layer._parameters.items():
            if parameter is not None:
                new = parameter.new_zeros(more, *parameter.shape[1:])
                if parameter.ndim > 1 and new.device.type != "meta":
                    nn.init.normal_(new, std=std)
                joined = nn.Parameter(torch.cat([parameter.detach(), new]), requires_grad=parameter.requires_grad)
                layer._parameters[name] = joined
        layer.out_features = width + more
    twin.out_features = width + more  # type: ignore[assignment]
    return twin
