"""SVFit beside W = U diag(sigma) V^T in float64, its limits, which singular values are trained, and what a file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_parts import easy_data, fit, tiny_model

import zoo
from zoo.adapters.svfit import Singular, leading
from zoo.errors import ConfigError, MismatchError

QKV = "blocks.0.attn.qkv.weight"


def images() -> Tensor:
    return easy_data(6, seed=5).tensors[0]


def made(**config: Any) -> Any:
    return tiny_model(zoo.adapter("svfit", **config))


def shake(model: Any, name: str = "svfit") -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.adapters[name].parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize(
    ("config", "expected"), [({}, 18_432), ({"rank": 8}, 192), ({"targets": "all-linear"}, 55_296)]
)
def test_counts(config: dict[str, Any], expected: int) -> None:
    """A sixteenth of LoRA of rank 8, as the paper has it."""
    model = zoo.load("vit-b16", zoo.adapter("svfit", **config), num_classes=0, device="meta")
    assert model.num_parameters(trainable=True) == expected
    if not config:
        lora = zoo.load("vit-b16", "lora", num_classes=0, device="meta").num_parameters(trainable=True)
        assert lora == 16 * expected


@pytest.mark.parametrize("relative", [False, True])
def test_the_weight_and_its_gradient(relative: bool) -> None:
    """U diag(sigma) V^T by numpy's decomposition, put into a plain network; d L / d sigma_j = u_j^T (d L / d W) v_j."""
    import numpy as np

    model = made(rank=5, targets="q,up", relative=relative)
    shake(model)
    point = "blocks.1.mlp.up"
    plain: Any = tiny_model(None)
    weight = plain.backbone.blocks[1].mlp.fc1.weight
    found = np.linalg.svd(weight.detach().double().numpy(), full_matrices=False)
    u, s, v = (torch.from_numpy(m) for m in found)
    part = model.adapters["svfit"].module_at(point)
    shift = part.sigma_shift.detach().double()
    sigma = s.clone()
    sigma[:5] += s[:5] * shift if relative else shift
    with torch.no_grad():
        weight.copy_((u * sigma) @ v)
        for block in range(2):
            for role in ("attn.q", "mlp.up"):
                if (name := f"blocks.{block}.{role}") != point:
                    target = plain.points[name]
                    target.weight.add_(model.adapters["svfit"].module_at(name).delta())
    weight.requires_grad_(True)
    torch.testing.assert_close(model(images()), plain(images()), rtol=1e-5, atol=1e-5)
    model(images()).square().sum().backward()
    plain(images()).square().sum().backward()
    expected = ((u.T @ weight.grad.double()) * v).sum(1)[:5] * (s[:5] if relative else 1)
    torch.testing.assert_close(part.sigma_shift.grad.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.merge()(images()), model(images()), rtol=1e-5, atol=1e-5)


def test_all_of_them_scaled_scale_the_weight() -> None:
    model = made(relative=True)
    with torch.no_grad():
        for p in model.adapters["svfit"].parameters():
            p.fill_(0.25)
    before, after = model.backbone.state_dict()[QKV], model.merge().state_dict()[QKV]
    torch.testing.assert_close(after[:24], 1.25 * before[:24], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after[48:], 1.25 * before[48:], rtol=1e-5, atol=1e-6)
    assert torch.equal(after[24:48], before[24:48])


def test_signs_of_pairs_do_not_matter() -> None:
    model = made()
    shake(model)
    expected = model(images())
    sums = []
    for part in (m for m in model.adapters["svfit"].modules() if isinstance(m, Singular)):
        signs = torch.where(torch.arange(24) % 3 == 0, -1.0, 1.0)
        part.left.mul_(signs)
        part.right.mul_(signs[:, None])
        sums.append(torch.allclose(part._sums(), part.check, atol=1e-4))
    torch.testing.assert_close(model(images()), expected)
    assert all(sums)


