"""The compatibility table: every cell is run, none is blank, and none fails with a foreign error."""

from __future__ import annotations

import json
import re

import pytest
import torch
from PIL import Image
from sampled import pairs

import zoo
from zoo import registry
from zoo.errors import ConfigError
from zoo.table import STEPS, as_markdown, tiny_model

FAMILIES = registry.families()
# Works in every step on every family with points for it; merging is the method's own matter.
GENERAL = ("full", "bitfit", "lora", "adapter", "ssf", "ia3")


@pytest.mark.parametrize(("family", "method"), pairs(FAMILIES, zoo.list_adapters()))
def test_cell(family: str, method: str) -> None:
    (cell,) = zoo.compatibility([family], [method])
    if "pip install" in cell.attach:
        pytest.skip(cell.attach)
    answers = [getattr(cell, step) for step in STEPS]
    assert all(answers) and not [a for a in answers if a.startswith("defect")], answers
    refused = next((i for i, a in enumerate(answers) if a != "yes"), len(answers))
    assert "not reached" not in answers[: refused + 1], answers
    if method in GENERAL:
        assert answers[:3] == ["yes"] * 3, answers


@pytest.mark.parametrize("family", [f for f in FAMILIES if registry.family(f).tiny])
def test_inputs_of_any_size_and_what_images_have(family: str) -> None:
    """`example_batch` runs, one row for each sample; sizes and means are those of its images, or a ZooError."""
    try:
        model, tiny = tiny_model(family)
    except zoo.MissingPackageError as error:
        pytest.skip(str(error))
    batch = model.example_batch(3)
    both = family == "vilt"  # a classifier of images with their texts
    assert len(batch) == (1 if model.num_classes and not both else len(tiny)) and {len(x) for x in batch} == {3}
    with torch.no_grad():
        output = model(*batch)
    assert len(output) == 3 and output.isfinite().all()
    config = model.family.data_config()
    for name, key in (("image_size", "input_size"), ("mean", "mean"), ("std", "std")):
        if key not in config:
            with pytest.raises(ConfigError, match=re.escape(f"({model.family.modality}) has no")):
                getattr(model, name)
        elif name == "image_size":
            assert model.image_size == config[key][1:]
            if "video" not in model.family.modality:
                assert model.preprocess()(Image.new("RGB", (9, 7))).shape[-2:] == model.image_size
        else:
            assert getattr(model, name) == (config[key] if isinstance(config[key], tuple) else (config[key],))
    assert len(model.to(torch.bfloat16).example_batch(1)[0]) == 1


def test_examples_are_as_long_as_what_the_networks_are_made_for() -> None:
    shapes = {}
    for name in ("cogvideox-5b", "dit-xl2", "vl-t5", "wav2vec2-b", "ast", "clip-vit-b32"):
        try:
            shapes[name] = [tuple(x.shape) for x in zoo.load(name, device="meta").example_batch(1)]
        except zoo.MissingPackageError as error:
            pytest.skip(str(error))
    assert shapes["cogvideox-5b"] == [(1, 13, 16, 60, 90), (1,), (1, 226, 4096)]  # 49 frames of 480 x 720
    assert shapes["dit-xl2"] == [(1, 4, 32, 32), (1,), (1,)]
    assert shapes["vl-t5"] == [(1, 20), (1, 20), (1, 10), (1, 36, 2048), (1, 36, 4)]
    assert shapes["wav2vec2-b"] == [(1, 80_000)]  # five seconds
    assert shapes["ast"] == [(1, 1024, 128)]
    assert shapes["clip-vit-b32"] == [(1, 3, 224, 224), (1, 77)]


def test_markdown_names_reasons_once() -> None:
    cells = zoo.compatibility(["vit"], ["lora", "linear"])
    text = as_markdown(cells)
    assert text.count("\n| `") == 2
    assert "attach, train, save, merge" in text


def test_command_line_shows_the_table() -> None:
    from typer.testing import CliRunner

    from zoo.cli import app

    result = CliRunner().invoke(app, ["list", "linear", "--table", "--json"])
    cells = json.loads(result.output)
    assert {c["family"] for c in cells} >= {"vit", "swin"} and {c["method"] for c in cells} == {"linear"}
    assert all(c[step] for c in cells for step in STEPS)
    wrong = CliRunner().invoke(app, ["list", "lineer", "--table"])
    assert wrong.exit_code == 1 and "linear" in wrong.output


def test_every_refusal_at_attaching_is_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """A default role that a family lacks raises SelectionError, a setting ConfigError; neither breaks the table off."""
    from dataclasses import dataclass
    from typing import Any

    from zoo import registry
    from zoo.adapters.base import Adapter
    from zoo.errors import ConfigError

    @dataclass(eq=False)
    class OfScan(Adapter):
        """Asks for a role that a ViT does not have."""

        targets: str = "scan"

        def attach(self, points: Any) -> None:
            points.select(self.targets, kind="linear")

    @dataclass(eq=False)
    class Unfit(Adapter):
        """Refuses the width."""

        def attach(self, points: Any) -> None:
            raise ConfigError("48 is no power of two")

    for name, cls in (("of-scan", OfScan), ("unfit", Unfit)):
        cls.method = name
        monkeypatch.setitem(registry._adapters, name, cls)
    of_scan, unfit = zoo.compatibility(["vit"], ["of-scan", "unfit"])
    assert "'scan' matches no linear point" in of_scan.attach and of_scan.train == of_scan.merge == "not reached"
    assert unfit.attach == "48 is no power of two" and unfit.parameters == 0
