"""L4Q: steps, gradients and limits by hand, counts, packing into whole numbers, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from method_models import attach, bare, both, build, gradients, images, loss_of, shake
from torch import Tensor, nn

import zoo
from zoo.adapters.l4q import packed
from zoo.adapters.parts.stepped import Levels, Stepped, first_step
from zoo.errors import AttachError, ConfigError, DerivativeError
from zoo.model.packed import PackedLinear, pack, unpack


def part(bits: int = 3, offset: bool = True, rank: int = 2, dims: tuple[int, int] = (6, 8), group: int = 4) -> Any:
    """A module in double precision, its frozen weight, and an input."""
    torch.manual_seed(0)
    weight = torch.randn(dims, dtype=torch.float64)
    made = Stepped(weight, rank, 1.5, group, Levels(bits), offset).double()
    with torch.no_grad():
        made.log_step.copy_(first_step(weight, group, Levels(bits)).log())
    return made, weight, torch.randn(5, dims[1], dtype=torch.float64)


def run(made: Stepped, x: Tensor, weight: Tensor) -> Tensor:
    return Stepped.linear_group(((made, 0, len(weight)),), F.linear, x, weight, None)


def reference(made: Stepped, weight: Tensor, s: Tensor, z: Tensor) -> Tensor:
    """The paper's b instead of z: W_q = w s + b with w = round(clamp((W' - b) / s)), rounding passed straight through."""
    b = s * z
    moved = (weight + 1.5 * made.lora_b @ made.lora_a).unflatten(1, (s.shape[1], -1))
    w = ((moved - b[..., None]) / s[..., None]).clamp(made.levels.low, made.levels.high)
    w = w + (w.round() - w).detach()
    return (w * s[..., None] + b[..., None]).flatten(1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gradients_are_those_of_the_formula(bits: int) -> None:
    """Against autograd through clamp and a rounding that is passed through, with entries in and out of the range."""
    made, weight, x = part(bits)
    with torch.no_grad():
        made.lora_b.normal_()
        made.log_step.sub_(0.4)  # some entries leave the range
        made.offset.normal_().mul_(0.3)
    y = run(made, x, weight)
    names = ["lora_a", "lora_b", "log_step", "offset"]
    ours = torch.autograd.grad(y.pow(3).sum(), [getattr(made, n) for n in names])
    s, z = made.log_step.detach().exp().requires_grad_(True), made.offset.detach().clone().requires_grad_(True)
    wide = reference(made, weight, s, z)
    expected = F.linear(x, wide)
    torch.testing.assert_close(y, expected)
    outside = (made.whole_numbers(weight)[0] == made.levels.low).sum()
    assert outside or bits == 8
    theirs = list(torch.autograd.grad(expected.pow(3).sum(), [made.lora_a, made.lora_b, s, z]))
    theirs[2] = theirs[2] * s.detach()  # the logarithm of s is trained
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_gradient_of_steps_by_hand() -> None:
    """ds = sum over the group of G (q - v) inside and of G Qn or G Qp outside; dz = s G outside. 3 bits: -4 to 3."""
    made, _, _ = part(group=4, dims=(1, 4))
    weight = torch.tensor([[0.26, -0.9, 5.0, -7.0]], dtype=torch.float64)
    with torch.no_grad():
        made.log_step.fill_(1.0).log_()
        made.offset.zero_()
    x = torch.tensor([[1.0, 10, 100, 1000]], dtype=torch.float64)
    y = run(made, x, weight)  # q: 0, -1, 3, -4
    assert float(y.detach()) == -10 + 300 - 4000
    ds, dz = torch.autograd.grad(y.sum(), [made.log_step, made.offset])
    assert float(ds) == pytest.approx((0 - 0.26) + 10 * (-1 + 0.9) + 100 * 3 - 1000 * 4) and float(dz) == 1100


def test_many_bits_are_lora() -> None:
    """With 16 bits the rounded sum is LoRA's, and so are the gradients of A and B."""
    made, weight, x = part(16, offset=False)
    with torch.no_grad():
        made.lora_b.normal_().mul_(0.05)  # so small that no sum leaves the range of the first steps by much
        made.log_step.add_(0.3)
    lora = F.linear(x, weight) + 1.5 * F.linear(F.linear(x, made.lora_a), made.lora_b)
    torch.testing.assert_close(run(made, x, weight), lora, rtol=1e-3, atol=1e-3)
    ours, theirs = (
        torch.autograd.grad(y.square().sum(), [made.lora_a, made.lora_b]) for y in (run(made, x, weight), lora)
    )
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", [2, 4])
def test_start(bits: int) -> None:
    """W rounded to the nearest, by steps that cover each group; all of it is in range, so B learns at once and A does not."""
    made, weight, x = part(bits, offset=False)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for row, whole in zip(weight, made.rounded(weight).detach()):
        for at in (0, 4):
            group = row[at : at + 4]
            step = max(float(group.min()) / low, float(group.max()) / high)
            expected = [step * max(low, min(high, round(float(v) / step))) for v in group]
            torch.testing.assert_close(whole[at : at + 4], torch.tensor(expected, dtype=torch.float64))
    grads = dict(zip("ab", torch.autograd.grad(run(made, x, weight).square().sum(), [made.lora_a, made.lora_b])))
    full = weight.clone().requires_grad_(True)
    (dw,) = torch.autograd.grad(F.linear(x, made.rounded(weight).detach() + full - weight).square().sum(), full)
    torch.testing.assert_close(grads["b"], 1.5 * dw @ made.lora_a.T)  # no entry was masked
    assert not grads["a"].any() and grads["b"].any()


