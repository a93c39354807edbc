"""CLIP and SigLIP in open_clip: an image tower and a text tower whose embeddings are compared.

    s(x, t) = exp(a) <I(x) / |I(x)|, T(t) / |T(t)|> + b        a: logit scale; b: logit bias (SigLIP), else 0

`features(images)` is I (B, d), on which a classifier can stand; `features(images, texts)` are the scores (B_images, B_texts).
Points of the two towers are `image.blocks.3.attn.q`, `text.blocks.0.mlp` and so on (`multimodal.families.clip.towers`).
Attentions whose projections are no modules are swapped for equal ones (`multimodal.families.clip.attention`), and `merge` puts
the library's back.

With a classifier the image tower alone is adapted, since what the text tower computes is read by nobody; `tower="image"`, "text"
or "both" chooses otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.families.clip import build as clip_build
from multimodal.families.clip import towers as clip_towers
from multimodal.families.clip.found import Looked, text_of
from multimodal.families.clip.towers import linear_points, norm_points
from zoo.backbone import Backbone
from zoo.errors import ConfigError, DataError, MismatchError, nearest
from zoo.families.timm_parts import fold_shift, pool_points
from zoo.library import library
from zoo.points import ConditionPoint, Layout, Point
from zoo.points.rows import find
from zoo.registry import register_backbone

if TYPE_CHECKING:
    from multimodal.families.clip.towers import Tower
    from zoo.points.recorder import Recorder

TOWERS = ("image", "text", "both")


@register_backbone
class CLIPBackbone(Backbone):
    """open_clip's `CLIP` and `CustomTextCLIP`: `open_clip:<architecture>[/<pretrained tag>]`."""

    family = "clip"
    modality = "image-text"
    aliases = {
        "clip-micro": "zoo:clip-micro",
        "clip-vit-b32": "open_clip:ViT-B-32/openai",
        "clip-vit-b16": "open_clip:ViT-B-16/openai",
        "clip-vit-l14": "open_clip:ViT-L-14/openai",
        "siglip-b16": "open_clip:ViT-B-16-SigLIP/webli",
    }
    elementwise = ("mlp.gelu", "mlp.act")
    plain_blocks = True
    weights_folder = Path(__file__).parents[2] / "weights"
    gives = ("pooled", "tokens", "maps", "text", "scale")
    task = "contrast"
    point_options = ("tower",)
    saved_options = clip_build.SAVED_OPTIONS
    tiny = (
        "clip-micro",
        {
            "embed_dim": 24,
            "vision_cfg": {"width": 48, "layers": 2, "head_width": 16, "image_size": 16},
            "text_cfg": {"width": 32, "layers": 2, "heads": 2, "vocab_size": 600, "context_length": 32},
        },
    )
    tiny_classes = None

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, name)
        self.own_name = self.aliases.get(name, name).removeprefix("open_clip:")
        self.tower = "both"
        self.looked = Looked(module)
        if isinstance(clip_towers.towers(module)["image"], str):
            self.gives = ("pooled", "text", "scale")  # type: ignore[misc,assignment]  # tokens and maps are not described

    # -- building ---------------------------------------------------------------------------------------------------

    @classmethod
    def accepts(cls, name: str) -> bool | str:
        """True for `open_clip:<architecture>[/<tag or file>]`, `open_clip:hf-hub:<repo>` and `open_clip:local-dir:<folder>`."""
        if not name.startswith("open_clip:"):
            return False
        architecture, _ = clip_build.parts(name)
        known = library("open_clip", "multimodal").list_models()
        if ":" in architecture or architecture in known:
            return True
        return nearest(name, [f"open_clip:{k}" for k in known])

    @classmethod
    def known(cls, name: str) -> bool:
        """Also open_clip's own architectures with its own tags; its `hf-hub:`, its `local-dir:` and paths are somebody's."""
        return super().known(name) or (name.startswith("open_clip:") and clip_build.registered(name))

    @classmethod
    def options(cls, num_classes: int | None, given: dict[str, Any]) -> dict[str, Any]:
        """With a classifier: `tower="image"`, if nothing else is said."""
        if num_classes and given.get("tower") == "text":
            raise ConfigError("a classifier stands on the image tower; tower='text' leaves nothing of it to adapt.")
        return {"tower": "image", **given} if num_classes else given

    def configure(self, tower: str | None = None, **_: Any) -> None:
        """`tower`: which of them adapters see: "image", "text" or "both"."""
        if tower is not None and tower not in TOWERS:
            raise ConfigError(f"tower is {tower!r}; expected one of {', '.join(TOWERS)}.")
        self.tower = tower or "both"

    @classmethod
    def build(cls, name: str, *, pretrained: bool, **kwargs: Any) -> nn.Module:
        """open_clip's model, with attentions that points can stand in.

        `image_size` and `context_length` resize; `vision_cfg` and `text_cfg` override fields of the architecture's configuration;
        what else is given goes to `open_clip.create_model`.

        Raises:
            MismatchError: a class that this family does not describe.
            ConfigError: weights that cannot be had, or options that open_clip does not take.
        """
        open_clip = library("open_clip", "multimodal")
        options = {k: v for k, v in kwargs.items() if v is not None and k != "tower"}
        module = clip_build.create(name, pretrained, options)
        if not isinstance(module, (open_clip.CLIP, open_clip.CustomTextCLIP)):
            raise MismatchError(
                f"open_clip builds '{name}' as {type(module).__name__}; the family 'clip' describes CLIP and CustomTextCLIP, of "
                "which each tower gives one embedding. Use one of those (a CoCa hands tokens on to a decoder of captions)."
            )
        clip_build.swap(module)
        return module

    def restore(self, module: nn.Module) -> nn.Module:
        """The library's own attentions back in place of ours."""
        from multimodal.families.clip.attention import PackedAttention

        for parent in list(module.modules()):
            for name, child in parent._modules.items():
                if isinstance(child, PackedAttention):
                    parent._modules[name] = child.library()
        if hasattr(module.visual, "trunk"):
            from zoo.families.timm_biases import close_biases

            close_biases(module)
        return module

    def fold_shift(self, module: Any, point: Point, shift: Tensor) -> bool:
        """The patch embedding of open_clip's own tower has no bias; the positions of the patches take its place."""
        trunk = "visual.trunk."
        if point.path.startswith(trunk):
            return fold_shift(module.visual.trunk, point, point.path.removeprefix(trunk), shift)
        positions = getattr(module.visual, "positional_embedding", None)
        if point.path != "visual.conv1" or positions is None:
            return False
        positions.data[1:] += shift.to(positions)
        return True

    # -- points -----------------------------------------------------------------------------------------------------

    def towers(self) -> list[Tower]:
        """The towers that adapters see, of those that are described here."""
        found = clip_towers.towers(self.module).items()
        return [t for name, t in found if self.tower in (name, "both") and not isinstance(t, str)]

    @property
    def refused(self) -> dict[str, str]:
        """Projections of towers that are not described which are no points: name -> why."""
        return self.looked.refused

    @classmethod
    def half(cls, block: Any, role: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A block of a tower in halves (`towers.half`)."""
        return clip_towers.half(block, role, x, *args, **kwargs)

    def points(self) -> list[Point]:
        """Points of the image tower, then those of the text tower, each in forward order."""
        found: list[Point] = []
        for name, tower in clip_towers.towers(self.module).items():
            if self.tower not in (name, "both") or isinstance(tower, str):
                found += self.looked.points(self, name) if self.tower in (name, "both") else []
                continue
            found += self._ahead(tower)
            for i, block in enumerate(tower.blocks):
                attention = block.attn
                head_dim = getattr(attention, "head_dim", tower.dim // attention.num_heads)
                found += self.points_of_block(
                    block,
                    f"{tower.name}.blocks.{i}",
                    f"{tower.path}.{i}",
                    tower.dim,
                    attention.num_heads,
                    table=tower.table,
                    block=i,
                    tower=tower.name,
                    layout=self._layout(tower),
                    attention={"head_dim": head_dim, "causal": tower.causal},
                    tokens={
                        "num_prefix": tower.num_prefix,
                        "first": i == 0,
                        "accumulates": True,
                        "parameter": tower.parameter if i == 0 else "",
                        **(self._words(tower) if i == 0 else {}),
                    },
                )
            found += norm_points(self.module, tower, tower.behind[:1])
            if tower.timm:
                found += pool_points(self, f"{tower.timm}.attn_pool", f"{tower.name}.attn_pool", tower=tower.name)
            found += norm_points(self.module, tower, tower.behind[1:])
            found += linear_points(self.module, tower, "proj", "proj", tower.proj)
        return found

    def _layout(self, tower: Tower) -> Layout:
        if tower.name == "text":
            return Layout(0, (self.context_length,), causal=tower.causal)
        visual: Any = self.module.visual
        grid = getattr(getattr(visual, "trunk", None), "patch_embed", visual).grid_size
        return Layout(tower.num_prefix, tuple(grid))

    def _words(self, tower: Tower) -> dict[str, Any]:
        """What the first block of the text tower says of its words."""
        embedding = find(self.module, tower.embed) if tower.embed else None
        return {} if embedding is None else {"embedding": embedding, "spell": self._spell}

    def _spell(self, text: str) -> Tensor:
        """Token ids (T,) of a text: what the tokenizer puts between the start and the end."""
        from multimodal.families.clip.text import spell, tokenizer

        vocab = int(self.module.vocab_size)  # type: ignore[arg-type]
        return spell(tokenizer(self.own_name, self.context_length, vocab), text)

    def _ahead(self, tower: Tower) -> list[Point]:
        """Points in front of the blocks."""
        found = linear_points(self.module, tower, "patch_embed", "patch", tower.patch)
        embed = find(self.module, tower.embed) if tower.embed else None
        if embed is not None:
            common: Any = {"name": f"{tower.name}.embed", "role": "condition", "path": tower.embed, "module": embed}
            found.append(ConditionPoint(**common, tower=tower.name, dim_in=tower.dim, dim_out=tower.dim))
        return found + norm_points(self.module, tower, tower.norms)

    def modules_to_train(self) -> Iterable[tuple[str, nn.Module]]:
        """Everything, or what belongs to the chosen tower (logit scale and bias belong to the text's)."""
        for path, module in self.module.named_modules():
            image = path.split(".")[0] == "visual"
            if self.tower == "both" or image == (self.tower == "image"):
                yield path, module

    def record(self, session: Recorder, point: Point, verb: str, module: nn.Module, **options: Any) -> None:
        """Prefixes and prompts in either tower, queries in that of images."""
        from multimodal.families.clip import attention, queries

        tower = next(t for t in self.towers() if t.name == point.tower)
        if verb == "query":
            queries.record(tower, session, point, module)
        else:
            attention.record(tower, session, point, verb, module, **options)

    # -- what the model asks ----------------------------------------------------------------------------------------

    def features(self, images: Tensor | None = None, texts: Tensor | Sequence[str] | None = None) -> Tensor:  # type: ignore[override]
        """Images (B, 3, H, W) -> embeddings (B, d); token ids (B, L), or texts -> (B, d); both -> scores (B_images, B_texts).

        Raises:
            DataError: neither, or texts that do not fit the context.
        """
        return self.run(self.module, images, texts)

    def outputs(  # type: ignore[override]
        self, images: Tensor | None = None, texts: Any = None, *, want: Sequence[str] = ("pooled",)
    ) -> dict[str, Any]:
        """ "pooled", "tokens" and "maps" of images, "text" of texts (in the common space, not normalised), "scale": (exp(a), b).

        Raises:
            DataError: images or texts that an output needs are not given.
        """
        self.check_wanted(want)
        return clip_towers.named_outputs(self.module, images, None if texts is None else self._ids(texts), want)

    def run(self, module: Any, images: Any = None, texts: Any = None) -> Tensor:  # type: ignore[override]
        """`features` of a plain module."""
        if texts is not None:
            texts = self._ids(texts)
        if images is not None and texts is not None:
            return module.get_logits(images, F.pad(texts, (0, self.context_length - texts.shape[1])))[0]
        if images is None and texts is None:
            raise DataError("neither images nor texts are given.")
        return clip_towers.encode_text(module, texts) if images is None else module.encode_image(images)

    def _ids(self, texts: Any) -> Tensor:
        if not isinstance(texts, Tensor):
            return self.tokenize(texts).to(self.module.logit_scale.device)  # type: ignore[union-attr,arg-type]
        least = self.context_length if clip_towers.reads_all(self.module) else 1
        fits = texts.dim() == 2 and least <= texts.shape[1] <= self.context_length
        if not fits or texts.is_floating_point():
            what = f"are {texts.dtype} of the shape {tuple(texts.shape)}; expected whole numbers (n, {self.context_length})"
            raise DataError(f"token ids {what}, as `tokenize` gives them.")
        return texts

    def text_length(self, ids: Tensor) -> int:
        """How many columns of token ids (n, L) the embeddings of these texts depend on, if no token is told of later ones."""
        return clip_towers.length(self.module, ids)

    def check_routed(self, *inputs: Any) -> None:
        """Scores compare every image with every text, so their rows belong to no single adapter."""
        if sum(x is not None for x in inputs) > 1:
            raise ConfigError(
                "adapters= serves samples one by one, but scores compare every image with every text. Pass images alone (or "
                "texts alone), and compare their embeddings."
            )

    def check_pooled(self, method: str, images: Any = None, texts: Any = None) -> None:
        """Neither texts nor scores have answers of an image's tokens beside them."""
        if texts is not None:
            raise ConfigError(
                f"'{method}' puts features of its own beside the embeddings of images, and texts have none; nor are such "
                "features compared with texts. Pass images alone (to a classifier: model.reset_head(K)), or use another method."
            )

    @property
    def feature_dim(self) -> int:
        """d of the common space."""
        text: Any = getattr(self.module, "text", self.module)
        projection = getattr(text, "text_projection", None)
        if isinstance(projection, nn.Linear):
            return projection.out_features
        if isinstance(projection, Tensor):
            return projection.shape[1]
        return int(getattr(text, "output_dim", None) or text.ln_final.weight.shape[0])

    def packs(self, module: nn.Module) -> bool:
        """open_clip's blocks take the first of what torch's attention gives."""
        return bool(getattr(module, "pair", False))

    @property
    def num_prefix(self) -> int:
        """Class and register tokens of the image tower."""
        trunk = getattr(self.module.visual, "trunk", None)
        return 1 if trunk is None else int(getattr(trunk, "num_prefix_tokens", 0))

    @property
    def context_length(self) -> int:
        """Tokens of a text, start and end included."""
        return int(self.module.context_length)  # type: ignore[arg-type]

    def tokenize(self, texts: str | Sequence[str], truncate: bool = False) -> Tensor:
        """Texts -> token ids (n, context_length), by open_clip's tokenizer of this model.

        Raises:
            DataError: a text with more tokens than the context (unless `truncate`, which cuts it off); it is named.
            ConfigError: the tokenizer's files cannot be had.
        """
        from multimodal.families.clip.text import tokenize, tokenizer

        vocab = int(self.module.vocab_size)  # type: ignore[arg-type]
        return tokenize(tokenizer(self.own_name, self.context_length, vocab), texts, self.context_length, truncate)

    def data_config(self) -> dict[str, Any]:
        """open_clip's preprocessing of the checkpoint, in the words of timm's data configuration."""
        return clip_build.data_config(self.module.visual)

    def licence(self) -> str | None:
        """MIT for OpenAI's weights, Apache-2.0 for ours; open_clip does not state those of others."""
        if not self.pretrained:
            return None
        own = "apache-2.0" if self.own_name.startswith("zoo:") else None
        return "mit" if self.own_name.endswith("/openai") else own

    def hub_id(self) -> str | None:
        """Hub repository of the checkpoint, as open_clip states it."""
        return clip_build.repository(self.own_name) if self.pretrained else None

    def hub_task(self, num_classes: int) -> str | None:
        """A classifier stands on the image tower; without one images are compared with texts."""
        return "image-classification" if num_classes else "zero-shot-image-classification"

    def usage(self, num_classes: int) -> tuple[list[str], list[str]]:
        """As `Backbone.usage`; without a classifier, scores of texts."""
        imports, lines = super().usage(num_classes)
        if not num_classes:
            texts = '["a photo of a cat", "a photo of a dog"]'
            lines[-1] = f"scores = model(image[None], {texts}).softmax(-1)  # (1, 2)"
        return imports, lines

    def zero_shot(self, model: Any, classes: Sequence[str], templates: Sequence[str] = ()) -> None:
        """Make the names of classes the model's head (`multimodal.tasks.zero_shot`)."""
        from multimodal.tasks.zero_shot import TEMPLATES, put_zero_shot_classifier

        put_zero_shot_classifier(model, classes, templates or TEMPLATES)

    def tiny_batch(self) -> tuple[Tensor, ...]:
        """Two images and two texts as token ids: start, words, end (the highest id), padding."""
        vocab, context = int(self.module.vocab_size), self.context_length  # type: ignore[arg-type]
        texts = [text_of(torch.randint(1, vocab - 2, (n,)), context, vocab) for n in (5, context)]
        return torch.randn(2, *self.data_config()["input_size"]), torch.cat(texts)

    def example_batch(self, size: int = 2, classify: bool = False) -> tuple[Tensor, ...]:
        """Images and texts; a classifier stands on images alone."""
        found = super().example_batch(size)
        return found[:1] if classify else found
