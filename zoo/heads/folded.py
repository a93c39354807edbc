"""A head whose weights `torch.nn.utils` computes (parametrize, weight_norm, spectral_norm), as the plain one that it is now."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

__all__ = ["folded"]


def folded(head: nn.Module) -> nn.Module:
    """A head as it computes now, without what `torch.nn.utils` makes its weights of; the head itself if there is nothing."""
    old = [
        hook for part in head.modules() for hook in part._forward_pre_hooks.values() if hasattr(hook, "compute_weight")
    ]
    if not old and not any(is_parametrized(part) for part in head.modules()):
        return head
    # weights that were computed
    held = [t for part in head.modules() for t in vars(part).values() if isinstance(t, Tensor)]
    twin = copy.deepcopy(head, {id(t): t.detach().clone() for t in held}).eval()
    for part in list(twin.modules()):
        if is_parametrized(part):
            plain = {name: getattr(part, name).detach().clone() for name in part.parametrizations}  # type: ignore[operator,union-attr]
            # not `remove_parametrizations`, which takes the properties off the class, and the head itself is of it, too
            part.__class__ = type(part).__bases__[0]
            del part._modules["parametrizations"]
            for name, value in plain.items():
                part.register_parameter(name, nn.Parameter(value))
        for key, hook in list(part._forward_pre_hooks.items()):
            if hasattr(hook, "compute_weight"):  # weight_norm and spectral_norm of the older kind
                hook.remove(part)  # type: ignore[attr-defined]
                del part._forward_pre_hooks[key]
    return twin
