"""Reading a saved adapter: what a folder holds, checked before anything is used. See `zoo.disk` for the format."""

from __future__ import annotations

import json
import logging
import os
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.disk.codecs import check_encoding, decode
from zoo.disk.layout import (
    CARD,
    CONFIG,
    FILES,
    HEAD,
    METRICS,
    WEIGHTS,
    check_config,
    check_tensors,
    check_version,
    finite,
    no_constant,
    refuse_pickle,
    to_json,
    unpack,
)
from zoo.disk.record import check_record
from zoo.errors import ConfigError, WeightsError, ZooError

_LOG = logging.getLogger("zoo")
_MAX_TEXT = 32 * 2**20  # bytes; a config, card or record beyond this is not one


@dataclass(frozen=True)
class SavedMethod:
    """One adapter of a saved folder: its name in the model, its method's registered name and its settings."""

    name: str
    method: str
    config: dict[str, Any]
    plan: dict[str, Any] | None = None


@dataclass(frozen=True)
class SavedAdapter:
    """What a folder holds, read and checked. Tensors are on the CPU, in the dtype in which they were saved."""

    folder: Path
    backbone_name: str
    fingerprint: str | None
    backbone_kwargs: dict[str, Any]
    adapters: tuple[SavedMethod, ...]
    num_classes: int | None  # None: saved without a head
    classes: list[str] | None
    tensors: dict[str, Tensor] = field(repr=False)
    record: dict[str, Any] = field(repr=False)
    card: str = field(repr=False)
    zoo_version: str = ""
    head_kind: str = "linear"
    codec: str = "plain"
    moved: frozenset[str] = frozenset()  # tensors that are changes of what attaching gives (`zoo.disk.compeft`)
    quantised: str = ""  # in what the backbone's projections are kept (`zoo.load(quantise=...)`)
    rest: str | None = None  # the fingerprint without tables of positions
    recovered: bool = False  # the last save was cut off; this is its new state, taken from the weights file alone

    @property
    def has_head(self) -> bool:
        """Whether a head was saved too."""
        return self.num_classes is not None

    def adapter_tensors(self, name: str) -> dict[str, Tensor]:
        """The state of one adapter, keyed `<point>.<parameter>` as in its `state_dict`."""
        return _below(self.tensors, name)

    def head_tensors(self) -> dict[str, Tensor]:
        """The state of the head, keyed as in its `state_dict`."""
        return _below(self.tensors, HEAD)


def read(folder: str | Path) -> SavedAdapter:
    """Read and check a saved folder.

    Raises:
        ConfigError: no such folder, a newer format, or a field that is missing, unknown or of the wrong type (named).
        WeightsError: no weights, truncated or changed ones, NaN or Inf, a pickle, a link that leaves the folder.
    """
    folder = Path(folder)
    if folder.is_file():
        refuse_pickle(folder)
        raise ConfigError(f"'{folder}' is a file. Name the folder that holds {CONFIG} and {WEIGHTS}.")
    if not folder.is_dir():
        raise ConfigError(
            f"There is no folder '{folder}'. Name a folder that `model.save_adapter` or `zoo pull` wrote."
        )
    files = _snapshot(folder)
    path = folder / WEIGHTS
    config: dict[str, Any] = {}
    lost = not files[CONFIG].strip(b"\0")  # emptied by a power cut, see zoo.disk
    if not lost:
        config = _as_object(files[CONFIG], folder / CONFIG)
        if config.get("peft_type"):
            raise ConfigError(
                f"'{folder}' holds an adapter in peft's format ({config['peft_type']}), not in ours. Import it with "
                "zoo.from_peft."
            )
        check_config(config, folder / CONFIG)
    tensors, copy, checksum = unpack(files[WEIGHTS], path)
    recovered = lost or config["checksum"] != checksum
    if recovered:
        _LOG.warning("The last save to '%s' was cut off; using the complete copy in %s.", folder, WEIGHTS)
        config, record, card = copy["config"], copy["metrics"], copy["card"]
        check_config(config, path, copy=True)
    else:
        _check_same(config, copy["config"], folder / CONFIG)
        record = _record(files, folder) or copy["metrics"]
        card = files[CARD].strip(b"\0").decode(errors="replace") or copy["card"]
    check_record(record, f"the record in '{path}'")
    check_tensors(config, tensors, path)
    encoding = config.get("encoding")
    moved: set[str] = set()
    if encoding is not None:
        check_encoding(encoding, folder / CONFIG)
        tensors = decode(encoding, tensors, path, moved)
        check_tensors(config, tensors, path)
    head = config["head"]
    return SavedAdapter(
        folder=folder,
        backbone_name=config["backbone"]["name"],
        fingerprint=config["backbone"]["fingerprint"],
        backbone_kwargs=config["backbone"]["kwargs"],
        adapters=tuple(SavedMethod(**entry) for entry in config["adapters"]),
        num_classes=head["num_classes"] if head else None,
        classes=head["classes"] if head else None,
        tensors=tensors,
        record=record,
        card=card,
        zoo_version=config["zoo_version"],
        head_kind=head.get("kind", "linear") if head else "linear",
        codec=encoding["codec"] if encoding is not None else "plain",
        moved=frozenset(moved),
        quantised=config["backbone"].get("quantised", ""),
        rest=config["backbone"].get("rest"),
        recovered=recovered,
    )


