"""Each class of diffusers that a table describes: the library's numbers, nothing dead, exact merges, prefixes, options."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

import diffusers
from diffusers_calls import MEMBERS, library_call, make
from diffusion_models import prepended

import zoo
from zoo.adapters.base import Adapter
from zoo.registry import family

EVERY = pytest.mark.parametrize("made", MEMBERS)
ALL_LINEAR = {"targets": "all-linear", "rank": 2}
# Attend linearly, or row by row: more keys have no place there
NO_PREFIX = ("MochiTransformer3DModel", "LatteTransformer3DModel")


def twin_of(module: Any) -> Any:
    twin = type(module).from_config(module.config).eval()
    twin.load_state_dict(module.state_dict())
    return twin


@EVERY
def test_it_is_the_library(made: str) -> None:
    """To the bit, in evaluation and training mode, with adapters attached and off; merged, it is the library's class again."""
    model, batch = make(made)
    module: Any = model.backbone
    assert type(module) is getattr(diffusers, made)
    twin, keys = twin_of(module), list(module.state_dict())
    with torch.no_grad():
        assert torch.equal(model(*batch), library_call(made, twin, batch))
        model.add_adapter(zoo.adapter("lora", rank=2))
        if made not in NO_PREFIX:
            model.add_adapter(zoo.adapter("prefix", num_tokens=2))
        with model.disable():
            assert torch.equal(model(*batch), library_call(made, twin, batch))
            torch.manual_seed(0)
            expected = library_call(made, twin.train(), batch)
            torch.manual_seed(0)
            module.train()
            assert torch.equal(model(*batch), expected)
    assert list(module.state_dict()) == keys


def forms(made: str, roles: list[str]) -> list[Adapter]:
    mlp = "Sana" not in made  # whose MLP is of convolutions, and no sublayer of tokens
    found = [
        zoo.adapter("lora", **ALL_LINEAR),
        zoo.adapter("lora", rank=2, dora=True),
        zoo.adapter("lora", rank=2, targets=tuple({"modulation", "final", "time", "text"} & set(roles))),
        zoo.adapter("ia3") if mlp else zoo.adapter("ia3", inputs=""),
        zoo.adapter("ssf"),
        zoo.adapter("full"),
    ]
    if mlp:
        found += [zoo.adapter("adapter", form=f, rank=3) for f in ("houlsby", "parallel", "adaptformer")]
    else:
        found += [zoo.adapter("adapter", form=f, rank=3, targets="attn,cross") for f in ("pfeiffer", "parallel")]
    if made not in NO_PREFIX:
        found.append(zoo.adapter("prefix", num_tokens=3))
    return found


@EVERY
def test_nothing_is_dead_and_removal_is_exact(made: str) -> None:
    """Every hook runs, every trained tensor has a gradient that is not zero; what merges merges exactly."""
    model, batch = make(made)
    frozen = copy.deepcopy(model.backbone.state_dict())
    with torch.no_grad():
        bare = model(*batch)
    for adapter in forms(made, model.points.roles("linear")):
        attached = model.add_adapter(adapter)
        with torch.no_grad():
            if attached.identity:
                assert torch.equal(model(*batch), bare), adapter  # the start is the pretrained function, to the bit
            for parameter in attached.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        assert model.probe(*batch) == [], adapter
        for parameter in model.parameters_to_train().values():
            parameter.grad = None
        model(*batch).square().sum().backward()
        dead = [k for k, p in model.parameters_to_train().items() if p.grad is None or not p.grad.any()]
        assert dead == [], adapter
        if attached.method in ("lora", "ia3"):
            with torch.no_grad():
                merged: Any = model.merge()
                torch.testing.assert_close(library_call(made, merged, batch), model(*batch), rtol=1e-4, atol=1e-5)
        model.remove_adapter(next(iter(model.active)))
    assert all(torch.equal(value, frozen[key]) for key, value in model.backbone.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(*batch), bare)


