"""LoRA and DoRA: the hand-written gradient, slices of fused projections, precision, scales, kept bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo
from zoo.adapters.lora import DoRAWeight
from zoo.adapters.parts.convolved import ConvLowRank
from zoo.adapters.parts.low_rank import LowRank, _plain
from zoo.errors import AttachError, ConfigError, SelectionError

TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3}
DIM_IN, WIDTH = 6, 5

# (start, stop) of the slices of a projection with 3 * WIDTH outputs
GROUPS = {
    "q": [(0, 5)],
    "v": [(10, 15)],
    "q,v": [(0, 5), (10, 15)],
    "q,k,v": [(0, 5), (5, 10), (10, 15)],
    "whole": [(0, 15)],
}


def vit(config: Any = None, **options: Any) -> zoo.Model:
    torch.manual_seed(0)
    return zoo.load("vit-micro", config, pretrained=False, num_classes=5, **TINY, **options)


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def shake(model: zoo.Model, size: float = 0.1) -> None:
    with torch.no_grad():
        for p in model.adapters.parameters():
            p.add_(size * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))


def group(slices: list[tuple[int, int]], dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    """One module for each slice, ranks 2, 3, 4 and scales 1.5, 2.5, 3.5, none of its factors zero."""
    torch.manual_seed(0)
    parts = []
    for i, (start, stop) in enumerate(slices):
        part = LowRank(DIM_IN, stop - start, rank=2 + i, scale=1.5 + i, dropout=dropout).to(dtype)
        nn.init.normal_(part.lora_b, std=0.5)
        parts.append((part, start, stop))
    return tuple(parts)


def with_factors(parts: tuple[Any, ...], factors: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """The same group computing with other tensors, so that gradcheck can move them."""
    out = []
    for (part, start, stop), a, b in zip(parts, factors[::2], factors[1::2]):
        twin = LowRank(part.lora_a.shape[1], len(part.lora_b), len(part.lora_a), part.scale, part.drop.p)
        del twin.lora_a, twin.lora_b
        twin.lora_a, twin.lora_b = a, b
        out.append((twin, start, stop))
    return tuple(out)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 2, 2)], ids=["2d", "3d", "4d"])
@pytest.mark.parametrize("name", list(GROUPS))
def test_gradcheck(name: str, shape: tuple[int, ...], dropout: float) -> None:
    """Against finite differences in float64, for y, x and every factor; y is changed in place, so a copy goes in."""
    parts = group(GROUPS[name], dropout)
    factors = tuple(f.detach().requires_grad_() for m, _, _ in parts for f in (m.lora_a, m.lora_b))
    x = torch.randn(*shape, DIM_IN, dtype=torch.float64, requires_grad=True)
    y = torch.randn(*shape, 3 * WIDTH, dtype=torch.float64, requires_grad=True)

    def run(y: Tensor, x: Tensor, *factors: Tensor) -> Tensor:
        torch.manual_seed(1)  # the same mask each time
        return LowRank.add_group(with_factors(parts, factors), x, y.clone())

    assert torch.autograd.gradcheck(run, (y, x, *factors))


@pytest.mark.parametrize("name", list(GROUPS))
def test_group_is_the_sum_of_its_parts(name: str) -> None:
    parts = group(GROUPS[name])
    x, y = torch.randn(7, DIM_IN, dtype=torch.float64), torch.randn(7, 3 * WIDTH, dtype=torch.float64)
    expected = y.clone()
    for part, start, stop in parts:
        expected[:, start:stop] += part.scale * x @ part.lora_a.T @ part.lora_b.T
        torch.testing.assert_close(part(x), x @ part.delta().T)
    slices = tuple((start, stop, m.scale) for m, start, stop in parts)
    factors = [f for m, _, _ in parts for f in (m.lora_a, m.lora_b)]
    torch.testing.assert_close(_plain(x, y, slices, factors), expected)  # what the compiler sees
    changed = y.clone()
    with torch.no_grad():
        out = LowRank.add_group(parts, x, changed)
    assert out.data_ptr() == changed.data_ptr()  # no second output
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("wide_input", [True, False])
@pytest.mark.parametrize("name", ["q,v", "whole"])
def test_gradients_in_mixed_precision(name: str, wide_input: bool) -> None:
    """Outputs and gradients within bfloat16's rounding of float32's; factors' gradients in float32."""
    found: list[list[Tensor]] = []
    for narrow in (False, True):
        parts = group(GROUPS[name], dtype=torch.float32)
        torch.manual_seed(2)
        projection = nn.Linear(DIM_IN, 3 * WIDTH)
        x = torch.randn(50, DIM_IN).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            inner = x if wide_input or not narrow else x.bfloat16()
            out = LowRank.add_group(parts, inner, projection(inner))
        assert out.dtype == (torch.bfloat16 if narrow else torch.float32)
        out.float().square().mean().backward()
        gradients = [x.grad, *(f.grad for m, _, _ in parts for f in (m.lora_a, m.lora_b))]
        assert all(g is not None and g.dtype == torch.float32 for g in gradients)
        found.append([out.detach().float(), *gradients])  # type: ignore[list-item]
    for wide, narrow_one in zip(*found):
        assert (wide - narrow_one).norm() < 0.02 * wide.norm()


