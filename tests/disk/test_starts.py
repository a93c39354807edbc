"""Starting from the values of a published adapter (PVP): what is taken over, by which rules, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_parts import CLASSES, easy_data, tiny_model

import zoo
from zoo.adapters.parts.starting import of_length, of_rank
from zoo.errors import ConfigError, MismatchError, UnknownNameError, ZooError

SHAPE = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
METHODS: dict[str, dict[str, Any]] = {
    "vpt": {"num_tokens": 4},
    "lora": {"rank": 3, "targets": ("q", "v")},
    "adapter": {"rank": 4},
    "prefix": {"num_tokens": 3, "init": "uniform"},
    "bitfit": {},
}


def images() -> Tensor:
    return easy_data(6)[:][0]


def saved(folder: Path, method: str = "vpt", steps: int = 2, **settings: Any) -> Path:
    """The first stage: a method trained for a few steps on another task, with a head of its own."""
    model = tiny_model(
        zoo.adapter(method, **{**METHODS.get(method, {}), **settings}), num_classes=7 if steps else CLASSES
    )
    if steps:
        zoo.fit(model, easy_data(28, classes=7), steps=steps, batch_size=14, lr=0.02, progress=False)
    model.save_adapter(folder)
    return folder


def state(model: zoo.Model, name: str) -> dict[str, Tensor]:
    return dict(model.adapters[name].state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_without_a_first_stage_nothing_differs(method: str, tmp_path: Path) -> None:
    """(a) Values that were never trained are the method's own: equal to the bit, by the same seed."""
    source = saved(tmp_path / "pre", method, steps=0)
    plain = tiny_model(zoo.adapter(method, **METHODS[method]))
    started = tiny_model(zoo.adapter(method, init=source))
    assert torch.equal(started(images()), plain(images()))
    assert started.adapters[method].config() == plain.adapters[method].config()


@pytest.mark.parametrize("method", METHODS)
def test_values_are_those_of_the_source_and_the_head_is_new(method: str, tmp_path: Path) -> None:
    """(b) and (d): phi at the start of the second stage is the checkpoint; the head has the new classes; theta never moves."""
    source = saved(tmp_path / "pre", method)
    model = tiny_model(zoo.adapter(method, init=source))
    first = zoo.disk.read(source)
    mine, theirs = state(model, method), first.adapter_tensors(method)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    head = model.head.weight
    assert head.shape == (CLASSES, 24) and first.num_classes == 7 and model.classes is None
    fresh = tiny_model(zoo.adapter(method, **METHODS[method]))
    assert torch.equal(head, fresh.head.weight)
    frozen = {k: v.clone() for k, v in fresh.backbone.state_dict().items()}
    zoo.fit(model, easy_data(8), steps=2, batch_size=8, progress=False)
    assert any(not torch.equal(v, theirs[k]) for k, v in state(model, method).items())
    with model.disable():
        assert all(torch.equal(v, frozen[k]) for k, v in model.backbone.state_dict().items())
    assert "Training started from the values of 'pre'" in model.record["notes"][0]


def test_identity_holds_before_the_first_stage_and_fails_before_the_second(tmp_path: Path) -> None:
    """(e) Methods that start as the pretrained function no longer do once their values are pre-trained."""
    for method in ("lora", "adapter"):
        source = saved(tmp_path / method, method)
        bare = tiny_model(None)
        assert torch.equal(tiny_model(zoo.adapter(method)).features(images()), bare.features(images()))
        assert not torch.equal(tiny_model(zoo.adapter(method, init=source)).features(images()), bare.features(images()))


def test_counts_are_those_of_the_method(tmp_path: Path) -> None:
    """(c) On ViT-B/16 ten deep prompts are 92,160; a start changes no count."""
    model = zoo.load("vit-b16", zoo.adapter("vpt", num_tokens=10), num_classes=5, device="meta")
    assert model.num_parameters(trainable=True, head=False) == 92_160
    one = tiny_model(zoo.adapter("vpt", init=saved(tmp_path / "pre")))
    assert one.num_parameters(trainable=True, head=False) == 2 * 4 * 24


