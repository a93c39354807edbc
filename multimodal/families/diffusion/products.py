"""More keys and values for any attention of diffusers whose processor forms one product by torch's own function.

The library has a processor of its own for nearly every class of transformers: each projects, norms and turns queries, keys and
values in its own way, and then calls `scaled_dot_product_attention`. Here the processor runs as it is, and that one call is
answered by `AttentionSite.attend`. Extra keys therefore join behind norms and positions of the own ones, as in
`multimodal.families.diffusion.attention`: they have neither, and every query sees them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from zoo.engine.attention import AttentionSite, mask_bias
from zoo.errors import AttachError

# Processors that call torch's product once, with queries (rows, heads, tokens, width), rows being samples
ONE_PRODUCT = frozenset(
    {
        "AuraFlowAttnProcessor2_0",
        "BriaAttnProcessor",
        "BriaFiboAttnProcessor",
        "CogVideoXAttnProcessor2_0",
        "CogView4AttnProcessor",
        "CosmosAttnProcessor2_0",
        "ErnieImageSingleStreamAttnProcessor",
        "Flux2AttnProcessor",
        "Flux2ParallelSelfAttnProcessor",
        "FluxAttnProcessor",
        "HunyuanAttnProcessor2_0",
        "HunyuanImageAttnProcessor",
        "HunyuanVideo15AttnProcessor2_0",
        "HunyuanVideoAttnProcessor2_0",
        "Kandinsky5T2VAttnProcessor",
        "LTXVideoAttnProcessor",
        "LongCatImageAttnProcessor",
        "Lumina2AttnProcessor2_0",
        "OmniGenAttnProcessor2_0",
        "OvisImageAttnProcessor",
        "QwenDoubleStreamAttnProcessor2_0",
        "SanaAttnProcessor2_0",
        "SkyReelsV2AttnProcessor",
        "WanAttnProcessor",
        "ZSingleStreamAttnProcessor",
    }
)


class Answered(TorchFunctionMode):
    """Inside, `scaled_dot_product_attention` is answered by a function of ours; in this thread alone."""

    def __init__(self, product: Callable[..., Tensor]) -> None:
        super().__init__()
        self.product, self.calls = product, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.calls += 1
            return self.product(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@dataclass(eq=False)
class OneProduct(AttentionSite):
    """An attention whose processor is the library's, with `attend` for its product."""

    _scale: float = 1.0
    _dropout: float = 0.0

    @property
    def scale(self) -> float:
        """As the processor asks for it."""
        return self._scale

    @property
    def dropout(self) -> float:
        """As the processor asks for it."""
        return self._dropout

    def extended(self, *args: Any, **kwargs: Any) -> Any:
        """The library's forward.

        Raises:
            AttachError: its product did not pass here, so it is another backend's.
        """
        with Answered(self._answer) as answered:
            output = self.original(*args, **kwargs)
        if answered.calls != 1:
            raise AttachError(
                f"{type(self.module).__name__} forms {answered.calls} products by torch's scaled_dot_product_attention, and not "
                "one: another backend of attention is set. Set the library's own back (transformer.reset_attention_backend())."
            )
        return output

    def _answer(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa and key.shape[1] != query.shape[1]:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        if is_causal:
            attn_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        self._scale = query.shape[-1] ** -0.5 if scale is None else scale
        self._dropout = dropout_p
        return self.attend(query, key, value, len(query), mask_bias(attn_mask))
