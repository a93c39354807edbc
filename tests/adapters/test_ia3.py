"""IA3: where it scales, against the equations written out; merging; memory to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from zoo.errors import AttachError, ConfigError

BATCH, TOKENS, DIM, DEPTH, HEADS = 2, 65, 48, 3, 3
TINY = {"embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS}


def vit(config: Any = None) -> zoo.Model:
    torch.manual_seed(0)
    return zoo.load("vit-micro", config, pretrained=False, num_classes=5, **TINY)


def images() -> Tensor:
    return torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def shake(model: zoo.Model) -> None:
    with torch.no_grad():
        for p in model.adapters["ia3"].parameters():
            p.add_(0.3 * torch.randn(p.shape))


def written_out(model: zoo.Model, x: Tensor) -> Tensor:
    """softmax(Q (l_k K)^T / sqrt d) (l_v V) and (l_ff GELU(W_1 x)) W_2, as in the paper."""
    net, adapter = model.backbone, model.adapters["ia3"].state_dict(keep_vars=True)
    u = net._pos_embed(net.patch_embed(x))
    for i, block in enumerate(net.blocks):
        q, k, v = block.attn.qkv(block.norm1(u)).chunk(3, dim=-1)
        k, v = adapter[f"blocks.{i}.attn.k.scale"] * k, adapter[f"blocks.{i}.attn.v.scale"] * v
        q, k, v = (t.view(BATCH, TOKENS, HEADS, -1).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.transpose(-2, -1) / (DIM // HEADS) ** 0.5).softmax(dim=-1)
        u = u + block.attn.proj((weights @ v).transpose(1, 2).reshape(BATCH, TOKENS, DIM))
        hidden = adapter[f"blocks.{i}.mlp.down.scale"] * F.gelu(block.mlp.fc1(block.norm2(u)))
        u = u + block.mlp.fc2(hidden)
    return model.head(net.norm(u)[:, 0])


def test_against_the_equations() -> None:
    model, x = vit("ia3"), images()
    with model.disable():
        bare = model(x)
    assert torch.equal(model(x), bare)
    shake(model)
    parameters = model.train().parameters_to_train()
    logits = model(x)
    ours = torch.autograd.grad(logits.square().sum(), list(parameters.values()))
    with model.disable():
        for p in parameters.values():
            p.requires_grad_(True)
        expected = written_out(model, x)
        theirs = torch.autograd.grad(expected.square().sum(), list(parameters.values()))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits, bare, atol=1e-2)


def test_merging_by_hand() -> None:
    model, x = vit("ia3"), images()
    shake(model)
    plain, state, adapter = model.merge(), model.backbone.state_dict(), model.adapters["ia3"].state_dict()
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-5)
    scale = torch.cat([torch.ones(DIM), adapter["blocks.2.attn.k.scale"], adapter["blocks.2.attn.v.scale"]])
    found = plain.state_dict()
    torch.testing.assert_close(found["blocks.2.attn.qkv.weight"], scale[:, None] * state["blocks.2.attn.qkv.weight"])
    torch.testing.assert_close(found["blocks.2.attn.qkv.bias"], scale * state["blocks.2.attn.qkv.bias"])
    down = state["blocks.2.mlp.fc2.weight"] * adapter["blocks.2.mlp.down.scale"]
    torch.testing.assert_close(found["blocks.2.mlp.fc2.weight"], down)
    assert torch.equal(found["blocks.2.mlp.fc2.bias"], state["blocks.2.mlp.fc2.bias"])


@pytest.mark.parametrize("order", [("ia3", "lora"), ("lora", "ia3"), ("ssf", "ia3"), ("ia3", "ssf")])
@pytest.mark.parametrize("dora", [False, True])
def test_merging_together(order: tuple[str, str], dora: bool) -> None:
    """LoRA on the very projections whose input and output are scaled: merged equals live in either order."""
    lora = zoo.adapter("lora", targets=("k", "v", "down"), rank=2, dora=dora)
    model, x = vit([lora if name == "lora" else zoo.adapter(name) for name in order]), images()
    with torch.no_grad():
        for p in model.adapters.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    torch.testing.assert_close(model.merge()(x), model(x), rtol=1e-5, atol=1e-5)


def test_kept_bytes() -> None:
    """No more than BitFit, but for the joined factors; in block 0 the first norm's input is not needed."""
    x, floats = images(), BATCH * TOKENS * 4
    more = vit("ia3").saved_bytes(x) - vit("bitfit").saved_bytes(x)
    assert more == DEPTH * 3 * DIM * 4 - floats * (DIM + 2)


def test_scaled_inputs_are_not_scaled_again() -> None:
    """memory="low" runs the up-projection again in backward, on its input as it was then."""
    model, x = vit(zoo.adapter("ia3", inputs=("up", "down"))), images()
    shake(model)
    found = []
    for model.memory in ("default", "low"):
        loss = model.train()(x).square().sum()
        found.append(torch.autograd.grad(loss, list(model.parameters_to_train().values())))
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_settings() -> None:
    assert sorted(vit(zoo.adapter("ia3", inputs=())).adapters["ia3"].state_dict())[:2] == [
        "blocks.0.attn.k.scale",
        "blocks.0.attn.v.scale",
    ]
    with pytest.raises(ConfigError, match="both empty"):
        zoo.adapter("ia3", targets=(), inputs=())
    with pytest.raises(AttachError, match="shares its input"):
        vit(zoo.adapter("ia3", inputs="q"))
    with pytest.raises(AttachError, match="not a sequence of tokens"):
        vit(zoo.adapter("ia3", inputs="patch_embed"))


def test_values_of_zero_leave_the_bias_of_the_projection() -> None:
    """l_v scales W_v x and b_v together, behind everything that the attention does to values."""
    model, x = vit("ia3"), images()
    seen: list[Tensor] = []
    model.backbone.blocks[0].attn.register_forward_hook(lambda m, i, y: seen.append(y))  # type: ignore[union-attr,operator,index]
    with torch.no_grad():
        model.adapters["ia3"].get_parameter("blocks.0.attn.v.scale").zero_()
        model.backbone.blocks[0].attn.proj.bias.normal_()  # type: ignore[union-attr,operator,index]
        model(x)
    expected = model.backbone.blocks[0].attn.proj.bias.expand(BATCH, TOKENS, DIM)  # type: ignore[union-attr,operator,index]
    torch.testing.assert_close(seen[0], expected)


def test_behind_the_norm_inside_of_an_mlp() -> None:
    """EVA-02's MLP norms its gated hidden values: in front of that norm one factor for all of them would be taken back."""
    torch.manual_seed(0)
    small: dict[str, Any] = {"img_size": 28, "embed_dim": 48, "depth": 1, "num_heads": 3}
    model = zoo.load("eva02-b14", "ia3", pretrained=False, num_classes=5, **small).eval()
    mlp: Any = model.backbone.blocks[0].mlp  # type: ignore[union-attr,operator,index]
    assert mlp.norm.weight is not None
    x = torch.randn(1, 3, 28, 28)
    seen: list[Tensor] = []
    mlp.fc2.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(x)
        model.adapters["ia3"].get_parameter("blocks.0.mlp.down.scale").fill_(3.0)
        model(x)
    torch.testing.assert_close(seen[1], 3 * seen[0])
