"""The settings of VL-Adapter: what each form fills in, and which go together."""

from __future__ import annotations

import dataclasses
from typing import Any

from zoo.adapters.parts.bottleneck import ACTIVATIONS

PRESETS: dict[str, dict[str, Any]] = {
    "adapter": {"reduction": 8.0, "unfreeze": "norms"},
    "compacter": {"reduction": 8.0, "unfreeze": "norms"},
    "hyperformer": {"reduction": 8.0, "hidden": 128, "unfreeze": "norms"},
    "lora": {"rank": 128, "alpha": 32.0, "dropout": 0.1, "unfreeze": "biases"},
    "prompt": {"hidden": 800, "unfreeze": "none"},
}
# Settings that are of some forms alone; what another form would not read is refused
BOTTLENECKS = ("adapter", "compacter", "hyperformer")
OWN: dict[str, tuple[str, ...]] = {
    "rank": (*BOTTLENECKS, "lora"),
    "n": ("compacter",),
    "alpha": ("lora",),
    "dropout": ("lora",),
    "hidden": ("hyperformer", "prompt"),
    "task_dim": ("hyperformer",),
    "projected": ("hyperformer",),
    "num_tokens": ("prompt",),
    "activation": BOTTLENECKS,
    "start": ("adapter", "prompt"),
}
SHARING = ("single", "half-up", "half-down", "multiple")


def read_by(kind: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a `kind` of adapter, those that its form does not read at their defaults."""
    defaults = {f.name: f.default for f in dataclasses.fields(kind)}
    form = settings.get("form", defaults["form"])
    return {k: defaults[k] if form not in OWN.get(k, (form,)) else v for k, v in settings.items()}


def complete(adapter: Any) -> None:
    """Fill in what was left at None, and check all.

    Raises:
        ConfigError: settings that cannot be, or not together.
    """
    adapter.tasks = tuple(adapter.tasks)
    adapter.check(adapter.form in PRESETS, f"form is {adapter.form!r}; expected one of {', '.join(PRESETS)}.")
    defaults = {f.name: f.default for f in dataclasses.fields(adapter)}
    for name, forms in OWN.items():
        told = f"the form{'s' if len(forms) > 1 else ''} {' and '.join(map(repr, forms))}"
        adapter.check(
            adapter.form in forms or getattr(adapter, name) == defaults[name],
            f"{name} is of {told}, and this is {adapter.form!r}, which does not read it. Leave it out.",
        )
    for name, value in PRESETS[adapter.form].items():  # so that the settings that are saved are those in use
        if getattr(adapter, name) is None and not (name == "reduction" and adapter.rank is not None):
            setattr(adapter, name, value)
    adapter.check(adapter.sharing in SHARING, f"sharing is {adapter.sharing!r}; expected one of {', '.join(SHARING)}.")
    half, hyper = adapter.sharing.startswith("half"), adapter.form == "hyperformer"
    adapter.check(
        not half or adapter.form in ("adapter", "compacter"),
        f"sharing={adapter.sharing!r} is of a bottleneck, and '{adapter.form}' has no up and down. Use 'single' or 'multiple'.",
    )
    adapter.check(not hyper or adapter.sharing == "single", "the hypernetwork is what tasks share; leave sharing out.")
    own = hyper or adapter.sharing != "single"
    adapter.check(
        bool(adapter.tasks) == own,
        "tasks names none; each has something of its own here, so name them all."
        if own
        else "tasks are given, and sharing='single' has one of everything for all of them: leave them out, or share less.",
    )
    adapter.check(all(adapter.tasks), "a task has an empty name.")
    adapter.check(len(set(adapter.tasks)) == len(adapter.tasks), f"tasks names one twice: {', '.join(adapter.tasks)}.")
    adapter.check(
        adapter.rank is None or adapter.reduction is None, "rank and reduction are both given; give one of them."
    )
    adapter.check(
        adapter.reduction is None or adapter.form in ("adapter", "compacter", "hyperformer"),
        f"reduction is the width of a bottleneck, and '{adapter.form}' has none.",
    )
    for name in ("rank", "n", "hidden", "task_dim", "projected", "num_tokens"):
        value = getattr(adapter, name)
        adapter.check(value is None or value >= 1, f"{name} is {value}; expected 1 or more.")
    adapter.check(
        adapter.reduction is None or adapter.reduction > 0, f"reduction is {adapter.reduction}; expected above 0."
    )
    adapter.check(adapter.alpha != 0, "alpha is 0; what is learned is multiplied by it, so it could never act.")
    adapter.check(0 <= (adapter.dropout or 0) < 1, f"dropout is {adapter.dropout}; expected 0 <= dropout < 1.")
    adapter.check(
        adapter.activation in ACTIVATIONS, f"activation is {adapter.activation!r}; known: {', '.join(ACTIVATIONS)}."
    )
    adapter.check(
        adapter.unfreeze in ("norms", "biases", "none"),
        f"unfreeze is {adapter.unfreeze!r}; expected 'norms', 'biases' or 'none'.",
    )
    adapter.check(adapter.start in ("normal", "linear"), f"start is {adapter.start!r}; expected 'normal' or 'linear'.")
    adapter.check(
        adapter.targets is None or adapter.form != "prompt", "prompts stand in front of the text; leave targets out."
    )
