"""GroupMamba: the parts against their formulas, the methods on it, points, heads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sampled import few
from torch import Tensor, nn

import zoo
from vision.families.groupmamba.network import GroupMamba, GroupMambaLayer, along, back
from vision.families.groupmamba.selective_scan import sequential_scan
from zoo.errors import MergeError, SelectionError, ZooError
from zoo.heads import TwoHeads
from zoo.table import STEPS

TINY: dict[str, Any] = {
    "stem_hidden_dim": 8,
    "embed_dims": [16, 32],
    "depths": [1, 2],
    "mlp_ratios": [2, 2],
    "img_size": 16,
}


def make(*adapters: Any, num_classes: int | None = 3, seed: int = 0, **options: Any) -> zoo.Model:
    torch.manual_seed(seed)
    return zoo.load(
        "groupmamba-micro", list(adapters), num_classes=num_classes, pretrained=False, **{**TINY, **options}
    )


def images(batch: int = 3, height: int = 16, width: int = 24) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def shaken(model: zoo.Model, seed: int = 2) -> zoo.Model:
    """Every trained number moved."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters_to_train().values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


# -- the network --------------------------------------------------------------------------------------------------------


def test_orders_of_tokens() -> None:
    grid = torch.arange(6.0).view(1, 1, 2, 3)  # two rows of three
    read = [along(grid, i).flatten().tolist() for i in range(4)]
    assert read == [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]]
    for i in range(4):
        assert torch.equal(back(along(grid, i), i, 2, 3), grid.permute(0, 2, 3, 1))


def test_layer_by_its_formula() -> None:
    """The layer once more, direction by direction, with the scan token by token."""
    torch.manual_seed(0)
    layer = GroupMambaLayer(16, d_state=2)
    x = torch.randn(2, 4, 3, 16)
    h = layer.norm(x)
    gate = torch.sigmoid(layer.fc2(torch.relu(layer.fc1(h.flatten(1, 2).mean(dim=1)))))
    outputs = []
    for i, group in enumerate(layer.groups):
        a, z = group.in_proj(h[..., 4 * i : 4 * i + 4]).split(4, dim=-1)
        tokens = along(F.silu(group.conv2d(a.permute(0, 3, 1, 2))), i)
        step, b, c = (tokens @ group.x_proj_weight[0].T).split([1, 2, 2], dim=-1)
        delta = step @ group.dt_projs_weight[0].T
        rates = -group.A_logs.exp()
        y = sequential_scan(tokens, delta, rates, b[:, :, None], c[:, :, None], group.Ds, group.dt_projs_bias[0])
        outputs.append(group.out_proj(group.out_norm(back(y, i, 4, 3)) * F.silu(z)))
    y = torch.cat(outputs, dim=-1) * layer.skip_scale * h * gate[:, None, None]
    torch.testing.assert_close(layer(x), layer.proj(layer.norm(y)), rtol=1e-5, atol=1e-5)


def test_start_of_the_scan() -> None:
    group = GroupMambaLayer(64, d_state=3).mamba_g1
    steps = F.softplus(group.dt_projs_bias.detach())
    assert float(steps.min()) >= 0.999e-3 and float(steps.max()) <= 0.1001
    assert torch.equal(group.A_logs.exp().round(decimals=5), torch.tensor([1.0, 2.0, 3.0]).expand(16, 3))


def test_both_heads() -> None:
    torch.manual_seed(0)
    network = GroupMamba(num_classes=5, **TINY)
    network.train()
    own, distilled = network(images())
    assert own.shape == distilled.shape == (3, 5) and not torch.equal(own, distilled)
    network.eval()
    features = network.forward_features(images())
    assert network.dist_head is not None
    torch.testing.assert_close(network(images()), (network.head(features) + network.dist_head(features)) / 2)


