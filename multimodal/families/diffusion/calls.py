"""How each class of diffusers is called: what its pipeline makes of latents, time steps and conditions, and of the prediction.

Every function takes the family, the module, latents, the scheduler's time steps, and the conditions by their names; it gives what
the scheduler takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from multimodal.families.diffusion.family import timesteps
from multimodal.families.diffusion.tables import counted, pack, places, unpack
from zoo.errors import DataError

# -- cross attention -----------------------------------------------------------------------------------------------------


def plain(family: Any, module: nn.Module, latents: Tensor, steps: Tensor, **rest: Any) -> Tensor:
    """Latents as they are, time as the scheduler counts it."""
    return module(latents, timestep=steps, return_dict=False, **rest)[0]


def _mask(text: Tensor, mask: Any) -> Tensor:
    return text.new_ones(text.shape[:2]) if mask is None else mask


def sana(family: Any, module: nn.Module, latents: Tensor, steps: Tensor, guidance: Any = 4.5, **rest: Any) -> Tensor:
    """Time times the configuration's scale; a distilled model is told its guidance."""
    if family.config.guidance_embeds:
        scale = float(family.config.guidance_embeds_scale)
        rest["guidance"] = timesteps(guidance, latents).to(latents.dtype) * scale
    return plain(family, module, latents, steps * float(family.config.timestep_scale), **rest)


