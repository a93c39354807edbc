"""In which precision a checkpoint in safetensors format is kept, and in which it is to be read.

A network that is wanted in bfloat16 is not read in float32 first, which is twice the size of most large checkpoints. It is read
in the wanted precision where that loses nothing of the stored one. Where it does, it stays as stored (and mapped) until
`zoo.load` converts it tensor by tensor: the fingerprint of the weights is taken before, so that it is the same in every
precision, and an adapter that was trained in one can be loaded in another.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import reduce
from pathlib import Path

import torch

from zoo.library import pretrained_config

__all__ = ["stored_dtype", "through"]

FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def through(stored: torch.dtype | None, wanted: torch.dtype) -> torch.dtype | None:
    """The precision to load in: the wanted one if it holds every stored number, else the stored one; None if that is unknown."""
    if stored is None:
        return None
    return wanted if torch.promote_types(stored, wanted) == wanted else stored


def stored_dtype(source: str, folder: str, name: str, spare: Sequence[str] = ()) -> torch.dtype | None:
    """The widest precision of a checkpoint's tensors; None if it is not in safetensors format, or has other numbers.

    Args:
        source: a local folder or a Hub repository; folder: inside of it, or "".
        name: of the file, where it is one; beside a list of several stands `<name>.index.json`.
        spare: patterns of tensors that are not read.
    """
    from safetensors import safe_open

    inside = f"{folder}/{name}" if folder else name
    index = pretrained_config(source, f"{inside}.index.json")
    names = sorted(set(index["weight_map"].values())) if isinstance(index, dict) else [name]
    found: set[str] = set()
    for part in names:
        file = _file(source, f"{folder}/{part}" if folder else part)
        if file is None:
            return None
        try:
            with safe_open(file, "pt") as tensors:
                keys = [key for key in tensors.keys() if not any(fnmatchcase(key, p) for p in spare)]  # noqa: SIM118
                found |= {tensors.get_slice(key).get_dtype() for key in keys}
        except Exception:  # of a class of its own; the library then says what is wrong
            return None
    floats = [FLOATS.get(kind) for kind in found if not kind.startswith(("I", "U", "BOOL"))]
    if not floats or None in floats:
        return None
    return reduce(torch.promote_types, floats)  # type: ignore[arg-type]


def _file(source: str, name: str) -> Path | None:
    """A file of a local folder or of a Hub repository, from where the library takes it afterwards too."""
    local = Path(source).expanduser()
    if local.is_dir():
        return local / name if (local / name).is_file() else None
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, name))
    except Exception:  # the library then says what is wrong, or finds another format
        return None
