"""Codecs: how the tensors of a saved adapter are encoded in its weights file.

    model.save_adapter("out/", encoding="int8")
    model.save_adapter("out/", encoding="compeft", k=20)
    zoo.load(adapter="out/")                              # decoded as the config says; nothing to be told

| codec    | a floating tensor becomes                                       | error                    |
| -------- | --------------------------------------------------------------- | ------------------------ |
| `plain`  | itself                                                          | none                     |
| `fp16`   | float16, where its numbers fit                                  | 2^-11 of each number     |
| `int8`   | rows of whole numbers -127..127 and a scale for each row        | 1/254 of a row's largest |
| `sparse` | the numbers other than 0 and a bit for each place               | none                     |
| `compeft` | a sign where it changed most, one number for all (`zoo.disk.compeft`) | what it is for    |

The config names the codec and the tensors that it encoded, with their types:
`"encoding": {"codec": "int8", "tensors": {"lora/blocks.0.attn.q.lora_a": "float32"}}`; a tensor is then stored in parts
`<name>#<part>`. A codec that reads an adapter as a whole stores its parts as `<adapter>/#<part>`, and `"encoding"` has a field
`"packed": {"lora": {"k": 20, "alpha": 1.0}}` with each such adapter and the settings. A plain folder has no `"encoding"`, and is
what it was before there were codecs. A reader that lacks a codec refuses by its name. Another package adds one by
`register_codec`, in a module that is imported before the folder is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.arguments import Kind, number
from zoo.disk import compeft
from zoo.errors import ConfigError, UnknownNameError, WeightsError, nearest

__all__ = ["CODECS", "Codec", "WholeCodec", "check_encoding", "codec_of", "decode", "encode", "register_codec"]

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Codec(NamedTuple):
    """How one tensor is encoded.

    `encode(tensor)` gives its parts by name, or None to leave it as it is; `decode(parts)` gives it back, up to the type. Both
    run on the CPU. What they are given to decode comes from a file: sizes must follow from the parts.
    """

    encode: Callable[[Tensor], dict[str, Tensor] | None]
    decode: Callable[[Mapping[str, Tensor]], Tensor]


class WholeCodec(NamedTuple):
    """How the floating parameters of one adapter are encoded together.

    `encode(tensors, starts, **settings)` gives the parts of them by name; `starts` holds what attaching gives, None where that is
    random. `decode(parts)` gives the tensors, and the names of those that are changes of what attaching gives. Tensors of one
    number, buffers and the head are not given to it. `settings` has a default and a kind for each setting.
    """

    encode: Callable[..., dict[str, Tensor]]
    decode: Callable[[Mapping[str, Tensor]], tuple[dict[str, Tensor], set[str]]]
    settings: Mapping[str, tuple[float, Kind]]


Starts = Mapping[str, Tensor | None]
CODECS: dict[str, Codec | WholeCodec | None] = {"plain": None}


def codec_of(name: str, settings: Mapping[str, Any]) -> tuple[Codec | WholeCodec | None, dict[str, Any]]:
    """A codec by its name, and its settings with the defaults.

    Raises:
        UnknownNameError: no such codec. ConfigError: a setting that it does not have, or that cannot be.
    """
    if name not in CODECS:
        raise UnknownNameError(f"There is no codec '{name}'. {nearest(name, CODECS)}")
    codec = CODECS[name]
    known = codec.settings if isinstance(codec, WholeCodec) else {}
    for key in settings:
        if key not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ConfigError(f"the codec '{name}' has no setting '{key}'; {has}.")
    return codec, {key: kind.of(key, settings.get(key, default)) for key, (default, kind) in known.items()}


def register_codec(name: str, codec: Codec | WholeCodec) -> None:
    """Make a codec known by name. Raises ConfigError if the name is taken."""
    if name in CODECS and CODECS[name] != codec:
        raise ConfigError(f"There is a codec '{name}' already; choose another name.")
    CODECS[name] = codec


def encode(
    name: str, tensors: Mapping[str, Tensor], starts: Mapping[str, Starts] | None = None, **settings: Any
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors as they are stored, and what the config says of them (None: nothing is encoded).

    `starts` holds, for each adapter that is to be encoded as a whole, its floating parameters by name and what they start with.

    Raises:
        UnknownNameError: no such codec. ConfigError: settings that it does not have, or what it cannot encode.
    """
    codec, settings = codec_of(name, settings)
    if codec is None:
        return dict(tensors), None
    if isinstance(codec, WholeCodec):
        rest = dict(tensors)
        packed: dict[str, Tensor] = {}
        for owner, known in (starts or {}).items():
            own = {key: rest.pop(f"{owner}/{key}") for key in known}
            parts = codec.encode(own, known, **settings)
            packed |= {f"{owner}/#{part}": value for part, value in parts.items()}
        return {**rest, **packed}, {"codec": name, "tensors": {}, "packed": dict.fromkeys(starts or {}, settings)}
    stored: dict[str, Tensor] = {}
    types: dict[str, str] = {}
    for key, tensor in tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        coded = codec.encode(tensor.detach().cpu().float()) if kind in _DTYPES and tensor.numel() else None
        if coded is None:
            stored[key] = tensor
            continue
        types[key] = kind
        stored |= {f"{key}#{part}": value for part, value in coded.items()}
    return stored, {"codec": name, "tensors": types}


