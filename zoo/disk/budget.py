"""What attaching a saved adapter may cost: about as much memory as its own tensors and the backbone that it is for.

A config says `rank`, `num_tokens`, `num_classes`; the file says how large its tensors are. Whether the two fit is known only once
the method has attached, since each knows its own shapes, and by then the memory is taken. So while it attaches, every tensor
that is to be made is counted before it is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.errors import MismatchError

TIMES = 8  # a float16 file in a float64 model, with initial values beside
ROOM = 64 * 2**20  # bytes that may be made in any case
OTHER = "the settings are not those that it was saved with. Copy or download it again."
# Operators that make a tensor of a size that is an argument; its place among the arguments
_SIZED = {
    **dict.fromkeys(("empty", "zeros", "ones", "full", "rand", "randn", "empty_permuted", "empty_strided"), 0),
    **dict.fromkeys(("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided", "repeat"), 1),
}
_COUNTED = ("arange", "randint", "eye", "linspace", "randperm")


class Budget(TorchDispatchMode):
    """A context in which no more than `limit` bytes of new tensors are made.

    Raises:
        MismatchError: in front of the tensor that would be too much; `what` says whose settings ask for it.
    """

    def __init__(self, limit: int, what: str, advice: str = OTHER) -> None:
        super().__init__()
        self.limit, self.left, self.what, self.advice = limit, limit, what, advice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "meta":
            count = _count(func.overloadpacket.__name__, args, kwargs)
            if count:
                dtype = kwargs.get("dtype") or torch.get_default_dtype()
                self.left -= count * dtype.itemsize
                if self.left < 0:
                    raise MismatchError(
                        f"{self.what} asks for a tensor of {count:,} numbers, which is far more than its file holds: "
                        f"{self.advice}"
                    )
        return func(*args, **kwargs)


def _count(name: str, args: Any, kwargs: Any) -> int:
    """How many numbers an operator is about to make, if it is one that makes a tensor of a given size."""
    if name in _SIZED:
        size = args[_SIZED[name]] if len(args) > _SIZED[name] else kwargs.get("size", ())
        grown = args[0].numel() if name == "repeat" else 1
        return grown * math.prod(int(n) for n in size) if isinstance(size, (list, tuple)) else 0
    if name in _COUNTED:
        numbers = [n for a in args for n in (a if isinstance(a, (list, tuple)) else [a])]
        return int(max((abs(n) for n in numbers if isinstance(n, (int, float)) and not isinstance(n, bool)), default=0))
    return 0


def budget(
    folder: Path, tensors: Mapping[str, Tensor], backbone: nn.Module, settings: Mapping[str, Any] | None = None
) -> Budget:
    """The budget of attaching what a folder holds to a backbone; `settings`: the user's own, which are not in the file."""
    own = sum(t.numel() * max(t.itemsize, 4) for t in tensors.values())
    base = sum(p.numel() * p.itemsize for p in backbone.parameters() if p.device.type != "meta")
    limit = TIMES * own + 2 * base + ROOM
    if not settings:
        return Budget(limit, f"The adapter in '{folder}'")
    given = ", ".join(f"{name}={value!r:.60}" for name, value in settings.items())
    return Budget(
        limit,
        f"A start from '{folder}' with {given}",
        "values are carried to another length or rank of about the same size. Give a smaller one, or leave it out for the "
        "file's.",
    )
