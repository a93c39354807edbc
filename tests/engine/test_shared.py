"""One module at many points: saved once, known to every op that uses it; what is frozen inside an adapter stays frozen."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from method_models import BATCH, bare, images, loss_of
from safetensors.torch import load_file
from torch import Tensor, nn

import zoo
from zoo import registry
from zoo.errors import AttachError


class Plane(nn.Module):
    """A pair of matrices that several points have in common."""

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, dim, generator=torch.Generator().manual_seed(0)) / dim**0.5)
        self.up = nn.Parameter(torch.randn(dim, rank, generator=torch.Generator().manual_seed(1)) / rank**0.5)


class Delta(nn.Module):
    """`x -> up (gains * (down x))`; without gains nothing here is the point's own."""

    def __init__(self, plane: Plane, gains: bool) -> None:
        super().__init__()
        self.shared = (plane,)
        self.gains = nn.Parameter(torch.full((len(plane.down),), 0.1)) if gains else None

    def forward(self, x: Tensor) -> Tensor:
        plane = self.shared[0]
        hidden = x @ plane.down.T
        hidden = hidden if self.gains is None else hidden * self.gains
        return hidden @ plane.up.T


@pytest.fixture(autouse=True)
def methods() -> Iterator[None]:
    """Methods that exist in these tests only."""

    @registry.register_adapter("planes")
    @dataclass
    class Planes(zoo.Adapter):
        """`frozen`: the planes are a fixed source, and only the gains train. `own`: no sharing, for comparison."""

        frozen: bool = False
        own: bool = False
        gains: bool = True
        targets: str = "v"

        def attach(self, points: zoo.Points) -> None:
            chosen = points.select(self.targets, kind="linear")
            plane = None if self.own else points.share("plane", Plane(chosen[0].dim_in, 3))
            for point in chosen:
                if plane is None:
                    delta = Delta(Plane(point.dim_in, 3), self.gains)
                    delta.plane = delta.shared[0]
                else:
                    delta = Delta(plane, self.gains)
                point.add(delta)
            if plane is not None and self.frozen:
                plane.requires_grad_(False)

    yield
    for name in ("planes", "idle"):
        registry._adapters.pop(name, None)


def planes(**settings: object) -> zoo.Model:
    model = bare("vit")
    model.add_adapter(zoo.adapter("planes", **settings))
    return model


def test_registered_counted_and_saved_once(tmp_path: Path) -> None:
    model = planes()
    assert model.num_parameters(trainable=True, head=False) == 2 * 3 * 48 + 2 * 3  # one plane, gains for each block
    assert set(model.adapters["planes"].state_dict()) == {
        "plane.down",
        "plane.up",
        "blocks.0.attn.v.gains",
        "blocks.1.attn.v.gains",
    }
    assert model.train().probe(images()) == []
    model.save_adapter(tmp_path / "out")
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert [key for key in keys if key.startswith("planes/plane.")] == ["planes/plane.down", "planes/plane.up"]
    with torch.no_grad():
        model.adapters["planes"].plane.up.mul_(2)
    expected = model.eval()(images())
    model.save_adapter(tmp_path / "out")
    torch.manual_seed(0)
    again = zoo.load(adapter=tmp_path / "out", pretrained=False).eval()
    assert torch.equal(again(images()), expected)
    plane = again.adapters["planes"].plane
    assert all(again.adapters["planes"].module_at(f"blocks.{i}.attn.v").shared == (plane,) for i in (0, 1))


def test_known_to_every_op() -> None:
    model = planes()
    plane = model.adapters["planes"].plane
    assert [plane in op.modules for _, op in model._ops["planes"]] == [True, True]


def test_cached_prompt_keys_follow_a_shared_tensor() -> None:
    """Prompts pass through the value projection; their keys and values, kept in evaluation, depend on what is shared there."""
    model = planes()
    model.add_adapter(zoo.adapter("vpt", num_tokens=3))
    model.eval()
    with torch.no_grad():
        before = model(images())
        assert torch.equal(model(images()), before)
        model.adapters["planes"].plane.up.mul_(5)
        edited = model(images())
        model.train()
        model.eval()  # forgets everything that was kept
        assert torch.equal(edited, model(images()))
        assert not torch.allclose(edited, before)


