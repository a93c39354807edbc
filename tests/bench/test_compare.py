"""`zoo bench compare`: rows that survive a kill, a search that sees no test item, the command line."""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from zoo import registry
from zoo.bench import study as module
from zoo.bench.journal import Journal
from zoo.bench.picture import MANY, picture
from zoo.bench.report import read
from zoo.bench.sets import named_sets
from zoo.bench.sizes import parse_methods
from zoo.bench.study import Protocol, Study, compare
from zoo.cli import app
from zoo.disk.store import alone
from zoo.errors import DataError, SaveError

QUICK: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 16,
    "embed_dim": 24,
    "depth": 1,
    "num_heads": 2,
    "pretrained": False,
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model of a comparison is a ViT of one block with random weights, the same in all."""
    load = module.load

    def small(name: str, **options: Any) -> Any:
        return load(name, **{"seed": 0, **options, **QUICK})

    monkeypatch.setattr(module, "load", small)
    monkeypatch.setattr("zoo.bench.sizes.load", small)


PROTOCOL = Protocol(steps=3, search_steps=2, batch_size=4, rates=2, seeds=(0, 1), rounds=1)


def run(out: Path, root: Path, methods: str = "lora,linear", protocol: Protocol = PROTOCOL, **options: Any) -> Study:
    budget = options.pop("budget", 400)
    return compare(
        "vit-s16", ["colours"], parse_methods(methods), [budget], protocol, out=out, data_root=root, **options
    )


@pytest.fixture
def root(image_folder: Path, tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "colours").symlink_to(image_folder)
    return tmp_path / "data"


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def test_rows_and_lines(root: Path, tmp_path: Path) -> None:
    found = run(tmp_path / "out", root)
    written = rows(tmp_path / "out")
    assert [(r["config"]["method"], r["config"]["kind"], r["config"]["seed"]) for r in written] == [
        (m, k, s) for m in ("lora", "linear") for k, s in [("search", 1000)] * 2 + [("run", 0), ("run", 1)]
    ]
    for row in written:
        assert {"revision", "versions", "device", "time"} <= set(row) and row["versions"]["torch"]
        assert row["config"]["fingerprint"].startswith("v1:")
    lora, linear = found.lines
    assert lora["trained"] == 384 and linear["trained"] == 0 and lora["head"] == 24 * 2 + 2
    assert len(lora["accuracy"]) == 2 and lora["step_ratio"] > 0 and 0 < lora["saved_ratio"] < 1
    assert linear["saved_ratio"] < lora["saved_ratio"]
    tried = [r["config"]["lr"] for r in written[:2]]
    assert lora["lr"] in tried and tried[1] == pytest.approx(3 * tried[0], rel=1e-2)
    best = max(lora["tried"], key=lambda t: (t["accuracy"], -t["loss"]))
    assert lora["lr"] == best["lr"] == written[2]["config"]["lr"]


def test_a_killed_comparison_goes_on(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the third training and while its row was being written: the same lines as unbroken, nothing twice."""
    whole = run(tmp_path / "whole", root)
    fits = 0
    fit = module.fit

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal fits
        fits += 1
        if fits == 3:
            raise KeyboardInterrupt
        return fit(*args, **options)

    monkeypatch.setattr(module, "fit", counted)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(out, root)
    assert len(rows(out)) == 2 and run(out, root, finished=True).lines == []
    with (out / "rows.jsonl").open("a") as file:
        file.write('{"config": {"kind": "ru')
    again = run(out, root)
    assert fits == 3 + 6 and len(rows(out)) == 8
    for one, other in zip(whole.lines, again.lines, strict=True):
        for key in ("accuracy", "loss", "lr", "tried", "trained"):
            assert one[key] == other[key], key
    run(out, root)
    assert fits == 3 + 6
    more = run(out, root, methods="lora,linear,bitfit")
    assert fits == 3 + 6 + 4 and len(more.lines) == 3 and len(rows(out)) == 12
    run(out, root, protocol=Protocol(steps=4, search_steps=2, batch_size=4, rates=2, seeds=(0, 1), rounds=1))
    assert fits == 13 + 2 * 2  # other final runs, after the same search
    assert run(out, root, methods="lora,norm", finished=True).lines == [whole.lines[0] | again.lines[0]]


def test_other_data_of_the_same_name_are_other_work(root: Path, tmp_path: Path) -> None:
    run(tmp_path / "out", root, methods="linear")
    (root / "colours").unlink()
    rng = np.random.default_rng(1)
    for split in ("train", "test"):
        for name in ("blue", "red"):
            (root / "colours" / split / name).mkdir(parents=True)
            for i in range(12):
                Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(
                    root / "colours" / split / name / f"{i}.png"
                )
    assert run(tmp_path / "out", root, methods="linear", finished=True).lines == []


