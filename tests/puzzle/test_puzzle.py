"""The regime `puzzle`: children, scores, costs, the choice and the network, on a tiny ViT, a Swin and a language model."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from method_models import bare
from PIL import Image
from train_parts import easy_data, tiny_model

import zoo
from multimodal.data.questions import Question, open_questions
from zoo import registry
from zoo.errors import ConfigError, DataError, WeightsError
from zoo.model.children import child_of, substitute
from zoo.puzzle.costs import RESOURCES, cache_mib, costs_of, fastest, totals
from zoo.puzzle.importance import Channels, heads_of
from zoo.puzzle.library import Batches, forms_of, orders, train_block
from zoo.puzzle.passes import call_of, distance, replaced, seen
from zoo.tasks import Classify

SETTINGS: dict[str, Any] = {
    "parameters": 0.6,
    "heads": (0.5,),
    "neurons": (0.5, 0.1),
    "local_steps": 6,
    "local_lr": 1e-2,
    "epochs": 2,
    "batch_size": 8,
    "repeats": 2,
    "scored": 16,
    "calibration": 2,
}
FIT: dict[str, Any] = {"progress": False}


def data(seed: int = 0, count: int = 24) -> Any:
    return zoo.open_dataset(easy_data(count, seed), classes=list("abcd"))


def parent(num_classes: int = 4) -> zoo.Model:
    """Weights of a size at which blocks do something."""
    model = tiny_model(None, num_classes=num_classes)
    with torch.no_grad():
        for name, value in model.backbone.named_parameters():
            if name.startswith("blocks") and value.ndim == 2:
                value.mul_(8)
    return model


def go(out: Path, model: Any = None, test: Any = None, **options: Any) -> Any:
    return zoo.run(model or parent(), "puzzle", data(), test, out=out, fit=FIT, **{**SETTINGS, **options})


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    out, model = tmp_path_factory.mktemp("puzzle"), parent()
    return go(out, model, data(1)), model, out


def test_the_network_and_its_parent(found: tuple[Any, Any, Path]) -> None:
    """The parent is as it was; the network is within the budget, in a folder, with its head, and adapted like any other."""
    report, model, out = found
    fresh = parent()
    assert model.fingerprint == fresh.fingerprint and not model.adapters
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
    network = zoo.load(out / "backbone", out / "head").eval()
    assert report.model.fingerprint == network.fingerprint and report.model is not model
    share = network.num_parameters() / model.num_parameters()
    assert share == pytest.approx(report.summary["parameters"]) and share <= 0.6
    assert report.summary["added_up"]["parameters"] == pytest.approx(share)
    assert report.summary["added_up"]["operations"] == pytest.approx(report.summary["operations"])
    assert zoo.evaluate(network, data(1), progress=False)["loss"] == pytest.approx(
        report.summary["network_loss"], rel=1e-5
    )
    assert zoo.evaluate(model, data(1), progress=False)["loss"] == pytest.approx(
        report.summary["parent_loss"], rel=1e-5
    )
    adapted = zoo.load(out / "backbone", "lora", num_classes=3)
    assert adapted.train().probe(torch.randn(2, 3, 8, 8)) == []
    assert (out / "report.png").stat().st_size > 5000 and "| blocks.1 |" in (out / "report.md").read_text()
    history = report.values["imitation"]["history"]
    assert history[-1]["loss"] < history[0]["loss"] and report.phases == []
    assert not (out / "imitation").exists()


def test_scores_are_what_one_replacement_loses(found: tuple[Any, Any, Path]) -> None:
    """Measured again by hand, on a network in which only this child stands; the sum of the chosen is the choice's score."""
    report, model, out = found
    scores = report.values["scores"]
    batches = Batches(model, data(), Classify(), 8, 0, model.device, 0).first(16)
    from safetensors.torch import load_file

    for name, form in (("blocks.0.attn", "linear"), ("blocks.1.mlp", "10"), ("blocks.1.attn", "none")):
        block, _, role = name.rpartition(".")
        tensors = load_file(out / "library" / f"{block}.safetensors")
        own = {k.split("/")[2]: v for k, v in tensors.items() if k.startswith(f"{role}/{form}/")}
        network = substitute(model, {name: int(form) if form.isdigit() else form}, weights={name: own})
        with torch.no_grad():
            lost = [distance(network.features(x), model.features(x)) for x in batches]
        assert scores[name][form] == pytest.approx(float(torch.cat(lost).mean()), rel=1e-4, abs=1e-7)
    assert all(next(iter(row.values())) == 0 for row in scores.values())
    chosen = report.summary["chosen"]
    assert report.summary["score"] == pytest.approx(sum(scores[n][f] for n, f in chosen.items()))
    # no other choice within the budget loses less
    costs, whole = report.values["costs"], report.values["parent"]["parameters"]

    def parameters(forms: Any) -> float:
        pairs = list(zip(scores, forms, strict=True))
        return whole - sum(next(iter(costs[n].values()))["parameters"] - costs[n][f]["parameters"] for n, f in pairs)

    every = itertools.product(*(list(scores[n]) for n in scores))
    best = min(
        sum(scores[n][f] for n, f in zip(scores, forms, strict=True))
        for forms in every
        if parameters(forms) <= 0.6 * whole
    )
    assert report.summary["score"] == pytest.approx(best)


