"""Reading a checkpoint of diffusers in the precision that is asked for, without a copy in another one (`zoo.families.precision`).

The library builds the transformer without memory and takes tensor after tensor from the file, which is mapped and not read as a
whole; by default it makes float32 of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.families.precision import stored_dtype, through
from zoo.library import check_loaded

NAME = "diffusion_pytorch_model.safetensors"
# Fixed tables of positions, which the library makes anew; early files hold them
SPARE = (r"^pos_embed\.pos_embed$",)


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
    chosen = None if other or dtype is None else through(stored_dtype(source, folder, NAME), dtype)
    if chosen is not None:
        options = {**options, "torch_dtype": chosen}
    module, report = made.from_pretrained(source, **place, output_loading_info=True, **options)
    check_loaded(source, made.__name__, report, spare=SPARE)
    return module  # type: ignore[no-any-return]
