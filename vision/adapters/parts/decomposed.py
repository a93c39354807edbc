"""What both forms of Polyhistor have in common: the width q of the factors, and where the bottlenecks stand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoo.adapters.parts.of_tasks import OfTasks


class Decomposed(OfTasks):
    """Base of methods whose matrices are made as products `P Q` of q columns and rows."""

    if TYPE_CHECKING:  # fields of the methods
        inner: int | None
        inner_reduction: float | None
        insert: str

    def check_inner(self) -> None:
        """Check q and the place; no q at all is the caller's to fill in."""
        given = self.inner is not None and self.inner_reduction is not None
        self.check(not given, "inner and inner_reduction are both given; give one of them.")
        self.check(self.inner is None or self.inner >= 1, f"inner is {self.inner}; expected 1 or more.")
        self.check(
            self.inner_reduction is None or self.inner_reduction > 0,
            f"inner_reduction is {self.inner_reduction}; expected above 0.",
        )
        self.check(
            self.insert in ("serial", "parallel"), f"insert is {self.insert!r}; expected 'serial' or 'parallel'."
        )

    @property
    def sequential(self) -> bool:  # type: ignore[override]
        """Whether the bottlenecks stand behind the sublayers."""
        return self.insert == "serial"

    def inner_at(self, dim: int, bottleneck: int) -> int:
        """q of the factors of matrices (bottleneck, dim)."""
        return self.inner or max(1, int(min(dim, bottleneck) / (self.inner_reduction or 1)))
