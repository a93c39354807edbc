"""DAS: a form written down straightforwardly, work that is really saved, the search, its regime. More: tests/adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_parts import Stop, StopAt

import zoo
from multimodal.adapters.parts.skipping import updated
from multimodal.regimes.das import operations
from zoo.errors import AttachError, CombinationError, ConfigError, DataError, MergeError

SMALL = {"embed_dim": 48, "depth": 4, "num_heads": 3}
BANDIT = {"draws": 2, "turn": 1, "warmup": 0}


def vit(adapter: Any = None, **settings: Any) -> zoo.Model:
    torch.manual_seed(0)
    model = zoo.load("vit-micro", num_classes=3, pretrained=False, **SMALL)
    if adapter is None:
        torch.manual_seed(2)
        model.add_adapter(zoo.adapter("das", bottleneck=4, **settings))
    return model


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class Pictures(torch.utils.data.TensorDataset):
    classes = ["a", "b", "c"]

    def __init__(self, count: int = 24) -> None:
        generator = torch.Generator().manual_seed(3)
        patterns, labels = torch.randn(3, 3, 32, 32, generator=generator), torch.arange(count) % 3
        super().__init__(patterns[labels] + 0.3 * torch.randn(count, 3, 32, 32, generator=generator), labels)


def test_straightforward_form() -> None:
    model = vit(skip=(1, 2)).eval()
    adapter: Any = model.adapters["das"]
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(4)))
        found = model.features(images())

        def small(name: str, x: Tensor) -> Tensor:
            m = adapter.module_at(name)
            hidden = torch.nn.functional.layer_norm(x, (48,), m.ln.weight, m.ln.bias) @ m.down.weight.T + m.down.bias
            return hidden.relu() @ m.up.weight.T + m.up.bias

        net: Any = vit("bare").backbone
        x = net._pos_embed(net.patch_embed(images()))
        for i, block in enumerate(net.blocks):
            if i in (1, 2):
                x = x + small(f"blocks.{i}", x)
            else:
                x = x + block.attn(block.norm1(x)) + small(f"blocks.{i}.attn", x)
                x = x + block.mlp(block.norm2(x)) + small(f"blocks.{i}.mlp", x)
        torch.testing.assert_close(found, net.pool(net.norm(x)), rtol=1e-5, atol=1e-5)


def test_work_is_really_saved() -> None:
    """A skipped block costs what its network costs, and nothing of it runs."""
    model = vit(skip=(1, 2)).eval()
    runs: list[int] = []
    for i, block in enumerate(model.backbone.blocks):  # type: ignore[union-attr, arg-type]
        block.attn.qkv.register_forward_hook(lambda m, a, y, i=i: runs.append(i))
    adapted = operations(model)
    assert sorted(set(runs)) == [0, 3]
    with model.disable():
        whole = operations(model)
    tokens, block = 65, 4 * 48 * 48 + 2 * 48 * 192
    each = 2 * tokens * (block + 2 * tokens * 48)  # projections, MLP and both products of attention
    beside, instead = 2 * tokens * 2 * 48 * 4, 2 * tokens * 2 * 48 * 8
    assert whole - adapted == 2 * (each - instead) - 2 * 2 * beside


def test_a_skipped_block_of_t5_passes_positions_on() -> None:
    """With W_u = 0 the model is the library's without that block, to the rounding; also word by word, with and without cache."""
    model = zoo.load("vl-t5-micro", zoo.adapter("das", skip=(0, 3), bottleneck=4), pretrained=False, seed=0).eval()
    adapter: Any = model.adapters["das"]
    assert [adapter.candidates[i] for i in adapter.chosen()] == ["encoder.blocks.1", "decoder.blocks.2"]
    with torch.no_grad():
        for name, p in adapter.named_parameters():
            if ".up." in name:
                p.zero_()
        batch = model.example_batch(2)
        plain: Any = copy.deepcopy(zoo.load("vl-t5-micro", pretrained=False, seed=0)).eval()
        del plain.backbone.encoder.block[1], plain.backbone.decoder.block[2]
        torch.testing.assert_close(model(*batch), plain.family.run(plain.backbone, *batch), rtol=1e-5, atol=1e-5)
    ids = model.passing(
        lambda: [
            model.backbone.generate(  # type: ignore[operator, union-attr]
                input_ids=batch[0], attention_mask=batch[1], max_new_tokens=5, do_sample=False, use_cache=cache
            )
            for cache in (True, False)
        ],
        *batch,
    )
    assert torch.equal(*ids)


def test_the_bandit_finds_what_is_dispensable() -> None:
    """Losses grow by w_i when block i is left out; those of least w get the largest gates."""
    harm = torch.tensor([0.9, 0.1, 0.8, 0.05, 0.7, 0.6])
    generator, gates = torch.Generator().manual_seed(0), torch.zeros(6)
    for _ in range(300):
        picks: list[list[int]] = []
        while len(picks) < 3:
            picked = sorted(torch.multinomial(torch.sigmoid(gates), 2, generator=generator).tolist())
            picks += [picked] if picked not in picks else []
        gates = updated(gates, picks, [float((-harm[p].sum()).exp()) for p in picks], 1.0)
    assert sorted(gates.sort().indices[-2:].tolist()) == [1, 3]
    even = updated(torch.zeros(6), [[0, 1], [2, 3]], [0.5, 0.5], 1.0)
    assert torch.equal(even, torch.zeros(6))  # no subset was better


