"""`zoo fit`: losses, averages, metrics, a search for the rate, more epochs; and threads that wait passively."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import zoo
from zoo.cli import app, wait_passively


def run(*arguments: Any, code: int = 0) -> Any:
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_options_of_a_fit(image_folder: Path, tmp_path: Path) -> None:
    line = [
        "fit",
        "vit-micro",
        "linear",
        "--data",
        image_folder / "train",
        "--no-pretrained",
        "--json",
        "-o",
        tmp_path / "out",
    ]
    more = ["--loss", "focal", "--class-weights", "red=2,blue=0.5", "--ema", 0.9, "--metrics", "f1", "--lr", "auto"]
    val = ["--val", image_folder / "test", "--monitor", "f1", "--checkpoints", tmp_path / "run"]
    found = json.loads(run(*line, *more, *val, "-e", 1).stdout)
    assert 0 <= found["metrics"]["val_f1"] <= 1 and found["epochs"] == 1
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["settings"]["lr_search"]) == 4 and report["settings"]["ema"] == 0.9
    # the same with more epochs goes on; another clip is a change that is asked for
    assert json.loads(run(*line, *more, *val, "-e", 2).stdout)["epochs"] == 2
    refused = run(*line, *more, *val, "-e", 3, "--clip", 2, code=1)
    assert "clip was 1.0, is 2.0" in refused.stderr
    assert json.loads(run(*line, *more, *val, "-e", 3, "--clip", 2, "--resume-with", "clip").stdout)["epochs"] == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--lr", "fast"), "--lr is 'fast'; expected a number, or auto"),
        (("--class-weights", "red=x"), "--class-weights is 'red=x'"),
        (("--loss", "vocal"), "Did you mean 'focal'"),
        (("--logger", "tensorbord"), "There is no logger 'tensorbord'"),
    ],
)
def test_what_is_refused(image_folder: Path, tmp_path: Path, options: tuple[str, str], words: str) -> None:
    line = (
        "fit",
        "vit-micro",
        "linear",
        "--data",
        image_folder / "train",
        "--no-pretrained",
        "-q",
        "-o",
        tmp_path / "out",
    )
    assert words in run(*line, *options, code=1).stderr


def test_folds_seeds_and_kept_features(image_folder: Path, tmp_path: Path) -> None:
    line = ["fit", "vit-micro", "linear", "--data", image_folder / "train", "--no-pretrained", "-e", 1]
    many = ["--cache-features", "--folds", 2, "--seeds", "0,3", "-o", tmp_path / "folds"]
    found = json.loads(run(*line, *many, "--json").stdout)
    assert [(r["fold"], r["seed"]) for r in found["runs"]] == [(1, 0), (2, 0), (1, 3), (2, 3)]
    assert found["mean"]["accuracy"] == pytest.approx(sum(r["accuracy"] for r in found["runs"]) / 4)
    report = json.loads((tmp_path / "folds" / "fold-2-seed-3" / "report.json").read_text())
    assert report["settings"]["cache_features"] is True and report["settings"]["seed"] == 3
    tested = run(*line, "--test", image_folder / "test", "--seeds", "1,2", "-q", "-o", tmp_path / "seeds").stdout
    assert "std" in tested and (tmp_path / "seeds" / "repeats.md").is_file()
    one = json.loads(run(*line, "--cache-features", "--json", "-o", tmp_path / "one").stdout)
    assert one["epochs"] == 1 and (tmp_path / "one" / "adapter_config.json").is_file()
    for options, words in (
        (("--seeds", "1,2"), "--seeds alone measures each run on --test data"),
        (("--folds", 2, "--seeds", "a"), "--seeds is 'a'; expected whole numbers"),
        (("--folds", 2, "--checkpoints", tmp_path / "c"), "are of a single fit"),
        (("--folds", 2, "--test", image_folder / "test"), "leave --test out"),
    ):
        assert words in " ".join(run(*line, *options, "-q", "-o", tmp_path / "no", code=1).stderr.split())


def test_several_shots_from_a_published_start(image_folder: Path, tmp_path: Path) -> None:
    """A first stage, saved; then k images of each class for several k, with three seeds each, from its values."""
    line = ["fit", "vit-micro", "vpt", "--data", image_folder / "train", "--steps", 2]
    run(*line, "-s", "num_tokens=2", "-q", "-o", tmp_path / "pre")
    test = ["--test", image_folder / "test", "-s", f"init={tmp_path / 'pre'}"]
    found = json.loads(run(*line, *test, "--shots", "1,2", "--json", "-o", tmp_path / "few").stdout)
    assert [(r["shots"], r["seed"]) for r in found["runs"]] == [(k, s) for k in (1, 2) for s in (0, 1, 2)]
    assert found["shots"]["2"]["mean"]["accuracy"] == pytest.approx(sum(r["accuracy"] for r in found["runs"][3:]) / 3)
    table = (tmp_path / "few" / "repeats.md").read_text().splitlines()
    assert table[0].startswith("| shots | runs | accuracy |") and len(table) == 4
    assert "+-" in run(*line, *test, "--shots", "1,2", "--seeds", "5", "-q", "-o", tmp_path / "few").stdout
    for options, words in (
        (("--shots", "1,2"), "--shots with several numbers measures each run on --test data"),
        (("--shots", "1,1"), "expected a whole number >= 1, or several different ones"),
        (("--shots", "0"), "--shots is '0'"),
        (("--shots", "1,2", "--folds", 2), "several --shots are measured on --test"),
        ((*test, "--shots", "1,2,9999"), "shots=9999 asks for more"),
    ):
        assert words in " ".join(run(*line, *options, "-q", "-o", tmp_path / "no", code=1).stderr.split())
    assert not (tmp_path / "no").exists()  # all numbers are tried on the data before the first training
    refused = run(*line, "-s", f"init={tmp_path / 'none'}", "-q", "-o", tmp_path / "no", code=1).stderr
    assert "none" in refused and "There is no adapter" in " ".join(refused.split())


def test_metric_learning(image_folder: Path, tmp_path: Path) -> None:
    """A task that embeds gets a model without a classifier, and is measured on the validation data's own classes."""
    line = [
        "fit",
        "vit-micro",
        "vpt",
        "--no-pretrained",
        "--data",
        image_folder / "train",
        "--val",
        image_folder / "test",
    ]
    found = json.loads(run(*line, "--task", "proxy-anchor", "--steps", 1, "--json", "-o", tmp_path / "out").stdout)
    assert 0 <= found["metrics"]["val_recall@1"] <= 1 and found["trained_parameters"] == 10 * 6 * 192
    assert zoo.disk.read(tmp_path / "out").has_head is False


