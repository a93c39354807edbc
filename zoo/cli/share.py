"""`zoo push`, `zoo pull`, `zoo merge`: adapters to and from the Hub, and back into plain weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zoo.cli.common import JSON_HELP

Json = Annotated[bool, typer.Option("--json", help=JSON_HELP)]


def push() -> None:
    """x"""


def pull() -> None:
    """x"""


def merge() -> None:
    """x"""


def download(target: str) -> Path:
    raise NotImplementedError
