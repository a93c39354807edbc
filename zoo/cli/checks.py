"""What the options of all commands may be, in one table by their names: a value that cannot be is refused before anything runs.

`zoo.arguments` has the kinds. A command takes part by having an option of the name; tests/cli/test_odd_options.py tries odd
values of every option that there is.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.models import ArgumentInfo

from zoo.arguments import DEVICE, Kind, number, one_of, whole
from zoo.errors import ConfigError, SaveError

__all__ = ["OPTIONS", "checked", "memory_error"]

LONGEST = 255  # bytes in a file's name, which most words of a command line may be
FREE = ("setting", "message")  # texts that name no file
PICTURES = (".png", ".pdf", ".svg")
IN_FILES = {
    "merge": "out",
    "predict": "out",
    "zeroshot": "out",
}  # commands whose --out is a file; that of the others is a folder


def _each(kind: Kind) -> Kind:
    """A list with commas, of one thing or more."""

    def take(text: str) -> str:
        words = [word.strip() for word in text.split(",") if word.strip()]
        if not words:
            raise ValueError
        for word in words:
            kind.take(word)
        return text

    return Kind(f"{kind.words_for(None)} (several with commas)", take)


def _counts(most: int) -> Kind:
    """Whole numbers from 1 with commas, each once."""

    def take(text: str) -> str:
        found = [whole(1, most).take(int(word)) for word in text.split(",") if word.strip()]
        if not found or len(set(found)) != len(found):
            raise ValueError
        return text

    return Kind("a whole number >= 1, or several different ones with commas", take)


def _device(text: Any) -> Any:
    import torch

    device = torch.device(DEVICE.take(text))
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[device.type]
    if (device.index or 0) >= there:
        raise ConfigError(f"--device is '{text}', and torch sees {there} of that kind here. Leave it out, or pass cpu.")
    return text


def _named(text: Any) -> Any:
    if not str(text).strip():
        raise ValueError
    return text


MEMORY = one_of("default", "low", "min", "off")
SEED = whole(0, 2**63 - 1)
OPTIONS: dict[str, Kind] = {
    "batch_size": whole(1, 65536),
    **dict.fromkeys(("epochs", "steps", "shots", "sessions", "accumulate", "patience"), whole(1, 10**9)),
    **dict.fromkeys(("search_steps", "test_items"), whole(1, 10**9)),
    "rates": whole(1, 5),
    **dict.fromkeys(("rounds", "num_classes", "top", "enrol"), whole(1, 10**6)),
    **dict.fromkeys(("stage", "block", "folds"), whole(0, 10**6)),
    "jobs": whole(1, 1024),
    "image_size": whole(1, 4096),
    "workers": whole(0, 256),
    "seed": SEED,
    **dict.fromkeys(("probe_scale", "gallery_scale"), number(1, 1024)),
    **dict.fromkeys(("weight_decay", "clip", "warmup", "mixup", "cutmix"), number(0)),
    "k": number(0.1, 100),  # as the codec's own; `zoo.disk` loads torch, which this file must not
    "alpha": number(above=0, most=1e6),
    "device": Kind("cpu, cuda, cuda:1 or mps", _device),
    "precision": one_of("fp32", "bf16", "fp16"),
    "memory": MEMORY,
    "quantise": one_of("int8", "int4", "nf4"),
    **dict.fromkeys(("backbone", "target", "data", "regime", "repo", "source", "to", "task"), Kind("a name", _named)),
}
SEVERAL = {("bench", "memory"): _each(MEMORY), ("fit", "shots"): _counts(10**9)}


def checked(command: str, function: Callable[..., None]) -> Callable[..., None]:
    """A command that runs only with options that can be.

    Raises:
        ConfigError, SaveError: of the command, for the first that cannot.
    """
    names = inspect.signature(function).parameters

    @functools.wraps(function)
    def run(**given: Any) -> None:
        hints = typing.get_type_hints(function, include_extras=True)
        for name, value in given.items():
            word = any(isinstance(extra, ArgumentInfo) for extra in getattr(hints[name], "__metadata__", ()))
            said = name if word else f"--{name.replace('_', '-')}"
            for one in value if isinstance(value, (list, tuple)) else (value,):
                if one is not None:
                    _check(command, name, said, one)
        function(**given)

    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in names.values())
    return run


def _check(command: str, name: str, said: str, value: Any) -> None:
    if isinstance(value, (str, Path)) and name not in FREE:
        parts = str(value).replace(",", "/").split("/")
        if (longest := max(len(part.encode("utf-8", "surrogateescape")) for part in parts)) > LONGEST:
            raise ConfigError(
                f"{said} has a word of {longest} bytes, '{str(value)[:40]}...'; expected at most {LONGEST}."
            )
    kind = SEVERAL.get((command, name)) or OPTIONS.get(name)
    if kind is not None:
        kind.of(said, value)
    if isinstance(value, Path):
        _check_place(
            said, value.expanduser(), folder=name in ("out", "checkpoints", "wheels") and IN_FILES.get(command) != name
        )
        if name in ("png", "confusion") and value.suffix not in PICTURES:
            raise ConfigError(f"{said} is '{value}'; expected a file that ends in {', '.join(PICTURES)}.")


def _check_place(said: str, path: Path, *, folder: bool) -> None:
    """Whether something can be written there: hours later is too late to say so."""
    if not str(path).strip():
        raise ConfigError(f"{said} is empty; expected a path.")
    try:
        there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    except OSError as error:
        raise SaveError(f"{said} is '{path}': {error.strerror or error}. Name another place.") from error
    if folder and path.exists() and not path.is_dir():
        raise SaveError(f"'{path}' is a file; name a folder with {said}.")
    if there != path.absolute() and not there.is_dir():
        raise SaveError(f"{said} is '{path}', and '{there}' is a file; name another place.")


def memory_error(error: BaseException) -> ConfigError | None:
    """What to say where memory does not suffice; None for errors of another kind."""
    text = next(iter(str(error).splitlines()), "")
    words = ("can't allocate memory", "not enough memory", "out of memory", "Storage size calculation overflowed")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in words)):
        return ConfigError(
            f"There is not enough memory for this ({text[:200]}). Take smaller batches (--batch-size), a smaller image "
            "size or rank, or a smaller backbone."
        )
    return None
