"""Nothing that a saved adapter names runs code or is read without the user's word. Every attack here is carried out."""

from __future__ import annotations

import builtins
import json
import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from disk_parts import edit, small_model
from hub_server import HubServer
from huggingface_hub import constants
from safetensors.torch import save as dump_safetensors
from safetensors.torch import save_file

import zoo
from zoo import registry
from zoo.disk.layout import CONFIG, FILES, WEIGHTS
from zoo.disk.trust import check_options
from zoo.errors import ConfigError, MismatchError, TrustError, WeightsError, ZooError
from zoo.library import only_tensors

FAMILIES = registry.families()
# Arguments of the libraries' loading functions: where something is read, how, and what is run
LOADING = (
    *("weights_only", "trust_remote_code", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"),
    *(
        "pretrained",
        "load_weights",
        "pretrained_image",
        "pretrained_image_path",
        "pretrained_text_path",
        "pretrained_hf",
    ),
    *(
        "use_safetensors",
        "variant",
        "revision",
        "subfolder",
        "torch_dtype",
        "device_map",
        "quantization_config",
        "proxies",
    ),
    *(
        "local_files_only",
        "token",
        "custom_pipeline",
        "features_only",
        "scriptable",
        "jit",
        "device",
        "dtype",
        "num_classes",
    ),
    *("checkpoint", "weights", "state_dict", "config", "auto_map", "_attn_implementation", "memory", "seed", "adapter"),
)


class Payload:
    """Unpickled, it writes the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return builtins.open, (str(self.marker), "w")


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A file that exists only if a payload has run; that it has not is checked after every test."""
    marker = tmp_path / "the payload ran"
    yield marker
    assert not marker.exists()


@pytest.fixture
def poison(marker: Path, tmp_path: Path) -> Path:
    """A checkpoint in torch's format with a payload. That it works is shown first, in a copy."""
    loud = Payload(marker.with_suffix(".shown"))
    torch.save({"state_dict": {"weight": loud}}, tmp_path / "shown.pt")
    torch.load(tmp_path / "shown.pt", weights_only=False)
    assert loud.marker.exists()
    torch.save({"state_dict": {"weight": Payload(marker)}}, tmp_path / "poison.pt")
    return tmp_path / "poison.pt"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "ZOO_HUB_FOLDER", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    huggingface_hub.close_session()
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved adapter, as it should be."""
    return small_model().save_adapter(tmp_path / "adapter")


def name(folder: Path, backbone: str, **kwargs: Any) -> Path:
    """The folder, changed so that it names another backbone and other options; as an attacker would write it."""

    def change(config: dict[str, Any]) -> None:
        config["backbone"] = {"name": backbone, "fingerprint": None, "kwargs": kwargs}

    edit(folder, change)
    return folder


# -- the backbone --------------------------------------------------------------------------------------------------------


CLIP = {
    "model_cfg": {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}


def test_a_repository_that_an_adapter_names(server: HubServer, folder: Path, poison: Path) -> None:
    """The whole attack: an adapter from the Hub, whose backbone is another repository with a pickle in it."""
    pytest.importorskip("open_clip")
    config = json.dumps(CLIP).encode()
    server.add("mallory/clip", {"open_clip_config.json": config, "open_clip_pytorch_model.bin": poison.read_bytes()})
    name(folder, "open_clip:hf-hub:mallory/clip", weights_only=False)
    server.add("nice/adapter", {file: (folder / file).read_bytes() for file in FILES})
    with pytest.raises(TrustError, match=r"'open_clip:hf-hub:mallory/clip'.*trust_backbone=True"):
        zoo.load(adapter="nice/adapter")
    assert server.count("mallory") == 0 and server.count("nice") > 0  # not even looked at
    with pytest.raises(TrustError, match="none of a source registered here"):
        zoo.load(adapter="nice/adapter", trust_backbone="open_clip:hf-hub:somebody/else")
    assert server.count("mallory") == 0
    # with the user's word the repository is read, as tensors, and an option that would change this is refused all the same
    with pytest.raises(ConfigError, match="'weights_only', which is none that a file may give"):
        zoo.load(adapter="nice/adapter", trust_backbone=True)
    assert server.count("mallory") == 0
    name(folder, "open_clip:hf-hub:mallory/clip")
    for trust in (True, "open_clip:hf-hub:mallory/clip"):
        with pytest.raises(ConfigError, match="could not be loaded"):
            zoo.load(adapter=folder, trust_backbone=trust)
    assert server.count("mallory.*bin") > 0


def test_a_repository_that_the_user_names(server: HubServer, poison: Path) -> None:
    pytest.importorskip("open_clip")
    config = json.dumps(CLIP).encode()
    server.add("mallory/clip", {"open_clip_config.json": config, "open_clip_pytorch_model.bin": poison.read_bytes()})
    with pytest.raises(ConfigError, match="could not be loaded"):
        zoo.load("open_clip:hf-hub:mallory/clip")
    assert server.count("mallory.*bin") > 0
    for option in ("weights_only", "trust_remote_code"):
        with pytest.raises(ConfigError, match=f"'{option}' is no option here"):
            zoo.load("open_clip:hf-hub:mallory/clip", **{option: option == "trust_remote_code"})


def test_a_trusted_backbone_is_built(server: HubServer, tmp_path: Path) -> None:
    """The word is enough where nothing is wrong."""
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    weights = open_clip.model.CLIP(**CLIP["model_cfg"]).state_dict()
    files = {
        "open_clip_config.json": json.dumps(CLIP).encode(),
        "open_clip_model.safetensors": dump_safetensors(weights),
    }
    server.add("friend/clip", files)
    model = zoo.load("open_clip:hf-hub:friend/clip", zoo.adapter("lora", rank=2))
    saved = model.save_adapter(tmp_path / "mine")
    with pytest.raises(TrustError):
        zoo.load(adapter=saved)
    assert 'trust_backbone="open_clip:hf-hub:friend/clip")' in (saved / "README.md").read_text()  # the card says so
    again = zoo.load(adapter=saved, trust_backbone="open_clip:hf-hub:friend/clip")
    assert torch.equal(again.backbone.state_dict()["token_embedding.weight"], weights["token_embedding.weight"])
    assert zoo.load("open_clip:hf-hub:friend/clip", adapter=saved).active == ("lora",)


@pytest.mark.parametrize("kind", ["open_clip:local-dir:", "open_clip:hf-hub:", "open_clip:ViT-B-32/", "timm:hf-hub:"])
def test_a_folder_that_an_adapter_names(kind: str, folder: Path, poison: Path, tmp_path: Path) -> None:
    """Also the adapter's own folder, with a pickle in it under a harmless name."""
    (folder / "open_clip_config.json").write_text(json.dumps(CLIP))
    (folder / "open_clip_pytorch_model.bin").write_bytes(poison.read_bytes())
    (folder / "README.md").write_bytes(poison.read_bytes())
    target = folder / "README.md" if kind.endswith("/") else folder
    with pytest.raises(TrustError):
        zoo.load(adapter=name(folder, f"{kind}{target}", weights_only=False))
    with pytest.raises(ZooError):
        zoo.load(adapter=name(folder, f"{kind}{target}"), trust_backbone=True)


@pytest.mark.parametrize("library", ["transformers", "diffusers"])
def test_a_folder_of_a_library(library: str, folder: Path, poison: Path, tmp_path: Path, marker: Path) -> None:
    pytest.importorskip(library)
    evil = tmp_path / "evil"
    evil.mkdir()
    code = f"open({str(marker)!r}, 'w')\nclass Config: pass\nclass Net: pass\n"
    (evil / "code.py").write_text(code)
    config: dict[str, Any] = {
        "model_type": "t5",
        "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Net"},
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 8,
        "num_layers": 1,
        "num_heads": 2,
        "vocab_size": 20,
    }
    if library == "diffusers":
        config = {"_class_name": "DiTTransformer2DModel", "auto_map": {"AutoModel": "code.Net"}, "num_layers": 1}
    (evil / "config.json").write_text(json.dumps(config))
    for file in ("pytorch_model.bin", "diffusion_pytorch_model.bin"):
        (evil / file).write_bytes(poison.read_bytes())
    named = name(folder, f"{library}:{evil}")
    with pytest.raises(TrustError):
        zoo.load(adapter=named)
    with pytest.raises(ZooError):
        zoo.load(adapter=named, trust_backbone=True)
    with pytest.raises(ZooError):
        zoo.load(f"{library}:{evil}")