@pytest.mark.parametrize("memory", ["default", "min"])
def test_blocks_with_shared_parts_only_learn(memory: str) -> None:
    """Their points have no parameter of their own. They keep no byte more than with matrices of their own."""
    kept = {}
    for own in (False, True):
        model = planes(own=own, gains=False)
        model.memory = memory
        kept[own] = model.saved_bytes(images())
    assert kept[False] == kept[True]
    if (
        memory == "min"
    ):  # of 65 tokens of width 48 the two blocks' inputs; what stands behind the blocks keeps less than one
        stream = BATCH * 65 * 48 * 4
        assert 2 * stream < kept[False] < 4 * stream


@pytest.mark.parametrize("memory", ["low", "min"])
def test_recomputed_gradients_are_plain_ones(memory: str) -> None:
    found = []
    for setting in ("default", memory):
        model = planes().train()
        model.memory = setting
        found.append(torch.autograd.grad(loss_of(model), list(model.parameters_to_train().values())))
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_copies_keep_sharing() -> None:
    model = planes(frozen=True)
    twin = copy.deepcopy(model)
    plane = twin.adapters["planes"].plane
    assert plane is not model.adapters["planes"].plane
    for i in (0, 1):
        assert twin.adapters["planes"].module_at(f"blocks.{i}.attn.v").shared == (plane,)
    assert all(plane in op.modules for _, op in twin._ops["planes"])
    before = model(images())
    with torch.no_grad():
        plane.up.mul_(3)
    assert torch.equal(model(images()), before) and not torch.equal(twin(images()), before)
    twin.set_active()
    twin.set_active("planes")
    assert not plane.up.requires_grad and len(twin.parameters_to_train()) == len(model.parameters_to_train())


def test_what_a_method_froze_stays_frozen() -> None:
    model = planes(frozen=True)
    plane, trained = model.adapters["planes"].plane, 2 * 3

    def check() -> None:
        assert not plane.down.requires_grad and not plane.up.requires_grad
        assert model.num_parameters(trainable=True, head=False) == trained

    check()
    with model.disable():
        assert model.num_parameters(trainable=True, head=False) == 0
    check()
    model.add_adapter("lora", activate=False)
    model.set_active("lora")
    model.set_active("planes", "lora", train="lora")
    assert not any(p.requires_grad for p in model.adapters["planes"].parameters())
    model.set_active("planes")
    check()
    model(images(), adapters=["planes", None, "lora", "planes"])
    check()


def test_what_the_user_froze_stays_frozen() -> None:
    model = planes()
    model.add_adapter("lora", num_classes=3, activate=False)
    model.heads["default"].requires_grad_(False)
    model.adapters["planes"].plane.down.requires_grad_(False)
    with model.disable():
        pass
    model.set_active("lora")
    assert all(p.requires_grad for p in model.head.parameters())
    model.set_active("planes")
    assert not any(p.requires_grad for p in model.head.parameters())
    assert "planes/plane.down" not in model.parameters_to_train()
    model.heads["default"].requires_grad_(True)  # and what the user unfroze trains
    model.adapters["planes"].plane.down.requires_grad_(True)
    with model.disable():
        pass
    assert {"planes/plane.down", "head/weight"} <= set(model.parameters_to_train())


def test_sharing_that_cannot_work_is_refused() -> None:
    @registry.register_adapter("idle")
    @dataclass
    class Idle(zoo.Adapter):
        under: str = "plane"

        def attach(self, points: zoo.Points) -> None:
            points.share(self.under, Plane(48, 2))
            points.select("q", kind="linear")[0].add(nn.Linear(48, 48))

    model = bare("vit")
    with pytest.raises(AttachError, match="shares 'plane', and no module at a point uses it"):
        model.add_adapter("idle")
    with pytest.raises(AttachError, match="'blocks' cannot name a shared module"):
        model.add_adapter(zoo.adapter("idle", under="blocks"))
    assert not model.adapters
    with pytest.raises(AttachError, match="outside of Adapter"):
        model.points.share("plane", Plane(48, 2))


def test_compiles() -> None:
    model = planes().train()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    try:
        torch.testing.assert_close(compiled(images()), model(images()), rtol=1e-5, atol=1e-5)
    finally:
        torch._dynamo.reset()
