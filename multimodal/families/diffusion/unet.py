"""Text-to-image by a convolutional U: diffusers' `UNet2DConditionModel` (Stable Diffusion 1 and 2, SDXL).

Residual convolutions at several resolutions, which the time shifts (`time_emb_proj`), and behind some of them transformers of
pre-norm blocks on the grid of latents:

    u = x + Attn(LN x)        w = u + Cross(LN u, text)        y = w + W_down (gelu(gate) * up),  [up, gate] = W_up LN w

Points: `blocks.i` are the transformers' blocks, in forward order (down, middle, up); what is around them has the library's path
as its name. Convolutions have the role `conv`, and take what is trained or rescaled, not low-rank changes. Group norms are norm
points whose channels come first. SDXL also takes the pooled text and the image's size (`condition.pooled`). The text enters every
cross attention as its encoder made it, and the library's network has no module that it passes on the way: it is led through one
of ours, which has no parameters and hands it on (`condition.text`), and which a merged network does not have.

Count: 859,520,964 parameters for SD 1.5 and 2,567,463,684 for SDXL. LoRA of rank 4 on q, k, v and o of SD 1.5: 797,184.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from multimodal.families.diffusion.described import of_heads
from multimodal.families.diffusion.family import OPTIONS, DiffusersBackbone, embedder, pixel_config, timesteps
from multimodal.families.diffusion.tables import BLOCK, attention, branch, mlp, norms
from zoo.errors import DataError
from zoo.points import AttentionPoint, ConditionPoint, NormPoint, Point
from zoo.points.rows import make_linear
from zoo.registry import register_backbone

TABLE = (
    *norms(("norm1", "norm1")),
    *attention("attn", "attn1"),
    branch("attn", "attn1", "attn", "norm1"),
    *norms(("norm2", "norm2")),
    *attention("cross", "attn2", "cross"),
    branch("cross", "attn2", "cross", "norm2"),
    *norms(("norm3", "norm3")),
    *mlp("mlp", "ff", "norm3", gated=True),
    BLOCK,
)
SD15, SDXL = (
    "diffusers:stable-diffusion-v1-5/stable-diffusion-v1-5",
    "diffusers:stabilityai/stable-diffusion-xl-base-1.0",
)
XL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


class TextEntry(nn.Module):
    """What the text of a call passes before it is read: a place for what changes it."""

    def forward(self, text: Tensor) -> Tensor:
        """As it is."""
        return text


def _through(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call of the network, its text led through the entry."""
    if kwargs.get("encoder_hidden_states") is not None:
        return args, {**kwargs, "encoder_hidden_states": module.text_entry(kwargs["encoder_hidden_states"])}
    if len(args) > 2 and args[2] is not None:
        return (*args[:2], module.text_entry(args[2]), *args[3:]), kwargs
    return args, kwargs


_SIZES = ("block_out_channels", "layers_per_block", "transformer_layers_per_block", "addition_time_embed_dim")


