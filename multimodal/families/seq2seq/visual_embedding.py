"""The visual embedding of VL-T5 and VL-BART: region (or grid) features and boxes to tokens of the encoder.

For token n of image i, features f_n (feat_dim,), box b_n = (x1, y1, x2, y2) in [0, 1]:

    e_n = LN(W_f f_n + b_f) + LN(W_p [b_n, a_n] + b_p) + E_img[i] + E_tok[V - 1 - o_n]            (d,)

W_f (d, feat_dim), W_p (d, 5), E_img (n_images, d), E_tok (V, d) the word embedding, read from its end: o_n = n counts the
tokens of one image, so that object n has the embedding of the word `<vis_extra_id_n>`. LN is the network's own (`norm`): the
RMS norm of T5, without a bias, or the LayerNorm of BART.

`a_n = (y2 - x2) (y1 - x1)` is called area and is none: the authors' code takes boxes to be (x1, x2, y1, y2). The published
weights were trained with it, so it is kept.

`norms` says where LN stands: "individual" as above; "sum", one norm over the sum of all four; "none". The keys are those of the
released files: `feat_embedding.{0,1}`, `absolute_vis_pos_embedding.{0,1}`, `img_order_embedding`, `obj_order_embedding` (E_tok
once more), `layer_norm` for "sum".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.points import ConditionPoint, NormPoint, Point
from zoo.points.rows import find, make_linear

VISUAL_PARTS = (  # kind and name of a point, path in the visual embedding
    ("linear", "features", "feat_embedding.0"),
    ("norm", "features_norm", "feat_embedding.1"),
    ("linear", "boxes", "absolute_vis_pos_embedding.0"),
    ("norm", "boxes_norm", "absolute_vis_pos_embedding.1"),
    ("norm", "norm", "layer_norm"),
)

NORMS = ("individual", "sum", "none")


def area(boxes: Tensor) -> Tensor:
    """boxes (..., 4) -> (..., 1), what the authors' code computes from (x1, y1, x2, y2)."""
    return (boxes[..., 3:] - boxes[..., 2:3]) * (boxes[..., 1:2] - boxes[..., :1])


class VisualEmbedding(nn.Module):
    """Features and boxes to encoder tokens.

    Args:
        feat_dim: width of the features.
        dim: d. vocabulary: V.
        n_images: how many images a sample can have.
        norms: "individual", "sum" or "none".
        norm: builds the network's norm.
        order: whether image and object order are embedded.
    """

    def __init__(
        self,
        feat_dim: int,
        dim: int,
        vocabulary: int,
        n_images: int,
        norms: str,
        norm: Callable[[], nn.Module],
        order: bool = True,
    ) -> None:
        super().__init__()
        own = [norm] if norms == "individual" else []
        self.feat_embedding = nn.Sequential(nn.Linear(feat_dim, dim), *(n() for n in own))
        self.absolute_vis_pos_embedding = nn.Sequential(nn.Linear(5, dim), *(n() for n in own))
        if order:
            self.obj_order_embedding = nn.Embedding(vocabulary, dim)  # its weight is tied to the words'
            self.img_order_embedding = nn.Embedding(n_images, dim)
        if norms == "sum":
            self.layer_norm = norm()
        self.order, self.norms = order, norms

    def forward(
        self,
        features: Tensor,
        boxes: Tensor | None = None,
        image_ids: Tensor | None = None,
        object_ids: Tensor | None = None,
    ) -> Tensor:
        """features (B, N, feat_dim), boxes (B, N, 4) (None: zeros, for grids), ids (B, N) or (N,) -> (B, N, d).

        Without ids the N tokens belong to image 0 and are objects 0..N - 1.
        """
        if boxes is None:
            boxes = features.new_zeros(*features.shape[:-1], 4)
        places = torch.cat([boxes, area(boxes)], dim=-1)
        tokens = self.feat_embedding(features) + self.absolute_vis_pos_embedding(places)
        if self.order:
            count = features.shape[-2]
            if image_ids is None:
                image_ids = torch.zeros(count, dtype=torch.long, device=features.device)
            if object_ids is None:
                object_ids = torch.arange(count, device=features.device)
            words = self.obj_order_embedding.weight.shape[0]
            tokens = tokens + self.img_order_embedding(image_ids)
            tokens = tokens + self.obj_order_embedding(words - 1 - object_ids)
        return self.layer_norm(tokens) if self.norms == "sum" else tokens


def visual_points(encoder: nn.Module, encoder_path: str, config: Any) -> list[Point]:
    """Points of the visual embedding of an encoder, if it has one."""
    embedding = find(encoder, "visual_embedding")
    if embedding is None:
        return []
    path, dim = f"{encoder_path}.visual_embedding", config.d_model
    found: list[Point] = []
    for kind, name, inner in VISUAL_PARTS:
        part = find(embedding, inner)
        if part is None:
            continue
        place: dict[str, Any] = {"path": f"{path}.{inner}", "module": part, "tower": "encoder"}
        place["name"] = f"encoder.visual.{name}"
        if kind == "norm":
            found.append(NormPoint(role="norm", dim_in=dim, dim_out=dim, **place))
        elif (linear := make_linear(part, None, "", 0, {"role": "visual", **place})) is not None:
            found.append(linear)
    place = {"name": "encoder.visual", "role": "condition", "path": path, "tower": "encoder"}
    return [*found, ConditionPoint(module=embedding, dim_in=config.feat_dim, dim_out=dim, **place)]