def test_which_are_trained() -> None:
    values = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert [leading(values, p, False) for p in (0.1, 0.4, 0.41, 0.9, 0.91, 1.0)] == [1, 1, 2, 3, 4, 4]
    assert [leading(values, p, True) for p in (0.5, 0.83, 0.84, 0.97)] == [1, 2, 3, 4]
    assert leading(torch.zeros(3), 0.99, False) == 1
    model = made(information=0.9, targets="q,down")
    ranks = model.adapters["svfit"].plan["ranks"]
    for point in model.adapters["svfit"].selected(model.points):
        s = torch.linalg.svdvals(point.weight.double())
        r = ranks[point.name]
        assert s[: r - 1].sum() < 0.9 * s.sum() <= s[:r].sum()
        assert len(model.adapters["svfit"].module_at(point).sigma_shift) == r
    fewer = made(information=0.9, squares=True, targets="q,down").adapters["svfit"].plan["ranks"]
    assert all(fewer[n] <= r for n, r in ranks.items()) and fewer != ranks


@pytest.mark.parametrize("config", [{}, {"information": 0.8}, {"save_vectors": True, "rank": 3}], ids=str)
def test_saved(config: dict[str, Any], tmp_path: Path) -> None:
    model = made(**config)
    shake(model)
    model.save_adapter(tmp_path / "out")
    held = {k.rpartition(".")[2] for k in model.adapters["svfit"].state_dict()}
    assert held == ({"sigma_shift", "left", "right"} if "save_vectors" in config else {"sigma_shift", "check"})
    torch.manual_seed(100)
    again: Any = zoo.load(adapter=tmp_path / "out", pretrained=False).eval()
    assert torch.equal(again(images()), model(images()))


def test_other_vectors_are_refused() -> None:
    """Two vectors of one plane turned, as another library may give them for equal singular values."""
    model, other = made(), made()
    state = model.adapters["svfit"].state_dict()
    part: Any = other.adapters["svfit"].module_at("blocks.1.attn.v")
    turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    part.left[:, 3:5] = part.left[:, 3:5] @ turn.T
    part.right[3:5] = turn @ part.right[3:5]
    with pytest.raises(MismatchError, match=r"'blocks.1.attn.v' are others here.*save_vectors=True"):
        other.adapters["svfit"].load_state_dict(state)


def test_sums_are_exact() -> None:
    model = made()
    model.add_adapter(zoo.adapter("svfit"), "more", activate=False)
    shake(model)
    shake(model, "more")
    with torch.no_grad():
        for p in model.adapters["more"].parameters():
            p.mul_(-0.5)
    model.set_active("svfit", "more")
    both = model(images())
    model.combine({"svfit": 1.0, "more": 1.0}, name="sum")
    torch.testing.assert_close(model(images()), both, rtol=1e-5, atol=1e-5)


def test_decay_draws_to_the_pretrained_weight() -> None:
    """The weights that weight decay reaches in a fit are not those of sigma; and drawn to zero they are W itself."""
    model = made(targets="all-linear")
    fit(model, easy_data(48), epochs=2, lr=1e-2)
    trained = model.merge().state_dict()[QKV]
    with torch.no_grad():
        for p in model.adapters["svfit"].parameters():
            assert p.any()
            p.mul_(0)
    assert not torch.equal(trained, model.backbone.state_dict()[QKV])
    assert torch.equal(model.merge().state_dict()[QKV], model.backbone.state_dict()[QKV])


def test_what_is_kept_for_backward() -> None:
    """r numbers of each token, and not the input: no more for all six projections with the rank than that."""
    sizes = {r: made(rank=r).train().saved_bytes(images()) for r in (4, 8)}
    assert sizes[8] - sizes[4] == 2 * 2 * 6 * 5 * 4 * 4  # blocks, q and v, images, tokens, numbers, bytes


def test_refused_settings() -> None:
    for config, message in (
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2, "information": 0.9}, "give one of them"),
        ({"information": 1.5}, "information is 1.5"),
        ({"squares": True}, "give information, too"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            zoo.adapter("svfit", **config)
    with pytest.raises(ConfigError, match=r"rank is 25, and 'blocks.0.attn.q' has 24 singular values"):
        made(rank=25)
    with pytest.raises(ConfigError, match="weights on the meta device have none"):
        zoo.load("vit-b16", zoo.adapter("svfit", information=0.99), num_classes=0, device="meta")
    wrong = zoo.adapter("svfit", information=0.9)
    wrong.plan = {"ranks": {"blocks.0.attn.q": 99}}
    with pytest.raises(MismatchError, match="trains 99 singular values"):
        tiny_model(wrong)
