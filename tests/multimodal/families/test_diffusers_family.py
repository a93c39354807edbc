"""What every family of diffusers shows: the library's numbers, every method, prefixes, sublayers, names and bad input."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from sampled import lots
from torch import Tensor, nn

pytest.importorskip("diffusers")

from diffusion_models import library_answer, make, prepended

import zoo
from zoo.adapters.base import Adapter
from zoo.registry import family as family_class
from zoo.registry import find_backbone
from zoo.table import STEPS

FAMILIES = ("dit", "cogvideox", "pixart", "sd3", "flux")
EVERY = pytest.mark.parametrize("name", FAMILIES)
ALL_LINEAR = {"targets": "all-linear", "rank": 2}


@EVERY
def test_without_an_adapter_it_is_the_library(name: str) -> None:
    """To the bit, in evaluation and (same random numbers) training mode, with an adapter attached and off."""
    from diffusers import ModelMixin

    model, batch = make(name)
    module: Any = model.backbone
    assert isinstance(module, ModelMixin)
    twin: Any = type(module).from_config(module.config).eval()
    twin.load_state_dict(module.state_dict())
    keys = list(twin.state_dict())
    with torch.no_grad():
        assert torch.equal(model(*batch), library_answer(name, twin, batch))
        model.add_adapter("lora")
        model.add_adapter("prefix")
        with model.disable():
            assert torch.equal(model(*batch), library_answer(name, twin, batch))
            torch.manual_seed(0)
            expected = library_answer(name, twin.train(), batch)
            torch.manual_seed(0)
            module.train()
            assert torch.equal(model(*batch), expected)
    assert list(module.state_dict()) == keys


NAMED = ("full", "bitfit", "lora", "adapter", "prefix", "ssf", "ia3", "norm", "vpt")


@pytest.mark.parametrize(("name", "methods"), lots(FAMILIES, zoo.list_adapters(), NAMED))
def test_every_method_works_or_says_why(name: str, methods: list[str]) -> None:
    cells = {c.method: c for c in zoo.compatibility([name], methods)}
    for cell in cells.values():
        assert not any(getattr(cell, step).startswith("defect") for step in STEPS), cell
    trained = {m for m, c in cells.items() if c.train == "yes" and c.save == "yes"}
    assert trained >= {"full", "bitfit", "lora", "adapter", "prefix", "ssf", "ia3"}
    assert ("norm" in trained) == (name in ("cogvideox", "sd3", "flux"))  # the norms of the others have no parameters
    merged = {m for m, c in cells.items() if c.merge == "yes"}
    assert merged >= {"full", "bitfit", "lora", "ia3"} | ({"ssf"} if name in ("dit", "cogvideox", "pixart") else set())
    assert "tokens points" in cells["vpt"].attach


FORMS = [
    zoo.adapter("lora", **ALL_LINEAR),
    zoo.adapter("lora", rank=2, dora=True),
    zoo.adapter("lora", rank=2, targets=("modulation", "final", "time")),
    zoo.adapter("adapter", form="houlsby", rank=3),
    zoo.adapter("adapter", form="parallel", rank=3),
    zoo.adapter("adapter", form="adaptformer", rank=3),
    zoo.adapter("prefix", num_tokens=3),
    zoo.adapter("prefix", num_tokens=3, mlp=4),
]


@EVERY
def test_nothing_is_dead_and_removal_is_exact(name: str) -> None:
    model, batch = make(name)
    frozen = copy.deepcopy(model.backbone.state_dict())
    with torch.no_grad():
        bare = model(*batch)
    for adapter in FORMS:
        attached = model.add_adapter(adapter)
        with torch.no_grad():
            if attached.method != "prefix":
                assert torch.equal(model(*batch), bare), adapter  # the start is the pretrained function, to the bit
            for parameter in attached.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            assert not torch.allclose(model(*batch), bare, atol=1e-4), adapter
        assert model.probe(*batch) == [], adapter
        for parameter in model.parameters_to_train().values():
            parameter.grad = None  # None would be dead; so would be all zeros
        model(*batch).square().sum().backward()
        unmoved = [k for k, p in model.parameters_to_train().items() if not p.grad.any() and ".bias" not in k]  # type: ignore[union-attr]
        assert unmoved == [], adapter
        model.remove_adapter(next(iter(model.active)))
    assert all(torch.equal(value, frozen[key]) for key, value in model.backbone.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(*batch), bare)


@EVERY
def test_merges_saves_and_routes(name: str, tmp_path: Path) -> None:
    model, batch = make(name, zoo.adapter("lora", **ALL_LINEAR))
    model.eval()
    with torch.no_grad():
        live = model(*batch)
        plain: Any = model.merge()
        assert type(plain) is type(model.backbone)
        torch.testing.assert_close(library_answer(name, plain, batch), live, rtol=1e-5, atol=1e-5)
        model.save_adapter(tmp_path / "lora")
        again, _ = make(name)
        from zoo.disk import attach, read

        attach(again, read(tmp_path / "lora"))
        assert torch.equal(again.eval()(*batch), live)
        # one batch, two adapters: each row is what its own adapter gives alone
        model.add_adapter(zoo.adapter("prefix", num_tokens=2), activate=False)
        model.set_active("prefix")
        other = model(*batch)
        mixed = model(*batch, adapters=["lora", "prefix"])
        torch.testing.assert_close(mixed, torch.stack([live[0], other[1]]), rtol=1e-5, atol=1e-5)


@EVERY
def test_memory_settings_give_the_same_gradients(name: str) -> None:
    adapters = (zoo.adapter("lora", **ALL_LINEAR), zoo.adapter("adapter", form="parallel", rank=2))
    model, batch = make(name, *adapters)
    found: dict[str, list[Tensor]] = {}
    kept: dict[str, int] = {}
    for memory in ("default", "low", "min"):
        model.memory = memory
        model.train()
        kept[memory] = model.saved_bytes(*batch)
        for parameter in model.parameters_to_train().values():
            parameter.grad = None
        model(*batch).square().sum().backward()
        found[memory] = [p.grad.clone() for p in model.parameters_to_train().values() if p.grad is not None]
    for memory in ("low", "min"):
        for ours, plain in zip(found[memory], found["default"], strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    assert kept["min"] < kept["low"] < kept["default"]


@pytest.mark.parametrize("name", ["dit", "cogvideox"])
def test_activations_are_recomputed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output of each GELU, which a LoRA behind it would keep, is given back from its input, with the same gradients."""
    found: list[tuple[int, Tensor]] = []
    for recomputed in (True, False):
        if not recomputed:
            monkeypatch.setattr(family_class(name), "elementwise_modules", lambda self: [])
        model, batch = make(name, zoo.adapter("lora", rank=2, targets="down"))
        model.train()
        kept = model.saved_bytes(*batch)
        model(*batch).square().sum().backward()
        found.append((kept, model.parameters_to_train()["lora/blocks.0.mlp.down.lora_a"].grad))  # type: ignore[arg-type]
    tokens, hidden = {"dit": (4, 64), "cogvideox": (4 * 16 + 5, 128)}[name]
    # Of the second block; in the first nothing else is kept, so it could not be given back. Images, tokens, width, bytes:
    assert found[1][0] - found[0][0] == 2 * tokens * hidden * 4
    assert torch.equal(found[0][1], found[1][1])