def test_another_length(tmp_path: Path) -> None:
    """(f) Fewer prompts are the first ones; more are all of them, and then again with a little noise."""
    source = saved(tmp_path / "pre")
    theirs = zoo.disk.read(source).adapter_tensors("vpt")
    fewer = state(tiny_model(zoo.adapter("vpt", init=source, num_tokens=3)), "vpt")
    assert all(torch.equal(fewer[k], theirs[k][:3]) for k in theirs)
    more = state(tiny_model(zoo.adapter("vpt", init=source, num_tokens=10)), "vpt")
    for key, prompts in theirs.items():
        assert torch.equal(more[key][:4], prompts) and more[key].shape == (10, 24)
        for rest in (more[key][4:8] - prompts, more[key][8:] - prompts[:2]):
            assert 0 < float(rest.std()) < 0.04 * float(prompts.std())
    keys = state(tiny_model(zoo.adapter("prefix", init=saved(tmp_path / "prefix", "prefix"), num_tokens=2)), "prefix")
    assert {tuple(v.shape) for v in keys.values()} == {(2, 24)}


def test_length_rule_against_numbers() -> None:
    rows = torch.arange(8.0).view(4, 2)
    assert torch.equal(of_length(rows, 2), rows[:2])
    torch.manual_seed(0)
    noise = torch.randn(3, 2)
    torch.manual_seed(0)
    torch.testing.assert_close(of_length(rows, 7)[4:], rows[:3] + 0.02 * 2.2912878 * noise)  # std of 0..7: sqrt(5.25)


@pytest.mark.parametrize("dora", [False, True])
def test_another_rank(dora: bool, tmp_path: Path) -> None:
    """A larger rank and another scale start as the same function and can learn; a smaller one is the best approximation."""
    source = saved(tmp_path / "pre", "lora", dora=dora, steps=4)
    same = tiny_model(zoo.adapter("lora", init=source)).features(images())
    for more in ({"rank": 5}, {"alpha": 12.0}, {"rank": 6, "alpha": 1.0, "rslora": True}):
        model = tiny_model(zoo.adapter("lora", init=source, **more))
        torch.testing.assert_close(model.features(images()), same, rtol=1e-5, atol=1e-5)
    model.train()(images()).square().sum().backward()
    for name, parameter in model.adapters["lora"].named_parameters():
        if name.endswith("lora_b"):  # the columns that are zero learn, since the rows of A that they meet are not
            assert bool(parameter.grad[:, 3:].any())
    less = tiny_model(zoo.adapter("lora", init=source, rank=1))
    tensors = zoo.disk.read(source).adapter_tensors("lora")
    for key in [k for k in tensors if k.endswith("lora_a")]:
        part = less.adapters["lora"].get_submodule(key.removesuffix(".lora_a"))
        whole = tensors[key.replace("lora_a", "lora_b")] @ tensors[key]
        u, s, vh = torch.linalg.svd(whole)
        best = s[0] * torch.outer(u[:, 0], vh[0])
        torch.testing.assert_close((part.lora_b @ part.lora_a).detach(), best, rtol=1e-4, atol=1e-6)


def test_rank_rule_keeps_what_it_can() -> None:
    torch.manual_seed(0)
    a, b, fresh = torch.randn(3, 6), torch.randn(5, 3), torch.randn(4, 6)
    wide = of_rank(a, b, 4, fresh)
    assert torch.equal(wide[0][:3], a) and torch.equal(wide[0][3:], fresh[3:]) and not wide[1][:, 3:].any()
    torch.testing.assert_close(wide[1] @ wide[0], b @ a)
    low = of_rank(a, b, 2, fresh)
    assert float((low[1] @ low[0] - b @ a).norm()) == pytest.approx(float(torch.linalg.svdvals(b @ a)[2]), rel=1e-4)


def test_a_control_of_the_same_scale(tmp_path: Path) -> None:
    source = saved(tmp_path / "pre", num_tokens=200, steps=3)
    theirs = zoo.disk.read(source).adapter_tensors("vpt")
    model = tiny_model(zoo.adapter("vpt", init=source, init_like="scale"))
    for key, value in state(model, "vpt").items():
        assert float((value - theirs[key]).abs().mean()) > 0.5 * float(theirs[key].std())
        assert float(value.std()) == pytest.approx(float(theirs[key].std()), rel=0.05)
    assert "random values of the scale of" in model.record["notes"][0]
    kept = tiny_model(zoo.adapter("lora", init=saved(tmp_path / "lora", "lora"), init_like="scale", rank=5))
    assert kept.num_parameters(trainable=True, head=False) == 2 * 2 * 5 * 48


def test_how_fresh_prompts_would_be_drawn_does_not_matter(tmp_path: Path) -> None:
    start = zoo.adapter("vpt", init=saved(tmp_path / "vpt"), start="normal")
    assert start.start == "normal"  # type: ignore[attr-defined]