def test_children_learn_what_the_block_does(found: tuple[Any, Any, Path]) -> None:
    """Losses fall; that of nothing is |F x|^2 / |y|^2, and does not; the sublayer and its norm learn, and nothing else."""
    report, model, _ = found
    for block in ("blocks.0", "blocks.1"):
        for form, loss in report.values[f"library {block}"].items():
            assert loss["after"] == loss["before"] if form.endswith("none") else loss["after"] < loss["before"], form
    batches = Batches(model, data(), Classify(), 8, 0, model.device, 0)
    module = model.backbone.blocks[1]  # type: ignore[index,union-attr]
    call = call_of(model, module, batches.first(1)[0])
    x = call.args[0]
    with torch.no_grad():
        mlp = module.mlp(module.norm2(x + module.attn(module.norm1(x))))
    expected = float(mlp.square().mean() / call.output.square().mean())
    assert report.values["library blocks.1"]["mlp/none"]["before"] == pytest.approx(expected, rel=1e-3)
    forms = {"blocks.1.mlp": [96, 12], "blocks.1.attn": [2, "linear"]}
    tensors, _ = train_block(model, "blocks.1", forms, {}, batches, steps=2, lr=1e-2)
    assert {k.split("/")[2].split(".")[0] for k in tensors} == {"norm1", "attn", "norm2", "mlp"}
    child = child_of(model, "blocks.1.mlp", 12)
    assert not torch.equal(tensors["mlp/12/mlp.fc1.weight"], child.get_parameter("mlp.fc1.weight"))
    again, _ = train_block(model, "blocks.1", forms, {}, batches, steps=2, lr=1e-2)
    assert all(torch.equal(tensors[k], again[k]) for k in tensors)


