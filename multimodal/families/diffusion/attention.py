"""Attention of diffusers with extra keys and values, and sites of modules that carry two streams. See `zoo.engine.attention`.

The library's `Attention` holds q, k, v and o as Linears, and leaves the product to a processor. Each class here is the
forward of one processor with `attend` for the product. Extra keys join behind the norms and positions of the own ones: they
have neither, and every query sees them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.embeddings import apply_rotary_emb, get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor, nn

from multimodal.families.diffusion.products import ONE_PRODUCT, OneProduct
from zoo.engine.attention import AttentionSite, Given, mask_bias, recorder
from zoo.engine.memory import recomputable
from zoo.engine.sites import BlockSite, Site
from zoo.errors import AttachError
from zoo.points import Point

if TYPE_CHECKING:
    from zoo.points.recorder import Recorder


@dataclass(eq=False)
class TwoStreams(Site):
    """CogVideoX's modulated norm `(video, text, c) -> (video, text, gate, gate)`: ops see [text | video], one sequence."""

    _text: int = 0  # tokens of text in the present call

    def read_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """(B, L + N, d)."""
        self._text = args[1].shape[1]
        return torch.cat([args[1], args[0]], dim=1)

    def write_input(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Parted again."""
        return (x[:, self._text :], x[:, : self._text], *args[2:]), kwargs

    def read_output(self, output: Any) -> Tensor:
        """(B, L + N, d)."""
        self._text = output[1].shape[1]
        return torch.cat([output[1], output[0]], dim=1)

    def write_output(self, output: Any, y: Tensor) -> Any:
        """Parted again."""
        return (y[:, self._text :], y[:, : self._text], *output[2:])


@dataclass(eq=False)
class ImageBlock(BlockSite):
    """A block of SD3 or Flux `(image, text, ...) -> (text, image)`: ops see the image."""

    def read_output(self, output: Any) -> Tensor:
        """(B, N, d)."""
        return output[1]

    def write_output(self, output: Any, y: Tensor) -> Any:
        """The image in its place."""
        return output[0], y


@dataclass(eq=False)
class Activated(Site):
    """diffusers' `GELU`, a projection and the function in one module: the function's output is recomputed, not the product."""

    def replaces(self) -> bool:
        """While outputs are recomputed."""
        return bool(self.recompute) or super().replaces()

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., 4 d), as the library does it."""
        module: Any = self.module
        return recomputable(module.gelu, module.proj(x))

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return None


@dataclass(eq=False)
class Extended(AttentionSite):
    """What the processors share."""

    @property
    def scale(self) -> float:
        """1 / sqrt(head width)."""
        own = getattr(self.module, "scale", None)
        return float(self.module.head_dim**-0.5 if own is None else own)  # type: ignore[operator,arg-type]

    @property
    def dropout(self) -> float:
        """The processors drop nothing."""
        return 0.0

    def split(self, projected: Tensor, norm: nn.Module | None = None) -> Tensor:
        """(B, N, h c) -> (B, h, N, c), normed."""
        tokens = projected.unflatten(-1, (int(self.module.heads), -1)).transpose(1, 2)  # type: ignore[arg-type]
        return tokens if norm is None else norm(tokens)

    def project(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x (B, N, d), keys and values of the context (B, L, d_c) or of x, each (B, h, N or L, c)."""
        attention: Any = self.module
        context = x if context is None else context
        q, k = self.split(attention.to_q(x), attention.norm_q), self.split(attention.to_k(context), attention.norm_k)
        return q, k, self.split(attention.to_v(context))

    def project_text(self, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same by the text's own projections, (B, L, d) -> each (B, h, L, c)."""
        attention: Any = self.module
        q = self.split(attention.add_q_proj(text), attention.norm_added_q)
        k = self.split(attention.add_k_proj(text), attention.norm_added_k)
        return q, k, self.split(attention.add_v_proj(text))

    def mask(self, mask: Tensor | None, keys: int, batch: int) -> Tensor | None:
        """The library's mask, prepared as its processors do it."""
        if mask is None:
            return None
        attention: Any = self.module
        prepared = attention.prepare_attention_mask(mask, keys, batch)
        return prepared.view(batch, attention.heads, -1, prepared.shape[-1])

    def out(self, y: Tensor) -> Tensor:
        """(B, h, N, c) -> (B, N, d): the output projection and its dropout."""
        attention: Any = self.module
        return attention.to_out[1](attention.to_out[0](y.transpose(1, 2).flatten(2)))


@dataclass(eq=False)
class Plain(Extended):
    """`AttnProcessor2_0`: self or cross attention (DiT, PixArt)."""

    def extended(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """(B, N, d), with the context (B, L, d_c) of cross attention -> (B, N, d)."""
        batch = len(hidden_states)
        q, k, v = self.project(hidden_states, encoder_hidden_states)
        mask = self.mask(attention_mask, k.shape[2], batch)
        return self.out(self.attend(q, k, v, batch, mask_bias(mask)))


@dataclass(eq=False)
class Once(Given):
    """What a module makes of the keys and values that the projections gave, through the norm and positions of the own ones."""

    owner: str = ""

    def __call__(self, site: Any, images: int) -> Any:
        """Of the samples that the adapter serves."""
        attention, state = site.module, site.state
        k, v, text, rotary = site.projected
        rows = None if state.route is None else state.rows(self.owner, len(k))
        before = state.serving
        state.serving = self.owner if state.route is not None else before
        try:
            mine = [t if rows is None else t.index_select(0, rows) for t in (k, v)]
            k, v, *seen = state.run(self.module, *mine, text)
            keys = site.split(k.to(v.dtype), attention.norm_k)
        finally:
            state.serving = before
        return (keys if rotary is None else _turned(keys, text, rotary)), site.split(v), *seen


@dataclass(eq=False)
class TextAndVideo(Extended):
    """`CogVideoXAttnProcessor2_0`: one attention over [text | video], the video's positions turned into q and k."""

    projected: tuple[Any, ...] = ()  # keys and values of the present call, tokens of text, positions

    def extended(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """Video (B, N, d) and text (B, L, d) -> the same."""
        batch, text = len(hidden_states), encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        attention: Any = self.module
        key, value = attention.to_k(x), attention.to_v(x)
        q, k, v = self.split(attention.to_q(x), attention.norm_q), self.split(key, attention.norm_k), self.split(value)
        if image_rotary_emb is not None:
            q, k = (_turned(t, text, image_rotary_emb) for t in (q, k))
        mask = self.mask(attention_mask, x.shape[1], batch)
        self.projected = (key, value, text, image_rotary_emb)
        try:
            y = self.out(self.attend(q, k, v, batch, mask_bias(mask)))
        finally:
            self.projected = ()
        return y[:, text:], y[:, :text]


def _turned(tokens: Tensor, text: int, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys (B, h, L + N, c), those behind the text turned by their position."""
    moved: Tensor = apply_rotary_emb(tokens[:, :, text:], rotary)  # type: ignore[assignment,arg-type]
    return torch.cat([tokens[:, :, :text], moved], dim=2) if text else moved


def video_positions(config: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (tokens of the video, head width) for latents (B, F, C, H, W), as CogVideoX's pipelines make them."""
    patch, frames = int(config.patch_size), latents.shape[1]
    grid = latents.shape[-2] // patch, latents.shape[-1] // patch
    base = int(config.sample_height) // patch, int(config.sample_width) // patch
    options: dict[str, Any] = {"embed_dim": config.attention_head_dim, "grid_size": grid, "device": latents.device}
    if config.patch_size_t is None:
        region = get_resize_crop_region_for_grid(grid, base[1], base[0])
        options |= {"crops_coords": region, "temporal_size": frames}
    else:
        frames = frames // int(config.patch_size_t)
        options |= {"crops_coords": None, "temporal_size": frames, "grid_type": "slice", "max_size": base}
    return get_3d_rotary_pos_embed(**options)  # type: ignore[return-value]


@dataclass(eq=False)
class ImageAndText(Extended):
    """`JointAttnProcessor2_0` (SD3): one attention over [image | text], each with projections of its own."""

    def extended(  # type: ignore[override]
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Image (B, N, d) and text (B, L, d) -> the same; or the image alone."""
        attention: Any = self.module
        q, k, v = self.project(hidden_states)
        text = encoder_hidden_states
        if text is None:
            return self.out(self.attend(q, k, v, q.shape[0], mask_bias(None)))
        q, k, v = (torch.cat(both, dim=2) for both in zip((q, k, v), self.project_text(text)))
        y = self.attend(q, k, v, q.shape[0], mask_bias(None))
        image = hidden_states.shape[1]
        said = y[:, :, image:].transpose(1, 2).flatten(2)
        said = said if attention.context_pre_only else attention.to_add_out(said)  # the last block's is read by nobody
        return self.out(y[:, :, :image]), said


@dataclass(eq=False)
class Flux(Extended):
    """`FluxAttnProcessor`: one attention over [text | image], both with positions; the single blocks hand it one sequence."""

    def extended(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        **_: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Image (B, N, d) and text (B, L, d) -> the same; or a sequence (B, L + N, d), not yet projected."""
        attention: Any = self.module
        q, k, v = self.project(hidden_states)
        said = encoder_hidden_states
        if said is not None:
            q, k, v = (torch.cat(both, dim=2) for both in zip(self.project_text(said), (q, k, v)))
        if image_rotary_emb is not None:
            q, k = _turned(q, 0, image_rotary_emb), _turned(k, 0, image_rotary_emb)
        y = self.attend(q, k, v, q.shape[0], mask_bias(attention_mask))
        if said is None:
            return y.transpose(1, 2).flatten(2)
        text = said.shape[1]
        return self.out(y[:, :, text:]), attention.to_add_out(y[:, :, :text].transpose(1, 2).flatten(2))


KINDS: dict[str, type[Extended]] = {
    "AttnProcessor2_0": Plain,
    "CogVideoXAttnProcessor2_0": TextAndVideo,
    "JointAttnProcessor2_0": ImageAndText,
    "FluxAttnProcessor": Flux,
}


def record(session: Recorder, point: Point, module: nn.Module, verb: str = "extend") -> None:
    """Record the op of `point.extend(module)` or `point.gate(module)`.

    Raises:
        AttachError: the attention has a processor that is not described here, or an option that none of the families uses.
    """
    attention: Any = point.module
    processor = type(attention.processor).__name__
    odd = [n for n in ("group_norm", "spatial_norm", "norm_cross") if getattr(attention, n, None) is not None]
    if processor in ONE_PRODUCT and processor not in KINDS and getattr(attention, "add_k_proj", None) is not None:
        # Wan's cross attention to an image has a product of its own beside that of the text
        odd += ["two products"] * (processor in ("WanAttnProcessor", "SkyReelsV2AttnProcessor"))
    if not {processor} & {*KINDS, *ONE_PRODUCT} or odd or getattr(attention, "residual_connection", False):
        raise AttachError(
            f"the attention at '{point.name}' has {' and '.join([processor, *odd])}; more keys and values are described for "
            f"{', '.join(sorted({*KINDS, *ONE_PRODUCT}))} alone. Put the library's own processor back (after "
            "fuse_qkv_projections(): unfuse_qkv_projections()), or leave the point out of the targets."
        )
    if verb == "again":
        if processor != "CogVideoXAttnProcessor2_0":
            raise AttachError(
                f"keys and values once more are described for CogVideoX alone; the attention at '{point.name}' has {processor}."
            )
        recorder(session, point, verb, module)(
            attention, TextAndVideo, "forward", Once(module, owner=session.owner), per_row=False
        )
        return
    recorder(session, point, verb, module)(attention, KINDS.get(processor, OneProduct), "forward", Given(module))
