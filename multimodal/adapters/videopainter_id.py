"""VideoPainter's ID adapter: LoRA on the attention, and the keys and values of what is masked once more, so that it stays itself.

Idea: what is filled in shall be the same thing in all frames, and in all windows of a long video. Every token sees the keys and
values of the masked tokens a second time: of the same pass, or of the window before.
Points: `linear` q, k, v, o (verb `add`), `attention` (verb `again`); `linear` modulation (verb `after`) and `block` (verb
`watch`) only to look. Of CogVideoX, whose attention is over [text | video].

    K' = [K ; K * m]     V' = [V ; V * m]                        K, V (B, L + N, d) of the projections; m (B, L + N), text: 0
    a later window: K' = [K ; w W_k z * m_before], V alike       z = LN(y_before) * (1 + b) + a, of the present time
    q, k, v, o: y <- y + (alpha / r) B A x                       A (r, i), B (o, r)

Norms of keys and positions are the own ones. A masked token is one that holds anything of the mask; y_before is what left the
same block in the last step of the window before, behind what other adapters added. The keys that m makes zero are not taken out:
they become the norm's bias, and have a share of the softmax. For a sample without any masked token the second half is hidden.
Start: B = 0, but the second half is there, so this is not the pretrained function.
Given in each pass: `mask` of the latents, as for `videopainter`. The pipeline hands `previous` from window to window: the states
of all blocks, their mask, and w; and takes the states by `keep`, a dict that the pass fills.
Defaults: r = 256, alpha = 128; AdamW 5e-5, warm-up 200, 10 epochs, the loss of `multimodal.tasks.inpaint`; the transformer and
VideoPainter's encoder frozen; w = 0.5 in their scripts.
Counts: CogVideoX-5B-I2V: 42 blocks of four times 2 r d = 264,241,152.

Source: as `videopainter` (diffusers/src/diffusers/models/attention_processor.py, `CogVideoXAttnProcessor2_0_resample`;
train/VideoPainterID.sh).

Deviations: their second half is there for empty masks too, as keys without content; here it is hidden then, and the sample is
that of the frozen attention. Their pipeline takes the mask of the step before for that of the window before, from its second
step on; here it is that of the window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapters.base import Adapter
from zoo.adapters.parts.low_rank import LowRank
from zoo.errors import AttachError, DataError
from zoo.points import Points
from zoo.points.recorder import Carried, Value
from zoo.registry import register_adapter


def masked_tokens(mask: Tensor, count: int) -> Tensor:
    """Mask of latents (B, F, 1, H, W) -> (B, count), true where one of the `count` tokens of a video holds any of it."""
    frames, height, width = mask.shape[1], *mask.shape[3:]
    side = round((frames * height * width / count) ** 0.5)
    return (F.max_pool2d(mask.float().flatten(0, 1), side) > 0).reshape(mask.shape[0], -1)


class Once(nn.Module):
    """Keys and values of an attention -> those of the masked tokens, of this pass or of the window before."""

    block: Any

    def __init__(self, block: Any, name: str, mask: Value, previous: Value, modulation: Carried) -> None:
        super().__init__()
        self.__dict__["block"] = block  # the frozen one, no part of this
        self.name, self.mask, self.previous, self.modulation = name, mask, previous, modulation

    def forward(self, k: Tensor, v: Tensor, words: int) -> tuple[Tensor, ...]:
        """k, v (B, L + N, d), of the projections, L = words -> the same, and (B, 1, 1, L + N) which of them are seen at all."""
        mask, block = self.mask.rows(k), self.block
        before = self.previous.get() if self.previous.given else None
        if before is not None and before["weight"] > 0:
            told = self.modulation.take()
            assert told is not None, "the modulation runs in front of its attention"
            shift, scale = told[:, None].chunk(6, dim=-1)[:2]
            y, mask = before["states"][self.name].to(k), before["mask"].to(k)
            if len(y) != len(k) or y.shape[1] + words != k.shape[1]:
                raise DataError(
                    f"the window before left {tuple(y.shape)} at '{self.name}', and this one has {len(k)} x {k.shape[1] - words} "
                    "tokens of video. Windows must be of one size, and all their samples this adapter's."
                )
            norm = block.norm1.norm
            z = F.layer_norm(y, norm.normalized_shape, norm.weight, norm.bias, norm.eps) * (1 + scale) + shift
            there = masked_tokens(mask, y.shape[1])
            part = there.unsqueeze(-1).to(k) * before["weight"]
            made = [
                F.pad(project(z.to(k)) * part, (0, 0, words, 0)) for project in (block.attn1.to_k, block.attn1.to_v)
            ]
        else:
            there = masked_tokens(mask, k.shape[1] - words)
            part = F.pad(there, (words, 0)).unsqueeze(-1).to(k)
            made = [k * part, v * part]
        seen = there.any(dim=1).view(-1, 1, 1, 1).expand(-1, 1, 1, k.shape[1])
        return *made, seen


class Note(nn.Module):
    """Leaves what passes for the attention of the same block."""

    def __init__(self, place: Carried) -> None:
        super().__init__()
        self.place = place

    def forward(self, y: Tensor) -> Tensor:
        """As it is."""
        self.place.put(y)
        return y


class Keep(nn.Module):
    """Hands a block's output to who asked for it."""

    def __init__(self, name: str, keep: Value) -> None:
        super().__init__()
        self.name, self.keep = name, keep

    def forward(self, y: Tensor) -> None:
        """Into the dict that was given, if one was."""
        if self.keep.given:
            self.keep.get()[self.name] = y.detach()


