"""VL-T5 and VL-BART beside the library's networks and the formulas, for the tests of both."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from straightforward_seq2seq import Straight

import zoo

pytest.importorskip("transformers", reason="the extra 'multimodal' is not installed")

FAMILIES = ("vl-t5", "vl-bart")
ALL = zoo.adapter("lora", targets="q,k,v,o,up,down,visual")


def library(family: str) -> Any:
    import transformers

    return {"vl-t5": transformers.T5ForConditionalGeneration, "vl-bart": transformers.BartForConditionalGeneration}[
        family
    ]


def straight(model: Any, **more: Any) -> Straight:
    state = {k: v.detach() for k, v in model.backbone.state_dict().items()}
    return Straight(state, 4, model.family.family == "vl-t5", **more)


def twin(model: Any) -> Any:
    """The library's own network with the same weights, without visual embedding."""
    plain = library(model.family.family)(copy.deepcopy(model.backbone.config))
    unused = plain.load_state_dict(model.backbone.state_dict(), strict=False)
    assert not unused.missing_keys and all("visual_embedding" in k for k in unused.unexpected_keys)
    return plain.requires_grad_(False).eval()  # torch picks its attention kernel by whether a gradient is wanted


@torch.no_grad()
def stir(model: Any, scale: float = 0.2) -> Any:
    """Random adapter values, so that everything takes part."""
    for parameter in model.parameters_to_train().values():
        parameter.add_(torch.randn_like(parameter), alpha=scale)
    return model.eval()
