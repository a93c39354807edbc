"""LLaMA-Adapter V2: gated prompts in late layers, a bias and a scale everywhere, and the image as prompts of the first layer.

Idea: a frozen language network learns to follow instructions by little, and to speak of images by other little parts, which are
trained by other data and stand at other layers, so that the two do not disturb each other.
Points: `attention` (verb `gate`), `linear` (q, k, v, o, gate, up, down), `norm`.

    o = softmax(q K^T) V + tanh(g) softmax(q K_P^T) V_P        K_P = W_k P, V_P = W_v P; two softmaxes, no place for P
    y = s * (W x + b)                                          s (o,), b (o,), at every projection; K_P and V_P have them, too

P (T, d) is learned in each of the last `layers` blocks. In the first block P is the image: T queries that have read the tokens of
a frozen eye through some blocks of their own (`multimodal.adapters.parts.visual_prompt`). g, one for each head, s = 1, b = 0 and
the scales (and shifts) of the norms are trained; g = 0, so the start is the pretrained function, to the bit, with an image, too.

The eye's tokens are given with the call: `model(ids, ..., context={"image": tokens})`, (B, N, eye_dim), from
`eye_tokens(clip, images)`; a text without an image gives none. Of a language model with eyes of its own the language blocks alone
are adapted: what these eyes see stands in its text, and `fusion="none"` leaves out a second eye. With `disjoint` a training step
on images of the eye trains the visual part and its gate, one without them everything else: gradients of the others are dropped,
so neither momentum nor decay moves them.

`form` chooses what is tuned where the settings say nothing:

| form    | b                       | s         | norms     | prompts of images                                       |
| ------- | ----------------------- | --------- | --------- | ------------------------------------------------------- |
| `paper` | all seven               | of output | all       | `early`: gated in the first block                       |
| `7b`    | q, o, gate, up, down    | none      | all       | `late`: added to P of all late blocks, as released      |
| `65b`   | all seven               | of input: `W (s * x) + b` | in blocks | `none`: no image, as released              |

Defaults: T = 10, all blocks but the first (31 of LLaMA-7B); eye of 768 (CLIP ViT-L/14), visual blocks 8 of width 768, 16 heads.
P and q ~ N(0, 1), g = 0. Counts: LLaMA-7B, b and s 2,719,744 (0.040 %), norms 266,240, P 1,269,760, visual part 60,460,800; form
`7b` b 1,097,728; LLaMA-65B, form `65b` without P 13,803,520.
Source: Gao et al., "LLaMA-Adapter V2", 2023 (OpenGVLab/LLaMA-Adapter); of the prompts: Zhang et al., "LLaMA-Adapter", 2023.
Deviations: the paper's visual prompts are 20, its code's 10. Their 7B code also keeps gates in blocks without prompts, which
nothing trains (1,024 instead of 992). Their two phases train, one after the other, {visual part, P, g} and {norms, b}: `groups()`
names such parts for `zoo.Phase(trained=...)`. Norms on keys (Qwen3) are for K_P, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from multimodal.adapters.parts.gated_prompt import GatedPrompt
from multimodal.adapters.parts.tuned_linear import TUNED
from multimodal.adapters.parts.visual_prompt import VisualPrompt
from zoo import Adapter, Points, register_adapter
from zoo.errors import AttachError
from zoo.host import Host
from zoo.points import AttentionPoint

__all__ = ["LlamaAdapterV2", "eye_tokens"]

SEVEN = ("q", "k", "v", "o", "gate", "up", "down")
FORMS: dict[str, dict[str, Any]] = {
    "paper": {"biased": SEVEN, "scale": "output", "norms": "all", "fusion": "early"},
    "7b": {"biased": ("q", "o", "gate", "up", "down"), "scale": "none", "norms": "all", "fusion": "late"},
    "65b": {"biased": SEVEN, "scale": "input", "norms": "blocks", "fusion": "none"},
}


@register_adapter("llama-adapter-v2")
@dataclass
class LlamaAdapterV2(Adapter):
    """LLaMA-Adapter V2. Settings left at None are taken from `form`, see the table above.

    Args:
        form: "paper", "7b" or "65b".
        num_tokens: T. layers: how many of the last blocks have prompts; None: all but the first. 0: none.
        biased: roles of the projections that are tuned, or names. scale: "output", "input" or "none" (a bias alone).
        norms: which are trained: "all", those in "blocks", or "none".
        fusion: where images come in: "early", "late" or "none".
        eye_dim: width of the eye's tokens. visual_width, visual_depth, visual_heads: of the blocks that read them.
        disjoint: whether steps on images train the visual part alone, and the others all but it. Only of "early" fusion.
    """

    form: Literal["paper", "7b", "65b"] = "paper"
    num_tokens: int = 10
    layers: int | None = None
    biased: str | tuple[str, ...] | None = None
    scale: Literal["output", "input", "none"] | None = None
    norms: Literal["all", "blocks", "none"] | None = None
    fusion: Literal["early", "late", "none"] | None = None
    eye_dim: int = 768
    visual_width: int = 768
    visual_depth: int = 8
    visual_heads: int = 16
    disjoint: bool = True

    default_lr = 1e-3
    default_weight_decay = 0.02
    paper = "Gao et al. 2023"
    taxonomy = "hybrid"
    merges = False
    unmerged = (
        "gated prompts are a second attention, and no weight of the backbone stands for them. Keep the model as it is."
    )
    trial = {"num_tokens": 3, "fusion": "none"}
    large = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.form in FORMS, f"form is {self.form!r}; expected one of {', '.join(FORMS)}.")
        for name, value in FORMS[self.form].items():  # so that the settings that are saved are the ones in use
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name, known in (("scale", ("output", "input", "none")), ("norms", ("all", "blocks", "none"))):
            self.check(getattr(self, name) in known, f"{name} is {getattr(self, name)!r}; expected {', '.join(known)}.")
        fusions = ("early", "late", "none")
        self.check(self.fusion in fusions, f"fusion is {self.fusion!r}; expected {', '.join(fusions)}.")
        for name in ("num_tokens", "eye_dim", "visual_width", "visual_heads"):
            self.check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; expected 1 or more.")
        self.check(self.visual_depth >= 0, f"visual_depth is {self.visual_depth}; expected 0 or more.")
        self.check(
            self.visual_width % self.visual_heads == 0,
            f"visual_width {self.visual_width} is not divisible by visual_heads {self.visual_heads}.",
        )
        self.check(self.layers is None or self.layers >= 0, f"layers is {self.layers}; expected 0 or more, or None.")
        self.check(self.fusion != "late" or self.layers != 0, "late fusion adds images to prompts; layers is 0.")

    def attach(self, points: Points) -> None:
        """Biases and scales, norms, the prompts of late blocks and of the image."""
        points = points.by_sample()
        attentions = self._attentions(points)
        late = attentions[1:] if self.layers is None else attentions[len(attentions) - self.layers :]
        self.check(
            self.layers is None or self.layers <= len(attentions) - (self.fusion == "early"),
            f"layers is {self.layers} of {len(attentions)} blocks; the first one is the image's.",
        )
        tuned = self._tune(points)
        if self.norms != "none":
            for norm in points.require("norm", "llama-adapter-v2 with norms"):
                if self.norms == "all" or norm.block is not None:
                    norm.train(*(n for n in ("weight", "bias") if norm.module._parameters.get(n) is not None))
        made, visual = None, None
        if self.fusion != "none":
            image = points.context("image", required=False, example=self._example)
            size = (self.num_tokens, self.eye_dim, self.visual_width, self.visual_depth, self.visual_heads)
            visual = VisualPrompt(*size, attentions[0].dim_in)
            made = points.generate("visual", visual, image)
        if self.fusion == "early":
            attentions[0].gate(self._prompt(points, attentions[0], tuned, 0, made, visual))
        for point in late:
            seen = (made, visual) if self.fusion == "late" else (None, None)
            point.gate(self._prompt(points, point, tuned, self.num_tokens, *seen))

    def _example(self, count: int) -> Tensor:
        """Five tokens for each of `count` images, always the same ones."""
        angle = torch.arange(count * 5 * self.eye_dim, dtype=torch.float32)
        return angle.sin().view(count, 5, self.eye_dim)

    def _attentions(self, points: Points) -> list[AttentionPoint]:
        found: list[Any] = points.require("attention", "llama-adapter-v2")
        return [p for p in found if p.role != "cross"]

    def _tune(self, points: Points) -> dict[str, nn.Module]:
        """The bias and scale of every chosen projection, by its name."""
        known = [r for r in SEVEN if r in points.roles("linear")]
        wanted: Any = self.biased
        chosen = wanted  # roles that only some backbones have (gate) are left out where they are not
        if not isinstance(wanted, str) and set(wanted) <= set(SEVEN):
            chosen = [role for role in known if role in wanted]
        found: dict[str, nn.Module] = {}
        for point in points.linears(chosen, tuple(known)):
            found[point.name] = module = TUNED[str(self.scale)](point.dim_in, point.dim_out)
            {"output": point.rescale, "input": point.reparametrize, "none": point.add}[str(self.scale)](module)
        return found

    def _prompt(
        self, points: Points, point: AttentionPoint, tuned: dict[str, nn.Module], count: int, made: Any, visual: Any
    ) -> GatedPrompt:
        prefix = point.name.rpartition(".")[0]
        named: dict[str, Any] = {p.name: p for p in points}
        k, v = named.get(f"{prefix}.k"), named.get(f"{prefix}.v")
        if k is None or v is None:
            raise AttachError(
                f"'llama-adapter-v2' makes keys and values of prompts by the projections of the attention, and '{prefix}' has "
                "none of its own for them. Choose other layers."
            )
        norm = named.get(f"{prefix}.k_norm")
        own = (tuned.get(k.name), tuned.get(v.name))
        return GatedPrompt(point, k, v, own, None if norm is None else norm.module, count, made, visual)

    def groups(self) -> dict[str, list[str]]:
        """Names of parameters, as `self.named_parameters()` has them: "vision" (visual part and its gate), "prompts", "tuned"."""
        found: dict[str, list[str]] = {"vision": [], "prompts": [], "tuned": []}
        gated = {name for name, module in self.named_modules() if isinstance(module, GatedPrompt)}
        for name, _ in self.named_parameters():
            owner = name.rpartition(".")[0]
            if name.startswith("visual."):
                found["vision"].append(name)
            elif owner in gated:
                early = self.get_submodule(owner).prompt is None
                found["vision" if early else "prompts"].append(name)
            else:
                found["tuned"].append(name)
        return found

    def after_backward(self, model: Host, step: int) -> None:
        """Drop the gradients of the group that is not of this step's data."""
        if self.fusion != "early" or not self.disjoint:
            return
        named, groups = dict(self.named_parameters()), self.groups()
        if any(named[n].grad is not None for n in groups["vision"] if n.startswith("visual.")):
            for name in (*groups["prompts"], *groups["tuned"]):
                named[name].grad = None
        else:
            for name in groups["vision"]:  # the gate of a text alone
                named[name].grad = None


@torch.no_grad()
def eye_tokens(clip: Any, images: Tensor) -> Tensor:
    """All tokens (B, N, d) of a CLIP's image tower, normed and projected into its common space; images as it takes them.

    Raises:
        AttachError: a model that has no such tower.
    """
    if "tokens" not in clip.family.gives or not hasattr(clip.backbone, "visual"):
        raise AttachError(f"'{clip.backbone_name}' is no CLIP; the eye is one: zoo.load('clip-vit-l14').")
    training = clip.training
    try:
        tokens: Tensor = clip.eval().outputs(images, want=("tokens",))["tokens"]
    finally:
        clip.train(training)
    project = clip.backbone.visual.proj
    return tokens if project is None else tokens @ project
