"""What ships with the packages: sizes, cards, and the numbers that the cards state."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import zoo
from zoo.sources import embedded_adapters

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("ZOO_TEST_DATA", ROOT.parent / "shared" / "data"))
NEEDS_DATA = pytest.mark.skipif(
    not DATA.is_dir(), reason="the data packs are not here; name their folder in ZOO_TEST_DATA"
)


MEMBERS = {path.stem: path for path in sorted(ROOT.glob("*/weights/*.safetensors"))}
EXTRAS = {
    "ast-micro": "transformers",
    "clip-micro": "open_clip",
    "vl-t5-micro": "transformers",
    "vlm-micro": "transformers",
}


def card(name: str) -> str:
    """The text of a card."""
    return (ROOT / "model_cards" / f"{name}.md").read_text()


def final(name: str) -> dict[str, float]:
    """The final numbers of the run that made a member."""
    return json.loads((ROOT / "model_cards" / f"{name}.log.json").read_text())["final"]


def test_sizes() -> None:
    assert {
        "vit-micro",
        "swin-micro",
        "groupmamba-micro",
        "ast-micro",
        "clip-micro",
        "vl-t5-micro",
        "vlm-micro",
    } <= set(MEMBERS)
    for path in MEMBERS.values():
        assert path.stat().st_size < 8e6
        assert {t.dtype for t in load_file(path).values() if t.is_floating_point()} == {torch.float16}
    for folder in embedded_adapters().values():
        assert (folder / "adapter_model.safetensors").stat().st_size < 1e6
        assert (ROOT / "model_cards" / f"{folder.name}.md").read_text() == (folder / "README.md").read_text()
    shipped = [path for path in ROOT.glob("*/weights/**/*") if path.is_file()]
    assert sum(path.stat().st_size for path in shipped) < 60e6


@pytest.mark.parametrize("name", list(MEMBERS))
def test_a_member_is_what_its_card_says(name: str) -> None:
    pytest.importorskip(EXTRAS.get(name, "timm"))
    model = zoo.load(name)
    assert f"`{model.fingerprint}`" in card(name)
    assert f"{model.num_parameters():,} parameters" in card(name).replace("\n", " ")
    assert model.family.licence() == "apache-2.0"
    shares = [v for v in final(name).values() if isinstance(v, float)]
    assert shares and all(f"| {100 * v:.2f} % |" in card(name) for v in shares)


@NEEDS_DATA
@pytest.mark.parametrize("name", [n for n in ("vit-micro", "swin-micro", "groupmamba-micro") if n in MEMBERS])
def test_accuracy_on_cifar100(name: str) -> None:
    """500 test images, against the log's accuracy on all ten thousand: three standard errors are 6.5 points."""
    test = zoo.open_dataset(str(DATA / "cifar100"), split="test").select(range(500))
    found = zoo.evaluate(zoo.load(name), test, batch_size=250, progress=False)["accuracy"]
    assert abs(found - final(name)["test_accuracy"]) < 0.065


@NEEDS_DATA
def test_accuracy_on_spoken_digits() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("soundfile")
    from audio.data.sounds import open_audio

    test = open_audio(DATA / "fsdd", split="test").select(range(100))
    found = zoo.evaluate(zoo.load("ast-micro"), test, batch_size=100, progress=False)["accuracy"]
    assert found >= final("ast-micro")["test_accuracy"] - 0.03


@NEEDS_DATA
def test_zero_shot_accuracy_on_cifar10() -> None:
    """500 test images, against the log's accuracy on all ten thousand."""
    pytest.importorskip("open_clip")
    from multimodal.tasks.zero_shot import put_zero_shot_classifier

    test = zoo.open_dataset(str(DATA / "cifar10"), split="test").select(range(500))
    model = zoo.load("clip-micro")
    assert test.classes is not None
    templates = ("a photo of a {}.", "a small photo of a {}.", "a blurry picture of the {}.", "a picture of one {}.")
    put_zero_shot_classifier(model, test.classes, templates)
    found = zoo.evaluate(model, test, batch_size=250, progress=False)["accuracy"]
    assert abs(found - final("clip-micro")["zero_shot_cifar10"]) < 0.065
    assert found > 0.15  # chance is 0.1