def hunyuan_dit(
    family: Any,
    module: nn.Module,
    latents: Tensor,
    steps: Tensor,
    text_embedding_mask: Any = None,
    text_embedding_mask_t5: Any = None,
    **rest: Any,
) -> Tensor:
    """Texts of two encoders, each of the length that the tables of positions have; places and the size of the image in pixels."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

    config, rows = family.config, len(latents)
    grid = tuple(n // int(config.patch_size) for n in latents.shape[-2:])
    base = 512 // 8 // int(config.patch_size)
    size = [8.0 * n for n in latents.shape[-2:]]
    given: dict[str, Any] = {
        "image_meta_size": latents.new_tensor([[*size, *size, 0.0, 0.0]]).repeat(rows, 1),
        "style": torch.zeros(rows, dtype=torch.long, device=latents.device),
        "image_rotary_emb": get_2d_rotary_pos_embed(
            config.attention_head_dim,
            get_resize_crop_region_for_grid(grid, base),
            grid,
            device=latents.device,
            output_type="pt",
        ),
    } | rest
    return module(
        latents,
        steps.to(latents.dtype),
        text_embedding_mask=_mask(rest["encoder_hidden_states"], text_embedding_mask),
        text_embedding_mask_t5=_mask(rest["encoder_hidden_states_t5"], text_embedding_mask_t5),
        return_dict=False,
        **given,
    )[0]


def wan(
    family: Any, module: nn.Module, latents: Tensor, steps: Tensor, image_latents: Any = None, **rest: Any
) -> Tensor:
    """An image-to-video model sees the mask and latents of its image as further channels."""
    if image_latents is not None:
        latents = torch.cat([latents, image_latents.to(latents.dtype)], dim=1)
    return plain(family, module, latents, steps, **rest)


def ltx(
    family: Any,
    module: nn.Module,
    latents: Tensor,
    steps: Tensor,
    encoder_attention_mask: Any = None,
    frame_rate: float = 25.0,
    **rest: Any,
) -> Tensor:
    """Latents as one token each; places in seconds and pixels, of a video of `frame_rate` frames a second."""
    frames, height, width = latents.shape[2:]
    member = family.member
    flow = module(
        latents.flatten(2).transpose(1, 2),
        timestep=steps,
        encoder_attention_mask=_mask(rest["encoder_hidden_states"], encoder_attention_mask),
        num_frames=frames,
        height=height,
        width=width,
        rope_interpolation_scale=(member.frame_ratio / frame_rate, member.ratio, member.ratio),
        return_dict=False,
        **rest,
    )[0]
    return flow.transpose(1, 2).unflatten(2, (frames, height, width))


def latte(family: Any, module: nn.Module, latents: Tensor, steps: Tensor, **rest: Any) -> Tensor:
    """As many latent frames as the table of positions in time has, or one."""
    frames, length = latents.shape[2], int(family.config.video_length)
    if frames not in (1, length):
        raise DataError(
            f"The video has {frames} latent frames; '{family.name}' has positions of {length}. Cut it to these."
        )
    return plain(family, module, latents, steps, **rest)


# -- joint attention -----------------------------------------------------------------------------------------------------


def _packed(module: nn.Module, latents: Tensor, steps: Tensor, **more: Any) -> Tensor:
    """A class that takes latents packed 2 x 2."""
    return unpack(module(hidden_states=pack(latents), timestep=steps, return_dict=False, **more)[0], latents)


def _grid(latents: Tensor) -> tuple[int, int]:
    return latents.shape[-2] // 2, latents.shape[-1] // 2


def chroma(family: Any, module: nn.Module, latents: Tensor, steps: Tensor, mask: Any = None, **rest: Any) -> Tensor:
    """Time in [0, 1]; `mask` is of the text, the image is seen whole."""
    text = rest["encoder_hidden_states"]
    height, width = _grid(latents)
    if mask is not None:
        mask = torch.cat([mask.to(latents.dtype), mask.new_ones(len(mask), height * width).to(latents.dtype)], dim=1)
    return _packed(
        module,
        latents,
        steps.to(latents.dtype) / 1000,
        img_ids=places(height, width, latents),
        txt_ids=latents.new_zeros(text.shape[1], 3),
        attention_mask=mask,
        **rest,
    )


def bria(family: Any, module: nn.Module, latents: Tensor, steps: Tensor, **rest: Any) -> Tensor:
    """Time as the scheduler counts it."""
    words = latents.new_zeros(rest["encoder_hidden_states"].shape[1], 3)
    return _packed(module, latents, steps, img_ids=places(*_grid(latents), latents), txt_ids=words, **rest)


def longcat(family: Any, module: nn.Module, latents: Tensor, steps: Tensor, **rest: Any) -> Tensor:
    """Words are counted from 0, rows and columns from 512."""
    text = rest["encoder_hidden_states"]
    grid = places(*_grid(latents), latents.float(), first=1.0, start=512.0)
    return _packed(
        module,
        latents,
        steps.to(latents.dtype) / 1000,
        img_ids=grid,
        txt_ids=counted(text.shape[1], latents.float()),
        **rest,
    )


def ovis(family: Any, module: nn.Module, latents: Tensor, steps: Tensor, **rest: Any) -> Tensor:
    """Words are counted on both axes, as rows and columns are."""
    words = counted(rest["encoder_hidden_states"].shape[1], latents)
    grid = places(*_grid(latents), latents)
    return _packed(module, latents, steps.to(latents.dtype) / 1000, img_ids=grid, txt_ids=words, **rest)


def flux2(family: Any, module: nn.Module, latents: Tensor, steps: Tensor, guidance: Any = 4.0, **rest: Any) -> Tensor:
    """Latents are those of the autoencoder, packed 2 x 2 and normed, in 128 channels: one token each."""
    height, width = latents.shape[-2:]
    grid = nn.functional.pad(places(height, width, latents), (0, 1))
    words = latents.new_zeros(rest["encoder_hidden_states"].shape[1], 4)
    words[:, 3] = torch.arange(len(words), device=latents.device)
    flow = module(
        hidden_states=latents.flatten(2).transpose(1, 2),
        timestep=steps.to(latents.dtype) / 1000,
        img_ids=grid,
        txt_ids=words,
        guidance=timesteps(guidance, latents).float() if family.config.guidance_embeds else None,
        return_dict=False,
        **rest,
    )[0]
    return flow.transpose(1, 2).unflatten(2, (height, width))


def qwen(
    family: Any, module: nn.Module, latents: Tensor, steps: Tensor, encoder_hidden_states_mask: Any = None, **rest: Any
) -> Tensor:
    """Time in [0, 1]; words that the mask leaves out are seen by nobody."""
    mask = None if encoder_hidden_states_mask is None else encoder_hidden_states_mask.bool()
    shapes = [[(1, *_grid(latents))]] * len(latents)
    return _packed(
        module, latents, steps.to(latents.dtype) / 1000, encoder_hidden_states_mask=mask, img_shapes=shapes, **rest
    )


def aura(family: Any, module: nn.Module, latents: Tensor, steps: Tensor, **rest: Any) -> Tensor:
    """Time in [0, 1]."""
    return module(latents, timestep=steps.to(latents.dtype) / 1000, return_dict=False, **rest)[0]


def hunyuan_image(
    family: Any, module: nn.Module, latents: Tensor, steps: Tensor, encoder_attention_mask: Any = None, **rest: Any
) -> Tensor:
    """Time as the scheduler counts it."""
    text = rest["encoder_hidden_states"]
    mask = text.new_ones(text.shape[:2]) if encoder_attention_mask is None else encoder_attention_mask
    return module(latents, timestep=steps, encoder_attention_mask=mask, return_dict=False, **rest)[0]


# -- joint attention, videos ---------------------------------------------------------------------------------------------


def hunyuan(
    family: Any,
    module: nn.Module,
    latents: Tensor,
    steps: Tensor,
    encoder_attention_mask: Any = None,
    guidance: Any = 6.0,
    **rest: Any,
) -> Tensor:
    """The words are in front of the padding; a distilled model is told its guidance, times 1,000."""
    return module(
        latents,
        timestep=steps,
        encoder_attention_mask=_mask(rest["encoder_hidden_states"], encoder_attention_mask),
        guidance=timesteps(guidance, latents).to(latents.dtype) * 1000 if family.config.guidance_embeds else None,
        return_dict=False,
        **rest,
    )[0]


def hunyuan15(
    family: Any,
    module: nn.Module,
    latents: Tensor,
    steps: Tensor,
    encoder_attention_mask: Any = None,
    encoder_attention_mask_2: Any = None,
    image_latents: Any = None,
    **rest: Any,
) -> Tensor:
    """Two texts and an image (zeros for none), and the image's latents and mask as further channels."""
    if image_latents is not None:
        latents = torch.cat([latents, image_latents.to(latents.dtype)], dim=1)
    return module(
        latents,
        timestep=steps,
        encoder_attention_mask=_mask(rest["encoder_hidden_states"], encoder_attention_mask),
        encoder_attention_mask_2=_mask(rest["encoder_hidden_states_2"], encoder_attention_mask_2),
        return_dict=False,
        **rest,
    )[0]