@register_backbone
class UNet(DiffusersBackbone):
    """`sd15`, `sdxl`, or `diffusers:<repository or folder>` with a UNet of this class."""

    family = "unet"
    diffusers_class = "UNet2DConditionModel"
    part = "unet"
    aliases = {"sd15": SD15, "sdxl": SDXL}
    configs = {SD15: {"sample_size": 64, "cross_attention_dim": 768}, SDXL: XL}
    licences = {SD15: "creativeml-openrail-m", SDXL: "openrail++"}
    saved_options = {
        **OPTIONS,
        **dict.fromkeys(_SIZES, range(1, 65537)),
        "projection_class_embeddings_input_dim": range(1, 65537),
        "use_linear_projection": bool,
        "center_input_sample": bool,
        "down_block_types": str,
        "up_block_types": str,
        "addition_embed_type": ("text_time",),
    }
    schedule = ("DDPMScheduler", {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
    text_tokens = 77
    front = (
        *embedder("time", "time_embedding"),
        *embedder("pooled", "add_embedding"),
        ("linear", "patch", "patch_embed", "conv_in"),
    )
    back = (("linear", "final", "final", "conv_out"),)
    tiny = (
        "sd15",
        {
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 12,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
        },
    )

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, name)
        if "text_entry" not in module._modules:
            module.text_entry = TextEntry()
            module.register_forward_pre_hook(_through, with_kwargs=True)

    def restore(self, module: nn.Module) -> nn.Module:
        """The library's network as it was, without the entry."""
        hooks = module._forward_pre_hooks
        for number in [n for n, hook in hooks.items() if hook is _through]:
            del hooks[number]
            module._forward_pre_hooks_with_kwargs.pop(number, None)
        module._modules.pop("text_entry", None)
        return super().restore(module)

    @property
    def pipeline_class(self) -> str:  # type: ignore[override]
        """SDXL's, or that of the first."""
        return "StableDiffusionXLPipeline" if self.pooled_dim else "StableDiffusionPipeline"

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled text, 0 for a model that takes none."""
        if self.config.addition_embed_type != "text_time":
            return 0
        return int(self.config.projection_class_embeddings_input_dim) - 6 * int(self.config.addition_time_embed_dim)

    def data_config(self) -> dict[str, Any]:
        """Pixels in [-1, 1], eight for each latent along a side."""
        size = self.config.sample_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return pixel_config(8 * int(height), 8 * int(width))

    # -- points -----------------------------------------------------------------------------------------------------

    def points(self) -> list[Point]:
        """Points of the embeddings, of convolutions and transformers in forward order, and of the last convolution."""
        text: Any = self.module.text_entry
        width = int(self.config.cross_attention_dim)
        sizes: dict[str, Any] = {"dim_in": width, "dim_out": width}
        found: list[Point] = [
            ConditionPoint(name="condition.text", role="text", path="text_entry", module=text, **sizes)
        ]
        found += [p for line in self.front for p in self.outside(0, *line)]
        index = 0
        for path, module in self._parts():
            if type(module).__name__ != "Transformer2DModel":
                found += self._convolved(path, module)
                continue
            ends = {"norm": ("norm", ""), "proj_in": ("linear", "in"), "proj_out": ("linear", "out")}
            found += self._plain(path, module, {k: v for k, v in ends.items() if k != "proj_out"})
            for i, block in enumerate(module.transformer_blocks):  # type: ignore[arg-type]
                dim, heads = block.attn1.to_q.in_features, int(block.attn1.heads)
                place: dict[str, Any] = {"block": index, "attention": {"head_dim": dim // heads}}
                name = f"blocks.{index}"
                points = self.points_of_block(
                    block, name, f"{path}.transformer_blocks.{i}", dim, heads, table=TABLE, **place
                )
                for point in points:
                    if isinstance(point, AttentionPoint):
                        of_heads(point)
                found += points
                index += 1
            found += self._plain(path, module, {"proj_out": ends["proj_out"]})
        last = NormPoint(
            name="norm",
            role="norm",
            path="conv_norm_out",
            module=self.module.conv_norm_out,  # type: ignore[arg-type]
            dim_in=self.module.conv_norm_out.num_channels,  # type: ignore[union-attr,arg-type]
            dim_out=self.module.conv_norm_out.num_channels,  # type: ignore[union-attr,arg-type]
            channels_first=True,
        )
        return [*found, last, *(p for line in self.back for p in self.outside(0, *line))]

    def _parts(self) -> Iterator[tuple[str, nn.Module]]:
        """Residual convolutions, transformers and changes of resolution, in forward order."""
        net: Any = self.module
        stages = [(f"down_blocks.{i}", s, False) for i, s in enumerate(net.down_blocks)]
        stages += [("mid_block", net.mid_block, True)] if net.mid_block is not None else []
        stages += [(f"up_blocks.{i}", s, False) for i, s in enumerate(net.up_blocks)]
        for path, stage, middle in stages:
            resnets, attentions = list(stage.resnets), list(getattr(stage, "attentions", None) or [])
            if middle:
                yield f"{path}.resnets.0", resnets[0]
            for i in range(len(attentions) if middle else len(resnets)):
                if not middle:
                    yield f"{path}.resnets.{i}", resnets[i]
                if i < len(attentions) and attentions[i] is not None:
                    yield f"{path}.attentions.{i}", attentions[i]
                if middle:
                    yield f"{path}.resnets.{i + 1}", resnets[i + 1]
            for kind in ("downsamplers", "upsamplers"):
                for i, sampler in enumerate(getattr(stage, kind, None) or []):
                    yield f"{path}.{kind}.{i}", sampler

    def _convolved(self, path: str, module: nn.Module) -> list[Point]:
        names = {"norm1": ("norm", ""), "conv1": ("linear", "conv"), "time_emb_proj": ("linear", "modulation")}
        names |= {
            "norm2": ("norm", ""),
            "conv2": ("linear", "conv"),
            "conv_shortcut": ("linear", "conv"),
            "conv": ("linear", "conv"),
        }
        return self._plain(path, module, names)

    def _plain(self, path: str, module: nn.Module, names: dict[str, tuple[str, str]]) -> list[Point]:
        """Points at children of a module, named by their paths; a projection by convolution has the role `conv`."""
        found: list[Point] = []
        for name, (kind, role) in names.items():
            part = getattr(module, name, None)
            if part is None:
                continue
            where = f"{path}.{name}"
            if kind == "norm":
                width = int(part.num_channels)
                dims: dict[str, Any] = {"dim_in": width, "dim_out": width}
                found.append(NormPoint(name=where, role="norm", path=where, module=part, channels_first=True, **dims))
                continue
            own = "conv" if isinstance(part, nn.Conv2d) else role
            point = make_linear(part, None, "", 0, {"name": where, "role": own, "path": where, "module": part})
            found += [] if point is None else [point]
        return found

    # -- the call ---------------------------------------------------------------------------------------------------

    def run(self, module: nn.Module, *inputs: Any, **kwargs: Any) -> Tensor:
        """What the network answers.

        Args:
            inputs: latents (B, C, H, W), time steps (B,) or one for all, text embeddings (B, L, d_text) and, for SDXL, the pooled
                text (B, d_pooled). Further keywords go to the library; `time_ids` (size, cut and wanted size of the image in
                pixels) are made here unless they are given.

        Returns:
            (B, C, H, W): the prediction.

        Raises:
            DataError: other channels or widths, or a pooled text that is missing or not taken.
        """
        return self._run(module, *inputs, **kwargs)

    def _run(
        self,
        module: nn.Module,
        latents: Any,
        timestep: Any,
        encoder_hidden_states: Any,
        pooled: Any = None,
        **rest: Any,
    ) -> Tensor:
        self.check_latents(latents, "B C H W", self.latent_channels, 1)
        self.check_text(encoder_hidden_states, latents, int(self.config.cross_attention_dim))
        if self.pooled_dim:
            self.check_text(pooled, latents, self.pooled_dim, "pooled_projections")
            height, width = (8.0 * n for n in latents.shape[-2:])
            ids = latents.new_tensor([[height, width, 0.0, 0.0, height, width]]).repeat(len(latents), 1)
            rest["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": rest.pop("time_ids", ids)}
        elif pooled is not None:
            raise DataError(f"'{self.name}' takes no pooled text; SDXL does.")
        steps = timesteps(timestep, latents)
        return module(latents, steps, encoder_hidden_states, return_dict=False, **rest)[0]

    def tiny_batch(self) -> tuple[Tensor, ...]:
        """Random latents, time steps, text, and pooled text where it is taken; a batch of two."""
        height, width = (n // 8 for n in self.data_config()["input_size"][1:])
        text = torch.randn(2, 5, int(self.config.cross_attention_dim))
        pooled = (torch.randn(2, self.pooled_dim),) if self.pooled_dim else ()
        return torch.randn(2, self.latent_channels, height, width), torch.tensor([3, 700]), text, *pooled
