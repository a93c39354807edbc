"""Methods on VL-T5 and VL-BART, and prefixes and prompts against the formulas."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from sampled import lots
from seq2seq_models import ALL, FAMILIES, stir, straight, twin

import zoo
from zoo.errors import AttachError, ConfigError
from zoo.table import tiny_model

# -- methods -------------------------------------------------------------------------------------------------------------


NAMED = ("full", "bitfit", "norm", "lora", "adapter", "prefix", "ssf", "ia3", "vpt")


@pytest.mark.parametrize(("family", "methods"), lots(FAMILIES, zoo.list_adapters(), NAMED))
def test_compatibility(family: str, methods: list[str]) -> None:
    cells = {c.method: c for c in zoo.compatibility([family], methods)}
    for method in NAMED:
        cell = cells[method]
        assert (cell.attach, cell.train, cell.save) == ("yes", "yes", "yes"), cell
    assert not [c for c in cells.values() for step in c.as_dict().values() if str(step).startswith("defect")]
    merged = {m for m, c in cells.items() if c.merge == "yes"}
    assert {"full", "bitfit", "norm", "lora", "ia3"} <= merged
    assert ("ssf" in merged) == (family == "vl-bart")  # T5 has no shift that SSF's could be put into


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "adapter",
    [
        ALL,
        zoo.adapter("adapter", form="houlsby", rank=4),
        zoo.adapter("adapter", form="adaptformer", rank=4),
        zoo.adapter("adapter", form="parallel", rank=4),
    ],
    ids=lambda a: getattr(a, "form", a.method),
)
def test_identity_at_the_start_nothing_dead_and_removal(family: str, adapter: Any) -> None:
    model, batch = tiny_model(family)
    before, bare = copy.deepcopy(model.backbone.state_dict()), model(*batch)
    model.add_adapter(adapter, "a")
    assert torch.equal(model.eval()(*batch), bare)
    assert model.probe(*batch) == []
    stir(model)
    assert not torch.allclose(model(*batch), bare)
    model.remove_adapter("a")
    assert torch.equal(model(*batch), bare)
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sequential_adapter_stands_in_front_of_the_residual_sum(family: str) -> None:
    """`y <- y + A(y)` on what a sublayer gives: here by changing the output projection, which for a linear A is the same."""
    model, batch = tiny_model(family)
    model.add_adapter(
        zoo.adapter("adapter", form="houlsby", rank=4, activation="none", targets="decoder.blocks.1.cross")
    )
    stir(model)
    expected = straight(model)
    part = model.adapters["adapter"].get_submodule("decoder.blocks.1.cross")
    change = torch.eye(32) + part.adapter_up.weight.detach() @ part.adapter_down.weight.detach()
    path = model.points["decoder.blocks.1.cross.o"].path
    state = expected.state
    old = state.get(f"{path}.bias", torch.zeros(32))
    state[f"{path}.weight"] = change @ state[f"{path}.weight"]
    shift = part.adapter_up.weight @ part.adapter_down.bias + part.adapter_up.bias
    state[f"{path}.bias"] = change @ old + shift.detach()
    torch.testing.assert_close(model(*batch), expected(*batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_merges_saves_and_serves_samples(family: str, tmp_path: Path) -> None:
    model, batch = tiny_model(family)
    model.add_adapter(ALL, "one")
    stir(model)
    torch.testing.assert_close(model.family.run(model.merge(), *batch), model(*batch), rtol=1e-5, atol=1e-5)
    again, _ = tiny_model(family)
    zoo.disk.attach(again, zoo.disk.read(model.save_adapter(tmp_path / "a")))
    assert torch.equal(again.eval()(*batch), model(*batch))

    bare = model.backbone(batch[0], batch[1], batch[2], visual_features=batch[3], boxes=batch[4])
    assert not torch.equal(bare.logits[0], twin(model)(*batch[:3]).logits[0])
    model.add_adapter("prefix", "two", activate=False)
    alone = []
    for name, row in (("two", 0), ("one", 1)):
        model.set_active(name)
        alone.append(model(*batch)[row])
    torch.testing.assert_close(model(*batch, adapters=["two", "one"]), torch.stack(alone), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="a row for each sample"):
        model(*batch, torch.zeros(5, dtype=torch.long), adapters=["two", "one"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{"dora": True}, {"rslora": True, "rank": 4}, {"targets": "all-linear"}], ids=str)
def test_forms_of_lora(family: str, options: dict[str, Any]) -> None:
    model, batch = tiny_model(family)
    bare = model(*batch)
    model.add_adapter(zoo.adapter("lora", **options))
    torch.testing.assert_close(model.eval()(*batch), bare, rtol=1e-5, atol=1e-5)
    assert model.probe(*batch) == []
    stir(model, 0.1)
    torch.testing.assert_close(model.family.run(model.merge(), *batch), model(*batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "adapter", "prefix"])
def test_memory_settings_give_the_same_gradients(family: str, method: str) -> None:
    found = []
    for memory in ("default", "low", "min"):
        model, batch = tiny_model(family)
        torch.manual_seed(0)
        model.add_adapter(method)
        stir(model)
        model.memory = memory
        (model.train()(*batch) - 1).square().mean().backward()
        found.append({k: p.grad for k, p in model.parameters_to_train().items()})
    for other in found[1:]:
        for key, gradient in found[0].items():
            torch.testing.assert_close(other[key], gradient, rtol=1e-5, atol=1e-6)


# -- prefixes and prompts against the formulas ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_prefixes_have_no_position_and_no_mask(family: str) -> None:
    model, batch = tiny_model(family)
    model.add_adapter(zoo.adapter("prefix", num_tokens=3))
    assert model.probe(*batch) == []
    stir(model, 1.0)
    prefix = {}
    for point in model.points.select(kind="attention"):
        part = model.adapters["prefix"].module_at(point)
        prefix[point.path] = (part.keys.detach(), part.values.detach())
    assert len(prefix) == 2 + 2 * 2
    torch.testing.assert_close(model(*batch), straight(model, prefix=prefix)(*batch), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(*batch[:3]), straight(model, prefix=prefix)(*batch[:3]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["deep", "flow", "stay"])
def test_prompts_stand_in_front_of_the_text(family: str, form: str) -> None:
    model, batch = tiny_model(family)
    pool = "all" if form == "stay" else "patches"
    adapter = model.add_adapter(zoo.adapter("vpt", num_tokens=3, deep=form == "deep", pool=pool))
    assert model.probe(*batch) == []
    stir(model, 0.5)
    prompts = [p.detach() for p in adapter.parameters()]
    assert len(prompts) == (2 if form == "deep" else 1)
    other = straight(model, prompts=prompts, flow=form != "deep", stay=form == "stay")
    torch.testing.assert_close(model(*batch), other(*batch), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(*batch[:3]), other(*batch[:3]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_one_block_cannot_stay(family: str) -> None:
    model, _ = tiny_model(family)
    with pytest.raises(AttachError, match="deep=False"):
        model.add_adapter(zoo.adapter("vpt", pool="all"))
    assert not model.adapters


# -- releases of transformers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_an_attention_takes_its_cache_under_both_names(family: str, name: str) -> None:
    """transformers 5.24 calls the argument `cache`, older releases `past_key_values`."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    model, _ = tiny_model(family)
    model.add_adapter(zoo.adapter("prefix", num_tokens=3, targets="decoder.blocks.*.*.product"))
    stir(model)
    attention = model.points["decoder.blocks.0.attn.product"].module
    words = torch.randn(1, 4, 32)
    hidden = "mask" if family == "vl-t5" else "attention_mask"
    seen = {hidden: torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()}
    with torch.no_grad():
        whole = attention(words, **seen)[0]
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        steps = [attention(words[:, i : i + 1], **{name: cache})[0] for i in range(4)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_network_takes_its_cache_under_both_names(family: str, name: str) -> None:
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    model, batch = tiny_model(family)
    words = torch.tensor([[0, 7, 3, 5], [0, 9, 2, 4]])
    visual = dict(zip(("visual_features", "boxes"), batch[3:], strict=False))
    network = model.backbone.eval()
    with torch.no_grad():
        whole = network(batch[0], decoder_input_ids=words, **visual).logits
        held = EncoderDecoderCache(DynamicCache(), DynamicCache())
        steps = [
            network(batch[0], decoder_input_ids=words[:, i : i + 1], use_cache=True, **{name: held}, **visual).logits
            for i in range(4)
        ]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_the_name_of_the_cache_is_read_off_the_signature() -> None:
    from multimodal.families.seq2seq.releases import cache_name

    assert cache_name(lambda hidden_states, cache=None: None) == "cache"
    assert cache_name(lambda hidden_states, past_key_values=None: None) == "past_key_values"
    assert (
        cache_name(lambda hidden_states, past_key_value=None: None) is None
    )  # of the releases before caches were objects