def test_micro_is_small() -> None:
    model = zoo.load("groupmamba-micro", pretrained=False, device="meta")
    assert 1e6 < model.num_parameters() < 2.5e6
    assert 2 * sum(t.numel() for t in model.state_dict().values()) < 8e6  # bytes in half precision
    assert model.num_classes == 100 and model.image_size == (32, 32)
    assert zoo.load("groupmamba-t", pretrained=False, device="meta").image_size == (224, 224)


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(ZooError, match="width of 18"):
        make(embed_dims=[16, 18])
    with pytest.raises(ZooError, match="2 widths, 3 depths"):
        make(depths=[1, 1, 1])
    with pytest.raises(ZooError, match="window_size"):
        make(window_size=3)


# -- the methods ----------------------------------------------------------------------------------------------------------

REFUSED = {
    "prefix": "attention points",
    "vpt": "tokens points",
    "vqt": "attention points",
    "coop": "tokens points",
    "cocoop": "tokens points",
    "cpe-clip": "tokens points",
    "mam": "attention points",
    "maple": "tokens points",
    "cones": "no text tower",
    "gram": "stands around another adapter",
    "textual-inversion": "no embedding of words",
    "clip-adapter": "no text tower",
    "tip-adapter": "no text tower",
    "tip-adapter-f": "no text tower",
    "das": "none of",
    "ladder": "attention points",
    "dtl": "attention points",
    "dtl+": "attention points",
    "convpass": "is not described",
    "meft": "not a plain sequence",
    "llama-adapter-v2": "attention points",
    "conformer": "mixes each token with those around it",
    "meet": "tokens points",
    "moa": "matches no sublayer point",
    "noah": "tokens points",
    "unipelt": "attention points",
    "videopainter": "no transformer of videos",
    "videopainter-id": "attention points",
    "vpt-sp": "tokens points",
}


IN_EVERY_RUN = {*REFUSED, "linear", "norm", "ia3", "bitfit"}


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(m, marks=() if m in IN_EVERY_RUN or few("groupmamba", m) else pytest.mark.rest)
        for m in zoo.list_adapters()
    ],
)
def test_compatibility(method: str) -> None:
    (cell,) = zoo.compatibility(["groupmamba"], [method])
    answers = {step: getattr(cell, step) for step in STEPS}
    if method in REFUSED:
        assert REFUSED[method] in answers["attach"] and "groupmamba" in answers["attach"]
        return
    assert not [a for a in answers.values() if a.startswith("defect") or a == "not reached"], answers
    assert answers["attach"] == answers["train"] == answers["save"] == "yes"
    if method in ("linear", "full", "bitfit", "norm", "lora", "ia3"):
        assert answers["merge"] == "yes"


IDENTITIES = [
    ("lora", {"targets": "all-linear"}),
    ("lora", {"targets": "all-linear", "dora": True}),
    ("lora", {"targets": ("gate", "in", "out"), "rslora": True}),
    ("adapter", {"form": "houlsby"}),
    ("adapter", {"form": "pfeiffer"}),
    ("adapter", {"form": "parallel", "targets": ("mixer", "mlp")}),
    ("adapter", {"form": "adaptformer", "targets": ("mixer", "mlp")}),
    ("ssf", {"init_std": 0.0}),
    ("ia3", {}),
    ("bitfit", {}),
    ("norm", {}),
]


@pytest.mark.parametrize(("method", "config"), IDENTITIES)
def test_no_dead_part_identity_at_start_and_removal(method: str, config: dict[str, Any]) -> None:
    model = make()
    before = model(images())
    frozen = copy.deepcopy(model.backbone.state_dict())
    model.add_adapter(zoo.adapter(method, **config))
    assert torch.equal(model(images()), before)
    assert model.probe(images()) == []
    shaken(model)
    model.train()(images()).square().sum().backward()
    model.remove_adapter(method)
    assert all(torch.equal(value, frozen[key]) for key, value in model.backbone.state_dict().items())


