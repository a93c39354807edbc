"""Sounds out of everything: rows by name, tables, shards, the library datasets; labels of every kind; and what is no sound."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from audio_parts import SMALL, encoded, table, tone

import zoo
from audio.data.sound import as_sound
from audio.data.sounds import open_audio
from zoo.data import Skipped
from zoo.errors import DataError

WAVES = [tone(300 + 200 * i, 0.1) for i in range(4)]


def check(source: Any, labels: Any = (0, 1, 0, 1), **options: Any) -> Any:
    """The four waves with these labels."""
    data = open_audio(source, **options)
    assert len(data) == 4
    for i, wave in enumerate(WAVES):
        sound, label = data[i]
        np.testing.assert_allclose(sound.wave.numpy(), wave, atol=1e-4)
        assert sound.rate == 16_000 and torch.as_tensor(label).tolist() == labels[i]
    return data


def test_objects() -> None:
    check([(wave, i % 2) for i, wave in enumerate(WAVES)])
    check([((wave, 16_000), i % 2) for i, wave in enumerate(WAVES)])
    check([{"audio": {"array": wave, "sampling_rate": 16_000}, "label": i % 2} for i, wave in enumerate(WAVES)])
    check([{"audio": {"bytes": encoded(wave), "path": None}, "label": i % 2} for i, wave in enumerate(WAVES)])
    check([{"__key__": str(i), "wav": encoded(wave), "cls": str(i % 2).encode()} for i, wave in enumerate(WAVES)])
    check(({"speech": wave, "emotion": "ba"[i % 2]} for i, wave in enumerate(WAVES)), (1, 0, 1, 0))


def test_files(tmp_path: Path) -> None:
    for i, wave in enumerate(WAVES):
        (tmp_path / f"{i}.wav").write_bytes(encoded(wave))
    (tmp_path / "labels.csv").write_text("file,genre\n" + "".join(f"{i}.wav,{'xy'[i % 2]}\n" for i in range(4)))
    assert check(tmp_path).classes == ["x", "y"]
    (tmp_path / "labels.csv").write_text("file,a,b\n" + "".join(f"{i}.wav,{i % 2},1\n" for i in range(4)))
    tags = check(tmp_path, [[0, 1], [1, 1]] * 2, label_column=["a", "b"])
    assert tags.classes == ["a", "b"]
    (tmp_path / "labels.csv").write_text("file,score\n" + "".join(f"{i}.wav,{i - 1.5}\n" for i in range(4)))
    assert check(tmp_path, [-1.5, -0.5, 0.5, 1.5]).classes is None
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for i, wave in enumerate(WAVES):
            for name, data in ((f"{i}.flac", encoded(wave, form="FLAC")), (f"{i}.cls", str(i % 2).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    check(tmp_path / "x.tar")


def test_the_library_datasets() -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"audio": [{"bytes": encoded(w), "path": None} for w in WAVES], "label": [0, 1, 0, 1]}
    held = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio(decode=False))
    check(held)
    check(datasets.DatasetDict(train=held))
    check(held.to_iterable_dataset())


def test_names_of_tags_are_kept_with_the_head(tmp_path: Path) -> None:
    """They were those of a classification only; and other tags of the same number were measured as these."""
    file = table(tmp_path / "p", "x.parquet", audio=[encoded(w) for w in WAVES], label=[["a"], ["b"], ["a", "b"], []])
    model = zoo.load("ast-micro", "linear", pretrained=False, num_classes=2, **SMALL)
    zoo.fit(model, file, task="multilabel", epochs=1, progress=False)
    assert model.classes == ["a", "b"]
    with pytest.raises(zoo.ZooError, match="Class 0 is 'a' for the model, 'b' in the data set"):
        zoo.evaluate(model, open_audio(file, classes=["b", "a"]), task="multilabel", progress=False)


def test_regression_of_sounds(tmp_path: Path) -> None:
    file = table(tmp_path / "p", "x.parquet", audio=[encoded(w) for w in WAVES], loudness=[0.5, -1.0, 2.0, 0.0])
    data = open_audio(file, label_column="loudness")
    assert data.targets is not None and data.targets.tolist() == [0.5, -1.0, 2.0, 0.0]
    model = zoo.load("ast-micro", "linear", pretrained=False, num_classes=1, **SMALL)

    for source in (data, [(wave, i - 2) for i, wave in enumerate(WAVES)]):
        report = zoo.fit(model, source, task="regress", epochs=1, progress=False)
        assert np.isfinite(report.history[0]["loss"]) and report.data["classes"] == 1
    with pytest.raises(DataError, match="regress"):
        zoo.fit(model, data, epochs=1, progress=False)


class Decoder:
    """As torchcodec's decoder, which the library `datasets` gives for a sound."""

    def get_all_samples(self) -> Any:
        return type("Samples", (), {"data": torch.ones(2, 800) / 2, "sample_rate": 8_000})()


