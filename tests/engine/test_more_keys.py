"""More keys and values (`zoo.engine.attention`): the replaced attention is timm's, and no shortcut changes a result."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from vpt_models import BOTH, EVERY, images, make

import zoo
from vision.adapters import vpt

# -- the attention ------------------------------------------------------------------------------------------------


@EVERY
def test_the_attention_equals_timms(kind: str) -> None:
    """The replacement without extra keys is the library's forward; switched off, the library's forward itself runs."""
    model = make(kind, zoo.adapter("vpt", num_tokens=4))
    for block in model.family.blocks():
        attention: Any = block.attn
        site = attention.forward.__self__
        keys = list(attention.state_dict())
        model.set_active()
        settings: list[dict[str, Any]]
        if kind.startswith("swin"):
            windows = 4 if block.attn_mask is None else len(block.attn_mask)
            x = torch.randn(2 * windows, attention.window_area, block.dim, dtype=torch.double)
            settings = [{"mask": block.attn_mask}]
            site.images = 2
        else:
            x = torch.randn(2, 7, 48, dtype=torch.double)
            mask = torch.randn(7, 7, dtype=torch.double)
            settings = [{}, {"attn_mask": mask}, {"attn_mask": (mask > 0).fill_diagonal_(True)}, {"is_causal": True}]
        for fused in (True, False):
            attention.fused_attn = fused
            for setting in settings:
                expected = type(attention).forward(attention, x, **setting)
                assert torch.equal(attention(x, **setting), expected)
                torch.testing.assert_close(site.extended(x, **setting), expected, rtol=1e-10, atol=1e-10)
        model.set_active("vpt")
        assert list(attention.state_dict()) == keys


def test_masks_leave_prompts_visible() -> None:
    model = make("vit", zoo.adapter("vpt", num_tokens=4)).eval()
    block: Any = model.family.blocks()[0]
    x = torch.randn(2, 6, 48, dtype=torch.double)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    expected = block.attn(x, attn_mask=causal)
    torch.testing.assert_close(block.attn(x, is_causal=True), expected)
    torch.testing.assert_close(
        block.attn(x, attn_mask=torch.zeros(6, 6).double().masked_fill(~causal, -1e30)), expected
    )
    # alone, the first token sees itself and the prompts
    torch.testing.assert_close(block.attn(x[:, :1]), expected[:, :1])


# -- evaluation -------------------------------------------------------------------------------------------------------


def counted(model: zoo.Model, name: str = "vpt") -> Callable[[], int]:
    """How often the prompts of any block were asked for since the last call."""
    calls = [0]
    for module in model.adapters[name].modules():
        if isinstance(module, vpt.Prompt):
            module.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))

    def since() -> int:
        number, calls[0] = calls[0], 0
        return number

    return since


@BOTH
def test_in_evaluation_keys_and_values_are_computed_once(kind: str) -> None:
    model = make(kind, zoo.adapter("lora", rank=2, targets=("k", "v")), zoo.adapter("vpt", num_tokens=4)).eval()
    x, every, since = images(kind), len(model.family.blocks()), counted(model)
    prompts = model.adapters["vpt"]

    def after(change: Callable[[], Any], expected: int) -> None:
        """In how many blocks prompts are computed anew after a change; the result is that of a model that keeps nothing."""
        with torch.no_grad():
            model(x)
            since()
            model(x[:2])
            assert since() == 0
            change()
            found = model(x)
        assert since() == expected
        torch.testing.assert_close(found, model(x), rtol=1e-12, atol=1e-12)  # gradients are on: computed
        assert since() == every

    def first(*parts: str) -> Tensor:
        return next(p for k, p in model.named_parameters() if all(part in k for part in parts))

    def infer() -> None:
        with torch.inference_mode():
            model(x)

    def unseen() -> None:
        first("vpt", "prompt").data.mul_(0.5)  # autograd does not see this
        model.train().eval()

    def moved() -> dict[str, Tensor]:
        return {k: v + 0.1 for k, v in prompts.state_dict().items()}

    after(lambda: None, 0)
    after(infer, 0)
    after(lambda: first("vpt", "prompt").mul_(1.5), 1)
    after(lambda: first("lora", "lora_b").add_(0.3), 1)
    after(lambda: first("backbone", "norm1.weight").add_(0.3), 1)
    after(lambda: first("backbone", "qkv.bias").add_(0.3), 1)
    after(lambda: prompts.load_state_dict(moved()), every)
    after(lambda: prompts.load_state_dict(moved(), assign=True), every)
    after(lambda: model.set_active("vpt"), every)
    after(lambda: model.set_active("lora", "vpt"), every)
    after(unseen, every)
    after(lambda: model.add_adapter("bitfit"), every)
    model.train()
    with torch.no_grad():
        model(x)
        model(x)
    assert since() == 2 * every


def test_what_is_kept_knows_the_precision() -> None:
    model = make("vit", zoo.adapter("vpt", num_tokens=4)).float().eval()
    x = images("vit").float()
    with torch.no_grad():
        plain = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = model(x)
        again = model(x)
    assert torch.equal(plain, again) and not torch.equal(plain, low)
    torch.testing.assert_close(low.float(), plain, rtol=0.1, atol=0.1)


def test_a_copied_model_keeps_to_itself() -> None:
    model = make("vit", zoo.adapter("lora", targets=("k", "v")), zoo.adapter("vpt", num_tokens=4)).eval()
    twin = copy.deepcopy(model)
    x = images("vit")
    with torch.no_grad():
        before = model(x)
        assert torch.equal(twin(x), before)
        for adapter in twin.adapters.values():
            for p in adapter.parameters():
                p.add_(0.2)
        moved = twin(x)
        assert torch.equal(model(x), before)
    torch.testing.assert_close(twin(x), moved)
    assert not torch.equal(moved, before)


# -- per-sample adapters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@BOTH
def test_deep_prompts_per_sample_in_one_pass(kind: str, dropout: float) -> None:
    model = make(
        kind,
        zoo.adapter("vpt", num_tokens=3, dropout=dropout),
        zoo.adapter("vpt", num_tokens=2),
        zoo.adapter("lora", rank=2, targets="all-linear"),
        zoo.adapter("prefix", num_tokens=3),
    )
    model.train(dropout > 0)
    x, names = images(kind, 7), ["vpt", None, "lora", "vpt-2", "vpt", "prefix", None]
    passes = [0]
    model.backbone.patch_embed.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))  # type: ignore[union-attr]
    torch.manual_seed(4)
    together = model(x, adapters=names)
    assert passes == [1]
    parameters = [p for n in ("vpt", "vpt-2", "prefix") for p in model.adapters[n].parameters()]
    gradients = torch.autograd.grad(together.square().sum(), parameters)
    if dropout:
        assert all(g.isfinite().all() for g in gradients)
        return
    single = []
    for i, name in enumerate(names):
        model.set_active(*([name] if name else []))
        single.append(model(x[i : i + 1]))
    torch.testing.assert_close(together, torch.cat(single), rtol=1e-10, atol=1e-10)
    for p in parameters:
        p.requires_grad_(True)
    expected = torch.autograd.grad(torch.cat(single).square().sum(), parameters)
    for a, b in zip(gradients, expected):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@BOTH
def test_flowing_prompts_per_sample(kind: str) -> None:
    model = make(
        kind, zoo.adapter("vpt", num_tokens=3, deep=False), zoo.adapter("vpt", num_tokens=2, deep=False)
    ).eval()
    x, names = images(kind, 4), ["vpt", "vpt-2", None, "vpt"]
    together = model(x, adapters=names)
    for i, name in enumerate(names):
        model.set_active(*([name] if name else []))
        torch.testing.assert_close(together[i : i + 1], model(x[i : i + 1]), rtol=1e-10, atol=1e-10)


# -- memory and compiler ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backbone", "options"), [("vit-b16", {"depth": 2}), ("swin-t", {"depths": (2, 2)})])
def test_keeps_no_more_than_bitfit(backbone: str, options: dict[str, Any]) -> None:
    """At real shapes; the keys and values of 50 prompts and of the whole sequence behind them are not kept twice."""
    model = zoo.load(backbone, "bitfit", pretrained=False, num_classes=0, **options)
    x = torch.zeros(2, 3, 224, 224)
    bitfit = model.saved_bytes(x)
    model.remove_adapter("bitfit")
    model.add_adapter(zoo.adapter("vpt", num_tokens=50))
    assert 0.8 * bitfit < model.saved_bytes(x) <= 1.03 * bitfit


@pytest.mark.parametrize(
    "settings", [{}, {"deep": False}, {"pool": "all", "dropout": 0.2}], ids=["deep", "shallow", "all"]
)
@BOTH
def test_compiles_in_one_piece(kind: str, settings: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model = make(
        kind, zoo.adapter("vpt", num_tokens=4, **settings), **({"depth": 2} if kind == "vit" else {"depths": (1, 2)})
    ).train()
    x = images(kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for run in (model, compiled):
        torch.manual_seed(6)
        found.append(torch.autograd.grad(run(x).square().sum(), list(model.adapters["vpt"].parameters())))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-10, atol=1e-10)
    torch._dynamo.reset()
