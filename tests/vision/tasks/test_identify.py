"""Gallery and probes: the numbers against loops, resolutions, two sources of data, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset
from train_parts import easy_data, fit, tiny_model
from typer.testing import CliRunner

import zoo
from vision.tasks.identify import Coarse, Identification, Identify
from zoo.cli import app
from zoo.errors import ConfigError, DataError, MismatchError


def embeddings() -> tuple[Tensor, Tensor, Tensor]:
    """40 features of 8 identities, which are noisy; 7 probes are of nobody in the gallery."""
    generator = torch.Generator().manual_seed(0)
    identity = torch.arange(40) % 8
    z = torch.randn(8, 6, generator=generator)[identity] + 1.2 * torch.randn(40, 6, generator=generator)
    probe = (torch.arange(40) >= 16) | (identity == 7)
    return z, identity, probe


def by_loops(z: np.ndarray, identity: list[int], probe: list[bool], ranks: Any, rates: Any) -> dict[str, float]:
    """As the words say it."""
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    gallery = [i for i, p in enumerate(probe) if not p]
    hits, mated = dict.fromkeys(ranks, 0), 0
    genuine, impostors = [], []
    for i in (i for i, p in enumerate(probe) if p):
        scores = sorted(((float(z[i] @ z[g]), identity[g]) for g in gallery), reverse=True)
        genuine += [s for s, y in scores if y == identity[i]]
        impostors += [s for s, y in scores if y != identity[i]]
        if any(y == identity[i] for _, y in scores):
            mated += 1
            for k in ranks:
                hits[k] += any(y == identity[i] for _, y in scores[:k])
    found = {f"rank@{k}": hits[k] / mated for k in ranks}
    for rate in rates:
        best = 0.0
        for t in [*genuine, *impostors]:
            if sum(s >= t for s in impostors) / len(impostors) <= rate:
                best = max(best, sum(s >= t for s in genuine) / len(genuine))
        found[f"tar@{rate:g}"] = best
    return found


def test_against_loops() -> None:
    z, identity, probe = embeddings()
    metric = Identification(ranks=(1, 3, 5), rates=(0.5, 0.1, 0.01, 0.0))
    for rows in torch.arange(40).split(7):  # in batches
        metric.update(z[rows], 2 * identity[rows] + probe[rows].long())
    found = metric.compute()
    expected = by_loops(z.double().numpy(), identity.tolist(), probe.tolist(), (1, 3, 5), (0.5, 0.1, 0.01, 0.0))
    assert {k: float(v) for k, v in found.items() if "@" in k} == pytest.approx(expected)
    assert 0.2 < found["rank@1"] < found["rank@5"] < 1 and 0 < found["tar@0.1"] < found["tar@0.5"] < 1
    assert (int(found["gallery"]), int(found["probes"]), int(found["unmated"])) == (14, 26, 5)
    assert int(found["impostors"]) == 14 * 26 - 21 * 2
    wide = Identification(ranks=(1, 14, 20))
    wide.update(z, 2 * identity + probe.long())
    assert [k for k in wide.compute() if k.startswith("rank")] == ["rank@1"]  # the others would reach everybody


def test_one_point_finds_nobody_and_perfect_features_everybody() -> None:
    identity, probe = torch.arange(12) % 4, torch.arange(12) >= 4
    flat, perfect = Identification(), Identification()
    flat.update(torch.ones(12, 3), 2 * identity + probe.long())
    assert flat.compute()["rank@1"] == 0 == flat.compute()["tar@0.1"]
    perfect.update(torch.eye(4)[identity], 2 * identity + probe.long())
    assert perfect.compute()["rank@1"] == 1 == perfect.compute()["tar@0.001"]
    for wrong in (torch.full((12, 3), float("nan")), torch.ones(12, 3)):
        metric = Identification()
        metric.update(wrong, 2 * identity + (0 if wrong.isfinite().all() else probe.long()))
        with pytest.raises(DataError, match=r"no numbers|0 probes"):
            metric.compute()


def test_evaluate_by_hand() -> None:
    """Features in front of the head, in both modes of the model; the first image of each identity is the gallery."""
    data, model = easy_data(20), tiny_model("lora")
    model.train()
    found = zoo.evaluate(model, data, task="identify", progress=False, batch_size=6)
    assert model.training and "loss" not in found
    images, labels = data.tensors
    with torch.no_grad():
        z = model.eval().features(images)
    expected = by_loops(z.double().numpy(), labels.tolist(), [False] * 4 + [True] * 16, (1,), (0.1, 0.01))
    assert {k: found[k] for k in expected} == pytest.approx(expected)
    assert (found["gallery"], found["probes"], found["images"]) == (4, 16, 20)
    two = zoo.evaluate(model, data, task=Identify(2, ranks=(1, 5)), progress=False)
    assert (two["gallery"], two["probes"]) == (8, 12) and "rank@5" in two


def folder(root: Path, people: dict[str, int], seed: int = 0) -> Path:
    """Photographs of people: a pattern of each, with noise."""
    for person, count in people.items():
        pattern = np.random.RandomState(sum(map(ord, person))).randint(0, 255, (6, 5, 3))
        (root / person).mkdir(parents=True)
        for i in range(count):
            noise = np.random.RandomState(seed + i).randint(-20, 20, (36, 30, 3))
            image = np.clip(np.kron(pattern, np.ones((6, 6, 1))) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(image).save(root / person / f"{i}.png")
    return root


def test_two_sources_by_names(tmp_path: Path) -> None:
    """Identities are those of equal names, whatever their numbers; probes of others have no rank."""
    gallery = folder(tmp_path / "gallery", {"anna": 1, "carla": 2, "dora": 1, "zoe": 1})
    probes = folder(tmp_path / "probes", {"anna": 3, "berta": 2, "zoe": 2}, seed=9)
    model = zoo.load("vit-micro", num_classes=0)
    found = zoo.evaluate(model, probes, task=Identify(gallery, ranks=(1, 2)), progress=False)
    assert (found["gallery"], found["probes"], found["unmated"]) == (5, 7, 2)
    assert found["rank@1"] == 1
    with pytest.raises(MismatchError, match="are numbers, and the others"):
        zoo.evaluate(tiny_model(), easy_data(8), task=Identify(gallery), progress=False)


def test_cross_resolution(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (36, 30, 3), dtype=np.uint8))
    coarse = Coarse(4)(image)
    assert coarse.size == image.size
    small = np.asarray(image.resize((8, 9), Image.Resampling.BOX), dtype=float)
    assert np.abs(small - np.asarray(coarse.resize((8, 9), Image.Resampling.BOX), dtype=float)).mean() < 6
    faces = folder(tmp_path / "faces", {"anna": 3, "berta": 3, "carla": 3})
    model = zoo.load("vit-micro", num_classes=0)
    seen: list[Tensor] = []
    model.backbone.patch_embed.register_forward_pre_hook(lambda m, x: seen.append(x[0].clone()))  # type: ignore[union-attr]
    zoo.evaluate(model, faces, task=Identify(1, probe_scale=4), progress=False)
    pre = model.preprocess()
    paths = [faces / person / f"{i}.png" for i in (0, 1, 2) for person in ("anna", "berta", "carla")]
    with_hands = [pre(Coarse(4)(Image.open(p)) if p.stem != "0" else Image.open(p)) for p in paths]
    order = [0, 1, 2, 3, 6, 4, 7, 5, 8]  # the gallery, then each person's other images
    torch.testing.assert_close(torch.cat(seen), torch.stack([with_hands[i] for i in order]))
    with pytest.raises(DataError, match="cannot be 64 times smaller"):
        zoo.evaluate(model, faces, task=Identify(1, gallery_scale=64), progress=False)
    with pytest.raises(DataError, match="this one is a Tensor"):
        zoo.evaluate(tiny_model(), easy_data(8), task=Identify(1, probe_scale=2), progress=False)


def test_identities_with_one_image(tmp_path: Path) -> None:
    faces = folder(tmp_path / "faces", {"anna": 3, "berta": 1, "carla": 2, "dora": 1})
    model = zoo.load("vit-micro", num_classes=0)
    with pytest.raises(
        DataError, match=r"2 of 4 identities have 1 image or fewer \(first: 'berta', 'dora'\).*singles="
    ):
        zoo.evaluate(model, faces, task="identify", progress=False)
    counts = {}
    for singles in ("leave", "gallery"):
        found = zoo.evaluate(model, faces, task=Identify(1, singles=singles), progress=False)  # type: ignore[arg-type]
        counts[singles] = found["gallery"], found["probes"]
    assert counts == {"leave": (2, 3), "gallery": (4, 3)}
    with pytest.raises(DataError, match="3 of 4 identities have 2 images or fewer"):
        zoo.evaluate(model, faces, task=Identify(2), progress=False)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"measures, and has no loss.*cosface"):
        fit(tiny_model(), easy_data(), task="identify")
    for wrong, named in (
        ({"gallery": 0}, "gallery is 0"),
        ({"probe_scale": 0.5}, r"a scale is 0\.5"),
        ({"ranks": (0,)}, "ranks are"),
        ({"rates": (2.0,)}, "rates are"),
        ({"ranks": 5}, "ranks is 5; expected several"),
        ({"rates": 0.1}, r"rates is 0\.1; expected several"),
        ({"singles": "drop"}, "singles is 'drop'"),
    ):
        with pytest.raises(ConfigError, match=named):
            Identify(**wrong)  # type: ignore[arg-type]
    numbers = TensorDataset(torch.randn(6, 3, 8, 8), torch.rand(6))
    with pytest.raises(zoo.ZooError):
        zoo.evaluate(tiny_model(), numbers, task="identify", progress=False)


def test_a_gallery_that_holds_the_probes(tmp_path: Path) -> None:
    """Every probe found itself: rank@1 was 1 whatever the model."""
    folder(tmp_path / "faces", {"ann": 3, "bob": 3})
    model = tiny_model()
    with pytest.raises(DataError, match=r"6 of the 6 probes .* are images of the gallery"):
        zoo.evaluate(model, tmp_path / "faces", task=Identify(tmp_path / "faces"), progress=False)
    assert 0 <= zoo.evaluate(model, tmp_path / "faces", task=Identify(1), progress=False)["rank@1"] <= 1


def test_command(tmp_path: Path) -> None:
    faces = folder(tmp_path / "faces", {"anna": 3, "berta": 3, "carla": 3})
    run = CliRunner().invoke
    words = ["identify", "vit-micro", "--data", str(faces), "--probe-scale", "3", "--json"]
    result = run(app, words)
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert (found["gallery"], found["probes"]) == (3, 6) and 0 <= found["rank@1"] <= 1
    shown = run(app, ["identify", "vit-micro", "--data", str(faces), "--gallery", str(faces), "-q"])
    assert shown.exit_code == 1 and "images of the gallery" in " ".join(shown.output.split())
    for option, value in (("--probe-scale", "0.2"), ("--enrol", "0"), ("--singles", "some")):
        assert run(app, [*words, option, value]).exit_code == 1
