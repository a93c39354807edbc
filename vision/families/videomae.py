"""transformers' VideoMAE: pre-norm blocks on clips (B, T, C, H, W), tokens are tubes of patches (B, T/t H/p W/p, d).

    u = x + W_o Attn(LN1 x),  y = u + W_2 f(W_1 LN2 u)

Pooled is the norm of the tokens' mean (`fc_norm`), on which the library's classifier stands; or, without `use_mean_pooling`, the
first token behind the final norm. Keys have no bias. Positions are a fixed table of one size of clips. Checkpoints of pretraining
hold no `fc_norm`: it then starts as the identity (scale 1, shift 0), as the library starts it.

Source: Tong et al., "VideoMAE", NeurIPS 2022. Count without classifier: VideoMAE-B 86,227,200.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vision.families.parts.transformers_family import IMAGENET, Places, TransformersVision
from zoo.backbone import told
from zoo.errors import DataError
from zoo.families.names import check_names
from zoo.families.transformers_tables import OUTPUT_APART
from zoo.points.rows import Row
from zoo.registry import register_backbone

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
KINETICS = {"num_labels": 400}


@register_backbone
class VideoMAE(TransformersVision):
    """`videomae-b16`, `videomae-b16-k400`, or `transformers:<repository or folder>` of this type."""

    family = "videomae"
    modality, noun = "video", "clips"
    gives = ("pooled", "tokens")
    library_classes = {"videomae": ("VideoMAEConfig", "VideoMAEForVideoClassification")}
    configs = {
        "MCG-NJU/videomae-base": ("videomae", {}),
        "MCG-NJU/videomae-large": ("videomae", LARGE),
        "MCG-NJU/videomae-base-finetuned-kinetics": ("videomae", KINETICS),
        "MCG-NJU/videomae-large-finetuned-kinetics": ("videomae", {**LARGE, **KINETICS}),
    }
    aliases = {
        "videomae-b16": "transformers:MCG-NJU/videomae-base",
        "videomae-l16": "transformers:MCG-NJU/videomae-large",
        "videomae-b16-k400": "transformers:MCG-NJU/videomae-base-finetuned-kinetics",
        "videomae-l16-k400": "transformers:MCG-NJU/videomae-large-finetuned-kinetics",
    }
    started = ("fc_norm.*",)
    left_out = ("decoder.*", "encoder_to_decoder.*", "mask_token", "position_embeddings", "*.layernorm.*")
    layout = ("videomae.encoder.layer.0.attention.attention.query",)
    places = {
        "videomae": Places(
            body="videomae",
            blocks="encoder.layer",
            patch="embeddings.patch_embeddings.projection",
            behind=(("norm", "layernorm"),),
        )
    }
    preprocessing = {"videomae": {**IMAGENET, "crop_mode": "center", "crop_pct": 1.0, "interpolation": "bilinear"}}
    block_table = (Row("tokens", "tokens", "tokens", ""), *OUTPUT_APART)
    elementwise = ("intermediate.intermediate_act_fn",)
    tiny = (
        "videomae-b16",
        {
            "image_size": 16,
            "patch_size": 8,
            "num_frames": 4,
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "intermediate_size": 96,
        },
    )

    @classmethod
    def half(cls, block: Any, role: str, x: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """`x + attention(LN1 x)`, or `x + MLP(LN2 x)`."""
        if role == "attn":
            return block.attention(block.layernorm_before(x), **kwargs) + x  # type: ignore[no-any-return]
        return block.output(block.intermediate(block.layernorm_after(x)), x)  # type: ignore[no-any-return]

    @property
    def num_prefix(self) -> int:
        """None."""
        return 0

    def fold_shift(self, module: nn.Module, point: Any, shift: Tensor) -> bool:
        """A shift of all keys changes no attention."""
        return bool(point.role == "k")

    @property
    def resizes(self) -> bool:
        """Positions are of one size of clips."""
        return False

    @property
    def averaged(self) -> bool:
        """All tokens, but where the first one alone is read."""
        return self.module.fc_norm is not None

    def points(self) -> list[Any]:
        """Those of every vision transformer, and the norm of the mean."""
        return [*super().points(), *self.norm_at("fc_norm", "fc_norm")]

    def attention_of(self, block: Any) -> Any:
        """The module with the projections of queries, keys and values."""
        return block.attention.attention

    def norm_of(self, block: Any) -> nn.Module:
        """In front of the attention."""
        return block.layernorm_before  # type: ignore[no-any-return]

    def look(self, module: nn.Module, images: Tensor) -> Any:
        """What the library's network answers to clips (B, T, C, H, W).

        Raises:
            DataError: clips of another shape.
        """
        config = self.config
        wanted = (config.num_frames, config.num_channels, *self.image)
        if images.ndim != 5 or tuple(images.shape[1:]) != wanted:
            raise DataError(
                f"clips of shape {tuple(images.shape)}; expected (B, {', '.join(map(str, wanted))}): frames, channels, height, "
                "width. model.preprocess() makes one out of a sequence of images."
            )
        return module(images)

    def pool(self, output: Any) -> Tensor:
        """The norm of the tokens' mean, or the first token."""
        norm: Any = self.module.fc_norm
        tokens = output.last_hidden_state
        return tokens[:, 0] if norm is None else norm(tokens.mean(1))  # type: ignore[no-any-return]

    def outputs(self, *inputs: Tensor, want: Sequence[str] = ("pooled",), **kwargs: Any) -> dict[str, Any]:
        """Tokens as the last block (or the final norm) leaves them, by time, then row by row."""
        self.check_wanted(want)
        check_names(self.name, None, kwargs)
        output = self.look(self.body, *inputs)
        everything = {"pooled": self.pool(output), "tokens": output.last_hidden_state}
        return {name: everything[name] for name in want}

    def grid(self) -> tuple[int, ...]:
        """Tubelets along time, height and width."""
        return (int(self.config.num_frames) // int(self.config.tubelet_size), *super().grid())

    def tiny_batch(self) -> tuple[Tensor, ...]:
        """Two random clips."""
        config = self.config
        return (torch.randn(2, config.num_frames, config.num_channels, *self.image),)

    def preprocess(self, train: bool, **options: Any) -> Callable[[Any], Any]:
        """A sequence of PIL images -> (T, C, H, W): frames at even distances, each as an image is prepared."""
        frame, count = super().preprocess(train, **options), int(self.config.num_frames)

        def clip(frames: Sequence[Any]) -> Tensor:
            if not isinstance(frames, Sequence) or not len(frames):
                raise DataError(f"a clip is a sequence of PIL images, not {type(frames).__name__}.")
            at = torch.linspace(0, len(frames) - 1, count).round().long().tolist()
            state, found = torch.get_rng_state(), []
            for i in at:
                torch.set_rng_state(state)  # what is cut out and mirrored is the same in every frame
                found.append(frame(frames[i]))
            return torch.stack(found)

        return clip

    def usage(self, num_classes: int) -> tuple[list[str], list[str]]:
        """As `Backbone.usage`, from a folder of frames."""
        lines = ['clip = model.preprocess()([Image.open(p) for p in sorted(Path("frames").iterdir())])']
        return ["from pathlib import Path", "from PIL import Image"], [*lines, told("clip", self, num_classes)]

    def hub_task(self, num_classes: int) -> str | None:
        """The Hub's word for it."""
        return "video-classification" if num_classes else None

    def licence(self) -> str | None:
        """Licence of the weights; None for random ones, or where none is known."""
        return "cc-by-nc-4.0" if self.pretrained and self.source in self.configs else None
