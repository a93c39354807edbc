"""Reading a checkpoint of diffusers in the precision that is asked for, without a copy in another one.

The library builds the transformer without memory and takes tensor after tensor from the file, which is mapped and not read as a
whole; by default it makes float32 of them, twice the size of most large checkpoints. Here they are asked for in the wanted
precision where that loses nothing of the stored one. Where it does, they stay as stored (and mapped) until `zoo.load` converts
them one by one: the fingerprint of the weights is taken before, so that it is the same in every precision.
"""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.library import check_loaded, pretrained_config

NAME = "diffusion_pytorch_model.safetensors"
# Fixed tables of positions, which the library makes anew; early files hold them
SPARE = (r"^pos_embed\.pos_embed$",)
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def load(made: Any, source: str, folder: str, options: dict[str, Any], dtype: torch.dtype | None) -> nn.Module:
    """`made.from_pretrained`, in `dtype` or in the stored precision; None leaves the precision to the library.

    Raises:
        WeightsError: tensors of the network that the files lack, or the reverse.
        Whatever else the library and the Hub's client raise.
    """
    place = {"subfolder": folder} if folder else {}
    other = options.keys() & {
        "variant",
        "revision",
        "use_safetensors",
    }  # other files than those that are looked at here
    chosen = None if other or dtype is None else through(stored_dtype(source, folder), dtype)
    if chosen is not None:
        options = {**options, "torch_dtype": chosen}
    module, report = made.from_pretrained(source, **place, output_loading_info=True, **options)
    check_loaded(source, made.__name__, report, spare=SPARE)
    return module  # type: ignore[no-any-return]


def through(stored: torch.dtype | None, wanted: torch.dtype) -> torch.dtype | None:
    """The precision to load in: the wanted one if it holds every stored number, else the stored one; None if that is unknown."""
    if stored is None:
        return None
    return wanted if torch.promote_types(stored, wanted) == wanted else stored


def stored_dtype(source: str, folder: str) -> torch.dtype | None:
    """The widest precision of a checkpoint's tensors; None if it is not in safetensors format, or has other numbers."""
    from safetensors import safe_open

    inside = f"{folder}/{NAME}" if folder else NAME
    index = pretrained_config(source, f"{inside}.index.json")
    names = sorted(set(index["weight_map"].values())) if isinstance(index, dict) else [NAME]
    found: set[str] = set()
    for name in names:
        file = _file(source, f"{folder}/{name}" if folder else name)
        if file is None:
            return None
        with safe_open(file, "pt") as tensors:
            keys = tensors.keys()
            found |= {tensors.get_slice(key).get_dtype() for key in keys}
    floats = [FLOATS.get(name) for name in found if not name.startswith(("I", "U", "BOOL"))]
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
