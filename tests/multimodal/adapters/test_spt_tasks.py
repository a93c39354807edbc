"""SPT without a classification head: contrast of CLIP, generation of VL-T5; and tags of sounds on AST."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from zoo.errors import ConfigError
from zoo.table import tiny_model
from zoo.tasks.multilabel import MultiLabel


def clip() -> tuple[Any, Any, Any]:
    pytest.importorskip("open_clip", reason="the extra 'multimodal' is not installed")
    from clip_models import batch, make

    model = make()
    return model, batch(model), torch.arange(3)


def clip_loss(model: Any, inputs: Any, targets: Tensor) -> Tensor:
    image, text = (F.normalize(model.features(x) if i == 0 else model.features(texts=x), dim=-1)
                   for i, x in enumerate(inputs))  # fmt: skip
    scores = model.backbone.logit_scale.exp() * image @ text.T
    return (F.cross_entropy(scores, targets) + F.cross_entropy(scores.T, targets)) / 2


def vl_t5() -> tuple[Any, Any, Any]:
    pytest.importorskip("transformers", reason="the extra 'multimodal' is not installed")
    model, inputs = tiny_model("vl-t5")
    generator = torch.Generator().manual_seed(2)
    width = inputs[2].shape[1]
    words = torch.randint(3, model.backbone.config.vocab_size, (len(inputs[0]), width), generator=generator)
    nothing = torch.full_like(words, -100)
    nothing[:, :3] = torch.tensor([0, ord("a"), 0])
    return model, inputs, torch.stack([words, nothing], dim=1)


def vl_t5_loss(model: Any, inputs: Any, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(*inputs).flatten(0, 1), targets[:, 0].flatten())


def ast() -> tuple[Any, Any, Any]:
    pytest.importorskip("transformers", reason="the extra 'audio' is not installed")
    model, inputs = tiny_model("ast")
    return model, inputs[0], torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])


def ast_loss(model: Any, inputs: Any, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(inputs), targets)


CASES = {"contrast": (clip, clip_loss), "generate": (vl_t5, vl_t5_loss), "multilabel": (ast, ast_loss)}


@pytest.mark.parametrize("case", CASES)
def test_sensitivities_are_those_of_the_tasks_loss(case: str) -> None:
    """Squares of gradients of the loss written down here; what is chosen trains, and counts within the budget."""
    make_model, loss_of = CASES[case]
    model, inputs, targets = make_model()
    task = MultiLabel() if case == "multilabel" else None  # None: what a model without a head is for
    from vision.adapters.parts.sensitivity import candidates, sensitivity
    from zoo.tasks.resolve import resolve

    found = candidates(model.points, "lora", 2, 10, 5)
    scores, count, samples = sensitivity(model, found, [(inputs, targets)] * 2, 16, resolve(model, task))
    assert (count, samples) == (2, 2 * len(targets))
    model.eval()
    for candidate in found:
        model.in_use(*candidate.slot).requires_grad_(True)
    loss_of(model, inputs, targets).backward()
    reached = 0
    for candidate, score in zip(found, scores):
        grad = model.in_use(*candidate.slot).grad
        expected = torch.zeros_like(score) if grad is None else 2 * candidate.slice(grad).float().square()
        torch.testing.assert_close(score, expected, rtol=1e-3, atol=1e-9, msg=lambda m, k=candidate.key: f"{k}: {m}")
        reached += bool(score.any())
    assert reached > len(found) / 2
    model.backbone.requires_grad_(False)
    model.zero_grad(set_to_none=True)

    adapter = model.add_adapter(zoo.adapter("spt", budget=0.004, rank=2, dropout=0.0, drop_path=0.0))
    adapter.calibrate(model, [(inputs, targets)] * 2, task)
    report = adapter.plan["report"]
    assert 2000 < report["total"] < 6000 and report["samples"] == 2 * len(targets)
    assert model.num_parameters(trainable=True, head=False) == report["tuned"]
    before = loss_of(model, inputs, targets)
    optimizer = torch.optim.Adam(model.adapters["spt"].parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, inputs, targets).backward()
        optimizer.step()
    assert loss_of(model, inputs, targets) < before


def test_a_task_that_needs_a_head_says_so() -> None:
    pytest.importorskip("transformers", reason="the extra 'audio' is not installed")
    model = zoo.load("ast-micro", "spt", pretrained=False, num_classes=0)
    with pytest.raises(ConfigError, match="'classify' needs a head: pass num_classes="):
        model.adapters["spt"].calibrate(model, [])  # type: ignore[operator]
    with pytest.raises(ConfigError, match="'multilabel' needs a head"):
        model.adapters["spt"].calibrate(model, [], MultiLabel())  # type: ignore[operator]
