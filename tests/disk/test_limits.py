"""What a folder may cost and hold, and what is undone when attaching fails."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_parts import edit, small_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import zoo
from zoo import disk
from zoo.disk.budget import Budget
from zoo.disk.layout import FLOATS, STAMP, WEIGHTS, pack
from zoo.errors import AttachError, ConfigError, MismatchError, UnknownNameError, WeightsError, ZooError

# -- types of numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64, "float16"])
def test_saving_in_a_type_that_loses_the_numbers(dtype: Any, tmp_path: Path) -> None:
    model = small_model()
    folder = model.save_adapter(tmp_path / "out")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ConfigError, match=r"dtype is .*expected one of torch\.float64"):
        model.save_adapter(folder, dtype=dtype)
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("dtype", FLOATS)
def test_saving_in_floats(dtype: torch.dtype, tmp_path: Path) -> None:
    model = small_model()
    folder = model.save_adapter(tmp_path / "out", dtype=dtype)
    assert {t.dtype for t in load_file(folder / WEIGHTS).values()} == {dtype}
    again = small_model(adapter=None)
    disk.attach(again, disk.read(folder))
    own = model.adapters["lora"].state_dict()
    assert all(torch.equal(v, own[k].to(dtype).float()) for k, v in again.adapters["lora"].state_dict().items())


def rewrite(folder: Path, change: Any) -> None:
    """Change the tensors, with checksums that are right: what an attacker would do."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        copy = json.loads(file.metadata()[STAMP].partition("\n")[2])
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    data, checksum = pack(copy["config"], copy["metrics"], copy["card"], tensors)
    (folder / WEIGHTS).write_bytes(data)
    edit(folder, lambda config: config.update(checksum=checksum))


@pytest.mark.parametrize("owner", ["lora", "head"])
@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.int32, torch.int64, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64],
)
def test_other_types_in_a_file(owner: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = small_model().save_adapter(tmp_path / "out")
    changed: list[str] = []

    def change(tensors: dict[str, torch.Tensor]) -> None:
        changed.append(next(k for k in tensors if k.startswith(owner)))
        tensors[changed[0]] = tensors[changed[0]].to(dtype)

    rewrite(folder, change)
    model = small_model(adapter=None)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    short = changed[0].partition("/")[2]
    with pytest.raises(WeightsError, match=f"'({changed[0]}|{short})' as {str(dtype).removeprefix('torch.')}"):
        disk.attach(model, disk.read(folder))
    assert not model.adapters and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_types_in_a_file_of_peft(tmp_path: Path) -> None:
    model = small_model()
    zoo.to_peft(model, tmp_path / "peft")
    file = tmp_path / "peft" / WEIGHTS
    tensors = load_file(file)
    key = next(iter(tensors))
    for dtype in (torch.bool, torch.int64, torch.float8_e4m3fn):
        save_file({**tensors, key: tensors[key].to(dtype)}, file)
        with pytest.raises(WeightsError, match="is not a tensor of finite numbers"):
            zoo.from_peft(tmp_path / "peft", model=small_model(adapter=None))


# -- sizes ---------------------------------------------------------------------------------------------------------------


def settings(**values: Any) -> Any:
    return lambda config: config["adapters"][0]["config"].update(values)


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("lora", settings(rank=1_000_000)),
        ("lora", settings(rank=10**12)),
        ("adapter", settings(rank=50_000_000, reduction=None)),
        ("prefix", settings(num_tokens=100_000_000)),
        ("prefix", settings(mlp=100_000_000)),
        ("vpt", settings(num_tokens=100_000_000)),
        ("vqt", settings(num_tokens=100_000_000)),
        ("lora", lambda config: config["head"].update(num_classes=100_000_000, classes=None)),
        ("lora", lambda config: config["head"].update(num_classes=10**12, classes=None)),
    ],
)
def test_a_config_that_asks_for_more_than_its_file_holds(method: str, change: Any, tmp_path: Path) -> None:
    folder = small_model(adapter=method).save_adapter(tmp_path / "out")
    edit(folder, change)
    model = small_model(adapter=None)
    kept, begin = dict(model.heads.items()), time.perf_counter()
    with pytest.raises(MismatchError, match=r"far more than its file holds|has shape"):
        disk.attach(model, disk.read(folder))
    assert time.perf_counter() - begin < 5
    assert not model.adapters and not model._ops and dict(model.heads.items()) == kept
    model.add_adapter(method)  # nothing is left in the way