def check_encoding(encoding: Mapping[str, Any], path: Any) -> None:
    """Raise ConfigError for a codec that this installation lacks, by its name, or a type that is none."""
    if encoding["codec"] not in CODECS:
        raise ConfigError(
            f"'{path}': the tensors are encoded by '{encoding['codec']}', a codec that this installation lacks (it has "
            f"{', '.join(CODECS)}). Import the package that registers it, or upgrade adapter-zoo, or ask for a plain copy."
        )
    for key, kind in encoding["tensors"].items():
        if kind not in _DTYPES:
            raise ConfigError(
                f"'{path}': field 'encoding.tensors.{key}' is {kind!r}, expected one of {', '.join(_DTYPES)}."
            )
    whole = isinstance(CODECS[encoding["codec"]], WholeCodec)
    if whole != ("packed" in encoding) or (whole and encoding["tensors"]):
        raise ConfigError(
            f"'{path}': the field 'encoding' is not what the codec '{encoding['codec']}' writes. Copy or download the folder "
            "again."
        )


def decode(
    encoding: Mapping[str, Any] | None, stored: Mapping[str, Tensor], path: Any, moved: set[str] | None = None
) -> dict[str, Tensor]:
    """Tensors out of what a weights file holds; `moved` gets the names of those that are changes of what attaching gives.

    Raises:
        WeightsError: parts that are missing, or do not make a tensor.
    """
    if encoding is None:
        return dict(stored)
    codec = CODECS[encoding["codec"]]
    rest = dict(stored)
    found: dict[str, Tensor] = {}
    if isinstance(codec, WholeCodec):
        for owner in encoding["packed"]:
            parts = _parts(rest, f"{owner}/#")
            try:
                tensors, changes = codec.decode(parts)
            except (KeyError, ValueError, RuntimeError, IndexError, TypeError, OverflowError) as error:
                raise WeightsError(
                    f"'{path}': the adapter '{owner}' is not what the codec '{encoding['codec']}' writes ({error}). Copy or "
                    "download the folder again."
                ) from error
            if twice := [key for key in tensors if f"{owner}/{key}" in rest]:
                raise WeightsError(f"'{path}' holds '{owner}/{twice[0]}' twice. Copy or download the folder again.")
            found |= {f"{owner}/{key}": tensor for key, tensor in tensors.items()}
            if moved is not None:
                moved |= {f"{owner}/{key}" for key in changes}
        return {**rest, **found}
    for key, kind in encoding["tensors"].items():
        parts = _parts(rest, f"{key}#")
        try:
            if codec is None or not parts:
                raise ValueError("its parts are not there")
            found[key] = codec.decode(parts).to(_DTYPES[kind])
        except (KeyError, ValueError, RuntimeError, IndexError) as error:
            raise WeightsError(
                f"'{path}': tensor '{key}' is not what the codec '{encoding['codec']}' writes ({error}). Copy or download the "
                "folder again."
            ) from error
    return {**rest, **found}


def _parts(rest: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Taken out of `rest`: what stands under a prefix."""
    return {name[len(prefix) :]: rest.pop(name) for name in list(rest) if name.startswith(prefix)}


# -- the codecs -------------------------------------------------------------------------------------------------------


def _half(tensor: Tensor) -> dict[str, Tensor] | None:
    half = tensor.half()
    return {"half": half} if bool(half.isfinite().all()) else None


def _rows(tensor: Tensor) -> dict[str, Tensor] | None:
    """Vectors are few numbers: biases, norms, scales stay as they are."""
    if tensor.ndim < 2:
        return None
    flat = tensor.reshape(len(tensor), -1)
    scale = flat.abs().amax(dim=1) / 127
    whole = (flat / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round().clamp(-127, 127)
    return {"rows": whole.to(torch.int8).reshape(tensor.shape), "scale": scale}


def _from_rows(parts: Mapping[str, Tensor]) -> Tensor:
    rows, scale = parts["rows"], parts["scale"].float()
    if scale.shape != rows.shape[:1]:
        raise ValueError(f"{len(rows)} rows and {tuple(scale.shape)} scales")
    return rows.float() * scale.reshape(-1, *([1] * (rows.ndim - 1)))


def _sparse(tensor: Tensor) -> dict[str, Tensor] | None:
    """Only where it saves: a number of 4 bytes costs 4 bytes and a bit."""
    flat = tensor.reshape(-1)
    there = flat != 0
    if int(there.sum()) > 0.9 * flat.numel():
        return None
    bits = torch.nn.functional.pad(there, (0, -flat.numel() % 8)).reshape(-1, 8).to(torch.uint8)
    packed = (bits << torch.arange(8, dtype=torch.uint8)).sum(dim=1).to(torch.uint8)
    return {"values": flat[there], "bits": packed, "shape": torch.tensor(tensor.shape, dtype=torch.int64)}


def _from_sparse(parts: Mapping[str, Tensor]) -> Tensor:
    shape, packed = [int(n) for n in parts["shape"].reshape(-1)[:16]], parts["bits"].reshape(-1)
    count = math.prod(shape)
    if min(shape, default=1) < 0 or -(-count // 8) != len(packed):
        raise ValueError(f"{len(packed)} bytes of places for {count} numbers")
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    there = bits.reshape(-1)[:count].bool()
    if int(there.sum()) != parts["values"].numel():
        raise ValueError(f"{parts['values'].numel()} numbers for {int(there.sum())} places")
    flat = torch.zeros(count)
    flat[there] = parts["values"].reshape(-1).float()
    return flat.reshape(shape)


register_codec("fp16", Codec(_half, lambda parts: parts["half"]))
register_codec("int8", Codec(_rows, _from_rows))
register_codec("sparse", Codec(_sparse, _from_sparse))
register_codec(
    "compeft",
    WholeCodec(
        compeft.pack,
        compeft.unpack,
        {"k": (20.0, number(compeft.LEAST, 100)), "alpha": (1.0, number(above=0, most=1e6))},
    ),
)
