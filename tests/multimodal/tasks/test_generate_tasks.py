"""Several tasks of writing in one run, each with its prefix and its own adapters; questions about two images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from multimodal.data.questions import Question, open_questions
from multimodal.tasks.generate import Generate
from zoo.errors import ConfigError, DataError, MismatchError, UnknownNameError

pytest.importorskip("transformers", reason="the extra 'multimodal' is not installed")

SMALL: dict[str, Any] = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 1, "feat_dim": 6}
WORDS = [
    "vqa",
    "nlvr",
    "caption",
    "odd",
    ":",
    "?",
    "what",
    "color",
    "red",
    "blue",
    "same",
    "true",
    "false",
    "a",
    "shape",
]
COLORS = {"red": 1.0, "blue": -1.0}
TASKS = ("vqa", "nlvr", "caption")


def seen(color: str, shift: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Three tokens of a colour."""
    return torch.full((3, 6), COLORS[color]) + shift * torch.arange(6), torch.rand(3, 4)


def data(seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    names = ["red", "blue"] * 4
    pairs = [(a, b) for a in COLORS for b in COLORS] * 2
    return {
        "vqa": open_questions([Question(seen(n), "what color?", (n,), i) for i, n in enumerate(names)]),
        "nlvr": open_questions(
            [
                Question([seen(a), seen(b)], "same color?", ("true" if a == b else "false",), i)
                for i, (a, b) in enumerate(pairs)
            ]
        ),
        "caption": open_questions([Question(seen(n), None, (f"a {n} shape",), i) for i, n in enumerate(names)]),
    }


def model(adapter: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    return zoo.load("vl-t5-micro", adapter, pretrained=False, words=WORDS, **{**SMALL, **options})


def go(adapter: Any, **options: Any) -> tuple[Any, Any]:
    network = model(adapter)
    fit = {"progress": False, "batch_size": 4, "lr": 1e-2}
    return network, zoo.run(network, "multitask", data(), data(1), fit=fit, **{"epochs": 2, "tau": 1.0, **options})


# -- two images ------------------------------------------------------------------------------------------------------------


def test_tokens_of_two_images_count_anew_in_each() -> None:
    network = model()
    first, second = seen("red"), seen("blue", 0.1)
    rows = open_questions([Question([first, second], "same color?", ("false",))])
    inputs, _ = Generate().open(network, rows, train=False)[0]
    features, boxes, images, objects = inputs[3:]
    assert torch.equal(features, torch.cat([first[0], second[0]])) and boxes.shape == (6, 4)
    assert images.tolist() == [0, 0, 0, 1, 1, 1] and objects.tolist() == [0, 1, 2, 0, 1, 2]
    scores = network(*(x[None] for x in inputs))
    turned, _ = Generate().open(network, [Question([second, first], "same color?", ("false",))], train=False)[0]
    assert not torch.allclose(scores, network(*(x[None] for x in turned)))


def test_wrong_numbers_of_images_are_refused() -> None:
    network = model()
    three = [Question([seen("red")] * 3, "same color?", ("true",))]
    with pytest.raises(DataError, match=r"3 images, and .* tells 2 apart"):
        Generate().open(network, three, train=True)
    uneven = [Question([seen("red")] * n, "same color?", ("true",), n) for n in (2, 1)]
    with pytest.raises(DataError, match="1 images, and 2 of the questions before"):
        Generate().open(network, uneven, train=True)
    with pytest.raises(DataError, match="without image or features"):
        Generate().open(network, [Question([seen("red"), None], "same color?", ("true",))], train=True)


# -- tasks -------------------------------------------------------------------------------------------------------------------


def test_each_batch_is_of_one_task_with_its_prefix() -> None:
    many = Generate.together(data())
    network = model()
    opened = many.open(network, many.data, train=True)
    assert opened.rows.parts == list(TASKS) and len(opened) == 24
    words = network.family.tokenizer
    texts = [words.decode(opened[i][0][0][: int(opened[i][0][1].sum()) - 1]) for i in (0, 8, 16)]
    assert texts == ["vqa : what color ?", "nlvr : same color ?", "caption :"]
    inputs, targets = zoo.data.collate([opened[8], opened[9]])
    loss, _ = many.loss(network.train(), inputs, targets)
    alone, _ = Generate(prefix="nlvr: ").loss(network, inputs, targets["text"])
    torch.testing.assert_close(loss, alone)
    assert many.context(network, inputs, targets, training=True) == {"task": "nlvr"}
    with pytest.raises(ConfigError, match="several tasks"):
        many.loss(network, inputs, {"task": torch.tensor([0, 1]), "text": targets["text"]})
    assert Generate.together({"odd": data()["vqa"]}).single("odd").prefix == "odd: "
    with pytest.raises(ConfigError, match="cannot name a task"):
        Generate.together({"a b": data()["vqa"]})


@pytest.mark.parametrize(
    "adapter",
    [
        zoo.adapter("vl-adapter", rank=4),
        zoo.adapter("vl-adapter", rank=4, sharing="multiple", tasks=TASKS),
        zoo.adapter("hyperformer", rank=4, task_dim=4, hidden=8, projected=8, tasks=TASKS),
        "lora",
    ],
    ids=["single", "multiple", "hyperformer", "lora"],
)
def test_the_regime_trains_and_measures_every_task(adapter: Any) -> None:
    network, report = go(adapter)
    assert report.summary["values"].keys() == set(TASKS) and network.num_classes == 0
    assert all(0 <= value <= 10 for value in report.summary["values"].values())
    assert report.summary["sizes"]["nlvr"] == [8, 0] and "nlvr" in report.table()


def test_it_learns_all_of_them_and_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    adapter = zoo.adapter("vl-adapter", rank=8, sharing="multiple", tasks=TASKS)
    network, report = go(adapter, epochs=30, out=tmp_path)
    assert report.summary["values"]["vqa"] == 1.0 and report.summary["values"]["caption"] > 0.1
    again, second = go(adapter, epochs=30, out=tmp_path)  # read back
    assert second.summary == report.summary
    rows = data(1)["vqa"]
    inputs = [x[None] for x in Generate().open(network, rows, train=False)[0][0]]
    for name in ("vqa", "nlvr"):
        assert torch.equal(network(*inputs, context={"task": name}), again(*inputs, context={"task": name}))
    # a task taken out answers by itself as the whole does
    network.set_active(*network.adapters["vl-adapter"].extract(network, "vqa"))
    found = zoo.evaluate(network, rows, task=Generate(prefix="vqa: "), progress=False)
    assert found["exact_match"] == report.summary["values"]["vqa"]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="leave batches='one'"):
        go("lora", batches="mixed")
    with pytest.raises(UnknownNameError, match="does not know 'caption'"):
        go(zoo.adapter("vl-adapter", rank=4, sharing="multiple", tasks=("vqa", "nlvr")))
    with pytest.raises(DataError, match="task 'gqa' too"):
        go(zoo.adapter("vl-adapter", rank=4, sharing="multiple", tasks=(*TASKS, "gqa")))
    with pytest.raises(DataError, match="for each item"):
        images = zoo.data.open_dataset(torch.utils.data.TensorDataset(torch.randn(4, 3, 8, 8), torch.arange(4) % 2))
        classes = zoo.data.with_classes(images, ["0", "1"]) if images.classes is None else images
        zoo.run(model("lora"), "multitask", {"vqa": data()["vqa"], "cars": classes}, fit={"progress": False})
    with pytest.raises(MismatchError, match="generate trains those that write"):
        vit = zoo.load("vit-micro", "lora", pretrained=False, num_classes=0, embed_dim=24, depth=1, num_heads=2)
        zoo.run(vit, "multitask", data(), fit={"progress": False})
