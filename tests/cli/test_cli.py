"""The command line, run in this process; what needs a fresh process (start-up time, exit codes of the script) in one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from disk_parts import edit
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import vision.families.vit
import zoo
from zoo import registry
from zoo.cli import app
from zoo.cli.catalog import collapse
from zoo.cli.common import settings, size
from zoo.errors import ConfigError

COMMANDS = (
    "list",
    "points",
    "info",
    "fit",
    "eval",
    "push",
    "pull",
    "merge",
    "compress",
    "convert",
    "bench",
    "new",
    "demo",
)


def run(*arguments: Any, code: int = 0) -> Any:
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def document(*arguments: Any) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


def test_help_is_quick_and_names_every_command() -> None:
    script = "import sys; sys.argv = ['zoo', '--help']; from zoo.cli import app; app(standalone_mode=False)\n"
    script += "print('heavy:', [m for m in ('torch', 'timm', 'accelerate', 'matplotlib') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "heavy: []" in result.stdout  # torch alone would take seconds
    assert all(re.search(rf"^\W*{name}\s", result.stdout, re.MULTILINE) for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example(command: str) -> None:
    text = run(command, "--help").output
    assert re.search(rf"^\s+zoo {command}\b", text, re.MULTILINE), text


def test_version_is_that_of_the_distribution() -> None:
    declared = re.search(
        r'^version = "(.+)"$', (Path(__file__).parents[2] / "pyproject.toml").read_text(), re.MULTILINE
    )
    assert declared is not None
    assert run("--version").stdout == f"adapter-zoo {declared[1]}\n" == f"adapter-zoo {zoo.__version__}\n"


# -- list, points, info ---------------------------------------------------------------------------------------------


def test_list() -> None:
    found = document("list")
    assert [b["name"] for b in found["backbones"] if b["name"] == "vit-b16"] == ["vit-b16"]
    assert {"lora", "vpt", "spt"} <= {a["name"] for a in found["adapters"]}
    assert all(a["summary"].endswith(".") for a in found["adapters"])
    assert {b["name"] for b in document("list", "backbones", "swin*")["backbones"]} == set(zoo.list_backbones("swin*"))
    assert "backbones" not in document("list", "adapters")
    assert "vit-b16" in run("list", "vit*").output
    assert {t["name"]: t["classes"] for t in found["trained"]}["vit-micro-lora-digits"] == 10
    assert document("info", "vit-micro-lora-digits")["backbone"] == "vit-micro"


def test_points_prints_selectors_that_select_what_they_stand_for() -> None:
    model = zoo.load("swin-t", pretrained=False, num_classes=0, device="meta")
    lines = collapse(model.points)
    assert len(lines) < len(model.points) / 2
    # a word without a dot is a role: `norm` is the final norm's name, and as a selector it means every norm
    chosen = [p for name, first in lines for p in (model.points.select(name) if "." in name else [first])]
    assert sorted(p.name for p in chosen) == sorted(p.name for p in model.points)


def test_points() -> None:
    found = document("points", "vit-micro", "blocks.*.attn.{q,v}")
    assert [p["name"] for p in found] == [f"blocks.{i}.attn.{r}" for i in range(6) for r in "qv"]
    assert {p["dim_in"] for p in found} == {192}
    text = run("points", "vit-micro", "q,v").output
    assert "blocks.{0..5}.attn.q" in text and "12 of" in text
    assert "blocks.5.attn.v" in run("points", "vit-micro", "q,v", "--all").output


def test_info_of_a_backbone_counts_what_methods_train() -> None:
    facts = document("info", "vit-b16")
    assert facts["parameters"] == 85_798_656
    trained = {m["name"]: m["trainable"] for m in facts["methods"]}
    assert trained["lora"] == 294_912 and trained["bitfit"] == 102_912 and trained["linear"] == 0
    assert "85,798,656" in run("info", "vit-b16").output


def test_info_of_a_method() -> None:
    facts = document("info", "lora")
    assert {"name": "rank", "type": "int", "default": 8} in facts["settings"]
    assert "rank" in run("info", "lora").output


# -- from images to plain weights -----------------------------------------------------------------------------------


def test_fit_eval_push_pull_merge(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One adapter through all commands; each number is compared with one computed without the command line."""
    monkeypatch.chdir(tmp_path)
    train = ["--data", image_folder, "--split", "train", "--test-split", "test", "-e", 3, "-b", 8, "-o", "out"]
    fitted = document("fit", "vit-micro", "lora", "--set", "rank=2", "--set", "targets=q", *train)
    assert fitted["adapters"]["lora"]["rank"] == 2 and fitted["classes"] == 2
    assert fitted["trained_parameters"] == 6 * 2 * (192 + 192) + 2 * 192 + 2  # blocks * rank * (in + out), head
    assert fitted["steps"] == 9 and fitted["test"]["images"] == 12

    model = zoo.load(adapter="out").eval()
    wrong = 0
    for label, name in enumerate(("blue", "red")):
        for file in sorted((image_folder / "test" / name).iterdir()):
            image = model.preprocess(train=False)(Image.open(file).convert("RGB"))
            wrong += int(model(image[None]).argmax()) != label
    assert fitted["test"]["accuracy"] == pytest.approx(1 - wrong / 12)

    measured = document("eval", "out", "--data", image_folder / "test", "--per-class")
    assert measured["accuracy"] == fitted["test"]["accuracy"] and set(measured["per_class"]) == {"blue", "red"}
    one = document("eval", "out", "--data", image_folder / "test", "--save")  # the card then says so
    assert f"{100 * one['accuracy']:.2f} %" in Path("out/README.md").read_text()
    assert document("info", "out")["classes"] == ["blue", "red"]

    assert document("push", "out", "me/it", "--hub-folder", "hub")["address"].endswith("/hub/me/it")
    pulled = document("pull", "me/it", "--hub-folder", "hub", "--out", "back")["folder"]
    name = "adapter_model.safetensors"
    assert (tmp_path / pulled / name).read_bytes() == Path("out", name).read_bytes()

    merged = document("merge", "out", "--out", "merged.safetensors")
    assert merged["largest_difference"] < 1e-4
    plain = timm.models.VisionTransformer(**{**vision.families.vit.ViT.members["vit-micro"], "num_classes": 2})
    plain.load_state_dict(load_file("merged.safetensors"))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(plain.eval()(images), model(images), rtol=1e-4, atol=1e-4)


