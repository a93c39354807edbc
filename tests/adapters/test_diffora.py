"""DiffoRA: limits in which it is another method, the gradient of a gate, the search by hand, bad input, a search that fails."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from method_models import bare, images, shake, state, targets
from torch import Tensor
from torch.nn.functional import cross_entropy

import zoo
from zoo.adapters.parts.relaxed import Borrowed, Gated, Relaxed, search
from zoo.errors import ConfigError, DataError
from zoo.tasks import Classify

SMALL: dict[str, Any] = {"rank": 2, "warmup": 2, "steps": 3}


def batch(seed: int) -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed)), targets()


def chosen(model: zoo.Model, data: Any = None, **settings: Any) -> Any:
    """A calibrated adapter, attached with seed 4."""
    adapter = model.add_adapter(zoo.adapter("diffora", **{**SMALL, **settings}))
    torch.manual_seed(4)
    adapter.calibrate(model, [batch(1), batch(2)] if data is None else data)
    return adapter


def searched(model: zoo.Model, data: Any, **settings: Any) -> dict[str, float]:
    torch.manual_seed(5)
    relaxed = model.add_adapter(Relaxed(2))
    options = {"warmup": 2, "steps": 3, "lr": 1e-3, "gate_lr": 1e-2, "gate_decay": 1e-3, "held_out": True}
    return search(model, relaxed, data, Classify(), **{**options, **settings})  # type: ignore[arg-type]


def test_with_all_kept_it_is_lora_and_with_none_the_head_alone() -> None:
    """Neither needs data: there is nothing to choose."""
    model, other = bare("vit"), bare("vit")
    adapter = chosen(model, [], rho=1.0)
    torch.manual_seed(4)
    lora = other.add_adapter(zoo.adapter("lora", rank=2, targets="all-linear"))
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), lora.parameters(), strict=True))
    shake(model, "diffora")
    shake(other, "lora")
    assert torch.equal(model(images()), other(images()))
    alone = bare("vit")
    assert not list(chosen(alone, [], rho=0.0, share=False).parameters())
    assert {n.partition("/")[0] for n in alone.parameters_to_train()} == {"head"}


def test_the_gradient_of_a_gate() -> None:
    """sigmoid'(a) <dL/dW, s B A>: exactly 0 while B is, and afterwards what the gradient of the merged weight says."""
    model = bare("vit").eval()
    model.add_adapter(Relaxed(2, 0.5))
    parts = {n: m for n, m in model.adapters["diffora-search"].named_modules() if isinstance(m, Gated)}
    gates = [part.gate for part in parts.values()]
    assert all(not g.any() for g in torch.autograd.grad(cross_entropy(model(images()), targets()), gates))
    shake(model, "diffora-search")
    found = torch.autograd.grad(cross_entropy(model(images()), targets()), gates)
    plain = bare("vit").merge()
    weights = dict(plain.named_parameters())
    where = {p.name: (weights[f"{p.path}.weight"], p.start, p.stop) for p in model.points.select(kind="linear")}
    with torch.no_grad():
        for name, part in parts.items():
            weight, start, stop = where[name]
            weight[start:stop] += torch.sigmoid(part.gate) * 0.5 * part.lora_b @ part.lora_a
    for weight, _, _ in where.values():
        weight.requires_grad_(True)
    cross_entropy(plain(images()), targets()).backward()
    for (name, part), gradient in zip(parts.items(), found, strict=True):
        weight, start, stop = where[name]
        assert weight.grad is not None and gradient.abs() > 0
        slope = torch.sigmoid(part.gate) * (1 - torch.sigmoid(part.gate))
        expected = slope * (weight.grad[start:stop] * (0.5 * part.lora_b @ part.lora_a)).sum()
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_the_search_is_the_alternation_by_hand() -> None:
    """AdamW on the first batch of each pair, Adam on the second one, which A, B and head never see."""
    data = [batch(i) for i in range(4)] + [batch(99)]  # the last of an odd number is of neither half
    model, other = bare("vit"), bare("vit")
    found = searched(model, data)
    torch.manual_seed(5)
    relaxed = other.add_adapter(Relaxed(2))
    other.eval()
    gates = {n.removesuffix(".gate"): p for n, p in relaxed.named_parameters() if n.endswith(".gate")}
    rest = [p for n, p in relaxed.named_parameters() if not n.endswith(".gate")]
    first = torch.optim.AdamW([*rest, *other.head.parameters()], lr=1e-3)
    second = torch.optim.Adam(gates.values(), lr=1e-2, weight_decay=1e-3)
    for step in range(5):
        for optimizer, (x, y) in ((first, data[2 * step % 4]), (second, data[(2 * step + 1) % 4])):
            if optimizer is second and step < 2:
                continue
            other.zero_grad(set_to_none=True)
            cross_entropy(other(x), y).backward()
            optimizer.step()
    assert found.keys() == gates.keys() and len(set(found.values())) > 1
    for name, gate in gates.items():
        assert found[name] == pytest.approx(float(gate.detach()), abs=1e-6)


