"""ConES: the embedding of a concept is searched by the task's own loss, and no text encoder takes part.

Idea: what a text encoder would say of a class or a prompt is a vector (or a few) in the space that a frozen model reads; search
that vector directly. It starts as what the encoder says of a name or a coarse prompt, which is then not needed any more.
Points: the classes of a model of two towers (head `concepts`, `zoo.heads.concepts`), or a `condition` of a diffusion model: the
rows of a transformer's class embedding (verb `replace`), or the text that a transformer or UNet reads (verb `before`).

    classes     logits(x)_k = exp(a) <I(x) / |I(x)|, E_k / |E_k|> + b          E_k = t_k + S_k,  S (K, n, d)
                n vectors of a class: log 1/n sum_j exp(exp(a) <I(x) / |I(x)|, E_kj / |E_kj|>) + b
    rows        class(y) = row_y + S_y for the labels y that are searched          S (labels, d), one for all blocks
    text        c = c_0 + S where the text embeddings that come in are c_0          S (contexts, tokens, d_text)

t_k: the mean of the normalised texts of the templates, or with `each` one vector for each of them (n = their number); row_y: of
the frozen table (the row "no class" stays); c_0: the embeddings of the coarse prompt, as the training data bring them. S = 0, so
the start is the pretrained function, to the bit: zero-shot classification, or sampling by the known class or the coarse prompt.
The model's scale a and bias b are frozen.

Text: the contexts c_0 (at most `contexts` different ones) are read from the first `num_batches` training batches and saved with
S. What comes in and is none of them, within 1 % of its length, passes as it is: above all the empty prompt, so guidance works.
`model.adapters[name].embeddings()` are the searched ones, for pipelines of another precision or without the adapter.

Then another method: `model.set_active("cones", "lora", train="lora")` keeps E and trains a LoRA in the image tower or the
transformer; without `train` both are trained.

Defaults: AdamW at 1e-3 without weight decay for classes; for diffusion the authors' idea is that of textual inversion, for which
5e-3 over 500 steps is proposed here. Counts: K n d (CLIP ViT-B, 100 classes: 51,200); one class of DiT-XL/2: 1,152; a context of
77 x 768: 59,136, or 768 for each of `tokens`.
Measured (benchmarks/cones.py: clip-micro, CIFAR-10, 50 epochs, our default rate, the epoch chosen on k other images of a class,
2,000 test images, mean of three seeds): before the first step 25.1 %, as zero-shot; then 27.4, 32.6 and 43.8 % with 1, 4 and 16
images of each class, and with a LoRA beside it 45.2 % (16). From random directions 22.2, 31.5 and 42.6 %. The linear probe, the
same classifier with lengths and a bias, is better here: 29.0, 37.5 and 46.2 %. Flowers17: 10.3 % before; 27.7, 46.4 and 62.6 %;
from random directions 27.8, 47.2 and 62.0; the probe 30.0, 50.5 and 65.8: the start from texts helps where few examples are given
and the texts know the classes, and not otherwise. Underscores in names are spaces, as everywhere but in `zero_shot`.
Source: Yi et al., "ConES: Concept Embedding Search for Parameter Efficient Tuning Large Vision Language Models", 2023
(arXiv 2305.18993). There is no code of the authors; what the paper's abstract leaves open is chosen here.

Deviations and choices: S is trained and saved rather than E (the gradients are the same, and S = 0 is exactly the start whatever
is averaged or restored). Several vectors of a class are joined by the mean of exponentials, so that equal ones are one. With
classes this is a cosine classifier that starts from texts; compare it with the linear probe. diffusers' DiT has a table of
classes in each block: S is added to all, which for converted checkpoints, whose tables are equal, is one row. The authors search
in detectors as well; those are not here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from multimodal.adapters.parts.concepts import Contexts, Row, Rows, entering
from zoo.adapters.base import Adapter
from zoo.adapters.parts.deciding import deciding
from zoo.errors import AttachError, ConfigError, MergeError
from zoo.heads.concepts import similarities
from zoo.points import Points
from zoo.points.merger import Merger
from zoo.registry import register_adapter

if TYPE_CHECKING:
    from zoo.host import Host
    from zoo.tasks.base import Task


@register_adapter("cones")
@dataclass
class ConES(Adapter):
    """Concept embedding search.

    Args:
        templates: of classes: texts with `{}` for the name, whose mean is the start.
        each: of classes: a vector for each template instead.
        init: of classes: "text", or "random" directions, for comparison.
        labels: of a class-conditional transformer: which classes are searched; () is all of them.
        tokens: of a text: places that are searched; () is the whole context.
        contexts: how many different texts the data may have.
        num_batches: of the data in which these are looked for.
    """

    templates: str | tuple[str, ...] = ("a photo of a {}.",)
    each: bool = False
    init: Literal["text", "random"] = "text"
    labels: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    contexts: int = 16
    num_batches: int = 8

    default_lr = 1e-3
    default_weight_decay = 0.0
    head_kind = "concepts"
    paper = "Yi et al. 2023"
    looks_back = True
    taxonomy = "additive"
    trial_families = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.templates = (self.templates,) if isinstance(self.templates, str) else tuple(self.templates)
        self.check(bool(self.templates), "there are no templates; expected one or more.")
        for text in self.templates:
            self.check("{}" in text, f"the template '{text}' has no place {{}} for the name of a class.")
        for name in ("labels", "tokens"):
            values = getattr(self, name)
            setattr(self, name, tuple(values))
            self.check(len(set(values)) == len(values), f"{name} names one of {values} twice.")
            self.check(all(v >= 0 for v in values), f"{name} is {values}; expected numbers from 0.")
        for name in ("contexts", "num_batches"):
            self.check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; expected 1 or more.")
        self._form = ""  # "classes", "rows" or "text"

    # -- where ------------------------------------------------------------------------------------------------------

    def attach(self, points: Points) -> None:
        """The rows of a class embedding, the text of a diffusion model, or the classes of the model's head."""
        conditions = [p for p in points if p.kind == "condition"]
        rows = [p for p in conditions if p.role == "class" and hasattr(p.module, "num_classes")]
        text = [p for p in conditions if p.role == "text"]
        if rows:
            self._form = "rows"
            self._attach_rows(points, rows)
        elif text:
            self._form = "text"
            self._attach_text(text[0])
        else:
            self._form = "classes"
            self.check(
                not (self.labels or self.tokens), "labels and tokens are of diffusion transformers, not of classes."
            )
            what = "the model no classes" if "text" in points.gives else "no text tower beside its images"
            if "text" not in points.gives or not ((self.plan or {}).get("classes") or points.num_classes):
                raise AttachError(
                    "'cones' searches the embeddings of classes, or those that condition a diffusion model: "
                    f"{points.backbone} has no such condition, and {what}. Load a CLIP with num_classes= and data that names its "
                    "classes, or with classes=[...]."
                )

    def _attach_rows(self, points: Points, rows: list[Any]) -> None:
        count = int(rows[0].module.num_classes)
        wrong = [label for label in self.labels if label >= count]
        self.check(
            not wrong, f"label {wrong[:1]} is outside the {count} classes (0..{count - 1}) of {points.backbone}."
        )
        shared = points.share("concept", Rows(self.labels or tuple(range(count)), count + 1, rows[0].dim_out))
        for point in rows:
            point.replace(Row(shared))

    def _attach_text(self, point: Any) -> None:
        if self.plan is None:
            return  # a calibration reads the contexts
        plan = self.plan
        try:
            count, length = int(plan["contexts"]), int(plan["length"])
            ok = 0 < count <= 4096 and 0 < length <= 65536
        except (KeyError, TypeError, ValueError):
            ok = False
        self.check(ok, f"its plan is {plan!r:.80}; expected the numbers of contexts and of their tokens.")
        point.before(Contexts(count, length, point.dim_in, self.tokens))

    @property
    def stateless(self) -> bool:  # type: ignore[override]
        """Classes are behind the head; a text is attached when its contexts are known."""
        return self._form == "classes" or (self._form == "text" and self.plan is None)

    # -- classes ----------------------------------------------------------------------------------------------------

    def init_head(self, head: Any) -> None:
        """What the head reads, and S for its classes."""
        known = (self.plan or {}).get("classes", head.out_features)
        self.check(
            known == head.out_features,
            f"its concepts are those of {known} classes, and the head has {head.out_features}: add a fresh one for others.",
        )
        head.prepare(self.templates, self.each, self.init == "random")
        self.plan = {"classes": head.out_features}
        if "shift" not in self._parameters:
            self.shift = nn.Parameter(torch.zeros_like(head.text))

    @property
    def behind_head(self) -> bool:
        """Whether it changes logits: of classes."""
        return self._form == "classes"

    @property
    def searched(self) -> bool:
        """Whether the concepts of classes have left their texts."""
        shift = self._parameters.get("shift")
        return shift is not None and not shift.is_meta and bool(shift.detach().any())

    def logits(self, logits: Tensor, outputs: Mapping[str, Any]) -> Tensor:
        """The head's logits (B, K), by E instead of t."""
        if outputs.get("text") is None or outputs["text"].shape != self.shift.shape:
            raise ConfigError(
                "'cones' moves the concepts of its own head, and another one is in use. Make 'cones' the last of the active "
                "adapters that has a head (model.set_active)."
            )
        pooled, text, scale = (outputs[name] for name in ("pooled", "text", "scale"))
        return logits + (similarities(pooled, text + self.shift, scale) - similarities(pooled, text, scale))

    # -- text -------------------------------------------------------------------------------------------------------

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]
        """A text: its contexts are read from the data."""
        return self._form == "text"

    def calibrate(self, model: Host, batches: Iterable[Any], task: Task | None = None) -> None:
        """Read the contexts of the first batches.

        Raises:
            ConfigError: more different contexts than `contexts`, or tokens beyond their length.
            DataError: no batch. The model is as it was, then.
        """
        point: Any = next(p for p in model.points if p.kind == "condition" and p.role == "text")
        known: list[Tensor] = []
        for text in entering(model, point, itertools.islice(batches, self.num_batches), task):
            if not any(text.shape == other.shape and torch.equal(text, other) for other in known):
                known.append(text)
        lengths = sorted({len(text) for text in known})
        self.check(len(lengths) == 1, f"the texts of the data have {lengths} tokens; expected one length, padded.")
        self.check(
            len(known) <= self.contexts,
            f"the data have {len(known)} different texts or more, and it searches {self.contexts}: give all items of a "
            "concept the embeddings of one coarse prompt, or say contexts=.",
        )
        length = lengths[0]
        self.check(all(t < length for t in self.tokens), f"tokens are {self.tokens}, and a context has {length}.")
        with deciding(self):
            self.plan = {"contexts": len(known), "length": length}
            model.reattach(self.name)
        contexts = self.module_at(point)
        contexts.known.copy_(torch.stack(known))

    def embeddings(self) -> Tensor:
        """The searched text embeddings (contexts, L, d).

        Raises:
            ConfigError: it searches no text, or has not seen any data.
        """
        found = next((m for m in self.modules() if isinstance(m, Contexts)), None)
        if found is None:
            raise ConfigError("This 'cones' holds no text embeddings: it searches classes, or was not trained yet.")
        return found.searched().detach()

    # -- folding ----------------------------------------------------------------------------------------------------

    def merge(self, merger: Merger) -> None:
        """Rows: row_y <- row_y + S_y in the table of every block."""
        if self._form != "rows":
            what = "the library's module has no place for classes" if self._form == "classes" else "a text is no weight"
            raise MergeError(
                f"'cones' cannot be merged here: {what}. Save the adapter with model.save_adapter(folder)."
            )
        for point in merger.points.select(kind="condition", role="class"):
            rows: Rows = self.module_at("concept")
            merger.add_rows(point, (rows.place >= 0).nonzero().flatten(), rows.shift[rows.place[rows.place >= 0]])
