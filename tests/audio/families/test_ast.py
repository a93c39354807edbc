"""AST: against transformers' own forward, prompts and prefixes written out, and what a merged model saves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from sampled import lots
from torch import Tensor, nn

import zoo
from zoo.disk import attach, read
from zoo.errors import ConfigError, DataError, UnknownNameError
from zoo.table import compatibility, tiny_model

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 96, "max_length": 40, "num_mel_bins": 32}
BODY = "audio_spectrogram_transformer"


def make(adapter: Any = None, *, double: bool = True, **options: Any) -> zoo.Model:
    """A small AST with positions and tokens that are not zero, so that mixing them up would show."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = zoo.load("ast-micro", pretrained=False, **{"num_classes": 3, **SMALL, **options})
        with torch.no_grad():
            for name, parameter in model.backbone.named_parameters():
                parameter += 0.2 * torch.randn_like(parameter) if "embeddings" in name else 0.0
        if adapter is not None:
            model.add_adapter(adapter)
    return (model.double() if double else model).eval()


def spectrograms(double: bool = True) -> Tensor:
    x = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(1))
    return x.double() if double else x


def library(model: zoo.Model) -> Any:
    """transformers' own module with the same weights, and nothing of ours in it."""
    config = transformers.ASTConfig(
        **SMALL, num_attention_heads=3, frequency_stride=16, time_stride=10, num_labels=3, attn_implementation="sdpa"
    )
    module = transformers.ASTForAudioClassification(config).double()
    state = model.backbone.state_dict()
    head = {f"classifier.{k}": v for k, v in model.head.state_dict().items()}
    assert not module.load_state_dict({**state, **head}).missing_keys
    return module.eval()


# -- without adapters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_equals_the_library_to_the_bit(training: bool) -> None:
    model, x = make(), spectrograms()
    module = library(model).train(training)
    model.train(training)
    own = module.get_submodule(BODY)(x)
    assert torch.equal(model.features(x), own.pooler_output)
    torch.testing.assert_close(own.pooler_output, own.last_hidden_state[:, :2].mean(1))
    assert torch.equal(model(x), module(x).logits)


def test_points_reach_the_modules_that_they_name() -> None:
    model = make()
    assert [p.path for p in model.points.select("blocks.1.{attn.q,mlp.down}")] == [
        f"{BODY}.layers.1.attention.q_proj",
        f"{BODY}.layers.1.mlp.fc2",
    ]
    assert model.points["patch_embed"].dim_in == 256
    assert model.points["norm"].module is model.backbone.get_submodule(BODY).layernorm
    tokens = model.points["blocks.0.tokens"]
    assert (tokens.num_prefix, tokens.first) == (2, True)


NAMED = ("linear", "full", "bitfit", "norm", "lora", "ssf", "ia3", "vpt", "prefix", "adapter", "vqt")


@pytest.mark.parametrize(("family", "methods"), lots(["ast"], zoo.list_adapters(), NAMED))
def test_every_method_works_or_is_refused(family: str, methods: list[str]) -> None:
    cells = {c.method: c for c in compatibility([family], methods)}
    for cell in cells.values():
        answers = (cell.attach, cell.train, cell.save, cell.merge)
        assert not any(a.startswith("defect") for a in answers), cell
        if cell.attach == "yes":
            assert (cell.train, cell.save) == ("yes", "yes"), cell
    merged = {name for name, cell in cells.items() if cell.merge == "yes"}
    assert {"linear", "full", "bitfit", "norm", "lora", "ssf", "ia3"} <= merged
    assert {cells[m].attach for m in ("vpt", "prefix", "adapter", "vqt")} == {"yes"}


# -- prompts and prefixes, written out ----------------------------------------------------------------------------------


