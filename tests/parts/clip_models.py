"""Small CLIP models for the tests, and forms that are written down straightforwardly."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo

TEXT: dict[str, Any] = {"width": 32, "layers": 2, "heads": 2, "vocab_size": 600, "context_length": 12}
IMAGE: dict[str, Any] = {"width": 48, "layers": 2, "head_width": 16, "image_size": 16}
EXTRA_NORMS = {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True}
MICRO: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer scale": {"vision_cfg": {"ls_init_value": 0.3}, "text_cfg": {"ls_init_value": 0.2}},
    "extra norms": {"vision_cfg": EXTRA_NORMS, "text_cfg": EXTRA_NORMS},
    "average": {"vision_cfg": {"pool_type": "avg", "final_ln_after_pool": True}},
    "no mask": {"text_cfg": {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}, "init_logit_bias": -2.0},
}
# towers of timm's inside open_clip
TIMM: dict[str, dict[str, Any]] = {
    "timm": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 32},
    "timm pooling": {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "linear", "image_size": 32},
    "timm eva02": {"timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "timm_proj": "linear"},
    "timm pe": {"timm_model_name": "vit_pe_core_tiny_patch16_384", "timm_pool": "map", "timm_proj": "linear"},
}


def make(kind: str = "plain", *adapters: Any, **options: Any) -> zoo.Model:
    """A small model in float64 whose parameters are all away from their initial zeros and ones."""
    torch.manual_seed(0)
    if kind in TIMM:
        options = {
            "vision_cfg": {"image_size": 32, **TIMM[kind]},
            "text_cfg": TEXT,
            "embed_dim": 24,
            "image_size": 32,
            **options,
        }
        name = "open_clip:ViT-B-16-SigLIP"
    else:
        parts = MICRO[kind]
        fields = {k: v for k, v in parts.items() if not k.endswith("_cfg")}
        options = {
            "vision_cfg": {**IMAGE, **parts.get("vision_cfg", {})},
            "text_cfg": {**TEXT, **parts.get("text_cfg", {})},
            "embed_dim": 24,
            **fields,
            **options,
        }
        name = "clip-micro"
    model = zoo.load(name, list(adapters), pretrained=False, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, p in [*model.backbone.named_parameters(), *model.adapters.named_parameters()]:
            p.add_((1.0 if key.endswith("prompt") else 0.1) * torch.randn(p.shape, generator=generator))
    return model.double()


def batch(model: zoo.Model, count: int = 3) -> tuple[Tensor, Tensor]:
    """Images, and token ids with ends at different places."""
    generator = torch.Generator().manual_seed(2)
    family: Any = model.family
    vocab, context = model.backbone.vocab_size, family.context_length
    ids = torch.zeros(count, context, dtype=torch.long)
    for row in range(count):
        length = 4 + (3 * row) % (context - 4)
        ids[row, :length] = torch.randint(1, vocab - 2, (length,), generator=generator)
        ids[row, 0], ids[row, length - 1] = vocab - 2, vocab - 1
    size = family.data_config()["input_size"]
    return torch.randn(count, *size, generator=generator, dtype=torch.double), ids


def library(model: zoo.Model) -> Any:
    """open_clip's own module with the model's weights: built by the library, then loaded strictly."""
    plain = copy.deepcopy(model)
    for name in list(plain.adapters):
        plain.remove_adapter(name)
    module = plain.merge()
    assert not [m for m in module.modules() if type(m).__module__.startswith(("zoo", "multimodal"))]
    return module


class StraightCLIP(nn.Module):
    """open_clip's own module, with prompts put into the sequences of both towers."""

    def __init__(self, clip: Any, images: list[Tensor], texts: list[Tensor], deep: bool, pool: str = "patches") -> None:
        super().__init__()
        self.clip = clip
        self.images = nn.ParameterList([nn.Parameter(p.detach().clone()) for p in images])
        self.texts = nn.ParameterList([nn.Parameter(p.detach().clone()) for p in texts])
        self.deep, self.pool = deep, pool

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """Scores (B_images, B_texts)."""
        clip = self.clip
        visual = clip.visual
        x = self._run(visual._embeds(images), visual.transformer.resblocks, self.images, None, self.pool == "all")
        i = visual._pool(x)[0] @ visual.proj
        y = clip.token_embedding(ids) + clip.positional_embedding
        y = clip.ln_final(self._run(y, clip.transformer.resblocks, self.texts, clip.attn_mask, False))
        y = y[torch.arange(len(y)), ids.argmax(1) if clip.text_pool_type == "argmax" else -1]
        projection = clip.text_projection
        t = projection(y) if isinstance(projection, nn.Linear) else y @ projection
        bias = 0 if clip.logit_bias is None else clip.logit_bias
        return clip.logit_scale.exp() * F.normalize(i, dim=-1) @ F.normalize(t, dim=-1).T + bias

    def _run(self, x: Tensor, blocks: Any, prompts: Any, mask: Tensor | None, keep: bool) -> Tensor:
        tokens = x.shape[1]
        count = 0
        for number, block in enumerate(blocks):
            if self.deep or number == 0:
                p = prompts[number].expand(len(x), -1, -1)
                x = torch.cat([x[:, :1], p, x[:, 1 + count :]], dim=1)
                count = p.shape[1]
            x = block(x, attn_mask=None if mask is None else visible(tokens, count, x.dtype))
        return x if keep else torch.cat([x[:, :1], x[:, 1 + count :]], dim=1)


def visible(tokens: int, count: int, dtype: torch.dtype) -> Tensor:
    """Mask of [start | prompts | words]: words see what is in front of them and all prompts; prompts see start and prompts."""
    total = tokens + count
    mask = torch.full((total, total), float("-inf"), dtype=dtype)
    for asking in range(total):
        for key in range(total):
            prompt = 1 <= key < 1 + count
            behind = asking >= 1 + count
            if prompt or (key <= asking and behind) or key == 0:
                mask[asking, key] = 0
    return mask


def straightforward(model: zoo.Model, pool: str = "patches") -> StraightCLIP:
    """The straightforward form of a model with the adapter "vpt"."""
    adapter: Any = model.adapters["vpt"]
    prompts = {k: p for k, p in adapter.named_parameters() if k.endswith("prompt")}
    sides = [[p for k, p in prompts.items() if k.startswith(tower)] for tower in ("image", "text")]
    return StraightCLIP(library(model), *sides, deep=adapter.deep, pool=pool)
