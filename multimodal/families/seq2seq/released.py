"""The released checkpoints of VL-T5 and VL-BART: one flat state dict with the keys of an older transformers.

Layout: the library's T5 or BART keys, and `encoder.visual_embedding.*` (`model.encoder.visual_embedding.*`), each behind the
prefix `module.` of a distributed run. Older files say `vis_encoder` for `encoder`. Tied tensors (`lm_head`, `*.embed_tokens`,
`visual_embedding.obj_order_embedding`) stand there once more. Width of the features, norms of the visual embedding and size of
the vocabulary are read off the tensors: VL-T5 has norms of its own for features and boxes, VL-BART one norm over the sum.

The official files are pickles, which can run code when they are read; they are refused, with what to do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import MismatchError, WeightsError

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle")
# Left over from older releases of the library, where nothing reads them either
UNREAD = (
    "encoder.version",
    "decoder.version",
    "model.encoder.version",
    "model.decoder.version",
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
)
OPTIONAL = ("final_logits_bias",)


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file in safetensors format, under the library's keys.

    Raises:
        WeightsError: no such file, a pickle, a damaged file, or values that are not finite.
    """
    file = Path(path).expanduser()
    if file.suffix.lower() in PICKLES:
        raise WeightsError(
            f"'{file.name}' is a pickle, which can run any code when it is read; it is not opened. Convert it once, where you "
            "trust it: import torch; from safetensors.torch import save_file; state = torch.load('"
            f"{file.name}', map_location='cpu', weights_only=True); save_file({{k: v.clone().contiguous() for k, v in "
            f"state.items()}}, '{file.stem}.safetensors')"
        )
    if not file.is_file():
        raise WeightsError(f"There is no checkpoint '{file}'; expected a file in safetensors format.")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(file)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"'{file}' is no whole safetensors file ({error}). Copy or convert it again.") from error
    state = {_renamed(key): value for key, value in stored.items()}
    broken = [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if broken:
        raise WeightsError(f"'{file}' holds NaN or Inf, first in '{broken[0]}'.")
    return state


def _renamed(key: str) -> str:
    key = key.removeprefix("module.")
    for prefix in ("model.", ""):
        if key.startswith(f"{prefix}vis_encoder."):
            return f"{prefix}encoder." + key.removeprefix(f"{prefix}vis_encoder.")
    return key


def settings(state: dict[str, Tensor], encoder: str, words: str) -> dict[str, Any]:
    """Options of the network that the tensors tell: width of the features, norms, number of images, size of the vocabulary.

    Args:
        encoder: prefix of the encoder's keys. words: key of the word embedding.

    Raises:
        WeightsError: there is no visual embedding, or no word embedding.
    """
    visual = f"{encoder}visual_embedding."
    for key in (f"{visual}feat_embedding.0.weight", words):
        if key not in state:
            raise WeightsError(
                f"The checkpoint has no '{key}', so it is none of this family. It has {_some(list(state))}."
            )
    own, over_sum = f"{visual}feat_embedding.1.weight" in state, f"{visual}layer_norm.weight" in state
    images = state.get(f"{visual}img_order_embedding.weight")
    return {
        "feat_dim": state[f"{visual}feat_embedding.0.weight"].shape[1],
        "vocab_size": state[words].shape[0],
        "use_vis_layer_norm": own or over_sum,
        "individual_vis_layer_norm": not over_sum,
        "use_vis_order_embedding": images is not None,
        **({} if images is None else {"n_images": images.shape[0]}),
    }


def load(module: nn.Module, state: dict[str, Tensor], words: str) -> None:
    """Put the tensors into the network: every key is used, and none is missing.

    Raises:
        WeightsError: keys that the network does not have, or lacks; a tied tensor that differs from the words'.
        MismatchError: another shape.
    """
    own = module.state_dict()
    if own[words].device.type == "meta":
        return
    state = {k: v for k, v in state.items() if k not in UNREAD}
    unknown, tied = (
        [k for k in state if k not in own],
        [k for k, v in own.items() if v is not own[words] and _same(v, own[words])],
    )
    if unknown:
        raise WeightsError(f"{len(unknown)} tensors of the checkpoint have no place in the network: {_some(unknown)}.")
    missing = [k for k in own if k not in state and k not in tied and k not in OPTIONAL]
    if missing:
        raise WeightsError(f"The checkpoint lacks {len(missing)} tensors of the network: {_some(missing)}.")
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise MismatchError(
                f"'{key}' is {tuple(value.shape)} in the checkpoint and {tuple(own[key].shape)} in the network. Load it into a "
                "network of the size that it was trained at."
            )
        if key in tied and not torch.equal(value, state[words]):
            raise WeightsError(
                f"'{key}' differs from '{words}' in the checkpoint; the network has one tensor for both."
            )
    with torch.no_grad():
        for key, value in state.items():
            own[key].copy_(value)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of a state dict are one parameter."""
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
