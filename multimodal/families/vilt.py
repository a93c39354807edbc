"""ViLT (transformers' `ViltForQuestionAnswering`): words and patches of an image in one sequence of pre-norm blocks.

    features(pixel_values (B, 3, H, W), input_ids (B, L), attention_mask (B, L), pixel_mask (B, H, W)) -> (B, d), or logits

    x_0 = [LN(word + place) + type 0 | (class, W_p patch) + place + type 1]
    u = x + W_o Attn(LN1 x),  y = u + W_down gelu(W_up LN2 u)        pooled = tanh(W LN(y)_0), of the first word

Places of patches are those of the checkpoint, interpolated to the image's own size; `pixel_mask` says where it is (1) and where
it was filled up behind (0), as the library's processor does for images of several sizes. Without one all of it is image.

The library draws the order of patches at random where an image needs no filling, and of one that has more than `max_image_length`
which are left out; their order means nothing to a transformer. Here they stand row by row, and all are kept: the library's output
to the rounding, and the same each time. Attention is written out there, so `attn_implementation` is "eager".

The classifier has a hidden layer of 2 d, as the library's, which is the model's head if no `num_classes` is said.

Source: Kim, Son and Kim, "ViLT: Vision-and-Language Transformer Without Convolution or Region Supervision", ICML 2021
(dandelin/ViLT). Count without classifier: 111,595,008.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.families.vlm.words import check_words, untold
from zoo.engine.attention import mask_bias
from zoo.errors import ConfigError, DataError
from zoo.families.split_attention import SplitAttention
from zoo.families.transformers_family import COMMON, TransformersBackbone
from zoo.families.transformers_tables import OUTPUT_APART
from zoo.heads.base import not_held
from zoo.library import library, reaching
from zoo.points import Layout, Point
from zoo.registry import register_backbone

if TYPE_CHECKING:
    from zoo.points.point import HandsOn
    from zoo.points.recorder import Recorder


@dataclass(eq=False)
class ViltSite(SplitAttention):
    """The library's own product: it has no output projection, and answers a tuple of one."""

    @property
    def fused(self) -> bool:
        """It is written out."""
        return False

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        return float(self.module.attention_head_size) ** -0.5  # type: ignore[arg-type]

    @property
    def dropout(self) -> float:
        """Of the attention weights, 0 in evaluation."""
        return float(self.module.dropout.p) if self.module.training else 0.0  # type: ignore[union-attr, arg-type]

    def extended(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor]:
        """x (B, N, d) -> (B, N, d)."""
        q, k, v = self.project(hidden_states)
        y = self.attend(q, k, v, hidden_states.shape[0], mask_bias(attention_mask))
        return (y.transpose(1, 2).flatten(2),)


class TwoLayers(nn.Sequential):
    """`W_2 gelu(LN(W_1 x + b_1)) + b_2`, W_1 (2 d, d): (B, d) -> (B, num_classes); the keys are those of the library's."""

    def __init__(self, in_features: int, out_features: int, **factory: Any) -> None:
        wide = 2 * in_features
        super().__init__(
            nn.Linear(in_features, wide, **factory),
            nn.LayerNorm(wide, **factory),
            nn.GELU(),
            nn.Linear(wide, out_features, **factory),
        )
        self.in_features, self.out_features = in_features, out_features


def handed(y: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor]:
    """What a block hands on: its tokens, in a tuple."""
    return (y,)