@torch.no_grad()
def test_what_matters_most() -> None:
    """Each round takes out the channels without which the output changes least; heads in the order of what they add."""
    weight, batches = torch.randn(5, 6), [torch.randn(2, 3, 6) for _ in range(3)]
    channels, gone = Channels(weight, 3), []
    for x in batches:
        channels.see(x)
        cost = {}
        for c in set(range(6)) - set(gone):
            without = x.clone()
            without[..., [*gone, c]] = 0
            cost[c] = float(((x - without) @ weight.T).norm(dim=-1).mean())
        gone += sorted(cost, key=lambda c: cost[c])[:2]
    assert channels.order() == gone[::-1]
    model = parent()
    attention = model.backbone.blocks[0].attn  # type: ignore[index,union-attr]
    attention.proj.weight[:, :12] *= 0.01
    batches_of = Batches(model, data(), Classify(), 8, 0, model.device, 0).first(16)
    order = orders(model, ["blocks.0.attn", "blocks.0.mlp"], batches_of)
    assert order["blocks.0.attn"] == [1, 0] and sorted(order["blocks.0.mlp"]) == list(range(96))
    y = torch.randn(4, 24)
    by_hand = torch.stack(
        [(y[:, i : i + 12] @ attention.proj.weight[:, i : i + 12].T).norm(dim=1).mean() for i in (0, 12)]
    )
    torch.testing.assert_close(heads_of(y, attention.proj.weight, 12), by_hand)


@pytest.mark.parametrize("family", ["vit", "swin", "decoder"])
def test_costs_add_up(family: str) -> None:
    """Parameters, operations and bytes of a network are the parent's less what its children save, exactly."""
    if family == "decoder":
        name, sizes = registry.family("decoder").tiny  # type: ignore[misc]
        model = zoo.load(name, pretrained=False, seed=0, **sizes).eval()
        chosen: dict[str, Any] = {
            "blocks.0.attn": 1,
            "blocks.0.mlp": "linear",
            "blocks.1.attn": "none",
            "blocks.1.mlp": 24,
        }
    else:
        model = bare(family).eval()
        names = ("blocks.0", "blocks.1") if family == "vit" else ("stages.0.blocks.0", "stages.1.blocks.1")
        chosen = {
            f"{names[0]}.attn": "linear",
            f"{names[0]}.mlp": "none",
            f"{names[1]}.attn": 2,
            f"{names[1]}.mlp": "linear",
        }
    inputs = model.example_batch(2)
    more = (100, 3) if family == "decoder" else ()
    forms = {n: [f[0], chosen[n]] for n, f in forms_of(model, (), (), False, False).items() if n in chosen}
    costs = costs_of(model, forms, inputs, 1, *more)
    whole = totals(model, inputs, 1, *more)
    network = totals(substitute(model, chosen), inputs, 1, *more)
    for resource in ("parameters", "operations", "memory"):
        saved = sum(costs[n][str(f[0])][resource] - costs[n][str(f[1])][resource] for n, f in forms.items())
        assert network[resource] == pytest.approx(whole[resource] - saved, rel=1e-9), resource
    assert set(whole) == set(RESOURCES) and whole["runtime"] > 0


def test_cache_and_time() -> None:
    """LLaMA-3.1-8B's cache for 96 texts of 8,192 words in half precision: 3,072 MiB a block, 61,440 for 20 of them."""
    assert cache_mib(8, 128, 4096 + 4096, 96) == 3072
    assert 20 * cache_mib(8, 128, 8192, 96, 2) == 61440
    x = torch.randn(200, 200)
    times = fastest({"few": lambda: x @ x, "many": lambda: [x @ x for _ in range(20)]}, 5, torch.device("cpu"))
    assert times["many"] > 5 * times["few"] > 0


def test_forms() -> None:
    model = parent()
    forms = forms_of(model, (0.75, 0.5, 0.01), (0.5, 0.1), True, True)
    assert forms["blocks.0.attn"] == [2, 1, "linear", "none"]  # 0.75 of two heads is two, which is the parent's own
    assert forms["blocks.1.mlp"] == [96, 48, 10, "linear", "none"]
    changed = substitute(model, {"blocks.0.attn": "none"})
    assert "blocks.0.attn" not in forms_of(changed, (0.5,), (), True, True)  # it stays as it is
    name, sizes = registry.family("decoder").tiny  # type: ignore[misc]
    sizes = {**sizes, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6}
    decoder = zoo.load(name, pretrained=False, **sizes)
    assert forms_of(decoder, (0.7, 0.5, 0.2), (), False, False)["blocks.0.attn"] == [6, 3, 1]  # 4 does not divide 6