def test_seeds_in_another_order_are_the_same_runs(root: Path, tmp_path: Path) -> None:
    (one,) = run(tmp_path / "out", root, methods="linear").lines
    turned = Protocol(steps=3, search_steps=2, batch_size=4, rates=2, seeds=(1, 0), rounds=1)
    (other,) = run(tmp_path / "out", root, methods="linear", protocol=turned, finished=True).lines
    assert other["accuracy"] == one["accuracy"][::-1] and other["step_ratio"] == one["step_ratio"]


def test_the_search_sees_no_test_item(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each item comes from: searches train and measure on parts of the training folder that share no image."""
    seen: list[tuple[str, int, set[str]]] = []
    for name in ("fit", "evaluate"):
        real = getattr(module, name)

        def watched(model: Any, data: Any, *args: Any, _name: str = name, _real: Any = real, **options: Any) -> Any:
            seen.append((_name, options.get("seed", -1), {data.where(i) for i in range(len(data))}))
            return _real(model, data, *args, **options)

        monkeypatch.setattr(module, name, watched)
    run(tmp_path / "out", root, methods="lora")
    assert len(seen) == 8
    for (_, seed, trained), (_, _, measured) in zip(seen[::2], seen[1::2], strict=True):
        assert not trained & measured
        folder = "train" if seed == module.SEARCH_SEED else "test"
        assert all(f"/colours/{folder}/" in place for place in measured)
        assert all("/colours/train/" in place for place in trained)
    assert seen[0][2] | seen[1][2] == seen[4][2]  # part and validation are all training items


def test_one_method_that_breaks_costs_only_itself(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("of this method alone")

    monkeypatch.setattr(registry.adapter_class("lora"), "fit_start", broken)
    found = run(tmp_path / "out", root)
    assert [line["label"] for line in found.lines] == ["linear"]
    assert "RuntimeError: of this method alone" in found.failed[0]["error"]
    assert "fit_start" in (tmp_path / "out" / "failed.log").read_text()


def test_methods_at_their_own_size_and_kept_adapters(root: Path, tmp_path: Path) -> None:
    found = run(tmp_path / "out", root, methods="lora", also=parse_methods("full"), keep=True)
    assert [(line["label"], line["budget"]) for line in found.lines] == [("lora", 400), ("full", None)]
    assert found.lines[1]["trained"] > 400
    saved = tmp_path / "out" / "adapters" / "colours" / "lora-384"
    tensors = load_file(saved / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == 384 + 24 * 2 + 2
    assert "blue" in (saved / "adapter_config.json").read_text()


def test_data_by_name(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZOO_TEST_DATA", raising=False)
    vit, ast = registry.family("vit"), registry.family("ast")
    faces = named_sets(vit, "orl_faces", root=data_dir, shots=50)
    assert (len(faces.classes), len(faces.train), len(faces.test)) == (40, 200, 200)
    assert len(faces.part) + len(faces.val) == 200 and len(np.unique(faces.val.labels)) == 40
    digits = named_sets(vit, "digits", shots=3, test_items=50)
    assert (len(digits.train), len(digits.test)) == (30, 50)
    for name, classes, train in (("esc10", 10, 240), ("fsdd-speakers", 6, 2700)):
        found = named_sets(ast, name, root=data_dir)
        assert (len(found.classes), len(found.train)) == (classes, train)
    for cls, name, said in (
        (vit, "orl_faces", "--data-root"),
        (vit, "nothing", "splits"),
        (ast, "digits", "takes sounds"),
    ):
        with pytest.raises(DataError, match=said):
            named_sets(cls, name)
    with pytest.raises(DataError, match="camvid"):
        named_sets(vit, "camvid", root=data_dir)


def test_two_processes_share_a_journal(tmp_path: Path) -> None:
    one, other = Journal(tmp_path / "rows.jsonl"), Journal(tmp_path / "rows.jsonl")
    one.add({"config": {"seed": 0}, "result": {"accuracy": 0.5}})
    assert other.find({"seed": 0}) == {"config": {"seed": 0}, "result": {"accuracy": 0.5}}
    assert other.find({"seed": 1}) is None


def test_a_row_of_another_process_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written while this one reads, behind a line of one that was killed, and while this one waits for its turn."""
    path, read_bytes = tmp_path / "rows.jsonl", Path.read_bytes
    first, second, third = ({"config": {"seed": n}, "result": {}} for n in range(3))
    one = Journal(path)
    one.add(first)

    def read_late(file: Path) -> bytes:
        data = read_bytes(file)
        with file.open("a") as other:
            other.write(json.dumps(second) + "\n")
        return data

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read_late)
        assert Journal(path).find({"seed": 0}) == first
    assert rows(tmp_path) == [first, second]
    with path.open("a") as killed:
        killed.write('{"config": {"se')
    one.add(third)
    assert rows(tmp_path) == [first, second, third]
    whole = path.read_text()
    path.write_text(whole[:-9])
    with ThreadPoolExecutor() as pool:
        with alone(tmp_path):  # the other process is writing
            waiting = pool.submit(Journal, path)
            wait([waiting], timeout=0.2)
            path.write_text(whole)
        assert waiting.result().find({"seed": 2}) == third
    assert path.read_text() == whole


