"""The text head: images are compared with texts of the class names, which the model's own text tower encodes.

    logits(x) = exp(a) <I(x) / |I(x)|, t_k / |t_k|> + b        t_k = T(p(k)): text of class k;  a, b: the model's scale and bias

It is a zero-shot classifier that stays alive: gradients flow through the frozen text tower into whatever is attached there.
The texts are encoded once in each forward pass, whatever the batch, and in evaluation once, until a parameter, a setting of an
adapter in use or the precision changes. The head has no parameters; it is saved as the names of the classes.

A causal tower that reads a text at its end never sees what fills the context behind it, so the texts run without it (`cut`): the
same numbers up to rounding, with 16 vectors on ViT-B/32 for 0.23 of the time and 0.14 of the bytes of a plain pass over whole
contexts (`benchmarks/class_texts.py`). Adapters say that they keep it so (`Adapter.looks_back`).

A template holds `{}` for the name of the class, and `<*>` wherever a vector of an adapter's stands instead of a word. Ids of
these places are negative: -1 - m is vector m, counted through in the order of the template (and, if `specific`, class by class).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError, DataError
from zoo.heads.base import Head, register_head

if TYPE_CHECKING:
    from zoo.host import Host

__all__ = ["SLOT", "TextHead", "check_seen", "check_slots", "class_ids", "cut"]

SLOT = "<*>"
_FILLERS = ("x", "z", "q", "j", "*", "~", "@", "%")  # one token each, to be replaced by vectors


@register_head("text")
class TextHead(Head):
    """Logits by similarity with the class texts. `template` and `specific` are set by the adapter that stands in the words."""

    needs: ClassVar[tuple[str, ...]] = ("pooled", "text", "scale")
    reads_names = True
    kept_texts: ClassVar[bool] = False  # read once, whoever is in use then

    def __init__(self, in_features: int, out_features: int, **place: Any) -> None:
        super().__init__(in_features, out_features, **place)
        global _untraced
        if _untraced is class_ids:  # here, since it loads torch's compiler: a second that only texts should cost
            _untraced = torch.compiler.disable(class_ids)
        self.template, self.specific = "a photo of a {}.", False
        self._ids: Tensor | None = None
        self._length = 0  # columns of the ids up to the last end of a text
        self._written: tuple[Any, ...] = ()  # what the ids were made of
        # evaluation: the state of all that the texts depend on, its tensors, and the texts' outputs
        self._kept: tuple[Any, list[Tensor], dict[str, Any]] | None = None

    def forward(self, outputs: Mapping[str, Any], targets: Any = None) -> Tensor:
        """pooled (B, d), text (K, d), scale (2,) -> (B, K)."""
        pooled, scale = outputs["pooled"], outputs["scale"]
        wide = torch.promote_types(pooled.dtype, torch.float32)
        weight = scale[0] * F.normalize(outputs["text"].to(wide), dim=-1)
        bias = scale[1].to(pooled.dtype).expand(len(weight))
        return F.linear(F.normalize(pooled, dim=-1), weight.to(pooled.dtype), bias)

    def more(self, model: Host) -> dict[str, Any]:
        """ "text" (K, d) and "scale" of the classes.

        Raises:
            ConfigError: the names of the classes are not known, or too long for the model with this template.
        """
        ids = self.cut(model)
        keeps = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or model.wanted)
        tensors = _tensors(model) if keeps else []
        key = _state(model, tensors)
        if key is None:
            self._kept = None
            return model.outputs(texts=ids, want=("text", "scale"))
        if self._kept is None or self._kept[0] != key:
            # Aliases are held with the tensors: nothing else can come to stand at their addresses.
            held = [*tensors, *(t.detach() for t in tensors)]
            self._kept = (key, held, model.outputs(texts=ids, want=("text", "scale")))
        return self._kept[2]

    def train(self, mode: bool = True) -> TextHead:
        """Forget what was kept for evaluation."""
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model keeps nothing: its tensors are others."""
        return {**self.__dict__, "_kept": None}

    def name_classes(self, classes: Sequence[str]) -> None:
        """As `Head.name_classes`; the texts are written anew."""
        super().name_classes(classes)
        self._kept = None

    def ids(self, model: Host) -> Tensor:
        """Token ids of the class texts (K, L) on the model's device."""
        check_slots(self, model)
        if self.classes is None:
            if not model.classes:
                raise ConfigError(
                    f"The head compares images with the names of its {self.out_features} classes, and they are not known. Load "
                    "the model with classes=[...], or train on data with class names (zoo.open_dataset(..., classes=[...]))."
                )
            self.name_classes(model.classes)
        assert self.classes is not None
        wanted = (self.template, self.specific, self.classes)
        if self._written != wanted:
            self._ids = _untraced(model.family, self.classes, self.template, self.specific)
            self._length = _length(model, self._ids)
            self._written = wanted
        assert self._ids is not None
        if self._ids.device != model.device:
            self._ids = self._ids.to(model.device)
        return self._ids

    def cut(self, model: Host) -> Tensor:
        """`ids` without the columns behind the last end of a text (K, L'), if nothing in use looks at them."""
        ids = self.ids(model)
        return ids[:, : self._length] if look_back(model) else ids


def look_back(model: Host) -> bool:
    """Whether no adapter in use lets a token of a causal tower depend on later ones."""
    return all(getattr(model.adapters[name], "looks_back", False) for name in model.active)


