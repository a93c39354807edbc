"""The study of AST: what is trained in each row, budgets, going on after a kill, the table, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
import zoo.regimes.work
from audio.regimes.ast_study import METHODS, AstStudy
from zoo.data import ImageDataset
from zoo.errors import ConfigError, DataError

pytest.importorskip("transformers")

SMALL: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 96, "max_length": 40}
SMALL |= {"num_mel_bins": 32, "num_attention_heads": 3}
FIT: dict[str, Any] = {"progress": False, "device": "cpu"}


def model() -> zoo.Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return zoo.load("ast-micro", pretrained=False, num_classes=0, **SMALL)


def sounds(count: int, classes: int = 2, seed: int = 0) -> ImageDataset:
    """Spectrograms whose loudness is their class."""
    labels = torch.arange(count) % classes
    values = torch.randn(count, 40, 32, generator=torch.Generator().manual_seed(seed)) + 2 * labels[:, None, None]
    data = torch.utils.data.TensorDataset(values, labels)
    return model().family.open_dataset(data, classes=[f"class {i}" for i in range(classes)])


def go(net: zoo.Model | None = None, out: Path | None = None, **settings: Any) -> Any:
    given = {"methods": ["linear", "lora"], "seeds": [0, 1], "epochs": 1, "batch_size": 4, **settings}
    train = {"loud": sounds(12), "three": sounds(12, 3)}
    test = {"loud": sounds(6, seed=1), "three": sounds(6, 3, seed=1)}
    return zoo.run(net or model(), "ast-study", train, test, out=out, fit=FIT, **given)


def test_every_row_trains_what_the_paper_trains() -> None:
    net = model()
    backbone = net.num_parameters()
    report = go(net, methods=list(METHODS), seeds=[0], shots=[2])
    trained = {r["method"]: r["trained"] for r in report.summary["rows"] if r["data"] == "loud"}
    d, blocks, last = 48, 2, 2 * 48
    bottleneck, conformer = 2 * d + 1 + d, 2 * d + 2 * (d + 1) + 32 + 2 + 2 * d
    assert trained == {
        "full": backbone,
        "linear": last,
        "bitfit": d + blocks * (4 * d + 96 + d + 2 * d) + d,
        "prompts-shallow": 25 * d + last,
        "prompts-deep": 25 * d * blocks + last,
        "prefix": 2 * 12 * d * blocks + last,
        "lora": blocks * 2 * 2 * d + last,
        "pfeiffer": blocks * (bottleneck + 2 * d) + last,
        "pfeiffer-beside": blocks * (bottleneck + 2 * d) + last,
        "houlsby": blocks * 2 * (bottleneck + 2 * d) + last,
        "houlsby-beside": blocks * 2 * (bottleneck + 2 * d) + last,
        "conformer-behind": blocks * (conformer + 2 * d) + last,
        "conformer": blocks * (conformer + 2 * d) + last,
    }
    assert report.summary["backbone"] == backbone
    assert set(net.adapters) == {"method", "norms"} and net.num_classes == 3


def test_what_is_trained_is_counted_without_the_head_whatever_its_kind() -> None:
    for kind in ("mean", "linear"):  # the family's own has a norm of its own
        report = go(methods=["linear", "bitfit"], seeds=[0], shots=[2], head=kind)
        assert {r["trained"] for r in report.summary["rows"] if r["method"] == "linear"} == {2 * 48}
        assert {r["trained"] for r in report.summary["rows"] if r["method"] == "bitfit"} == {48 + 2 * 432 + 48}


def test_budgets_choose_the_largest_size() -> None:
    report = go(methods=["linear", "lora", "pfeiffer", "prefix"], seeds=[0], budgets=[0, 1000], norms=False)
    rows = {(r["method"], r["budget"]): r["trained"] for r in report.summary["rows"] if r["data"] == "loud"}
    # one more: of LoRA's rank 2 * 2 * 2 * 48, of the adapter's 2 * 97 beside 2 * 48 of biases, of the prefix 2 * 2 * 48
    assert rows["lora", 1000] == 2 * 384
    assert rows["pfeiffer", 1000] == 4 * 2 * 97 + 2 * 48
    assert rows["prefix", 1000] == 5 * 192
    assert ("linear", 0) in rows and ("linear", 1000) not in rows
    assert report.table().splitlines()[0] == "| method | budget | trained | % | loud, all | three, all | mean |"
    with pytest.raises(ConfigError, match="no method fits into 100 parameters"):
        go(methods=["lora"], budgets=[100])
    with pytest.raises(ConfigError, match=r"has [\d,]+ parameters; expected at most those"):
        go(methods=["lora"], budgets=[10**9])
    with pytest.raises(ConfigError, match=r"'lora' cannot be as large as 30,000 parameters here .*rank 78"):
        go(methods=["linear", "lora"], budgets=[30_000])  # before the first training


def test_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    class Killed(Exception):
        """Stands for a kill."""

    whole, measured = go(), []
    original = zoo.regimes.work.evaluate

    def dying(*args: Any, **kwargs: Any) -> Any:
        if len(measured) == 3:
            raise Killed
        measured.append(1)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zoo.regimes.work.evaluate", dying)
        with pytest.raises(Killed):
            go(out=tmp_path / "run")
    report = go(out=tmp_path / "run")
    assert report.summary == whole.summary and len(report.values) == 2 * 2 * 2
    for file in ("report.json", "report.md", "report.png"):
        assert (tmp_path / "run" / file).stat().st_size > 100
    table = (tmp_path / "run" / "report.md").read_text().splitlines()
    assert table[2] == "| method | trained | % | loud, all | three, all | mean |"
    assert [line.split(" | ")[0] for line in table[4:6]] == ["| linear", "| lora"]
    assert " ± " in table[4]
    with pytest.raises(ConfigError, match="epochs was 1, is 2"):
        go(out=tmp_path / "run", epochs=2)


def test_methods_of_one_seed_see_the_same() -> None:
    """The same sounds and the same new head, whatever stood there before."""
    alone = go(methods=["lora"], shots=[2], seeds=[1])
    beside = go(methods=["full", "lora"], shots=[2], seeds=[1])
    ours = [(r["data"], r["accuracies"], r["trained"]) for r in alone.summary["rows"]]
    assert ours == [(r["data"], r["accuracies"], r["trained"]) for r in beside.summary["rows"] if r["method"] == "lora"]


def test_nothing_is_chosen_on_the_test_sounds() -> None:
    fits = AstStudy()._fit("lora", 0)
    assert fits["keep"] == "last" and "monitor" not in fits and "patience" not in fits
    assert fits["lr"] == {"default": 5e-3, "head": 5e-3}
    assert AstStudy(rates={"head": 1e-2})._fit("full", 0)["lr"] == {"default": 5e-5, "head": 1e-2}


def test_the_head_is_the_mean_of_all_tokens(tmp_path: Path) -> None:
    net = model().eval()
    net.add_adapter("lora")
    net.reset_head(3, kind="mean")
    x = torch.randn(2, 40, 32)
    head: Any = net.head
    tokens = net.outputs(x, want=("tokens",))["tokens"]
    torch.testing.assert_close(net(x), tokens.mean(1) @ head.linear.weight.T + head.linear.bias)
    net.save_adapter(tmp_path)
    torch.manual_seed(0)
    again = zoo.load(adapter=tmp_path, pretrained=False)
    assert torch.equal(again.eval()(x), net(x))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"methods": ["loras"]}, "no method 'loras'"),
        ({"rates": {"loras": 1.0}}, "no method 'loras'"),
        ({"rates": {"lora": -1.0}}, "above 0"),
        ({"shots": []}, "shots is empty"),
        ({"seeds": [0, 0]}, "twice"),
        ({"budgets": [-1]}, "0 or more"),
        ({"head": "max"}, "'mean' or 'linear'"),
        ({"epochs": 0}, "1 or more"),
        ({"batch_size": 1}, "2 or more"),
    ],
)
def test_bad_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AstStudy(**settings)


def test_refusals() -> None:
    with pytest.raises(DataError, match="same names; data has data, test has none"):
        zoo.run(model(), "ast-study", sounds(4))
    with pytest.raises(DataError, match="'loud' and its test data"):
        zoo.run(model(), "ast-study", {"loud": sounds(4)}, {"loud": sounds(6, 3)})
    net = model()
    net.add_adapter("lora")
    with pytest.raises(ConfigError, match="without one"):
        go(net)
    assert list(net.adapters) == ["lora"]


def test_too_many_shots_are_refused_before_the_first_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AstStudy, "_fit", lambda *args: pytest.fail("it trained"))
    with pytest.raises(DataError, match=r"shots=5 asks for more .* largest possible value is 4"):
        go(shots=[1, 5])


def test_one_command(tmp_path: Path) -> None:
    """Folders of sounds by class, on the command line; the table is printed, and the folder holds everything."""
    from audio_parts import encoded, tone
    from typer.testing import CliRunner

    from zoo.cli import app

    for part, count in (("train", 3), ("test", 1)):
        for name, pitch in (("low", 200), ("high", 2_000)):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.wav").write_bytes(encoded(tone(pitch, seed=i)))
    line = ["run", "ast-study", "ast-micro", "--data", str(tmp_path / "train"), "--test", str(tmp_path / "test")]
    line += ["-o", str(tmp_path / "out"), "-q", "--device", "cpu", "-s", 'run.methods=["linear","conformer"]']
    line += ["-s", "run.shots=[1,0]", "-s", "run.seeds=[0]", "-s", "run.epochs=1"]
    result = CliRunner().invoke(app, line, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "| method | trained | % | data, 1 shot | data, all | mean |" in result.output
    assert {"report.md", "report.png", "report.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    again = zoo.load(adapter=tmp_path / "out")
    assert set(again.adapters) == {"method", "norms"} and again.classes == ["high", "low"]
