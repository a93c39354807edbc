"""What the files of a saved adapter hold: their names, and the checks that a config and weights have to pass.

`zoo.disk` reads and writes them; this module never touches the file system.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import safetensors
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as dump_safetensors
from torch import Tensor

from zoo.errors import ConfigError, WeightsError, nearest
from zoo.registry import list_heads

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
CARD = "README.md"
METRICS = "metrics.json"
FILES = (WEIGHTS, METRICS, CARD, CONFIG)  # in the order of their renames

FORMAT_VERSION = 1
SMALL = 1 << 16  # numbers of a tensor that is looked at together with others
HEAD = "head"
# The one metadata entry of the weights file: its checksum, a line break, and the other three files as JSON. One entry,
# because safetensors writes several in random order, and the same adapter should make the same bytes.
STAMP = "adapter-zoo"

# Types of numbers that are written, and read. What a method encodes in whole numbers, it decodes itself.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

_NAME = re.compile(r"[\w+-]+")
_PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def refuse_pickle(path: Path) -> None:
    """Raise WeightsError if the file's name says that it is a pickle."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise WeightsError(
            f"'{path}' is a pickle, which can run any code when it is read, so it was not opened. Only {WEIGHTS} is "
            "read: ask whoever published it for safetensors, or convert it where you trust its source."
        )


def pack(
    config: Mapping[str, Any], record: Mapping[str, Any], card: str, tensors: dict[str, Tensor]
) -> tuple[bytes, str]:
    """The weights file, with a copy of the other files inside, and its checksum."""
    copy = to_json({"config": config, "metrics": record, "card": card}, "the record")
    digest = _checksum(copy, tensors)
    return dump_safetensors(tensors, {STAMP: f"{digest}\n{copy}"}), digest