@EVERY
def test_every_projection_and_norm_is_a_point(made: str) -> None:
    """Counted against the library's own modules: what is called and trained is a point, but what nobody reads."""
    model, batch = make(made)
    called: set[str] = set()
    handles = [
        m.register_forward_hook(lambda *_, n=n: called.add(n))
        for n, m in model.backbone.named_modules()
        if "." in n or n
    ]
    with torch.no_grad():
        model(*batch)
    for handle in handles:
        handle.remove()
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    linears = {n for n, m in model.backbone.named_modules() if isinstance(m, kinds) and n in called}
    norms = {
        n
        for n, m in model.backbone.named_modules()
        if "Norm" in type(m).__name__ and getattr(m, "weight", None) is not None and n in called
    }
    unread = model.family._unread  # type: ignore[attr-defined]
    assert linears - unread == {p.path for p in model.points if p.kind == "linear"}
    assert norms - unread == {p.path for p in model.points if p.kind == "norm"}
    # nobody reads these: the prediction does not change with them
    twin = twin_of(model.backbone)
    for path in unread:
        with torch.no_grad():
            twin.get_submodule(path).weight.add_(1.0)
    with torch.no_grad():
        assert torch.equal(library_call(made, twin, batch), model(*batch))
    model.add_adapter(zoo.adapter("lora", rank=2, targets="q,k,v,o"))
    wanted = [m for n, m in model.backbone.named_modules() if n in _attention_linears(model.backbone, unread)]
    fused = [p for p in model.points.select("q,k,v", kind="linear") if p.fused]
    expected = sum(2 * (m.in_features + m.out_features) for m in wanted) + sum(
        2 * (p.dim_in + p.dim_out) for p in fused
    )
    assert model.num_parameters(trainable=True) == expected


