"""Language models with eyes, of transformers: Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Idefics3 and SmolVLM, LLaVA.

    features(input_ids (B, L), attention_mask (B, L), answer (B, T), pixel_values, ...) -> scores (B, L, V) or (B, T, V)

The text holds a place for each visual token, which the processor puts there. Images come by sample, so that a batch can be taken
apart, shuffled and served by an adapter for each sample:

    Qwen     pixel_values (B, N, p) patches of a sample's images one after another, with anything behind them where others have
             more; image_grid_thw (B, 3), or (B, I, 3) for I images each, zeros where there is none
    Idefics3, SmolVLM   pixel_values (B, I, 3, H, W), pixel_attention_mask (B, I, H, W)
    LLaVA    pixel_values (B, I, 3, H, W)

or as the library's processors give them, patches (N, p) and images (n, 3, H, W) of all samples in one row. Images may differ in
size and number. Points: `visual.*`, `projector*`, `text.*`; in LLaVA those of the blocks that are read.

Sources: Wang et al., "Qwen2-VL", 2024; Bai et al., "Qwen2.5-VL Technical Report", 2025; "Qwen3-VL", 2025; Laurencon et al.,
"Building and better understanding vision-language models", 2024 (Idefics3); Marafioti et al., "SmolVLM", 2025; Liu et al.,
"Improved Baselines with Visual Instruction Tuning", 2024 (LLaVA-1.5). Counts: Qwen2-VL-2B 2,208,985,600; Qwen2.5-VL-3B
3,754,622,976.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from multimodal.data.chats import Writer
from multimodal.families.vlm.base import LanguageBackbone
from multimodal.families.vlm.examples import with_images
from multimodal.families.vlm.eyes import EYES, VISION_OPTIONS, Eyes, in_one_row
from multimodal.families.vlm.micro import MICRO, NAME, micro_processor, micro_weights
from multimodal.families.vlm.options import TEXT_OPTIONS
from multimodal.families.vlm.published import PUBLISHED, SHORT
from multimodal.families.vlm.words import untold
from zoo.engine.attention import Bias
from zoo.errors import ConfigError, DataError
from zoo.families.split_attention import QUERY, WIDTH, SplitAttention, named
from zoo.families.transformers_family import Fields
from zoo.points import Point
from zoo.points.rows import find
from zoo.registry import register_backbone

if TYPE_CHECKING:
    from zoo.points.recorder import Recorder


@dataclass(eq=False)
class ImageSite(SplitAttention):
    """The attention of an image tower with a row for each image: a sample's images stand together."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, images: int, bias: Bias) -> Tensor:
        """With an adapter for each sample, all images of a sample are read with the keys of its own."""
        return super().attend(q, k, v, images if self.state.route is None else self.state.batch, bias)


