"""Packages that only some families need, and what a pretrained folder or repository says of itself."""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from zoo.errors import ConfigError, MissingPackageError, WeightsError


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


_FORCE, _FORBID = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_lock = threading.Lock()
_inside: list[dict[str, str | None]] = []


@contextmanager
def only_tensors() -> Iterator[None]:
    """A context in which torch reads files as tensors only, whatever a library's options say; a pickle in it cannot run code.

    By torch's own switch, which holds for the whole process while any thread is inside.
    """
    with _lock:
        if not _inside:
            before = {name: os.environ.get(name) for name in (_FORCE, _FORBID)}
            os.environ[_FORCE] = "1"
            os.environ.pop(_FORBID, None)
        else:
            before = _inside[-1]
        _inside.append(before)
    try:
        yield
    finally:
        with _lock:
            before = _inside.pop()
            if not _inside:
                for name, value in before.items():
                    if value is None:
                        os.environ.pop(name, None)
                    else:
                        os.environ[name] = value


HELD = 20.0  # seconds for which an answer of the Hub, or that there is none, counts
WAIT = 10.0  # seconds for a connection, as the Hub's client waits for a file's description
_reached: tuple[float, str, str | None] = (-HELD, "", None)
_switches: list[Callable[[], bool]] = []  # the client's own function, once it was seen
_open = 0  # contexts that look at the Hub first


def _hub_is_away() -> str | None:
    """Why no connection to the Hub can be had; None if one can, or if that is not seen from here (a proxy).

    None, too, where its user has switched the client off: that has words of its own.
    """
    global _reached
    from huggingface_hub import constants

    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    at, where, why = _reached
    if (_switches and _switches[0]()) or getproxies():
        return None
    if time.monotonic() - at >= HELD or where != endpoint:
        place = urlsplit(endpoint)
        try:
            socket.create_connection((place.hostname or "", place.port or 443), WAIT).close()
            why = None
        except (OSError, ValueError) as error:
            why = f"{place.hostname}: {error}"
        _reached = (time.monotonic(), endpoint, why)
    return why


def _offline() -> bool:
    """The client's switch in a context of `reaching`.

    Libraries that are imported inside take it along by name and ask it ever after: outside it is the client's own.
    """
    return _switches[0]() or bool(_open and _hub_is_away() is not None)


@contextmanager
def reaching() -> Iterator[None]:
    """A context in which libraries look for files on the Hub: where it is away, they look into the cache alone.

    They would ask for each file six times, half a minute long. By the client's own switch for that, which holds for the process;
    it is asked in front of each request, so that what is on this disk needs no network.

    Raises:
        ConfigError: the Hub is away, and what was looked for is not in the cache.
    """
    from huggingface_hub import constants

    global _open
    with _lock:
        if not _open:
            _switches[:] = [constants.is_offline_mode]
            constants.is_offline_mode = _offline
        _open += 1
    try:
        yield
    except Exception as error:
        if not _of_the_switch(error) or (why := _hub_is_away()) is None:
            raise
        raise ConfigError(
            f"The Hub cannot be reached ({why}), and what was looked for is not in the cache. Check the network and "
            "HF_ENDPOINT; a file of weights that you have is named by checkpoint=, pretrained=False gives random ones."
        ) from error
    finally:
        with _lock:
            _open -= 1
            if not _open:
                constants.is_offline_mode = _switches[0]


