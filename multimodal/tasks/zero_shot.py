"""Zero-shot classification: class names become the weights of a classifier on the image tower.

    w_c = exp(a) * m_c / |m_c|,   m_c = 1/P sum_p T(p(c)) / |T(p(c))|       templates p, class c; a: logit scale
    logits(x) = W I(x) / |I(x)| + b                                          b: logit bias (SigLIP), else 0

With one template that is the model's own score of an image and a text, up to rounding, since texts run without what fills
their context (`zoo.heads.text`). Radford et al., "Learning Transferable Visual Models From
Natural Language Supervision", 2021: prompts of one class are averaged in the common space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError, DataError
from zoo.heads import CosineHead
from zoo.heads.text import check_seen, cut

if TYPE_CHECKING:
    from zoo.host import Host

__all__ = ["TEMPLATES", "encode_image", "encode_text", "put_zero_shot_classifier", "zero_shot_classifier"]

Template = str | Callable[[str], str]
TEMPLATES: tuple[Template, ...] = ("a photo of a {}.",)


def encode_image(model: Host, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) -> embeddings of length 1, (B, d), with the active adapters."""
    return F.normalize(_checked(model).features(images), dim=-1)


def encode_text(model: Host, texts: str | Sequence[str] | Tensor, *, truncate: bool = False) -> Tensor:
    """Texts or token ids (B, L) -> embeddings of length 1, (B, d), with the active adapters.

    Raises:
        DataError: a text with more tokens than the context (unless `truncate`, which cuts it off).
    """
    family: Any = _checked(model).family
    ids = texts if isinstance(texts, Tensor) else family.tokenize(texts, truncate)
    return F.normalize(model.features(texts=ids.to(model.device)), dim=-1)


@torch.no_grad()
def zero_shot_classifier(
    model: Host, class_names: Sequence[str], templates: Sequence[Template] = TEMPLATES, *, batch_size: int = 256
) -> CosineHead:
    """A head of the classes, for `model.set_head(head, class_names)`; its weights can be trained on.

    Args:
        class_names: in the order of the labels.
        templates: texts with `{}` for the name, or functions from a name to a text.
        batch_size: texts that are encoded at once.

    Raises:
        ConfigError: no class, no template, a template without a place for the name, or a name of which no token is left.
        DataError: a prompt that is longer than the context; it is named.
    """
    if not class_names or not templates:
        raise ConfigError("a zero-shot classifier needs the names of the classes, and a template or more.")
    for template in templates:
        if isinstance(template, str) and "{}" not in template:
            raise ConfigError(f"the template '{template}' has no place {{}} for the name of a class.")
    _checked(model)
    family: Any = model.family
    for template in templates:
        if isinstance(template, str):
            ids = family.tokenize([template.replace("{}", name) for name in class_names])
            check_seen(family, class_names, ids, template)
    texts = [t.replace("{}", name) if isinstance(t, str) else t(name) for name in class_names for t in templates]
    training = model.training
    model.eval()
    try:
        some = (family.tokenize(texts[i : i + batch_size]) for i in range(0, len(texts), batch_size))
        parts = [encode_text(model, cut(model, ids)) for ids in some]
    finally:
        model.train(training)
    means = F.normalize(torch.cat(parts).float().unflatten(0, (len(class_names), -1)).mean(dim=1), dim=-1)
    own: Any = model.backbone
    head = CosineHead(means.shape[1], len(class_names), device=means.device)
    head.weight.copy_(own.logit_scale.exp().float() * means)
    head.bias.fill_(0.0 if own.logit_bias is None else own.logit_bias.float().item())
    return head


def put_zero_shot_classifier(
    model: Host, class_names: Sequence[str], templates: Sequence[Template] = TEMPLATES
) -> CosineHead:
    """Make `zero_shot_classifier` the model's head, and the names its classes."""
    head = zero_shot_classifier(model, class_names, templates)
    model.set_head(head, [str(name) for name in class_names])
    return head


def _checked(model: Host) -> Host:
    if model.family.family != "clip":
        raise DataError(
            f"'{model.backbone_name}' has no text tower that shares a space with its images; use one of the family 'clip'."
        )
    return model
