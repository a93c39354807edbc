"""What peft's users have beside A and B: biases, normalisations, convolutions, changed starts, heads with a norm."""

from __future__ import annotations

import copy
import json
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from zoo.disk.layout import CONFIG, WEIGHTS
from zoo.errors import ConfigError

peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft)")

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def build(adapter: Any = None) -> zoo.Model:
    torch.manual_seed(0)
    return zoo.load("timm:vit_tiny_patch16_224", adapter, pretrained=False, **SMALL).eval()


def theirs(model: zoo.Model, **config: Any) -> Any:
    """peft's model on the same weights, all that it trains at random values."""
    generator = torch.Generator().manual_seed(1)
    wrapped = peft.get_peft_model(
        copy.deepcopy(model).merge(), peft.LoraConfig(**{"target_modules": ["qkv"], **config})
    )
    for value in wrapped.parameters():
        if value.requires_grad:
            value.data += 0.1 * torch.randn(value.shape, generator=generator)
    return wrapped.eval()


CONFIGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "all biases": ({"bias": "all"}, ["lora", "bitfit"]),
    "all biases, whole head": ({"bias": "all", "modules_to_save": ["head"]}, ["lora", "bitfit"]),
    "biases beside LoRA": ({"bias": "lora_only"}, ["lora", "bitfit"]),
    "the final norm": ({"modules_to_save": ["norm", "head"]}, ["lora", "norm"]),
    "norms and biases": ({"bias": "all", "modules_to_save": ["norm", "norm1"]}, ["lora", "norm", "bitfit"]),
    "the patch convolution": ({"target_modules": ["proj"], "r": 4}, ["lora"]),
    "PiSSA": ({"init_lora_weights": "pissa", "r": 4, "lora_alpha": 6}, ["lora"]),
    "PiSSA, rsLoRA": ({"init_lora_weights": "pissa", "r": 4, "lora_alpha": 6, "use_rslora": True}, ["lora"]),
    "OLoRA": ({"init_lora_weights": "olora", "r": 4, "lora_alpha": 6}, ["lora"]),
    "PiSSA, patterns": (
        {
            "init_lora_weights": "pissa",
            "target_modules": ["qkv", "fc1"],
            "rank_pattern": {"fc1": 3},
            "alpha_pattern": {"fc1": 7},
        },
        ["lora"],
    ),
    "a regular expression": ({"target_modules": r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"}, ["lora"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_peft_trains_beside_or_instead(case: str, tmp_path: Path) -> None:
    """Refused before, though each has an exact form: a bias is a bias, PiSSA a changed base plus LoRA."""
    config, names = CONFIGS[case]
    model = build()
    bare = copy.deepcopy(model)
    wrapped = theirs(model, **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(tmp_path)
    zoo.from_peft(tmp_path, model=model)
    assert list(model.active) == names
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x), wrapped(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(copy.deepcopy(model).merge().eval()(x), wrapped(x), rtol=1e-5, atol=1e-5)
        assert (bare(x) - wrapped(x)).abs().max() > 0.05
        model.save_adapter(tmp_path / "ours")
        again = copy.deepcopy(bare)
        zoo.disk.attach(again, zoo.disk.read(tmp_path / "ours"))
        assert torch.equal(again(x), model(x))
    for value in model.parameters_to_train().values():
        value.grad = None
    model(x).square().sum().backward()
    assert all(value.grad is not None for value in model.parameters_to_train().values())


def test_extras_that_do_not_fit(tmp_path: Path) -> None:
    wrapped = theirs(build(), bias="all", modules_to_save=["norm"])
    wrapped.save_pretrained(tmp_path)
    good = load_file(tmp_path / WEIGHTS)
    first = "base_model.model."
    for change, message in (
        ({first + "norm.weight": torch.ones(31)}, "another width"),
        ({first + "blocks.0.mlp.fc1.bias": torch.ones(3)}, "another width"),
        ({first + "blocks.7.mlp.fc1.bias": torch.ones(3)}, "no point"),
        ({first + "head.bias": torch.ones(7)}, "classifier"),
        ({first + "blocks.0.mlp.fc1.weight": torch.ones(128, 32)}, "whole modules of the backbone"),
    ):
        save_file({**good, **change}, tmp_path / WEIGHTS)
        model = build()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(zoo.ZooError, match=message):
            zoo.from_peft(tmp_path, model=model)
        assert not model.adapters and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_head_with_its_own_norm(tmp_path: Path) -> None:
    """AST's classifier is a norm and a projection: written and read as the library's module of that name."""
    pytest.importorskip("transformers", reason="transformers is not installed (pip install 'adapter-zoo[audio]')")

    def sound(adapter: Any = None) -> zoo.Model:
        torch.manual_seed(0)
        sizes = {
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "intermediate_size": 96,
            "max_length": 40,
            "num_mel_bins": 32,
        }
        return zoo.load("ast-micro", adapter, pretrained=False, num_classes=3, **sizes).eval()

    model = sound("lora")
    with torch.no_grad():
        for value in model.parameters_to_train().values():
            value += 0.2 * torch.randn(value.shape)
    x = model.family.example_batch()[0]
    zoo.to_peft(model, tmp_path / "peft")
    assert json.loads((tmp_path / "peft" / CONFIG).read_text())["modules_to_save"] == ["classifier"]
    bare = sound()
    bare.reset_head(3)
    wrapped = peft.PeftModel.from_pretrained(bare.merge(), tmp_path / "peft").eval()
    with torch.no_grad():
        torch.testing.assert_close(wrapped(x).logits, model(x), rtol=1e-5, atol=1e-5)
        again = sound()
        zoo.from_peft(tmp_path / "peft", model=again)
        torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forked processes")
@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_a_save_for_peft_that_was_killed(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between its two files, new weights stood beside the old config, whose scale they were then multiplied by."""
    old, new = build(zoo.adapter("lora", rank=2, alpha=2)), build(zoo.adapter("lora", rank=2, alpha=50))
    with torch.no_grad():
        for i, model in enumerate((old, new)):
            for value in model.parameters_to_train().values():
                value += 0.1 * (i + 1)
    zoo.to_peft(old, tmp_path / "out")
    x = torch.randn(2, 3, 32, 32)
    answers = [model(x).detach() for model in (old, new)]
    child = os.fork()
    if child == 0:
        count = 0
        for owner, name in ((Path, "unlink"), (Path, "replace")):
            plain = getattr(owner, name)

            def dies(self: Path, *args: Any, _plain: Any = plain, **kwargs: Any) -> Any:
                nonlocal count
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += not self.name.endswith(".tmp") or bool(args)
                return _plain(self, *args, **kwargs)

            setattr(owner, name, dies)
        zoo.to_peft(new, tmp_path / "out")
        os._exit(0)
    os.waitpid(child, 0)
    again = build()
    zoo.from_peft(tmp_path / "out", model=again)
    found = [torch.allclose(again(x), answer, atol=1e-5) for answer in answers]
    assert found in ([True, False], [False, True]) and found[0] == (step < 2)
    try:
        wrapped = peft.PeftModel.from_pretrained(build().merge(), tmp_path / "out").eval()
    except (ValueError, OSError):
        assert not (tmp_path / "out" / CONFIG).exists()
    else:
        assert torch.allclose(wrapped(x), answers[step >= 2], atol=1e-5)
    zoo.to_peft(new, tmp_path / "out")
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["lora_alpha"] == 100  # two slices of one pair


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    zoo.to_peft(build("lora"), tmp_path)
    (tmp_path / CONFIG).unlink()
    tensors = load_file(tmp_path / WEIGHTS)
    zoo.from_peft(tmp_path, model=build())  # the weights file has a copy
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ConfigError, match=f"has no {CONFIG}"):
        zoo.from_peft(tmp_path, model=build())
