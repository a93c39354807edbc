"""Odd values of the options of every command: a panel that says what was expected and exit code 1, before anything runs."""

from __future__ import annotations

import inspect
import typing
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from zoo.cli import app, checks

GROUP: Any = typer.main.get_command(app)
LONG = "x" * 5000
HUGE = "9" * 24


def parameters(command: str) -> dict[str, tuple[type, Any]]:
    """name -> (type of a value, the parameter) of what a command takes, without flags."""
    function = inspect.unwrap(GROUP.commands[command].callback)
    hints = typing.get_type_hints(function)
    found = {}
    for parameter in GROUP.commands[command].params:
        kind: Any = hints.get(parameter.name)
        while kind is not None and typing.get_args(kind):
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        if kind in (int, float, str, Path):
            found[parameter.name] = (kind, parameter)
    return found


def cases() -> list[tuple[str, str, str]]:
    """(command, name of the parameter, value)."""
    found = []
    for command in GROUP.commands:
        for name, (kind, _) in parameters(command).items():
            if kind is int:
                found += [(command, name, "-1"), (command, name, HUGE)]
            if kind is Path:
                found += [(command, name, "file/below"), (command, name, LONG)]
            if kind is str and name not in checks.FREE:
                found.append((command, name, LONG))
            if name in ("device", "precision", "memory"):
                found += [(command, name, "zzz"), (command, name, "")]
    return found


def line(command: str, name: str, value: str) -> list[str]:
    """A command line with this value, and any word where something is needed."""
    words, options = [], []
    known = parameters(command)
    order = [n for n, (_, p) in known.items() if p.param_type_name == "argument"]
    for other, (_, parameter) in known.items():
        before = other in order and name in order and order.index(other) < order.index(name)
        own = value if other == name else "x" if parameter.required or before else None
        if own is not None and other in order:
            words.append(own)
        elif own is not None:
            options += [max(parameter.opts, key=len), own]
    return [command, *options, *(["--"] if words else []), *words]


@pytest.mark.parametrize("command", list(GROUP.commands))
def test_refused(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OSError, IndexError, RuntimeError and click's own code 2 came out of 16 of 129 odd calls."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    for own, name, value in cases():
        if own == command:
            result = CliRunner().invoke(app, line(command, name, value))
            told = (command, name, value[:30], result.output, result.exception)
            assert result.exit_code == 1 and isinstance(result.exception, SystemExit), told
            assert "Error" in result.output and max(parameters(command)[name][1].opts, key=len) in result.output, told
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_every_number_is_in_the_table() -> None:
    numbers = {n for c in GROUP.commands for n, (kind, _) in parameters(c).items() if kind is int}
    assert numbers <= set(checks.OPTIONS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fit", "vit-micro", "lora", "--image-size", "999999"], "image-size is 999999"),
        (["fit", "vit-micro", "lora", "-b", "0"], "batch-size is 0"),
        (["fit", "vit-micro", "lora", "--checkpoints", "file"], "'file' is a file"),
        (["fit", "vit-micro", "lora", "--device", "cuda:99"], "torch sees"),
        (["fit", "vit-micro", "lora", "-s", "rank=99999999999"], "Error"),
        (["bench", "vit-micro", "-b", "-1"], "batch-size is -1"),
        (["bench", "vit-micro", "--memory", ""], "memory is ''"),
        (["bench", "vit-micro", "--png", "x.zzz"], "expected a file that ends in"),
        (["bench", "vit-micro", "-b", "999999999"], "batch-size is 999999999"),
        (["merge", "vit-micro", "--out", "file/x.safetensors"], "'file"),
    ],
)
def test_as_seen(
    words: list[str], said: str, tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    more = ["--data", str(image_folder / "train"), "--out", "new", "-q"] if words[0] == "fit" else []
    result = CliRunner().invoke(app, [*words, *more])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), (result.output, result.exception)
    assert said in " ".join(result.output.replace("│", " ").split()), result.output
