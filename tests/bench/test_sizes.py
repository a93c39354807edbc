"""Methods made as large as a budget."""

from __future__ import annotations

from typing import Any

import pytest

import zoo
from zoo import registry
from zoo.adapters.base import Adapter
from zoo.bench.sizes import Method, parse_budget, parse_methods, sized
from zoo.errors import ConfigError

TINY = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
}  # sizes of a ViT that counts quickly


def plan(methods: str, budget: int) -> Any:
    return sized("vit-s16", parse_methods(methods), budget, 3, **TINY)


def count(method: str, **settings: Any) -> int:
    adapter = zoo.adapter(method, **settings)
    model = zoo.load("vit-s16", adapter, num_classes=0, pretrained=False, device="meta", **TINY)
    return model.num_parameters(trainable=True)


@pytest.mark.parametrize(("text", "value"), [("0.05M", 50_000), ("50k", 50_000), ("50000", 50_000), (" .5m ", 500_000)])
def test_budgets_as_people_write_them(text: str, value: int) -> None:
    assert parse_budget(text) == value


@pytest.mark.parametrize("text", ["", "many", "-5", "0", "1e5x", "5G"])
def test_budgets_that_are_none(text: str) -> None:
    with pytest.raises(zoo.ZooError, match="expected a number of parameters"):
        parse_budget(text)


def test_methods_as_people_write_them() -> None:
    assert parse_methods("lora, spt:form=adapter;rank=4") == [
        Method("lora", "lora"),
        Method("spt:form=adapter;rank=4", "spt", {"form": "adapter", "rank": 4}),
    ]
    assert [m.name for m in parse_methods("all")] == zoo.list_adapters()
    with pytest.raises(zoo.ZooError, match="lora"):
        parse_methods("lorra")
    for text, said in (("lora,lora", "named twice"), ("lora:rank", "is no setting"), (" , ", "No method")):
        with pytest.raises(zoo.ZooError, match=said):
            parse_methods(text)


@pytest.mark.parametrize(
    ("method", "setting"), [("lora", "rank"), ("vpt", "num_tokens"), ("adapter", "rank"), ("prefix", "num_tokens")]
)
def test_the_largest_that_fits(method: str, setting: str) -> None:
    """One more of the setting would be above the budget; counted apart from the solver."""
    (found,) = plan(method, 5_000).chosen
    size = found.settings[setting]
    assert found.parameters == count(method, **found.settings) <= 5_000 < count(method, **{setting: size + 1})


def test_sizes_that_a_method_refuses_are_stepped_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compacter's width is a multiple of n: the solver finds the largest multiple that fits."""
    (found,) = plan("compacter", 3_000).chosen
    width = found.settings["bottleneck"]
    assert width % 4 == 0 and count("compacter", bottleneck=width + 4) > 3_000 >= found.parameters


def test_adalora_counts_what_it_trains_at_first() -> None:
    (found,) = plan("adalora", 5_000).chosen
    assert found.settings["rank"] > found.settings["target_rank"] and found.parameters == count(
        "adalora", **found.settings
    )


def test_increlora_counts_what_it_has_in_the_end() -> None:
    """If all projections grow alike: the triplets of the average rank."""
    (found,) = plan("increlora", 5_000).chosen
    rank = found.settings["target_rank"]
    assert found.parameters == count("increlora") * rank <= 5_000 < count("increlora") * (rank + 1)


def test_what_has_no_size_is_taken_as_it_is_or_left_out_with_the_reason() -> None:
    found = plan("bitfit,linear,full,coop,lora:rank=2", 5_000)
    assert {c.label: c.note for c in found.chosen} == {
        "bitfit": "has no size to set",
        "linear": "has no size to set",
        "lora:rank=2": "its size is given",
    }
    assert "no size to set" in found.left_out["full"] and "more than the budget of 5,000" in found.left_out["full"]
    assert "text tower" in found.left_out["coop"]
    assert [c.parameters for c in found.chosen if c.label == "linear"] == [0]


def test_what_takes_a_budget_is_given_it() -> None:
    (found,) = plan("spt", 5_000).chosen
    assert found.settings == {"budget": 0.005} and found.parameters == 5_000


def test_entries_that_are_chosen_on_the_data_are_counted_beforehand() -> None:
    (found,) = plan("lt-sft", 5_900).chosen
    assert found.settings == {"entries": 5_000} and found.parameters == 5_000


def test_budgets_that_no_method_can_meet() -> None:
    with pytest.raises(ConfigError, match=r"below the cheapest unit .* 'lora' trains 384 at least"):
        plan("lora,full", 100)  # rank 1 on q and v of two blocks: 2 * 2 * (48 + 48)
    with pytest.raises(ConfigError, match="above the whole"):
        plan("lora", 10_000_000)
    assert "rank=1" in plan("lora,linear,vpt", 150).left_out["lora"]  # one token of VPT: 96


def test_every_method_says_how_it_grows() -> None:
    """Settings that it has; a method whose size stands in a setting must not be compared at its default in silence."""
    for name in zoo.list_adapters():
        cls: type[Adapter] = registry.adapter_class(name)
        more = cls.of_size(2)
        if more is not None:
            assert set(more) <= set(registry.adapter(name).config()), name
