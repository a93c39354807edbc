"""Adapters on disk: a folder of four files, replaced so that a reader always finds a whole adapter.

| file | content |
| --- | --- |
| `adapter_model.safetensors` | tensors: `<adapter>/<point>.<parameter>` and `head/<parameter>` |
| `adapter_config.json` | backbone, methods and their settings, classes, and the SHA-256 of the weights file |
| `README.md` | the card |
| `metrics.json` | the record of the run |

**Why a killed save leaves no damage.** Four files cannot be replaced in one step, but one file can. So the weights file
carries, in its safetensors metadata, a copy of the other three and a checksum over everything: it is the adapter, and
renaming it is the moment at which the new state replaces the old. All files are first written under temporary names in
the same folder (a full disk shows here, before anything is touched), then renamed, the weights first and the config
last. So if a config's SHA-256 does not fit the weights file, then either the save was cut off between two renames: the
checksum inside the weights file holds, and its own copy of the config is used; or the weights are damaged: it does not
hold, and the file is refused. Only the weights file is synced to the disk before its rename, because everything else
can be had from it.

Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import stat
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors.torch import save as dump_safetensors
from torch import Tensor

from zoo.errors import ConfigError, SaveError, WeightsError, ZooError, nearest
from zoo.layout import (
    CARD,
    CHECKSUM,
    CONFIG,
    COPIES,
    FILES,
    FORMAT_VERSION,
    HEAD,
    METRICS,
    WEIGHTS,
    check_config,
    check_tensors,
    checksum,
    no_constant,
    parse,
    refuse_pickle,
    to_json,
)

if TYPE_CHECKING:
    from zoo.adapter_base import Adapter
    from zoo.model import Model

_LOG = logging.getLogger("zoo")
_STALE = re.compile(r"\.(" + "|".join(re.escape(name) for name in FILES) + r")\.[0-9a-f]{12}\.tmp")
_STALE_AFTER = 3600.0  # seconds; a temporary file this old belongs to a save that was killed
_MAX_TEXT = 32 * 2**20  # bytes; a config, card or record beyond this is not one


@dataclass(frozen=True)
class SavedMethod:
    """One adapter of a saved folder: its name in the model, its method's registered name and its settings."""

    name: str
    method: str
    config: dict[str, Any]


@dataclass(frozen=True)
class SavedAdapter:
    """What a folder holds, read and checked. Tensors are on the CPU, in the dtype in which they were saved."""

    folder: Path
    backbone: str
    fingerprint: str | None
    backbone_kwargs: dict[str, Any]
    adapters: tuple[SavedMethod, ...]
    num_classes: int | None  # None: saved without a head
    classes: list[str] | None
    tensors: dict[str, Tensor] = field(repr=False)
    record: dict[str, Any] = field(repr=False)
    card: str = field(repr=False)
    zoo_version: str = ""
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


# -- saving -----------------------------------------------------------------------------------------------------------


def save(model: Model, folder: str | Path, adapters: Sequence[str] | None = None, *, source: str | None = None) -> Path:
    """Write the active (or the named) adapters and the head that goes with them, the card and the record.

    `source` is what the card tells readers to load: a repository id, by default the folder's name. A kill or a full
    disk at any moment leaves what the folder held before, or the complete new state.

    Raises:
        SaveError: writing failed. WeightsError: a tensor holds NaN or Inf. ConfigError: settings or record that are not
        JSON. In each case the old files stay.
    """
    from zoo.cards import render

    folder = Path(folder)
    names = _select(model, adapters)
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors.update({f"{name}/{key}": value for key, value in model.adapters[name].state_dict().items()})
    # the head that the model uses when exactly these adapters are active
    own_head = next((name for name in reversed(names) if name in model.heads), "default")
    num_classes = int(getattr(model.heads[own_head], "out_features", 0))
    if num_classes:
        tensors.update({f"{HEAD}/{key}": value for key, value in model.heads[own_head].state_dict().items()})
    classes = model.classes if model.classes and len(model.classes) == num_classes else None
    methods = [cast("Adapter", model.adapters[name]) for name in names]
    config: dict[str, Any] = {
        "backbone": {
            "name": model.backbone_name,
            "fingerprint": model.fingerprint,
            "kwargs": model.backbone_kwargs,
        },
        "adapters": [
            {"name": name, "method": method.method, "config": method.config()}
            for name, method in zip(names, methods, strict=True)
        ],
        "head": {"num_classes": num_classes, "classes": classes} if num_classes else None,
    }
    return write(folder, config, tensors, model.record, render(model, names, source=source or folder.resolve().name))