@NEEDS_DATA
def test_answers_to_questions_about_drawings() -> None:
    """300 test questions, against the log's share of all."""
    pytest.importorskip("transformers")
    from multimodal.data.questions import open_questions

    test = open_questions(DATA / "easy_vqa", split="test").select(range(300))
    found = zoo.evaluate(zoo.load("vl-t5-micro"), test, batch_size=100, progress=False)["exact_match"]
    stated = final("vl-t5-micro")
    assert abs(found - stated["exact_match"]) < 0.08
    assert found > stated["most_frequent_answer"] + 0.1


@pytest.mark.parametrize("name", sorted(embedded_adapters()))
def test_adapters_load_by_name_alone(name: str) -> None:
    pytest.importorskip(EXTRAS.get("-".join(name.split("-")[:2]), "timm"))
    model = zoo.load(adapter=name)
    assert model.active and model.num_classes > 1
    text = (embedded_adapters()[name] / "README.md").read_text()
    assert f'zoo.load(adapter="{name}")' in text
    assert "More Information Needed" not in text
    tasks = list(getattr(model.head, "sizes", ()))  # of maps; else classes
    assert ("accuracy" in text) != bool(tasks)
    with torch.no_grad(), model.context(**({"task": tasks[0]} if tasks else {})):
        shape = model(*model.example_batch(1)).shape
    assert shape[:2] == (1, model.num_classes) and len(shape) == (4 if tasks else 2)


@pytest.mark.parametrize("name", [n for n in sorted(embedded_adapters()) if n.endswith("-digits")])
def test_accuracy_on_digits(name: str) -> None:
    pytest.importorskip("sklearn")
    from zoo.cli.demo import digits

    model = zoo.load(adapter=name)
    _, _, test = digits(model)
    measured = zoo.evaluate(model, test, progress=False)["accuracy"]
    assert measured == pytest.approx(model.record["metrics"]["test"]["accuracy"], abs=2e-3)


@NEEDS_DATA
def test_maps_of_camvid() -> None:
    """Every task of the whole validation split, anew, against the card; and single tasks taken out as the card shows."""
    pytest.importorskip("timm")
    from benchmarks.dense_tasks import TASKS, opened
    from vision.tasks.dense_tasks import ManyDense
    from zoo.regimes.multitask import single_task

    name = "swin-micro-polyhistor-lite-camvid"
    stated = zoo.load(adapter=name).record["metrics"]["val"]
    size: Any = tuple(zoo.load(adapter=name).image_size)
    data = opened(DATA / "camvid", "val", size)
    many = ManyDense(data)
    for task, key in (("segment", "miou"), ("edges", "edges_ods_f"), ("distance", "distance_rmse")):
        model = zoo.load(adapter=name)
        measure = many.single(task).monitor
        whole = zoo.evaluate(model, data[task], task=many.single(task), record="", progress=False)[measure]
        assert whole == pytest.approx(stated[key], abs=2e-3)
        alone = zoo.evaluate(single_task(model, task), data[task], task=TASKS[task][0], record="", progress=False)
        assert alone[measure] == pytest.approx(whole, abs=2e-3)
        assert f"| 0 | val | {100 * stated['miou']:.2f} |" in card(name)


def test_sections_by_hand_survive_a_card_that_is_written_anew() -> None:
    from scripts.embed_micro import kept

    new = "# a\n\nnew\n\n## Training\n\nnew\n\n## Licence\n\nnew\n"
    old = "# a\n\nold\n\n## Training\n\nold\n\n## Several tasks\n\nby hand\n\n| a |\n\n## Licence\n\nold\n"
    expected = "# a\n\nnew\n\n## Training\n\nnew\n\n## Several tasks\n\nby hand\n\n| a |\n\n## Licence\n\nnew\n"
    assert kept(old, new) == expected
    assert kept(expected, new) == expected
    assert kept("", new) == new