def test_a_budget_counts_before_it_makes() -> None:
    x = torch.ones(4)
    with Budget(1000, "It"):
        torch.empty(100)
        x.repeat(10)
        for too_much in (
            lambda: torch.zeros(10**15),
            lambda: torch.randn(10**8, 10**8),
            lambda: x.new_full((10**15,), 1.0),
            lambda: torch.arange(10**15),
            lambda: torch.nn.Linear(10**7, 10**7),
            lambda: x.repeat(10**15),
            lambda: torch.eye(10**8),
        ):
            with pytest.raises(MismatchError, match="It asks for a tensor of"):
                too_much()
    with Budget(1000, "It"):
        torch.empty(10**15, device="meta")  # takes no memory


def test_a_user_who_asks_for_too_much() -> None:
    """His own settings are tried, and the error is one for people; the model is as before."""
    model = small_model(adapter=None)
    with pytest.raises(ConfigError, match=r"rank=1000000000000\b.*more memory than there is"):
        model.add_adapter(zoo.adapter("adapter", rank=10**12))
    with pytest.raises(AttachError, match=r"'lora' has rank 1000000000000, .*'blocks.0.attn.q'.*Expected 1 to "):
        model.add_adapter(zoo.adapter("lora", rank=10**12))
    assert not model.adapters
    model.add_adapter("lora")


# -- all or nothing --------------------------------------------------------------------------------------------------------


def test_the_cause_is_shown_when_attaching_fails() -> None:
    """The clean-up finds nothing half done, whatever failed."""
    model = small_model(adapter=None)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.backbone.modules()]
    with pytest.raises(ConfigError, match="num_classes is -2"), model.all_or_nothing():
        model.add_adapter("lora", num_classes=-2)
    with pytest.raises(ZooError), model.all_or_nothing():
        model.add_adapter(zoo.adapter("vqt", num_tokens=10**13))
    assert not model.adapters and list(model.heads) == ["default"] and not model._ops
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.backbone.modules()]
    assert model.add_adapter("lora", num_classes=2).name == "lora"


def test_a_head_where_there_can_be_none() -> None:
    """Refused, and the adapter does not stay behind."""
    pytest.importorskip("diffusers")
    from zoo.table import tiny_model

    model, batch = tiny_model("dit")
    before = model(*batch)
    with pytest.raises(ConfigError, match="no pooled features"):
        model.add_adapter("lora", num_classes=3)
    assert not model.adapters and model.active == () and torch.equal(model(*batch), before)
    model.add_adapter("lora")
    assert model.active == ("lora",)


@pytest.mark.parametrize("name", ["train", "half", "cpu", "forward", "keys", "parameters", "T_destination"])
def test_names_that_torch_has_taken(name: str, tmp_path: Path) -> None:
    model = small_model(adapter=None)
    with pytest.raises(ConfigError, match=f"'{name}' cannot name an adapter: it is a word of torch's own modules"):
        model.add_adapter("lora", name)
    assert not model.adapters and model.active == ()
    folder = small_model().save_adapter(tmp_path / "out")
    edit(folder, lambda config: config["adapters"][0].update(name=name))
    with pytest.raises(ZooError):
        zoo.load(adapter=folder, pretrained=False)


def test_training_an_adapter_that_is_not_used() -> None:
    model = small_model(adapter=["lora", "adapter"])
    with pytest.raises(UnknownNameError, match="no adapter 'brids'"):
        model.set_active("lora", train="brids")
    with pytest.raises(ConfigError, match=r"'adapter' is to be trained but not used.*set_active\('lora', 'adapter'"):
        model.set_active("lora", train=["lora", "adapter"])
    assert model.active == ("lora", "adapter")
    model.set_active("lora", "adapter", train="adapter")
    learning = {n: {p.requires_grad for p in a.parameters()} for n, a in model.adapters.items()}
    assert learning == {"lora": {False}, "adapter": {True}}


def test_settings_that_cannot_act() -> None:
    for alpha in (0, 0.0):
        with pytest.raises(ConfigError, match="alpha is 0"):
            zoo.adapter("lora", alpha=alpha)
    with pytest.raises(ConfigError, match="alpha is 0"):
        zoo.adapter("lora", alphas={"v": 0.0})
    for method, field in (
        ("adapter", "scale"),
        ("vqt", "lasso"),
        ("lora", "alpha"),
        ("spt", "alpha"),
        ("vpt", "dropout"),
    ):
        for value in (float("nan"), float("inf"), -float("inf"), 1e30):
            with pytest.raises(ConfigError, match=field):
                zoo.adapter(method, **{field: value})