def write(
    folder: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    record: Mapping[str, Any] | None = None,
    card: str = "",
) -> Path:
    """Write a folder from its parts; `config` holds `backbone`, `adapters` and `head` as in the file.

    Raises:
        ConfigError: parts that are not JSON or do not fit together. WeightsError: NaN or Inf. SaveError: the file
        system refused. In each case the old files stay.
    """
    from zoo import __version__

    folder = Path(folder)
    full = {"format_version": FORMAT_VERSION, "zoo_version": __version__, **config}
    check_config(full, folder / CONFIG, with_hash=False)
    tensors = _plain(tensors)
    check_tensors(full, tensors, folder / WEIGHTS)
    texts = {
        CONFIG: to_json(full, "the config"),
        METRICS: to_json(dict(record or {}), "model.record"),
        CARD: card,
    }
    metadata = {"format": "pt", **{COPIES[name]: text for name, text in texts.items()}}
    metadata[CHECKSUM] = checksum(metadata, tensors)
    weights = dump_safetensors(tensors, metadata)
    texts[CONFIG] = to_json({**full, "weights_sha256": hashlib.sha256(weights).hexdigest()}, "the config")
    write_files(folder, {WEIGHTS: weights, **{name: text.encode() for name, text in texts.items()}})
    return folder


