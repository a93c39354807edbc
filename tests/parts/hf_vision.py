"""Small vision transformers of transformers, and what the library itself gives for them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import zoo

SMALL = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
}


DINO = {k: v for k, v in SMALL.items() if k != "intermediate_size"}


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("hf-vit-b16", SMALL),
    "vit_mae": ("hf-mae-b16", SMALL),
    "beit": ("hf-beit-b16", SMALL),
    "dinov2": ("hf-dinov2-b14", {**DINO, "use_swiglu_ffn": True}),
    "dinov2_with_registers": ("hf-dinov2-b14-reg", DINO),
    "dinov3_vit": ("hf-dinov3-b16", SMALL),
    "dinov3_vit, gated": ("hf-dinov3-b16", {**SMALL, "use_gated_mlp": True}),
    "clip": ("hf-clip-b32", {**SMALL, "projection_dim": 20}),
    "siglip": ("hf-siglip-b16", SMALL),
    "siglip2": ("hf-siglip2-b16-naflex", {**{k: v for k, v in SMALL.items() if k != "image_size"}, "num_patches": 16}),
    "videomae": ("videomae-b16", {**SMALL, "image_size": 16, "num_frames": 4}),
}


def make(kind: str, adapter: Any = None, **options: Any) -> zoo.Model:
    name, small = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = zoo.load(name, pretrained=False, **{"num_classes": 0, **small, **options})
        for parameter in model.backbone.parameters():  # nothing that starts as zero hides a mistake
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
        if adapter is not None:
            model.add_adapter(adapter)
    return model.double().eval()


def batch(model: zoo.Model) -> Tensor:
    return torch.randn(2, *model.example_batch(1)[0].shape[1:], generator=torch.Generator().manual_seed(1)).double()


def library(model: zoo.Model) -> Any:
    """transformers' own module with the same weights, and nothing of ours in it."""
    module = type(model.backbone)(copy.deepcopy(model.backbone.config)).double()
    state = dict(model.backbone.state_dict())
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected and all(k.startswith("classifier") for k in missing)
    if "classifier" in module._modules:
        module.classifier = nn.Identity()
    return module.requires_grad_(False).eval()  # with gradients torch takes another kernel


def rows(images: Tensor, patch: int = 8) -> Tensor:
    """Patches as the image processor of NaFlex makes them, in numpy's words: (B, N, patch patch C)."""
    found = images.permute(0, 2, 3, 1)
    high, wide = (n // patch for n in found.shape[1:3])
    found = found.reshape(len(images), high, patch, wide, patch, -1).permute(0, 1, 3, 2, 4, 5)
    return found.reshape(len(images), high * wide, -1)


def answer(module: Any, images: Tensor) -> Tensor:
    if "Siglip2" in type(module).__name__:
        grid = torch.tensor([[n // 8 for n in images.shape[-2:]]]).repeat(len(images), 1)
        output = module(rows(images), None, grid)
    else:
        output = module(images)
    for name in ("logits", "image_embeds", "pooler_output"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    raise AssertionError(output)


def settle(model: zoo.Model) -> None:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        for parameter in model.parameters_to_train().values():
            parameter += 0.05 * torch.randn_like(parameter)
