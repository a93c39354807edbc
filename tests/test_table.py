"""The compatibility table: every cell is run, none is blank, and none fails with a foreign error."""

from __future__ import annotations

import json

import pytest

import zoo
from zoo import registry
from zoo.table import STEPS, as_markdown

FAMILIES = registry.families()
# Works in every step on every family with points for it; merging is the method's own matter.
GENERAL = ("full", "bitfit", "lora", "adapter", "ssf", "ia3")


@pytest.mark.parametrize(("family", "method"), [(f, m) for f in FAMILIES for m in zoo.list_adapters()])
def test_cell(family: str, method: str) -> None:
    (cell,) = zoo.compatibility([family], [method])
    if "pip install" in cell.attach:
        pytest.skip(cell.attach)
    answers = [getattr(cell, step) for step in STEPS]
    assert all(answers) and not [a for a in answers if a.startswith("defect")], answers
    refused = next((i for i, a in enumerate(answers) if a != "yes"), len(answers))
    assert "not reached" not in answers[: refused + 1], answers
    if method in GENERAL:
        assert answers[:3] == ["yes"] * 3, answers


def test_markdown_names_reasons_once() -> None:
    cells = zoo.compatibility(["vit"], ["lora", "linear"])
    text = as_markdown(cells)
    assert text.count("\n| `") == 2
    assert "attach, train, save, merge" in text


def test_command_line_shows_the_table() -> None:
    from typer.testing import CliRunner

    from zoo.cli import app

    result = CliRunner().invoke(app, ["list", "linear", "--table", "--json"])
    cells = json.loads(result.output)
    assert {c["family"] for c in cells} >= {"vit", "swin"} and {c["method"] for c in cells} == {"linear"}
    assert all(c[step] for c in cells for step in STEPS)
    wrong = CliRunner().invoke(app, ["list", "lineer", "--table"])
    assert wrong.exit_code == 1 and "linear" in wrong.output