def mochi(
    family: Any, module: nn.Module, latents: Tensor, steps: Tensor, encoder_attention_mask: Any = None, **rest: Any
) -> Tensor:
    """Time runs from noise (0) to the video (1,000), and the flow the same way, as its scheduler has it (`invert_sigmas`)."""
    mask = _mask(rest["encoder_hidden_states"], encoder_attention_mask).bool()
    return module(latents, timestep=steps, encoder_attention_mask=mask, return_dict=False, **rest)[0]


# -- one set of weights for both streams ---------------------------------------------------------------------------------


def cogview(family: Any, module: nn.Module, latents: Tensor, steps: Tensor, **rest: Any) -> Tensor:
    """The size of the image in pixels is a condition; by default it is not cut."""
    size = latents.new_tensor([[family.member.ratio * n for n in latents.shape[-2:]]]).repeat(len(latents), 1)
    given = {"original_size": size, "target_size": size, "crop_coords": size * 0} | rest
    return module(latents, timestep=steps, return_dict=False, **given)[0]


# -- one stream ----------------------------------------------------------------------------------------------------------


def lumina(
    family: Any, module: nn.Module, latents: Tensor, steps: Tensor, encoder_attention_mask: Any = None, **rest: Any
) -> Tensor:
    """Words that the mask leaves out are not in the sequence."""
    text = rest["encoder_hidden_states"]
    mask = text.new_ones(text.shape[:2]) if encoder_attention_mask is None else encoder_attention_mask
    time = 1 - steps.to(latents.dtype) / 1000
    return -module(latents, timestep=time, encoder_attention_mask=mask.bool(), return_dict=False, **rest)[0]


def z_image(
    family: Any,
    module: nn.Module,
    latents: Tensor,
    steps: Tensor,
    encoder_hidden_states: Any = None,
    mask: Any = None,
    **rest: Any,
) -> Tensor:
    """Images and texts one by one, the words that the mask leaves."""
    words: Sequence[Tensor] = list(encoder_hidden_states.unbind(0))
    if mask is not None:
        words = [text[keep.bool()] for text, keep in zip(words, mask, strict=True)]
    images = list(latents.unsqueeze(2).unbind(0))
    time = (1000 - steps.to(latents.dtype)) / 1000
    return -torch.stack(module(images, time, words, return_dict=False, **rest)[0]).squeeze(2)