def contents(folder: str | Path) -> dict[str, bytes]:
    """The four files of a folder as bytes, checked as `read` does, in a consistent state even after a cut-off save."""
    folder = Path(folder)
    saved = read(folder)
    files = _snapshot(folder)
    if saved.recovered:
        _, copy, checksum = unpack(files[WEIGHTS], folder / WEIGHTS)
        files[CONFIG] = to_json({**copy["config"], "checksum": checksum}, CONFIG).encode()
    files[METRICS] = to_json(saved.record, METRICS).encode()
    files[CARD] = saved.card.encode()
    return files


def _snapshot(folder: Path) -> dict[str, bytes]:
    """The files' bytes as one save left them; b"" for a card or record that is not there.

    Each save renames new files into place. So if all four are the same files after reading as they were before, no save has
    begun or ended in between, and since saves of several processes wait for each other (`zoo.disk.store`), they are of one.
    """
    for pause in (0.0, 0.002, 0.01, 0.05):
        time.sleep(pause)
        before = [_identity(folder / name) for name in FILES]
        files = _read_files(folder)
        if before == [_identity(folder / name) for name in FILES]:
            return files
    # Saved again and again while it was read: the weights file is one save's by itself, with its copies of the others.
    return {CONFIG: b"", CARD: b"", METRICS: b"", WEIGHTS: files[WEIGHTS]}


def _identity(path: Path) -> tuple[int, ...] | None:
    """What tells one file from the next of the same name; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _read_files(folder: Path) -> dict[str, bytes]:
    if not os.path.lexists(folder / CONFIG) or not os.path.lexists(folder / WEIGHTS):
        for other in sorted(folder.iterdir()):
            refuse_pickle(other)
    if not os.path.lexists(folder / CONFIG):
        raise ConfigError(f"'{folder}' has no {CONFIG}, so it is not a saved adapter. Name a folder that holds one.")
    files = {CONFIG: _small(folder, CONFIG)}
    if files[CONFIG].strip(b"\0"):
        check_version(_as_object(files[CONFIG], folder / CONFIG), folder / CONFIG)
    files |= {name: _small(folder, name) if (folder / name).exists() else b"" for name in (CARD, METRICS)}
    if not os.path.lexists(folder / WEIGHTS):
        raise WeightsError(f"'{folder}' has no {WEIGHTS}. Copy or download the folder again, or name another.")
    files[WEIGHTS] = _locate(folder, WEIGHTS, WeightsError).read_bytes()
    return files


def read_config_file(folder: Path) -> dict[str, Any]:
    """The JSON object in a folder's config, ours or another tool's; raises ConfigError."""
    return _as_object(_small(folder, CONFIG), folder / CONFIG)


def read_weights_file(folder: Path) -> bytes:
    """The bytes of a folder's weights file; raises WeightsError, also for pickles, which are not opened."""
    if not os.path.lexists(folder / WEIGHTS):
        for other in sorted(folder.iterdir()):
            refuse_pickle(other)
        raise WeightsError(f"'{folder}' has no {WEIGHTS}. Copy or download the folder again, or name another.")
    return _locate(folder, WEIGHTS, WeightsError).read_bytes()