@both
def test_plain_operations_and_ours_agree(family: str) -> None:
    """The backward by hand beside torch's, in the model: behind another method that changes the weight, ours is not used."""
    model = build(family, "l4q").train()
    shake(model, "l4q")
    ours = gradients(model, lambda: loss_of(model))
    before = Stepped.linear_group
    try:
        Stepped.linear_group = staticmethod(  # type: ignore[method-assign]
            lambda parts, run, x, w, b: before(parts, lambda *given: F.linear(*given), x, w, b)
        )
        theirs = gradients(model, lambda: loss_of(model))
    finally:
        Stepped.linear_group = staticmethod(before)  # type: ignore[method-assign]
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-3, atol=1e-5)


def test_memory_and_decay() -> None:
    """Not more is kept for backward than by LoRA; steps have no weight decay, and stay positive whatever is done to them."""
    kept = {}
    for method in ("l4q", "lora"):
        model = bare("vit")
        model.add_adapter(zoo.adapter(method, rank=2, targets="all-linear"))
        kept[method] = model.saved_bytes(images())
    assert kept["l4q"] <= kept["lora"]
    model = bare("vit")
    model.add_adapter(zoo.adapter("l4q", rank=2, offset=True))
    data = torch.utils.data.TensorDataset(images()[[0, 1, 2, 3, 0]], torch.arange(5))
    zoo.fit(model, data, epochs=3, batch_size=4, lr=3.0, weight_decay=0.5, progress=False)
    adapter: Any = model.adapters["l4q"]
    _, step, offset = adapter.module_at("blocks.0.mlp.up").whole_numbers(model.points["blocks.0.mlp.up"].weight)  # type: ignore[attr-defined]
    assert bool((step > 0).all()) and offset.any()


def test_counts() -> None:
    counts: dict[tuple[bool, str], int] = {}
    for offset in (False, True):
        model = zoo.load("vit-b16", zoo.adapter("l4q", offset=offset), num_classes=0, device="meta")
        names = model.adapters["l4q"].state_dict()
        for key, value in names.items():
            kind = key.rpartition(".")[2][:4]
            counts[offset, kind] = counts.get((offset, kind), 0) + value.numel()
    assert counts[False, "lora"] == counts[True, "lora"] == 663_552
    assert counts[False, "log_"] == counts[True, "log_"] == counts[True, "offs"] == 663_552
    assert (False, "offs") not in counts


