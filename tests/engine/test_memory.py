"""Memory settings: exact gradients, and the number of bytes that the arithmetic of a block predicts."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import zoo
from zoo.engine.memory import MEMORY_SETTINGS

BATCH, DIM, DEPTH, HEADS = 4, 96, 3, 3
UNIT = BATCH * 65 * DIM * 4  # bytes of one (B, N, d) tensor
TINY = {"embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS}


def build(memory: str = "default") -> zoo.Model:
    torch.manual_seed(0)
    return zoo.load("vit-micro", pretrained=False, num_classes=5, memory=memory, **TINY)


def images() -> Tensor:
    return torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def gradients(model: zoo.Model) -> dict[str, Tensor]:
    model.train()
    model.zero_grad(set_to_none=True)
    model(images()).square().sum().backward()
    return {k: p.grad.clone() for k, p in model.parameters_to_train().items()}


def plain_saved(depth: int) -> int:
    options = {**TINY, "depth": depth}
    module = timm.models.vision_transformer.VisionTransformer(img_size=32, patch_size=4, num_classes=5, **options)
    x = images()
    return zoo.saved_bytes(lambda: module(x), [*module.parameters(), *module.buffers(), x])


def zoo_saved(depth: int, setting: str, targets: str | tuple[str, ...]) -> int:
    model = zoo.load("vit-micro", pretrained=False, num_classes=5, memory=setting, **{**TINY, "depth": depth})
    model.add_adapter(zoo.adapter("lora", targets=targets, rank=2))
    return model.saved_bytes(images())


@pytest.mark.parametrize("method", ["lora", "bitfit", "norm"])
def test_gradients_do_not_depend_on_the_setting(method: str) -> None:
    config = zoo.adapter("lora", targets="all-linear") if method == "lora" else zoo.adapter(method)
    found = {}
    for setting in MEMORY_SETTINGS:
        model = build(setting)
        model.add_adapter(config)
        torch.manual_seed(3)
        with torch.no_grad():
            for p in model.adapters[method].parameters():
                p.add_(0.02 * torch.randn_like(p))
        found[setting] = gradients(model)
    for setting in MEMORY_SETTINGS[1:]:
        for name, gradient in found["default"].items():
            assert torch.equal(gradient, found[setting][name]), (setting, name)


def test_gradients_equal_plain_autograd() -> None:
    """The recipes against autograd on a module of timm with LoRA written out as weights."""
    model = build()
    model.add_adapter(zoo.adapter("lora", targets="all-linear", rank=2))
    with torch.no_grad():
        for p in model.adapters["lora"].parameters():
            p.normal_(std=0.05, generator=torch.Generator().manual_seed(p.numel()))
    ours = gradients(model)

    plain = model.merge()  # weights W + BA; dA = B^T dW, dB = dW A^T
    plain.requires_grad_(True)
    plain(images()).square().sum().backward()
    for i in range(DEPTH):
        block = plain.blocks[i]
        sites = {"attn.o": block.attn.proj, "mlp.up": block.mlp.fc1, "mlp.down": block.mlp.fc2}
        whole = {name: module.weight.grad for name, module in sites.items()}
        whole |= {f"attn.{r}": g for r, g in zip("qkv", block.attn.qkv.weight.grad.chunk(3))}
        for name, grad in whole.items():
            low = model.adapters["lora"].get_submodule(f"blocks.{i}.{name}")
            assert torch.allclose(ours[f"lora/blocks.{i}.{name}.lora_a"], low.lora_b.T @ grad, rtol=1e-4, atol=1e-5)
            assert torch.allclose(ours[f"lora/blocks.{i}.{name}.lora_b"], grad @ low.lora_a.T, rtol=1e-4, atol=1e-5)


def test_bytes_that_a_block_keeps() -> None:
    """In units of one (B, N, d) tensor a block of full fine-tuning keeps 16: x, LN1, q k v, attention output, u, LN2, and
    four each for the input and the output of GELU. Behind frozen weights the LN and GELU outputs need not be kept: 10.
    Statistics of norms and softmax, and the r numbers of A x, are small: under 0.12 together here."""
    full = (plain_saved(3) - plain_saved(2)) / UNIT
    assert 16 <= full < 16.12
    for targets in (("q", "k", "v"), "all-linear"):
        found = {m: (zoo_saved(3, m, targets) - zoo_saved(2, m, targets)) / UNIT for m in MEMORY_SETTINGS}
        assert 10 <= found["default"] < 10.25, found
        assert 6 <= found["low"] < 6.25, found  # without the GELU input, a third of the matrix products
        assert found["min"] == 1, found  # the block's input


def test_count_is_repeatable_and_harmless() -> None:
    model = build()
    model.add_adapter(zoo.adapter("lora", dropout=0.1))
    model.eval()
    state = torch.get_rng_state()
    assert model.saved_bytes(images()) == model.saved_bytes(images())
    assert torch.equal(state, torch.get_rng_state())
    assert not model.training


def test_linear_probe_keeps_only_features() -> None:
    model = build()
    model.add_adapter("linear")
    assert model.saved_bytes(images()) <= UNIT  # the pooled features are a view of the last norm's output


def test_frozen_prefix_builds_no_graph() -> None:
    last = zoo_saved(1, "default", "all-linear")
    model = build()
    model.add_adapter(zoo.adapter("lora", targets=f"blocks.{DEPTH - 1}.**", rank=2))
    assert model.saved_bytes(images()) <= last


def test_dropout_is_not_replayed() -> None:
    """An up-projection whose adapter drops out is kept at memory="low", since running it again would draw again."""
    torch.manual_seed(0)
    config = zoo.adapter("lora", targets="up", dropout=0.5)
    grads = []
    for setting in ("default", "low"):
        model = build(setting)
        torch.manual_seed(5)
        model.add_adapter(config)
        with torch.no_grad():
            for p in model.adapters["lora"].parameters():
                p.add_(0.05)
        torch.manual_seed(7)
        grads.append(gradients(model))
    assert all(torch.equal(a, b) for a, b in zip(grads[0].values(), grads[1].values()))


def test_backward_twice() -> None:
    model = build("low")
    model.add_adapter(zoo.adapter("lora", targets="all-linear"))
    model.train()
    loss = model(images()).square().sum()
    loss.backward(retain_graph=True)
    once = {k: p.grad.clone() for k, p in model.parameters_to_train().items()}
    loss.backward()
    assert all(torch.allclose(p.grad, 2 * once[k]) for k, p in model.parameters_to_train().items())


def test_unknown_setting() -> None:
    with pytest.raises(zoo.ZooError, match="expected one of default, low, min"):
        build("tiny")


def test_saved_bytes_of_plain_code() -> None:
    layer = nn.Linear(8, 4)
    x = torch.randn(3, 8, requires_grad=True)
    assert zoo.saved_bytes(lambda: layer(x).relu(), [*layer.parameters(), x]) == 3 * 4 * 4


@pytest.mark.parametrize("method", ["linear", "vqt", zoo.adapter("lora", targets="blocks.2.attn.q")])
def test_blocks_without_a_gradient_are_not_checkpointed(method: Any) -> None:
    """A block that no gradient enters or leaves has nothing to keep: "min" never keeps more than "default"."""
    found = {}
    for setting in ("default", "min"):
        model = build(memory=setting)
        model.add_adapter(method)
        found[setting] = model.saved_bytes(images())
    assert found["min"] <= found["default"], found
