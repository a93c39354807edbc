"""`zoo.fit` and bad input: what stops, what is counted, what is refused; and the batches that it makes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from image_data import encoded, write_parquet
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset
from train_parts import difference, easy_data, fit, tiny_model, weights

import zoo
from zoo.data import open_dataset
from zoo.errors import ConfigError, DataError, MismatchError
from zoo.tasks import Classify
from zoo.train import TrainingError
from zoo.train.batches import BatchPlan, make_loader
from zoo.train.schedule import factor, layer_scales

QUIET = {"progress": False}

# -- bad input --------------------------------------------------------------------------------------------------------------


def test_nan_stops_before_the_weights_are_touched() -> None:
    images, labels = easy_data(48).tensors
    images[int(BatchPlan(48, 16).order(0)[20])] = math.nan
    model, after = tiny_model(), []
    with pytest.raises(TrainingError, match=r"The loss became NaN or infinite at step 1 .*Lower lr"):

        class Copy:
            def step_end(self, model: zoo.Model, step: int) -> None:
                after.append(weights(model))

        fit(model, TensorDataset(images, labels), callbacks=[Copy()])
    assert len(after) == 1 and difference(weights(model), after[0]) == 0


def test_corrupt_images_are_counted(tmp_path: Path) -> None:
    images = [encoded(60 * (i % 4)) if i not in (3, 8) else b"" for i in range(12)]
    file = write_parquet(tmp_path / "x.parquet", [i % 4 for i in range(12)], images)
    with pytest.raises(DataError, match=r"row [38]: the image is empty"):
        fit(tiny_model(), file)
    data = open_dataset(file, on_error="skip")
    report = fit(tiny_model(), data, batch_size=4)
    assert sorted(place.rpartition(" ")[2] for place in report.skipped) == ["3", "8"]
    assert zoo.evaluate(tiny_model(), data, **QUIET)["skipped"] == 2


def test_unreadable_images_do_not_thin_the_mean(tmp_path: Path) -> None:
    """A batch of 8 of which 4 cannot be read gives the step of a batch of 4."""
    good = [encoded(60 * i) for i in range(4)]
    lenient = open_dataset(
        write_parquet(tmp_path / "a.parquet", [0, 1, 2, 3] * 2, [*good, *[b""] * 4]), on_error="skip"
    )
    models = tiny_model(), tiny_model()
    for model, data, size in (
        (models[0], lenient, 8),
        (models[1], write_parquet(tmp_path / "b.parquet", [0, 1, 2, 3], good), 4),
    ):
        fit(model, data, batch_size=size, epochs=1, optimizer="sgd", clip=None, augment="none")
    assert difference(weights(models[0]), weights(models[1])) < 1e-6


def test_classes_that_do_not_fit() -> None:
    model = tiny_model(num_classes=4)
    with pytest.raises(MismatchError, match=r"has 3 classes, the model's head 4\. Load the model with num_classes=3"):
        fit(model, easy_data(12, classes=3))

    class Silent(Dataset[Any]):
        """Does not tell its labels beforehand."""

        def __len__(self) -> int:
            return 4

        def __getitem__(self, i: int) -> Any:
            return torch.zeros(3, 8, 8), i + 2

    with pytest.raises(DataError, match=r"a label 5 is outside the model's 4 classes \(0..3\)"):
        fit(model, Silent())
    with pytest.raises(DataError, match="a label 5 is outside"):
        zoo.evaluate(model, Silent(), **QUIET)
    with pytest.raises(ConfigError, match="no classification head"):
        fit(tiny_model(num_classes=0), easy_data(8))


def test_classes_in_another_order(image_folder: Path) -> None:
    model = tiny_model(num_classes=2)
    train = open_dataset(image_folder, split="train", classes=["red", "blue"])
    fit(model, train, epochs=1)
    assert model.classes == ["red", "blue"]
    with pytest.raises(MismatchError, match="Class 0 is 'red' for the model, 'blue' in the data set"):
        zoo.evaluate(model, image_folder / "test", **QUIET)
    with pytest.raises(MismatchError, match="Class 0 is 'red'"):
        fit(model, train, image_folder / "test")


def test_nothing_to_train() -> None:
    with pytest.raises(ConfigError, match="nothing to train"):
        fit(tiny_model(None, num_classes=0), easy_data(8), loss=lambda o, t: o.sum())
    with pytest.raises(ConfigError, match=r"float16, too coarse"):
        fit(tiny_model().to(torch.float16), easy_data(8))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"epochs": 0}, "epochs is 0; expected a whole number >= 1"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"lr": -1.0}, "lr is -1.0; expected numbers above 0"),
        ({"lr": {"lorra": 1e-3}}, "lr has an entry 'lorra' that fits no trained parameter. Did you mean 'lora'"),
        ({"precision": "fp8"}, "precision is 'fp8'; expected one of fp32, bf16, fp16"),
        ({"optimizer": "adamm"}, "optimizer is 'adamm'"),
        ({"optimizer_options": {"beta": 1}}, "does not take these options"),
        ({"schedule": "cosin"}, "Unknown schedule 'cosin'. Did you mean 'cosine'"),
        ({"keep": "first"}, "keep is 'first'"),
        ({"accumulate": 17}, r"accumulate is 17; expected at most batch_size \(16\)"),
        ({"layer_decay": 2.0}, "layer_decay is 2.0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"device": "cuda"}, "torch sees no CUDA GPU"),
    ],
)
def test_settings_out_of_range(setting: dict[str, Any], words: str) -> None:
    if setting.get("device") and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=words):
        fit(tiny_model(), easy_data(16), **setting)


# -- learning rates, batches ------------------------------------------------------------------------------------------------


def test_schedules() -> None:
    assert [factor("constant", s, 10, 3) for s in (0, 2, 3, 9)] == [0.25, 0.75, 1, 1]
    assert [factor("linear", s, 10) for s in (0, 5, 10)] == [1, 0.5, 0]
    assert [factor("cosine", s, 12, 2) for s in (2, 7, 12)] == pytest.approx([1, 0.5, 0])


def test_layer_decay_by_block_and_stage() -> None:
    names = [
        "bitfit/patch_embed.bias",
        "lora/stages.0.blocks.0.attn.q.lora_a",
        "lora/stages.1.blocks.0.attn.q.lora_a",
        "lora/stages.1.blocks.10.mlp.up.lora_a",
        "lora/stages.1.blocks.2.mlp.up.lora_a",
        "bitfit/norm.bias",
        "head/weight",
    ]
    scales = layer_scales(names, 0.5)
    assert [scales[n] for n in names] == [0.5**5, 0.5**4, 0.5**3, 0.5**1, 0.5**2, 1, 1]


def test_learning_rates_of_groups() -> None:
    seen = {}

    class Look:
        def fit_start(self, model: zoo.Model, optimizer: Any, total_steps: int) -> None:
            optimizer.set_lr()
            seen.update({name: optimizer.current_lr(name) for name in optimizer.parameters})

    fit(
        tiny_model(),
        easy_data(16),
        epochs=1,
        warmup=0,
        lr={"lora": 1e-2, "head": 1e-3, "lora/*.1.*": 1e-4},
        callbacks=[Look()],
    )
    for name, lr in seen.items():
        assert lr == pytest.approx(1e-3 if name.startswith("head/") else 1e-4 if "blocks.1" in name else 1e-2)
    fit(
        tiny_model(["bitfit", "full"][:1]),
        easy_data(16),
        epochs=1,
        warmup=0,
        lr=None,
        layer_decay=0.5,
        callbacks=[Look()],
    )
    blocks = {n: lr for n, lr in seen.items() if n.startswith("bitfit/blocks")}
    # the method's own rate is for a thousand steps; over one it is four times as much
    assert all(lr == pytest.approx(4e-3 * (0.5 if ".1." in n else 0.25)) for n, lr in blocks.items()) and blocks


def test_batches_are_the_same_for_any_number_of_processes_and_workers(image_folder: Path) -> None:
    model = tiny_model(num_classes=2)
    data = Classify().open(model, image_folder / "train", train=True)  # random crops and flips
    cpu = torch.device("cpu")

    def epoch(world: int, parts: int, workers: int) -> dict[int, Tensor]:
        plans = [BatchPlan(24, 9, parts=parts, rank=r, world=world) for r in range(world)]
        for plan in plans:
            plan.epoch = 3
        loaders = [iter(make_loader(data, plan, workers=workers, device=cpu)) for plan in plans]
        collected = []
        for _ in range(3):
            pieces: dict[int, Any] = {}
            for part in range(parts):
                for rank, loader in enumerate(loaders):
                    pieces[part * world + rank] = next(loader)
            collected.append(torch.cat([pieces[i].inputs for i in sorted(pieces) if pieces[i].count]))
        return dict(enumerate(collected))

    alone = epoch(1, 1, 0)
    assert [len(x) for x in alone.values()] == [9, 9, 6]
    for arrangement in ((2, 1, 0), (1, 3, 0), (2, 2, 0), (7, 1, 0), (1, 2, 2)):
        assert all(torch.equal(a, b) for a, b in zip(alone.values(), epoch(*arrangement).values(), strict=True))


def test_the_middle_of_an_epoch() -> None:
    whole, rest = BatchPlan(20, 4, seed=5), BatchPlan(20, 4, seed=5)
    whole.epoch = rest.epoch = 2
    rest.start = 3
    assert list(whole)[3:] == list(rest) and sorted(i for batch in whole for _, i in batch) == list(range(20))


def test_a_training_set_of_which_nothing_can_be_read(tmp_path: Path) -> None:
    """Not a loss of 0.0 and success."""
    data = open_dataset(write_parquet(tmp_path / "a.parquet", [0, 1, 2, 3], [b""] * 4), on_error="skip")
    with pytest.raises(
        DataError, match=r"Nothing was trained on in epoch 1: none of the images could be read\. First: .*a\.parquet"
    ):
        zoo.fit(tiny_model(), data, epochs=2, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"streams": [1]}, "streams is a list; expected data by name"),
        ({"sampler": "mixed"}, "sampler is 'mixed'; expected one of"),
        ({"callbacks": 5}, "callbacks is a int; expected a list"),
        ({"callbacks": [1]}, "the callback 1 is neither a function nor has it one of the methods"),
    ],
)
def test_other_things_than_asked_for(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        zoo.fit(tiny_model(), easy_data(8), epochs=1, progress=False, **options)
    with pytest.raises(DataError, match=r"item 0: int; expected a pair \(image, label\)"):
        zoo.fit(tiny_model(), [1], epochs=1, progress=False)
