"""Adapters on disk: a folder of four files, replaced so that a reader always finds a whole adapter.

| file | content |
| --- | --- |
| `adapter_model.safetensors` | tensors: `<adapter>/<point>.<parameter>` and `head/<parameter>` |
| `adapter_config.json` | backbone, methods and their settings, classes, checksum of the weights |
| `README.md` | the card |
| `metrics.json` | the record of the run |

**Why a killed save leaves no damage.** Four files cannot be replaced in one step, but one file can. So the weights file
carries, in its safetensors metadata, a copy of the other three and a checksum over everything: it is the adapter, and
renaming it is the moment at which the new state replaces the old. All files are first written under temporary names in
the same folder (a full disk shows here, before anything is touched), then renamed, the weights first and the config
last. The config repeats the checksum. If it names another one than the weights file, the save was cut off between two
renames, and the copies in the weights file are used. If the weights do not have their own checksum, they are damaged and
refused. Only the weights are synced before their rename: if the power goes, the others may be left empty, which is a
save cut off, too. Files that would not change are left alone. Saves of several processes into one folder wait for each
other, so that its files are of one of them.

Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from zoo.arguments import ONE_OR_MORE, PATH
from zoo.disk.codecs import WholeCodec, codec_of, encode
from zoo.disk.layout import (
    CARD,
    CONFIG,
    FILES,
    FLOATS,
    FORMAT_VERSION,
    HEAD,
    METRICS,
    WEIGHTS,
    check_config,
    check_tensors,
    pack,
    to_json,
)
from zoo.disk.record import check_record
from zoo.engine.sharded import with_whole_parameters
from zoo.errors import ConfigError, SaveError, nearest
from zoo.heads import kind_of
from zoo.heads.folded import folded

if TYPE_CHECKING:
    from zoo.adapters.base import Adapter
    from zoo.host import Host

__all__ = ["alone", "save", "write", "write_file", "write_files"]

_STALE = re.compile(r"\.(" + "|".join(re.escape(name) for name in FILES) + r")\.[0-9a-f]{12}\.tmp")
_STALE_AFTER = 3600.0  # seconds; a temporary file this old belongs to a save that was killed


# -- saving -----------------------------------------------------------------------------------------------------------


@with_whole_parameters
def save(
    model: Host,
    folder: str | Path,
    adapters: str | Sequence[str] | None = None,
    *,
    source: str | None = None,
    dtype: torch.dtype | None = None,
    codec: str = "plain",
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write the active (or the named) adapters and the head that goes with them, the card and the record.

    `source` is what the card tells readers to load: a repository id, by default the folder's name. `dtype` is the
    precision of the stored numbers, by default the model's own; `codec` how they are encoded, and `settings` those of the
    codec (`zoo.disk.codecs`). A kill or a full disk at any moment leaves what the folder held before, or the complete new
    state. The parts of a sharded model come together first, so that all its processes must call this.

    Raises:
        SaveError: writing failed. WeightsError: a tensor holds NaN or Inf. ConfigError: settings or record that are not
        JSON, or a `dtype` that cannot hold the numbers. In each case the old files stay.
    """
    from zoo.disk.cards import render

    kind, settings = codec_of(codec, settings or {})
    if dtype is not None and dtype not in FLOATS:
        raise ConfigError(
            f"dtype is {dtype!r}; expected one of {', '.join(map(str, FLOATS))}: in any other the numbers would be lost."
        )

    folder = Path(PATH.of("folder", folder))
    names = _select(model, adapters)
    methods = [cast("Adapter", model.adapters[name]) for name in names]
    for name, method in zip(names, methods, strict=True):
        if any(is_parametrized(part) for part in method.modules()):
            raise ConfigError(
                f"the adapter '{name}' has parameters that torch.nn.utils.parametrize computes; they have no names of ours. Fold "
                "them first: torch.nn.utils.parametrize.remove_parametrizations(module, name)."
            )
    parts = [method.saved() for method in methods]
    tensors: dict[str, Tensor] = {}
    for name, (_, state) in zip(names, parts, strict=True):
        tensors.update({f"{name}/{key}": value for key, value in state.items()})
    # the head that the model uses when exactly these adapters are active
    own_head = model.head_for(names)
    num_classes = int(getattr(model.heads[own_head], "out_features", 0))
    if num_classes:
        tensors.update({f"{HEAD}/{key}": value for key, value in folded(model.heads[own_head]).state_dict().items()})
    if dtype is not None:
        tensors = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
    named = model.classes_of(own_head)
    classes = named if named and len(named) == num_classes else None
    printed, rest = model.fingerprints
    config: dict[str, Any] = {
        "backbone": {
            "name": model.backbone_name,
            "fingerprint": printed,
            **({} if rest is None else {"rest": rest}),
            **({"quantised": model.quantised} if model.quantised else {}),
            "kwargs": model.backbone_kwargs,
        },
        "adapters": [
            {"name": name, "method": method.method, "config": settings, "plan": method.plan}
            for name, method, (settings, _) in zip(names, methods, parts, strict=True)
        ],
        "head": {"num_classes": num_classes, "classes": classes, **_head_kind(model.heads[own_head])}
        if num_classes
        else None,
    }
    starts = {}
    if isinstance(kind, WholeCodec):
        starts = {name: _starts(model, name, tensors) for name in names}
        starts = {name: known for name, known in starts.items() if known}
    tensors, encoding = encode(codec, tensors, starts, **settings)
    if encoding is not None:
        config["encoding"] = encoding
    card = render(model, names, source=source or folder.resolve().name, fingerprint=printed)
    return write(folder, config, tensors, model.record_of(names), card)


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
    check_config(full, folder / CONFIG, copy=True)
    tensors = _plain(tensors)
    check_tensors(full, tensors, folder / WEIGHTS)
    record = dict(record or {})
    check_record(record, "model.record")
    files = {METRICS: to_json(record, "model.record"), CARD: card}
    weights, checksum = pack(full, record, card, tensors)
    files[CONFIG] = to_json({**full, "checksum": checksum}, "the config")
    write_files(folder, {WEIGHTS: weights, **{name: text.encode() for name, text in files.items()}})
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
        with alone(folder):
            _sweep(folder)
            changed = [name for name in FILES if not _holds(folder / name, contents[name])]
            if CONFIG not in changed:
                # A save was cut off, and this one returns to the state before it. The weights that are there do not fit the
                # config, which is right already; the ones that come will, so now they are the last piece.
                changed.sort(key=lambda name: name == WEIGHTS)
            for name in changed:
                temporary[name] = folder / f".{name}.{uuid.uuid4().hex[:12]}.tmp"
                _write(temporary[name], contents[name], sync=name == WEIGHTS)
            for name in changed:
                temporary[name].replace(folder / name)
                del temporary[name]
    except OSError as error:
        raise SaveError(
            f"Could not save to '{folder}': {error.strerror or error}. What was there before is still whole. Free some "
            "space, or choose a folder "
            "that you may write to, and save again."
        ) from error
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if it is still empty


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While inside, no other process is inside for the same folder; where the system knows no such lock, nothing is promised."""
    try:
        import fcntl
    except ImportError:  # Windows; there a file that is being read cannot be replaced, and the save fails instead
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # lets go of the lock, too


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


def _holds(path: Path, data: bytes) -> bool:
    """Whether the file has this content already. A link does not count: it is replaced by a file."""
    return path.is_file() and not path.is_symlink() and path.stat().st_size == len(data) and path.read_bytes() == data


def _sweep(folder: Path) -> None:
    """Remove temporary files of saves that were killed long ago."""
    for entry in folder.iterdir():
        with contextlib.suppress(OSError):
            if _STALE.fullmatch(entry.name) and time.time() - entry.lstat().st_mtime > _STALE_AFTER:
                entry.unlink(missing_ok=True)


def _starts(model: Host, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """The floating parameters of an adapter that have more than one number, each with what attaching gives, None if random."""
    buffers = dict(cast("Adapter", model.adapters[name]).named_buffers())
    own = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
    wanted = [k for k, v in own.items() if v.is_floating_point() and v.numel() > 1 and k not in buffers]
    fresh = model.fresh_values(name) if wanted else {}
    return {
        key: start if (start := fresh.get(key)) is None or start.shape == own[key].shape else None for key in wanted
    }


def _select(model: Host, wanted: str | Sequence[str] | None) -> list[str]:
    known = list(model.adapters)
    if wanted is None:
        if known and not model.active:
            raise ConfigError(f"No adapter is active, so none would be saved. Name those to save: {', '.join(known)}.")
        return list(model.active)
    for name in (wanted := ONE_OR_MORE.of("adapters", wanted)):
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


def _head_kind(head: nn.Module) -> dict[str, str]:
    kind = kind_of(head)
    return {} if kind == "linear" else {"kind": kind}
