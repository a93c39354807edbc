"""Packages that only some families need, and what a pretrained folder or repository says of itself."""

from __future__ import annotations

import importlib
import json
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from zoo.errors import MissingPackageError


def library(name: str, extra: str) -> ModuleType:
    """Import a package (or one of its modules) that an extra of adapter-zoo installs.

    Raises:
        MissingPackageError: it is not there; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == package
        reason = "is not installed" if missing else f"cannot be imported ({error})"
        raise MissingPackageError(
            f"This needs the package '{package}', which {reason}. Install it with: pip install 'adapter-zoo[{extra}]'"
        ) from error


@cache
def pretrained_config(source: str, file: str = "config.json") -> dict[str, Any] | str:
    """The JSON configuration of a local folder or a Hub repository, or a sentence that says why there is none."""
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            text = (path / file).read_text(encoding="utf-8")
        else:
            from huggingface_hub import hf_hub_download

            text = Path(hf_hub_download(source, file)).read_text(encoding="utf-8")
        found = json.loads(text)
    except Exception as error:  # the Hub's client has a class of its own for each way of failing
        return f"'{file}' of '{source}' could not be read: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return found if isinstance(found, dict) else f"'{file}' of '{source}' is not a JSON object."
