"""Language models with eyes in training: what is kept for backward, half precision, saving, compiling."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import zoo

pytest.importorskip("transformers")

from vlm_models import TINY, tiny

FEW = ("qwen3-vl-2b", "smolvlm-256m", "llava-1.5-7b")  # one of each kind of tower


def adapted(name: str, **more: object) -> zoo.Model:
    model = tiny(name, zoo.adapter("lora", targets="all-linear", rank=2), **more)
    torch.manual_seed(1)
    for parameter in model.adapters["lora"].parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def batch_of(model: zoo.Model) -> tuple[Tensor, ...]:
    torch.manual_seed(3)
    return model.family.tiny_batch()


@pytest.mark.parametrize("name", FEW)
def test_gradients_are_the_same_whatever_is_kept(name: str) -> None:
    found, kept = {}, {}
    for memory in ("off", "default", "low", "min"):
        model = adapted(name, memory=memory).train()
        batch = batch_of(model)
        loss = model.family.loss(model(*batch), batch[2])  # type: ignore[attr-defined]
        loss.backward()
        found[memory] = torch.cat([p.grad.flatten() for p in model.adapters["lora"].parameters() if p.grad is not None])
        kept[memory] = model.saved_bytes(*batch)
    for memory in ("default", "low", "min"):
        torch.testing.assert_close(found[memory], found["off"], rtol=1e-4, atol=1e-5)
    assert kept["min"] < kept["low"] < kept["off"]


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """The network in half precision, adapters in float32: finite gradients, near those of the whole."""
    model, exact = adapted(name, dtype=dtype).train(), adapted(name).train()
    batch = batch_of(model)
    losses = []
    for each in (model, exact):
        loss = each.family.loss(each(*batch), batch[2])  # type: ignore[attr-defined]
        loss.backward()
        losses.append(loss.detach())
    assert abs(losses[0] - losses[1]) < 0.1
    gradients = [p.grad for p in model.adapters["lora"].parameters()]
    assert all(g is not None and g.dtype == torch.float32 and bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize("name", TINY)
def test_a_saved_adapter_brings_its_backbone(name: str, tmp_path: Path) -> None:
    """Sizes of both towers come back from the folder, and scores to the bit."""
    model = adapted(name)
    model.save_adapter(tmp_path / "saved")
    again = zoo.load(adapter=tmp_path / "saved", pretrained=False, seed=0).eval()
    batch = batch_of(model)
    with torch.no_grad():
        assert torch.equal(again(*batch), model(*batch))


def test_a_plain_decoder_compiles() -> None:
    """With a prefix of grouped heads and a LoRA, to the same scores."""
    own = dict(zoo.registry.family("decoder").tiny[1])  # type: ignore[attr-defined]
    model = zoo.load("qwen2-0.5b", ["prefix", "lora"], pretrained=False, seed=0, **own).eval()
    model.set_active("prefix", "lora")
    ids, mask, answer = batch_of(model)
    with torch.no_grad():
        expected = model(ids, mask, answer)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(ids, mask, answer), expected, rtol=1e-4, atol=1e-5)