def test_wide_outputs_in_a_narrow_region() -> None:
    """An output that stayed in float32 inside an autocast region is added to in float32."""
    parts = group(GROUPS["q"], dtype=torch.float32)
    x, y = torch.randn(4, DIM_IN), torch.zeros(4, 3 * WIDTH, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = LowRank.add_group(parts, x, y + 0)
    assert out.dtype == torch.float32
    out.sum().backward()
    torch.testing.assert_close(out[:, :5], parts[0][0](x), rtol=0.05, atol=0.05)


def test_without_gradients() -> None:
    model, x = vit(zoo.adapter("lora", targets="all-linear")), images()
    shake(model)
    expected = model(x).detach()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            out = model(x)
        assert not out.requires_grad and torch.equal(out, expected)
    half = vit(zoo.adapter("lora", targets="all-linear"), dtype=torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert half.adapters["lora"].state_dict()["blocks.0.attn.q.lora_a"].dtype == torch.float32


@pytest.mark.parametrize("targets", ["q,v", "k", "q,k,v,o", "all-linear", "blocks.1.mlp.up", "patch"])
@pytest.mark.parametrize("dora", [False, True])
def test_against_changed_weights(targets: str, dora: bool) -> None:
    """The same network with W + s B A (or the DoRA weight) written into timm's module: logits and gradients."""
    if targets == "patch" and dora:
        with pytest.raises(AttachError, match="not a sequence of tokens"):
            vit(zoo.adapter("lora", targets=targets, dora=dora))
        return
    model, x = vit(zoo.adapter("lora", targets=targets, rank=3, alpha=6.0, dora=dora)), images()
    shake(model)
    parameters = model.train().parameters_to_train()
    logits = model(x)
    ours = torch.autograd.grad(logits.square().sum(), list(parameters.values()))

    weights: dict[str, Tensor] = {f"backbone.{k}": v for k, v in model.backbone.state_dict().items()}
    for point in model.points.select(kind="linear"):
        part = dict(model.adapters["lora"].named_modules()).get(point.name)
        if not isinstance(part, (LowRank, DoRAWeight, ConvLowRank)):
            continue
        for p in part.parameters():
            p.requires_grad_(True)
        v = point.weight + 2.0 * part.lora_b @ part.lora_a
        if isinstance(part, DoRAWeight):  # m V / ||V||, the norm of each output row a constant
            v = part.magnitude[:, None] * v / v.detach().square().sum(dim=1, keepdim=True).sqrt()
        key = f"backbone.{point.path}.weight"
        v = v.view(-1, *weights[key].shape[1:])  # of a convolution
        weights[key] = torch.cat([weights[key][: point.start], v, weights[key][point.stop :]])
    with model.disable():
        for p in parameters.values():
            p.requires_grad_(True)
        expected = torch.func.functional_call(model, weights, (x,))
        theirs = torch.autograd.grad(expected.square().sum(), list(parameters.values()))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for name, a, b in zip(parameters, ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(model.merge()(x), logits, rtol=1e-5, atol=1e-5)


def test_dora_gradients_of_the_paper() -> None:
    """Section 4.3: dV = m / ||V|| * dW', dm = sum over the row of dW' V / ||V||; the start is W to the bit."""
    torch.manual_seed(0)
    weight = torch.randn(7, 5)
    module = DoRAWeight(weight, rank=2, scale=0.5)
    assert torch.equal(module(weight), weight)
    with torch.no_grad():
        module.lora_b.normal_()
        module.magnitude.mul_(1.5)
    outer = torch.randn(7, 5)  # dW'
    (module(weight) * outer).sum().backward()
    v = weight + 0.5 * module.lora_b @ module.lora_a
    norm = v.norm(dim=1, keepdim=True)
    dv = module.magnitude[:, None] / norm * outer
    torch.testing.assert_close(module.magnitude.grad, (outer * v / norm).sum(dim=1))
    torch.testing.assert_close(module.lora_b.grad, 0.5 * dv @ module.lora_a.T)
    torch.testing.assert_close(module.lora_a.grad, 0.5 * module.lora_b.T @ dv)
    # Length and direction are apart: the rows of the result are as long as m.
    torch.testing.assert_close(module(weight).norm(dim=1), module.magnitude)


def test_dora_by_rows() -> None:
    """A constant norm changes gradients, not outputs; a weight c times as large has an m c times as large; without B the rows of
    the result keep their directions."""
    torch.manual_seed(0)
    weight = torch.randn(7, 5)
    torch.testing.assert_close(DoRAWeight(-3 * weight, 2, 0.5).magnitude, 3 * DoRAWeight(weight, 2, 0.5).magnitude)
    module, outer = DoRAWeight(weight, rank=2, scale=0.5), torch.randn(7, 5)
    with torch.no_grad():
        module.magnitude.mul_(torch.rand(7) + 0.5)
    rows = module(weight)
    torch.testing.assert_close(F.cosine_similarity(rows, weight), torch.ones(7))
    with torch.no_grad():
        module.lora_b.normal_()
    constant = module(weight)
    v = weight + 0.5 * module.lora_b @ module.lora_a
    whole = module.magnitude[:, None] * v / v.norm(dim=1, keepdim=True)
    torch.testing.assert_close(constant, whole)
    ours, theirs = (torch.autograd.grad((y * outer).sum(), module.lora_b)[0] for y in (constant, whole))
    assert not torch.allclose(ours, theirs, atol=1e-2)


def test_dora_stands_on_what_other_adapters_trained() -> None:
    model, x = vit(["full", zoo.adapter("lora", dora=True)]), images()
    shake(model)
    torch.testing.assert_close(model.merge()(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 1.0),
        ({"rank": 4}, 1.0),
        ({"rank": 4, "alpha": 16.0}, 4.0),
        ({"rank": 16, "alpha": 8.0, "rslora": True}, 2.0),
        ({"rank": 16, "rslora": True}, 4.0),
    ],
)
def test_scales(config: dict[str, Any], scale: float) -> None:
    assert zoo.adapter("lora", **config).scale == scale


def test_start() -> None:
    torch.manual_seed(0)
    part = LowRank(400, 100, rank=100, scale=1.0)
    assert not part.lora_b.any()
    assert part.lora_a.abs().max() <= 1 / 400**0.5
    assert part.lora_a.std().item() == pytest.approx(1 / 1200**0.5, rel=0.02)


def test_dropout() -> None:
    """One mask for q and v, which share their input; of the right size and share; none in evaluation."""
    parts = group(GROUPS["q,v"], dropout=0.25, dtype=torch.float32)
    for part, _, _ in parts:
        part.lora_a.data, part.lora_b.data = torch.eye(DIM_IN)[:5], torch.eye(5)
    x, y = torch.ones(1000, DIM_IN), torch.zeros(1000, 3 * WIDTH)
    out = LowRank.add_group(parts, x, y.clone())
    q, v = out[:, :5] / parts[0][0].scale, out[:, 10:] / parts[1][0].scale
    torch.testing.assert_close(q, v)
    torch.testing.assert_close(q[q != 0], torch.full_like(q[q != 0], 1 / 0.75))
    assert (q != 0).float().mean().item() == pytest.approx(0.75, abs=0.02)
    for part, _, _ in parts:
        part.eval()
    assert (LowRank.add_group(parts, x, y.clone())[:, :5] == parts[0][0].scale).all()


# -- memory -----------------------------------------------------------------------------------------------------------

UNIT, SLIM = 2 * 65 * 48 * 4, 2 * 65 * 4  # bytes of (B, N, d), and of one number for each token


@pytest.mark.parametrize(
    ("config", "each_block"),
    [
        ({"targets": ("q", "v")}, 2 * 8 * SLIM),
        ({"targets": "all-linear"}, 6 * 8 * SLIM),
        ({"targets": ("q", "v"), "dropout": 0.5}, 2 * 8 * SLIM + UNIT // 4),  # one byte for each dropped value
        ({"targets": "down", "dropout": 0.5}, 8 * SLIM + UNIT),
    ],
)
def test_kept_bytes(config: dict[str, Any], each_block: int) -> None:
    """Beyond BitFit of one more block: the hidden values alone."""
    x = images()

    def block(adapter: Any) -> int:
        sizes = [
            zoo.load("vit-micro", adapter, pretrained=False, num_classes=5, **{**TINY, "depth": n}).saved_bytes(x)
            for n in (2, 3)
        ]
        return sizes[1] - sizes[0]

    assert block(zoo.adapter("lora", **config)) - block("bitfit") == each_block


def test_a_frozen_adapter_keeps_nothing() -> None:
    """Active but not trained, in front of one that is: only what the gradient of its input needs."""
    x = images()
    model = vit(zoo.adapter("lora", targets=("q", "v"), rank=8))
    model.add_adapter(zoo.adapter("lora", targets=("q", "v"), rank=4), "second")
    both = model.saved_bytes(x)
    model.set_active("lora", "second", train="second")
    assert both - model.saved_bytes(x) == 2 * 2 * 8 * SLIM
    gradients = torch.autograd.grad(model.train()(x).sum(), list(model.parameters_to_train().values()))
    model.set_active("lora", "second")
    names = [k for k in model.parameters_to_train() if not k.startswith("lora/")]
    again = torch.autograd.grad(model(x).sum(), [model.parameters_to_train()[k] for k in names])
    assert all(torch.equal(a, b) for a, b in zip(gradients, again))


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: zoo.adapter("lora", rank=0), ConfigError, "1 or more"),
        (lambda: zoo.adapter("lora", rank=2.0), ConfigError, "expected int"),
        (lambda: zoo.adapter("lora", dropout=1.0), ConfigError, "dropout < 1"),
        (lambda: zoo.adapter("lora", dora=True, dropout=0.1), ConfigError, "not defined"),
        (lambda: zoo.adapter("lora", rang=8), ConfigError, "Did you mean 'rank'"),
        (lambda: vit(zoo.adapter("lora", targets="q,w")), SelectionError, "'w' .a part of 'q,w'. matches no"),
        (lambda: vit(zoo.adapter("lora", targets=())), AttachError, "nothing would be trained"),
    ],
)
def test_bad_settings(build: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        build()


def test_plain_linear() -> None:
    """The delta of one point by F.linear, as the paper writes it."""
    (part, _, _) = group([(0, 15)])[0]
    x = torch.randn(3, DIM_IN, dtype=torch.float64)
    torch.testing.assert_close(part(x), 1.5 * F.linear(x, part.lora_b @ part.lora_a))
