"""Whether a classifier may be taken off: on the example, it gives on the features what the network itself gives.

A forward may do more behind its classifier (a softmax, a second classifier, a change in place), in front of it (a norm that is
part of the classifier), or read it (its `in_features`). Only numbers show all of these.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.families.generic.conventions import Plain, Timm
from zoo.families.generic.watch import Pass, run

_LOG = logging.getLogger("zoo")
LARGE = 500_000_000  # parameters beyond which numbers cost too much
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class Taken:
    """A classifier that was taken, or why none was.

    Args:
        convention: of the network; `whole` and `path` afterwards say what was done.
        seen: the pass that shows which modules make the output; None: not looked at.
        call: the example; None: there are no numbers to compare.
        asked: a width of a new head was given, so timm's classifier goes in any case.
    """

    def __init__(
        self,
        convention: Plain,
        module: nn.Module,
        seen: Pass | None,
        call: tuple[tuple[Any, ...], Mapping[str, Any]] | None,
        asked: bool,
    ) -> None:
        self.head: nn.Linear | None = None
        self.why = ""
        timm = isinstance(convention, Timm)
        if timm and asked:
            convention.take_head(module, seen)
            return
        held = _classifier(module) if timm else None
        if held is not None and not isinstance(held, nn.Linear):
            self._keep(convention, f"its classifier is a {type(held).__name__}, no nn.Linear on the features")
            return
        numbers = call if _counted(module) and convention.stands(module, seen) else None
        own = None if numbers is None else _numbers(module, convention.own, numbers)
        before = _shape_of(module)
        head = convention.take_head(module, seen)
        if head is None:
            return
        if own is None or _equal(own, lambda: head(_numbers(module, convention.call, numbers, broken=True))):
            self.head = head
            return
        _restore(before)
        where = f"'{convention.path}' " if convention.path else ""
        self._keep(convention, f"its classifier {where}on the features does not give what the network itself gives")

    def _keep(self, convention: Plain, why: str) -> None:
        convention.path, convention.whole, self.why = None, True, why


def told(module: nn.Module, name: str, why: str) -> None:
    """Say that no classifier was taken."""
    _LOG.warning(
        "'%s' (%s): %s. Nothing is taken off, and its own output comes out (num_classes is 0); ask for features with "
        "num_classes=0, or for a new head with num_classes=.",
        name,
        type(module).__name__,
        why,
    )


def _classifier(module: Any) -> nn.Module | tuple[Any, ...] | None:
    """timm's classifier; None where the network has none."""
    held = module.get_classifier()
    if isinstance(held, nn.Identity) or held is None:
        return None
    parts = held if isinstance(held, (tuple, list, nn.ModuleList)) else [held]
    if all(isinstance(part, nn.Identity) or part is None for part in parts):
        return None
    return held  # type: ignore[no-any-return]


def _counted(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return all(p.device.type != "meta" for p in parameters) and sum(p.numel() for p in parameters) <= LARGE


def _numbers(module: nn.Module, call: Callable[..., Tensor], given: Any, broken: bool = False) -> Any:
    inputs, kwargs = given
    try:
        return run(module, lambda *a, **k: call(module, *a, **k), inputs, kwargs, numbers=True).output
    except Exception:
        if broken:
            raise
        return None  # the example does not run; the pass says so


def _equal(own: Tensor, answer: Callable[[], Tensor]) -> bool:
    try:
        with torch.no_grad():
            made = answer()
    except Exception:  # a forward that reads its classifier
        return False
    if made.shape != own.shape:
        return False
    bound = TOLERANCE.get(own.dtype, 1e-3)
    scale = float(own.abs().max()) if own.numel() else 0.0
    return torch.allclose(made.double(), own.double(), rtol=bound, atol=bound * scale, equal_nan=True)


def _shape_of(module: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """What every module holds, without a copy of its weights."""
    kept = []
    for part in module.modules():
        held = dict(part.__dict__)
        kept.append(
            (part, {k: v.copy() if k in ("_modules", "_parameters", "_buffers") else v for k, v in held.items()})
        )
    return kept


def _restore(kept: list[tuple[nn.Module, dict[str, Any]]]) -> None:
    for part, held in kept:
        part.__dict__.clear()
        part.__dict__.update(held)