def test_one_half_twice_is_the_joint_search() -> None:
    same = searched(bare("vit"), [batch(1), batch(1)])
    assert same == searched(bare("vit"), [batch(1)], held_out=False)
    assert same != searched(bare("vit"), [batch(1), batch(2)])

    class Views(list):  # type: ignore[type-arg]
        """As the batches of a fit: augmented anew in each pass."""

        def view(self, number: int) -> Iterator[Any]:
            return iter([batch(1), batch(1)] if number == 0 else [batch(1 + number)] * 2)

    assert same != searched(bare("vit"), Views([batch(1), batch(1)]))


@pytest.mark.parametrize(("rho", "each"), [(0.5, 3), (0.25, 2), (0.9, 5), (1.0, 6)])
def test_each_layer_keeps_its_part_and_ties_go_to_the_first(
    rho: float, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bare("vit")
    adapter = model.add_adapter(zoo.adapter("diffora", rho=rho, rank=2))
    names = [p.name for p in model.points.linears("all-linear")]
    value = {"v": 2.0, "q": 1.0, "down": 1.0, "up": 1.0, "k": 1.0, "o": 0.0}
    monkeypatch.setattr(type(adapter), "_search", lambda *_: {n: value[n.rpartition(".")[2]] for n in names})
    adapter.calibrate(model, [])
    order = ["v", "q", "k", "up", "down", "o"]  # of equals that which stands first in the block
    kept = [n for n in names if n.rpartition(".")[2] in order[:each]]
    assert adapter.plan["kept"] == kept and len(kept) == each * len(model.family.blocks())
    shared = sum(isinstance(m, Borrowed) for m in adapter.modules())
    assert shared == len(names) - len(kept)


def test_counts() -> None:
    model = zoo.load("vit-b16", pretrained=False, num_classes=0, device="meta")
    for share, expected in ((False, 663_552), (True, 718_848)):
        adapter = zoo.adapter("diffora", share=share)
        adapter.plan = {"kept": [f"blocks.{i}.{n}" for i in range(12) for n in ("attn.v", "attn.o", "mlp.down")]}
        added = model.add_adapter(adapter, f"a{share}", activate=False)
        assert sum(p.numel() for p in added.parameters()) == expected
    relaxed = model.add_adapter(Relaxed(), activate=False)
    gates = [n for n, _ in relaxed.named_parameters() if n.endswith(".gate")]
    assert len(gates) == 72 and sum(p.numel() for p in relaxed.parameters()) == 8 * 165_888 + 72
    # before the choice: up and down (30,720 each) and one of the others (12,288) of each block, and all six pairs
    fresh: Any = model.add_adapter("diffora", activate=False)
    assert fresh.to_come() == 12 * (2 * 30_720 + 12_288) + 4 * 12_288 + 2 * 30_720


def test_a_shared_pair_is_one_for_its_kind() -> None:
    model = bare("swin")
    adapter = chosen(model, rho=0.5)
    pairs = {n for n, _ in adapter.named_parameters() if n.startswith("shared_")}
    kinds = {(p.role, p.dim_in, p.dim_out) for p in adapter.selected(model.points)}
    borrowed = [m for m in adapter.modules() if isinstance(m, Borrowed)]
    assert 0 < len(pairs) // 2 <= len(kinds) and len(borrowed) >= len(pairs) // 2
    shake(model, "diffora")
    torch.testing.assert_close(model.merge().eval()(images()), model.eval()(images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "data", "error", "match"),
    [
        ({}, [], DataError, "no batch to search with"),
        ({}, [batch(1)], DataError, "one batch, and the search needs two halves"),
        ({}, [batch(1), (images() * float("nan"), targets())], DataError, "of step 3 of the search are NaN"),
        ({}, [(images(), targets() + 3)] * 2, DataError, "run from 3 to 6; the head has 5"),
        ({"rho": 0.01}, [batch(1)] * 2, ConfigError, "6 targets at most: none would be kept. Expected 0.0833"),
        ({"gate_lr": 1e-30, "gate_decay": 0.0, "search_lr": 1e-38}, [batch(1)] * 2, ConfigError, "nothing says which"),
    ],
)
def test_a_search_that_fails_leaves_the_model_as_it_was(settings: Any, data: Any, error: type, match: str) -> None:
    """Also what an earlier choice had learned, who is trained, and the gradients."""
    model = bare("vit")
    adapter = chosen(model, rho=0.5)
    shake(model, "diffora")
    lora = model.add_adapter("lora")
    model.set_active("diffora", "lora", train="lora")
    for name, value in {**SMALL, **settings}.items():
        setattr(adapter, name, value)
    plan, values = copy.deepcopy(adapter.plan), {k: v.clone() for k, v in model.state_dict().items()}
    trained = set(model.parameters_to_train())
    with pytest.raises(error, match=match):
        adapter.calibrate(model, data)
    assert adapter.plan == plan and model.active == ("diffora", "lora") and set(model.adapters) == {"diffora", "lora"}
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    assert set(model.parameters_to_train()) == trained and lora is model.adapters["lora"]


def test_head_and_backbone_are_as_before_the_search() -> None:
    model = bare("vit").to(torch.bfloat16)
    frozen, head = state(model), {k: v.clone() for k, v in model.head.state_dict().items()}
    before = model(images().bfloat16())
    adapter = chosen(model, [(x.bfloat16(), y) for x, y in (batch(1), batch(2))])
    assert torch.equal(model(images().bfloat16()), before)
    assert all(torch.equal(v, frozen[k]) for k, v in state(model).items())
    assert all(torch.equal(v, head[k]) for k, v in model.head.state_dict().items())
    assert len({*adapter.plan["gates"].values()}) > 1 and set(model.adapters) == {"diffora"}
    model.set_active()  # not in use: it is searched all the same
    adapter.calibrate(model, [(x.bfloat16(), y) for x, y in (batch(1), batch(2))])
    assert model.active == ()


@pytest.mark.parametrize(
    "settings",
    [{"rho": 1.5}, {"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"warmup": -1}, {"steps": 0}, {"search_lr": 0.0}],
)
def test_settings_without_a_meaning(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        zoo.adapter("diffora", **settings)


def test_a_choice_of_another_network_is_refused() -> None:
    plan = chosen(bare("vit"), rho=0.5).plan
    adapter: Any = zoo.adapter("diffora")
    adapter.plan = plan
    with pytest.raises(ConfigError, match="that are no targets on"):
        bare("vit", depth=1).add_adapter(adapter)
    adapter.plan = {"kept": "all"}
    with pytest.raises(ConfigError, match="damaged"):
        bare("vit").add_adapter(adapter)
