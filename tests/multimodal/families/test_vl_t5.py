"""VL-T5 and VL-BART, what both have in common. See also test_seq2seq_methods.py; BART's own stands in test_vl_bart.py."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from seq2seq_models import FAMILIES, library, stir, straight, twin
from torch import Tensor

import zoo
from zoo import Adapter, registry
from zoo.errors import ConfigError, MissingPackageError
from zoo.points import Points
from zoo.registry import register_adapter
from zoo.table import tiny_model

# -- equal to the library ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_text_alone_is_the_librarys_network_to_the_bit(family: str) -> None:
    model, (ids, mask, answer, *_) = tiny_model(family)
    plain = twin(model)
    for mode in (False, True):  # with dropout the same numbers are drawn
        model.backbone.train(mode), plain.train(mode)
        torch.manual_seed(0)
        expected = plain(ids, mask, answer, use_cache=False).logits
        torch.manual_seed(0)
        assert torch.equal(model(ids, mask, answer), expected)
    assert mode and not torch.equal(expected, plain.eval()(ids, mask, answer).logits)  # dropout was there


@pytest.mark.parametrize("family", FAMILIES)
def test_text_networks_are_the_librarys_class(family: str) -> None:
    _, options = zoo.registry.family(family).tiny or ("", {})
    name = {"vl-t5": "t5-base", "vl-bart": "bart-base"}[family]
    model = zoo.load(name, pretrained=False, **{**options, "feat_dim": None})
    assert type(model.backbone) is library(family)
    assert (
        not [p for p in model.points if "visual" in p.name]
        and model.points.kinds == tiny_model(family)[0].points.kinds[:-1]
    )
    ids = torch.randint(3, 60, (2, 5))
    assert torch.equal(model(ids, None, ids), model.backbone(ids, decoder_input_ids=ids).logits)
    with pytest.raises(zoo.ZooError, match="reads text alone"):
        model(ids, None, ids, torch.randn(2, 3, 6))


@pytest.mark.parametrize("family", FAMILIES)
def test_visual_input_equals_the_formulas(family: str) -> None:
    model, batch = tiny_model(family)
    model.double()  # T5's norm still takes its mean square in float32
    batch = tuple(t.double() if t.is_floating_point() else t for t in batch)
    torch.testing.assert_close(model(*batch), straight(model)(*batch), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(*batch[:3]), straight(model)(*batch[:3]), rtol=1e-6, atol=1e-6)
    eager = zoo.load(model.backbone_name, pretrained=False, **model.backbone_kwargs).double()
    eager.backbone.load_state_dict(model.backbone.state_dict())
    eager.backbone.set_attn_implementation("eager")
    torch.testing.assert_close(eager(*batch), model(*batch), rtol=1e-6, atol=1e-6)
    missing = model(*batch[:4])  # a grid without places
    torch.testing.assert_close(missing, model(*batch[:4], torch.zeros_like(batch[4])))


@pytest.mark.parametrize("family", FAMILIES)
def test_visual_tokens_can_be_masked(family: str) -> None:
    model, (ids, mask, answer, features, boxes) = tiny_model(family)
    hidden = torch.tensor([[1, 1, 1, 0, 0]]).expand(2, -1)
    changed = features.clone()
    changed[:, 3:] = 100.0
    same = model(ids, mask, answer, features, boxes, None, None, hidden)
    torch.testing.assert_close(same, model(ids, mask, answer, changed, boxes, None, None, hidden))
    torch.testing.assert_close(same, model(ids, mask, answer, features[:, :3], boxes[:, :3]), rtol=1e-4, atol=1e-5)


# -- generation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["none", "lora", "prefix", "deep", "flow", "stay"])
def test_generation_with_a_cache_follows_the_scores(family: str, method: str) -> None:
    model, batch = tiny_model(family)
    ids, mask, _, features, boxes = batch
    settings = {"deep": {}, "flow": {"deep": False}, "stay": {"deep": False, "pool": "all"}}
    if method != "none":
        model.add_adapter(zoo.adapter("vpt", **settings[method]) if method in settings else method)
        stir(model, 0.5)
    start = model.backbone.config.decoder_start_token_id
    for visual in ({"visual_features": features, "boxes": boxes}, {}):
        words = model.backbone.generate(
            ids, mask, max_new_tokens=5, do_sample=False, num_beams=1, eos_token_id=None, **visual
        )
        answer = torch.full((2, 1), start)
        for _ in range(5):
            scores = model(ids, mask, answer, *visual.values())[:, -1]
            if family == "vl-bart" and answer.shape[1] == 5:
                break  # the library forces BART's last word
            answer = torch.cat([answer, scores.argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(words[:, : answer.shape[1]], answer)


@pytest.mark.parametrize("family", FAMILIES)
def test_beam_search_finds_the_best_sequence(family: str) -> None:
    """With as many beams as there are words, two steps are searched in full."""
    name, options = zoo.registry.family(family).tiny or ("", {})
    model = zoo.load(name, "prefix", pretrained=False, **{**options, "vocab_size": 12})
    ids, mask = torch.randint(3, 12, (2, 4)), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    features = torch.randn(2, 5, 6)
    stir(model, 0.5)
    start = model.backbone.config.decoder_start_token_id
    found = model.backbone.generate(
        ids, mask, visual_features=features, num_beams=12, max_new_tokens=2, eos_token_id=None, forced_eos_token_id=None
    )
    pairs = torch.cartesian_prod(torch.tensor([start]), torch.arange(12), torch.arange(12))
    for row in range(2):
        many = [t[row : row + 1].expand(len(pairs), *t.shape[1:]) for t in (ids, mask)]
        scores = model(*many, pairs[:, :2], features[row : row + 1].expand(len(pairs), -1, -1)).log_softmax(-1)
        total = scores.gather(2, pairs[:, 1:, None]).sum((1, 2))
        assert torch.equal(found[row], pairs[total.argmax()])


# -- building ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_network_comes_back(family: str, tmp_path: Path) -> None:
    model, batch = tiny_model(family)
    model.merge().save_pretrained(tmp_path / "net")
    name = f"transformers:{tmp_path / 'net'}"
    again = zoo.load(name)
    assert again.family.family == family and torch.equal(again.eval()(*batch), model(*batch))
    assert again.backbone.config.feat_dim == 6 and again.family.hub_id() is None
    twin(model).save_pretrained(tmp_path / "text")
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    for key in ("feat_dim", "n_images", "use_vis_layer_norm", "individual_vis_layer_norm", "use_vis_order_embedding"):
        config.pop(key, None)
    (tmp_path / "text" / "config.json").write_text(json.dumps(config))
    text = zoo.load(f"transformers:{tmp_path / 'text'}")
    assert type(text.backbone) is library(family) and torch.equal(text(*batch[:3]), model(*batch[:3]))
    seeing = zoo.load(f"transformers:{tmp_path / 'text'}", feat_dim=6, vocab_size=64)
    assert seeing(*batch).shape == (2, 4, 64)
    words = seeing.backbone.get_input_embeddings().weight
    assert torch.equal(words[:60], model.backbone.get_input_embeddings().weight)
    assert seeing.family.encoder.visual_embedding.obj_order_embedding.weight is words


@pytest.mark.parametrize("family", FAMILIES)
def test_options_are_checked(family: str) -> None:
    name, options = zoo.registry.family(family).tiny or ("", {})
    with pytest.raises(ConfigError, match="'depth' is no option"):
        zoo.load(name, pretrained=False, depth=2, **options)
    with pytest.raises(ConfigError, match="no pooled features"):
        zoo.load(name, pretrained=False, num_classes=3, **options)
    model, batch = tiny_model(family)
    with pytest.raises(ConfigError, match="decoder_input_ids are missing"):
        model(*batch[:2])
    with pytest.raises(ConfigError, match="4 wide"):
        model(*batch[:3], torch.randn(2, 5, 4))
    with pytest.raises(zoo.ZooError, match="no-such-folder"):
        zoo.load("transformers:/no-such-folder", pretrained=False)


def test_importing_a_family_does_not_import_its_library() -> None:
    families = "multimodal.families.seq2seq"
    modules = f"{families}.vl_t5, {families}.vl_bart, multimodal.tasks.generate"
    code = f"import sys, {modules}; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingPackageError, match=r"adapter-zoo\[multimodal\]"):
        zoo.load("vl-t5", pretrained=False)


def test_shift_puts_the_start_word_in_front() -> None:
    model, _ = tiny_model("vl-t5")
    assert model.family.shift(torch.tensor([[7, 8, 1], [9, 1, -100]])).tolist() == [[0, 7, 8], [0, 9, 1]]
    model, _ = tiny_model("vl-bart")
    assert model.family.shift(torch.tensor([[0, 8, 2], [9, 2, -100]])).tolist() == [[2, 0, 8], [2, 9, 2]]


# -- T5's own ------------------------------------------------------------------------------------------------------------


def test_gated_mlps_have_a_gate() -> None:
    name, options = zoo.registry.family("vl-t5").tiny or ("", {})
    options = {**options, "feed_forward_proj": "gated-gelu", "d_kv": 6}  # heads that do not fill the width
    model = zoo.load(name, zoo.adapter("lora", targets="all-linear"), pretrained=False, **options)
    assert "encoder.blocks.1.mlp.gate" in {p.name for p in model.adapters["lora"].selected(model.points)}
    assert [p.path for p in model.points.select("encoder.blocks.0.mlp.{gate,up}")] == [
        "encoder.block.0.layer.1.DenseReluDense.wi_0",
        "encoder.block.0.layer.1.DenseReluDense.wi_1",
    ]
    _, batch = tiny_model("vl-t5")
    assert model.probe(*batch) == []
    torch.testing.assert_close(model(*batch), straight(model)(*batch), rtol=1e-4, atol=1e-5)
    stir(model)
    torch.testing.assert_close(model.family.run(model.merge(), *batch), model(*batch), rtol=1e-5, atol=1e-5)
    model.set_active()
    model.add_adapter(zoo.adapter("prefix", num_tokens=2))
    assert model.adapters["prefix"].module_at(model.points["decoder.blocks.0.cross.product"]).keys.shape == (2, 24)
    stir(model)
    prefix = {p.path: model.adapters["prefix"].module_at(p) for p in model.points.select(kind="attention")}
    values = {k: (v.keys.detach(), v.values.detach()) for k, v in prefix.items()}
    torch.testing.assert_close(model(*batch), straight(model, prefix=values)(*batch), rtol=1e-4, atol=1e-5)


def test_the_visual_embedding_is_a_condition_point() -> None:
    class Shift(torch.nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.shift = torch.nn.Parameter(torch.ones(width))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.shift

    @register_adapter("shifted")
    @dataclass
    class Shifted(Adapter):
        side: str = "after"

        def attach(self, points: Points) -> None:
            for point in points.require("condition", "shifted"):
                getattr(point, self.side)(Shift(point.dim_in if self.side == "before" else point.dim_out))

    for side, width in (("before", 6), ("after", 32)):
        model, batch = tiny_model("vl-t5")
        seen: list[Tensor] = []
        embedding = model.family.encoder.visual_embedding
        expected = embedding(batch[3] + 1, batch[4]) if side == "before" else embedding(batch[3], batch[4]) + 1
        model.add_adapter(Shifted(side=side), "shifted")
        handle = model.family.encoder.block[0].register_forward_pre_hook(
            lambda m, args, seen=seen: seen.append(args[0])
        )
        assert model.probe(*batch) == []
        handle.remove()
        torch.testing.assert_close(seen[0][:, 7:], expected)
        assert sum(p.numel() for p in model.parameters_to_train().values()) == width
    del registry._adapters["shifted"]


def test_compiles_with_lora() -> None:
    model, batch = tiny_model("vl-t5")
    model.add_adapter("lora")
    stir(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    try:
        scores = compiled(*batch)
    except Exception:
        try:
            torch.compile(twin(model), fullgraph=True, backend="eager")(*batch[:3], use_cache=False)
        except Exception as error:
            pytest.skip(f"the library's own network does not compile whole: {type(error).__name__}")
        raise
    torch.testing.assert_close(scores, model(*batch), rtol=1e-4, atol=1e-5)
    F.cross_entropy(scores.flatten(0, 1), batch[2].flatten()).backward()
    assert all(p.grad is not None for p in model.parameters_to_train().values())