def test_a_configuration_that_names_code(folder: Path, tmp_path: Path) -> None:
    """transformers fetches and runs what an attention's name says, if it is the name of a repository."""
    pytest.importorskip("transformers")
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "config.json").write_text(json.dumps({"model_type": "t5", "attn_implementation": "mallory/kernel"}))
    with pytest.raises(ZooError, match="asks for code from a repository"):
        zoo.load(f"transformers:{evil}")
    with pytest.raises(ConfigError, match="'attn_implementation' is 'mallory/kernel'"):
        zoo.load(adapter=name(folder, "ast-micro", attn_implementation="mallory/kernel"))


# -- options -------------------------------------------------------------------------------------------------------------


def test_files_that_options_name(folder: Path, poison: Path, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "plain.safetensors")
    attacks: list[tuple[str, dict[str, Any]]] = [
        ("timm:vit_tiny_patch16_224", {"checkpoint_path": str(poison), "weights_only": False}),
        ("timm:vit_tiny_patch16_224", {"checkpoint_path": str(tmp_path / "plain.safetensors")}),
        ("timm:vit_tiny_patch16_224", {"pretrained_cfg_overlay": {"file": str(poison)}}),
        ("timm:vit_tiny_patch16_224", {"pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/poison.pt"}}),
        ("timm:vit_tiny_patch16_224", {"pretrained_cfg": {"hf_hub_id": "mallory/vit"}}),
        ("clip-vit-b32", {"pretrained_image": True, "weights_only": False}),
        ("clip-vit-b32", {"vision_cfg": {"timm_model_name": "hf-hub:mallory/vit", "timm_model_pretrained": True}}),
        ("clip-vit-b32", {"vision_cfg": {"timm_model_name": "hf-hub:mallory/vit"}}),
        ("clip-vit-b32", {"text_cfg": {"hf_model_name": "mallory/text"}}),
        ("vl-t5", {"checkpoint": str(poison)}),
        ("groupmamba-micro", {"weights": str(poison)}),
        ("dit-xl2", {"use_safetensors": False}),
        ("ast", {"attn_implementation": "mallory/kernel"}),
    ]
    for backbone, options in attacks:
        with pytest.raises(ConfigError, match=r"none that a file may give|the backbone's option"):
            zoo.load(adapter=name(folder, backbone, **options))
        with pytest.raises(ConfigError):
            zoo.load(adapter=folder, trust_backbone=True)


