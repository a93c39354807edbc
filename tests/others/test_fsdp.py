"""FSDP2: blocks and root sharded over two CPU processes train, save and load as one process does, or are refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from method_models import BATCH, FAMILIES, METHODS, attach, bare, images, shake, targets
from sampled import few
from torch import Tensor, nn
from two_processes import joined, pair, shared

import zoo

REFUSED = {"meft", "vqt"}  # they compute with weights of a block while it does not run
BATCH_WISE = {"conformer": {"batch_norm": False}}  # with its statistics of the batch it is refused
# Outputs that the last bit of a trained number moves by more: one factor of the changes is drawn from N(0, 1)
SENSITIVE = {"pst": 5e-6}
MEMORIES = {"vit": ("default", "min"), "swin": ("default",)}
RECOMPUTED = ("lora", "bitfit", "full", "prefix", "vpt", "meft")  # with memory="min"; of each way to reach a block one


def train(model: zoo.Model, rows: slice) -> None:
    """Three steps of SGD with momentum, which shows a wrong gradient in its size, too."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images()[rows]), targets()[rows]).backward()
        optimizer.step()


def steady(model: zoo.Model) -> zoo.Model:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def shard(model: zoo.Model) -> zoo.Model:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for block in model.family.blocks():
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)  # type: ignore[return-value]


def farthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    assert all(type(v) is Tensor for v in other.values())
    return max((float((one[k].double() - other[k].double()).abs().max()) for k in one), default=0.0)


def refusal(fn: Callable[[], Any]) -> str:
    try:
        fn()
    except zoo.ZooError as error:
        return str(error)
    return "not refused"


def one_method(family: str, method: str, memory: str, rows: slice, folder: Path) -> dict[str, Any] | None:
    """How far a sharded model is from one that one process trained."""
    one = bare(family)
    try:
        attach(one, method, **BATCH_WISE.get(method, {}))
    except pytest.skip.Exception:
        return None
    shake(steady(one), method)
    one.memory = memory
    two = shard(copy.deepcopy(one))
    if method in REFUSED:
        return {"refused": refusal(lambda: two(images()[rows]))}
    start = copy.deepcopy(one)
    train(one, slice(None))
    train(two, rows)
    found: dict[str, Any] = {"state": farthest(one.adapter_state_dict(), two.adapter_state_dict())}
    found["frozen"] = farthest(
        {k: v for k, v in start.backbone.state_dict().items() if v.numel()},
        {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in two.backbone.state_dict().items()},
    )
    found["moved"] = farthest(start.adapter_state_dict(), one.adapter_state_dict())
    with torch.no_grad():
        found["outputs"] = float((one.eval()(images()) - two.eval()(images())).abs().max())
    two.save_adapter(folder / method)
    found["fingerprint"] = two.fingerprint == one.fingerprint
    saved, (_, expected) = zoo.disk.read(folder / method), one.adapters[method].saved()  # type: ignore[operator]
    found["saved"] = farthest({k: v.detach() for k, v in expected.items()}, saved.adapter_tensors(method))
    two.load_adapter_state_dict(start.adapter_state_dict())
    found["put back"] = farthest(start.adapter_state_dict(), two.adapter_state_dict())
    train(two, rows)
    found["again"] = farthest(one.adapter_state_dict(), two.adapter_state_dict())
    return found


def switching(rows: slice, folder: Path) -> dict[str, Any]:
    """Two adapters and the rows of a batch, behind a pass without backward, which leaves whole tensors at the root."""
    one = bare("vit")
    for name, method in (("first", "lora"), ("second", "bitfit")):
        attach(one, method, name, activate=False)
        shake(one, name)
    one.set_active("first")
    two = shard(copy.deepcopy(one))
    found = {}
    for name in ("second", "first"):
        with torch.no_grad():
            two.eval()(images())
        one.set_active(name)
        two.set_active(name)
        train(one, slice(None))
        train(two, rows)
        found[name] = farthest(one.adapter_state_dict(), two.adapter_state_dict())
    names = ["first", "second", None, "first"]
    with torch.no_grad():
        found["rows"] = float((one(images(), adapters=names) - two(images(), adapters=names)).abs().max())
    state = one.adapter_state("first")
    found["taken"] = farthest(dict(state), dict(two.adapter_state("first")))
    two.set_adapter_state("first", 2.0 * state)
    found["set"] = farthest(dict(2.0 * state), dict(two.adapter_state("first")))
    return found