def test_replaced_leaves_no_trace() -> None:
    model, x = parent().eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        before = model.features(x)
        block = model.backbone.blocks[0]  # type: ignore[index,union-attr]
        with replaced(block, child_of(model, "blocks.0.attn", "none")):
            other = seen(model, x).final
        whole = substitute(model, {"blocks.0.attn": "none"}).features(x)
        assert torch.equal(other, whole) and torch.equal(model.features(x), before) and not block._forward_hooks  # type: ignore[arg-type]


# -- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["library", "imitation"])
def test_goes_on_where_it_was_killed(
    where: str, found: tuple[Any, Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second block's children, or in the second epoch of the imitation: the same network, to the bit."""
    import zoo.puzzle.imitate
    import zoo.regimes.puzzle

    whole, _, out = found
    calls, limit = [0], {"library": 1, "imitation": 5}[where]
    owner: Any = zoo.regimes.puzzle if where == "library" else zoo.puzzle.imitate.Imitate
    name = "train_block" if where == "library" else "loss"
    real = getattr(owner, name)

    def killed(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] > limit:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "run", test=data(1))
    state = json.loads((tmp_path / "run" / "state.json").read_text())["values"]
    assert ("library blocks.0" in state, "library blocks.1" in state) == (True, where == "imitation")
    report = go(tmp_path / "run", test=data(1))
    assert report.summary["chosen"] == whole.summary["chosen"] and report.values["scores"] == whole.values["scores"]
    for file in ("backbone/backbone.safetensors", "head/adapter_model.safetensors", "library/blocks.1.safetensors"):
        assert (tmp_path / "run" / file).read_bytes()[:64] == (out / file).read_bytes()[:64]
    one, other = zoo.load(out / "backbone"), zoo.load(tmp_path / "run" / "backbone")
    assert one.fingerprint == other.fingerprint
    assert report.summary["network_loss"] == whole.summary["network_loss"]


def test_library_of_another_run(found: tuple[Any, Any, Path], tmp_path: Path) -> None:
    """Another budget from the same children: nothing is trained again but the imitation."""
    report, _, out = found
    other = go(tmp_path / "other", parameters=0.45, epochs=0, library=str(out))
    assert other.values["scores"] == report.values["scores"] and other.summary["parameters"] <= 0.45
    assert other.summary["score"] > report.summary["score"]
    with pytest.raises(ConfigError, match="local_steps differ"):
        go(tmp_path / "wrong", local_steps=7, library=str(out))
    with pytest.raises(ConfigError, match="is no folder of a run"):
        go(tmp_path / "none", library=str(tmp_path / "nowhere"))
    shutil.copytree(out, tmp_path / "cut")
    state = json.loads((tmp_path / "cut" / "state.json").read_text())
    del state["values"]["scores"]
    (tmp_path / "cut" / "state.json").write_text(json.dumps(state))
    with pytest.raises(ConfigError, match="has not come to its scores"):
        go(tmp_path / "early", library=str(tmp_path / "cut"))
    shutil.copytree(out, tmp_path / "damaged")
    (tmp_path / "damaged" / "library" / "blocks.0.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="could not be read"):
        go(tmp_path / "bad", parameters=0.45, library=str(tmp_path / "damaged"))


# -- other models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["features", "scores"])
def test_language_model(objective: str, tmp_path: Path) -> None:
    """Questions about images; the budget is memory, with a cache."""
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    sizes |= {"num_key_value_heads": 2, "rope_parameters": {"mrope_section": [2, 3, 3]}}
    eyes = {"depth": 1, "embed_dim": 32, "num_heads": 1, "hidden_size": 32}
    model = zoo.load("vlm-micro", pretrained=False, seed=0, vision_config=eyes, text_config=sizes).eval()
    square = Image.new("RGB", (32, 32), "red")
    asked = [Question(square, f"what is {i}?", (f"it is {i}",), i) for i in range(4)]
    out = tmp_path / "run"
    few = {"parameters": None, "memory": 0.7, "cache_tokens": 64, "cache_texts": 2, "batch_size": 2, "epochs": 1}
    options = {**SETTINGS, **few, "neurons": (0.5,), "local_steps": 2, "objective": objective}
    report = zoo.run(model, "puzzle", open_questions(asked), out=out, fit=FIT, **options)
    assert report.summary["memory"] <= 0.7
    assert {n.rpartition(".")[0] for n in report.summary["chosen"]} == {"text.blocks.0", "text.blocks.1"}
    network = zoo.load(out / "backbone").eval()
    inputs = network.example_batch(2)
    assert network(*inputs).shape == model(*inputs).shape


def test_data_of_other_classes(tmp_path: Path) -> None:
    """Labels are not read."""
    other = zoo.open_dataset(easy_data(24, classes=6), classes=list("uvwxyz"))
    report = zoo.run(
        parent(), "puzzle", other, out=tmp_path / "run", fit=FIT, **{**SETTINGS, "local_steps": 0, "epochs": 1}
    )
    assert zoo.load(tmp_path / "run" / "backbone", tmp_path / "run" / "head").num_classes == 4
    assert report.summary["parameters"] <= 0.6


def test_without_a_head(tmp_path: Path) -> None:
    report = go(tmp_path / "run", parent(0), parameters=None, operations=0.6)
    assert report.summary["operations"] <= 0.6 and not (tmp_path / "run" / "head").exists()
    with pytest.raises(ConfigError, match="no classification head"):
        go(tmp_path / "test", parent(0), data(1))
    with pytest.raises(ConfigError, match="needs a head"):
        go(tmp_path / "scores", parent(0), objective="scores")


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"parameters": None}, "no budget"),
        ({"parameters": 0.0}, "expected a share"),
        ({"parameters": 1.5}, "expected a share"),
        ({"heads": (1.0,)}, "shares between"),
        ({"neurons": (0.0,)}, "shares between"),
        ({"objective": "loss"}, "features or scores"),
        ({"solver": "cbc"}, "expected one of"),
        ({"local_lr": 0.0}, "more than 0"),
        ({"scored": 0}, "1 or more"),
        ({"heads": (), "neurons": (), "linear": False, "nothing": False}, "no children"),
        ({"cache_tokens": 5}, "keeps no cache"),
        ({"parameters": 0.05}, "stands in no sublayer costs"),
        ({"parameters": 0.2, "nothing": False}, "No network fits"),
        ({"parameters": 1.0}, "whole parent fits"),
    ],
)
def test_settings(settings: dict[str, Any], match: str, tmp_path: Path) -> None:
    """Before anything is trained."""
    with pytest.raises(ConfigError, match=match):
        go(tmp_path / "run", **{"local_steps": 0, **settings})
    assert not (tmp_path / "run" / "library").exists()


def test_models_and_data(tmp_path: Path) -> None:
    model = parent()
    with pytest.raises(ConfigError, match="give out="):
        zoo.run(model, "puzzle", data(), fit=FIT, **SETTINGS)
    with pytest.raises(DataError, match="one data set"):
        zoo.run(model, "puzzle", {"a": data()}, out=tmp_path / "run", fit=FIT, **SETTINGS)
    model.add_adapter("lora")
    with pytest.raises(ConfigError, match="Merge or remove"):
        go(tmp_path / "run", model)
    with pytest.raises(ConfigError, match="not described for the family"):
        go(tmp_path / "run", zoo.load("timm:convnext_atto", pretrained=False, num_classes=4))
    with pytest.raises(ConfigError, match="no sublayer of this network"):
        go(tmp_path / "run", heads=(0.9,), neurons=(), linear=False, nothing=False)
