"""The machinery of `benchmarks/against_peft.py` at toy size: what it counts and compares, not the numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import zoo

pytest.importorskip("peft", reason="peft is not installed (pip install peft)")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import against_peft, groups, measure
from benchmarks.groups import Setting
from benchmarks.measure import Row, Run
from benchmarks.reference import DeepPrompts
from benchmarks.report import write

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "patch_size": 2}


def toy(**changes):
    sizes = {"size": 32, "batch": 2, "classes": 5, "rounds": 1, "prompts": (3, 4)}
    return Setting(vit="vit_tiny_patch16_224", vit_options=VIT, swin_options=SWIN, **{**sizes, **changes})


def test_every_group_at_toy_size(monkeypatch, tmp_path):
    monkeypatch.setattr(groups, "IMPORTS", {"torch": "pass", "zoo": "import zoo"})
    setting = toy()
    ticked = {}
    original = dict(groups.GROUPS)
    for name, group in original.items():

        def counted(s, tick, name=name, group=group):
            def both():
                ticked[name] = ticked.get(name, 0) + 1
                tick()

            return group(s, both)

        monkeypatch.setitem(groups.GROUPS, name, counted)
    rows = against_peft.measure(setting, list(original), progress=False)
    assert ticked == {name: groups.ticks(setting, name) for name in original}  # the progress bar ends where it should
    named = [(r.group, r.what) for r in rows]
    assert len(set(named)) == len(named)
    assert all(r.value >= 0 for r in rows if r.group != "import")
    by = dict(zip(named, rows))
    assert by["graphs compiled", "switched back (zoo)"].value == 2
    assert by["graphs compiled", "switched off (zoo)"].value == 3
    saved = {r.what: r.value for r in rows if r.group == "saved bytes"}
    assert saved["LoRA all, min (zoo) / full"] < saved["LoRA all, low (zoo) / full"] < saved["LoRA all (zoo) / full"]
    assert saved["LoRA all (zoo) / full"] < saved["LoRA all (peft) / full"]
    assert {"step time", "saved bytes", "eval", "disk", "import", "graphs compiled"} <= {r.group for r in rows}
    about = {"backbone": setting.vit, "batch": setting.batch, "machine": measure.machine("cpu")}
    write(rows, about, tmp_path, "out")
    document = json.loads((tmp_path / "out.json").read_text())
    assert len(document["rows"]) == len(rows) and document["machine"]["peft"]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_count_for_all():
    """A known network: tanh keeps its output, a trained linear its input, and the batch is left out."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 3)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    images = torch.randn(4, 6)
    assert Run("net", Net()).saved_bytes(images) == 4 * 10 * 4  # tanh's output, which is also b's input
    setting = toy()
    images, _ = setting.batch_of()
    plain, ours = Run("", setting.plain(groups.bitfit)), Run("", setting.ours("bitfit"))
    assert plain.saved_bytes(images) > 0
    assert ours.saved_bytes(images) <= plain.saved_bytes(images)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_growth_agrees_with_the_count():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            for _ in range(8):
                x = torch.tanh(x * self.scale)
            return x

    images = torch.randn(1024, 1024)  # 4 MiB; tanh keeps its output, which is what the next product keeps too
    run = Run("chain", Chain())
    counted = run.saved_bytes(images)
    assert counted == 8 * images.nbytes
    grown = measure.resident(run, images)
    assert abs(grown - counted) < 0.25 * counted


@pytest.mark.parametrize(("name", "options"), [("vit_tiny_patch16_224", VIT), ("swin_tiny_patch4_window7_224", SWIN)])
def test_straightforward_prompts_are_the_same_function(name, options):
    torch.manual_seed(0)
    model = zoo.load(
        f"timm:{name}", zoo.adapter("vpt", num_tokens=3), num_classes=5, pretrained=False, **options
    ).train()
    bare = zoo.load(f"timm:{name}", num_classes=5, pretrained=False, **options)
    bare.backbone.load_state_dict(model.backbone.state_dict())
    bare.head.load_state_dict(model.head.state_dict())
    plain = DeepPrompts(bare.merge(), 3).train()
    prompts = [p for key, p in model.parameters_to_train().items() if "prompt" in key]
    for theirs, ours in zip(plain.prompts, prompts, strict=True):
        theirs.data.copy_(ours.data)
    images = torch.randn(2, 3, 32, 32)
    expected, logits = plain(images), model(images)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for output in (expected, logits):
        nn.functional.cross_entropy(output, torch.tensor([0, 1])).backward()
    for theirs, ours in zip(plain.prompts, prompts, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    trained = {key for key, p in plain.named_parameters() if p.requires_grad}
    assert trained == {"prompts." + str(i) for i in range(len(prompts))} | {
        key for key in trained if key.startswith("module.head")
    }


def test_turns_are_fair():
    runs = [Run(name, nn.Identity()) for name in "abc"]
    seen = []

    def turn(run):
        seen.append(run.name)
        return float(len(seen))

    measure.take_turns(runs, turn, 4, lambda: None)
    rounds = ["".join(seen[i : i + 3]) for i in range(0, 15, 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(set(rounds)) > 1
    assert all(len(run.seconds) == 4 and min(run.seconds) > 3 for run in runs)  # the first round does not count


def test_targets():
    assert Row("", "", 0.6449, 0.64).passed and not Row("", "", 0.6451, 0.64).passed
    assert Row("", "", 1.2, None).passed is None
    assert Row("", "", 1.02, 1.0, 1.004, by_fastest=True).passed and not Row("", "", 1.02, 1.0, 1.004).passed
    assert not Row("", "", 10.3, 10.0, unit="ms").passed
    assert not Row("", "", 0.131, 0.13).passed  # small ones to three digits


def test_command_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(against_peft, "QUICK", {"vit_options": VIT, "size": 32, "batch": 2, "targets": False})
    code = against_peft.main(["--quick", "--only", "queries", "--rounds", "1", "--no-progress", "--out", str(tmp_path)])
    assert code == 0 and (tmp_path / "against_peft.json").is_file()
    assert "VQT 1 (zoo) / full" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        against_peft.main(["--only", "trainings"])
    assert "there is no group 'trainings'" in capsys.readouterr().err
