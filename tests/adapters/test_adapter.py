"""Bottleneck adapters: each form against its equation written out, start, memory to the byte, settings, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from zoo.adapters.adapter import PRESETS
from zoo.adapters.parts.bottleneck import Bottleneck
from zoo.errors import AttachError, ConfigError, MergeError

BATCH, TOKENS, DIM, DEPTH, HEADS, RANK = 2, 65, 48, 3, 3, 4
TINY = {"embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS}
ACTIVATION = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "none": lambda x: x}


def vit(config: Any = None, **options: Any) -> zoo.Model:
    torch.manual_seed(0)
    return zoo.load("vit-micro", config, pretrained=False, num_classes=5, **{**TINY, **options})


def images(size: int = 32) -> Tensor:
    return torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(1))


def shake(model: zoo.Model, name: str = "adapter") -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.adapters[name].parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))


def written_out(model: zoo.Model, config: Any, x: Tensor) -> Tensor:
    """Logits of timm's ViT with adapters by the equations of the papers, from the same parameters."""
    net, adapter = model.backbone, model.adapters["adapter"]
    f = ACTIVATION[config.activation]

    def bottleneck(name: str, h: Tensor) -> Tensor:
        part = dict(adapter.named_modules()).get(name)
        if part is None or not hasattr(part, "adapter_down"):
            return torch.zeros_like(h)
        scale = config.scale if part.adapter_scale is None else part.adapter_scale
        norm = part.adapter_norm
        if config.norm == "in":
            h = F.layer_norm(h, (h.shape[-1],), norm.weight, norm.bias)
        h = f(h @ part.adapter_down.weight.T + part.adapter_down.bias)
        h = scale * (h @ part.adapter_up.weight.T + part.adapter_up.bias)
        return F.layer_norm(h, (h.shape[-1],), norm.weight, norm.bias) if config.norm == "out" else h

    u = net._pos_embed(net.patch_embed(x))
    for i, block in enumerate(net.blocks):
        for role, norm, branch in (("attn", block.norm1, block.attn), ("mlp", block.norm2, block.mlp)):
            inner, name = norm(u), f"blocks.{i}.{role}"
            if config.place == "before":
                u = u + branch(inner + bottleneck(name, inner))
                continue
            h = branch(inner)
            if config.form in ("houlsby", "pfeiffer"):
                source, kept = h, torch.zeros_like(h) if config.residual else h
            else:
                source = inner if config.source == "input" else u
                kept = -source if config.residual else torch.zeros_like(h)
            if not hasattr(dict(adapter.named_modules()).get(name), "adapter_down"):
                kept = torch.zeros_like(h)
            u = u + h - kept + bottleneck(name, source)
    return model.head(net.norm(u)[:, 0])