def test_damaged_journal(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"config": {}, "result": {}}\nnothing\n')
    with pytest.raises(SaveError, match="line 2"):
        Journal(tmp_path / "rows.jsonl")


def test_what_is_not_finished_is_named_and_no_table_lost(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["bench", "compare", "--backbone", "vit-s16", "--data", "colours", "--data-root", str(root), "-q"]
    words += ["--budget", "400", "--steps", "2", "-b", "4", "--rates", "1", "--rounds", "1", "-o", str(out)]

    def go(*more: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, [*words, *more])
        assert result.exit_code == code, result.output
        return " ".join(result.output.replace("│", " ").split())

    go("-m", "lora,linear", "--seeds", "0")
    go("-m", "linear", "--seeds", "0,1")
    said = go("-m", "lora,linear,bitfit", "--seeds", "0,1", "--finished")
    assert "not finished: lora on colours at 400: seed 1 not finished: bitfit on colours at 400: the search" in said
    assert "seed 0" not in said
    text = (out / "comparison.md").read_text()
    assert "(1 of 2 seeds)" in text  # a narrow terminal folds the column
    assert "| linear |" in text and "## Not finished" in text and "- lora on colours at 400: seed 1" in text
    kept = read(out / "comparison.json")
    assert [line.get("missing_seeds") for line in kept.lines] == [[1], None]
    assert kept.missing[0] == {"data": "colours", "budget": 400, "method": "lora", "search": False, "seeds": [1]}
    assert "What" in go("-m", "bitfit", "--seeds", "0", "--finished", code=1)
    assert (out / "comparison.md").read_text() == text
    said = go("-m", "lora,linear", "--seeds", "0", "--finished")
    assert "no longer in the table: linear on colours at 400 (seeds: 1 instead of 2)" in said
    said = go("-m", "linear", "--seeds", "0,1", "--finished")
    assert "no longer in the table: lora on colours at 400" in said and "not finished" not in said


def test_command(root: Path, tmp_path: Path) -> None:
    words = [
        "bench",
        "compare",
        "--backbone",
        "vit-s16",
        "--data",
        "colours",
        "--data-root",
        str(root),
        "-m",
        "lora,linear,full",
    ]
    words += ["--budget", "400", "--steps", "2", "-b", "4", "--rates", "1", "--seeds", "0", "--rounds", "1"]
    result = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "lora" in result.output and "left out: full at 400" in result.output
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "| lora | rank=4 | 384 |" in text and "- full at 400" in text
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 1000
    for more, said in (
        (["--budget", "3"], "below the cheapest unit"),
        (["--budget", "900M"], "above the whole"),
        (["--seeds", "a"], "expected whole numbers"),
        (["--seeds", "1,1"], "each once"),
        (["--rates", "9"], "rates"),
        (["-m", "lorra"], "lora"),
        (["--data", "nowhere"], "splits"),
        (["--data", "colours,colours"], "'colours' is named twice"),
        (["--budget", "400,0.4k"], "budget of 400 is named twice"),
        (["-m", "linear,lora:foo=1"], "has no setting 'foo'"),
        (["-m", "linear,lora:rank=abc"], "'lora:rank=abc': 'lora' setting 'rank' is 'abc'"),
        (["-m", "linear,lora:rank=-1"], "'lora:rank=-1'"),
        (["-m", "lora:rank=1;rank=2"], "rank twice"),
        (["--also", "adapter:form=nonsense"], "nonsense"),
        (["--finished"], "nothing to show"),
    ):
        refused = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "no"), *more])
        assert refused.exit_code == 1 and said in " ".join(refused.output.replace("│", " ").split()), (
            more,
            refused.output,
        )
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(("name", "height"), [("vit-micro-cifar10", 820), ("swin-micro-tasks", 3 * 560)])
def test_of_many_methods_each_has_a_line_of_its_own(name: str, height: int) -> None:
    """Names beside the points of 35 methods would hide each other."""
    study = read(Path(__file__).parents[2] / "benchmarks" / "results" / "comparison" / f"{name}.json")
    assert (len(study.lines) > 2 * MANY) is (height == 820)
    assert Image.open(io.BytesIO(picture(study))).size == (1600, height)
