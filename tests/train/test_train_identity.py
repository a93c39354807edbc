"""Which run a checkpoint is of, whether it is whole, and what may change on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import TensorDataset
from train_parts import difference, easy_data, fit, tiny_model, weights

import zoo
from zoo.data import open_dataset
from zoo.data.digest import content
from zoo.errors import ConfigError, MismatchError, WeightsError
from zoo.tasks import Classify
from zoo.train.checkpoint import read_state, write_state

LAST = "last.safetensors"


def lora(**settings: Any) -> zoo.Model:
    return tiny_model(zoo.adapter("lora", **settings))


# -- the identity of a run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": 32.0}, r"lora: alpha was .*, is 32\.0"),
        ({"dropout": 0.1}, r"lora: dropout was 0\.0, is 0\.1"),
        ({"rslora": True}, "lora: rslora was False, is True"),
        ({"targets": "q,k,v"}, r"lora: targets was \['q', 'v'\], is q,k,v|lora: targets was .*, is 'q,k,v'"),
    ],
)
def test_other_settings_of_an_adapter_are_another_run(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    """The checkpoint went on in silence: with another alpha to other numbers, with other targets without training them."""
    fit(lora(), easy_data(16), epochs=1, checkpoint=tmp_path)
    model = lora(**settings)
    before = weights(model)
    with pytest.raises(ConfigError, match=words):
        fit(model, easy_data(16), epochs=1, checkpoint=tmp_path)
    assert difference(weights(model), before) == 0 and not model.training


def test_other_contents_of_the_data_are_another_run(tmp_path: Path) -> None:
    images, labels = easy_data(16).tensors
    fit(lora(), TensorDataset(images, labels), epochs=1, checkpoint=tmp_path)
    changed = images.clone()
    changed[7, 0, 0, 0] += 1
    with pytest.raises(ConfigError, match=r"the data changed \(train: contents\)"):
        fit(lora(), TensorDataset(changed, labels), epochs=1, checkpoint=tmp_path)
    with pytest.raises(ConfigError, match=r"the data changed \(train: labels, contents\)"):
        fit(lora(), TensorDataset(images, labels.flip(0)), epochs=1, checkpoint=tmp_path)
    with pytest.raises(ConfigError, match=r"the data changed \(train, val instead of train\)"):
        fit(lora(), TensorDataset(images, labels), easy_data(8), epochs=1, checkpoint=tmp_path)


def test_a_changed_file_is_seen(image_folder: Path) -> None:
    before = content(open_dataset(image_folder, split="train"))
    assert content(open_dataset(image_folder, split="train")) == before
    file = next((image_folder / "train").rglob("*.png"))
    Image.open(file).rotate(90).save(file)
    after = content(open_dataset(image_folder, split="train"))
    assert [k for k in before if before[k] != after[k]] == ["contents"]


def test_a_source_that_draws_its_items_can_go_on(tmp_path: Path) -> None:
    class Drawn(torch.utils.data.Dataset[Any]):
        generator = torch.Generator()

        def __len__(self) -> int:
            return 16

        def __getitem__(self, i: int) -> Any:
            return torch.randn(3, 8, 8, generator=self.generator), i % 4

    state = torch.get_rng_state()
    for _ in range(2):
        fit(lora(), Drawn(), epochs=1, checkpoint=tmp_path)
    assert torch.equal(state, torch.get_rng_state())


def test_another_loss_task_or_memory_is_another_run(tmp_path: Path) -> None:
    def run(power: int, folder: str, **options: Any) -> None:
        def loss(outputs: Any, targets: Any) -> torch.Tensor:
            return (outputs.softmax(1)[:, 0] - targets).abs().pow(power).mean()

        fit(lora(), easy_data(16), epochs=1, checkpoint=tmp_path / folder, **{"loss": loss, **options})

    run(2, "a")
    run(2, "a")
    with pytest.raises(ConfigError, match="the task: loss was"):
        run(4, "a")
    run(2, "b", loss=None, task=Classify())
    model = lora()
    model.memory = "min"
    with pytest.raises(ConfigError, match="memory was 'default', is 'min'"):
        fit(model, easy_data(16), epochs=1, checkpoint=tmp_path / "b")
    fit(model, easy_data(16), epochs=1, checkpoint=tmp_path / "b", resume=["memory"])


def test_another_head_is_another_run(tmp_path: Path) -> None:
    fit(lora(), easy_data(16), epochs=1, checkpoint=tmp_path)
    model = lora()
    model.reset_head(4, kind="cosine")
    with pytest.raises(ConfigError, match="the head was"):
        fit(model, easy_data(16), epochs=1, checkpoint=tmp_path)


def stopped(model: zoo.Model, folder: Path, **options: Any) -> None:
    """A run of two epochs that was killed after the first."""

    def stop(record: dict[str, Any]) -> None:
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, easy_data(16), epochs=2, checkpoint=folder, callbacks=[stop], **options)


def on(model: zoo.Model, folder: Path) -> None:
    fit(model, easy_data(16), epochs=2, checkpoint=folder, callbacks=[lambda record: None])


def test_another_precision_of_the_backbone_is_another_run(tmp_path: Path) -> None:
    """A run killed in float32 went on in bfloat16, and one of bfloat16 in float32, without a word."""
    wide, half = torch.float32, torch.bfloat16
    for then, now in ((wide, half), (half, wide)):
        folder = tmp_path / str(then)
        stopped(lora().to(dtype=then), folder)
        model = lora().to(dtype=now)
        before = weights(model)
        words = f"the precision of the backbone was '{str(then)[6:]}', is '{str(now)[6:]}'"
        with pytest.raises(ConfigError, match=words):
            on(model, folder)
        assert difference(weights(model), before) == 0
        on(lora().to(dtype=then), folder)


@pytest.mark.parametrize("change", ["one number", "all", "places"])
def test_other_numbers_of_the_backbone_are_another_run(tmp_path: Path, change: str) -> None:
    """Weights that were changed through `.data`, or in a place that the fingerprint does not look at, went on in silence."""
    stopped(lora(), tmp_path)
    model = lora()
    weight = model.backbone.get_submodule("blocks.1.mlp.fc1").weight.data
    if change == "one number":
        weight.view(-1)[1] += 1e-6
    elif change == "all":
        weight.mul_(1.0001)
    else:
        weight.copy_(weight.flip(0))
    with pytest.raises(ConfigError, match="the numbers of the backbone are others"):
        on(model, tmp_path)
    on(lora(), tmp_path)


def test_what_is_frozen_is_part_of_the_run(tmp_path: Path) -> None:
    """A head that was frozen after the checkpoint was unfrozen in silence, and moved; so were halves of an adapter."""
    stopped(lora(), tmp_path / "all")
    model = lora()
    model.heads.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.heads.named_parameters()}
    with pytest.raises(ConfigError, match="frozen now, and trained then: 'head/weight' and 1 more"):
        on(model, tmp_path / "all")
    assert not any(p.requires_grad for p in model.heads.parameters())
    assert difference(dict(model.heads.named_parameters()), before) == 0
    half = lora()
    for name, parameter in half.adapters["lora"].named_parameters():
        parameter.requires_grad_("lora_a" not in name)
    with pytest.raises(ConfigError, match=r"frozen now, and trained then: 'lora/.*lora_a' and 3 more"):
        on(half, tmp_path / "all")
    # the same is frozen on both sides: it goes on, and what is frozen stays
    stopped(model, tmp_path / "frozen")
    assert not any(p.requires_grad for p in model.heads.parameters())
    with pytest.raises(ConfigError, match="trained now, and frozen then: 'head/weight' and 1 more"):
        on(lora(), tmp_path / "frozen")
    again = lora()
    again.heads.requires_grad_(False)
    on(again, tmp_path / "frozen")
    assert not any(p.requires_grad for p in again.heads.parameters())
    assert difference(dict(again.heads.named_parameters()), before) == 0


def test_another_choice_of_trained_adapters_is_another_run(tmp_path: Path) -> None:
    """`set_active(..., train=...)` was forgotten: the run went on with both, or with the other one."""

    def two(train: str | None) -> zoo.Model:
        model = tiny_model(["lora", "ssf"])
        model.set_active("lora", "ssf", train=train)
        return model

    stopped(two("lora"), tmp_path)
    for train in ("ssf", None):
        with pytest.raises(ConfigError, match="trained now, and frozen then: 'ssf/"):
            on(two(train), tmp_path)
    on(two("lora"), tmp_path)


def test_a_step_that_breaks_off_leaves_frozen_what_was() -> None:
    """What a method freezes for a step stayed frozen where that step broke off."""

    class Freezes:
        def fit_start(self, model: Any, optimizer: Any, total_steps: int) -> None:
            self.optimizer = optimizer

        def step_end(self, model: Any, step: int) -> None:
            self.optimizer.freeze("lora/*")
            if step == 1:
                raise KeyboardInterrupt

    model = lora()
    with pytest.raises(KeyboardInterrupt):
        fit(model, easy_data(64), callbacks=[Freezes()])
    assert all(p.requires_grad for p in model.adapters.parameters())


def test_a_change_on_the_way_needs_a_run_to_change(tmp_path: Path) -> None:
    """`resume=["lr"]` began anew where there was no checkpoint, as if it had gone on."""
    for folder, words in ((None, "no checkpoint= is given"), (tmp_path / "none", "holds no checkpoint")):
        with pytest.raises(ConfigError, match=words):
            fit(lora(), easy_data(16), resume=["lr"], checkpoint=folder)


def test_a_monitor_needs_data_to_measure_it_on() -> None:
    """`monitor="zz"` was ignored without validation data, and where the last weights are kept."""
    with pytest.raises(ConfigError, match="monitor is 'zz', and there is no validation data"):
        fit(lora(), easy_data(16), monitor="zz")
    with pytest.raises(ConfigError, match="monitor is 'zz', which the evaluation does not give"):
        fit(lora(), easy_data(16), easy_data(8), monitor="zz", keep="last")


# -- whole checkpoints ------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """Of 25 flipped bits 21 went on to other numbers."""
    fit(lora(), easy_data(16), epochs=1, checkpoint=tmp_path)
    file = tmp_path / LAST
    whole = file.read_bytes()
    places = torch.randint(0, len(whole), (200,), generator=torch.Generator().manual_seed(0)).tolist() + list(
        range(100)
    )
    for place in places:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        with pytest.raises(WeightsError, match="not a whole checkpoint"):
            read_state(file)
    with pytest.raises(WeightsError, match="Delete it, or pass resume=False"):
        fit(lora(), easy_data(16), epochs=1, checkpoint=tmp_path)


def contents(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(str(file), framework="pt") as found:
        return {name: found.get_tensor(name) for name in found.keys()}, found.metadata()  # noqa: SIM118


def test_a_tensor_that_was_taken_out(tmp_path: Path) -> None:
    """A missing weight stayed as it was drawn, a missing state of the optimizer was nought."""
    fit(lora(), easy_data(16), epochs=1, checkpoint=tmp_path)
    tensors, about = contents(tmp_path / LAST)
    for name in ("lora/blocks.0.attn.q.lora_a", "optimizer:head/weight|exp_avg"):
        save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / LAST, about)
        with pytest.raises(WeightsError, match="not a whole checkpoint"):
            fit(lora(), easy_data(16), epochs=1, checkpoint=tmp_path)
        # the same by somebody who writes a checksum, too
        state = json.loads(about["zoo.state"])
        write_state(tmp_path / LAST, {k: v for k, v in tensors.items() if k != name}, state)
        model = lora()
        before = weights(model)
        with pytest.raises(MismatchError, match=r"lacks 1 tensors|optimizer has \d+ tensors where"):
            fit(model, easy_data(16), epochs=1, checkpoint=tmp_path)
        assert difference(weights(model), before) == 0


def test_a_damaged_best_epoch(tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 2, "checkpoint": tmp_path}
    fit(lora(), easy_data(16), easy_data(8), **options)
    file = next(tmp_path.glob("best-*"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-5] + bytes([whole[-5] ^ 4]) + whole[-4:])
    with pytest.raises(WeightsError, match="not a whole checkpoint"):
        fit(lora(), easy_data(16), easy_data(8), **options)


# -- changes on the way -----------------------------------------------------------------------------------------------------


class Rates:
    """The learning rate of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def fit_start(self, model: Any, optimizer: Any, total_steps: int) -> None:
        self.optimizer = optimizer

    def after_step(self, model: Any, step: int) -> None:
        self.seen.append(self.optimizer.groups[0]["lr"])


