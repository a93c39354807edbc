"""peft's LoRA format, with the real peft on the other side and the same timm model: outputs agree to 1e-5, both ways."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from zoo.adapters.lora import LoRA

peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft)")

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "patch_size": 2}
VIT_NAME = "timm:vit_tiny_patch16_224"
SWIN_NAME = "timm:swin_tiny_patch4_window7_224"


def images(seed=7):
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def build(adapter=None, name=VIT_NAME, num_classes=5, **kwargs):
    torch.manual_seed(0)
    sizes = VIT if name == VIT_NAME else SWIN
    return zoo.load(name, adapter, num_classes=num_classes, pretrained=False, **{**sizes, **kwargs}).eval()


def shake(model, std=0.3):
    """All trainable values random, so that nothing is zero by chance."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters_to_train().values():
        parameter.data += torch.randn(parameter.shape, generator=generator) * std
    return model


def plain_timm(model):
    """The library's module with the same frozen weights and a head of its own, untrained, as peft's users have it."""
    bare = copy.deepcopy(model)
    for name in list(bare.adapters):
        bare.remove_adapter(name)
    torch.manual_seed(5)
    bare.reset_head(model.num_classes)
    return bare.merge()


def in_peft(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns of keys that it misses or does not know
        return peft.PeftModel.from_pretrained(plain_timm(model), folder).eval()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


EXPORTS = {
    "q, v": LoRA(rank=3),
    "k alone": LoRA(rank=2, targets="k"),
    "q, k, v": LoRA(rank=4, alpha=6, targets="q,k,v"),
    "all": LoRA(rank=2, alpha=3.5, targets="all-linear"),
    "some blocks": LoRA(rank=2, targets=("blocks.1.attn.{q,o}", "blocks.0.mlp.up")),
    "rslora": LoRA(rank=4, alpha=8, targets="o,up", rslora=True),
    "rslora, fused": LoRA(rank=4, alpha=8, targets="all-linear", rslora=True),
    "ranks": LoRA(rank=4, alpha=4, targets="all-linear", ranks={"v": 7, "blocks.0.**": 2}, alphas={"up": 9, "k": 1.5}),
    "dora": LoRA(rank=3, alpha=6, targets="o,up,down", dora=True),
    "dora on slices": LoRA(rank=3, alpha=6, targets="q,v", dora=True),
}


@pytest.mark.parametrize("lora", EXPORTS.values(), ids=EXPORTS.keys())
def test_out_and_back(lora, tmp_path):
    model = shake(build(lora))
    folder = zoo.to_peft(model, tmp_path / "out")
    theirs = in_peft(model, folder)
    expected = model(images())
    close(theirs(images()), expected)
    with model.disable():
        assert (model(images()) - expected).abs().max() > 1e-2  # the adapter does something
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"

    back = build()
    assert zoo.from_peft(folder, model=back) == "lora"
    close(back(images()), expected)
    assert back.adapters["lora"].config() == model.adapters["lora"].config()  # not the rank of the joined slices
    assert back.probe(images()) == []


def test_what_the_file_says(tmp_path):
    model = shake(build(LoRA(rank=2, targets="q,v,o")))
    zoo.to_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    # "proj" alone would also be the patch embedding's
    assert sorted(config["target_modules"]) == ["attn.proj", "qkv"]
    assert config["modules_to_save"] == ["head"]
    assert {config["r"], *config["rank_pattern"].values()} == {2, 4}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    joined = tensors["base_model.model.blocks.1.attn.qkv.lora_B.weight"]
    part = model.adapters["lora"].module_at
    assert joined.shape == (96, 4)
    assert torch.equal(joined[:32, :2], part("blocks.1.attn.q").lora_b)
    assert torch.equal(joined[64:, 2:], part("blocks.1.attn.v").lora_b)
    assert not joined[32:64].any() and not joined[:32, 2:].any() and not joined[64:, :2].any()


def test_out_of_swin(tmp_path):
    model = shake(build(LoRA(rank=2, targets="all-linear"), SWIN_NAME))
    expected = model(images())
    close(in_peft(model, zoo.to_peft(model, tmp_path))(images()), expected)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["head.fc"]
    again = zoo.from_peft(tmp_path, model=build(name=SWIN_NAME), name="mine")
    assert again == "mine"


def test_trained_on_in_peft_and_back(tmp_path):
    """Exported, trained there, saved there: B is no longer diagonal in blocks, so the slices get the whole A."""
    model = shake(build(LoRA(rank=2, targets="q,v")))
    zoo.to_peft(model, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(plain_timm(model), tmp_path / "a", is_trainable=True)
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.5)
    torch.nn.functional.cross_entropy(theirs(images()), torch.tensor([0, 1, 2])).backward()
    optimizer.step()
    theirs.eval().save_pretrained(tmp_path / "b")
    back = build()
    zoo.from_peft(tmp_path / "b", model=back)
    close(back(images()), theirs(images()))
    assert back.adapters["lora"].rank == 4


def peft_model(model, **config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(plain_timm(model), peft.LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.3 * (noise.abs() if "magnitude" in name else noise)
    return theirs


IMPORTS = {
    "qkv": {"target_modules": ["qkv"], "r": 3, "lora_alpha": 6},
    "with head": {"target_modules": ["qkv"], "modules_to_save": ["head"]},
    "all, ranks and alphas": {
        "target_modules": ["qkv", "attn.proj", "fc1", "fc2"],
        "rank_pattern": {"blocks.0.attn.qkv": 2, "fc1": 5},
        "alpha_pattern": {"fc2": 3, r"blocks\.1\..*fc1": 11},
    },
    "rslora": {"target_modules": ["fc1", "qkv"], "r": 4, "lora_alpha": 5, "use_rslora": True},
    "dora": {"target_modules": ["qkv", "fc2"], "r": 2, "use_dora": True},
    "one block": {"target_modules": ["attn.proj", "fc1"], "layers_to_transform": [1], "layers_pattern": "blocks"},
    "gaussian, dropout": {
        "target_modules": "all-linear",
        "init_lora_weights": "gaussian",
        "lora_dropout": 0.1,
        "exclude_modules": ["head"],
    },
}


@pytest.mark.parametrize("config", IMPORTS.values(), ids=IMPORTS.keys())
def test_in(config, tmp_path):
    base = build()
    theirs = peft_model(base, **config)
    theirs.save_pretrained(tmp_path)
    plain_head = theirs.base_model.model.get_classifier()
    model = build()
    assert zoo.from_peft(tmp_path, model=model) == "lora"
    if "modules_to_save" not in config:  # else the head came along
        model.head.load_state_dict(plain_head.state_dict())
    expected = theirs(images())
    close(model(images()), expected)
    assert model.adapters["lora"].dropout == config.get("lora_dropout", 0.0)
    assert model.probe(images()) == []
    # and out again, as what it became
    close(in_peft(model, zoo.to_peft(model, tmp_path / "again"))(images()), expected)
    # and saved in our format
    model.save_adapter(tmp_path / "ours")
    twin = build()
    from zoo.disk import attach, read

    attach(twin, read(tmp_path / "ours"))
    assert torch.equal(twin(images()), model(images()))


def test_imported_settings_are_readable(tmp_path):
    base = build()
    peft_model(base, **IMPORTS["all, ranks and alphas"]).save_pretrained(tmp_path)
    model = build()
    zoo.from_peft(tmp_path, model=model)
    settings = model.adapters["lora"].config()
    assert settings["targets"] == ["q", "k", "v", "o", "up", "down"]
    assert settings["ranks"] == {"blocks.0.attn.q": 2, "blocks.0.attn.k": 2, "blocks.0.attn.v": 2, "up": 5}
    assert settings["alphas"] == {"blocks.1.mlp.up": 11.0, "down": 3.0}


def test_a_lora_on_the_classifier_is_folded_into_the_models_own(tmp_path):
    base = build()
    theirs = peft_model(base, target_modules="all-linear", r=2)
    theirs.save_pretrained(tmp_path)
    model = build()
    model.head.load_state_dict(plain_timm(base).head.state_dict())
    zoo.from_peft(tmp_path, model=model)
    close(model(images()), theirs(images()))
    with pytest.raises(zoo.ZooError, match="does not hold the classifier itself"):
        zoo.from_peft(tmp_path, model=build(num_classes=4))


def test_builds_the_backbone_by_itself(tmp_path):
    torch.manual_seed(0)
    model = zoo.load("vit-micro", LoRA(rank=2), num_classes=3, pretrained=False, depth=1)
    model.classes = ["a", "b", "c"]
    shake(model).eval()
    zoo.to_peft(model, tmp_path)
    torch.manual_seed(0)
    again = zoo.from_peft(tmp_path, pretrained=False).eval()
    assert again.backbone_name == "vit-micro" and again.backbone_kwargs == {"depth": 1}
    assert again.classes == ["a", "b", "c"]
    assert torch.equal(again(images()), model(images()))
    torch.manual_seed(1)
    with pytest.raises(zoo.ZooError, match="trained on other weights"):
        zoo.from_peft(tmp_path, "vit-micro", pretrained=False, depth=1)


def test_beside_another_adapter_the_head_is_its_own(tmp_path):
    source = shake(build(LoRA(rank=2), num_classes=7))
    zoo.to_peft(source, tmp_path)
    model = shake(build("bitfit"))
    before = model(images())
    name = zoo.from_peft(tmp_path, model=model)
    model.set_active(name)
    close(model(images()), source(images()))
    model.set_active("bitfit")
    assert torch.equal(model(images()), before)
    with pytest.raises(zoo.ZooError, match="Name one"):
        model.set_active("bitfit", name)
        zoo.to_peft(model, tmp_path / "x")
    zoo.to_peft(model, tmp_path / "x", adapter=name)


def test_no_head(tmp_path):
    model = shake(build(LoRA(rank=2, targets="o"), num_classes=0))
    zoo.to_peft(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] is None
    bare = copy.deepcopy(model)
    bare.remove_adapter("lora")
    close(peft.PeftModel.from_pretrained(bare.merge(), tmp_path).eval()(images()), model(images()))
    again = build(num_classes=0)
    zoo.from_peft(tmp_path, model=again)
    assert torch.equal(again(images()), model(images()))


def test_what_cannot_go_out(tmp_path):
    with pytest.raises(zoo.ZooError, match="only 'lora'"):
        zoo.to_peft(build("bitfit"), tmp_path)
    with pytest.raises(zoo.ZooError, match="none is active"):
        zoo.to_peft(build(), tmp_path)
    model = build("lora")
    with pytest.raises(zoo.ZooError, match="no adapter 'lor'"):
        zoo.to_peft(model, tmp_path, adapter="lor")
    model.save_adapter(tmp_path / "ours")
    held = {p.name: p.read_bytes() for p in (tmp_path / "ours").iterdir()}
    with pytest.raises(zoo.ZooError, match="our own format"):
        zoo.to_peft(model, tmp_path / "ours")
    assert {p.name: p.read_bytes() for p in (tmp_path / "ours").iterdir()} == held
    with pytest.raises(zoo.ZooError, match="our own format"):
        zoo.from_peft(tmp_path / "ours", model=model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    peft_model(build(), target_modules=["qkv"], r=2, modules_to_save=["head"]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"bias": "some"}, "one of none, all"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_qalora": True}, "use_qalora"),
        ({"init_lora_weights": "pissa_niter_4"}, "random.*path_initial_model"),
        ({"init_lora_weights": "corda"}, "path_initial_model"),
        ({"init_lora_weights": ["pissa"]}, "path_initial_model"),
        ({"layer_replication": [[0, 2]]}, "depth"),
        ({"kasa_config": {"x": 1}}, "diagonal"),
        ({"r": 3}, "says 3"),
        ({"r": "2"}, "a whole number"),
        ({"rank_pattern": {"(": 2}}, "regular expression"),
        ({"rank_pattern": {"(a+)+$": 2}}, "for ever"),
        ({"alpha_pattern": {"(.*a|b*)*x": 2}}, "for ever"),
        ({"alpha_pattern": {".*" * 40 + "x": 2}}, "for ever"),
        ({"alpha_pattern": {"a" * 5000: 2}}, "at most 2,000"),
        ({"alpha_pattern": {str(i): 2 for i in range(5000)}}, "at most 4,096"),
        ({"use_dora": True, "lora_dropout": 0.1}, "no dropout"),
        ({"use_dora": True}, "lacks its magnitude"),
    ],
)
def test_settings_that_are_refused(saved, tmp_path, change, message):
    config = json.loads((saved / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
    (tmp_path / "adapter_model.safetensors").write_bytes((saved / "adapter_model.safetensors").read_bytes())
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(zoo.ZooError, match=message):
        zoo.from_peft(tmp_path, model=model)
    assert not model.adapters and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_weights_that_are_refused(saved, tmp_path):
    good = load_file(saved / "adapter_model.safetensors")
    name = "base_model.model.blocks.0.attn.qkv.lora_A.weight"
    (tmp_path / "adapter_config.json").write_bytes((saved / "adapter_config.json").read_bytes())
    path = tmp_path / "adapter_model.safetensors"

    def refused(tensors, message):
        save_file(tensors, path)
        model = build()
        with pytest.raises(zoo.ZooError, match=message):
            zoo.from_peft(tmp_path, model=model)
        assert not model.adapters and model.num_classes == 5

    refused({**good, name: torch.full_like(good[name], torch.nan)}, "finite")
    refused({k: v for k, v in good.items() if k != name}, "shapes none and")
    refused({**good, "base_model.model.norm.weight": torch.ones(32)}, "holds weight of 'norm'")
    refused({**good, "base_model.model.blocks.0.mlp.fc1.weight": torch.ones(2, 2)}, "whole modules of the backbone")
    refused({**good, "base_model.model.blocks.0.attn.qkv.lora_C.weight": torch.ones(2)}, "whole modules|no part")
    refused({**good, "base_model.model.head.weight": torch.ones(5, 31)}, "does not fit the features")
    moved = {k.replace("blocks.1", "blocks.2"): v for k, v in good.items()}
    refused(moved, "'blocks.2.attn.qkv', where .* no linear point")
    wide = {k: torch.cat([v, v], dim=-1) if "lora_A" in k else v for k, v in good.items()}
    refused(wide, "another width")
    path.write_bytes((saved / "adapter_model.safetensors").read_bytes()[:-9])
    with pytest.raises(zoo.ZooError, match="truncated"):
        zoo.from_peft(tmp_path, model=build())
    path.unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(zoo.ZooError, match="pickle"):
        zoo.from_peft(tmp_path, model=build())


def test_failing_to_build_says_what_to_name(saved):
    with pytest.raises(zoo.ZooError, match="does not say which backbone"):
        zoo.from_peft(saved)
    with pytest.raises(zoo.ZooError, match="not both"):
        zoo.from_peft(saved, "vit-micro", model=build())
    with pytest.raises(zoo.ZooError, match="There is no folder"):
        zoo.from_peft(saved / "nowhere")


def test_lora_ranks_and_alphas():
    model = build(LoRA(rank=4, targets="q,o", ranks={"o": 6, "blocks.1.attn.*": 2}, alphas={"blocks.0.attn.q": 12}))
    part = model.adapters["lora"].module_at
    at = {n: (len(part(n).lora_a), part(n).scale) for n in ("blocks.0.attn.q", "blocks.0.attn.o", "blocks.1.attn.o")}
    assert at == {"blocks.0.attn.q": (4, 3.0), "blocks.0.attn.o": (6, 1.0), "blocks.1.attn.o": (2, 1.0)}
    close(shake(model).merge()(images()), model(images()))
    for bad in ({"ranks": {"up": 4}}, {"ranks": {"q": 0}}, {"alphas": {"q": "1"}}, {"alphas": {"nowhere": 1}}):
        with pytest.raises(zoo.ZooError):
            build(LoRA(targets="q,o", **bad))