def test_fit_goes_on_from_a_saved_adapter(image_folder: Path, tmp_path: Path) -> None:
    train = ["--data", image_folder / "train", "--steps", 1, "-b", 4]
    document("fit", "vit-micro", "bitfit", *train, "-o", tmp_path / "first")
    document("fit", "vit-micro", tmp_path / "first", *train, "-o", tmp_path / "second", "--lr", 1e-30)
    first, second = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("first", "second"))
    assert first.keys() == second.keys()  # the head was kept too
    assert all(torch.allclose(first[k], second[k]) for k in first)


def test_bench(tmp_path: Path) -> None:
    found = document("bench", "-a", "lora,linear", "-b", 1, "--rounds", 1, "--png", tmp_path / "b.png")
    rows = {r["method"]: r for r in found["methods"]}
    assert rows["library"]["saved_ratio"] == rows["library"]["step_ratio"] == 1
    model = zoo.load("vit-micro", "lora", num_classes=100, pretrained=False)
    assert rows["lora"]["saved_bytes"] == model.saved_bytes(torch.randn(1, 3, 32, 32))
    assert rows["linear"]["saved_ratio"] < rows["lora"]["saved_ratio"] < 0.7
    assert Image.open(tmp_path / "b.png").size[0] > 500


def test_bench_of_what_does_not_classify() -> None:
    """A backbone without a head is measured on its own output; default methods that it does not take are left out."""
    pytest.importorskip("diffusers")
    found = document("bench", "dit-micro", "-b", 1, "--rounds", 1)
    assert [r["method"] for r in found["methods"]] == ["library", "bitfit", "lora", "adapter"]
    assert "head" in found["left_out"]["linear"] and "tokens points" in found["left_out"]["vpt"]
    model = zoo.load("dit-micro", "lora", pretrained=False)
    inputs = torch.randn(1, 3, 32, 32), torch.tensor([3]), torch.tensor([0])
    assert found["methods"][2]["saved_bytes"] == model.saved_bytes(*inputs)
    assert "nothing to train" in run("bench", "dit-micro", "-a", "linear", code=1).stderr


