"""What all commands share: consoles, JSON output, errors as one panel, settings from the command line.

Nothing here imports torch: `zoo --help` must be quick.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from zoo.errors import ConfigError, ZooError

JSON_HELP = "Print one JSON document instead of tables."


def console(stderr: bool = False) -> Console:
    """A console for people; wide when the output goes to a file or a pipe, so that no name is cut off there."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else 160
    return Console(stderr=stderr, width=width, highlight=False, soft_wrap=False)


def bars(where: Console, disable: bool = False) -> Any:
    """A progress bar: what is done, how many, the time it took and what it will take."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=where, disable=disable)


def show_error(error: ZooError) -> None:
    """One panel on stderr: the kind of error as its title, the message as its text."""
    kind = type(error).__name__
    console(stderr=True).print(
        Panel(Text(str(error)), title=kind, title_align="left", border_style="red", expand=False)
    )


class ZooGroup(TyperGroup):
    """Commands in the order in which they were added; a `ZooError` becomes a panel and exit code 1.

    A name may have two words (`zoo bench compare`, beside `zoo bench`).
    """

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in order of definition."""
        return list(self.commands)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the first word or the first two name."""
        if (both := " ".join(args[:2])) in self.commands:
            args = [both, *args[2:]]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except ZooError as error:
            show_error(error)
            raise typer.Exit(1) from None
        except (MemoryError, RuntimeError) as error:
            from zoo.cli.checks import memory_error

            if (told := memory_error(error)) is None:
                raise
            show_error(told)
            raise typer.Exit(1) from None


def print_json(document: Any) -> None:
    """One JSON document on stdout. Paths become strings; NaN and infinities become null, which JSON can hold."""
    typer.echo(json.dumps(_plain(document), indent=2, ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str = "", right: Sequence[str] = ()
) -> Table:
    """A table; the columns named in `right` are right-aligned (numbers). Text is never read as markup."""
    built = Table(
        title=title or None,
        title_justify="left",
        header_style="bold",
        show_header=any(columns),
        box=None,
        pad_edge=False,
    )
    for name in columns:
        built.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        built.add_row(*(Text(str(cell)) for cell in row))
    return built


def numbers(result: Mapping[str, Any]) -> Table:
    """What was measured: a name and a number in each row."""
    rows = [(k.replace("_", " "), f"{v:.4f}" if isinstance(v, float) else v) for k, v in result.items()]
    return table(["", ""], rows)


def settings(values: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The settings of each method, from `rank=4` (a single method) or `lora.rank=4` (several).

    A value is read as JSON where it is JSON (`4`, `true`, `0.1`, `null`, `["q", "v"]`), `[q,v]` as a list of texts, all else as
    text.

    Raises:
        ConfigError: no `=`, or a setting that does not say which of several methods it is for.
    """
    found: dict[str, dict[str, Any]] = {m: {} for m in methods}
    for text in values:
        key, equals, raw = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"'--set {text}' is not a setting; write it as name=value, for example --set rank=4.")
        method, dot, name = key.partition(".")
        if not dot:
            if len(methods) != 1:
                example = f"--set {methods[0] if methods else 'lora'}.{key}={raw}"
                raise ConfigError(f"'--set {text}' does not say which method it is for; write {example}.")
            method, name = methods[0], key
        if method not in found:
            raise ConfigError(
                f"'--set {text}' is for '{method}', which is not among the adapters: {', '.join(methods)}."
            )
        found[method][name] = _value(raw)
    return found


def _value(raw: str) -> Any:
    """JSON, a list of words without quotes (a shell takes them away: `run.methods=[linear,lora]` is left), or text."""
    try:
        return json.loads(raw)
    except json.JSONDecodeError:
        words = raw[1:-1].split(",") if raw.startswith("[") and raw.endswith("]") else []
        if words and all(re.fullmatch(r"[\w.*+-]+", word.strip()) for word in words):
            return [_value(word.strip()) for word in words]
        return raw


def count(number: float) -> str:
    """A count with thousands separators."""
    return f"{number:,.0f}"


def size(number: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(number) < 1000 or unit == "GB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    raise AssertionError("unreachable")


def is_folder(text: str) -> bool:
    """Whether an adapter is given as a folder of this machine rather than as a Hub repository or a method's name."""
    return text.startswith((".", "/", "~")) or Path(text).expanduser().is_dir()


def rate(text: str | None) -> Any:
    """A number, or "auto"."""
    if text is None or text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"--lr is '{text}'; expected a number, or auto.") from None


def weights(text: str | None) -> Any:
    """ "balanced", or {"a": 2.0} of "a=2"."""
    if text is None or "=" not in text:
        return text
    try:
        return {name.strip(): float(weight) for name, _, weight in (part.rpartition("=") for part in text.split(","))}
    except ValueError:
        raise ConfigError(f"--class-weights is '{text}'; expected balanced, or a=2,b=0.5.") from None
