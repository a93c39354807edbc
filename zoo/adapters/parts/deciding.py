"""What methods do that decide on the data what to attach: where they stand, whose loss it is, and the `plan` or what it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from zoo.adapters.base import Adapter
from zoo.errors import ConfigError
from zoo.host import Host
from zoo.tasks.base import Task
from zoo.tasks.resolve import resolve

__all__ = ["asked", "deciding", "name_in"]


def name_in(model: Host, adapter: Adapter) -> str:
    """The name of an adapter in a model.

    Raises:
        ConfigError: it is in none.
    """
    name = next((n for n, a in model.adapters.items() if a is adapter), None)
    if name is None:
        method = adapter.method
        raise ConfigError(
            f"This '{method}' is attached to no model: calibrate what model.add_adapter('{method}') returned."
        )
    return name


def asked(model: Host, adapter: Adapter, task: Task | None, what: str) -> Task:
    """The task whose loss is asked, `what` for; None: what the model is for.

    Raises:
        ConfigError: it needs a head and there is none.
    """
    found = resolve(model, task)
    adapter.check(
        model.num_classes > 0 or not found.on_head,
        f"{what}, and '{found.name}' needs a head: pass num_classes=..., or another task.",
    )
    return found


@contextmanager
def deciding(adapter: Adapter) -> Iterator[None]:
    """A context in which the plan is decided and attached; if that fails it is what it was."""
    before = adapter.plan
    try:
        yield
    except BaseException:
        adapter.plan = before
        raise