def test_threads_wait_passively_in_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside one busy process on each core the demo fell from 250 to 2 images a second: threads that wait spun."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KMP_BLOCKTIME", "200")
    wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE" and os.environ["KMP_BLOCKTIME"] == "200"
    script = "import sys, zoo.cli; assert 'torch' not in sys.modules, 'too late for OpenMP'"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_pictures_and_calibration_of_an_evaluation(image_folder: Path, tmp_path: Path) -> None:
    line = ["eval", "vit-micro", "--data", image_folder / "test", "--no-pretrained"]
    model = zoo.load("vit-micro", "linear", pretrained=False, seed=0, classes=["blue", "red"])
    folder = model.save_adapter(tmp_path / "out")
    line[1] = folder
    found = json.loads(run(*line, "--confusion", tmp_path / "cm.png", "--calibration", "--json").stdout)
    assert 0 <= found["calibration"] <= 1 and sum(map(sum, found["confusion"])) == found["images"]
    assert (tmp_path / "cm.png").read_bytes().startswith(b"\x89PNG")
    assert "calibration" in run(*line, "--calibration").output
    run(*line, "--confusion", tmp_path / "cm.zzz", code=1)


def test_zero_shot_with_several_templates(image_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("open_clip", reason="open_clip is not installed (pip install 'adapter-zoo[multimodal]')")
    line = ["zeroshot", "clip-micro", "--data", image_folder / "test"]
    texts = ["--template", "a photo of a {}.", "--template", "a {} thing."]
    found = json.loads(run(*line, *texts, "--json").stdout)
    model = zoo.load("clip-micro")
    model.family.zero_shot(model, ["blue", "red"], ("a photo of a {}.", "a {} thing."))
    assert found["accuracy"] == zoo.evaluate(model, image_folder / "test", progress=False)["accuracy"]
    run(*line, "--classes", "blue,red", "--out", tmp_path / "t.csv")
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 13
    for wrong in (["--classes", "blue"], ["--template", "no place"], ["--out", tmp_path / "x.csv"]):
        run(*line, *wrong, code=1)
    assert "tower of texts" in run("zeroshot", "vit-micro", "--data", image_folder / "test", code=1).stderr
