"""Progress on the terminal: a bar for what runs, a line for each epoch. The lines go to the logger `zoo.train`, too.

logging.basicConfig(level=logging.INFO)          # or: logging.getLogger("zoo").addHandler(...)
zoo.fit(model, train, val, progress=False)
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

__all__ = ["Progress", "epoch_line"]

_LOG = logging.getLogger("zoo.train")
T = TypeVar("T")


class Progress:
    """`with Progress(shown) as bar: for x in bar.over(xs, "training", n): ...`. Without a terminal only lines are printed."""

    def __init__(self, shown: bool, logged: bool = False) -> None:
        self.shown, self.logged = shown, logged
        self._bars: Any = None

    def __enter__(self) -> Progress:
        if self.shown:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            console = Console(stderr=True)
            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("[dim]{task.fields[note]}"),
                console=console,
                transient=True,
                disable=not console.is_terminal,
            )
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def task(self, description: str, total: int, done: int = 0) -> Any:
        """A new bar; give it to `move` and `end`."""
        if self._bars is None:
            return None
        return self._bars.add_task(description, total=total, completed=done, note="")

    def move(self, task: Any, note: str = "") -> None:
        if self._bars is not None:
            self._bars.update(task, advance=1, note=note)

    def end(self, task: Any) -> None:
        if self._bars is not None:
            self._bars.remove_task(task)

    def over(self, items: Iterable[T], description: str, total: int) -> Iterator[T]:
        task = self.task(description, total)
        try:
            for item in items:
                yield item
                self.move(task)
        finally:
            self.end(task)

    def line(self, text: str) -> None:
        """A line that stays."""
        if self.logged:
            _LOG.info("%s", text)
        if self._bars is not None:
            self._bars.console.print(text, highlight=False, soft_wrap=True)


def epoch_line(record: dict[str, Any], epochs: int, best: bool, items: str) -> str:
    """What is said of an epoch."""
    parts = [f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}"]
    for title, prefix in (("training", ""), ("validation", "val_")):
        if f"{prefix}loss" in record:
            accuracy = f", accuracy {100 * record[f'{prefix}accuracy']:.1f} %" if f"{prefix}accuracy" in record else ""
            parts.append(f"{title}: loss {record[f'{prefix}loss']:.4f}{accuracy}")
    return "   ".join([*parts, f"{record['images_per_second']:.0f} {items}/s", *(["best so far"] if best else [])])