def test_more_epochs_than_a_finished_run_had(tmp_path: Path) -> None:
    """Asking for more epochs was refused."""
    options: dict[str, Any] = {"checkpoint": tmp_path, "warmup": 0, "batch_size": 8, "lr": 1e-2}
    first = fit(model := lora(), easy_data(32), epochs=2, **options)
    trained, rates = weights(model), Rates()
    report = fit(again := lora(), easy_data(32), epochs=5, callbacks=[rates], **options)
    assert [h["epoch"] for h in report.history] == [1, 2, 3, 4, 5] and report.steps == 20
    assert report.history[:2] == first.history
    # a schedule of its own over the three epochs that came
    assert rates.seen == pytest.approx(
        [1e-2 * 0.5 * (1 + torch.pi * 0 + float(torch.cos(torch.tensor(torch.pi * i / 12)))) for i in range(12)]
    )
    assert report.settings["changes"] == [{"epoch": 2, "step": 8, "epochs": "epochs was 2, is 5"}]
    assert difference(weights(again), trained) > 0
    # what was gone on with is a checkpoint as any other
    assert fit(once_more := lora(), easy_data(32), epochs=5, **options).history == report.history
    assert difference(weights(once_more), weights(again)) == 0
    with pytest.raises(ConfigError, match="epochs was 5, is 3"):
        fit(lora(), easy_data(32), epochs=3, **options)