def test_decoders() -> None:
    sound = as_sound(Decoder())
    assert sound.rate == 8_000 and sound.wave.shape == (800,) and float(sound.wave[0]) == 0.5


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"array": WAVES[0]}, "expected 'array' and 'sampling_rate'"),
        ({"sampling_rate": 16_000}, "expected 'array' and 'sampling_rate'"),
        ({}, "with the entries none"),
        ({"array": WAVES[0], "sampling_rate": "16000"}, "the sample rate is '16000'; expected a whole number"),
        ({"array": WAVES[0], "sampling_rate": None}, "the sample rate is None"),
        ({"array": WAVES[0], "sampling_rate": 0}, "a sample rate of 0 Hz"),
        ({"array": WAVES[0], "sampling_rate": float("nan")}, "the sample rate is nan"),
        ((WAVES[0], "fast"), "the sample rate is 'fast'"),
        ((WAVES[0], 16_000.5), "the sample rate is 16000.5"),
        ({"array": [["a"]], "sampling_rate": 16_000}, "is no waveform"),
        (1, "an array of shape"),
        (None, "there is no sound"),
        ("x.wav", r"x\.wav: cannot be read"),
    ],
)
def test_what_is_no_sound_is_named_or_skipped(value: Any, words: str) -> None:
    """Foreign errors of dicts without a rate, or with one of text."""
    with pytest.raises(DataError, match=rf"list, item 1: .*{words}"):
        open_audio([(WAVES[0], 0), (value, 0)])[1]
    assert isinstance(open_audio([(WAVES[0], 0), (value, 0)], on_error="skip")[1], Skipped)


@pytest.mark.parametrize(
    "labels", [[[["a"]], [["b"]]], [["a", None], ["b"]], [["a"], None], [[0], [10**9]], [[0], [-1]]]
)
def test_bad_lists_in_parquet_files(labels: Any, tmp_path: Path) -> None:
    file = table(tmp_path / "p", "x.parquet", audio=[encoded(w) for w in WAVES[:2]], label=labels)
    with pytest.raises(DataError, match=r"row \d"):
        open_audio(file)


def test_lists_of_floats_are_columns(tmp_path: Path) -> None:
    file = table(
        tmp_path / "p", "x.parquet", audio=[encoded(w) for w in WAVES[:2]], label=[[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]
    )
    data = open_audio(file)
    assert data.classes == ["0", "1", "2"] and data[0][1].tolist() == [0, 1, 1]


def test_data_that_is_none() -> None:
    for data in ([1], [(1,)], [[1, 2, 3]]):
        with pytest.raises(DataError, match=r"item 0: .*expected a pair"):
            open_audio(data)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_among_the_sounds(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.wav").write_bytes(encoded(WAVES[0]))
    os.mkfifo(tmp_path / "a" / "2.wav")
    with pytest.raises(DataError, match=r"2\.wav: is a pipe"):
        open_audio(tmp_path)[1]
    assert isinstance(open_audio(tmp_path, on_error="skip")[1], Skipped)


def test_functions_as_augmentation() -> None:
    """As those of audiomentations: (samples, sample rate) -> samples, on the whole sound at 16 kHz, in training only."""
    seen: list[Any] = []

    def louder(samples: np.ndarray, rate: int) -> np.ndarray:
        seen.append((samples.dtype, rate))
        return samples * 2

    model = zoo.load("ast-micro", "linear", pretrained=False, num_classes=2, **SMALL)
    transform = model.family.preprocess(True, augment=louder)
    assert torch.equal(transform(WAVES[0]), model.preprocess()(WAVES[0] * 2)) and seen == [(np.float32, 16_000)]
    zoo.fit(model, [(w, i % 2) for i, w in enumerate(WAVES)], augment=louder, epochs=1, progress=False)
    assert len(seen) >= 5
    with pytest.raises(DataError, match="item 0: what augment gives: an array of shape"):
        open_audio([(WAVES[0], 0)], transform=model.family.preprocess(True, augment=lambda w, rate: w[None]))[0]