def test_full_tuning_leaves_running_statistics() -> None:
    """They belong to the frozen backbone: no adapter holds them, so training must not move them."""
    model = make("full")
    frozen = copy.deepcopy(model.backbone.patch_embed1.state_dict())  # type: ignore[operator, union-attr]
    model.train()(images()).square().sum().backward()
    model.remove_adapter("full")
    state = model.backbone.patch_embed1.state_dict()  # type: ignore[operator, union-attr]
    assert all(torch.equal(value, frozen[key]) for key, value in state.items())


def test_branches_read_what_they_should() -> None:
    """Both parallel sources at the mixer: behind the layer's norm, and the residual stream in front of it."""
    model = make()
    block: Any = model.backbone.block2[1]  # type: ignore[index]
    for source in ("input", "residual"):
        name = source
        model.add_adapter(
            zoo.adapter("adapter", form="parallel", targets="stages.1.blocks.1.mixer", rank=4, source=source), name
        )
        shaken(model)
        x = torch.randn(2, 3, 3, 32)
        branch: Any = model.adapters[name].module_at("stages.1.blocks.1.mixer")
        with torch.no_grad():
            found = block(x)
            with model.disable():
                u = x + block.attn(x) + branch(block.attn.norm(x) if source == "input" else x)
                expected = u + block.mlp(block.norm2(u))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        model.remove_adapter(name)


@pytest.mark.parametrize(
    ("method", "config"),
    [("lora", {"targets": "all-linear"}), ("ia3", {}), ("bitfit", {}), ("norm", {}), ("full", {})],
)
def test_merge(method: str, config: dict[str, Any]) -> None:
    model = shaken(make(zoo.adapter(method, **config)))
    logits = model(images())
    plain = model.merge()
    assert isinstance(plain, GroupMamba) and plain.dist_head is None
    torch.testing.assert_close(plain(images()), logits, rtol=1e-5, atol=1e-5)
    twin = GroupMamba(num_classes=3, distillation=False, stem_kernel=3, stem_stride=1, **TINY)
    twin.load_state_dict(plain.state_dict())  # the keys of the layout with one head
    torch.testing.assert_close(twin.eval()(images()), logits, rtol=1e-5, atol=1e-5)


def test_merge_of_ssf_is_refused_where_there_is_no_bias() -> None:
    with pytest.raises(MergeError, match="no bias"):
        make("ssf").merge()
    model = shaken(make(zoo.adapter("ssf", targets=("norm", "up", "down", "o", "conv"))))
    torch.testing.assert_close(model.merge()(images()), model(images()), rtol=1e-5, atol=1e-5)


def test_memory_settings_give_the_same_gradients() -> None:
    model = shaken(make(zoo.adapter("lora", targets="all-linear"), zoo.adapter("adapter", form="houlsby")))
    gradients: dict[str, dict[str, Tensor]] = {}
    kept = {}
    for memory in ("default", "low", "min"):
        model.memory = memory
        model.zero_grad()
        model.train()(images()).square().sum().backward()
        gradients[memory] = {k: p.grad.clone() for k, p in model.parameters_to_train().items() if p.grad is not None}
        kept[memory] = model.saved_bytes(images())
    for memory in ("low", "min"):
        for key, value in gradients["default"].items():
            torch.testing.assert_close(gradients[memory][key], value, rtol=1e-5, atol=1e-5)
    assert kept["default"] > kept["low"] > kept["min"]


def test_gradients_with_recomputation_are_those_without() -> None:
    """What the layer gives back instead of keeping (inputs and steps of the scan, products) changes no number."""
    model = shaken(make(zoo.adapter("lora", targets="all-linear")))
    model.train()(images()).square().sum().backward()
    found = {k: p.grad for k, p in model.parameters_to_train().items()}
    model.zero_grad()
    model.head(model.family.features(images())).square().sum().backward()  # not through the model: nothing is recorded
    for key, parameter in model.parameters_to_train().items():
        torch.testing.assert_close(found[key], parameter.grad, rtol=1e-6, atol=1e-6)


