"""The compatibility table: every cell is run, none is blank, and none fails with a foreign error."""

from __future__ import annotations

import json

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


def test_command_line_shows_the_table() -> None:
    from typer.testing import CliRunner

    from zoo.cli import app

    result = CliRunner().invoke(app, ["list", "linear", "--table", "--json"])
    cells = json.loads(result.output)
    assert {c["family"] for c in cells} >= {"vit", "swin"} and {c["method"] for c in cells} == {"linear"}
    assert all(c[step] for c in cells for step in STEPS)
    wrong = CliRunner().invoke(app, ["list", "lineer", "--table"])
    assert wrong.exit_code == 1 and "linear" in wrong.output