def test_sounds_through_all_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured on random weights in one command is measured again in another: `--seed` makes them."""
    soundfile = pytest.importorskip("soundfile")
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        Path("sounds", name).mkdir(parents=True)
        for i in range(3):
            soundfile.write(f"sounds/{name}/{i}.wav", 0.1 * generator.standard_normal(8000), 16_000)
    random = ["--no-pretrained", "--seed", 3]
    fitted = document(
        "fit", "ast-micro", "lora", "--data", "sounds", "--test", "sounds", "--steps", 1, "-o", "out", *random
    )
    assert fitted["classes"] == 2 and fitted["test"]["images"] == 6
    assert document("eval", "out", "--data", "sounds", *random)["loss"] == pytest.approx(
        fitted["test"]["loss"], abs=1e-6
    )
    assert document("merge", "out", "--out", "m.safetensors", *random)["largest_difference"] < 1e-5
    assert "fingerprint" in run("eval", "out", "--data", "sounds", "--no-pretrained", code=1).stderr
    assert document("info", "ast-micro")["data"]["sampling_rate"] == 16_000
    assert "sampling_rate 16,000" in run("info", "ast-micro").output


def test_fit_for_what_the_backbone_is_for(image_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    train = ["--data", image_folder / "train", "--steps", 1, "-b", 4, "--no-pretrained", "-o", tmp_path / "out"]
    fitted = document("fit", "dit-micro", "lora", *train)
    assert (fitted["task"], fitted["classes"], fitted["trained_parameters"]) == ("diffuse", None, 7 * 2 * 8 * 2 * 160)
    measured = document("eval", tmp_path / "out", "--data", image_folder / "test", "--no-pretrained")
    assert measured["images"] == 12 and "accuracy" not in measured
    assert "--shots" in run("fit", "dit-micro", "lora", *train, "--shots", 2, code=1).stderr
    assert "classify" in run("fit", "dit-micro", "lora", *train, "--task", "clasify", code=1).stderr


def test_fit_fails_before_it_trains(image_folder: Path, tmp_path: Path) -> None:
    train = ["--data", image_folder / "train", "--no-pretrained"]
    (tmp_path / "file").touch()
    for arguments, kind, hint in (
        (("vit-micro", "lorra", "-o", tmp_path / "o", *train), "UnknownNameError", "lora"),
        (("vit-micro", "lora", "-s", "rnak=3", "-o", tmp_path / "o", *train), "ConfigError", "rank"),
        (("vit-micro", "lora", "-s", "rank=many", "-o", tmp_path / "o", *train), "ConfigError", "int"),
        (("vit-micro", "lora", "-o", tmp_path / "file", *train), "SaveError", "is a file"),
        (("vit-micro", "lora", "-o", tmp_path / "o", "--data", tmp_path / "none"), "DataError", "none"),
        (("vit-micro", "lora", "-o", tmp_path / "o", "--data", image_folder), "DataError", "split"),
        (("vit-micro", "lora", "-o", tmp_path / "o", "--keep", "first", *train), "ConfigError", "best"),
    ):
        result = run("fit", *arguments, code=1)
        assert kind in result.stderr and hint in result.stderr and "Traceback" not in result.stderr
        assert not (tmp_path / "o").exists()


# -- errors ---------------------------------------------------------------------------------------------------------


def test_errors_are_one_panel_and_code_1() -> None:
    for arguments, kind, hint in (
        (("info", "vit-b61"), "UnknownNameError", "vit-b16"),
        (("points", "vit-b61"), "UnknownNameError", "vit-b16"),
        (("points", "vit-micro", "blocks.*.attn.qq"), "SelectionError", "attn.q"),
        (("list", "lora8"), "UnknownNameError", "lora"),
    ):
        result = run(*arguments, code=1)
        assert result.stdout == "" and kind in result.stderr and hint in result.stderr
        assert "Traceback" not in result.stderr


def test_usage_errors_are_code_2() -> None:
    assert "list" in run("lst", code=2).output  # the nearest command
    run("points", "vit-micro", "--stage", "one", code=2)
    run("bench", "--batch-size", "none", code=2)  # what is a number but cannot be is explained, with code 1


# -- helpers --------------------------------------------------------------------------------------------------------


def test_settings() -> None:
    assert settings(["rank=4", "targets=q,v", "dora=true"], ["lora"]) == {
        "lora": {"rank": 4, "targets": "q,v", "dora": True}
    }
    assert settings(["lora.rank=4"], ["vpt", "lora"]) == {"vpt": {}, "lora": {"rank": 4}}
    lists = settings(["a=[linear,lora]", 'b=["q", "v"]', "c=[blocks.*.fc1, 2]", "d=[2,8]", "e=[a:b]", "f=[]"], ["x"])[
        "x"
    ]
    assert [lists[k] for k in "abcdef"] == [
        ["linear", "lora"],
        ["q", "v"],
        ["blocks.*.fc1", 2],
        [2, 8],
        "[a:b]",
        [],
    ]
    for wrong, methods, hint in (
        ("rank", ["lora"], "name=value"),
        ("rank=4", ["vpt", "lora"], "vpt.rank=4"),
        ("ssf.x=1", ["lora"], "ssf"),
    ):
        with pytest.raises(ConfigError, match=re.escape(hint)):
            settings([wrong], methods)


def test_size() -> None:
    assert [size(n) for n in (0, 999, 1000, 2_500_000, 4.2e12)] == ["0 B", "999 B", "1.0 kB", "2.5 MB", "4200.0 GB"]


def test_what_is_declared_is_registered() -> None:
    """A name that a file declares is that of the class which its import registers; nothing is written down twice."""
    assert "entry-points" not in (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for name in registry.list_adapters():
        assert registry.adapter_class(name).method == name
    for name in registry.families():
        assert registry.family(name).family == name
    for name in registry.list_tasks():
        assert registry.task(name).name == name


def test_trust_backbone(tmp_path: Path) -> None:
    """A backbone of somebody's folder needs the word; with it, what is wrong with the folder is the next thing said."""
    folder = zoo.load("vit-micro", "lora", num_classes=2).save_adapter(tmp_path / "out")
    edit(folder, lambda c: c.update(backbone={"name": f"transformers:{tmp_path}", "fingerprint": None, "kwargs": {}}))
    for command in (("eval", folder, "--data", tmp_path), ("merge", folder, "--out", tmp_path / "m.safetensors")):
        assert "--trust-backbone" in run(*command, code=1).output
        assert "config.json" in run(*command, "--trust-backbone", code=1).output