def test_a_pickle_that_the_user_names(poison: Path) -> None:
    """What a user types is his own word; it is read as tensors only all the same."""
    with pytest.raises(WeightsError, match="holds more than tensors"):
        zoo.load("timm:vit_tiny_patch16_224", pretrained=False, checkpoint_path=str(poison))
    with pytest.raises(ConfigError, match="could not be loaded"):
        zoo.load("timm:vit_tiny_patch16_224", pretrained_cfg_overlay={"file": str(poison)})


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_lets_a_file_say_what_is_loaded(family: str) -> None:
    allowed = registry.family(family).saved_options
    assert not set(LOADING) & set(allowed)
    for part in (v for v in allowed.values() if isinstance(v, dict)):
        assert not [k for k in part if k in LOADING or k.startswith("hf_") or k.endswith("_pretrained")]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_closed_list_has_the_sizes_of_a_tiny_member(family: str) -> None:
    cls = registry.family(family)
    assert cls.tiny is not None
    check_options(cls.saved_options, json.loads(json.dumps(cls.tiny[1])), Path("folder"), cls.tiny[0])


def test_arguments_of_load_in_a_folder(folder: Path) -> None:
    """A folder that brings `device`, `dtype` and so on is refused by the option's name."""
    for option, value in {
        "device": "cuda",
        "dtype": "float16",
        "pretrained": False,
        "num_classes": 5,
        "seed": 1,
    }.items():
        with pytest.raises(ConfigError, match=f"the option '{option}', which is none"):
            zoo.load(adapter=name(folder, "vit-micro", **{option: value}))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("depth", 5000, "a whole number from 1 to 256"),
        ("depth", True, "a whole number"),
        ("depth", "2", "a whole number"),
        ("img_size", 100_000, "a whole number from 1 to 8192"),
        ("img_size", [[[[1]]]], "or a list of them"),
        ("mlp_ratio", "4", "a number"),
        ("mlp_ratio", 1e30, "a number"),
        ("qkv_bias", 1, "true or false"),
        ("global_pool", "evil", "one of"),
        ("global_pool", ["avg"], "one of"),
    ],
)
def test_types_and_ranges(folder: Path, option: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        zoo.load(adapter=name(folder, "vit-micro", **{option: value}), pretrained=False)


def test_a_backbone_larger_than_it_is(folder: Path) -> None:
    """Within the ranges, but many times the named one: refused before it takes memory, unless the user says so himself."""
    named = name(folder, "vit-micro", embed_dim=3072, depth=12)
    with pytest.raises(ConfigError, match=r"asks for a 'vit-micro' of [\d,]+ parameters; by itself it has [\d,]+"):
        zoo.load(adapter=named, pretrained=False)
    with pytest.raises(MismatchError):  # it may be built then, and the adapter does not fit
        zoo.load("vit-micro", adapter=named, pretrained=False, embed_dim=24, depth=1)


def test_another_backbone_than_the_file_names_is_compared_by_name(server: HubServer, folder: Path) -> None:
    named = name(folder, "transformers:mallory/t5")
    with pytest.raises(MismatchError, match="transformers:mallory/t5"):
        zoo.load("vit-micro", adapter=named)
    assert server.requests == []


# -- other formats -------------------------------------------------------------------------------------------------------


def test_a_folder_of_peft(folder: Path, tmp_path: Path, server: HubServer, poison: Path) -> None:
    note = {"backbone": {"name": "open_clip:hf-hub:mallory/clip", "kwargs": {"weights_only": False}}}
    path = "base_model.model.blocks.0.attn.qkv"
    tensors = {f"{path}.lora_A.weight": torch.ones(2, 8), f"{path}.lora_B.weight": torch.ones(24, 2)}
    made = tmp_path / "peft"
    made.mkdir()
    (made / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["qkv"]}))
    for text in (note, {"backbone": {"name": "timm:vit_tiny_patch16_224", "kwargs": {"checkpoint_path": str(poison)}}}):
        (made / WEIGHTS).write_bytes(dump_safetensors(tensors, {"format": "pt", "zoo": json.dumps(text)}))
        with pytest.raises(ConfigError, match=r"trust_backbone|none that a file may give"):
            zoo.from_peft(made)
    assert server.requests == []


def test_a_card_and_a_record_that_are_pickles(folder: Path, marker: Path) -> None:
    for file in ("README.md", "metrics.json"):
        (folder / file).write_bytes(pickle.dumps(Payload(marker)))
    torch.manual_seed(0)
    assert zoo.load(adapter=folder, pretrained=False).active == ("lora",)


# -- torch's switch ------------------------------------------------------------------------------------------------------


def test_the_switch_is_put_back(poison: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    force, forbid = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    monkeypatch.delenv(force, raising=False)
    monkeypatch.setenv(forbid, "1")
    with pytest.raises(RuntimeError, match="out"), only_tensors(), only_tensors():
        with pytest.raises(pickle.UnpicklingError):
            torch.load(poison, weights_only=False)
        raise RuntimeError("out")
    assert force not in os.environ and os.environ[forbid] == "1"