def cut(model: Host, ids: Tensor) -> Tensor:
    """Token ids (n, L) without the columns behind the last end of a text, if nothing in use looks at them."""
    return ids[:, : _length(model, ids)] if len(ids) and look_back(model) else ids


def _length(model: Host, ids: Tensor) -> int:
    """Columns that count; all of them in a family that does not say."""
    says = getattr(model.family, "text_length", None)
    return says(ids) if says else ids.shape[1]


def check_slots(head: TextHead, model: Host) -> None:
    """Raise ConfigError if an adapter in use has vectors for class texts, and this head's template no slots for them."""
    for name in model.active if SLOT not in head.template else ():
        if getattr(model.adapters[name], "in_template", False):
            others = [n for n in model.active if n != name]
            kept, advice = (others, "Leave it out") if head.kept_texts else ([*others, name], "Make it the last")
            raise ConfigError(
                f"The vectors of '{name}' stand in the texts of its own head, and the head in use ('{model.head_name}') reads "
                f"texts without them, so nothing would come of them. {advice}: "
                f"model.set_active({', '.join(map(repr, kept))})."
            )


def class_ids(family: Any, names: Sequence[str], template: str, specific: bool = False) -> Tensor:
    """Token ids (K, L) of the template with each name; slots are negative. Underscores in names are spaces.

    Raises:
        ConfigError: a text that does not fit the context, a name of which no token is left, or slots that cannot be told from
        words.
    """
    clean = [" ".join(str(name).replace("_", " ").split()) for name in names]
    slots = template.count(SLOT)
    try:
        if not slots:
            ids = family.tokenize([template.replace("{}", name) for name in clean])
            check_seen(family, names, ids, template)
            return ids  # type: ignore[no-any-return]
        for filler in _FILLERS:
            token = _token(family, filler)
            ids = family.tokenize([template.replace(SLOT, filler).replace("{}", name) for name in clean])
            here = ids == token
            if token is None or not bool((here.sum(1) == slots).all()):
                continue  # a name holds it too, or it grows together with what is beside it
            check_seen(family, names, ids, template.replace(SLOT, filler))
            number = here.long().cumsum(1) - 1
            if specific:
                number = number + torch.arange(len(ids)).unsqueeze(1) * slots
            return torch.where(here, -1 - number, ids)
    except DataError as error:
        name, why = _too_long(family, names, clean, template.replace(SLOT, _FILLERS[0]))
        what = f"{name} with its {slots} vectors" if slots else name
        less = "give it a shorter name" + (", or take fewer vectors." if slots else ".")
        raise ConfigError(f"{what} does not fit the text tower{why}; {less}") from error
    raise ConfigError(
        f"The vectors of '{template}' cannot be told from words by this tokenizer; choose another class position."
    )


def _too_long(family: Any, names: Sequence[str], clean: Sequence[str], template: str) -> tuple[str, str]:
    """The first class whose text is not taken, and why."""
    for name, text in zip(names, clean, strict=True):
        try:
            family.tokenize([template.replace("{}", text)])
        except DataError as error:
            return f"The class name '{name:.60}'", f" ({str(error).partition(':')[0].replace('text 0 has', 'it has')})"
    return "A class name", ""


def check_seen(family: Any, names: Sequence[str], ids: Tensor, template: str) -> None:
    """Raise ConfigError for a name that adds no token to its text `ids` (K, L): a blank, a character that is cleaned away."""
    bare = template.replace("{}", " ")
    if "{}" in template and not bare.strip(" "):
        bare = " ".join(_FILLERS[:1])  # nothing but the name: a text without tokens is refused by itself
    without = family.tokenize([bare])[0].to(ids.device)
    for name, row in zip(names, ids, strict=True):
        if torch.equal(row, without):
            raise ConfigError(
                f"of the class name '{name}' no token is left, so its text says nothing of the class. Give it a name of letters "
                "or digits."
            )


_untraced = class_ids  # the same, left alone by a compiler, once there is a head of texts


def _token(family: Any, filler: str) -> int | None:
    """The id of a filler that is one token wherever it stands by itself."""
    few, many = (family.tokenize(" ".join([filler] * n))[0] for n in (2, 4))
    found = [int(i) for i in few.unique() if int((few == i).sum()) == 2 and int((many == i).sum()) == 4]
    return found[0] if len(found) == 1 else None


def _tensors(model: Host) -> list[Tensor]:
    """All that the texts may depend on: trained and frozen, and what adapters keep beside their parameters."""
    used = [model.adapters[name] for name in model.active]
    return [*model.backbone.parameters(), *(t for a in used for t in (*a.parameters(), *a.buffers()))]


def _state(model: Host, tensors: list[Tensor]) -> Any:
    """State of these tensors and of the adapters in use, a block that is left out, say; None where it cannot be told."""
    if not tensors:
        return None
    try:
        versions = [(id(t), t.data_ptr(), t._version) for t in tensors]
    except RuntimeError:  # made in inference mode, or wrapped by a functional transform
        return None
    kind = tensors[0].device.type
    precision = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
    modules = [m for name in model.active for m in model.adapters[name].modules()]
    return (model.active, precision, versions, [[v for v in vars(m).values() if _plain(v)] for m in modules])


def _plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str)) or (isinstance(value, tuple) and all(map(_plain, value)))
