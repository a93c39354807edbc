"""What transformers' vision networks share: places, points, features, images of other sizes, preprocessing.

Tokens (B, N, d) are [class and register tokens | patches, row by row]. An image of another size than the checkpoint's gets its
positions by the library's own interpolation, in every forward pass, so `image_size=` changes no weight.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from zoo.errors import ConfigError, DataError
from zoo.families.names import check_names
from zoo.families.split_attention import QUERY, WIDTH, named
from zoo.families.transformers_family import COMMON, TransformersBackbone
from zoo.library import library
from zoo.points import Layout, Point
from zoo.points.rows import Row

if TYPE_CHECKING:
    from zoo.points.recorder import Recorder

OPTIONS: dict[str, Any] = {
    **COMMON,
    "image_size": range(1, 8193),
    "num_channels": range(1, 1025),
    **dict.fromkeys(
        ("num_register_tokens", "projection_dim", "num_frames", "tubelet_size", "num_patches"), range(65537)
    ),
    **dict.fromkeys(("mlp_ratio", "layerscale_value", "layer_scale_init_value", "drop_path_rate", "rope_theta"), float),
    **dict.fromkeys(
        (
            *("qkv_bias", "qv_bias", "use_swiglu_ffn", "use_gated_mlp", "vision_use_head", "use_mean_pooling"),
            *("use_absolute_position_embeddings", "use_relative_position_bias", "use_shared_relative_position_bias"),
            *("query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias", "use_mask_token"),
        ),
        bool,
    ),
}
HALVES = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers, of those that are used


@dataclass(frozen=True)
class Places:
    """Where a network of the library has its parts.

    Args:
        body: path of the network without its classifier; "": the module itself.
        blocks, patch, token: paths in the body of the list of blocks, the patch projection and the class token ("": none).
        before, behind: (name of the point, path) of norms in front of the blocks and behind them.
        further: (name, role, path) of projections behind the blocks.
    """

    blocks: str
    patch: str
    body: str = ""
    token: str = ""
    before: tuple[tuple[str, str], ...] = ()
    behind: tuple[tuple[str, str], ...] = ()
    further: tuple[tuple[str, str, str], ...] = ()


class TransformersVision(TransformersBackbone):
    """A vision transformer of transformers."""

    saved_options = OPTIONS
    gives: ClassVar[tuple[str, ...]] = ("pooled", "tokens", "maps")
    plain_blocks = True
    places: ClassVar[Mapping[str, Places]] = {}  # by model_type
    preprocessing: ClassVar[Mapping[str, dict[str, Any]]] = {}  # of the checkpoints that are known here, by model_type
    size: tuple[int, int] | None = None  # of the images, if it is not the checkpoint's own

    # -- building ---------------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, name: str, *, pretrained: bool, **kwargs: Any) -> nn.Module:
        """The library's module; `image_size` leaves pretrained positions as they are, and is what images have."""
        if "image_size" in kwargs:
            config = cls.library_classes[cls.described(name.removeprefix("transformers:"))[0]][0]
            if pretrained or not hasattr(getattr(library("transformers", cls.extra), config)(), "image_size"):
                del kwargs["image_size"]
        return super().build(name, pretrained=pretrained, **kwargs)

    def configure(self, **options: Any) -> None:
        """`image_size` of the images that the preprocessing gives.

        Raises:
            ConfigError: no whole number of patches, or a network whose positions cannot be interpolated.
        """
        size = options.get("image_size")
        if size is None:
            return
        wanted, patch = pair(size), pair(self.config.patch_size)
        if any(n < p or n % p for n, p in zip(wanted, patch, strict=True)):
            raise ConfigError(f"image_size is {size!r}; expected a multiple of the patches' size, {patch[0]}.")
        if wanted != self.own_size and not self.resizes:
            raise ConfigError(
                f"'{self.name}' has positions for images of {self.own_size[0]} pixels, which the library does not "
                "interpolate. Leave image_size out, or pass pretrained=False."
            )
        self.size = wanted

    # -- parts ------------------------------------------------------------------------------------------------------

    @property
    def place(self) -> Places:
        """Where this network has its parts."""
        return self.places[self.model_type]

    @property
    def body(self) -> Any:
        """The network without its classifier."""
        return self.module.get_submodule(self.place.body)

    def path(self, inner: str) -> str:
        """The path in the module of a part of the body."""
        return ".".join(filter(None, (self.place.body, inner)))

    @property
    def stack(self) -> Any:
        """The blocks."""
        return self.body.get_submodule(self.place.blocks)

    @property
    def resizes(self) -> bool:
        """Whether images may have another size than the checkpoint's."""
        return True

    @property
    def averaged(self) -> bool:
        """Whether all tokens take part in the pooling, or the class token alone is read."""
        return False

    def table(self) -> Sequence[Row]:
        """The rows of a block."""
        return self.block_table

    def attention_of(self, block: Any) -> Any:
        """The module with the projections."""
        return block.attention

    def norm_of(self, block: Any) -> nn.Module:
        """The norm in front of the attention."""
        raise NotImplementedError

    # -- points -----------------------------------------------------------------------------------------------------

    def grid(self) -> tuple[int, ...]:
        """Patches along each axis."""
        return tuple(n // p for n, p in zip(self.image, pair(self.config.patch_size), strict=True))

    def points(self) -> list[Point]:
        """Points of the patch embedding, of every block, and of what stands behind them."""
        place, config = self.place, self.config
        found = self.linear_at("patch_embed", "patch", self.path(place.patch))
        for name, path in place.before:
            found += self.norm_at(name, self.path(path))
        grid = self.grid()
        for i, block in enumerate(self.stack):
            attention = self.attention_of(block)
            width = named(attention, WIDTH)
            found += self.points_of_block(
                block,
                f"blocks.{i}",
                f"{self.path(place.blocks)}.{i}",
                config.hidden_size,
                named(attention, QUERY).out_features // width,
                block=i,
                table=self.table(),
                layout=Layout(self.num_prefix, grid),
                attention={"head_dim": width},
                tokens={
                    "num_prefix": self.num_prefix,
                    "first": i == 0,
                    "accumulates": True,
                    "parameter": self.path(place.token) if i == 0 and place.token else "",
                },
            )
        for name, path in place.behind:
            found += self.norm_at(name, self.path(path))
        for name, role, path in place.further:
            found += self.linear_at(name, role, path)
        return found

    def record(self, session: Recorder, point: Point, verb: str, module: nn.Module, **options: Any) -> None:
        """Verbs of attention and tokens points: more keys, and prompts."""
        from zoo.families.split_attention import record

        blocks = list(self.stack)
        assert point.block is not None
        block = blocks[point.block]
        # Where the class token alone is read, prompts that leave the last block are read by nobody
        pooled = options.get("pooled", False) and self.averaged
        if pooled and block is blocks[-1]:
            options["keep"] = True
        record(
            session,
            point,
            verb,
            module,
            block=block,
            attention=self.attention_of(block),
            norm=self.norm_of(block),
            leave=None if pooled else self.leave,
            options=options,
            masked=[self.attention_of(b) for b in blocks] if self.biased else (),
            blocks=blocks,
        )

    @property
    def leave(self) -> tuple[nn.Module, str]:
        """Where prompts that flow are taken out: behind the last block."""
        return self.stack[-1], "output"

    @property
    def biased(self) -> bool:
        """Whether the attention adds a bias for each pair of places."""
        return False

    # -- running ----------------------------------------------------------------------------------------------------

    @property
    def own_size(self) -> tuple[int, int]:
        """(H, W) of the images that the checkpoint's positions are for."""
        return pair(self.config.image_size)

    @property
    def image(self) -> tuple[int, int]:
        """(H, W) of the images."""
        return self.size or self.own_size

    def look(self, module: nn.Module, images: Tensor) -> Any:
        """What the library's network answers to images (B, C, H, W).

        Raises:
            DataError: no images, or of a size that does not fit the patches.
        """
        self.check_images(images)
        other = tuple(images.shape[-2:]) != self.own_size
        asked = "interpolate_pos_encoding" in inspect.signature(type(module).forward).parameters
        return module(images, **({"interpolate_pos_encoding": True} if other and asked else {}))

    def check_images(self, images: Tensor) -> None:
        """Raise DataError unless these are images that the patches fit into."""
        patch = pair(self.config.patch_size)
        if images.ndim != 4 or any(n < p or n % p for n, p in zip(images.shape[-2:], patch, strict=True)):
            raise DataError(
                f"images of shape {tuple(images.shape)}; expected (B, C, H, W), height and width multiples of {patch[0]}. "
                "model.preprocess() makes them."
            )

    def pool(self, output: Any) -> Tensor:
        """What stands in front of the classifier (B, d), of what the body gives."""
        return output.pooler_output  # type: ignore[no-any-return]

    def features(self, *inputs: Tensor, **kwargs: Any) -> Tensor:
        """Images (B, C, H, W) -> pooled features (B, d)."""
        check_names(self.name, None, kwargs)
        (images,) = inputs
        return self.pool(self.look(self.body, images)).contiguous()  # a class token is a view of all tokens

    def outputs(self, *inputs: Tensor, want: Sequence[str] = ("pooled",), **kwargs: Any) -> dict[str, Any]:
        """Tokens behind the final norm, [prefix | prompts that stay | patches]; the map is that of the patches."""
        self.check_wanted(want)
        check_names(self.name, None, kwargs)
        (images,) = inputs
        output = self.look(self.body, images)
        tokens = self.tokens(output)
        found: dict[str, Any] = {}
        if "pooled" in want:
            found["pooled"] = self.pool(output).contiguous()
        if "tokens" in want:
            found["tokens"] = tokens
        if "maps" in want:
            height, width = (n // p for n, p in zip(images.shape[-2:], pair(self.config.patch_size), strict=True))
            patches = tokens[:, tokens.shape[1] - height * width :]
            found["maps"] = [patches.transpose(1, 2).unflatten(2, (height, width))]
        return found

    def tokens(self, output: Any) -> Tensor:
        """The last block's tokens behind the final norm."""
        return output.last_hidden_state  # type: ignore[no-any-return]

    def run(self, module: nn.Module, *inputs: Any) -> Tensor:
        """Logits (or pooled features) of a merged module."""
        output = self.look(module, *inputs)
        if "classifier" in module._modules:
            return output.logits  # type: ignore[no-any-return]
        return self.pool(output)

    # -- data -------------------------------------------------------------------------------------------------------

    def data_config(self) -> dict[str, Any]:
        """The checkpoint's own preprocessing, at the size that images have."""
        stated = _stated(self.preprocessor())
        channels = int(self.config.num_channels)
        found = {
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            **self.preprocessing.get(self.model_type, HALVES),
            **stated,
        }
        if channels != 3:  # statistics of three colours say nothing about other channels
            found |= {"mean": (0.5,) * channels, "std": (0.5,) * channels}
        return {"input_size": (channels, *self.image), **found}


def pair(size: Any) -> tuple[int, int]:
    """(height, width), of both or of one number."""
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(height), int(width)


def _stated(given: Mapping[str, Any]) -> dict[str, Any]:
    """The library's `preprocessor_config.json` in the words of `Backbone.data_config`; what is not understood is left out."""
    found: dict[str, Any] = {}
    for word, key in (("mean", "image_mean"), ("std", "image_std")):
        values = given.get(key)
        if isinstance(values, list) and values and all(isinstance(v, (int, float)) for v in values):
            found[word] = tuple(float(v) for v in values)
    if given.get("do_normalize") is False:
        found |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    if given.get("resample") in RESAMPLE:
        found["interpolation"] = RESAMPLE[given["resample"]]
    size, crop = given.get("size"), given.get("crop_size")
    if isinstance(size, dict) and isinstance(size.get("height"), int) and not given.get("do_center_crop"):
        found |= {"crop_mode": "squash", "crop_pct": 1.0}
    elif given.get("do_center_crop") and crop is not None:
        edge = size.get("shortest_edge", size.get("height")) if isinstance(size, dict) else size
        cut = crop.get("height") if isinstance(crop, dict) else crop
        if isinstance(edge, int) and isinstance(cut, int) and 0 < cut <= edge:
            found |= {"crop_mode": "center", "crop_pct": cut / edge}
    return found
