"""What children cost: parameters, operations, bytes, and measured time; additive over sublayers.

A sublayer's time is that of its block with nothing in place of the other one, less that of a block of nothing at all; the
fastest of so many runs, in one thread. On a CPU the clock is that of the thread, which other programs do not slow. Sublayers
of equal shapes are measured once. What is not in any sublayer (embeddings, norms at the end, merging, the head) is the rest;
it is taken off a budget first.

    cache of a block that has h_kv heads of keys and values, in MiB:  2 h_kv c tokens texts bytes / 2^20

Source: NVIDIA/Model-Optimizer, `modelopt/torch/puzzletron/subblock_stats`. Deviation: theirs measures time by vLLM.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from zoo.families.children import NONE, ROLES, Form
from zoo.model import Model
from zoo.model.children import child_of, own_tensors, places
from zoo.puzzle.library import text_of
from zoo.puzzle.passes import Call, call_of
from zoo.tasks.base import call

__all__ = ["RESOURCES", "cache_mib", "costs_of", "fastest", "operations", "single_thread", "totals"]

RESOURCES = ("runtime", "parameters", "operations", "memory")  # ms, numbers, floating-point operations, MiB
MIB = 2**20

Table = dict[str, dict[str, dict[str, float]]]


def cache_mib(heads: int, width: int, tokens: int, texts: int = 1, size: int = 2) -> float:
    """MiB of keys and values of one block: `tokens` of each of `texts`, numbers of `size` bytes."""
    return 2 * heads * width * tokens * texts * size / MIB


@contextmanager
def single_thread() -> Iterator[None]:
    """A context in which torch computes in one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def fastest(runs: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of the fastest of `repeats` runs of each function, in turn, so that all see the same disturbances."""

    def once(run: Callable[[], Any]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            run()
            torch.cuda.synchronize(device)
            return time.perf_counter() - start
        start = time.thread_time()
        run()
        return time.thread_time() - start

    found = dict.fromkeys(runs, float("inf"))
    with single_thread():
        for run in runs.values():
            run()
        for _ in range(repeats):
            for name, run in runs.items():
                found[name] = min(found[name], 1000 * once(run))
    return found


@torch.no_grad()
def operations(run: Callable[[], Any]) -> float:
    """Floating-point operations of products and attentions."""
    # attention as plain products: torch does not count those of its fused kernel on CPUs
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return float(counter.get_total_flops())


def totals(model: Model, inputs: Any, repeats: int, tokens: int = 0, texts: int = 1) -> dict[str, float]:
    """What a whole model costs on a batch, adapters and head included."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    blocks = {block.name: block.module for block, _ in places(model).values()}
    kept = sum(_cache(block, tokens, texts) for block in blocks.values())
    return {
        "runtime": fastest({"all": lambda: call(model, inputs)}, repeats, model.device)["all"],
        "parameters": float(sum(p.numel() for p in model.parameters())),
        "operations": operations(lambda: call(model, inputs)),
        "memory": size / MIB + kept,
    }


def costs_of(
    model: Model, forms: Mapping[str, Sequence[Form]], inputs: Any, repeats: int, tokens: int = 0, texts: int = 1
) -> Table:
    """Costs of each form of each sublayer on a batch, by resource."""
    makes, known = type(model.family).children(), places(model)
    found: Table = {}
    measured: dict[Any, float] = {}
    for name, choices in forms.items():
        block, role = known[name]
        other = f"{block.name}.{next(r for r in ROLES if r != role)}"
        seen = call_of(model, block.module, inputs)
        bare = _without(model, other, child_of(model, name, NONE))
        runs: dict[Any, Callable[[], Any]] = {}
        found[name] = {}
        for form in choices:
            child = _without(model, other, child_of(model, name, form))
            own = own_tensors(child, makes, role)
            found[name][text_of(form)] = {
                "parameters": float(sum(v.numel() for v in own.values())),
                "operations": operations(_running(child, seen)) - operations(_running(bare, seen)),
                "memory": sum(v.numel() * v.element_size() for v in own.values()) / MIB
                + (_cache(child, tokens, texts) if role == "attn" else 0.0),
            }
            runs[_shape(child, role, own, seen, form)] = _running(child, seen)
        keys = list(runs)
        if any(key not in measured for key in keys):
            times = fastest({"": _running(bare, seen), **runs}, repeats, model.device)
            measured |= {key: max(0.0, times[key] - times[""]) for key in keys if key not in measured}
        for form, key in zip(choices, keys, strict=True):
            found[name][text_of(form)]["runtime"] = measured[key]
    return found


def _running(block: nn.Module, seen: Call) -> Callable[[], Any]:
    return lambda: seen.run(block)


def _without(model: Model, other: str, block: nn.Module) -> nn.Module:
    """A block with nothing in place of its other sublayer, unless that is nothing already."""
    name, _, role = other.rpartition(".")
    makes = type(model.family).children()
    if makes.size(name, block, role):
        makes.put(name, block, role, NONE)
    return block


def _shape(child: nn.Module, role: str, own: Mapping[str, Any], seen: Call, form: Form) -> Any:
    """What a sublayer's time depends on."""
    given = [tuple(x.shape) for x in (*seen.args, *seen.kwargs.values()) if isinstance(x, torch.Tensor)]
    tensors = [(key, tuple(value.shape)) for key, value in own.items()]
    windows = [str(getattr(child, name, "")) for name in ("window_size", "shift_size")]
    return (
        type(child).__name__,
        role,
        str(tensors),
        str(given),
        *windows,
        text_of(form) if isinstance(form, str) else "",
    )


def _cache(block: nn.Module, tokens: int, texts: int) -> float:
    attention: Any = getattr(block, "self_attn", None)
    projection = getattr(attention, "k_proj", None)
    if not tokens or projection is None:
        return 0.0
    size = projection.weight.element_size()
    return cache_mib(projection.out_features // attention.head_dim, attention.head_dim, tokens, texts, size)