def write_files(folder: str | Path, contents: Mapping[str, bytes]) -> None:
    """Replace the four files in `folder` by `contents`, all of them written before the first is renamed.

    Raises:
        SaveError: writing failed; what was there before is whole, and no temporary file is left.
    """
    folder = Path(folder)
    made = not folder.exists()
    temporary: dict[str, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            target = folder / name
            if target.is_dir() and not target.is_symlink():
                raise IsADirectoryError(f"'{target}' is a folder, but a file of this name has to go there")
        _sweep(folder)
        for name in FILES:
            temporary[name] = folder / f".{name}.{uuid.uuid4().hex[:12]}.tmp"
            _write(temporary[name], contents[name], sync=name == WEIGHTS)
        for name in FILES:
            temporary[name].replace(folder / name)
            del temporary[name]
        _sync_folder(folder)
    except OSError as error:
        # From the rename of the weights on, the new state is the one that is read.
        whole = "What was there before is still whole" if WEIGHTS in temporary or made else "What is there can be read"
        raise SaveError(
            f"Could not save to '{folder}': {error.strerror or error}. {whole}. Free some space, or choose a folder "
            "that you may write to, and save again."
        ) from error
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if it is still empty


def write_file(path: Path, data: bytes) -> None:
    """Replace one file as a whole, or leave it as it was and raise SaveError."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(temporary, data, sync=True)
        temporary.replace(path)
    except OSError as error:
        raise SaveError(
            f"Could not write '{path}': {error.strerror or error}. What was there before is still whole. Free some "
            "space, or choose a place that you may write to."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _write(path: Path, data: bytes, *, sync: bool) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def _sweep(folder: Path) -> None:
    """Remove temporary files of saves that were killed long ago."""
    for entry in folder.iterdir():
        with contextlib.suppress(OSError):
            if _STALE.fullmatch(entry.name) and time.time() - entry.lstat().st_mtime > _STALE_AFTER:
                entry.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _select(model: Model, wanted: Sequence[str] | None) -> list[str]:
    known = list(model.adapters)
    if wanted is None:
        if known and not model.active:
            raise ConfigError(f"No adapter is active, so none would be saved. Name those to save: {', '.join(known)}.")
        return list(model.active)
    for name in wanted:
        if name not in known:
            raise ConfigError(f"The model has no adapter named '{name}' to save. {nearest(name, known)}")
    return list(dict.fromkeys(wanted))


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, each with a storage of its own (safetensors refuses shared ones)."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in tensors.items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        plain[key] = tensor
    return plain


# -- reading ----------------------------------------------------------------------------------------------------------


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
    config, problem = _read_config(folder)
    if config is not None and config.get("peft_type"):
        raise ConfigError(
            f"'{folder}' holds an adapter in peft's format ({config['peft_type']}), not in ours. Import it with "
            "zoo.from_peft."
        )
    path = folder / WEIGHTS
    data = _read_weights(folder)
    if config is not None and "weights_sha256" not in config:
        check_config(config, folder / CONFIG)  # names this field, or one that is worse
    fits = config is not None and config["weights_sha256"] == hashlib.sha256(data).hexdigest()
    tensors, metadata = parse(data, path)
    texts = {name: metadata.get(key, "") for name, key in COPIES.items()}
    recovered = not fits
    if config is None or not fits:
        if metadata.get(CHECKSUM) != checksum(metadata, tensors):
            if config is None:
                raise ConfigError(problem)
            raise WeightsError(
                f"'{path}' is not the file that {CONFIG} was written for: its SHA-256 is "
                f"{hashlib.sha256(data).hexdigest()}, expected {config['weights_sha256']}. It was damaged or changed. "
                "Copy or download the folder again."
            )
        _LOG.warning("The last save to '%s' was cut off; using the complete copy in %s.", folder, WEIGHTS)
        config = json.loads(texts[CONFIG])
        record = json.loads(texts[METRICS])
    else:
        record = _read_record(folder)
        texts[CARD] = _read_text(folder, CARD) if (folder / CARD).exists() else ""
    assert config is not None
    check_config(config, folder / CONFIG, with_hash=not recovered)
    check_tensors(config, tensors, path)
    head = config["head"]
    return SavedAdapter(
        folder=folder,
        backbone=config["backbone"]["name"],
        fingerprint=config["backbone"]["fingerprint"],
        backbone_kwargs=config["backbone"]["kwargs"],
        adapters=tuple(SavedMethod(**entry) for entry in config["adapters"]),
        num_classes=head["num_classes"] if head else None,
        classes=head["classes"] if head else None,
        tensors=tensors,
        record=record,
        card=texts[CARD],
        zoo_version=config["zoo_version"],
        recovered=recovered,
    )


def contents(folder: str | Path) -> dict[str, bytes]:
    """The four files of a folder as bytes, checked as `read` does, in a consistent state even after a cut-off save."""
    folder = Path(folder)
    saved = read(folder)
    files = {WEIGHTS: _read_weights(folder), CARD: saved.card.encode()}
    files[METRICS] = to_json(saved.record, METRICS).encode()
    if saved.recovered:
        _, metadata = parse(files[WEIGHTS], folder / WEIGHTS)
        config = json.loads(metadata[COPIES[CONFIG]])
        config["weights_sha256"] = hashlib.sha256(files[WEIGHTS]).hexdigest()
        files[CONFIG] = to_json(config, CONFIG).encode()
    else:
        files[CONFIG] = _read_text(folder, CONFIG).encode()
    return files


def _read_config(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """The parsed config; or None and what is wrong with the file (the weights may still have a copy)."""
    if not os.path.lexists(folder / CONFIG):
        return None, f"'{folder}' has no {CONFIG}, so it is not a saved adapter. Name a folder that holds one."
    text = _read_text(folder, CONFIG)
    try:
        config = json.loads(text, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        return None, f"'{folder / CONFIG}' is not JSON ({error}). Copy or download the folder again."
    if not isinstance(config, dict):
        return None, f"'{folder / CONFIG}' holds a {type(config).__name__}, expected a JSON object."
    return config, ""


def _read_record(folder: Path) -> dict[str, Any]:
    if not (folder / METRICS).exists():
        return {}
    try:
        record = json.loads(_read_text(folder, METRICS), parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"'{folder / METRICS}' is not JSON ({error}). Repair it, or delete it: it is optional."
        ) from error
    if not isinstance(record, dict):
        raise ConfigError(f"'{folder / METRICS}' holds a {type(record).__name__}, expected a JSON object.")
    return record


def _read_text(folder: Path, name: str) -> str:
    path = _locate(folder, name, ConfigError)
    if path.stat().st_size > _MAX_TEXT:
        raise ConfigError(f"'{path}' has {path.stat().st_size:,} bytes; a file of this kind has a few thousand.")
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"'{path}' is not UTF-8 text ({error}). Copy or download the folder again.") from error


def _read_weights(folder: Path) -> bytes:
    if not os.path.lexists(folder / WEIGHTS):
        for other in sorted(folder.iterdir()):
            refuse_pickle(other)
        raise WeightsError(f"'{folder}' has no {WEIGHTS}. Copy or download the folder again, or name another.")
    return _locate(folder, WEIGHTS, WeightsError).read_bytes()


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