def test_what_is_refused_leaves_the_model_alone(tmp_path: Path) -> None:
    vpt, lora = saved(tmp_path / "vpt"), saved(tmp_path / "lora", "lora")
    torch.manual_seed(1)  # other random weights
    other = zoo.load("vit-micro", num_classes=CLASSES, pretrained=False, **SHAPE)
    cases: list[tuple[dict[str, Any], type[ZooError], str]] = [
        ({"name": "lora", "init": vpt}, MismatchError, r"holds 'vpt', and 'lora' cannot start from that"),
        (
            {"name": "vpt", "init": vpt, "deep": False},
            ConfigError,
            "trained with deep=True, and this 'vpt' has deep=False",
        ),
        ({"name": "lora", "init": lora, "dora": True}, ConfigError, "trained with dora=False"),
        ({"name": "vpt", "init": "lora"}, ConfigError, "init is 'lora', which is a method and holds no values"),
        ({"name": "vpt", "init": tmp_path / "none"}, UnknownNameError, "There is no folder"),
        ({"name": "vpt", "init": 3}, ConfigError, "init is 3; expected a saved adapter"),
        ({"name": "vpt", "init": vpt, "init_like": "size"}, ConfigError, "init_like is 'size'"),
        ({"name": "vpt", "init_like": "scale"}, ConfigError, "there is none: name a saved adapter by init="),
    ]
    for arguments, kind, words in cases:
        with pytest.raises(kind, match=words):
            zoo.adapter(**arguments)
    with pytest.raises(MismatchError, match=r"other weights of 'vit-micro'.*zoo fit vit-micro vpt"):
        other.add_adapter(zoo.adapter("vpt", init=vpt))
    swin = zoo.load("swin-micro", num_classes=2, pretrained=False)
    with pytest.raises(
        MismatchError, match="cannot start an adapter of 'swin-micro': its values were trained on 'vit-micro'"
    ):
        swin.add_adapter(zoo.adapter("vpt", init=vpt))
    here = tiny_model(None)
    with pytest.raises(MismatchError, match=r"tensor 'blocks.0.attn.k.lora_a' is only in this adapter"):
        here.add_adapter(zoo.adapter("lora", init=lora, targets="q,k,v"))
    queries = saved(tmp_path / "vqt", "vqt", num_tokens=2, dropout=0.0)
    with pytest.raises(ConfigError, match="trained with num_tokens=2, and this 'vqt' has num_tokens=3"):
        zoo.adapter("vqt", init=queries, num_tokens=3)
    for model in (other, swin, here):
        assert not model.adapters and not any(m._forward_hooks for m in model.backbone.modules())


def test_a_plan_comes_along(tmp_path: Path) -> None:
    """What a calibration chose belongs to the values: it is taken over, and cannot go with other settings."""
    model = tiny_model(zoo.adapter("spt", budget=0.005))
    zoo.fit(model, easy_data(16), steps=2, batch_size=8, progress=False)
    source = model.save_adapter(tmp_path / "spt")
    again = tiny_model(zoo.adapter("spt", init=source))
    assert again.adapters["spt"].plan == model.adapters["spt"].plan
    zoo.fit(again, easy_data(16), steps=1, batch_size=8, progress=False)
    assert again.adapters["spt"].plan == model.adapters["spt"].plan
    with pytest.raises(ConfigError, match=r"trained with budget=0\.005"):
        zoo.adapter("spt", init=source, budget=0.1)


def test_one_of_several(tmp_path: Path) -> None:
    model = tiny_model(["vpt", "lora"])
    source = model.save_adapter(tmp_path / "both")
    assert torch.equal(
        tiny_model(zoo.adapter("lora", init=source)).features(images()),
        tiny_model("lora").features(images()),
    )
    model.add_adapter("lora", "second")
    model.save_adapter(tmp_path / "three")
    with pytest.raises(ConfigError, match=r"holds several adapters of the method 'lora' \(lora, second\)"):
        zoo.adapter("lora", init=tmp_path / "three")


def test_a_file_does_not_ask_for_memory(tmp_path: Path) -> None:
    """Settings come from the source's file: one that asks for far more than the file holds is refused before it is made."""
    start = zoo.adapter("vpt", init=saved(tmp_path / "pre"))
    start.num_tokens = 10**9
    with pytest.raises(MismatchError, match="asks for a tensor of 24,000,000,000 numbers"):
        tiny_model(None).add_adapter(start)


def test_a_length_of_the_user_s_own_that_is_too_much_does_not_blame_the_file(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", steps=0)
    with pytest.raises(
        MismatchError, match=r"with num_tokens=1000000 asks for .* numbers.*\. Give a smaller one"
    ) as told:
        tiny_model(zoo.adapter("vpt", init=source, num_tokens=10**6))
    assert "download" not in str(told.value)
