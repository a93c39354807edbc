"""Structure that changes while training: one call for parameter, optimizer, schedule and plan; saved, copied, resumed."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_parts import Stop, StopAt, difference, easy_data, fit, tiny_model, weights

import zoo
from zoo.adapters.lora import LoRA
from zoo.errors import CombinationError, ConfigError, MismatchError
from zoo.train import OptimizerService, training_hooks

A, B = "blocks.0.attn.q.lora_a", "blocks.0.attn.q.lora_b"


def images() -> Tensor:
    return easy_data(6, seed=5).tensors[0]


@dataclass(eq=False)
class Changing(LoRA):
    """LoRA whose ranks change: the rows that matter least go in step 2, two come in step 4, a whole part goes in step 5."""

    def after_step(self, model: Any, step: int) -> None:
        part: Any = self.module_at("blocks.0.attn.q")
        if step == 2:
            keep = part.lora_a.detach().norm(dim=1).topk(3).indices.sort().values
            self.resize(A, keep=keep)
            self.resize(B, keep=keep, dim=1)
        if step == 4:
            self.resize(A, rows=5, new=torch.rand(2, 24))
            self.resize(B, rows=5, dim=1)
            self.grow("blocks.1.attn.v.shift", torch.rand(24), lr_scale=0.5)

    def extra_loss(self, model: Any, outputs: Tensor, targets: Tensor) -> Tensor | None:
        shift = getattr(self.module_at("blocks.1.attn.v"), "shift", None)
        return None if shift is None else (shift - outputs.mean()).square().sum()


def trained(adapter: Any = "lora") -> tuple[zoo.Model, OptimizerService, Any]:
    """A model with two steps of Adam behind it, the service, and its adapter."""
    model = tiny_model(adapter)
    hooks = training_hooks(model)
    service = OptimizerService(lr=0.1, total_steps=10, schedule="constant")
    service.add(model.parameters_to_train(), birth=0)
    hooks.fit_start(service, 10)
    for _ in range(2):
        model(images()).square().sum().backward()
        service.step()
        service.zero_grad()
    return model, service, model.adapters["lora"]


def test_an_adapter_knows_its_name() -> None:
    model = tiny_model(None)
    assert zoo.adapter("lora").name == ""
    assert model.add_adapter("lora").name == "lora" and model.add_adapter("lora", activate=False).name == "lora-2"
    assert model.add_adapter("bitfit", "other").name == "other"
    assert model.reattach("other").name == "other"


def test_resize_takes_everything_along() -> None:
    model, service, adapter = trained()
    before, state = {n: p.detach().clone() for n, p in adapter.named_parameters()}, dict(service.state(f"lora/{A}"))
    rank = len(before[A])
    keep = torch.tensor([5, 1, 2])
    adapter.resize(A, keep=keep)
    made = adapter.resize(B, keep=keep, dim=1)
    assert (
        adapter.get_parameter(B) is made is model.parameters_to_train()[f"lora/{B}"] is service.parameters[f"lora/{B}"]
    )
    assert torch.equal(adapter.get_parameter(A), before[A][keep]) and torch.equal(made, before[B][:, keep])
    now = service.state(f"lora/{A}")
    assert torch.equal(now["exp_avg_sq"], state["exp_avg_sq"][keep]) and now["step"] == state["step"]
    adapter.resize(A, rows=4, new=torch.ones(1, 24))
    adapter.resize(B, rows=4, dim=1)
    assert torch.equal(service.state(f"lora/{A}")["exp_avg"], torch.cat([state["exp_avg"][keep], torch.zeros(1, 24)]))
    # what is written down by hand gives the same
    q = model.backbone.blocks[0].attn.qkv
    x = torch.randn(2, 17, 24)
    delta = (
        x @ torch.cat([before[A][keep], torch.ones(1, 24)]).T @ torch.cat([before[B][:, keep], torch.zeros(24, 1)], 1).T
    )
    v = adapter.module_at("blocks.0.attn.v").forward(x)
    with torch.no_grad():
        bare = torch.nn.functional.linear(x, q.weight, q.bias)
        torch.testing.assert_close(q(x) - bare, torch.cat([delta, torch.zeros(2, 17, 24), v], -1), rtol=1e-4, atol=1e-5)
    model(images()).square().sum().backward()
    assert adapter.get_parameter(A).grad.shape == (4, 24) and rank == 8
    service.step()
    assert adapter.plan == {"structure": {A: [4, 24], B: [24, 4]}}


def test_grow_and_drop() -> None:
    model, service, adapter = trained()
    service.scale_lr("lora/*", 0.5)
    born = adapter.grow("blocks.0.attn.q.extra", torch.ones(3), like=A)
    assert service.current_lr("lora/blocks.0.attn.q.extra") == pytest.approx(0.05)
    assert next(g for g in service.groups if any(p is born for p in g["params"]))["birth"] == 2
    assert model.parameters_to_train()["lora/blocks.0.attn.q.extra"] is born
    adapter.drop("blocks.0.attn.q.extra")
    assert "lora/blocks.0.attn.q.extra" not in service.parameters and adapter.module_at("blocks.0.attn.q").extra is None
    assert adapter.plan == {"structure": {"blocks.0.attn.q.extra": None}}


def test_what_is_refused_changes_nothing() -> None:
    model, service, adapter = trained()
    before = weights(model)
    for call, message in (
        (lambda: adapter.resize(A, keep=[]), "resized to 0 rows; at least 1 must stay"),
        (lambda: adapter.resize(A, rows=0, keep=[]), "resized to 0 rows"),
        (lambda: adapter.resize(A, keep=[0, 8]), "has 8 rows along dim 0"),
        (lambda: adapter.resize(A, keep=torch.tensor([True, False])), "the mask has"),
        (lambda: adapter.resize(A, keep=torch.zeros(8, dtype=torch.bool)), "resized to 0 rows"),
        (lambda: adapter.resize(A, keep=[0.5]), r"keep= are whole numbers or a mask, not torch.float32"),
        (lambda: adapter.resize(A, rows=7), "less than the 8 rows"),
        (lambda: adapter.resize(A, rows=9, new=torch.zeros(1, 23)), r"expected \(1, 24\)"),
        (lambda: adapter.resize(A, dim=2), "no dim=2"),
        (lambda: adapter.resize("blocks.0.attn.q.lora_c", rows=9), "has no parameter 'blocks.0.attn.q.lora_c'"),
        (lambda: adapter.resize("blocks.7.attn.q.lora_a", rows=9), "has no place 'blocks.7.attn.q'"),
        (lambda: adapter.grow(A, torch.ones(2)), "is there already"),
        (lambda: adapter.grow("blocks.0.attn.q.e", torch.ones(0)), "would be empty"),
        (lambda: adapter.grow("blocks.0.attn.q.e", torch.ones(2), like="x"), "'lora/x' is not trained"),
        (lambda: adapter.drop(A, "nothing"), "has no parameter 'nothing'"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    assert difference(weights(model), before) == 0 and adapter.plan is None
    adapter.resize(A, keep=torch.arange(8) != 2, by="somebody else")  # who was refused has no claim
    assert torch.equal(adapter.get_parameter(A), before[f"lora/{A}"][[0, 1, 3, 4, 5, 6, 7]])
    assert list(service.parameters) == list(before)
    bitfit = tiny_model("bitfit").adapters["bitfit"]
    with pytest.raises(ConfigError, match="stands in for a parameter of the backbone"):
        bitfit.resize(next(n for n, _ in bitfit.named_parameters()), rows=99)


def test_two_methods_that_change_one_structure() -> None:
    _, _, adapter = trained()
    adapter.resize(A, rows=9, by="searcher")
    with pytest.raises(CombinationError, match="'lora' and 'searcher' would both change the structure of 'lora'"):
        adapter.resize(A, rows=10)
    assert adapter.get_parameter(A).shape == (9, 24)
    adapter.join(None)  # the next fit
    adapter.resize(A, rows=10)


def test_saved_loaded_copied_and_attached_anew(tmp_path: Path) -> None:
    model, _, adapter = trained()
    adapter.resize(A, keep=[0, 3])
    adapter.resize(B, keep=[0, 3], dim=1)
    model.eval()
    expected = model(images())
    model.save_adapter(tmp_path / "saved")
    torch.manual_seed(100)
    again = zoo.load(adapter=tmp_path / "saved", pretrained=False)
    assert torch.equal(again(images()), expected)
    assert again.adapters["lora"].get_parameter(A).shape == (2, 24)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images()), expected) and twin.adapters["lora"].training_service is None
    assert model.adapters["lora"].training_service is not None
    other = tiny_model(adapter)
    assert other.adapters["lora"].get_parameter(A).shape == (2, 24)
    assert model.reattach("lora").get_parameter(B).shape == (24, 2)


def test_a_plan_of_another_structure_is_refused(tmp_path: Path) -> None:
    for structure, message in (
        ({"blocks.9.attn.q.lora_a": [2, 24]}, "which it has not here"),
        ({A: [2, 24, 3]}, r"here it has \(8, 24\)"),
        ({A: [0, 24]}, "names shapes that are none"),
        ({A: "wide"}, "names shapes that are none"),
    ):
        adapter = zoo.adapter("lora")
        adapter.plan = {"structure": structure}
        model = tiny_model(None)
        with pytest.raises(MismatchError, match=message):
            model.add_adapter(adapter)
        assert not model.adapters
    model = tiny_model()
    model.adapters["lora"].plan = {"structure": {A: [10**9, 24]}}  # no file's tensor has that shape
    model.save_adapter(tmp_path)
    torch.manual_seed(100)
    with pytest.raises(MismatchError, match=r"gives '.*lora_a' the shape \[1000000000, 24\], the file holds \[8, 24\]"):
        zoo.load(adapter=tmp_path, pretrained=False)


SETTINGS: dict[str, Any] = {"epochs": 3, "batch_size": 16, "checkpoint_every": 1, "lr": 1e-2, "keep": "best"}


@pytest.mark.parametrize("memory", ["default", "min"])
@pytest.mark.parametrize("stop", [1, 2, 3, 4, 6])
def test_resume_is_exact_when_shapes_changed(tmp_path: Path, stop: int, memory: str) -> None:
    def go(**options: Any) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        model = tiny_model(Changing(dropout=0.1), memory=memory)
        report = fit(model, easy_data(48), **SETTINGS, **options)
        return [{k: v for k, v in h.items() if "second" not in k} for h in report.history], weights(model)

    history, expected = go()
    with pytest.raises(Stop):
        go(checkpoint=tmp_path, callbacks=[StopAt(stop)])
    again, final = go(checkpoint=tmp_path)
    assert again == history and difference(final, expected) == 0
    assert expected[f"lora/{A}"].shape == (5, 24) and "lora/blocks.1.attn.v.shift" in expected


def test_best_epoch_of_another_structure() -> None:
    """The first epoch is the best, and the shapes of its end come back."""

    @dataclass(eq=False)
    class Ruined(LoRA):
        def epoch_end(self, model: Any, epoch: int) -> None:
            if epoch == 1:
                self.resize(A, keep=[2])
                self.resize(B, keep=[2], dim=1)
                self.grow("blocks.1.attn.v.shift", torch.rand(24))
                with torch.no_grad():
                    model.head.weight.zero_()

    model = tiny_model(Ruined())
    report = fit(model, easy_data(48), easy_data(24, seed=1), epochs=2, keep="best", lr=1e-2)
    assert report.best["epoch"] == 1 and report.history[1]["val_accuracy"] < report.history[0]["val_accuracy"]
    adapter = model.adapters["lora"]
    assert adapter.get_parameter(A).shape == (8, 24) and adapter.plan is None
    assert report.parameters == model.num_parameters(trainable=True) == 2 * 2 * 2 * 8 * 24 + 4 * 25
    assert report.parameters == sum(p.numel() for p in weights(model).values())


def test_no_epoch_before_the_budget_is_the_best() -> None:
    @dataclass(eq=False)
    class Late(LoRA):
        def epoch_end(self, model: Any, epoch: int) -> None:
            self.epoch = epoch
            if epoch == 1:  # it gets worse, and is what has to be exported
                with torch.no_grad():
                    model.head.weight.mul_(0.01)

        def ready(self) -> bool:
            return self.epoch >= 1

        def fit_end(self, model: Any) -> None:
            self.resize(A, keep=[0])
            self.resize(B, keep=[0], dim=1)

    model = tiny_model(Late())
    report = fit(model, easy_data(48), easy_data(24, seed=1, noise=2), epochs=3, keep="best", patience=1, lr=1e-3)
    assert report.best["epoch"] >= 2 and report.best["chosen"] == "best"
    assert report.parameters == model.num_parameters(trainable=True) == 2 * 2 * 2 * 8 * 24 - 7 * 48 + 4 * 25
    assert len(report.history) == 3  # patience counts from the budget on
    with training_hooks(model).evaluation():
        assert training_hooks(model).ready()


def test_a_saved_form_has_an_inverse(tmp_path: Path) -> None:
    """What a method folds when it is saved, `load_saved` unfolds: settings, names and values."""
    from zoo import registry

    @dataclass(eq=False)
    class Folded(LoRA):
        def saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
            return {**self.config(), "rank": -self.rank}, {f"{n}_neg": -p for n, p in self.state_dict().items()}

        @classmethod
        def load_saved(cls, config: Any, tensors: Any) -> Any:
            return {**config, "rank": -config["rank"]}, {n.removesuffix("_neg"): -t for n, t in tensors.items()}

    Folded.method = "folded"
    registry._adapters["folded"] = Folded
    try:
        model = tiny_model(Folded(rank=3))
        adapter = model.adapters["folded"]
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(0.1)
        expected = model.eval()(images())
        model.save_adapter(tmp_path)
        torch.manual_seed(100)
        again = zoo.load(adapter=tmp_path, pretrained=False)
        assert torch.equal(again(images()), expected)
        assert again.adapters["folded"].config() == adapter.config()
    finally:
        del registry._adapters["folded"]


def test_recompiles_once_for_a_new_shape() -> None:
    import torch._dynamo
    from torch._dynamo.utils import counters

    model = tiny_model()
    adapter = model.adapters["lora"]
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    try:
        for keep in (range(8), [0, 1, 5]):
            adapter.resize(A, keep=keep)
            adapter.resize(B, keep=keep, dim=1)
            with torch.no_grad():
                adapter.get_parameter(B).add_(0.1)
            torch.testing.assert_close(compiled(images()), model(images()), rtol=1e-5, atol=1e-5)
        assert counters["stats"]["unique_graphs"] == 2
    finally:
        torch._dynamo.reset()


def test_rows_of_a_routed_batch() -> None:
    model = tiny_model()
    other = model.add_adapter("lora", "other", activate=False)
    for adapter in model.adapters.values():
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(0.1)
    other.resize(A, keep=[1])
    other.resize(B, keep=[1], dim=1)
    names = ["lora", "other", "lora", None, "other", "lora"]
    routed = model(images(), adapters=names)
    for i, name in enumerate(names):
        model.set_active(*([name] if name else []))
        torch.testing.assert_close(routed[i], model(images())[i], rtol=1e-5, atol=1e-5)
