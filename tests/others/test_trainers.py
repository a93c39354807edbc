"""Trainers of others around a model: transformers' Trainer, Lightning, accelerate. They train, save little, and go on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from method_models import METHODS, attach, bare, images, targets
from torch import Tensor, nn
from two_processes import launch

import zoo


class Trained(nn.Module):
    """A model as transformers' Trainer wants it: named inputs, a loss among the outputs. Its checkpoints hold no backbone."""

    _keys_to_ignore_on_save = None  # read by the Trainer where keys are missing from a checkpoint

    def __init__(self, model: zoo.Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.model(images)
        return (
            {"logits": logits}
            if labels is None
            else {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
        )

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
        return {k: v for k, v in super().state_dict(*args, **options).items() if not k.startswith("model.backbone.")}


class Whole(Trained):
    """With the backbone in every checkpoint, as a Trainer saves what it is given."""

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
        return nn.Module.state_dict(self, *args, **options)


class Pairs(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Eight items as dicts."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"images": images()[index % 4] + index // 4, "labels": targets()[index % 4]}


def started(method: str) -> zoo.Model:
    model = bare("vit")
    attach(model, method)
    return model


def trained(model: nn.Module, folder: Path, steps: int, resume: str | None = None) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=steps,
        lr_scheduler_type="constant",
        save_steps=2,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(model=model, args=settings, train_dataset=Pairs())
    trainer.train(resume_from_checkpoint=resume)


@pytest.mark.parametrize(
    ("method", "kind"), [("lora", Trained), ("bitfit", Trained), ("spt", Trained), ("bitfit", Whole), ("full", Whole)]
)
def test_transformers(method: str, kind: type[Trained], tmp_path: Path) -> None:
    """Tensors that stood twice under one storage could not be saved; and each checkpoint held the whole backbone."""
    model = started(method)
    trained(kind(model), tmp_path, 4)
    assert (model.training and not model.backbone.training) or method == "full"
    size = (tmp_path / "checkpoint-2" / "model.safetensors").stat().st_size
    backbone = sum(p.nbytes for p in model.backbone.parameters())
    assert size > backbone if kind is Whole or method == "full" else size < backbone / 2
    other = started(method)
    trained(kind(other), tmp_path, 4, str(tmp_path / "checkpoint-2"))
    one, two = model.adapter_state_dict(), other.adapter_state_dict()
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-5, atol=1e-6)
    start = started(method).adapter_state_dict()
    assert any(not torch.equal(v, start[k]) for k, v in one.items())


# -- Lightning --------------------------------------------------------------------------------------------------------


def lit(model: zoo.Model) -> Any:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Lit(lightning.LightningModule):  # type: ignore[name-defined,misc]
        """The recipe of the docs."""

        strict_loading = False  # its checkpoints hold no backbone

        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.modes: list[bool] = []

        def on_train_start(self) -> None:
            self.model.train()  # Lightning keeps the mode that it finds

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            self.modes += [m.training for m in self.model.adapters.modules() if isinstance(m, nn.Dropout)]
            return nn.functional.cross_entropy(self.model(batch["images"]), batch["labels"])

        def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
            assert not self.model.training

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.model.parameters_to_train().values(), lr=0.1)

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            state = self.model.adapter_state_dict()
            checkpoint["state_dict"] = {f"model.{k}": v for k, v in state.items()}

    return Lit()


@pytest.mark.parametrize("method", ["lora", "bitfit", "spt"])
def test_lightning(method: str, tmp_path: Path) -> None:
    """The model comes in eval mode, which Lightning keeps: the adapters' dropout was off while they trained."""
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    model = bare("vit")
    options = {"lora": {"dropout": 0.2}, "spt": {**METHODS["spt"].trial, "dropout": 0.2}}.get(method, {})
    adapter = model.add_adapter(zoo.adapter(method, **options))
    if adapter.needs_calibration:
        adapter.calibrate(model, [(images(), targets())])
    start = {k: v.clone() for k, v in model.adapter_state_dict().items()}

    def trainer(epochs: int) -> Any:
        return lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )

    loader = torch.utils.data.DataLoader(Pairs(), batch_size=4)
    module, run = lit(model), trainer(2)
    run.fit(module, loader, loader)
    assert all(module.modes) and (module.modes or method == "bitfit")
    run.save_checkpoint(tmp_path / "last.ckpt")
    file = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not [k for k in file["state_dict"] if k.startswith("model.backbone.")]
    found = model.adapter_state_dict()
    assert any(not torch.equal(v, start[k]) for k, v in found.items())

    other = bare("vit")
    other.add_adapter(zoo.adapter(method, **options))
    again = trainer(3)
    module = lit(other)
    again.fit(module, loader, loader, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert again.global_step == 6
    third = bare("vit")
    third.add_adapter(zoo.adapter(method, **options))
    third.load_adapter_state_dict({k.removeprefix("model."): v for k, v in file["state_dict"].items()})
    assert torch.equal(third.eval()(images()), model.eval()(images()))


# -- accelerate and DDP -------------------------------------------------------------------------------------------------


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, rows: slice, backward: Any) -> None:
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        backward(nn.functional.cross_entropy(model(images()[rows]), targets()[rows]))
        optimizer.step()


DDP = ("lora", "bitfit", "full", "vpt", "spt", "meft", "vqt")


def test_accelerate(tmp_path: Path) -> None:
    """Accelerator.prepare makes DDP of a model: two processes train to the numbers of one, and going on finds its state."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    launch(prepared, tmp_path, tmp_path)
    assert (tmp_path / "done.0").exists() and (tmp_path / "done.1").exists()


def prepared(folder: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    assert accelerator.num_processes == 2
    for method in DDP:
        one = started(method)
        for module in one.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        two = copy.deepcopy(one)
        made = [torch.optim.SGD(m.parameters_to_train().values(), lr=0.05, momentum=0.9) for m in (one, two)]
        steps(one, made[0], slice(None), lambda loss: loss.backward())
        wrapped, optimizer = accelerator.prepare(two, made[1])
        rows = slice(2 * rank, 2 * rank + 2)
        steps(wrapped, optimizer, rows, accelerator.backward)
        inner = accelerator.unwrap_model(wrapped)
        assert inner is two
        for name, value in one.adapter_state_dict().items():
            torch.testing.assert_close(value, two.adapter_state_dict()[name], rtol=1e-5, atol=1e-6, msg=method)
        accelerator.save_state(str(folder / method))
        kept = {k: v.clone() for k, v in two.adapter_state_dict().items()}
        steps(wrapped, optimizer, rows, accelerator.backward)
        accelerator.load_state(str(folder / method))
        assert all(torch.equal(v, kept[k]) for k, v in two.adapter_state_dict().items()), method
        accelerator.free_memory()
    (folder / f"done.{rank}").write_text("")
    accelerator.wait_for_everyone()