CASES: list[dict[str, Any]] = [
    *({"form": form, "rank": RANK} for form in PRESETS),
    {"form": "pfeiffer", "reduction": 8, "activation": "silu", "targets": "attn"},
    {"form": "houlsby", "rank": RANK, "norm": "in", "learn_scale": True, "scale": 0.5},
    {"form": "adaptformer", "rank": RANK, "norm": "out", "targets": "blocks.{0,2}.{attn,mlp}"},
    {"form": "adaptformer", "rank": RANK, "activation": "tanh", "source": "input", "learn_scale": True},
    {"form": "parallel", "rank": RANK, "activation": "none", "source": "residual", "targets": "attn,mlp"},
    {"form": "pfeiffer", "rank": RANK, "place": "before"},
    {"form": "houlsby", "rank": RANK, "place": "before", "learn_scale": True, "targets": "attn"},
    {"form": "houlsby", "rank": RANK, "residual": False},
    {"form": "parallel", "rank": RANK, "residual": True},
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(v) for v in c.values()))
def test_against_the_equations(case: dict[str, Any]) -> None:
    config = zoo.adapter("adapter", **{"dropout": 0.0, **case})
    model, x = vit(config), images()
    with model.disable():
        bare = model(x)
    # the pretrained function, to the bit, unless what the adapter reads is added, or left out, besides
    assert torch.equal(model(x), bare) == (config.residual == config.sequential)

    shake(model)
    model.train()
    parameters = model.parameters_to_train()
    logits = model(x)
    ours = torch.autograd.grad(logits.square().sum(), list(parameters.values()))
    with model.disable():  # the same parameters, but none of our hooks
        for p in parameters.values():
            p.requires_grad_(True)
        expected = written_out(model, config, x)
        theirs = torch.autograd.grad(expected.square().sum(), list(parameters.values()))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits, bare, atol=1e-2)
    for name, a, b in zip(parameters, ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_keys_and_shapes() -> None:
    adapter = vit(zoo.adapter("adapter", form="houlsby", rank=RANK, learn_scale=True, norm="in")).adapters["adapter"]
    shapes = {k: tuple(v.shape) for k, v in adapter.state_dict().items() if k.startswith("blocks.1.attn.")}
    assert shapes == {
        "blocks.1.attn.adapter_scale": (1,),
        "blocks.1.attn.adapter_down.weight": (RANK, DIM),
        "blocks.1.attn.adapter_down.bias": (RANK,),
        "blocks.1.attn.adapter_up.weight": (DIM, RANK),
        "blocks.1.attn.adapter_up.bias": (DIM,),
        "blocks.1.attn.adapter_norm.weight": (DIM,),
        "blocks.1.attn.adapter_norm.bias": (DIM,),
    }


def test_start() -> None:
    """W_down as the published codes draw it, U(-1 / sqrt d, 1 / sqrt d); never both matrices at zero."""
    torch.manual_seed(0)
    module = Bottleneck(400, 100, sequential=True)
    bound = 1 / 400**0.5
    assert module.adapter_down.weight.abs().max() <= bound
    assert module.adapter_down.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not any(p.any() for p in (module.adapter_down.bias, module.adapter_up.weight, module.adapter_up.bias))


def test_dropout_only_while_training() -> None:
    model, x = vit(zoo.adapter("adapter", form="adaptformer", rank=32)), images()
    shake(model)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_dropped_values(activation: str) -> None:
    """Of the hidden values a share p is dropped, the others grow by 1 / (1 - p); gradients go through the same mask."""
    torch.manual_seed(0)
    module = Bottleneck(16, 16, activation=activation, dropout=0.25, sequential=False).train()
    with torch.no_grad():
        module.adapter_down.weight.copy_(torch.eye(16))
        module.adapter_up.weight.copy_(torch.eye(16))
    x = (torch.rand(500, 16) + 0.5).requires_grad_()
    ratio = module(x) / ACTIVATION[activation](x)
    kept = ratio != 0
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 1 / 0.75))
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.02)


# -- memory -----------------------------------------------------------------------------------------------------------

UNIT, SLIM, STATS = BATCH * TOKENS * DIM * 4, BATCH * TOKENS * RANK * 4, BATCH * TOKENS * 2 * 4
HEADSUM = BATCH * TOKENS * HEADS * 4  # the log-sum-exp of the attention
BLOCK = 10 * UNIT + HEADSUM + 2 * STATS  # u and statistics of two norms; q, k, v and the product; fc1's output
MASK = BATCH * TOKENS * RANK  # one byte for each hidden value


@pytest.mark.parametrize(
    ("case", "first_block", "each_block"),
    [
        # In block 0 nothing in front of the first adapter is kept, but the adapter's own input is.
        ({"form": "pfeiffer"}, -BLOCK, UNIT + SLIM),
        ({"form": "houlsby"}, -(5 * UNIT + HEADSUM + STATS), 2 * (UNIT + SLIM)),
        ({"form": "parallel"}, -BLOCK + UNIT, SLIM),
        ({"form": "parallel", "activation": "gelu", "learn_scale": True}, -BLOCK + UNIT, SLIM),
        ({"form": "adaptformer"}, -BLOCK + UNIT, SLIM + MASK),
        ({"form": "adaptformer", "dropout": 0.0}, -BLOCK + UNIT, SLIM),
        ({"form": "adaptformer", "dropout": 0.2, "activation": "silu"}, -BLOCK + UNIT, SLIM + MASK),
        # A norm in front keeps its statistics; its output is recomputed.
        ({"form": "pfeiffer", "norm": "in"}, -BLOCK, UNIT + SLIM + STATS),
    ],
    ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else "",
)
def test_kept_bytes(case: dict[str, Any], first_block: int, each_block: int) -> None:
    """Against BitFit, which keeps of a block what any method must: exactly the hidden values, and h if sequential."""
    x = images()
    bitfit = vit("bitfit").saved_bytes(x)
    ours = vit(zoo.adapter("adapter", rank=RANK, **case)).saved_bytes(x)
    assert ours - bitfit == first_block + DEPTH * each_block


