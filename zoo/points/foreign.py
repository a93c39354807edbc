"""Projections whose weight another library has quantised: hooks on their output work, their weight is not read or changed."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["is_packed", "kept_by"]

LIBRARIES = ("torchao", "bitsandbytes")
PACKED = ("gptqmodel", "auto_gptq", "awq")  # of GPTQ and AWQ: modules of their own, with whole numbers in buffers


def is_packed(module: nn.Module) -> bool:
    """Whether this is a projection of a GPTQ or AWQ checkpoint, as the library that transformers asks for makes it."""
    numbers = module._buffers.get("qweight")
    theirs = any(kind.__module__.partition(".")[0] in PACKED for kind in type(module).__mro__)
    return theirs and numbers is not None and hasattr(module, "in_features") and hasattr(module, "out_features")


def kept_by(module: nn.Module) -> str:
    """How a library keeps a projection's weight ("as Int8Tensor of torchao"); "" where it is an ordinary one, or none."""
    weight = module._parameters.get("weight")
    if weight is None:
        return f"as {type(module).__name__} of {type(module).__module__.partition('.')[0]}" if is_packed(module) else ""
    for kind in (type(weight.data), type(weight), type(module)):
        library = kind.__module__.partition(".")[0]
        if library in LIBRARIES and (kind is not type(module) or not weight.is_floating_point()):
            held: type[Tensor] | type[nn.Module] = kind
            return f"as {held.__name__} of {library}"
    return ""
