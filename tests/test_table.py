"""The compatibility table: every cell is run, none is blank, and none fails with a foreign error."""

from __future__ import annotations

import pytest

import zoo
from zoo.table import STEPS, as_markdown

CASES = [(f, m) for f in ("vit", "swin") for m in zoo.list_adapters()]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_cell(family: str, method: str) -> None:
    (cell,) = zoo.compatibility([family], [method])
    answers = {step: getattr(cell, step) for step in STEPS}
    assert all(answers.values())
    assert not [a for a in answers.values() if a.startswith("defect") or a == "not reached"], answers


def test_markdown_names_reasons_once() -> None:
    cells = zoo.compatibility(["vit"], ["lora", "linear"])
    text = as_markdown(cells)
    assert text.count("\n| `") == 2
    assert "attach, train, save, merge" in text