@EVERY
def test_prefixes_equal_the_straightforward_form(name: str) -> None:
    """Keys and values really put in front, in the library's own processors: the same outputs and gradients."""
    model, batch = make(name, zoo.adapter("prefix", num_tokens=3))
    prefix = model.adapters["prefix"]
    target = torch.randn_like(model(*batch))
    (model(*batch) - target).square().sum().backward()
    ours = {k: p.grad.clone() for k, p in prefix.named_parameters()}  # type: ignore[union-attr]
    with torch.no_grad():
        output = model(*batch)
    prefix.zero_grad()
    own: list[tuple[Any, Any]] = []
    with model.disable():
        for point in model.points.select(kind="attention"):
            attention: Any = point.module
            own.append((attention, attention.processor))
            attention.processor = prepended(attention.processor, prefix.get_submodule(point.name))
        plain = library_answer(name, model.backbone, batch)
        torch.testing.assert_close(output, plain.detach(), rtol=1e-5, atol=1e-5)
        prefix.requires_grad_(True)
        (library_answer(name, model.backbone, batch) - target).square().sum().backward()
    for key, parameter in prefix.named_parameters():
        torch.testing.assert_close(ours[key], parameter.grad, rtol=1e-4, atol=1e-5)
    for attention, processor in own:
        attention.processor = processor


def test_another_processor_is_refused() -> None:
    model, _ = make("cogvideox")
    module: Any = model.backbone
    module.fuse_qkv_projections()
    with pytest.raises(zoo.ZooError, match=r"has FusedCogVideoXAttnProcessor2_0.*unfuse_qkv_projections"):
        model.add_adapter("prefix")


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model, batch = make(name, zoo.adapter("lora", **ALL_LINEAR), zoo.adapter("prefix", num_tokens=2))
    with torch.no_grad():
        exact = model(*batch)
        model.to(dtype=dtype)
        inputs = tuple(x.to(dtype) if x.is_floating_point() and i != 1 else x for i, x in enumerate(batch))
        half = model(*inputs)
        assert half.dtype == dtype
        assert (half.float() - exact).abs().max() < 0.1 * exact.abs().max()
        if name != "flux":  # whose time steps and places are in half precision, too
            with model.disable():
                assert torch.equal(model(*inputs), library_answer(name, model.backbone, inputs))


@pytest.mark.parametrize("name", ["dit", *(pytest.param(n, marks=pytest.mark.slow) for n in ("cogvideox", "flux"))])
def test_compiles_in_one_graph(name: str) -> None:
    model, batch = make(name, zoo.adapter("lora", rank=2))
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")(*batch)
        torch.testing.assert_close(compiled, model(*batch), rtol=1e-5, atol=1e-5)


# -- conditions, names, errors ----------------------------------------------------------------------------------------


