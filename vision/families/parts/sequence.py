"""Families of timm whose tokens are one sequence, [class, registers | patches], from the first block to the last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vision.families.parts.timm_family import TimmBackbone


class SequenceBackbone(TimmBackbone):
    """Base of these families."""

    gives = ("pooled", "tokens", "maps")

    @property
    def num_prefix(self) -> int:
        """Class and register tokens in front of the patches."""
        return int(self.module.num_prefix_tokens)  # type: ignore[arg-type]

    def outputs(self, *inputs: Tensor, want: Sequence[str] = ("pooled",), **kwargs: Any) -> dict[str, Any]:
        """Tokens behind the last block and its norm, if any, [prefix | prompts that stay | patches]; the map is the patches'."""
        self.check_wanted(want)
        self.check_size(*inputs)
        module: Any = self.module
        tokens = module.forward_features(*inputs, **kwargs)
        found: dict[str, Any] = {}
        if "pooled" in want:
            found["pooled"] = module.forward_head(tokens, pre_logits=True).contiguous()
        if "tokens" in want:
            found["tokens"] = tokens
        if "maps" in want:
            height, width = module.patch_embed.dynamic_feat_size(inputs[0].shape[-2:])
            patches = tokens[:, tokens.shape[1] - height * width :]
            found["maps"] = [patches.transpose(1, 2).unflatten(2, (height, width))]
        return found