def test_block_of_the_bound() -> None:
    x = images()
    assert vit("bitfit", depth=3).saved_bytes(x) - vit("bitfit", depth=2).saved_bytes(x) == BLOCK


# -- settings and refusals --------------------------------------------------------------------------------------------


def test_settings_in_use_are_saved() -> None:
    config = zoo.adapter("adapter", form="adaptformer").config()
    assert (
        config["rank"] == 64 and config["scale"] == 0.1 and config["dropout"] == 0.1 and config["source"] == "residual"
    )
    assert zoo.adapter("adapter", **config).config() == config
    assert zoo.adapter("adapter", form="pfeiffer", rank=8).config()["reduction"] is None


def test_reduction_follows_the_width() -> None:
    model = zoo.load("swin-t", zoo.adapter("adapter", form="houlsby", reduction=16), device="meta", num_classes=0)
    adapter = model.adapters["adapter"]
    ranks = [len(adapter.module_at(f"stages.{s}.blocks.0.mlp").adapter_down.bias) for s in range(4)]
    assert ranks == [6, 12, 24, 48]
    assert zoo.adapter("adapter", reduction=1000).rank_at(768) == 1


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"form": "serial"}, "pfeiffer"),
        ({"rank": 4, "reduction": 2}, "one of them"),
        ({"rank": 0}, "1 or more"),
        ({"reduction": 0}, "above 0"),
        ({"activation": "gelu_fast"}, "gelu"),
        ({"scale": 0.0}, "never do anything"),
        ({"dropout": 1.0}, "dropout < 1"),
        ({"norm": "both"}, "norm"),
        ({"form": "houlsby", "source": "input"}, "parallel forms"),
        ({"form": "parallel", "source": "output"}, "residual"),
        ({"form": "parallel", "place": "before"}, "sequential forms"),
        ({"place": "beside"}, "after.*before"),
    ],
)
def test_bad_settings(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        zoo.adapter("adapter", **config)
    if isinstance(config.get("form"), str):
        with pytest.raises(ConfigError, match=words):
            type(zoo.adapter("adapter"))(**config)


def test_no_sublayers() -> None:
    model = vit()
    model.points._points = [p for p in model.points if p.kind != "sublayer"]
    with pytest.raises(AttachError, match="sublayer points"):
        model.add_adapter("adapter")
    assert not model.adapters


def test_merging_is_refused() -> None:
    with pytest.raises(MergeError, match=r"cannot be merged.*lora"):
        vit("adapter").merge()


@pytest.mark.parametrize("form", list(PRESETS))
def test_mixed_precision(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 autocast: near float32's result, and recomputation gives plain autograd's gradients to the bit."""
    model, x = vit(zoo.adapter("adapter", form=form, rank=RANK, activation="gelu")), images()
    shake(model)
    exact = model(x)

    def step() -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(0)  # the same mask
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
        parameters = list(model.parameters_to_train().values())
        return logits.detach(), list(torch.autograd.grad(logits.float().square().sum(), parameters))

    rough, _ = step()
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, rtol=0.05, atol=0.05)
    model.train()
    _, ours = step()
    monkeypatch.setattr("zoo.engine.memory._Recording.__enter__", lambda self: None)
    _, plain = step()
    assert all(torch.equal(a, b) for a, b in zip(ours, plain))