def refusals() -> dict[str, str]:
    two = shard(bare("vit"))
    batch_wise = bare("vit")
    attach(batch_wise, "conformer")
    return {
        "batch": refusal(lambda: train(shard(batch_wise), slice(None))),
        "attach": refusal(lambda: two.add_adapter("lora")),
        "head": refusal(lambda: two.reset_head(3)),
        "merge": refusal(two.merge),
        "peft": refusal(lambda: zoo.to_peft(two, "peft")),
        "fit": refusal(lambda: zoo.fit(two, [(images()[0], 0)], epochs=1)),
        "left": str(list(two.adapters)),
    }


def in_every_run(family: str, method: str) -> bool:
    """Every method on one family; on the other those of each kind of point, a share, and what only that family takes."""
    return family == "vit" or "vit" not in METHODS[method].trial_families or few(family, method)


PAIRS = [
    pytest.param(family, method, marks=() if in_every_run(family, method) else pytest.mark.rest)
    for family in FAMILIES
    for method in METHODS
]


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the two processes found of the pairs that this run tests."""
    chosen = [i.callspec.params for i in request.session.items if i.path == request.path and hasattr(i, "callspec")]
    with shared(tmp_path_factory, "sharded") as folder:
        if not (folder / "done").exists():
            pair(sharded, folder, folder, [(p["family"], p["method"]) for p in chosen])
            (folder / "done").touch()
    one, other = (json.loads((folder / f"found.{rank}").read_text()) for rank in range(2))
    assert one.keys() == other.keys()
    return one  # type: ignore[no-any-return]


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_as_one_process(found: dict[str, Any], family: str, method: str) -> None:
    """Saving failed for every method, bitfit trained to other numbers and saved stale ones."""
    for memory in MEMORIES[family]:
        if memory != "default" and method not in RECOMPUTED:
            continue
        result = found[f"{family} {method} {memory}"]
        if result is None:
            pytest.skip("the family refuses this method")
        if method in REFUSED:
            assert f"'{method}' reads weights of the backbone" in result["refused"]
            assert "DDP" in result["refused"]
            continue
        for what in ("state", "outputs", "saved", "again"):
            assert result[what] < (SENSITIVE.get(method, 1e-6) if what == "outputs" else 1e-6), (what, result)
        assert result["frozen"] == 0 and result["put back"] == 0 and result["fingerprint"]
        assert result["moved"] > 1e-4


def test_switching(found: dict[str, Any]) -> None:
    """What is frozen and unfrozen behind an evaluation was lost: the adapter that came into use did not train."""
    assert all(value < 1e-6 for value in found["switching"].values()), found["switching"]


def test_what_cannot_be_done_to_a_sharded_model(found: dict[str, Any]) -> None:
    """New parameters would have been trained apart on each process."""
    told = found["refusals"]
    assert "fully_shard" in told["attach"] and "fully_shard" in told["head"] and told["left"] == "[]"
    assert "one process" in told["merge"] and "one process" in told["peft"] and "DDP" in told["fit"]
    assert "2 processes" in told["batch"] and "batch_norm=False" in told["batch"]


def sharded(folder: Path, chosen: list[tuple[str, str]]) -> None:
    rank = joined()
    half = BATCH // 2
    rows = slice(rank * half, (rank + 1) * half)
    found: dict[str, Any] = {
        f"{family} {method} {memory}": one_method(family, method, memory, rows, folder / f"{family}-{memory}")
        for family, method in chosen
        for memory in MEMORIES[family]
        if memory == "default" or method in RECOMPUTED
    }
    found["switching"], found["refusals"] = switching(rows, folder), refusals()
    (folder / f"found.{rank}").write_text(json.dumps(found))