@register_adapter("videopainter-id")
@dataclass
class VideoPainterID(Adapter):
    """LoRA, and the keys and values of masked tokens once more, for things that stay themselves.

    Args:
        rank, alpha: of LoRA.
        targets: its projections.
    """

    rank: int = 256
    alpha: float = 128.0
    targets: str | tuple[str, ...] = ("q", "k", "v", "o")

    identity, merges = False, False
    trial = {"rank": 2, "alpha": 1.0}
    trial_families = ()
    paper = "Bian et al. 2025"
    taxonomy = "hybrid"
    default_lr = 5e-5
    default_weight_decay = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.rank >= 1, f"rank is {self.rank}; expected 1 or more.")

    def attach(self, points: Points) -> None:
        """LoRA at the projections, and the second half at every attention.

        Raises:
            AttachError: the network is no CogVideoX.
        """
        attentions = points.require("attention", "videopainter-id")
        blocks = [a.name.removesuffix(".attn.product") for a in attentions]
        modulated = {point.name for point in points}
        if any(f"{name}.attn.modulation" not in modulated for name in blocks):
            raise AttachError(
                f"'videopainter-id' needs an attention over [text | video] behind a modulated norm, as CogVideoX has it; "
                f"{points.backbone} has none."
            )
        for point in points.linears(self.targets):
            point.add(LowRank(point.dim_in, point.dim_out, self.rank, self.alpha / self.rank))
        mask = points.context("mask", example=_hole)
        previous = points.context("previous", per="batch", required=False)
        keep = points.context("keep", per="batch", required=False)
        for name, attention in zip(blocks, attentions):
            block, modulation = points[name], points.carried(f"modulation{attention.block}")
            points[f"{name}.attn.modulation"].after(Note(modulation))
            attention.again(Once(block.module, name, mask, previous, modulation))
            block.watch(Keep(name, keep))


def _hole(latents: Tensor) -> Tensor:
    """A mask of the right half of each frame (B, F, C, H, W)."""
    mask = torch.zeros_like(latents[:, :, :1])
    mask[..., mask.shape[-1] // 2 :] = 1
    return mask


_hole.of_inputs = True  # type: ignore[attr-defined]
