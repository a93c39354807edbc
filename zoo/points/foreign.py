"""Projections whose weight another library has quantised: hooks on their output work, their weight is not read or changed."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["kept_by"]

LIBRARIES = ("torchao", "bitsandbytes")


def kept_by(module: nn.Module) -> str:
    """How a library keeps a projection's weight ("as Int8Tensor of torchao"); "" where it is an ordinary one, or none."""
    weight = module._parameters.get("weight")
    if weight is None:
        return ""
    for kind in (type(weight.data), type(weight), type(module)):
        library = kind.__module__.partition(".")[0]
        if library in LIBRARIES and (kind is not type(module) or not weight.is_floating_point()):
            held: type[Tensor] | type[nn.Module] = kind
            return f"as {held.__name__} of {library}"
    return ""