@register_backbone
class VisionLanguage(LanguageBackbone):
    """`qwen2.5-vl-3b`, `smolvlm-256m`, `llava-1.5-7b`, `vlm-micro` and so on, or `transformers:<repository or folder>`."""

    family = "vlm"
    modality = "image-text"
    library_classes = {
        "qwen2_vl": ("Qwen2VLConfig", "Qwen2VLForConditionalGeneration"),
        "qwen2_5_vl": ("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration"),
        "qwen3_vl": ("Qwen3VLConfig", "Qwen3VLForConditionalGeneration"),
        "idefics3": ("Idefics3Config", "Idefics3ForConditionalGeneration"),
        "smolvlm": ("SmolVLMConfig", "SmolVLMForConditionalGeneration"),
        "llava": ("LlavaConfig", "LlavaForConditionalGeneration"),
    }
    configs = {**PUBLISHED, NAME: ("qwen2_vl", MICRO)}
    aliases = {**{short: f"transformers:{source}" for short, source in SHORT.items()}, "vlm-micro": NAME}
    layout = ("model.language_model.layers", "model.text_model.layers")
    no_graph = (
        "how much of its images is padding is read while it runs; serve it by transformers (model.merge()) or vLLM"
    )
    left_out = ("*.rotary_emb.inv_freq", "*.position_ids")
    elementwise = ("mlp.act_fn", "mlp.act", "mlp.activation_fn")
    saved_options = {
        "text_config": TEXT_OPTIONS,
        "vision_config": VISION_OPTIONS,
        **dict.fromkeys(
            ("image_token_id", "image_token_index", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
            range(10_000_001),
        ),
        **dict.fromkeys(("scale_factor", "image_seq_length"), range(1, 65537)),
        "vision_feature_layer": range(-256, 257),
        "vision_feature_select_strategy": ("default", "full"),
        "projector_hidden_act": ("gelu", "relu", "silu"),
        **dict.fromkeys(("tie_word_embeddings", "multimodal_projector_bias"), bool),
        "attn_implementation": ("eager", "sdpa"),
    }
    tiny = (
        "qwen2-vl-2b",
        {
            "text_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": 60,
                "initializer_range": 0.3,
                "rope_parameters": {"mrope_section": [2, 1, 1]},
            },
            "vision_config": {
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 32,
                "num_heads": 2,
                "mlp_ratio": 2,
                "patch_size": 4,
                "initializer_range": 0.2,
            },
            "image_token_id": 4,
            "video_token_id": 3,
            "vision_start_token_id": 2,
            "vision_end_token_id": 1,
        },
    )

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, name)
        self._processor: Any = None

    @classmethod
    def accepts(cls, name: str) -> bool | str:
        """Also the small model that comes with the package."""
        return name == NAME or super().accepts(name)

    @classmethod
    def read(cls, source: str, model_type: str, fields: Fields | None, attention: str | None, dtype: Any) -> Any:
        """As of any language model; of `vlm-micro` the weights that come with the package."""
        if source != NAME:
            return super().read(source, model_type, fields, attention, dtype)
        module = cls.random(model_type, MICRO if fields is None else fields, attention)
        micro_weights(module)
        return module

    # -- parts ------------------------------------------------------------------------------------------------------

    @property
    def eyes(self) -> Eyes:
        """Where this type has its parts."""
        return EYES[self.model_type]

    @property
    def visual(self) -> tuple[str, ...]:  # type: ignore[override]
        """The library's names of what stands behind the answer."""
        return self.eyes.visual

    @property
    def language_path(self) -> str:
        """Path of the language network without its output."""
        return self.eyes.language

    @property
    def text_config(self) -> Any:
        """The configuration of the language network."""
        return self.config.text_config

    @property
    def body_path(self) -> str:
        """Path of the image tower."""
        path = self.eyes.body
        return path if find(self.module, f"{path}.{self.eyes.patch}") is not None else f"{path}.vision_model"

    @property
    def tower(self) -> Any:
        """The image tower."""
        return self.module.get_submodule(self.body_path)

    @property
    def image_token(self) -> int:
        """The word at whose places visual tokens stand."""
        config = self.config
        return int(config.image_token_id if hasattr(config, "image_token_id") else config.image_token_index)

    @property
    def read_blocks(self) -> int:
        """How many of the tower's blocks are read: LLaVA takes the tokens in front of the last."""
        count = len(self.tower.get_submodule(self.eyes.blocks))
        layers = getattr(self.config, "vision_feature_layer", None)
        if layers is None:
            return count
        return max(x if x >= 0 else count + 1 + x for x in ([layers] if isinstance(layers, int) else layers))

    def reads(self, path: str, name: str) -> bool:
        """Not what stands behind the blocks of the tower that are read."""
        start = f"{self.body_path}.{self.eyes.blocks}."
        if path.startswith(start) and int(path.removeprefix(start).partition(".")[0]) >= self.read_blocks:
            return False
        if hasattr(self.config, "vision_feature_layer") and path.startswith(f"{self.body_path}.post_layernorm"):
            return False
        return super().reads(path, name)

    # -- points -----------------------------------------------------------------------------------------------------

    def points(self) -> list[Point]:
        """The image tower, the projector, the language network, in forward order."""
        eyes, body = self.eyes, self.body_path
        place: dict[str, Any] = {"tower": "visual", "by_sample": False}
        found = self.linear_at("visual.patch_embed", "patch", f"{body}.{eyes.patch}", **place)
        for name, path in eyes.before:
            found += self.norm_at(name, f"{body}.{path}", **place)
        width = int(getattr(self.config.vision_config, eyes.width))
        for i, block in enumerate(self.tower.get_submodule(eyes.blocks)[: self.read_blocks]):
            attention = block.self_attn if hasattr(block, "self_attn") else block.attn
            one = (
                attention.num_heads if eyes.packed else named(attention, QUERY).out_features // named(attention, WIDTH)
            )
            found += self.points_of_block(
                block,
                f"visual.blocks.{i}",
                f"{body}.{eyes.blocks}.{i}",
                width,
                one,
                block=i,
                table=eyes.table,
                attention={"head_dim": width // one},
                **place,
            )
        for name, path in eyes.behind:
            found += self.norm_at(name, f"{body}.{path}", **place)
        for name, kind, path in (*eyes.projector, *self._further()):
            at = self.norm_at(name, path, **place) if kind == "norm" else self.linear_at(name, kind, path, **place)
            found += at
        return found + self.language_points("text.", tower="text")

    def _further(self) -> list[tuple[str, str, str]]:
        """Qwen3-VL's projectors of the tokens of blocks on the way."""
        found = []
        for i in range(len(getattr(self.tower, "deepstack_merger_list", ()))):
            path = f"{self.body_path}.deepstack_merger_list.{i}"
            for name, kind, inner in (
                ("norm", "norm", "norm"),
                ("fc1", "proj", "linear_fc1"),
                ("fc2", "proj", "linear_fc2"),
            ):
                found.append((f"projector.{i}.{name}", kind, f"{path}.{inner}"))
        return found

    def record(self, session: Recorder, point: Point, verb: str, module: nn.Module, **options: Any) -> None:
        """More keys, also for image towers with a row for each image."""
        if point.tower != "visual" or verb not in ("extend", "gate"):
            super().record(session, point, verb, module, **options)
            return
        from zoo.families.split_attention import record

        place: Fields = {"block": None, "attention": point.module, "norm": None, "leave": None}
        record(session, point, verb, module, options=options, kind=ImageSite, **place)

    # -- running ----------------------------------------------------------------------------------------------------

    def inputs(self, ids: Tensor, mask: Tensor | None, seen: Sequence[Any], more: Fields) -> Fields:
        """The library's inputs by name, images in one row where it wants them so.

        Raises:
            DataError: a text with places for images and no images, or images that do not fit their sizes.
        """
        given = super().inputs(ids, mask, seen, more)
        pixels = given.get("pixel_values")
        pictures = pixels is not None or "pixel_values_videos" in given
        if not pictures and not untold(ids) and bool((ids == self.image_token).any()):
            raise DataError(
                f"The text has places for images (word {self.image_token}), and no images are given: pixel_values are missing. "
                "The processor makes both: model.family.processor(text=..., images=...)."
            )
        if self.eyes.packed:
            if pixels is not None and pixels.ndim == 3:
                given["pixel_values"], given["image_grid_thw"] = in_one_row(pixels, given.get("image_grid_thw"))
            if pictures:
                kinds = (ids == self.image_token).int() + 2 * (ids == self.config.video_token_id).int()
                given.setdefault("mm_token_type_ids", kinds)
                given.pop("position_ids")  # made by the library, of images and mask
        elif pixels is not None and self.model_type == "llava" and pixels.ndim == 5:
            given["pixel_values"] = pixels[self._real(pixels)]
        return {**given, **{k: v for k, v in more.items() if k == "position_ids"}}

    @staticmethod
    def _real(pixels: Tensor) -> Tensor:
        """Which of the images (B, I, ...) are no padding: that is zero everywhere."""
        return pixels.flatten(2).ne(0).any(-1)

    def check_routed(self, *inputs: Any) -> None:
        """Raise ConfigError unless images come by sample, as adapters for each sample need them."""
        pixels = inputs[3] if len(inputs) > 3 else None
        by_sample = 3 if self.eyes.packed else 5
        if pixels is not None and (pixels.ndim != by_sample or len(pixels) != len(inputs[0])):
            raise ConfigError(
                f"With adapters= images come by sample, pixel_values of {by_sample} axes; these are {tuple(pixels.shape)}, of "
                "all samples in one row. The task 'generate' makes them so, and multimodal/families/vlm/family.py says how."
            )

    def even(self, *inputs: Any, **kwargs: Any) -> bool:
        """Whether all samples have as many visual tokens: rows of the image tower then belong to them in equal parts.

        Raises:
            ConfigError: images that are not given by sample.
        """
        if any(name in kwargs for name in (*self.visual, "pixel_values_videos")):
            raise ConfigError(
                "With adapters= give images by sample and in their places, behind the answer: see the family's file."
            )
        if len(inputs) < 5 and not (len(inputs) == 4 and len(self.visual) == 1):
            return True
        if self.eyes.packed:
            counts = inputs[4].flatten(1).unflatten(1, (-1, 3)).prod(-1).sum(-1)
        else:
            counts = self._real(inputs[3]).sum(-1)
        return bool((counts == counts[0]).all())

    # -- words and images -------------------------------------------------------------------------------------------

    @property
    def processor(self) -> Any:
        """What makes inputs of texts and images, with the chat template; that of the weights, or one that is set.

        Raises:
            ConfigError: it cannot be had.
        """
        if self._processor is None and self.source == NAME:
            self._processor = micro_processor()
        if self._processor is None:
            self._processor = self.pretrained_part("AutoProcessor", "processor")
        return self._processor

    @processor.setter
    def processor(self, value: Any) -> None:
        self._processor = value

    @property
    def tokenizer(self) -> Any:
        """The processor's, or one that is set."""
        return self._tokenizer if self._tokenizer is not None else self.processor.tokenizer

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        self._tokenizer = value

    def licence(self) -> str | None:
        """That of the weights which come with the package; of others none is known."""
        return "apache-2.0" if self.pretrained and self.source == NAME else super().licence()

    def writer(self) -> Writer:
        """Processor and chat template as data and tasks use them."""
        flat = self.image_token if self.eyes.packed else None  # an image has places by row and column
        return Writer(self.processor, self.tokenizer, self.visual, self.eyes.packed, self.name, self.context, flat)

    def hub_task(self, num_classes: int) -> str | None:
        """The Hub's word for it."""
        return "image-text-to-text"

    def usage(self, num_classes: int) -> tuple[list[str], list[str]]:
        """As `Backbone.usage`: what is answered to a question about an image."""
        return (
            ["from PIL import Image", "from multimodal.tasks.generate import Generate"],
            ['answers = Generate().answer(model, [Image.open("photo.jpg")], ["What is in the picture?"])'],
        )

    # -- examples ---------------------------------------------------------------------------------------------------

    def example(self, size: int, length: int, words: int, grid: int) -> tuple[Tensor, ...]:
        """Random texts with an image in the middle, answers and images."""
        return with_images(self, size, length, words, grid)

    def tiny_batch(self) -> tuple[Tensor, ...]:
        """Two short texts with a small image each."""
        return self.example(2, 8, 4, 4)

    def example_batch(self, size: int = 2, classify: bool = False) -> tuple[Tensor, ...]:
        """Texts of 64 words with an image of 16 x 16 patches where sizes are free, answers of ten."""
        return self.example(size, 64, 10, 16)