def test_an_adapter_for_each_image() -> None:
    model = make(num_classes=4)
    for name in ("one", "two"):
        model.add_adapter(zoo.adapter("lora", targets="all-linear"), name)
    shaken(model)
    rows = []
    for i, name in enumerate(("one", "two")):
        model.set_active(name)
        rows.append(model(images())[i])
    with model.disable():
        rows.append(model(images())[2])
    torch.testing.assert_close(model(images(), adapters=["one", "two", None]), torch.stack(rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_classes", [3, None, 0])
def test_saves_and_reloads(num_classes: int | None, tmp_path: Path) -> None:
    model = shaken(make(zoo.adapter("lora", targets="all-linear"), num_classes=num_classes))
    model.save_adapter(tmp_path / "out")
    again = make(tmp_path / "out", num_classes=None if num_classes != 0 else 0)
    again.eval()
    assert torch.equal(again(images()), model.eval()(images()))


@pytest.mark.slow
def test_compiles_to_one_graph() -> None:
    model = shaken(make(zoo.adapter("lora", targets="all-linear"), depths=[1, 1]))
    expected = model.train()(images())
    expected.square().sum().backward()
    gradients = {k: p.grad for k, p in model.parameters_to_train().items()}
    model.zero_grad()
    found = torch.compile(model, fullgraph=True, backend="eager")(images())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.square().sum().backward()
    for key, parameter in model.parameters_to_train().items():
        torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-4, atol=1e-5)


# -- points and selectors -----------------------------------------------------------------------------------------------


def test_points() -> None:
    model = zoo.load("groupmamba-t", pretrained=False, device="meta")
    assert model.points.kinds == ("linear", "sublayer", "norm", "block")
    assert len(model.points.select(kind="sublayer", role="mixer")) == 3 + 4 + 9 + 3 + 1
    assert [p.path for p in model.points.select("stages.2.blocks.4.mixer.g3.{in,out}")] == [
        "block3.4.attn.mamba_g3.in_proj",
        "block3.4.attn.mamba_g3.out_proj",
    ]
    inner = model.points["stages.2.blocks.4.mixer.g3.in"]
    assert (inner.dim_in, inner.dim_out, inner.stage, inner.block) == (87, 174, 2, 4)
    for role in ("q", "attn", "tokens"):
        with pytest.raises(SelectionError, match=f"'{role}'"):
            model.points.select(role)


def test_defaults_mean_the_projection_into_the_mixer() -> None:
    model = make("lora", "ia3")
    adapted = {k.split(".lora_a")[0] for k in model.parameters_to_train() if k.endswith("lora_a")}
    assert adapted == {f"lora/{p.name}" for p in model.points.select("in", kind="linear")}
    with pytest.raises(SelectionError, match="'q'"):
        make(zoo.adapter("lora", targets="q"))


# -- heads ----------------------------------------------------------------------------------------------------------------


def test_the_own_classifier_is_kept() -> None:
    torch.manual_seed(0)
    bare: Any = zoo.registry.find_backbone("groupmamba-micro")[0].build(
        "zoo:groupmamba-micro", pretrained=False, **TINY
    )
    torch.manual_seed(0)
    model = make(num_classes=None)
    assert isinstance(model.head, TwoHeads) and model.num_classes == 100
    assert torch.equal(model(images()), bare.eval()(images()))
    merged: Any = model.merge()
    assert merged.state_dict().keys() == bare.state_dict().keys()
    assert torch.equal(merged(images()), bare(images()))


def test_one_head_for_a_task() -> None:
    model = make(num_classes=7)
    assert type(model.head) is nn.Linear
    torch.testing.assert_close(model(images()), model.head(model.features(images())))
    assert make(num_classes=0)(images()).shape == (3, 32)
    single = make(num_classes=None, distillation=False)
    assert type(single.head) is nn.Linear and single.num_classes == 100


def test_a_head_that_it_cannot_hold_is_refused() -> None:
    model = make()
    model.reset_head(3, kind="cosine")
    with pytest.raises(ZooError, match="cannot hold it"):
        model.merge()
