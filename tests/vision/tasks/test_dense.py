"""Tasks of maps: losses and metrics against independent ones, training, saving, what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense_data import dense_model, images, pairs

import zoo
from vision.data.dense import IGNORE, open_dense
from vision.metrics.dense import Angles, Contours, Distances, Overlap
from vision.tasks.dense import Depth, Edges, Normals, Segment
from vision.tasks.dense_tasks import ManyDense
from zoo.disk import cards
from zoo.errors import ConfigError, DataError, MismatchError
from zoo.regimes.multitask import single_task

FIT: dict[str, Any] = {"progress": False, "batch_size": 4, "lr": 1e-2}


def maps(seed: int = 0) -> torch.Tensor:
    found = torch.randint(0, 3, (2, 6, 5), generator=torch.Generator().manual_seed(seed))
    found[0, 0] = IGNORE
    return found


def test_losses_are_means_over_pixels_then_items() -> None:
    torch.manual_seed(0)
    outputs, targets = torch.randn(2, 3, 6, 5), maps()
    own = [F.cross_entropy(outputs[i : i + 1], targets[i : i + 1], ignore_index=IGNORE) for i in range(2)]
    model = dense_model(outputs=3)
    loss = Segment().objective(model, outputs, targets, 0.0)
    torch.testing.assert_close(loss, torch.stack(own).mean())
    weighted = Segment().with_loss("cross-entropy", [1.0, 2.0, 0.0])
    weighted.weigh(model, open_dense(pairs(2), classes=["a", "b", "c"]))
    model.train()
    picked = F.cross_entropy(outputs, targets, ignore_index=IGNORE, reduction="none")
    factor = torch.tensor([1.0, 2.0, 0.0])[targets.where(targets != IGNORE, 0)]
    kept = (targets != IGNORE).float()
    expected = ((picked * factor * kept).sum((1, 2)) / kept.sum((1, 2))).mean()
    torch.testing.assert_close(weighted.objective(model, outputs, targets, 0.0), expected)
    nothing = torch.full_like(targets, IGNORE)
    for name in Segment.losses:
        assert Segment().with_loss(name).objective(model, outputs, nothing, 0.0) == 0

    edges = (targets == 1).long().where(targets != IGNORE, IGNORE)
    said, plain = torch.randn(2, 1, 6, 5), []
    for i in range(2):
        z, t = said[i, 0][edges[i] != IGNORE], edges[i][edges[i] != IGNORE].float()
        weight = torch.where(t == 1, (t == 0).float().mean(), t.mean())
        plain.append(F.binary_cross_entropy_with_logits(z, t, weight=weight))
    torch.testing.assert_close(Edges().objective(model, said, edges, 0.0), torch.stack(plain).mean())

    numbers = torch.randn(2, 6, 5)
    numbers[0, 1] = float("nan")
    each = [(said[i, 0] - numbers[i])[numbers[i].isfinite()].abs().mean() for i in range(2)]
    torch.testing.assert_close(Depth().objective(model, said, numbers, 0.0), torch.stack(each).mean())

    true = F.normalize(torch.randn(2, 3, 6, 5), dim=1)
    true[1, :, 0] = float("nan")
    torch.testing.assert_close(Normals().objective(model, 3 * true.nan_to_num(1.0), true, 0.0), torch.tensor(0.0))
    with pytest.raises(ConfigError, match="label_smoothing"):
        Normals().objective(model, true, true, 0.1)


def test_metrics() -> None:
    torch.manual_seed(1)
    outputs, targets = torch.randn(2, 3, 6, 5), maps(1)
    metric = Overlap(3, IGNORE)
    for i in range(2):
        metric.update(outputs[i : i + 1], targets[i : i + 1])
    said, kept = outputs.argmax(1).numpy(), targets.numpy() != IGNORE
    truth = targets.numpy()
    ious, recalls = [], []
    for k in range(3):
        a, b = (said == k) & kept, (truth == k) & kept
        ious.append((a & b).sum() / (a | b).sum())
        recalls.append((a & b).sum() / b.sum())
    found = {k: float(v) for k, v in metric.compute().items()}
    assert found == pytest.approx(
        {
            "miou": np.mean(ious),
            "pixel_accuracy": (said == truth)[kept].mean(),
            "mean_accuracy": np.mean(recalls),
        }
    )
    absent = Overlap(4, IGNORE)  # a class that neither occurs nor was said does not count
    absent.update(torch.cat([outputs, torch.full((2, 1, 6, 5), -9.0)], 1), targets)
    assert float(absent.compute()["miou"]) == pytest.approx(np.mean(ious))

    edges = (targets == 1).long().where(targets != IGNORE, IGNORE)
    contours = Contours(IGNORE)
    contours.update(outputs[:, :1], edges)
    p, true = outputs[:, 0].sigmoid()[edges != IGNORE], edges[edges != IGNORE] == 1
    best = 0.0
    for t in np.arange(1, 100) / 100:
        hit, all_ = float(((p >= t) & true).sum()), float((p >= t).sum())
        best = max(best, 2 * hit / (all_ + float(true.sum())))
    assert float(contours.compute()["ods_f"]) == pytest.approx(best, abs=1e-6)

    distances = Distances()
    numbers = torch.randn(2, 6, 5)
    numbers[0, 0] = float("nan")
    distances.update(outputs[:, :1], numbers)
    error = (outputs[:, 0] - numbers)[numbers.isfinite()].double()
    assert float(distances.compute()["rmse"]) == pytest.approx(float(error.square().mean().sqrt()))
    assert float(distances.compute()["mae"]) == pytest.approx(float(error.abs().mean()))

    angles = Angles()
    angles.update(torch.tensor([0.0, 0.0, 2.0]).view(1, 3, 1, 1), torch.tensor([1.0, 0.0, 1.0]).view(1, 3, 1, 1))
    assert float(angles.compute()["angle_error"]) == pytest.approx(45.0, abs=1e-3)


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_segment_trains_measures_and_saves(family: str, tmp_path: Path) -> None:
    model = dense_model(family)
    train, val = pairs(8), pairs(4, 1)
    report = zoo.fit(model, train, val, task="segment", epochs=6, **FIT)
    assert report.metrics["val_miou"] > 0.8 and report.metrics["val_pixel_accuracy"] > 0.9
    found = zoo.evaluate(model, val, task="segment", progress=False)
    assert found["miou"] == pytest.approx(report.metrics["val_miou"])
    model.save_adapter(tmp_path / "out")
    again = zoo.load(adapter=tmp_path / "out", pretrained=False, seed=0)
    batch = images(family)
    assert torch.equal(again(batch), model(batch)) and again.record["trained_for"] == "segment"
    assert zoo.evaluate(again, val, task="segment", progress=False)["miou"] == found["miou"]


@pytest.mark.parametrize(
    ("kind", "outputs", "options"),
    [("edges", 1, {"derive": "edges"}), ("depth", 1, {"derive": "distance"}), ("depth", 1, {}), ("normals", 3, {})],
)
def test_other_kinds_train(kind: str, outputs: int, options: dict[str, Any]) -> None:
    plain = pairs(8)
    if kind == "normals":
        flat = [np.asarray(mask) % 2 for _, mask in plain]
        directions = [np.stack([m, 0 * m, 0 * m + 1], -1).astype(np.float32) for m in flat]
        plain = [(image, d) for (image, _), d in zip(plain, directions, strict=True)]  # type: ignore[misc]
    model = dense_model(outputs=outputs)
    data = open_dense(plain, kind, **options)
    first = zoo.evaluate(model, data, task=kind, progress=False)
    report = zoo.fit(model, data, data, task=kind, epochs=6, **FIT)
    assert report.metrics["val_loss"] < first["loss"]
    monitor = {"edges": "ods_f", "depth": "rmse", "normals": "angle_error"}[kind]
    better = report.metrics[f"val_{monitor}"] - first[monitor]
    assert better > 0 if kind == "edges" else better < 0


def test_parts_and_weights_change_nothing() -> None:
    def trained(**options: Any) -> torch.Tensor:
        model = dense_model()
        zoo.fit(model, pairs(8), task="segment", epochs=1, **{**FIT, **options})
        return next(iter(model.parameters_to_train().values())).detach().clone()

    torch.testing.assert_close(trained(), trained(accumulate=4), rtol=1e-4, atol=1e-6)
    assert not torch.equal(trained(), trained(loss="dice"))
    balanced = trained(class_weights="balanced")
    assert balanced.isfinite().all() and not torch.equal(trained(), balanced)


def test_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    whole, broken = dense_model(), dense_model()
    zoo.fit(whole, pairs(8), pairs(4, 1), task="segment", epochs=3, keep="last", **FIT)
    with pytest.raises(KeyboardInterrupt):
        zoo.fit(
            *(broken, pairs(8), pairs(4, 1)),
            **{**FIT, "task": "segment", "epochs": 3, "keep": "last", "checkpoint": tmp_path},
            callbacks=[_stop],
        )
    broken = dense_model()
    zoo.fit(broken, pairs(8), pairs(4, 1), task="segment", epochs=3, keep="last", checkpoint=tmp_path, **FIT)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), broken.parameters(), strict=True))


def _stop(record: dict[str, Any]) -> None:
    if record["epoch"] == 2:
        raise KeyboardInterrupt


def many(count: int = 6, seed: int = 0) -> dict[str, Any]:
    plain = pairs(count, seed)
    return {
        "parts": open_dense(plain, classes=["dark", "bright"]),
        "edges": open_dense(plain, "edges", derive="edges"),
        "far": open_dense(plain, "depth", derive="distance"),
    }


@pytest.mark.parametrize("batches", ["one", "mixed"])
def test_several_tasks_at_once(batches: str, tmp_path: Path) -> None:
    model = dense_model(outputs=0)
    report = zoo.run(model, "multitask", many(8), many(4, 1), fit=FIT, epochs=8, tau=0.0, batches=batches)
    assert model.classes == ["parts: dark", "parts: bright", "edges: edge", "far: depth"]
    assert report.summary["measures"] == {"parts": "miou", "edges": "ods_f", "far": "rmse"}
    assert report.summary["values"]["parts"] > 0.7 and "edges | 8 | 1 | ods_f" in report.table()
    batch = images()
    logits = model(batch)
    assert logits.shape == (2, 4, 8, 8)
    model.save_adapter(tmp_path / "out")
    again = zoo.load(adapter=tmp_path / "out", pretrained=False, seed=0)
    assert torch.equal(again(batch), logits)
    edges = single_task(again, "edges")
    assert edges.classes == ["edge"] and torch.equal(edges(batch), logits[:, 2:3])
    value = zoo.evaluate(edges, many(4, 1)["edges"], task="edges", progress=False)["ods_f"]
    assert value == pytest.approx(report.summary["values"]["edges"])


def test_cards_show_maps() -> None:
    """What a card says of a head of maps can be run, and none of them is said to classify images."""
    image, mask = pairs(1)[0]
    segment, edges = open_dense([(image, mask)]), open_dense([(image, mask)], "edges", derive="edges")
    one = dense_model()
    zoo.fit(one, segment, task="segment", epochs=1, progress=False)
    text = cards.render(one, source="ann/parts")
    assert "pipeline_tag: image-segmentation" in text
    assert 'predict_maps(model, ["photo.jpg"], "segment")' in text and "logits" not in text

    lines = dense_model(outputs=1)
    zoo.fit(lines, edges, task="edges", epochs=1, progress=False)
    assert (
        "pipeline_tag" not in (text := cards.render(lines, source="ann/lines")) and "image classification" not in text
    )
    assert 'predict_maps(model, ["photo.jpg"], "edges")' in text
    assert "maps = model(image[None])  # (1, 2, h, w)" in cards.render(dense_model(), source="ann/fresh")

    many = dense_model(outputs=0)
    zoo.run(many, "multitask", {"lines": edges, "parts": segment}, epochs=1, fit={"progress": False})
    text = cards.render(many, source="ann/both")
    assert "pipeline_tag: image-segmentation" in text
    code = text.split("```python\n")[1].split("```")[0]
    assert 'model = single_task(model, "lines")  # or "parts"' in code and '"edges")' in code
    place: dict[str, Any] = {"model": many}
    exec(
        re.sub(r"^model = zoo.load.*$", "", code, flags=re.M).replace('"photo.jpg"', "image"),
        place | {"image": image},
        place,
    )
    assert place["found"].shape == (24, 32) and 0 <= place["found"].min() <= place["found"].max() <= 1


def test_losses_of_several_tasks_are_weighed() -> None:
    """By what an item of a task counts; measured without weights."""
    found = {name: part._like() for name, part in many(2).items()}
    plain, weighed = ManyDense(found), ManyDense(found)
    weighed.weights = {"edges": 0.25, "far": 4.0}
    model = dense_model(outputs=0)
    model.reset_head(4, plain.classes, kind="dense-tasks")
    data = plain.open(model, plain.data, train=False)
    items = [data[i] for i in range(6)]
    x = torch.stack([image for image, _ in items])
    y = {k: torch.stack([target[k] for _, target in items]) for k in ("task", "map")}
    model.train()
    each = [plain.loss(model, x[i : i + 1], {k: v[i : i + 1] for k, v in y.items()})[0] for i in range(6)]
    factor = torch.tensor([1, 1, 0.25, 0.25, 4, 4])
    torch.testing.assert_close(weighed.loss(model, x, y)[0], (factor * torch.stack(each)).mean())
    model.eval()
    assert torch.equal(weighed.loss(model, x, y)[0], plain.loss(model, x, y)[0])


def test_several_tasks_reach_adapters_made_for_them(tmp_path: Path) -> None:
    hyper = zoo.adapter("hyperformer", tasks=("parts", "edges", "far"), rank=2, task_dim=4, hidden=8, projected=8)

    def go() -> tuple[zoo.Model, Any]:
        model = dense_model("vit", hyper, outputs=0)
        return model, zoo.run(model, "multitask", many(), many(3, 1), fit=FIT, epochs=2, out=tmp_path)

    model, report = go()
    again, second = go()  # read back
    assert second.summary == report.summary
    batch = images("vit")
    logits = {name: model(batch, context={"task": name}) for name in ("parts", "edges")}
    assert not torch.allclose(logits["parts"], logits["edges"])
    assert torch.equal(again(batch, context={"task": "edges"}), logits["edges"])
    one = single_task(model, "edges")
    torch.testing.assert_close(one(batch), logits["edges"][:, 2:3], rtol=1e-4, atol=1e-5)


def test_refusals() -> None:
    data = pairs(4)
    with pytest.raises(ConfigError, match=r"needs a head that reads maps.*head='dense'"):
        zoo.fit(dense_model(outputs=0), data, task="segment", **FIT)
    with pytest.raises(MismatchError, match=r"has 2 classes.*head 3"):
        zoo.fit(dense_model(outputs=3), data, task="segment", **FIT)
    with pytest.raises(MismatchError, match="output 'maps'"):
        zoo.load("ast-micro", "lora", num_classes=2, head="dense", pretrained=False)
    with pytest.raises(ConfigError, match="num_classes"):
        zoo.load("vit-micro", "lora", head="dense")
    with pytest.raises(ConfigError, match="no head of the kind 'densee'"):
        zoo.load("vit-micro", "lora", num_classes=2, head="densee")
    with pytest.raises(ConfigError, match="augment"):
        zoo.fit(dense_model(), data, task="segment", augment="randaugment", **FIT)
    with pytest.raises(ConfigError, match="mixup"):
        zoo.fit(dense_model(), data, task="segment", mixup=0.2, **FIT)
    with pytest.raises(ConfigError, match="class_weights"):
        zoo.fit(
            dense_model(outputs=1), open_dense(data, "edges", derive="edges"), task="edges", class_weights=[1.0], **FIT
        )
    named = dense_model(outputs=2, classes=["bright", "dark"])
    with pytest.raises(MismatchError, match="Class 0 is 'bright'"):
        zoo.fit(named, open_dense(data, classes=["dark", "bright"]), task="segment", **FIT)
    with pytest.raises(MismatchError, match=r"Class 0 is 'bright' for the model, '7'.*Equal values have to mean"):
        zoo.fit(named, open_dense(data, classes=["7", "8"]), task="segment", **FIT)  # names, though of digits
    with pytest.raises(DataError, match="opened for 'edges'"):
        zoo.fit(dense_model(), open_dense(data, "edges", derive="edges"), task="segment", **FIT)
    with pytest.raises(ConfigError, match="pooled features"):
        zoo.fit(dense_model("vit", "vqt"), data, task="segment", **FIT)
    labels = zoo.open_dataset([(image, i % 2) for i, (image, _) in enumerate(data)])
    with pytest.raises(DataError, match="no loss in common"):
        zoo.run(dense_model(outputs=0), "multitask", {"a": labels, "b": open_dense(data)}, fit=FIT)


@pytest.mark.parametrize("named", [True, False])
def test_maps_of_one_class_are_measured_by_the_classes_of_the_model(tmp_path: Path, named: bool) -> None:
    """A split may lack the others; counted alone, such maps were refused."""
    model = dense_model(outputs=2)
    train = open_dense(pairs(6), classes=["dark", "bright"] if named else None)
    one = [(image, np.zeros((24, 32), dtype=np.uint8)) for image, _ in pairs(3, seed=5)]
    report = zoo.fit(model, train, one, task="segment", epochs=1, keep="last", **FIT)
    classes = ["dark", "bright"] if named else ["0", "1"]
    assert model.classes == classes
    found = zoo.evaluate(model, one, task="segment", progress=False)
    named_all = zoo.evaluate(model, open_dense(one, classes=classes), task="segment", progress=False)
    assert {k: found[k] == named_all[k] for k in ("miou", "loss", "pixel_accuracy")} == dict.fromkeys(
        ("miou", "loss", "pixel_accuracy"), True
    )
    assert report.metrics["val_miou"] == pytest.approx(found["miou"], abs=1e-6)
    with pytest.raises(DataError, match="there is one class"):  # nothing to learn from
        zoo.fit(dense_model(outputs=2), one, task="segment", epochs=1, **FIT)
    more = [(image, np.full((24, 32), 3, dtype=np.uint8)) for image, _ in pairs(2)]
    with pytest.raises(MismatchError, match="has 4 classes, the model's head 2"):
        zoo.evaluate(model, more, task="segment", progress=False)