class Moved(nn.Module):
    """A learned shift of an embedding."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(dim))

    def forward(self, y: Tensor) -> Tensor:
        return y + self.shift


@dataclass(eq=False)
class Shifted(Adapter):
    """Moves every embedding that conditions the model."""

    method = "shifted"

    def attach(self, points: Any) -> None:
        for point in points.require("condition", self.method):
            point.after(Moved(point.dim_out))


@EVERY
def test_conditions_can_be_changed(name: str) -> None:
    """A shift behind each embedding is a shift of its last bias (or, for classes, of every row of the table)."""
    model, batch = make(name, Shifted())
    assert {p.role for p in model.points.select(kind="condition")} >= {"time", "class" if name == "dit" else "text"}
    assert model.probe(*batch) == []
    with torch.no_grad():
        live = model(*batch)
        twin: Any = copy.deepcopy(model.backbone)
        with model.disable():
            assert not torch.allclose(model(*batch), live)
            twin = type(model.backbone).from_config(model.backbone.config).eval()  # type: ignore[attr-defined]
            twin.load_state_dict(model.backbone.state_dict())
        for point in model.points.select(kind="condition"):
            at = twin.get_submodule(point.path)
            last = [m for m in at.modules() if isinstance(m, (nn.Linear, nn.Embedding))][-1]
            shift = model.adapters[model.active[0]].get_submodule(point.name).shift
            (last.weight if isinstance(last, nn.Embedding) else last.bias).add_(shift)  # type: ignore[operator]
        torch.testing.assert_close(library_answer(name, twin, batch), live, rtol=1e-5, atol=1e-5)


@EVERY
def test_folders_of_the_library(name: str, tmp_path: Path) -> None:
    """`diffusers:<folder>` finds the family in the configuration: of a transformer alone, and inside a pipeline."""
    model, batch = make(name)
    module: Any = model.backbone
    for folder, where in ((tmp_path / "alone", "alone"), (tmp_path / "pipe", "pipe/transformer")):
        module.save_pretrained(tmp_path / where)
        again = zoo.load(f"diffusers:{folder}")
        assert again.family.family == name
        with torch.no_grad():
            assert torch.equal(again(*batch), model(*batch))
        assert zoo.load(f"diffusers:{folder}", pretrained=False).num_parameters() == model.num_parameters()


def test_the_first_releases_name_another_class(tmp_path: Path) -> None:
    for norm, known in (("ada_norm_zero", "dit"), ("ada_norm_single", "pixart")):
        (tmp_path / norm).mkdir()
        text = json.dumps({"_class_name": "Transformer2DModel", "norm_type": norm})
        (tmp_path / norm / "config.json").write_text(text)
        assert family_class(known).accepts(f"diffusers:{tmp_path / norm}") is True
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    assert find_backbone(f"diffusers:{tmp_path}")[0].family == "generic"
    with pytest.raises(zoo.ZooError, match=r"could not be loaded"):
        zoo.load(f"diffusers:{tmp_path}")
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text(json.dumps({"_class_name": "NoSuchModel"}))
    with pytest.raises(zoo.ZooError, match=r"no class 'NoSuchModel'"):
        zoo.load(f"diffusers:{tmp_path / 'unknown'}")
    with pytest.raises(zoo.ZooError, match=r"could not be read"):
        zoo.load(f"diffusers:{tmp_path / 'nothing'}")


@EVERY
def test_bad_settings_and_inputs(name: str) -> None:
    model, batch = make(name)
    with pytest.raises(zoo.ZooError, match="does not take these options"):
        zoo.load(family_class(name).tiny[0], pretrained=False, no_such_setting=3)  # type: ignore[index]
    with pytest.raises(zoo.ZooError, match="no pooled features"):
        tiny, options = family_class(name).tiny  # type: ignore[misc]
        zoo.load(tiny, pretrained=False, num_classes=3, **options)
    latents, *rest = batch
    axis = 2 if name == "cogvideox" else 1
    with pytest.raises(zoo.errors.DataError, match=r"have \d+ channels; .* takes \d+.*autoencoder"):
        model(torch.cat([latents, latents], dim=axis), *rest)
    with pytest.raises(zoo.errors.DataError, match="patches"):
        model(latents[..., :-1, :-1], *rest)
    with pytest.raises(zoo.errors.DataError, match="latents are"):
        model(latents[0], *rest)
    with pytest.raises(zoo.errors.DataError, match="timestep has shape"):
        model(latents, torch.tensor([1, 2, 3]), *rest[1:])
    if name != "dit":
        with pytest.raises(zoo.errors.DataError, match="as its text encoder makes them"):
            model(latents, rest[0], rest[1][..., :-1], *rest[2:])
    with torch.no_grad():  # one time step for all, as a number or a scalar
        steps = torch.full((2,), 7)
        assert torch.equal(model(latents, 7, *rest[1:]), model(latents, steps, *rest[1:]))
        assert torch.equal(model(latents, torch.tensor(7), *rest[1:]), model(latents, steps, *rest[1:]))
