"""The regime of VQT's feature selection: what is trained when, what is kept, going on, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

import zoo
from zoo.errors import ConfigError, DataError

TINY: dict[str, Any] = {"pretrained": False, "seed": 0, "img_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
FIT: dict[str, Any] = {"progress": False}
SETTINGS: dict[str, Any] = {"epochs": 3, "head_epochs": 4, "batch_size": 8, "lasso": 1e-2, "dropout": 0.0}


def model(adapter: Any = None, num_classes: int = 2) -> zoo.Model:
    return zoo.load("vit-micro", adapter, num_classes=num_classes, **TINY)


def data(count: int = 32, seed: int = 0) -> Any:
    labels = torch.arange(count) % 2
    images = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    images[:, 0] += 2.0 * labels[:, None, None]
    return zoo.open_dataset(TensorDataset(images, labels), classes=["dark", "bright"])


def numbers(made: zoo.Model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in made.parameters_to_train().items()}


def test_the_features_of_largest_columns_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lasso's head says which; queries are those of the first phase."""
    seen: list[tuple[list[int], torch.Tensor]] = []
    from vision.adapters.vqt import VQT

    own = VQT.keep
    monkeypatch.setattr(
        VQT, "keep", lambda vqt, m, chosen: (seen.append((chosen, m.head.weight.norm(dim=0))), own(vqt, m, chosen))[1]
    )
    made = model()
    settings = {**SETTINGS, "fractions": (0.5,), "lr": 0.05, "head_lr": 0.1, "head_epochs": 12}
    report = zoo.run(made, "vqt-select", data(), data(16, 1), fit=FIT, **settings)
    assert [phase["name"] for phase in report.phases] == ["queries", "lasso", "retrain"]
    ((chosen, lengths),) = seen
    assert len(lengths) == 24 + 2 * 24 and len(chosen) == 36
    assert set(chosen) == set(lengths.topk(36).indices.tolist())
    vqt: Any = made.adapters["vqt"]
    assert vqt.plan == {"features": chosen} and vqt.lasso == 0.0 and made.classes == ["dark", "bright"]
    assert tuple(made.head.weight.shape) == (2, 36) and made.active == ("vqt",)  # type: ignore[union-attr]
    assert report.summary["features"] == 36 and report.summary["of"] == 72 and report.summary["test_accuracy"] > 0.8
    assert "0.5 | 36 | 72" in report.table()


def test_several_fractions_are_compared_on_data_apart_and_a_killed_run_goes_on(tmp_path: Path) -> None:
    settings = {**SETTINGS, "fractions": (1.0, 0.25), "val_fraction": 0.25}
    whole = zoo.run(unbroken := model(), "vqt-select", data(), fit=FIT, **settings)
    assert [p["name"] for p in whole.phases] == ["queries", "lasso", "fraction-0.25", "fraction-1", "retrain"]
    found = whole.summary["val_accuracy"]
    best = max((0.25, 1.0), key=lambda f: found[f"{f:g}"])
    assert whole.summary["fraction"] == best and whole.summary["features"] == int(best * 72)

    class Kill:
        def epoch_start(self, made: Any, epoch: int) -> None:
            if made.adapters["vqt"].plan is not None:
                raise KeyboardInterrupt

    from vision.regimes.vqt_selection import FeatureSelection

    class Killed(FeatureSelection):
        def phases(self, run: Any) -> Any:
            for phase in super().phases(run):
                phase.callbacks = [Kill()]
                yield phase

    with pytest.raises(KeyboardInterrupt):
        zoo.run(broken := model(), Killed(**settings), data(), fit=FIT, out=tmp_path)
    assert not broken.adapters and broken.num_classes == 2  # as it was
    again = zoo.run(gone_on := model(), "vqt-select", data(), fit=FIT, out=tmp_path, **settings)
    assert again.summary == whole.summary
    ours, theirs = numbers(gone_on), numbers(unbroken)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_what_is_refused() -> None:
    for wrong, match in (
        ({"lasso": 0.0}, "nothing is chosen"),
        ({"fractions": ()}, "expected different numbers"),
        ({"fractions": (0.5, 0.5)}, "expected different numbers"),
        ({"fractions": (1.5,)}, "at most 1"),
        ({"num_tokens": 0}, "num_tokens is 0"),
        ({"head_epochs": 0}, "head_epochs is 0"),
        ({"head_lr": 0.0}, "head_lr is 0"),
    ):
        with pytest.raises(ConfigError, match=match):
            zoo.run(model(), "vqt-select", data(), **wrong)
    with pytest.raises(ConfigError, match="attaches its own adapter; the model has lora"):
        zoo.run(model("lora"), "vqt-select", data())
    with pytest.raises(ConfigError, match="needs a head"):
        zoo.run(model(num_classes=0), "vqt-select", data())
    with pytest.raises(DataError, match="one data set with known classes"):
        zoo.run(model(), "vqt-select", {"a": data()})
