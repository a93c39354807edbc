"""Second order: when every op must be differentiable twice, and how an op that is not says so.

Some ops here have a backward of their own, written by hand: low-rank products, single tuned entries of a weight, the few
queries of VQT, the selective scan. It gives numbers and no graph, so a gradient of these numbers (Hessian-vector products,
gradient penalties, meta-learning) would silently lack a part. Two things make that impossible:

- `first_order` decorates such a backward. Asked for a graph (`create_graph=True`) it raises a `DerivativeError`.
- `exact()` says whether an op must take the way that is differentiable as often as one likes, plain operations of torch. It is
  true inside of `with zoo.second_order(model):` and inside of torch's own transforms (`torch.func.grad`, `vmap`, `jvp`, forward
  mode), which follow no backward written by hand and no saved-tensor hooks. No recipe is kept then and no block is checkpointed;
  the context also has attention formed in the open, since no fused product has a second derivative.

A gradient that is handed straight through a step (a mask that is learned, rounding) is that of no function and has no derivative
at all. `straight` refuses it in both places, and the method says so in `Adapter.straight_through`.

Numbers: the plain operations give what the fast ones give to the last few bits, and keep more for backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoo.errors import ConfigError, DerivativeError

_open = 0  # contexts that are open now, of any model: an op knows no model, and an exact op too many is only slower
_lock = Lock()
Backward = TypeVar("Backward", bound=Callable[..., Any])
ADVICE = (
    "Run the forward pass inside `with zoo.second_order(model):`, where every op is made of operations that torch "
    "differentiates any number of times. For first derivatives leave create_graph=True out."
)
STRAIGHT = (
    "that is handed straight through its step: it is the gradient of no function, and has no derivative, neither inside of "
    "`with zoo.second_order(model):` nor in torch's transforms. First derivatives are those of loss.backward(); for more, switch "
    "this method off, or merge it."
)


def exact() -> bool:
    """Whether an op must be differentiable any number of times, and keep no recipes: see above."""
    if (
        torch.compiler.is_compiling()
    ):  # compiled graphs are made of plain operations, and torch refuses their second derivative
        return False
    if torch._C._is_tracing():  # `torch.jit.trace` knows no functions with a backward of their own
        return True
    return _open > 0 or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def whole(what: str) -> bool:
    """Whether a part that a method holds constant for the gradient, by definition, is differentiated: inside `second_order`.

    Raises:
        DerivativeError: inside of one of torch's transforms alone, where nobody can tell which of the two is meant.
    """
    if torch._C._is_tracing():
        return False
    if _open == 0 and exact() and torch.is_grad_enabled():
        raise DerivativeError(
            f"{what} counts as a constant in this method's gradient, so that gradient has no derivative, and a transform of "
            "torch does not say which one it takes. Inside `with zoo.second_order(model):` it is differentiated like all else."
        )
    return exact()


def straight(what: str) -> None:
    """To be called by an op whose gradient is handed straight through a step: it has a first derivative only.

    Raises:
        DerivativeError: inside of `second_order`, or of one of torch's transforms, while gradients are recorded.
    """
    if exact() and torch.is_grad_enabled() and not torch._C._is_tracing():
        raise DerivativeError(f"{what} is trained by a gradient {STRAIGHT}")


@contextmanager
def second_order(model: nn.Module) -> Iterator[None]:
    """Forward passes inside build graphs that can be differentiated any number of times; backward may run outside.

    Args:
        model: a `zoo.Model` (or a module that holds one). Its parameters, mode and settings stay as they are.

    Raises:
        ConfigError: the model is compiled: torch's compiled graphs have no second derivative.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"second_order takes a model, not a {type(model).__name__}: `with zoo.second_order(model): ...`."
        )
    for part in model.modules():
        if part._compiled_call_impl is not None or type(part).__name__ == "OptimizedModule":
            raise ConfigError(
                "second_order was given a compiled model, and torch's compiled graphs cannot be differentiated twice. Give it "
                "(and call) the model that torch.compile was given."
            )
    global _open
    with _lock:
        _open += 1
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        with _lock:
            _open -= 1


def first_order(backward: Backward) -> Backward:
    """Decorates the backward of an autograd function that gives numbers and no graph: asked for a graph, it raises.

    torch's `once_differentiable` does not do: it raises only where the incoming gradient itself depends on something, and
    passes the numbers on as constants where it does not.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            name = type(ctx).__name__.removesuffix("Backward").lstrip("_")
            if getattr(ctx, "straight", False):
                raise DerivativeError(f"the backward of '{name}' gives a gradient {STRAIGHT}")
            raise DerivativeError(f"the backward of '{name}' gives numbers and no graph (create_graph=True). {ADVICE}")
        return backward(ctx, *grads)

    return checked  # type: ignore[return-value]


class _Surrogate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def surrogate(x: Tensor) -> Tensor:
    """`x`, computed with a part held constant for the gradient: a graph of that gradient would not be its derivative.

    For methods that hold something constant by definition; where `whole` is true they differentiate it.
    """
    return _Surrogate.apply(x) if x.requires_grad and not torch.compiler.is_compiling() else x
