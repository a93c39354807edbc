"""peft's format for language models, with eyes and without, against the real peft: out, in, and as transformers loads it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from vlm_models import TINY, of_library, tiny

import zoo
from zoo.errors import ConfigError, MismatchError
from zoo.registry import family

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

NAMES = ["llama-7b", "qwen3-0.6b", *TINY]


def made(name: str, adapter: Any = None) -> zoo.Model:
    if name in TINY:
        return tiny(name, adapter)
    own = {"head_dim": 8} if name.startswith("qwen3") else {}
    return zoo.load(name, adapter, pretrained=False, seed=0, **{**family("decoder").tiny[1], **own}).eval()  # type: ignore[index]


def scores(model: zoo.Model, module: Any) -> torch.Tensor:
    """What a plain network of the library gives for the tiny batch."""
    torch.manual_seed(4)
    ids, mask, _, *seen = model.family.tiny_batch()
    if seen:
        return module(**of_library(model, ids, mask, *seen)).logits  # type: ignore[no-any-return]
    places = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    return module(input_ids=ids, attention_mask=mask, position_ids=places).logits  # type: ignore[no-any-return]


def ours(model: zoo.Model) -> torch.Tensor:
    torch.manual_seed(4)
    ids, mask, _, *seen = model.family.tiny_batch()
    return model(ids, mask, None, *seen)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dora", [False, True])
def test_ours_is_loaded_by_peft_and_by_transformers(name: str, dora: bool, tmp_path: Path) -> None:
    """All projections of both towers, fused ones of the eyes too: the same scores, to rounding."""
    model = made(name)
    plain, second = copy.deepcopy(model.backbone), copy.deepcopy(model.backbone)
    model.add_adapter(zoo.adapter("lora", rank=3, targets="all-linear", dora=dora))
    torch.manual_seed(2)
    for key, parameter in model.adapters["lora"].named_parameters():
        if "lora_b" in key:
            nn.init.normal_(parameter, std=0.2)
        elif "magnitude" in key:  # others than those of the weight, with which it would start there
            parameter.data.mul_(1.0 + torch.rand_like(parameter))
    zoo.to_peft(model, tmp_path / "out")
    with torch.no_grad():
        expected, before = ours(model), scores(model, plain)
        loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "out").eval()
        torch.testing.assert_close(scores(model, loaded), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(expected, before, atol=1e-2)
        second.load_adapter(str(tmp_path / "out"))  # type: ignore[operator]
        torch.testing.assert_close(scores(model, second.eval()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_pefts_is_loaded_by_us(name: str, tmp_path: Path) -> None:
    """With its usual targets (q and v of the language network) and a norm that was trained whole; also merged."""
    model = made(name)
    eyes = "vision|visual" if name in TINY else "nothing"
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        init_lora_weights=False,
        target_modules=rf"(?!.*({eyes})).*\.(q_proj|v_proj|down_proj)",
        modules_to_save=["post_attention_layernorm"],
    )
    theirs = peft.get_peft_model(copy.deepcopy(model.backbone), config).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "modules_to_save" in key:
                parameter.add_(0.3)
        theirs.save_pretrained(tmp_path / "in")
        expected = scores(model, theirs)
        zoo.from_peft(tmp_path / "in", model=model)
        torch.testing.assert_close(ours(model), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(scores(model, model.merge()), expected, rtol=1e-4, atol=1e-4)


def test_what_has_no_place_is_named(tmp_path: Path) -> None:
    model = made("qwen2-vl-2b")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    peft.get_peft_model(copy.deepcopy(model.backbone), config).save_pretrained(tmp_path / "head")
    with pytest.raises(MismatchError, match="lm_head"):
        zoo.from_peft(tmp_path / "head", model=model)
    assert not model.adapters
    config = peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    decoder = made("llama-7b")
    peft.get_peft_model(copy.deepcopy(decoder.backbone), config).save_pretrained(tmp_path / "prefix")
    with pytest.raises(ConfigError, match="PREFIX_TUNING"):
        zoo.from_peft(tmp_path / "prefix", model=decoder)