def test_a_run_that_went_on_can_be_killed(tmp_path: Path) -> None:
    options: dict[str, Any] = {"warmup": 0, "batch_size": 8, "checkpoint_every": 1}
    for folder in ("a", "b"):
        fit(lora(), easy_data(32), epochs=1, checkpoint=tmp_path / folder, **options)
    whole = fit(expected := lora(), easy_data(32), epochs=3, checkpoint=tmp_path / "a", **options)

    class Stop:
        def step_end(self, model: Any, step: int) -> None:
            if step == 9:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(lora(), easy_data(32), epochs=3, checkpoint=tmp_path / "b", callbacks=[Stop()], **options)
    report = fit(model := lora(), easy_data(32), epochs=3, checkpoint=tmp_path / "b", **options)
    assert [h["loss"] for h in report.history] == [h["loss"] for h in whole.history]
    assert difference(weights(model), weights(expected)) == 0


def test_another_rate_and_batch_size_on_request(tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint": tmp_path, "warmup": 0, "epochs": 4}

    class Stop:
        def epoch_end(self, model: Any, epoch: int) -> None:
            if epoch == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(lora(), easy_data(32), batch_size=8, lr=1e-2, callbacks=[Stop()], **options)
    with pytest.raises(
        ConfigError, match=r"batch_size was 8, is 16; lr was 0\.01, is 0\.001.*resume=\['batch_size', 'lr'\]"
    ):
        fit(lora(), easy_data(32), batch_size=16, lr=1e-3, **options)
    rates = Rates()
    report = fit(
        lora(), easy_data(32), batch_size=16, lr=1e-3, resume=["lr", "batch_size"], callbacks=[rates], **options
    )
    # two of four epochs were done, 4 steps each; two more have 2 steps each, on the second half of the cosine
    assert report.steps == 8 + 4 and len(report.history) == 4
    half = [0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * p)))) for p in (0.5, 0.625, 0.75, 0.875)]
    assert rates.seen == pytest.approx([1e-3 * f for f in half])
    with pytest.raises(ConfigError, match="resume names 'optimizer', which a run that goes on keeps"):
        fit(lora(), easy_data(32), resume=["optimizer"], **options)


def test_a_method_with_a_schedule_of_its_own_is_not_prolonged(tmp_path: Path) -> None:
    def run(epochs: int) -> None:
        model = tiny_model(zoo.adapter("adalora", rank=3, target_rank=2))
        fit(model, easy_data(32), epochs=epochs, batch_size=4, checkpoint=tmp_path)

    run(2)
    with pytest.raises(ConfigError, match="'adalora' planned its schedule over the steps of the run"):
        run(3)


def test_early_stopping_ends_a_run_that_may_go_on(tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint": tmp_path, "patience": 1, "lr": 1e-12}
    first = fit(lora(), easy_data(16), easy_data(8), epochs=5, **options)
    assert first.stopped == "early" and len(first.history) == 2
    again = fit(lora(), easy_data(16), easy_data(8), epochs=9, **options)
    assert len(again.history) > 2


def test_the_head_counts_as_what_is_trained(tmp_path: Path) -> None:
    model = lora()
    assert isinstance(model.head, nn.Linear)
    fit(model, easy_data(16), epochs=1, checkpoint=tmp_path)
    tensors, _ = contents(tmp_path / LAST)
    assert {"head/weight", "head/bias"} <= set(tensors)
