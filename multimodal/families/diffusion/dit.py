"""Class-conditional diffusion transformers: diffusers' `DiTTransformer2DModel` (DiT of Peebles and Xie).

A block with the condition c = time(t) + class(y), each block having embeddings of its own:

    a_1, b_1, g_1, a_2, b_2, g_2 = W_mod silu(c)                      W_mod (6 d, d): the modulation
    u = x + g_1 * Attn(LN(x) * (1 + b_1) + a_1)        y = u + g_2 * MLP(LN(u) * (1 + b_2) + a_2)

The norms have no parameters of their own, so there are no norm points. A sublayer's input is behind the modulation, its output
in front of the gate g. The embeddings of block 0 also condition the final projection.

Tokens are the (H / p) (W / p) patches, in which the prediction is written; a token more has no place in that grid, so there are
no tokens points.

Count: DiT-XL/2 has 749,826,464 parameters here and 675,129,632 in its authors' code, which has one pair of embeddings for
all 28 blocks and counts the 294,912 fixed position numbers: 749,826,464 = 675,129,632 - 294,912 + 27 * 2,777,472.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from multimodal.families.diffusion.family import FEED_FORWARD, DiffusersBackbone, timesteps
from zoo.errors import ConfigError, DataError
from zoo.points.rows import Row
from zoo.registry import register_backbone

WEIGHTS = Path(__file__).parents[2] / "weights"
# Works on pixels; 3,789,968 parameters
MICRO: dict[str, Any] = {
    "num_attention_heads": 5,
    "attention_head_dim": 32,
    "num_layers": 7,
    "in_channels": 3,
    "out_channels": 3,
    "sample_size": 32,
    "patch_size": 4,
    "num_embeds_ada_norm": 10,
}
XL: dict[str, Any] = {"out_channels": 8}  # the rest are the library's defaults: 16 heads of 72, 28 blocks, patches of 2


@register_backbone
class DiT(DiffusersBackbone):
    """`dit-xl2`, `dit-xl2-512`, `dit-micro`, or `diffusers:<repository or folder>` with a transformer of this class."""

    family = "dit"
    diffusers_class = "DiTTransformer2DModel"
    pipeline_class = "DiTPipeline"
    weights_folder = WEIGHTS
    aliases = {
        "dit-micro": "zoo:dit-micro",
        "dit-xl2": "diffusers:facebook/DiT-XL-2-256",
        "dit-xl2-512": "diffusers:facebook/DiT-XL-2-512",
    }
    configs = {
        "zoo:dit-micro": MICRO,
        "diffusers:facebook/DiT-XL-2-256": XL,
        "diffusers:facebook/DiT-XL-2-512": {**XL, "sample_size": 64},
    }
    licences = {
        "zoo:dit-micro": "apache-2.0",
        "diffusers:facebook/DiT-XL-2-256": "cc-by-nc-4.0",
        "diffusers:facebook/DiT-XL-2-512": "cc-by-nc-4.0",
    }
    request = "([207]).images[0]"
    schedule = ("DDIMScheduler", {"beta_schedule": "linear", "clip_sample": False})
    front = (("linear", "patch", "patch_embed", "pos_embed.proj"),)
    block_table = (
        Row("condition", "time", "condition.time", "norm1.emb.timestep_embedder"),
        Row("linear", "time", "condition.time.in", "norm1.emb.timestep_embedder.linear_1"),
        Row("linear", "time", "condition.time.out", "norm1.emb.timestep_embedder.linear_2"),
        Row("condition", "class", "condition.class", "norm1.emb.class_embedder"),
        Row("linear", "modulation", "modulation", "norm1.linear"),
        Row("linear", "q", "attn.q", "attn1.to_q"),
        Row("linear", "k", "attn.k", "attn1.to_k"),
        Row("linear", "v", "attn.v", "attn1.to_v"),
        Row("attention", "attn", "attn.product", "attn1"),
        Row("linear", "o", "attn.o", "attn1.to_out.0"),
        Row("sublayer", "attn", "attn", "attn1", entry="norm1", exit="attn1:output"),
        Row("norm", "norm", "norm2", "norm3"),
        *FEED_FORWARD,
        Row("sublayer", "mlp", "mlp", "ff", entry="ff:input", exit="ff:output", stream="norm3"),
        Row("block", "block", "", ""),
    )
    back = (
        ("linear", "modulation", "final.modulation", "proj_out_1"),
        ("linear", "final", "final", "proj_out_2"),
    )
    elementwise = ("norm1.norm", "norm3")
    tiny = ("dit-micro", {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8})

    @classmethod
    def build(cls, name: str, *, pretrained: bool, **kwargs: Any) -> nn.Module:
        """A transformer of diffusers, or the embedded `dit-micro`."""
        if name != "zoo:dit-micro" or not pretrained:
            return super().build(name, pretrained=pretrained, **kwargs)
        module = super().build(name, pretrained=False, **kwargs)
        file = WEIGHTS / "dit-micro.safetensors"
        if not file.is_file():
            raise ConfigError(
                "There are no pretrained weights of 'dit-micro' in this version. Pass pretrained=False for random ones."
            )
        module.load_state_dict({k: v.float() for k, v in load_file(file).items()})
        return module

    def hub_task(self, num_classes: int) -> str | None:
        """What the Hub calls images without a text."""
        return "unconditional-image-generation"

    def usage(self, num_classes: int) -> tuple[list[str], list[str]]:
        """As `DiffusersBackbone.usage`; a model of pixels needs no pipeline."""
        if self.latent_channels != 3:
            return super().usage(num_classes)
        lines = ["images = generate(model, [0, 1], guidance=2.0)  # of these classes, in [0, 1]"]
        return ["from multimodal.tasks.sampling import generate"], lines

    @property
    def num_classes(self) -> int:
        """Classes that can be asked for; the label `num_classes` itself is "no class", for guidance."""
        return int(self.config.num_embeds_ada_norm)

    def scheduler(self) -> Any:
        """As `DiffusersBackbone.scheduler`; what is predicted for pixels is kept inside their range."""
        made = super().scheduler()
        return type(made).from_config(made.config, clip_sample=self.latent_channels == 3)

    def run(self, module: nn.Module, *inputs: Any, **kwargs: Any) -> Tensor:
        """What the transformer answers.

        Args:
            inputs: latents (B, C, H, W), H = W, time steps (B,) or one for all, class labels (B,) int64, `num_classes` meaning
                "no class". Further keywords go to the library.

        Returns:
            (B, C or 2 C, H, W): the prediction, and as many channels of variance in models that have learned one.

        Raises:
            DataError: other channels, latents that are not square or not of whole patches, a label outside the classes.
        """
        if len(inputs) > 3:
            raise DataError(f"{len(inputs)} inputs were given; a DiT takes three: latents, timestep and class_labels.")
        latents, steps, labels = self._named(*inputs, **kwargs)
        rest = {k: v for k, v in kwargs.items() if k not in ("timestep", "class_labels")}
        return module(latents, timestep=steps, class_labels=labels, return_dict=False, **rest)[0]

    def _named(self, latents: Any, timestep: Any, class_labels: Any, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.check_latents(latents, "B C H W", self.latent_channels)
        if latents.shape[-1] != latents.shape[-2]:
            raise DataError(
                f"latents of {latents.shape[-2]} x {latents.shape[-1]} are not square, and DiT puts its patches together to a "
                "square. Cut or resize them."
            )
        labels = torch.as_tensor(class_labels, device=latents.device)
        if labels.shape != (latents.shape[0],) or labels.is_floating_point():
            raise DataError(
                f"class_labels are {tuple(labels.shape)} {labels.dtype}; expected whole numbers ({latents.shape[0]},), one for "
                f"each of the latents (the label {self.num_classes} means no class)."
            )
        # On a GPU looking would wait for it; `zoo.fit` looks at the labels before they get there.
        if labels.device.type == "cpu" and not torch.compiler.is_compiling() and len(labels):
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high > self.num_classes:
                wrong = low if low < 0 else high
                raise DataError(
                    f"class label {wrong} is outside the {self.num_classes} classes of '{self.name}' (0..{self.num_classes - 1}; "
                    f"{self.num_classes} means no class). Mend the labels, or build it with num_embeds_ada_norm={wrong + 1}."
                )
        return latents, timesteps(timestep, latents), labels

    def tiny_batch(self) -> tuple[Tensor, ...]:
        """Random latents, time steps and labels, a batch of two."""
        size, channels = int(self.config.sample_size), self.latent_channels
        return torch.randn(2, channels, size, size), torch.tensor([3, 700]), torch.tensor([0, self.num_classes - 1])
