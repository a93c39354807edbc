"""Families of several classes of diffusers whose blocks are of one shape: each class is one entry (`Member`).

An entry says which lists of blocks there are and by which table, what stands in front of the blocks and behind, which conditions
the class takes, and how it is called. What a member takes is what its pipeline hands over, in the units of its scheduler:
latents (B, C, H, W) or (B, C, F, H, W), not packed; time steps of 0..1000; text as its encoders make it. What comes out is
what the scheduler takes: the flow noise - latents, the noise, or the velocity.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from multimodal.families.diffusion.family import DiffusersBackbone, pixel_config, timesteps
from multimodal.families.diffusion.members import MORE_OPTIONS, Input, Member
from multimodal.families.diffusion.names import class_of, source_class, source_config
from zoo.errors import ConfigError, DataError
from zoo.library import library
from zoo.points import AttentionPoint, LinearPoint, Point
from zoo.points.rows import Row, find, linear_dims

# Norms that are functions of one tensor
NORMS = ("LayerNorm", "FP32LayerNorm", "RMSNorm")
# Points of a last joint block that change nothing but the text, which nobody reads behind it
UNREAD = frozenset(
    {
        *("text.attn.q", "text.attn.q_norm", "text.attn.o", "text.attn"),
        *("text.mlp.up", "text.mlp.gate", "text.mlp.down", "text.mlp"),
    }
)


class DescribedBackbone(DiffusersBackbone):
    """A family of several classes. `pixels=` and `frames=` say of what size its images or clips are.

    Names: the aliases, `diffusers:<repository or folder>`, or `diffusers:<class>` for a class's default sizes without weights.
    """

    members: ClassVar[Mapping[str, Member]] = {}
    saved_options = MORE_OPTIONS
    frames_axis: ClassVar[int] = 2

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, name)
        self.member = self.members[type(module).__name__]
        self._pixels, self._frames = self.member.pixels, self.member.frames
        self._unread: set[str] = set()
        self.schedule = (self.member.schedule[0], dict(self.member.schedule[1]))  # type: ignore[misc]
        self.front, self.back = self.member.front, self.member.back  # type: ignore[misc]
        self.text_tokens = self.member.text_tokens  # type: ignore[misc]

    # -- building ---------------------------------------------------------------------------------------------------

    @classmethod
    def accepts(cls, name: str) -> bool | str:
        """True for `diffusers:<repository or folder>` with a transformer of one of the classes, and for `diffusers:<class>`."""
        if name in cls.aliases.values():
            return True
        if not name.startswith("diffusers:"):
            return False
        known = source_class(name.removeprefix("diffusers:"))
        return known if " " in known else known in cls.members

    @classmethod
    def named(cls, name: str) -> tuple[str, Mapping[str, Any]]:
        """The class of a (library's) name, and its configuration as far as that is known here.

        Raises:
            ConfigError: the repository or folder has no configuration of one of the family's classes.
        """
        if name.removeprefix("diffusers:") in cls.members:
            return name.removeprefix("diffusers:"), {}
        for made, member in cls.members.items():
            for one in member.released.values():
                if name == f"diffusers:{one.source}":
                    return made, one.config
        config, _ = source_config(name.removeprefix("diffusers:"))
        if isinstance(config, str):
            raise ConfigError(f"'{name}' cannot be built: {config}")
        return class_of(config), config

    @classmethod
    def build(cls, name: str, *, pretrained: bool, dtype: torch.dtype | None = None, **kwargs: Any) -> nn.Module:
        """The library's transformer; as `DiffusersBackbone.build`."""
        options = {k: v for k, v in kwargs.items() if v is not None and k not in ("pixels", "frames")}
        known, found = cls.named(name)
        made = getattr(library("diffusers", "multimodal"), known)
        if pretrained and name == f"diffusers:{known}":
            raise ConfigError(
                f"'{name}' is a class of diffusers, of the sizes that it has by default: it has no weights. Pass "
                "pretrained=False for random ones, or name a repository or folder (diffusers:<source>)."
            )
        if pretrained:
            return cls._load(made, name, options, dtype)
        takes = inspect.signature(made.__init__).parameters
        config = {k: v for k, v in found.items() if k in takes}
        try:
            return made(**{**config, **options})
        except (TypeError, ValueError, NotImplementedError, AssertionError) as error:
            raise ConfigError(f"diffusers does not take these options for '{name}': {error}") from error

    def configure(self, pixels: Any = None, frames: Any = None, **options: Any) -> None:
        """Take up the size of the images or clips that it is going to see.

        Raises:
            ConfigError: a size that is not of whole latents.
        """
        if pixels is not None:
            size = (pixels, pixels) if isinstance(pixels, int) else tuple(pixels)
            if len(size) != 2 or any(not isinstance(n, int) or n < 1 or n % self.member.ratio for n in size):
                raise ConfigError(
                    f"pixels is {pixels!r}; expected a height and width (or one number for both), multiples of "
                    f"{self.member.ratio}."
                )
            self._pixels = size
        if frames is not None:
            if not self.member.frames:
                raise ConfigError(f"'{self.name}' makes images; frames= is for videos.")
            if not isinstance(frames, int) or frames < 1:
                raise ConfigError(f"frames is {frames!r}; expected a whole number above 0.")
            self._frames = frames

    @classmethod
    def known(cls, name: str) -> bool:
        """Also the names of the classes."""
        return super().known(name) or (name.startswith("diffusers:") and name[10:] in cls.members)

    @property
    def pipeline_class(self) -> str:  # type: ignore[override]
        """The pipeline of diffusers that it belongs to."""
        return self.member.pipeline

    def licence(self) -> str | None:
        """As `DiffusersBackbone.licence`."""
        found = [r.licence for r in self.member.released.values() if f"diffusers:{r.source}" == self._library_name]
        return found[0] if self.pretrained and found else None

    # -- what the model asks ----------------------------------------------------------------------------------------

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that are denoised."""
        return int(self.config[self.member.channels]) // self.member.packed

    @property
    def feature_dim(self) -> int:
        """Channels of the prediction."""
        return self.latent_channels * (2 if self.member.variance else 1)

    @property
    def patches(self) -> tuple[int, int]:
        """Latent frames and latents along a side in one patch."""
        own = self.config.get("patch_size", 1) if not self.member.patch else self.member.patch
        if isinstance(own, (tuple, list)):
            return (int(own[0]) if len(own) == 3 else 1), int(own[-1])
        return int(self.config.get("patch_size_t") or 1), int(own)

    @property
    def width(self) -> int:
        """Width of the stream."""
        heads, one = self.member.heads
        return int(self.config[self.member.width] if self.member.width else self.config[heads] * self.config[one])

    def data_config(self) -> dict[str, Any]:
        """Pixels in [-1, 1], of the size that the checkpoints were trained with or `pixels=` says."""
        return pixel_config(*self._pixels)

    def hub_task(self, num_classes: int) -> str | None:
        """Images or videos of a text."""
        return "text-to-video" if self.member.frames else "text-to-image"

    # -- points -----------------------------------------------------------------------------------------------------

    def points(self) -> list[Point]:
        """Points of the embeddings, of every list of blocks in turn, and of what stands behind."""
        found = [p for line in self.front for p in self.around(*line)]
        index, last = 0, []
        for blocks in self.member.blocks:
            listed: Any = self.module.get_submodule(blocks.path)
            for i, block in enumerate(listed):
                last = self.points_at(block, f"{blocks.name}.{i}", f"{blocks.path}.{i}", index, blocks.table)
                found += last
                index += 1
        unread = {id(p) for p in last if p.name.split(".", 2)[2:] and p.name.split(".", 2)[2] in UNREAD}
        self._unread = {p.path for p in last if id(p) in unread and p.kind in ("linear", "norm")}
        return [p for p in found if id(p) not in unread] + [p for line in self.back for p in self.around(*line)]

    def modules_to_train(self) -> Iterable[tuple[str, nn.Module]]:
        """All but what nobody reads: it would get no gradient."""
        unread = self._unread
        return ((path, module) for path, module in super().modules_to_train() if path not in unread)

    def around(self, kind: str, role: str, name: str, path: str) -> list[Point]:
        """Points outside of the blocks; a "*" in name and path counts the modules of a list."""
        if "*" not in path:
            return self.outside(self.width, kind, role, name, path)
        before, _, after = path.partition(".*")
        listed: Any = find(self.module, before)
        numbers = range(0 if listed is None else len(listed))
        lines = ((name.replace("*", str(i)), f"{before}.{i}{after}") for i in numbers)
        return [p for own, at in lines for p in self.outside(self.width, kind, role, own, at)]

    def elementwise_modules(self) -> list[nn.Module]:
        """As `DiffusersBackbone.elementwise_modules`, and the norms without parameters."""
        plain = [
            m for m in self.module.modules() if type(m).__name__ in NORMS and not any(True for _ in m.parameters())
        ]
        return [*super().elementwise_modules(), *plain]

    def points_at(
        self, block: nn.Module, name: str, path: str, index: int, table: Sequence[Row] | None = None
    ) -> list[Point]:
        """Points of one block, each with the widths that its modules have; a fused projection comes in its parts."""
        place: dict[str, Any] = {"block": index, "attention": {"head_dim": 1}}
        points = self.points_of_block(block, name, path, self.width, 1, table=table, **place)
        text = int(self.config[self.member.text_width]) if self.member.text_width else 0
        found: list[Point] = []
        for point in points:
            if point.kind == "norm" and not point.dim_out:
                continue
            if point.kind == "sublayer" and text and ".text." in point.name:
                point.dim_in = point.dim_out = text
            if isinstance(point, AttentionPoint):
                of_heads(point)
            found += self._parted(point, block, name) if isinstance(point, LinearPoint) else [point]
        return found

    def _parted(self, point: LinearPoint, block: nn.Module, name: str) -> list[Point]:
        inside = point.name.removeprefix(f"{name}.")
        split = self.member.parts.get(inside)
        if split is None:
            return [point]
        found: list[Point] = []
        start = 0
        for own, role, rows in split(point.module):
            common = {
                k: getattr(point, k) for k in ("path", "block", "stage", "tower", "module", "dim_in", "num_heads")
            }
            stop = start + rows
            part = {"name": f"{name}.{own}", "role": role, "dim_out": rows, "start": start, "stop": stop}
            found.append(LinearPoint(**common, **part, fused=point.name))  # type: ignore[arg-type]
            start = stop
        whole = linear_dims(point.module)
        assert whole is not None and start == whole[1], f"parts of '{point.name}' are {start} rows of {whole}"
        return found

    def site_kind(self, module: nn.Module, kind: type[Any]) -> type[Any]:
        """A block that gives (text, image) is read for the image."""
        if type(module).__name__ in self.member.text_first:
            from multimodal.families.diffusion.attention import ImageBlock

            return ImageBlock
        return super().site_kind(module, kind)

    # -- the call ---------------------------------------------------------------------------------------------------

    def given(self) -> list[Input]:
        """The conditions that this network takes."""
        more = int(self.config["in_channels"]) != self.latent_channels * self.member.packed
        return [
            i for i in self.member.inputs if (more if i.kind == "latents" else not i.width or self.config.get(i.width))
        ]

    def run(self, module: nn.Module, *inputs: Any, **kwargs: Any) -> Tensor:
        """What the transformer answers.

        Args:
            inputs: latents, time steps (B,) or one for all, and the conditions, in the order of the family's entry for this
                class (`model.family.given()`); masks of the text may be left out. Further keywords go to the library.

        Returns:
            The prediction, of the latents' shape (and as many channels of variance where one is predicted).

        Raises:
            DataError: other channels, widths or numbers of rows, latents that are not of whole patches, a missing condition.
        """
        wanted = self.given()
        names = ("latents", "timestep", *(i.name for i in wanted))
        if len(inputs) > len(names):
            raise DataError(f"'{self.name}' takes {', '.join(names)}; {len(inputs)} inputs were given.")
        given = {**dict(zip(names, inputs)), **kwargs}
        if "latents" not in given or "timestep" not in given:
            raise DataError(f"'{self.name}' takes {', '.join(names)}; latents and timestep are needed.")
        latents, steps = given.pop("latents"), given.pop("timestep")
        video = bool(self.member.frames)
        frame_patch, patch = self.patches
        self.check_latents(latents, "B C F H W" if video else "B C H W", self.latent_channels, patch)
        if video and latents.shape[2] % frame_patch:
            raise DataError(
                f"{latents.shape[2]} latent frames cannot be cut into patches of {frame_patch}; give a multiple."
            )
        self._check_conditions(latents, wanted, given)
        steps = timesteps(steps, latents)
        return self.member.call(self, module, latents, steps, **given)

    def _check_conditions(self, latents: Tensor, wanted: list[Input], given: dict[str, Any]) -> None:
        text: Any = None
        for one in wanted:
            value = given.get(one.name)
            if one.kind == "mask":
                if value is not None and (
                    not isinstance(value, Tensor)
                    or value.ndim != 2
                    or (text is not None and value.shape != text.shape[:2])
                ):
                    raise DataError(
                        f"{one.name} does not fit the text: one number for each of its tokens, 1 for words, 0 for padding."
                    )
                continue
            if one.kind == "latents":
                self._check_joined(one, value, latents)
                continue
            axes, width = (2 if one.kind == "pooled" else 3), int(self.config[one.width])
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            if (
                not isinstance(value, Tensor)
                or value.ndim != axes
                or (len(value), value.shape[-1]) != (len(latents), width)
            ):
                expected = f"({len(latents)}, {width})" if axes == 2 else f"({len(latents)}, tokens, {width})"
                raise DataError(
                    f"{one.name} are {shape}; '{self.name}' takes {expected}, as its text encoder makes them "
                    "(pipeline.encode_prompt)."
                )
            if one.length and value.shape[1] != int(self.config[one.length]):
                raise DataError(
                    f"{one.name} have {value.shape[1]} words; the positions of '{self.name}' are made for "
                    f"{self.config[one.length]}. Pad or cut them to these."
                )
            text = value if one.kind == "text" else text

    def _check_joined(self, one: Input, value: Any, latents: Tensor) -> None:
        more = int(self.config["in_channels"]) - self.latent_channels
        expected = (latents.shape[0], more, *latents.shape[2:])
        if not isinstance(value, Tensor) or tuple(value.shape) != expected:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise DataError(f"{one.name} are {shape}; '{self.name}' takes {expected}, beside the noisy latents.")

    def tiny_batch(self) -> tuple[Tensor, ...]:
        """Random latents, time steps and conditions, a batch of two; the last word of the first text is padding."""
        return self._batch(2, 5)

    def example_batch(self, size: int = 2, classify: bool = False) -> tuple[Tensor, ...]:
        """As `tiny_batch`, with as many words as the pipeline hands over."""
        return self._batch(size, self.member.text_tokens)

    def _batch(self, size: int, words: int) -> tuple[Tensor, ...]:
        height, width = (n // self.member.ratio for n in self._pixels)
        shape = [size, self.latent_channels, height, width]
        if self.member.frames:
            frame_patch, _ = self.patches
            frames = (self._frames - 1) // self.member.frame_ratio + 1
            shape.insert(2, frames + -frames % frame_patch)
        found = [torch.randn(shape), torch.tensor([3.0, 700.0]).repeat(size)[:size]]
        for one in self.given():
            count = int(self.config[one.length]) if one.length else words
            if one.kind == "mask":
                mask = torch.ones(size, count)
                mask[0, -1] = 0
                found.append(mask)
            elif one.kind == "latents":
                found.append(torch.randn(size, int(self.config["in_channels"]) - self.latent_channels, *shape[2:]))
            else:
                length = () if one.kind == "pooled" else (count,)
                found.append(torch.randn(size, *length, int(self.config[one.width])))
        return tuple(found)


def of_heads(point: AttentionPoint) -> None:
    """Heads and their width, as the attention itself says."""
    attention: Any = point.module
    heads = int(attention.heads)
    inner = attention.to_q.out_features if hasattr(attention, "to_q") else int(attention.inner_dim)
    point.num_heads, point.head_dim = heads, inner // heads