def parse(data: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        WeightsError: truncated, damaged, or a pickle under another name (which is not opened).
    """
    size = int.from_bytes(data[:8], "little")
    if len(data) < 10 or size > len(data) - 8 or data[8:9] != b"{":
        if data.startswith(_PICKLE_MAGIC):
            raise WeightsError(
                f"'{path}' is a pickle under another name; a pickle can run any code when it is read, so it was "
                "refused unread. Ask whoever published it for real safetensors."
            )
        raise WeightsError(
            f"'{path}' is truncated or not a safetensors file ({len(data):,} bytes). Copy or download it again."
        )
    try:
        header = json.loads(data[8 : 8 + size])
        metadata = dict(header.pop("__metadata__", {}))
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0) + 8 + size
        tensors = load_safetensors(data) if end <= len(data) else {}
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"'{path}' is damaged ({error}). Copy or download it again.") from error
    if end > len(data):
        raise WeightsError(f"'{path}' is truncated: {len(data):,} of {end:,} bytes. Copy or download it again.")
    return tensors, metadata


def unpack(data: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Tensors, copy of the other files ("config", "metrics", "card") and checksum of a weights file.

    Raises:
        WeightsError: truncated, damaged, a pickle, or not written by `pack`.
    """
    tensors, metadata = parse(data, path)
    digest, _, copy = str(metadata.get(STAMP, "")).partition("\n")
    if not digest or digest != _checksum(copy, tensors):
        what = "does not have the checksum that it states" if digest else "states no checksum, so we did not write it"
        raise WeightsError(
            f"'{path}' was damaged or changed: it {what}{not_finite(tensors)}. Copy or download the folder again."
        )
    return tensors, json.loads(copy), digest


def _checksum(copy: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the copy of the other files, and over each tensor's name, dtype, shape and bytes, in order of names."""
    digest = hashlib.sha256(copy.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


_TEXT, _WHOLE, _DICT, _LIST, _NONE = (str,), (int,), (dict,), (list,), (type(None),)


def check_version(config: Mapping[str, Any], path: Path) -> None:
    """Raise ConfigError if a newer version wrote the folder."""
    version = config.get("format_version")
    if isinstance(version, int) and not isinstance(version, bool) and version > FORMAT_VERSION:
        raise ConfigError(
            f"'{path}' has format_version {version}; this adapter-zoo ({_version()}) reads up to {FORMAT_VERSION}. "
            "Upgrade with `pip install -U adapter-zoo`."
        )


def check_config(config: Mapping[str, Any], path: Path, *, copy: bool = False) -> None:
    """Every field there, none unknown, each of its type; raises `ConfigError` naming the field.

    The copy inside the weights file cannot hold the checksum of that file.
    """
    top: dict[str, tuple[type, ...]] = {
        "format_version": _WHOLE,
        "zoo_version": _TEXT,
        "backbone": _DICT,
        "adapters": _LIST,
        "head": _DICT + _NONE,
    }
    if not copy:
        top["checksum"] = _TEXT
    if "encoding" in config:  # left out where tensors are stored as they are (zoo.disk.codecs)
        top["encoding"] = _DICT
    _check_fields(config, top, "", path)
    if config["format_version"] < 1:
        _wrong(path, "format_version", f"{config['format_version']}", f"a whole number from 1 to {FORMAT_VERSION}")
    named: dict[str, tuple[type, ...]] = {"name": _TEXT, "fingerprint": _TEXT + _NONE, "kwargs": _DICT}
    if "rest" in config["backbone"]:  # left out by earlier versions, and where the weights are not known
        named["rest"] = _TEXT
    if "quantised" in config["backbone"]:  # left out where weights are as the library has them
        named["quantised"] = _TEXT
    _check_fields(config["backbone"], named, "backbone.", path)
    if "rest" in named and not re.fullmatch(r"r1:[0-9a-f]{24}\.[0-9a-f]{8}", config["backbone"]["rest"]):
        _wrong(path, "backbone.rest", repr(config["backbone"]["rest"])[:60], "a fingerprint, 'r1:...'")
    if "quantised" in named and not re.fullmatch(r"[a-z0-9]{1,16}", config["backbone"]["quantised"]):
        _wrong(path, "backbone.quantised", repr(config["backbone"]["quantised"])[:60], "a format, such as 'nf4'")
    if "encoding" in config:
        told = {"codec": _TEXT, "tensors": _DICT, **({"packed": _DICT} if "packed" in config["encoding"] else {})}
        _check_fields(config["encoding"], told, "encoding.", path)
    names: set[str] = set()
    for i, entry in enumerate(config["adapters"]):
        where = f"adapters[{i}]"
        if not isinstance(entry, dict):
            _wrong(path, where, _kind(entry), "an object")
        _check_fields(
            entry, {"name": _TEXT, "method": _TEXT, "config": _DICT, "plan": _DICT + _NONE}, f"{where}.", path
        )
        name = entry["name"]
        if not _NAME.fullmatch(name) or name in (HEAD, "default") or name in names:
            _wrong(
                path,
                f"{where}.name",
                repr(name),
                f"letters, digits, '_', '-' and '+', not '{HEAD}' or 'default', and no name twice",
            )
        names.add(name)
    head = config["head"]
    if head is not None:
        fields: dict[str, tuple[type, ...]] = {"num_classes": _WHOLE, "classes": _LIST + _NONE}
        if "kind" in head:  # left out for a linear head
            fields["kind"] = _TEXT
            if head["kind"] not in list_heads():  # a closed list: nothing is imported by a name that a file gives
                _wrong(path, "head.kind", repr(head["kind"]), f"one of {', '.join(list_heads())}")
        _check_fields(head, fields, "head.", path)
        if head["num_classes"] < 1:
            _wrong(path, "head.num_classes", str(head["num_classes"]), "a whole number from 1")
        classes = head["classes"]
        if classes is not None and (
            len(classes) != head["num_classes"] or not all(isinstance(c, str) for c in classes)
        ):
            _wrong(
                path, "head.classes", f"{len(classes)} entries", f"{head['num_classes']} strings, one for each class"
            )


def _check_fields(value: Mapping[str, Any], spec: Mapping[str, tuple[type, ...]], where: str, path: Path) -> None:
    for name, types in spec.items():
        if name not in value:
            raise ConfigError(
                f"'{path}' lacks the field '{where}{name}' ({_names(types)}). Copy or download the folder again, or "
                "add it."
            )
        found = value[name]
        if not isinstance(found, types) or (isinstance(found, bool) and bool not in types):
            _wrong(path, where + name, _kind(found), _names(types))
    for name in value:
        if name not in spec:
            raise ConfigError(
                f"'{path}' has an unknown field '{where}{name}'. {nearest(name, spec)} Remove or rename it."
            )


def _wrong(path: Path, name: str, found: str, expected: str) -> NoReturn:
    raise ConfigError(
        f"'{path}': field '{name}' is {found}, expected {expected}. Correct it, or download the folder again."
    )


_JSON_NAMES = {str: "a string", int: "a whole number", dict: "an object", list: "a list", type(None): "null"}


def _names(types: Iterable[type]) -> str:
    return " or ".join(_JSON_NAMES[one] for one in types)


def _kind(value: Any) -> str:
    return f"{value!r:.60} ({type(value).__name__})"


def check_tensors(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise WeightsError unless each tensor belongs to a declared adapter or the head, and is finite."""
    owners = [entry["name"] for entry in config["adapters"]] + ([HEAD] if config["head"] is not None else [])
    for name in tensors:
        owner, slash, rest = name.partition("/")
        if owner not in owners or not slash or not rest:
            raise WeightsError(
                f"'{path}' holds tensor '{name}', which belongs to nothing that {CONFIG} declares "
                f"({', '.join(owners)}). Copy or download the folder again."
            )
        if tensors[name].dtype not in (*FLOATS, *WHOLE):
            raise WeightsError(
                f"'{path}' holds tensor '{name}' as {_type(tensors[name])}, a type that is not written here; those are "
                f"{', '.join(str(t).removeprefix('torch.') for t in (*FLOATS, *WHOLE))}. Save it again in one of these."
            )
    bad = not_finite(tensors)
    if bad:
        raise WeightsError(
            f"'{path}'{bad.replace(';', ':', 1)}. The run that made it diverged: train again with a lower learning rate, or "
            "use an earlier checkpoint."
        )


def check_kind(name: str, own: Tensor, stored: Tensor, what: str) -> None:
    """Raise WeightsError unless a stored tensor is of the kind of numbers that its place in the model takes.

    Floats of any precision are floats; whole numbers of any width are whole numbers; truth values are only themselves.
    """
    fits = [(t.dtype in FLOATS, t.dtype == torch.bool) for t in (own, stored)]
    if fits[0] != fits[1]:
        raise WeightsError(
            f"{what} holds tensor '{name}' as {_type(stored)}, where the model has {_type(own)}. Copy or download the folder "
            "again."
        )


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """ "; tensor '...' has ... NaN or Inf" for the first such tensor, or ""."""
    small: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors.values():
        if tensor.dtype in FLOATS and tensor.numel() <= SMALL:
            small.setdefault(tensor.dtype, []).append(tensor.reshape(-1))
    # an adapter has hundreds of small tensors: one look at all of a kind costs less than one at each
    clean = {kind for kind, parts in small.items() if bool(torch.isfinite(torch.cat(parts)).all())}
    for name, tensor in tensors.items():
        if tensor.dtype in clean and tensor.numel() <= SMALL:
            continue
        if tensor.dtype in FLOATS and not bool(torch.isfinite(tensor).all()):
            bad = int(tensor.numel() - torch.isfinite(tensor).sum())
            return f"; tensor '{name}' has {bad} of {tensor.numel()} values that are NaN or Inf"
    return ""


def _version() -> str:
    from zoo import __version__

    return __version__


def no_constant(name: str) -> NoReturn:
    """For `json.loads`: NaN and Infinity are no JSON."""
    raise ValueError(f"{name} is not a JSON number")


def finite(text: str) -> float:
    """For `json.loads`: a number beyond the range of floats is none."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is beyond the range of numbers")
    return value


def to_json(value: Mapping[str, Any], what: str) -> str:
    """Readable JSON; raises ConfigError for what has no place in it, NaN and Inf included."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        text.encode()  # a lone surrogate is no Unicode
        return text
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{what} cannot be written as JSON: {error}. Use finite numbers, strings, booleans, lists and dicts."
        ) from error