def test_search_resumes_and_is_saved_as_what_it_found(tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 1e-3, "progress": False, "device": "cpu"}
    options["streams"] = {"val": Pictures(8)}
    with pytest.raises(ConfigError, match="validation data"):
        zoo.fit(vit(search=2, **BANDIT), Pictures(), epochs=1, progress=False, device="cpu")
    model = vit(search=2, **BANDIT)
    zoo.fit(model, Pictures(), **options)
    adapter: Any = model.adapters["das"]
    gates = adapter.module_at("gates").values
    assert gates.any() and adapter._update == 6
    killed = vit(search=2, **BANDIT)
    with pytest.raises(Stop):
        zoo.fit(killed, Pictures(), checkpoint=tmp_path / "run", checkpoint_every=1, callbacks=[StopAt(3)], **options)
    again = vit(search=2, **BANDIT)
    zoo.fit(again, Pictures(), checkpoint=tmp_path / "run", checkpoint_every=1, **options)
    assert torch.equal(again.adapters["das"].module_at("gates").values, gates)  # type: ignore[operator, union-attr]
    for key, value in model.parameters_to_train().items():
        assert torch.equal(value, again.parameters_to_train()[key])
    model.save_adapter(tmp_path / "out")
    torch.manual_seed(0)  # the same random backbone
    loaded = zoo.load(adapter=tmp_path / "out", pretrained=False).eval()
    found: Any = loaded.adapters["das"]
    assert found.config()["search"] == 0 and list(found.skip) == adapter.chosen()
    with torch.no_grad():
        assert torch.equal(loaded(images()), model.eval()(images()))
    assert loaded.train().probe(images()) == []


def test_regime(tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch_size": 8, "progress": False, "device": "cpu"}
    settings: dict[str, Any] = {"skip": 2, "bottleneck": 4, "draws": 2, "turn": 1, "search_epochs": 2, "epochs": 1}

    def run() -> Any:
        return zoo.run(vit("bare"), "das", Pictures(), Pictures(9), out=tmp_path / "run", fit=options, **settings)

    report = run()
    assert [p["name"] for p in report.phases] == ["search", "train"]
    found = report.summary
    assert len(found["skip"]) == 2 and len(found["gates"]) == 4 and 0.3 < found["saved"] < 0.5
    assert found["blocks"] == [f"blocks.{i}" for i in found["skip"]] and "test_accuracy" in found
    again = run()  # what is done is read back
    assert again.summary == found
    with pytest.raises(ConfigError, match="attaches its own"):
        zoo.run(vit(skip=(1,)), "das", Pictures(), fit=options, **settings)
    with pytest.raises(DataError, match="'train' and 'val'"):
        zoo.run(vit("bare"), "das", {"other": Pictures()}, fit=options, **settings)
    with pytest.raises(ConfigError, match="search_epochs is 1"):
        zoo.run(vit("bare"), "das", Pictures(), search_epochs=1)


def test_what_would_never_run_is_refused() -> None:
    model = vit(skip=(1,))
    with pytest.raises(CombinationError, match=r"'das' skips 'blocks.1', and 'lora' has something inside of it"):
        model.add_adapter("lora")
    model.add_adapter(zoo.adapter("lora", targets="blocks.{0,2,3}.attn.{q,v}"))
    assert model.train().probe(images()) == []
    other = vit("bare")
    other.add_adapter("lora")
    with pytest.raises(CombinationError, match="would never run"):
        other.add_adapter(zoo.adapter("das", skip=(1,)))
    assert other.active == ("lora",)
    other.add_adapter(zoo.adapter("das", search=1, draws=2))  # a supernet runs each block now and then


def test_per_sample_adapters_and_memory() -> None:
    model = vit("bare")
    for seed, name in enumerate("ab"):
        model.add_adapter(zoo.adapter("das", skip=(seed,), bottleneck=16), name, activate=False)
    rows, x, alone = ["b", None, "a", "b"], images(), []
    for i, name in enumerate(rows):
        model.set_active(*([name] if name else []))
        alone.append(model(x)[i : i + 1])
    model.set_active("a")
    torch.testing.assert_close(model(x, adapters=rows), torch.cat(alone), rtol=1e-5, atol=1e-5)
    found = []
    for setting in ("off", "default", "low", "min"):
        model.memory = setting
        model.zero_grad()
        model.train()(x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters_to_train().values() if p.grad is not None])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))
    model.memory = "default"
    torch._dynamo.reset()
    try:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    finally:
        torch._dynamo.reset()


def test_what_is_refused() -> None:
    for settings, reason in (
        ({"skip": (1, 1)}, "different numbers"),
        ({"skip": (1,), "search": 1}, "either skip, or search"),
        ({"draws": 1}, "draws is 1"),
        ({"bottleneck": 0}, "bottleneck is 0"),
        ({"skip": (0, 1, 2, 3)}, "one at least has to stay"),
        ({"skip": (4,)}, "can be skipped"),
        ({"search": 4}, "subsets to compare"),
        ({"search": 3, "draws": 5}, "subsets to compare"),
    ):
        with pytest.raises(ConfigError, match=reason):
            vit("bare").add_adapter(zoo.adapter("das", **settings))
    with pytest.raises(AttachError):
        zoo.load("timm:resnet18", "das", num_classes=3, pretrained=False)
    model = zoo.load("vl-t5-micro", device="meta", pretrained=False)
    with pytest.raises(AttachError, match=r"none of .* can be"):
        model.add_adapter(zoo.adapter("das", targets="*.blocks.0"))
    with pytest.raises(MergeError, match="'das' cannot be merged"):
        vit(skip=(1,)).merge()
