"""LT-SFT: the choice, two differences that add up, bad input, resuming. See also tests/fidelity/test_lt_sft_authors.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from method_models import attach, bare, images, shake, state, targets
from torch import Tensor

import zoo
from zoo.adapters.parts.entries import Entries
from zoo.errors import ConfigError, DataError, MismatchError


def batch(seed: int) -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed)), targets()


def add(model: zoo.Model, name: str, seed: int, **options: Any) -> Any:
    settings = {"entries": 500, "full_epochs": 2, **options}
    adapter = model.add_adapter(zoo.adapter("lt-sft", **settings), name, activate=False)
    model.set_active(name)
    adapter.calibrate(model, [batch(seed)])
    shake(model, name, seed)
    return adapter


def difference(model: zoo.Model, *names: str) -> dict[str, Tensor]:
    """What is added to the backbone's weights while these are in use, from the merged network."""
    model.set_active(*names)
    merged, frozen = model.merge().state_dict(), state(model)
    return {key: merged[key] - value for key, value in frozen.items()}


def test_differences_of_a_domain_and_a_task_add_up_and_are_swapped() -> None:
    model = bare("vit").eval()
    frozen = state(model)
    for seed, name in enumerate(("here", "there", "task"), 10):
        add(model, name, seed)
    alone = {name: difference(model, name) for name in ("here", "there", "task")}
    for delta in alone.values():
        assert sum(int(d.count_nonzero()) for d in delta.values()) == 500
    for domain in ("here", "there", "here"):
        model.set_active(domain, "task")
        plain = copy.deepcopy(model.backbone)
        plain.load_state_dict({k: v + alone[domain][k] + alone["task"][k] for k, v in frozen.items()})
        both = difference(model, domain, "task")
        shared = [k for k in both if (alone[domain][k].bool() & alone["task"][k].bool()).any()]
        assert shared  # some entries are in both, and are added
        for key, value in both.items():
            torch.testing.assert_close(value, alone[domain][key] + alone["task"][key], rtol=0, atol=1e-7)
        with torch.no_grad():
            torch.testing.assert_close(model.head(plain(images())), model(images()), rtol=1e-5, atol=1e-5)
    model.set_active()
    assert all(torch.equal(value, frozen[key]) for key, value in state(model).items())  # no error piles up


def test_a_task_is_tuned_on_top_of_its_domain() -> None:
    """Phase 1 moves the weights under the domain's difference, and the domain stays; without it other entries are chosen."""
    model = bare("vit")
    domain = add(model, "domain", 10)
    before = {k: v.clone() for k, v in domain.state_dict().items()}
    added = model.add_adapter(zoo.adapter("lt-sft", entries=500, full_epochs=2), "task", activate=False)
    model.set_active("domain", "task", train="task")
    added.calibrate(model, [batch(12)])
    assert {n.partition("/")[0] for n in model.parameters_to_train()} == {"task", "head"}
    assert all(torch.equal(v, before[k]) for k, v in domain.state_dict().items())
    over = {k: v for k, v in added.state_dict().items() if k.endswith("_index")}
    lone = model.add_adapter(zoo.adapter("lt-sft", entries=500, full_epochs=2), "lone", activate=False)
    model.set_active("lone")
    lone.calibrate(model, [batch(12)])
    assert any(len(v) != len(w) or not torch.equal(v, w) for v, w in zip(over.values(), lone.buffers()))


def test_exactly_k_even_where_entries_tie() -> None:
    """One step of Adam moves nearly all entries by the learning rate; K of them are taken, and nothing else can move."""
    model = bare("vit")
    adapter = model.add_adapter(zoo.adapter("lt-sft", entries=333, full_epochs=1))
    adapter.calibrate(model, [batch(10)])
    assert model.num_parameters(trainable=True, head=False) == 333
    optimizer = torch.optim.AdamW(model.parameters_to_train().values(), lr=0.01, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model.train()(images()), targets()).backward()
        optimizer.step()
    assert sum(int(d.count_nonzero()) for d in difference(model.eval(), "lt-sft").values()) == 333
    for module in adapter.modules():
        if isinstance(module, Entries) and module.weight_index is not None:
            assert len(module.weight_index.unique()) == len(module.weight_index)


@pytest.mark.parametrize(
    ("settings", "data", "error", "match"),
    [
        ({"proportion": 1e-9}, [batch(1)], ConfigError, "proportion=1e-09 is 0 of the"),
        ({"proportion": 1.0}, [batch(1)], ConfigError, "Expected 1 to"),
        ({"entries": 10**7}, [batch(1)], ConfigError, "entries=10,000,000 is 10,000,000 of"),
        ({"full_lr": 1e-30, "entries": 20_000}, [batch(1)], ConfigError, r"entries moved in 5 steps .* 20,000 are"),
        ({}, [], DataError, "no batch to tune with"),
        ({}, [(images() * float("nan"), targets())], DataError, "step 1 of full fine-tuning are NaN"),
        ({}, [(images(), targets() + 3)], DataError, "run from 3 to 6; the head has 5"),
    ],
)
def test_a_failure_leaves_the_model_as_it_was(settings: Any, data: Any, error: type, match: str) -> None:
    model = bare("vit", depth=1)
    adapter = model.add_adapter(
        zoo.adapter("lt-sft", **{"entries": 500 if "proportion" not in settings else None, **settings})
    )
    frozen, head = state(model), {k: v.clone() for k, v in model.head.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(error, match=match):
        adapter.calibrate(model, data)
    assert adapter.plan is None and not list(adapter.parameters())
    assert all(torch.equal(v, frozen[k]) for k, v in state(model).items())
    assert all(torch.equal(v, head[k]) for k, v in model.head.state_dict().items())
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    "settings", [{"proportion": 0.0}, {"entries": 0}, {"full_epochs": 0}, {"full_lr": 0.0}, {"l1": -1.0}]
)
def test_settings_without_a_meaning(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        zoo.adapter("lt-sft", **settings)


def test_a_mask_of_another_network_is_refused() -> None:
    model = bare("vit")
    attach(model, "lt-sft")
    other = bare("vit", depth=1)
    adapter = zoo.adapter("lt-sft")
    adapter.plan = copy.deepcopy(model.adapters["lt-sft"].plan)
    with pytest.raises(ConfigError, match=r"of 'lt-sft' names .* parameters that"):
        other.add_adapter(adapter)
    add(model, "b", 12)
    with pytest.raises(MismatchError, match="do not go together"):
        model.adapter_state("lt-sft") + model.adapter_state("b")


def test_half_precision_moves_in_float32() -> None:
    """Steps of 5e-5 are below the spacing of bfloat16 for most weights; phase 1 is on wide copies, and gives the start back."""
    model = bare("vit", depth=1).to(torch.bfloat16)
    frozen = state(model)
    adapter = model.add_adapter(zoo.adapter("lt-sft", entries=2000, full_epochs=1))
    adapter.calibrate(model, [(images().bfloat16(), targets())])
    assert all(torch.equal(v, frozen[k]) for k, v in state(model).items())
    assert model.num_parameters(trainable=True, head=False) == 2000