def _of_the_switch(error: BaseException | None) -> bool:
    """Whether an error came of a file that is not in the cache."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    while error is not None and not isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        error = error.__cause__ or error.__context__
    return error is not None


def _fetched_code(config: Any) -> str | None:
    """The entry of a configuration that has the library fetch and run code of a repository; None if there is none."""
    if isinstance(config, dict):
        for key, value in config.items():
            if key.lstrip("_") in ("attn_implementation", "experts_implementation") and "/" in str(value):
                return f"{key}: {value!r:.80}"
            if found := _fetched_code(value):
                return found
    return None


# Every family asks for the same file when a name is looked up
_held: dict[tuple[str, str], tuple[float, dict[str, Any] | str]] = {}


def pretrained_config(source: str, file: str = "config.json") -> dict[str, Any] | str:
    """The JSON configuration of a local folder or a Hub repository, or a sentence that says why there is none.

    A folder is read each time: it may have been written, or written anew, since.
    """
    if Path(source).expanduser().is_dir():
        return _config(source, file)
    key, now = (source, file), time.monotonic()
    at, found = _held.get(key, (-HELD, ""))
    if now - at >= HELD:
        found = _config(source, file)
        _held[key] = (time.monotonic(), found)
    return copy.deepcopy(found)


def _config(source: str, file: str) -> dict[str, Any] | str:
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            text = (path / file).read_text(encoding="utf-8")
        else:
            from huggingface_hub import hf_hub_download

            with reaching():
                text = Path(hf_hub_download(source, file)).read_text(encoding="utf-8")
        found = json.loads(text)
    except Exception as error:  # the Hub's client has a class of its own for each way of failing
        return f"'{file}' of '{source}' could not be read: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    if not isinstance(found, dict):
        return f"'{file}' of '{source}' is not a JSON object."
    if entry := _fetched_code(found):
        return f"'{file}' of '{source}' asks for code from a repository ({entry}), which is never fetched. Take the entry out."
    return found


CONFIGS = {"gptq": "GPTQConfig", "awq": "AwqConfig"}  # transformers' classes


def kernels(source: str) -> dict[str, Any]:
    """How transformers is to load weights of GPTQ or AWQ, so that gradients pass them: {} for all others.

    Left to itself it takes the fastest kernel, which may be for inference only.
    """
    config = pretrained_config(source)
    kept = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(kept, dict) or kept.get("quant_method") not in CONFIGS:
        return {}
    name = CONFIGS[kept["quant_method"]]
    made = getattr(importlib.import_module("transformers"), name)
    return {"quantization_config": made(bits=kept.get("bits", 4), backend="auto_trainable")}


def check_loaded(
    source: str,
    made: str,
    report: Mapping[str, Collection[Any]],
    optional: Collection[str] = (),
    spare: Collection[str] = (),
) -> None:
    """Every tensor of a network came from its file, and every tensor of the file went into the network.

    Libraries fill in random numbers for what a file lacks, and go on. That is no pretrained network.

    Args:
        source: folder or repository. made: class of the network. report: what the library says of the loading
            (`output_loading_info`). optional: patterns of tensors that a file may lack, since they are no trained numbers, or
            are meant to start at random. spare: patterns of tensors that it may have over.

    Raises:
        WeightsError: with the tensors that are missing, or have no place.
    """
    others = (*(report.get("mismatched_keys") or ()),)
    shaped = [str(m if isinstance(m, str) else m[0]) for m in others]
    missing = sorted({*_but(report.get("missing_keys") or (), optional), *shaped})
    unread = sorted(_but(report.get("unexpected_keys") or (), spare))
    if not missing and not unread:
        return
    said = [f"{what} {len(keys)}: {_some(keys)}" for what, keys in (("lacks", missing), ("has over", unread)) if keys]
    architectures = pretrained_config(source)
    own = architectures.get("architectures") if isinstance(architectures, dict) else None
    other = own[0] if isinstance(own, list) and own and own[0] != made else None
    hint = f" (it says that it is a {other})" if other else ""
    raise WeightsError(
        f"The weights of '{source}'{hint} are not those of the {made} that its configuration, with the options given, describes. "
        f"Of its tensors the file {'; it '.join(said)}. Nothing is made up for them: get a whole copy, "
        f"name the options that it was saved with, or pass pretrained=False for random weights."
    )


def _but(keys: Collection[str], patterns: Collection[str]) -> list[str]:
    return [key for key in keys if not any(re.search(pattern, key) for pattern in patterns)]


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
