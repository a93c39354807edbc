"""Per-sample adapters: each row of a batch is served by the adapter named for it, in training too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.errors import ConfigError

if TYPE_CHECKING:
    from zoo.model import Model


def forward_routed(
    model: Model, inputs: tuple[Any, ...], names: Sequence[str | None], kwargs: dict[str, Any]
) -> Tensor:
    """Logits (B, num_classes); row i is what the model gives with only `names[i]` active (None: no adapter).

    Where every op of the named adapters works row by row, the batch goes through the backbone once. Methods that change the
    sequence or the backbone's parameters go through in one sub-batch for each adapter; the result is the same.

    Raises:
        UnknownNameError: an adapter that is not attached.
        ConfigError: not one name for each sample, or adapters whose heads have different widths.
    """
    model.family.check_routed(*inputs)
    batch = next(t for t in inputs if isinstance(t, Tensor)).shape[0]
    if len(names) != batch:
        raise ConfigError(
            f"adapters= has {len(names)} names for a batch of {batch}; give one name (or None) for each sample."
        )
    order = list(dict.fromkeys(names))
    for name in order:
        if name is not None:
            model._known(name)
    device = model.device
    rows = {n: torch.tensor([i for i, m in enumerate(names) if m == n], device=device) for n in order}
    active, trained = model.active, {k: p.requires_grad for k, p in model.named_parameters()}
    try:
        single_pass = all(
            n is None
            or (
                all(op.per_row for _, op in model._ops[n])
                and not model._swaps[n]
                and not model.adapters[n].trains_backbone
            )
            for n in order
        )
        if single_pass:
            parts = _single_pass(model, inputs, rows, kwargs)
        else:
            parts = {}
            for name, index in rows.items():
                model.set_active(*([] if name is None else [name]))
                _restore(model, trained)
                part = [t.index_select(0, index) if isinstance(t, Tensor) else t for t in inputs]
                parts[name] = model.features(*part, **kwargs)
        outputs = []
        for name in order:
            model._state.active = () if name is None else (name,)
            features = model.adapters[name].features(parts[name]) if name and single_pass else parts[name]  # type: ignore[operator]
            outputs.append(model.head(features))
    finally:
        for name in order:
            if name is not None:
                model.adapters[name].release()  # type: ignore[operator]
        model.set_active(*active)
        _restore(model, trained)
    widths = {tuple(o.shape[1:]) for o in outputs}
    if len(widths) > 1:
        shapes = ", ".join(f"{n}: {tuple(o.shape[1:])}" for n, o in zip(order, outputs))
        raise ConfigError(
            f"the heads of the named adapters have different widths ({shapes}); call the model once for each."
        )
    joined = torch.cat(outputs)
    back = torch.empty(batch, dtype=torch.long, device=device)
    back[torch.cat([rows[n] for n in order])] = torch.arange(batch, device=device)
    return joined.index_select(0, back)


def _single_pass(
    model: Model, inputs: tuple[Any, ...], rows: dict[str | None, Tensor], kwargs: dict[str, Any]
) -> dict[str | None, Tensor]:
    state = model._state
    model.set_active(*(n for n in rows if n is not None))
    state.route = {n: r for n, r in rows.items() if n is not None}
    state.batch = sum(len(r) for r in rows.values())
    try:
        with state.saver.record(model.device):
            pooled = model.family.features(*inputs, **kwargs)
    finally:
        state.route = None
    return {name: pooled.index_select(0, index) for name, index in rows.items()}


def _restore(model: Model, trained: dict[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained.get(name, parameter.requires_grad))