def straightforward(module: Any, x: Tensor, prompts: list[Tensor], deep: bool) -> Tensor:
    """(B, d): prompts as tokens [CLS, DIST | prompts | patches] that run through whole blocks of the library's module."""
    body = module.get_submodule(BODY)
    tokens, count = body.embeddings(x), 0
    for i, layer in enumerate(body.layers):
        if deep or i == 0:
            prompt = prompts[i].expand(len(x), -1, -1)
            tokens = torch.cat([tokens[:, :2], prompt, tokens[:, 2 + count :]], dim=1)
            count = prompt.shape[1]
        tokens = layer(tokens, None)
    return body.layernorm(tokens)[:, :2].mean(1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("deep", [True, False])
def test_prompts_equal_the_straightforward_form(deep: bool, attention: str) -> None:
    model, x = make(zoo.adapter("vpt", num_tokens=3, deep=deep), attn_implementation=attention), spectrograms()
    module = library(model)
    prompts = [p.detach().clone().requires_grad_() for p in model.adapters["vpt"].parameters()]
    assert len(prompts) == (2 if deep else 1)
    expected = straightforward(module, x, prompts, deep)
    found = model.features(x)
    # the library's plain product has its softmax in float32
    close = {"rtol": 1e-10, "atol": 1e-10} if attention == "sdpa" else {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(found, expected, **close)
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    grads = torch.autograd.grad((expected * weights).sum(), prompts)
    (found * weights).sum().backward()
    for parameter, grad in zip(model.adapters["vpt"].parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, **close)


def test_prefixes_equal_the_attention_written_out() -> None:
    model = make(zoo.adapter("prefix", num_tokens=4))
    attention: Any = model.points["blocks.1.attn.product"].module
    prefix: Any = model.adapters["prefix"].module_at("blocks.1.attn.product")  # type: ignore[operator]
    x = torch.randn(2, 8, 48, dtype=torch.double)
    q, k, v = (getattr(attention, f"{n}_proj")(x).reshape(2, 8, 3, 16).transpose(1, 2) for n in "qkv")
    keys, values = (t.reshape(4, 3, 16).transpose(0, 1).expand(2, -1, -1, -1) for t in (prefix.keys, prefix.values))
    scores = (q @ torch.cat([keys, k], 2).transpose(-2, -1) / 4).softmax(-1)
    expected = attention.o_proj((scores @ torch.cat([values, v], 2)).transpose(1, 2).reshape(2, 8, 48))
    found, weights = attention(x, None)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert weights is None


# -- training -----------------------------------------------------------------------------------------------------------

METHODS = {
    "lora": {"targets": "all-linear", "rank": 2},
    "adapter": {"form": "houlsby", "rank": 2},
    "prefix": {"num_tokens": 2},
    "vpt": {"num_tokens": 2},
}


@pytest.mark.parametrize("method", METHODS)
def test_reaches_everything_and_is_removed(method: str) -> None:
    model, x = make(), spectrograms()
    before, frozen = model(x), copy.deepcopy(model.backbone.state_dict())
    model.add_adapter(zoo.adapter(method, **METHODS[method]))
    assert model.probe(x) == []
    if method in ("lora", "adapter"):
        assert torch.equal(model(x), before)  # their start is the pretrained function
    model.remove_adapter(method)
    state = model.backbone.state_dict()
    assert state.keys() == frozen.keys() and all(torch.equal(state[k], frozen[k]) for k in frozen)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("method", METHODS)
def test_memory_settings_change_no_gradient(method: str) -> None:
    model, x = make(zoo.adapter(method, **METHODS[method])), spectrograms()
    with torch.no_grad():
        for parameter in model.parameters_to_train().values():
            parameter += 0.05 * torch.randn_like(parameter)
    found: dict[str, dict[str, Tensor]] = {}
    kept = {}
    for memory in ("default", "low", "min"):
        model.memory = memory
        model.zero_grad()
        model.train()(x).square().sum().backward()
        found[memory] = {k: p.grad.clone() for k, p in model.parameters_to_train().items()}  # type: ignore[union-attr]
        kept[memory] = model.saved_bytes(x)
    for memory in ("low", "min"):
        for name, grad in found["default"].items():
            torch.testing.assert_close(found[memory][name], grad, rtol=1e-9, atol=1e-12)
    assert kept["min"] < kept["low"] < kept["default"]


def test_an_adapter_for_each_sample() -> None:
    model, x = make(zoo.adapter("lora", targets="all-linear", rank=2)), spectrograms()
    model.add_adapter(zoo.adapter("lora", rank=1), "other")
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    expected = []
    for i, name in enumerate(("other", "lora")):
        model.set_active(name)
        expected.append(model(x[i : i + 1]))
    torch.testing.assert_close(model(x, adapters=["other", "lora"]), torch.cat(expected), rtol=1e-9, atol=1e-9)


def test_compiles_whole() -> None:
    model, x = make(zoo.adapter("lora", rank=2), double=False), spectrograms(double=False)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)


# -- merging, saving, loading ---------------------------------------------------------------------------------------------


def test_merges_to_a_module_that_the_library_saves_and_loads(tmp_path: Path) -> None:
    model, x = make(zoo.adapter("lora", targets="all-linear", rank=2)), spectrograms()
    with torch.no_grad():
        for parameter in model.parameters_to_train().values():
            parameter += 0.05 * torch.randn_like(parameter)
    expected = model(x)
    plain: Any = model.merge()
    assert type(plain) is transformers.ASTForAudioClassification and plain.config.num_labels == 3
    assert not any(type(m).__module__.split(".")[0] in ("zoo", "audio") for m in plain.modules())
    torch.testing.assert_close(plain(x).logits, expected, rtol=1e-5, atol=1e-5)
    plain.save_pretrained(tmp_path / "merged")
    again = transformers.ASTForAudioClassification.from_pretrained(tmp_path / "merged", dtype=torch.double)
    assert torch.equal(again(x).logits, plain(x).logits)

    ours = zoo.load(f"transformers:{tmp_path / 'merged'}")  # its own classifier comes along as the head
    torch.testing.assert_close(ours.double()(x), expected, rtol=1e-5, atol=1e-5)
    # a folder is no repository of the Hub, and says nothing of a licence
    assert (ours.family.hub_id(), ours.family.licence(), ours.num_classes) == (None, None, 3)
    fresh = zoo.load(f"transformers:{tmp_path / 'merged'}", num_classes=7, pretrained=False)
    assert (fresh.num_classes, fresh.family.data_config()["max_length"]) == (7, 40)


def test_saves_and_reloads(tmp_path: Path) -> None:
    model, x = make(zoo.adapter("prefix", num_tokens=2), double=False), spectrograms(double=False)
    with torch.no_grad():
        for parameter in model.parameters_to_train().values():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_adapter(tmp_path / "out")
    twin = make(double=False)
    attach(twin, read(tmp_path / "out"))
    assert torch.equal(twin.eval()(x), model(x))


def test_the_head_is_that_of_the_library() -> None:
    model, x = make(double=False), spectrograms(double=False)
    assert {k: tuple(v.shape) for k, v in model.head.state_dict().items()} == {
        "layernorm.weight": (48,),
        "layernorm.bias": (48,),
        "dense.weight": (3, 48),
        "dense.bias": (3,),
    }
    model.reset_head(5)
    assert model(x).shape == (2, 5)
    bare = zoo.load("ast-micro", pretrained=False, **{"num_classes": 0, **SMALL})
    assert bare(x).shape == (2, 48)
    plain: Any = bare.merge()
    assert torch.equal(plain(x).logits, bare(x))


def test_every_normalisation_of_ast_is_a_point() -> None:
    """Counted against the library's modules; the classifier's own belongs to the head."""
    model = make()
    norms = {id(m) for m in model.backbone.modules() if isinstance(m, torch.nn.LayerNorm)}
    assert {id(p.module) for p in model.points.select(kind="norm")} == norms and len(norms) == 2 * 2 + 1


def test_a_merged_ast_names_its_classes(tmp_path: Path) -> None:
    """`save_pretrained` wrote LABEL_0, LABEL_1 ..., though the names are known."""
    model = make(double=False)
    model.reset_head(2, ["bark", "meow"])
    model.merge().save_pretrained(tmp_path)  # type: ignore[operator]
    config = transformers.ASTForAudioClassification.from_pretrained(tmp_path).config
    assert config.id2label == {0: "bark", 1: "meow"} and config.label2id == {"bark": 0, "meow": 1}


# -- other lengths and strides --------------------------------------------------------------------------------------------


def test_pretrained_positions_are_fitted(tmp_path: Path) -> None:
    model = make(double=False)
    model.merge().save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    name, key = f"transformers:{tmp_path / 'saved'}", f"{BODY}.embeddings.position_embeddings"
    table = model.backbone.get_parameter(key)
    assert table.shape == (1, 2 + 2 * 3, 48)
    short: Any = zoo.load(name, max_length=20)  # one patch of time: the middle one
    assert torch.equal(short.backbone.get_parameter(key), table[:, [0, 1, 3, 6]])
    assert short.preprocess()(torch.randn(16_000)).shape == (20, 32)
    dense: Any = zoo.load(name, time_stride=4, max_length=48)
    assert dense.backbone.get_parameter(key).shape == (1, 2 + 2 * 9, 48)
    assert dense.backbone.get_submodule(f"{BODY}.embeddings.patch_embeddings.projection").stride == (16, 4)
    x = torch.randn(2, 48, 32)
    assert dense(x).shape == (2, 3)
    plain: Any = dense.merge()  # and the library's own module goes on with the new geometry
    assert (plain.config.max_length, plain.config.time_stride) == (48, 4)
    plain.save_pretrained(tmp_path / "dense")
    again = transformers.ASTForAudioClassification.from_pretrained(tmp_path / "dense")
    assert torch.equal(again(x).logits, dense(x))


# -- what goes wrong ------------------------------------------------------------------------------------------------------


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"shape \(2, 32, 40\).*expected \(B, 40, 32\)"):
        make(double=False)(torch.randn(2, 32, 40))
    with pytest.raises(ConfigError, match=r"'max_lenght'.*'max_length'"):
        zoo.load("ast-micro", pretrained=False, max_lenght=10)
    with pytest.raises(ConfigError, match="at least one patch of 16"):
        zoo.load("ast-micro", pretrained=False, max_length=12)
    with pytest.raises(ConfigError, match="hidden_size"):
        zoo.load("ast-micro", pretrained=False, hidden_size="wide")
    with pytest.raises(UnknownNameError, match="could not be read"):
        zoo.load(f"transformers:{tmp_path / 'nothing'}")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "audio-spectrogram-transformer"}')
    with pytest.raises(ConfigError, match="could not be loaded"):
        zoo.load(f"transformers:{tmp_path / 'broken'}")


def test_ast_micro_says_when_its_weights_are_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import audio.families.ast

    monkeypatch.setattr(audio.families.ast, "WEIGHTS", tmp_path)
    with pytest.raises(ConfigError, match="pretrain_ast_micro"):
        zoo.load("ast-micro")
    saved = zoo.load("ast-micro", pretrained=False, num_classes=10)
    state = {k: v.half() for k, v in saved.backbone.state_dict().items()}
    state |= {f"classifier.{k}": v.half() for k, v in saved.head.state_dict().items()}
    from safetensors.torch import save_file

    save_file(state, tmp_path / "ast-micro.safetensors")
    assert (tmp_path / "ast-micro.safetensors").stat().st_size < 8e6
    model = zoo.load("ast-micro", max_length=498)  # five seconds
    assert model.num_classes == 10
    assert model(torch.randn(1, 498, 128)).shape == (1, 10)
    assert zoo.load("ast-micro", num_classes=4)(torch.randn(1, 100, 128)).shape == (1, 4)


def test_tiny_member() -> None:
    model, batch = tiny_model("ast")
    assert batch[0].shape == (2, 40, 32) and model(*batch).shape == (2, 3)
    assert isinstance(model.backbone, nn.Module) and model.family.modality == "audio"
