"""VideoPainter: a small copy of a video transformer's first blocks reads the masked video and adds its background to all blocks.

Idea: the video around the hole is known. An encoder, cloned from the first m blocks, reads the noisy latents, the latents of the
video without what is masked, and the mask; what its blocks say is added behind the blocks of the frozen transformer, at tokens
of the background alone.
Points: `block` (verb `after`), all of the N that the video passes; the encoder runs once for each pass (`points.generate`).

    h_1 .. h_m = blocks(patch [z | masked | mask])              z, masked (B, F, C, H, W), mask (B, F, 1, H, W), 1 = to be filled
    s_j = scale * (Z_j h_j + c_j)                                (B, N, d), Z_j (d, d), c_j (d,)
    y_i <- y_i + s_j where the token holds nothing of the mask   j = i // ceil(N / m), for every block i of the transformer

`first`: block i of the first m receives s_i, and no other block anything. `everywhere`: at all tokens, masked or not.
Start: Z = 0 and c = 0, so the pretrained function, to the bit. The encoder's patch embedding has the transformer's weights of the
latents twice and zeros for the mask; its blocks and the embedding of the time are copies; that of the text is fresh, as the
authors' routine leaves it (`copy_text`: a copy). The encoder does not see the image of an image-to-video model.
Given in each pass: `masked`, `mask` (latents, in the layout that the model takes them in; `multimodal.tasks.inpaint` makes both
of pixels, and the pipeline `multimodal.families.diffusion.inpainting`, too). Without them the model is not run.
Defaults: m = 2 (their scripts; their option's own default is 4), AdamW, lr 1e-5, betas (0.9, 0.95), weight decay 1e-4, warm-up of
1,000 steps, cosine with restarts, 49 frames of 480 x 720, bfloat16.
Counts: CogVideoX-5B-I2V, m = 2: 2 blocks of 132,197,632, embeddings of time, patches and text of 14,830,592, Z of 18,880,512 =
298,106,368. The authors' module has 3,462,208 more that its forward never uses (a last norm, a modulation, a projection, an
embedder): 301,568,576, of 5,570,479,680 (5.4 %; "6 %" of a nominal five billion).

Source: Bian et al., "VideoPainter: Any-length Video Inpainting and Editing with Plug-and-Play Context Control", SIGGRAPH 2025;
TencentARC/VideoPainter (diffusers/src/diffusers/models/branch_cogvideox.py, transformers/cogvideox_transformer_3d.py).

Deviations: what the authors' module never uses does not exist. Theirs is a fork of CogVideoX; ours takes any transformer of
videos of the library: latents of as many channels as it denoises, all its conditions but the image's latents, and where text
and video have blocks of their own, the text's half of the last block stays as it is, since nobody reads it (frozen, not counted).
A token of several latent frames (CogVideoX 1.5) is background if none of them is masked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.adapters.base import Adapter
from zoo.errors import AttachError, DataError
from zoo.points import Points
from zoo.points.recorder import Made
from zoo.registry import register_adapter


class Encoder(nn.Module):
    """The first blocks with a projection behind each, zero at the start."""

    def __init__(self, front: Any, scale: float, everywhere: bool) -> None:
        super().__init__()
        self.front, self.scale, self.everywhere = front, scale, everywhere
        factory = {"device": next(front.parameters()).device}
        self.out = nn.ModuleList(nn.Linear(front.width, front.width, **factory) for _ in range(front.count))
        for linear in self.out:
            nn.init.zeros_(linear.weight)  # type: ignore[arg-type]
            nn.init.zeros_(linear.bias)  # type: ignore[arg-type]

    def forward(self, latents: Tensor, masked: Tensor, mask: Tensor, *given: Any) -> tuple[list[Tensor], Tensor]:
        """What is added to each share of the blocks, (rows, N, d), and the tokens that take it, (B, N)."""
        axis = self.front.channels_axis
        one = (*latents.shape[:axis], 1, *latents.shape[axis + 1 :])
        for name, tensor, shape in (("masked", masked, tuple(latents.shape)), ("mask", mask, one)):
            if tuple(tensor.shape) != shape:
                raise DataError(
                    f"'{name}' is {tuple(tensor.shape)} for latents {tuple(latents.shape)}; expected {shape}: the video without "
                    "what is masked, and the mask, brought to the size of the latents."
                )
        names = self.front.names
        pairs = [a if a is not None else b for a, b in zip(given[: len(names)], given[len(names) :])]
        samples = self.front(latents, masked, mask, *pairs)
        told = [self.scale * project(h.to(project.weight)) for project, h in zip(self.out, samples)]  # type: ignore[operator]
        background = ~self.front.tokens(mask)
        return told, torch.ones_like(background) if self.everywhere else background


class Background(nn.Module):
    """`y <- y + s` at tokens of the background, behind one block."""

    def __init__(self, made: Made, encoder: Encoder, share: int) -> None:
        super().__init__()
        self.made, self.shared, self.share = made, (encoder,), share

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y (rows, N, d); rows are samples, or frames of samples."""
        told, background = self.made.get()
        return torch.where(background.reshape(*y.shape[:2], 1), y + told[self.share].to(y.dtype), y)