def _attention_linears(module: nn.Module, unread: set[str]) -> set[str]:
    ends = ("to_q", "to_k", "to_v", "to_out.0", "to_out", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    found = {n for n, m in module.named_modules() if isinstance(m, nn.Linear) and n.endswith(ends)} - unread
    # the output of a block that attends and computes side by side is one projection of both
    return {n for n in found if not (n.startswith("single") and n.endswith("to_out"))}


@pytest.mark.parametrize("made", [m for m in MEMBERS if m not in NO_PREFIX])
def test_prefixes_equal_the_straightforward_form(made: str) -> None:
    """Keys and values really put in front, in the library's own processors: the same outputs and gradients."""
    model, batch = make(made, zoo.adapter("prefix", num_tokens=3))
    prefix = model.adapters["prefix"]
    target = torch.randn_like(model(*batch))
    (model(*batch) - target).square().sum().backward()
    ours = {k: p.grad.clone() for k, p in prefix.named_parameters()}
    with torch.no_grad():
        output = model(*batch)
    prefix.zero_grad()
    with model.disable():
        for point in model.points.select(kind="attention"):
            attention: Any = point.module
            attention.processor = prepended(attention.processor, prefix.get_submodule(point.name))
        prefix.requires_grad_(True)
        plain = library_call(made, model.backbone, batch)
        torch.testing.assert_close(output, plain.detach(), rtol=1e-5, atol=1e-5)
        (plain - target).square().sum().backward()
    for key, parameter in prefix.named_parameters():
        torch.testing.assert_close(ours[key], parameter.grad, rtol=1e-3, atol=1e-4)


@EVERY
def test_memory_settings_and_routes(made: str) -> None:
    """The same gradients at every setting; in a batch of two adapters each row is what its own gives alone."""
    model, batch = make(made, zoo.adapter("lora", **ALL_LINEAR))
    found: dict[str, list[Tensor]] = {}
    for memory in ("default", "low", "min"):
        model.memory = memory
        model.train()
        for parameter in model.parameters_to_train().values():
            parameter.grad = None
        model(*batch).square().sum().backward()
        found[memory] = [p.grad.clone() for p in model.parameters_to_train().values()]
    for memory in ("low", "min"):
        for one, plain in zip(found[memory], found["default"], strict=True):
            torch.testing.assert_close(one, plain, rtol=1e-4, atol=1e-5)
    model.memory = "default"
    model.eval()
    if made == "ZImageTransformer2DModel":
        with pytest.raises(zoo.ZooError, match="of several lengths"):
            model(*batch, adapters=["lora", "lora"])
        batch = batch[:3]
    with torch.no_grad():
        first = model(*batch)
        model.add_adapter(zoo.adapter("bitfit") if made != "Flux2Transformer2DModel" else zoo.adapter("ssf"))
        other = next(n for n in model.adapters if n != "lora")
        for parameter in model.adapters[other].parameters():
            parameter.add_(0.1)
        model.set_active(other)
        second = model(*batch)
        mixed = model(*batch, adapters=["lora", other])
        torch.testing.assert_close(mixed, torch.stack([first[0], second[1]]), rtol=1e-4, atol=1e-5)


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
def test_conditions_can_be_changed(made: str) -> None:
    """A shift behind each embedding is a shift of its last bias."""
    model, batch = make(made, Shifted())
    roles = {p.role for p in model.points.select(kind="condition")}
    assert roles >= {"time", "text"}
    assert model.probe(*batch) == []
    model(*batch).square().sum().backward()
    assert all(p.grad.any() for p in model.parameters_to_train().values())
    with torch.no_grad():
        live = model(*batch)
        twin = twin_of(model.backbone)
        for point in model.points.select(kind="condition"):
            shift = model.adapters[model.active[0]].get_submodule(point.name).shift
            at = twin.get_submodule(point.path)
            last = [m for m in at.modules() if isinstance(m, (nn.Linear, nn.Embedding, nn.LayerNorm))][-1]
            if isinstance(last, nn.Embedding):
                last.weight.add_(shift)
            elif getattr(last, "bias", None) is None:
                last.bias = nn.Parameter(shift.clone())
            else:
                last.bias.add_(shift)
        torch.testing.assert_close(library_call(made, twin, batch), live, rtol=1e-4, atol=1e-4)


# -- names, sizes, options ---------------------------------------------------------------------------------------------------


def test_fused_projections_of_flux_2_are_parts() -> None:
    """Queries, keys, values, gate and up of a single block are rows of one projection; each learns a change of its own."""
    model, batch = make("Flux2Transformer2DModel", zoo.adapter("lora", rank=2, targets="single.*.**.{q,v,up}"))
    points = model.points.select("single.0.**", kind="linear")
    parts = {p.name.removeprefix("single.0."): (p.start, p.stop) for p in points if p.fused}
    assert parts == {
        "attn.q": (0, 32),
        "attn.k": (32, 64),
        "attn.v": (64, 96),
        "mixer.gate": (96, 192),
        "mixer.up": (192, 288),
    }
    merged: Any = model.merge()
    change = merged.single_transformer_blocks[0].attn.to_qkv_mlp_proj.weight
    change = change - model.backbone.single_transformer_blocks[0].attn.to_qkv_mlp_proj.weight  # type: ignore[index,union-attr]
    changed = [bool(change[start:stop].any()) for start, stop in parts.values()]
    assert changed == [True, False, True, False, True]
    with torch.no_grad():
        torch.testing.assert_close(
            library_call("Flux2Transformer2DModel", merged, batch), model(*batch), rtol=1e-5, atol=1e-5
        )


def test_image_to_video_takes_the_image() -> None:
    """Wan's image-to-video model: mask and latents of the image as further channels, and the image's embeddings."""
    options = {**family("cross-dit-video").members["WanTransformer3DModel"].tiny, "in_channels": 9, "image_dim": 10}  # type: ignore[attr-defined]
    torch.manual_seed(0)
    model = zoo.load("wan-14b-i2v", pretrained=False, **{**options, "added_kv_proj_dim": 24})
    latents, steps, text, image, joined = model.family.tiny_batch()
    assert latents.shape[1] == 4 and joined.shape[1] == 5
    text = torch.randn(2, 512, 12)  # as many words as the processor takes for text
    with torch.no_grad():
        whole = torch.cat([latents, joined], dim=1)
        expected = model.backbone(whole, steps, text, image).sample  # type: ignore[operator]
        assert torch.equal(model(latents, steps, text, image, joined), expected)
    model.add_adapter(zoo.adapter("lora", **ALL_LINEAR))
    assert model.probe(latents, steps, text, image, joined) == []
    with pytest.raises(zoo.errors.DataError, match="image_latents are"):
        model(latents, steps, text, image, joined[:, :1])
    with pytest.raises(zoo.ZooError, match="two products"):
        model.add_adapter("prefix")


@pytest.mark.slow
@pytest.mark.parametrize("made", ["WanTransformer3DModel", "QwenImageTransformer2DModel"])
def test_compiles_in_one_graph(made: str) -> None:
    model, batch = make(made, zoo.adapter("lora", rank=2))
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")(*batch)
        torch.testing.assert_close(compiled, model(*batch), rtol=1e-5, atol=1e-5)
