"""Two processes carry out a regime to the numbers of one, and go on together where one process stopped; compiled forms of LAE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from train_parts import easy_data, tiny_model
from two_processes import launch

import zoo
from zoo.data import by_class
from zoo.regimes.lae import FORMS
from zoo.train.processes import Processes

SETTINGS: dict[str, Any] = {"epochs": 2, "frozen_epochs": 1, "decay": 0.9, "batch_size": 8, "lr": 1e-2}
FIT = {"progress": False, "device": "cpu"}


def lae(out: Path | None = None) -> tuple[zoo.Model, Any]:
    train, test = (by_class(zoo.open_dataset(easy_data(count, seed)), 2) for count, seed in ((32, 0), (20, 1)))
    model = tiny_model(zoo.adapter("adapter", form="parallel", rank=3, targets="attn", learn_scale=True), num_classes=0)
    return model, zoo.run(model, "lae", train, test, out=out, fit=FIT, **SETTINGS)


def together(out: Path) -> None:
    made, found = lae(out)
    digest = [float(t.double().sum()) for t in made.adapter_state("adapter-offline").values()]
    Processes("cpu").same(repr((found.summary, digest)), "results")


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    launch(together, tmp_path, tmp_path / "two")
    _, one = lae()
    two = json.loads((tmp_path / "two" / "report.json").read_text())
    assert two["summary"]["matrix"] == one.summary["matrix"]
    for mine, theirs in zip(one.phases, two["phases"], strict=True):
        assert [h["loss"] for h in theirs["history"]] == pytest.approx([h["loss"] for h in mine["history"]], rel=1e-4)
    state = json.loads((tmp_path / "two" / "state.json").read_text())
    state["phases"].pop()  # as if the second session had not been reached
    state["values"] = {k: v for k, v in state["values"].items() if "after 1" not in k}
    (tmp_path / "two" / "state.json").write_text(json.dumps(state))
    _, again = lae(tmp_path / "two")
    assert again.summary["matrix"] == one.summary["matrix"]


@pytest.mark.parametrize("form", list(FORMS))
def test_forms_of_lae_compile(form: str) -> None:
    torch.manual_seed(0)
    sizes = {"depth": 5, "embed_dim": 24, "num_heads": 2}
    model = zoo.load("vit-micro", FORMS[form](), pretrained=False, num_classes=3, **sizes).eval()
    with torch.no_grad():
        for parameter in model.adapters[form].parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        images = torch.randn(2, 3, 32, 32)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-5, atol=1e-6)
