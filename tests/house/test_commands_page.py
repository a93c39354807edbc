"""The command lines of docs/commands.md, run in order in a folder with `flowers/`."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from zoo.cli import app

PAGE = Path(__file__).resolve().parents[2] / "docs" / "commands.md"
NEEDED = {"export": ("onnx", "onnxscript", "onnxruntime")}


@pytest.fixture
def flowers(tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`flowers/` with train and test and two classes, and `photos/` without classes."""
    for split in ("train", "test"):
        for name, colour in (("daffodil", "red"), ("iris", "blue")):
            shutil.copytree(image_folder / split / colour, tmp_path / "flowers" / split / name)
    shutil.copytree(image_folder / "test" / "red", tmp_path / "photos")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("flowers")
def test_commands_run() -> None:
    lines = [
        line
        for block in re.findall(r"```console\n(.*?)```", PAGE.read_text(), re.DOTALL)
        for line in block.splitlines()
    ]
    assert len(lines) > 1
    for line in lines:
        dollar, zoo, *words = shlex.split(line, comments=True)
        assert (dollar, zoo) == ("$", "zoo"), line
        for package in NEEDED.get(words[0], ()):
            pytest.importorskip(package, reason=f"{package} is not installed")
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (line, result.output, result.exception)