# -- whole numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_bits(bits: int) -> None:
    numbers = torch.randint(0, 2**bits, (5, 13), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    small = pack(numbers, bits)
    assert small.shape == (5, -(-13 * bits // 8)) and torch.equal(unpack(small, bits, 13), numbers)
    first = sum(int(numbers[0, i]) << (i * bits) for i in range(13))  # numbers follow each other from the lowest bit
    assert bytes(small[0].tolist()) == first.to_bytes(small.shape[1], "little")


@pytest.mark.parametrize(("family", "bits", "offset"), [("vit", 4, False), ("swin", 3, True)])
def test_packed_model(family: str, bits: int, offset: bool, tmp_path: Path) -> None:
    """What is packed computes what was trained, is a backbone of its own, and takes adapters; others come along."""
    model = bare(family)
    attach(model, "l4q", bits=bits, offset=offset)
    shake(model, "l4q")
    attach(model, "bitfit", activate=False)
    small = packed(model.eval())
    torch.testing.assert_close(small(images()), model(images()), rtol=1e-5, atol=1e-6)
    assert small.active == () and list(small.adapters) == ["bitfit"] and model.active == ("l4q",)
    layers = [m for m in small.backbone.modules() if isinstance(m, PackedLinear)]
    assert layers and all(m.packed.nbytes == m.out_features * -(-m.in_features * bits // 8) for m in layers)  # type: ignore[union-attr,operator]
    zoo.save_backbone(small, tmp_path / "small")
    again = zoo.load(tmp_path / "small", "lora", num_classes=5)
    again.heads.load_state_dict({k: v for k, v in small.heads.state_dict().items() if k in again.heads.state_dict()})
    torch.testing.assert_close(again(images()), small(images()))
    assert again.train().probe(images()) == []
    torch.testing.assert_close(model.merge()(images()), model(images()), rtol=1e-5, atol=1e-5)


def test_refused(tmp_path: Path) -> None:
    for options, words in (
        ({"bits": 1}, "bits is 1; expected 2 to 8"),
        ({"bits": 9}, "bits is 9"),
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0.0}, "alpha is 0"),
        ({"group": 0}, "group is 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            zoo.adapter("l4q", **options)
    model = bare("vit")
    with torch.no_grad():
        model.backbone.blocks[0].mlp.fc1.weight[0, 0] = float("inf")  # type: ignore[index,union-attr]
    with pytest.raises(AttachError, match=r"blocks.0.mlp.up' holds numbers that are not finite"):
        model.add_adapter("l4q")
    assert not model.adapters
    model = bare("vit")
    attach(model, "l4q", targets="q,up")
    with pytest.raises(ConfigError, match=r"'blocks.0.attn.qkv' is rounded in part \(blocks.0.attn.q\)"):
        packed(model)
    attach(model, "lora")
    with pytest.raises(ConfigError, match="active are: l4q, lora"):
        packed(model)
    model.set_active()
    with pytest.raises(ConfigError, match="active are: none"):
        packed(model)
    light = bare("vit", quantise="int8")
    attach(light, "l4q")
    with pytest.raises(ConfigError, match=r"is a Int8Linear; only the weight of an nn.Linear is packed"):
        packed(light)
    model = build("vit", "l4q")
    with zoo.second_order(model), pytest.raises(DerivativeError, match="L4Q is trained by a gradient that is handed"):
        loss_of(model)


def test_a_group_of_zeros_stays_zero() -> None:
    weight = torch.randn(4, 8)
    weight[1, :4] = 0
    made = Stepped(weight, 1, 1.0, 4, Levels(4), False)
    assert not made.rounded(weight)[1, :4].any() and bool(made.log_step.isfinite().all())
    assert isinstance(made, nn.Module)