@register_backbone
class ViLT(TransformersBackbone):
    """`vilt-b32`, `vilt-b32-vqa`, or `transformers:<repository or folder>` of this type."""

    family = "vilt"
    modality = "image-text"
    library_classes = {"vilt": ("ViltConfig", "ViltForQuestionAnswering")}
    configs = {
        "dandelin/vilt-b32-mlm": ("vilt", {}),
        "dandelin/vilt-b32-finetuned-vqa": ("vilt", {"num_labels": 3129}),
    }
    aliases = {
        "vilt-b32": "transformers:dandelin/vilt-b32-mlm",
        "vilt-b32-vqa": "transformers:dandelin/vilt-b32-finetuned-vqa",
    }
    saved_options = {
        **{name: known for name, known in COMMON.items() if name != "attn_implementation"},
        **dict.fromkeys(("vocab_size", "max_position_embeddings", "image_size", "num_channels"), range(1, 10_000_001)),
        **dict.fromkeys(("type_vocab_size", "modality_type_vocab_size"), range(1, 257)),
        "qkv_bias": bool,
    }
    layout = ("vilt.encoder.layer.0.attention.attention.query",)
    left_out = ("*.position_ids", "*.token_type_ids", "mlm_score.*", "rank_output.*", "itm_score.*")
    block_table = OUTPUT_APART
    elementwise = ("intermediate.intermediate_act_fn",)
    bare_sublayers = False
    tiny = (
        "vilt-b32",
        {
            "vocab_size": 60,
            "max_position_embeddings": 16,
            "image_size": 24,
            "patch_size": 8,
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "intermediate_size": 96,
            "initializer_range": 0.2,
        },
    )

    # -- points -----------------------------------------------------------------------------------------------------

    def points(self) -> list[Point]:
        """The embeddings of patches and words, every block, the norm behind them and the pooling's projection."""
        config, body = self.config, self.module.vilt
        found = self.linear_at("patch_embed", "patch", "vilt.embeddings.patch_embeddings.projection")
        found += self.norm_at("words.norm", "vilt.embeddings.text_embeddings.LayerNorm")
        width, heads = int(config.hidden_size), int(config.num_attention_heads)
        for i, block in enumerate(body.encoder.layer):  # type: ignore[union-attr, arg-type]
            place: dict[str, Any] = {"block": i, "attention": {"head_dim": width // heads}, "layout": Layout()}
            found += self.points_of_block(block, f"blocks.{i}", f"vilt.encoder.layer.{i}", width, heads, **place)
        found += self.norm_at("norm", "vilt.layernorm")
        return found + self.linear_at("pooler", "pool", "vilt.pooler.dense")

    def hands_on(self, point: Point) -> HandsOn | None:
        """Every block can be skipped: those behind read its tokens alone."""
        return handed

    def packs(self, module: nn.Module) -> bool:
        """The library's attentions give a tuple."""
        return hasattr(module, "attention")

    def record(self, session: Recorder, point: Point, verb: str, module: nn.Module, **options: Any) -> None:
        """More keys. Words and patches are one sequence: what is added is seen by both."""
        from zoo.families.split_attention import record

        place: dict[str, Any] = {"block": None, "attention": point.module, "norm": None, "leave": None}
        record(session, point, verb, module, options=options, kind=ViltSite, **place)

    # -- running ----------------------------------------------------------------------------------------------------

    def features(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Any = None,
        attention_mask: Tensor | None = None,
        pixel_mask: Tensor | None = None,
    ) -> Tensor:
        """Pooled features (B, d).

        Raises:
            DataError: a text or images that are missing or of another shape.
        """
        return self._pooled(self.module, pixel_values, input_ids, attention_mask, pixel_mask)

    def run(self, module: Any, *inputs: Any) -> Tensor:
        """Logits, or pooled features, of a merged module."""
        return module.classifier(self._pooled(module, *inputs))  # type: ignore[no-any-return]

    def _pooled(self, module: Any, pixels: Any, ids: Any = None, mask: Any = None, pixel_mask: Any = None) -> Tensor:
        check_words(self.name, ids, mask, None, " Its processor makes texts and images ready together.")
        self._check(ids, pixels, pixel_mask)
        mask = torch.ones_like(ids) if mask is None else mask
        tokens, there = self._patches(module.vilt.embeddings, pixels, pixel_mask)
        answer = module.vilt(input_ids=ids, attention_mask=mask, image_embeds=tokens, pixel_mask=there)
        return answer.pooler_output  # type: ignore[no-any-return]

    def _check(self, ids: Tensor, pixels: Any, pixel_mask: Any) -> None:
        config = self.config
        if ids.shape[1] > config.max_position_embeddings:
            raise DataError(
                f"The text has {ids.shape[1]} words, and '{self.name}' has places for {config.max_position_embeddings}. Cut it: "
                "the processor's truncation=True."
            )
        if not untold(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < config.vocab_size:
            raise DataError(f"The text has words from {int(ids.min())} to {int(ids.max())} of {config.vocab_size}.")
        if not isinstance(pixels, Tensor) or pixels.ndim != 4 or pixels.shape[1] != config.num_channels:
            told = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
            raise DataError(f"pixel_values is {told}; '{self.name}' reads an image and its text, (B, 3, H, W).")
        size = int(config.patch_size)
        if len(pixels) != len(ids) or min(pixels.shape[2:]) < size or any(n % size for n in pixels.shape[2:]):
            raise DataError(
                f"{len(ids)} texts, and images {tuple(pixels.shape)}; expected one for each, of whole patches of {size} pixels."
            )
        if pixel_mask is not None and tuple(pixel_mask.shape) != (len(pixels), *pixels.shape[2:]):
            raise DataError(
                f"pixel_mask is {tuple(pixel_mask.shape)}; expected {(len(pixels), *pixels.shape[2:])}: 1 where the image is."
            )

    def _patches(self, embeddings: Any, pixels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The class token and the patches (B, 1 + n, d) with their places, and where there are some, (B, 1 + n)."""
        maps: Tensor = embeddings.patch_embeddings(pixels)
        count, width, *whole = maps.shape
        table: Tensor = embeddings.position_embeddings
        side = self.config.image_size // self.config.patch_size
        grid = table[:, 1:].transpose(1, 2).view(1, width, side, side)

        def placed(map_: Tensor) -> Tensor:
            """(n, d, h, w) -> (n, h w, d)."""
            places = F.interpolate(grid, size=map_.shape[2:], mode="bilinear", align_corners=True)
            return (map_ + places.to(map_.dtype)).flatten(2).transpose(1, 2)

        sizes: list[list[int]] = [whole] * count
        if mask is not None:
            small = F.interpolate(mask[:, None].float(), size=whole).long()[:, 0]
            sizes = [[int(own[:, 0].sum()), int(own[0].sum())] for own in small]
        if all(size == whole for size in sizes):
            tokens, there = placed(maps), maps.new_ones(count, whole[0] * whole[1], dtype=torch.long)
        else:
            parts = [placed(maps[i : i + 1, :, :h, :w])[0] for i, (h, w) in enumerate(sizes)]
            longest = max(map(len, parts))
            tokens = torch.stack([F.pad(part, (0, 0, 0, longest - len(part))) for part in parts])
            lengths = torch.tensor([len(part) for part in parts], device=maps.device)
            there = (torch.arange(longest, device=maps.device) < lengths[:, None]).long()
        first = embeddings.cls_token + table[:, :1]
        tokens = torch.cat([first.to(tokens.dtype).expand(count, -1, -1), tokens], dim=1)
        return embeddings.dropout(tokens), F.pad(there, (1, 0), value=1)

    # -- the classifier ---------------------------------------------------------------------------------------------

    def new_head(self, num_classes: int, **factory: Any) -> nn.Module:
        """Two layers, as the library's classifier."""
        return TwoLayers(self.feature_dim, num_classes, **factory)

    def take_head(self) -> nn.Module | None:
        """Take the classifier off; without one the library's module answers with the pooled features."""
        own: Any = self.module.classifier
        self.module.classifier = nn.Identity()
        if not isinstance(own, nn.Sequential):
            return None
        last: Any = own[3]
        head = self.new_head(last.out_features, device=last.weight.device, dtype=last.weight.dtype)
        head.load_state_dict(own.state_dict())
        return head

    def put_head(self, module: nn.Module, head: nn.Module) -> None:
        """Make `head` the classifier of a merged module."""
        if not isinstance(head, TwoLayers) or head.in_features != self.feature_dim:
            raise not_held()
        merged: Any = module
        merged.num_labels = merged.config.num_labels = head.out_features
        merged.classifier = nn.Sequential(*head)

    # -- words and images -------------------------------------------------------------------------------------------

    @property
    def processor(self) -> Any:
        """The library's, which makes the inputs of texts and images: `processor(images, texts, return_tensors="pt")`.

        Raises:
            ConfigError: it cannot be had.
        """
        try:
            made: Any = library("transformers", self.extra).AutoProcessor
            with reaching():
                return made.from_pretrained(self.source, trust_remote_code=False)
        except Exception as error:  # a class of its own for each way in which network and files can fail
            raise ConfigError(
                f"The processor of '{self.name}' could not be loaded: {type(error).__name__}: "
                f"{str(error).splitlines()[0][:250]}. Check the network."
            ) from error

    def data_config(self) -> dict[str, Any]:
        """Pixels in [-1, 1]."""
        size, half = int(self.config.image_size), (0.5, 0.5, 0.5)
        return {"input_size": (3, size, size), "mean": half, "std": half, "interpolation": "bicubic", "crop_pct": 1.0}

    def licence(self) -> str | None:
        """Of the repositories that are listed here."""
        return "apache-2.0" if self.pretrained and self.source in self.configs else None

    def hub_task(self, num_classes: int) -> str | None:
        """The Hub's word for it."""
        return "visual-question-answering"

    def usage(self, num_classes: int) -> tuple[list[str], list[str]]:
        """As `Backbone.usage`, with what the processor makes."""
        made = 'made = model.family.processor(Image.open("photo.jpg"), "What is in the picture?", return_tensors="pt")'
        call = "model(made.pixel_values, made.input_ids, made.attention_mask, made.pixel_mask)"
        what = f"logits = {call}  # (1, {num_classes})" if num_classes else f"features = {call}"
        return ["from PIL import Image"], [made, what]

    def tiny_batch(self) -> tuple[Tensor, ...]:
        """Two short texts, one with padding behind, and an image each."""
        ids = torch.randint(1, self.config.vocab_size, (2, 7))
        mask = torch.ones_like(ids)
        mask[1, 5:] = 0
        return *super().tiny_batch(), ids, mask

    def example_batch(self, size: int = 2, classify: bool = False) -> tuple[Tensor, ...]:
        """Texts of as many words as there are places, and images of the checkpoint's size."""
        ids = torch.randint(1, self.config.vocab_size, (size, self.config.max_position_embeddings))
        return torch.randn(size, *self.data_config()["input_size"]), ids, torch.ones_like(ids)