@register_adapter("videopainter")
@dataclass
class VideoPainter(Adapter):
    """An encoder of the masked video beside a transformer of videos.

    Args:
        blocks: m, of the encoder.
        first: add to the first m blocks alone.
        everywhere: add at masked tokens, too.
        copy_text: the encoder's embedding of the text starts as a copy.
        scale: of all that is added.
    """

    blocks: int = 2
    first: bool = False
    everywhere: bool = False
    copy_text: bool = False
    scale: float = 1.0

    merges = False
    trial = {"blocks": 1}
    trial_families = ()
    paper = "Bian et al. 2025"
    taxonomy = "additive"
    default_lr = 1e-5
    default_weight_decay = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.blocks >= 1, f"blocks is {self.blocks}; expected 1 or more.")

    @classmethod
    def of_size(cls, size: int) -> dict[str, Any]:
        """By the blocks of the encoder."""
        return {"blocks": size}

    def attach(self, points: Points) -> None:
        """The encoder, and what it says behind each block.

        Raises:
            AttachError: no transformer of videos, or fewer blocks than the encoder is to have.
        """
        front = points.first_blocks(self.blocks, copy_text=self.copy_text)
        paths = tuple(f"{path}." for path in front.twin.stream)
        blocks = [p for p in points.require("block", "videopainter") if p.path.startswith(paths)]
        latents = points.context("inputs")
        masked = points.context("masked", example=_like(torch.zeros_like))
        mask = points.context("mask", example=_like(_hole, axis=front.channels_axis))
        given = [points.context(f"inputs.{i}", required=False) for i, _ in enumerate(front.names, 1)]
        given += [points.context(f"inputs.{name}", required=False) for name in front.names]
        if any(p.dim_out != front.width for p in blocks):
            raise AttachError(f"'videopainter' needs blocks of one width; those of {points.backbone} have several.")
        encoder = Encoder(front, self.scale, self.everywhere)
        made = points.generate("encoder", encoder, latents, masked, mask, *given)
        interval = 1 if self.first else -(-len(blocks) // self.blocks)
        for i, block in enumerate(blocks[: self.blocks] if self.first else blocks):
            block.after(Background(made, encoder, i // interval))


def _like(make: Callable[..., Tensor], **settings: Any) -> Callable[[Tensor], Tensor]:
    made = functools.partial(make, **settings)  # a model that holds it can be pickled
    made.of_inputs = True  # type: ignore[attr-defined]
    return made


def _hole(latents: Tensor, axis: int) -> Tensor:
    """A mask of the right half of each frame."""
    mask = torch.zeros_like(latents.narrow(axis, 0, 1))
    mask[..., mask.shape[-1] // 2 :] = 1
    return mask