def _small(folder: Path, name: str) -> bytes:
    path = _locate(folder, name, ConfigError)
    if path.stat().st_size > _MAX_TEXT:
        raise ConfigError(f"'{path}' has {path.stat().st_size:,} bytes; a file of this kind has a few thousand.")
    return path.read_bytes()


def _as_object(data: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(data, parse_constant=no_constant, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"'{path}' is not JSON ({error}). Copy or download the folder again.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"'{path}' holds a {type(value).__name__}, expected a JSON object.")
    return value


def _check_same(config: Mapping[str, Any], stored: Mapping[str, Any], path: Path) -> None:
    """Raise ConfigError, naming the fields, if a config is not the one that its weights were saved with.

    No shape shows a changed `alpha`, a changed order of classes: the model would load and answer something else.
    """
    changed = list(_changes({k: v for k, v in config.items() if k != "checksum"}, stored))
    if changed:
        more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ConfigError(
            f"'{path}' was changed after the adapter was saved: {'; '.join(changed[:3])}{more}. Undo that, or empty the file: "
            f"then the settings in {WEIGHTS} are used. To change an adapter, load it, change it in Python and save it."
        )


def _changes(found: Any, stored: Any, where: str = "") -> Iterator[str]:
    """'field is A, and was saved as B' for each field in which two JSON values differ."""
    if isinstance(found, dict) and isinstance(stored, dict):
        for key in [*found, *(k for k in stored if k not in found)]:
            name = f"{where}.{key}" if where else key
            if key not in stored:
                yield f"'{name}' was added"
            elif key not in found:
                yield f"'{name}' was taken out"
            else:
                yield from _changes(found[key], stored[key], name)
    elif isinstance(found, list) and isinstance(stored, list) and len(found) == len(stored):
        for i, pair in enumerate(zip(found, stored, strict=True)):
            yield from _changes(*pair, f"{where}[{i}]")
    elif type(found) is not type(stored) or found != stored:
        yield f"'{where}' is {found!r:.60}, and was saved as {stored!r:.60}"


def _record(files: dict[str, bytes], folder: Path) -> dict[str, Any]:
    """metrics.json; empty if it is missing or broken, which costs nothing, since the weights file has a copy."""
    try:
        found = _as_object(files[METRICS], folder / METRICS) if files[METRICS].strip(b"\0") else {}
        check_record(found, f"'{folder / METRICS}'")
        return found
    except ConfigError as error:
        _LOG.warning("%s Using the copy in %s.", error, WEIGHTS)
        return {}


def _locate(folder: Path, name: str, error: type[ZooError]) -> Path:
    """The file's path. A link is followed only inside the folder, or inside the Hub cache that it is part of."""
    path = folder / name
    if path.is_symlink():
        roots = [folder.resolve()]
        parents = folder.resolve().parents
        if len(parents) > 2 and parents[0].name == "snapshots" and parents[1].name.startswith("models--"):
            roots.append(parents[2])  # huggingface_hub's cache: <cache>/models--user--repo/snapshots/<commit>
        if not any(path.resolve().is_relative_to(root) for root in roots):
            raise error(
                f"'{path}' is a link that leads out of the folder, so it was not opened. Put the file itself there."
            )
    if not path.exists() or not stat.S_ISREG(path.stat().st_mode):
        raise error(f"'{path}' is not a file. Copy or download the folder again.")
    return path


def _below(tensors: Mapping[str, Tensor], owner: str) -> dict[str, Tensor]:
    prefix = owner + "/"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
