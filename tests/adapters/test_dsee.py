"""DSEE: entries beside the low rank, coefficients, what is pruned, bad input. See also tests/fidelity/test_dsee_authors.py."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from method_models import attach, bare, images, loss_of, shake, targets

import zoo
from zoo.adapters.dsee import DSEE
from zoo.adapters.parts.lowest import lowest
from zoo.errors import ConfigError, MergeError, MismatchError

SMALL: dict[str, Any] = {"rank": 2, "entries": 5, "rounds": 3}


def tuned(**options: Any) -> zoo.Model:
    model = bare("vit").eval()
    model.add_adapter(DSEE(**{**SMALL, **options}))
    shake(model, "dsee")
    return model


def test_by_hand() -> None:
    """Dense B A + S in the place of the sparse sums."""
    model = tuned()
    plain, adapter = copy.deepcopy(bare("vit").backbone), model.adapters["dsee"]
    with torch.no_grad():
        for i, block in enumerate(plain.blocks):  # type: ignore[union-attr,arg-type]
            for k, role in ((0, "q"), (2, "v")):
                part: Any = adapter.module_at(f"blocks.{i}.attn.{role}")  # type: ignore[operator]
                dense = part.lora_b @ part.lora_a
                for place, value in zip(part.entry_index.tolist(), part.entry_value.tolist()):
                    dense[place // 48, place % 48] += value
                block.attn.qkv.weight[48 * k : 48 * (k + 1)] += 32 / 2 * dense
        torch.testing.assert_close(model.head(plain(images())), model(images()), rtol=1e-4, atol=1e-4)
    assert model.num_parameters(trainable=True, head=False) == 2 * 2 * (2 * 96 + 5)


def test_places_are_the_same_again_and_come_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned()
    model.save_adapter(tmp_path)

    def found(other: zoo.Model) -> dict[str, list[int]]:
        return {n: p.entry_index.tolist() for n, p in other.adapters["dsee"].parts().items()}  # type: ignore[operator]

    assert found(tuned()) == found(model) != found(tuned(seed=1))
    for how in ("magnitude", "random"):
        other = tuned(places=how)
        assert found(other) == found(tuned(places=how)) != found(model)
        weight = other.points["blocks.0.attn.v"].weight.abs().flatten()
        assert (sorted(weight.topk(5).indices.tolist()) == found(other)["blocks.0.attn.v"]) == (how == "magnitude")
    torch.manual_seed(0)  # the same random backbone
    monkeypatch.setattr("zoo.adapters.dsee.outliers", None)  # nothing is decomposed when it is loaded
    again = zoo.load(adapter=tmp_path, pretrained=False)
    assert torch.equal(again.eval()(images()), model(images())) and found(again) == found(model)


def test_lowest() -> None:
    scores = {"a": torch.tensor([[3.0, 1.0], [2.0, 2.0]]), "b": torch.tensor([2.0, 0.0, 9.0, 4.0])}
    for share, gone in ((0.0, 0), (0.1, 1), (0.5, 4), (0.6, 5)):  # 2 ties with 2 and 2
        masks = lowest(scores, share)
        assert sum(int((~m).sum()) for m in masks.values()) == gone == round(share * 8)
    assert lowest(scores, 0.5)["a"].tolist() == [[True, False], [False, False]]
    assert lowest(scores, 0.5)["b"].tolist() == [True, False, True, True]


def test_a_sparse_backbone_keeps_its_zeros() -> None:
    model = tuned()
    adapter: Any = model.adapters["dsee"]
    masks = adapter.masks(model, 0.4, 0.3)
    for names, share in ((set(adapter.parts()), 0.4), (set(masks) - set(adapter.parts()), 0.3)):
        zeros = sum(int((~masks[n]).sum()) for n in names)
        assert zeros == round(share * sum(masks[n].numel() for n in names))
    assert len(masks) == 12
    sparse = zoo.sparsify(model, masks=masks)
    assert sparse.active == ("dsee",)
    with sparse.disable(), model.disable():
        assert not torch.equal(sparse(images()), model(images()))
    before = {k: v.clone() for k, v in sparse.backbone.state_dict().items()}
    optimizer = torch.optim.AdamW(sparse.parameters_to_train().values(), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(sparse.train()).backward()
        optimizer.step()
    for name, mask in masks.items():
        assert not bool((sparse.points[name].weight * ~mask).any())
    assert all(torch.equal(v, before[k]) for k, v in sparse.backbone.state_dict().items())
    with pytest.raises(MergeError, match=r"'dsee' cannot be merged: the weight of 'blocks\.0\.attn\.q' is sparse"):
        sparse.merge()


@pytest.mark.parametrize("coefficients", [False, True])
def test_a_smaller_backbone(coefficients: bool, tmp_path: Path) -> None:
    """Exact: the entries in rows that stay are at their new places, those in others are gone; and it loads again by name."""
    model = tuned(coefficients=coefficients, entries=300)
    adapter: Any = model.adapters["dsee"]
    heads = adapter.heads(model, 1 / 3)
    assert {b: len(h) for b, h in heads.items()} == {"blocks.0": 1, "blocks.1": 1}
    neurons = adapter.neurons(model, 0.5) if coefficients else None
    small = zoo.prune(model, heads=heads, neurons=neurons)  # proves by a run that it computes the same
    after: Any = small.adapters["dsee"]
    for name, part in adapter.parts().items():
        gone = heads[name.rpartition(".attn")[0]][0]
        kept = [i for i in range(48) if not 16 * gone <= i < 16 * gone + 16]
        torch.testing.assert_close(after.module_at(name).update(), part.update()[kept])
        assert len(after.module_at(name).entry_value) < 300
    zoo.save_backbone(small, tmp_path / "small")
    small.save_adapter(tmp_path / "adapter")
    again = zoo.load(str(tmp_path / "small"), tmp_path / "adapter").eval()
    assert torch.equal(again(images()), small.eval()(images()))
    torch.testing.assert_close(small.merge()(images()), small(images()), rtol=1e-4, atol=1e-4)
    smaller = zoo.prune(small, heads=after.heads(small, 0.5))
    assert smaller.train().probe(images()) == []


def test_entries_that_are_all_gone() -> None:
    model = tuned(entries=2)
    adapter: Any = model.adapters["dsee"]
    part = adapter.module_at("blocks.1.attn.q")
    part.entry_index.copy_(torch.tensor([16 * 48, 20 * 48 + 3], dtype=torch.int32))  # both of the second head
    small = zoo.prune(model, heads={1: [1]})
    assert small.adapters["dsee"].module_at("blocks.1.attn.q").entry_value is None  # type: ignore[operator]
    assert small.adapters["dsee"].plan["entries"]["blocks.1.attn.q"] == 0  # type: ignore[index]
    assert small.train().probe(images()) == []


def test_coefficients_learn_and_are_drawn_to_zero() -> None:
    model = tuned(coefficients=True, l1=0.5)
    adapter: Any = model.adapters["dsee"]
    gates = [g.gate for g in adapter.gates().values()]
    assert [len(g) for g in gates] == [3, 192, 3, 192]
    extra = adapter.extra_loss(model, None, None)
    torch.testing.assert_close(extra, 0.5 * sum(g.abs().sum() for g in gates))
    extra.backward()
    assert all(torch.equal(g.grad, 0.5 * g.sign()) for g in gates)
    with torch.no_grad():
        gates[0].copy_(torch.tensor([0.5, -0.1, 2.0]))
    assert adapter.heads(model, 0.4)["blocks.0"] == [1]  # by magnitude
    adapter.requires_grad_(False)
    assert adapter.extra_loss(model, None, None) is None


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"entries": 0}, "entries is 0"),
        ({"rounds": 0}, "rounds is 0"),
        ({"alpha": 0.0}, "alpha is 0"),
        ({"l1": -1.0}, "l1 is -1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_without_a_meaning(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        DSEE(**settings)


def test_bad_input() -> None:
    model = bare("vit")
    for settings, match in (
        ({"entries": 48 * 48 + 1}, r"entries is 2,305, and 'blocks\.0\.attn\.q' has 2,304"),
        ({"coefficients": True, "targets": "o"}, r"'blocks\.0\.attn\.o' has coefficients on its input"),
    ):
        with pytest.raises(ConfigError, match=match):
            model.add_adapter(DSEE(**{**SMALL, **settings}))
    adapter: Any = model.add_adapter(DSEE(**SMALL))
    for call, match in (
        (lambda: adapter.masks(model), "its change is 0 everywhere"),
        (lambda: adapter.heads(model), "its change is 0 everywhere"),
        (lambda: adapter.neurons(model), "attach it with coefficients=True"),
        (lambda: adapter.masks(model, 1.0), "sparsity is 1.0"),
        (lambda: adapter.masks(model, "1"), "sparsity is '1'; expected a number"),
        (lambda: adapter.masks(model, 0.5, -0.1), "others is -0.1"),
        (lambda: adapter.masks(model, 0.0, 0.0), "nothing would be pruned"),
        (lambda: adapter.masks(model, by="size"), "by is 'size'"),
    ):
        with pytest.raises(ConfigError, match=match):
            call()
    shake(model, "dsee")
    for share, match in ((0.0, "share is 0"), (1.0, "share is 1"), (0.3, "takes no head out of any block")):
        with pytest.raises(ConfigError, match=match):
            adapter.heads(model, share)
    assert adapter.masks(model, 0.0, 0.5, by="update").keys().isdisjoint(adapter.parts())


def test_a_plan_of_another_network_is_refused(tmp_path: Path) -> None:
    model = tuned()
    other = bare("vit", depth=1)
    adapter = DSEE(**SMALL)
    adapter.plan = copy.deepcopy(model.adapters["dsee"].plan)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"other targets than .* \('blocks\.1\.attn\.q'\)"):
        other.add_adapter(adapter)
    adapter.plan = {"entries": {"blocks.0.attn.q": "many"}}
    with pytest.raises(ConfigError, match="plan of 'dsee' is damaged"):
        other.add_adapter(adapter)
    state = dict(model.adapters["dsee"].state_dict())
    state["blocks.0.attn.q.entry_index"] = torch.full((5,), 48 * 48, dtype=torch.int32)
    with pytest.raises(MismatchError, match=r"entry_index' points outside of the 2,304 weights"):
        model.adapters["dsee"].load_state_dict(state)


def test_on_int8_weights() -> None:
    """The change needs no weight; only the places do, once."""
    model = zoo.quantise(bare("vit"))
    attach(model, "dsee")
    shake(model, "dsee")
    torch.nn.functional.cross_entropy(model.train()(images()), targets()).backward()
    assert all(p.grad is not None for p in model.adapters["dsee"].parameters())
