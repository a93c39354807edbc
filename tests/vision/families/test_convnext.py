"""ConvNeXt: counts, maps with their channels in front, the one sublayer of a block, what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn

import zoo
from zoo.errors import AttachError, MergeError

SMALL: dict[str, Any] = {"depths": (1, 2, 1, 1), "dims": (8, 12, 16, 24)}
NETS = {
    "v1": "convnext_tiny",
    "norm first": "convnext_tiny_hnf",
    "two stem convolutions": "convnext_atto_ols",
    "head with an MLP": "convnext_large_mlp",
    "rms": "convnext_zepto_rms",
    "v2": "convnextv2_tiny",
    "v2, convolutions": "convnextv2_nano",
}
EACH = pytest.mark.parametrize("kind", list(NETS))


def load(kind: str, adapter: Any = None, **options: Any) -> zoo.Model:
    torch.manual_seed(0)
    options = {"num_classes": 3, "img_size": 32, **SMALL, **options}
    model = zoo.load(f"timm:{NETS[kind]}", adapter, pretrained=False, **options).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, p in [*model.backbone.named_parameters(), *model.adapters.named_parameters()]:
            if key.endswith("gamma"):  # 1e-6 at the start: a block would hardly count
                p.fill_(0.5)
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("name", "count"),
    [("convnext-t", 27_820_128), ("convnext-s", 49_454_688), ("convnext-b", 87_566_464), ("convnext-l", 196_230_336)],
)
def test_counts_without_head(name: str, count: int) -> None:
    assert zoo.load(name, num_classes=0, device="meta").num_parameters() == count


@pytest.mark.parametrize(
    ("adapter", "count"),
    [
        ("lora", 529_920),
        (zoo.adapter("lora", targets="up,down", rank=1), 66_240),
        ("bitfit", 49_344),
        ("norm", 16_320),
        ("ia3", 26_496),
    ],
)
def test_counts_of_methods(adapter: Any, count: int) -> None:
    model = zoo.load("convnext-t", adapter, num_classes=0, device="meta")
    assert model.num_parameters(trainable=True) == count


@EACH
def test_the_network_is_timms_and_everything_with_a_weight_is_a_point(kind: str) -> None:
    model = load(kind)
    plain = timm.create_model(NETS[kind], num_classes=0, **SMALL).eval()
    plain.load_state_dict(model.backbone.state_dict())
    assert torch.equal(model.features(images()), plain(images()))
    found = {p.module for p in model.points}
    leaves = [m for m in model.backbone.modules() if isinstance(getattr(m, "weight", None), Tensor)]
    assert [m for m in leaves if m not in found] == []


@pytest.mark.parametrize("method", ["lora", "bitfit", "norm", "ssf", "adapter", "ia3"])
@EACH
def test_methods_reach_it_start_where_it_is_and_merge(kind: str, method: str) -> None:
    config = {"init_std": 0.0} if method == "ssf" else {}
    torch.manual_seed(0)
    bare = load(kind)
    with torch.no_grad():
        before = bare(images())
        bare.add_adapter(zoo.adapter(method, **config))
        assert torch.equal(bare(images()), before)
    model = load(kind, zoo.adapter(method, **config))
    assert model.probe(images()) == []
    if method == "ssf" and kind.startswith(("v2", "rms")):
        with pytest.raises(MergeError, match="response norm" if kind.startswith("v2") else "no bias"):
            model.merge()
    elif method != "adapter":
        torch.testing.assert_close(model.merge()(images()), model(images()), rtol=1e-4, atol=1e-5)


@EACH
def test_a_norm_is_rescaled_along_its_channels(kind: str) -> None:
    """On maps with their channels in front, a scale of the last axis would be one of columns of pixels."""
    names = ("stem.norm", "stages.1.merge.norm", "stages.1.blocks.1.norm")
    model = load(kind, zoo.adapter("ssf", targets=names))
    plain = timm.create_model(NETS[kind], num_classes=0, **SMALL).eval()
    plain.load_state_dict(model.backbone.state_dict())
    parts = {model.points[name].path: model.adapters["ssf"].module_at(name) for name in names}

    def rescale(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        part = parts[next(k for k, m in plain.named_modules() if m is module)]
        first = y.dim() == 4 and y.shape[1] == len(part.scale) and type(module).__name__.endswith("2d")
        shape = (1, -1, 1, 1) if first else (-1,)
        return y * part.scale.view(shape) + part.shift.view(shape)

    for path in parts:
        plain.get_submodule(path).register_forward_hook(rescale)
    torch.testing.assert_close(model.features(images()), plain(images()), rtol=1e-5, atol=1e-5)


class _Seen(nn.Module):
    """Remembers what it is given, and adds a linear function of its channels."""

    def __init__(self, dim: int, name: str, seen: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.mix, self.name, self.seen = nn.Linear(dim, dim), name, seen

    def forward(self, *tensors: Any) -> Tensor:
        x = tensors[-1]
        self.seen[self.name] = tuple(x.shape)
        return x + 0.1 * self.mix(x)  # type: ignore[no-any-return]


class _Instead(_Seen):
    def forward(self, run: Any, x: Tensor) -> Tensor:
        self.seen[self.name] = tuple(x.shape)
        return run(x) + 0.1 * self.mix(x)  # type: ignore[no-any-return]


@dataclass(eq=False)
class Everywhere(zoo.Adapter):
    """One module at every verb of a block and its sublayer."""

    method = "everywhere"

    def attach(self, points: Any) -> None:
        self.seen: dict[str, tuple[int, ...]] = {}

        def made(at: Any, verb: str, cls: Any = _Seen) -> nn.Module:
            return cls(at.dim_out, verb, self.seen)

        for stage, verb in enumerate(("before", "after", "parallel", "residual")):
            at = points[f"stages.{stage}.blocks.0.mlp"]
            if verb == "residual":
                at.parallel(made(at, verb), source="residual")
            else:
                getattr(at, verb)(made(at, verb))
        at = points["stages.1.blocks.1.mlp"]
        at.replace(made(at, "replace", _Instead))
        for stage, verb in enumerate(("before", "after", "replace")):
            block = points[f"stages.{stage}.blocks.0"]
            getattr(block, verb)(made(block, f"block {verb}", _Instead if verb == "replace" else _Seen))


@pytest.mark.parametrize("kind", ["v1", "v2, convolutions"])
def test_adapters_see_maps_with_their_channels_last(kind: str) -> None:
    model = load(kind, Everywhere(), num_classes=0)
    x = images()
    assert model.probe(x) == []
    grids = {"before": (8, 8, 8), "after": (4, 4, 12), "parallel": (2, 2, 16), "residual": (1, 1, 24)}
    more = {"replace": (4, 4, 12), "block before": (8, 8, 8), "block after": (4, 4, 12), "block replace": (2, 2, 16)}
    seen = model.adapters["everywhere"].seen
    assert seen == {verb: (2, *grid) for verb, grid in {**grids, **more}.items()}
    expected = _by_hand(model, x)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    for setting in ("low", "min"):
        model.memory = setting
        torch.testing.assert_close(model.train()(x), expected, rtol=1e-4, atol=1e-5)


def _by_hand(model: zoo.Model, x: Tensor) -> Tensor:
    net: Any = model.backbone
    adapter: Any = model.adapters["everywhere"]
    with model.disable():
        x = net.stem(x)
        for s, stage in enumerate(net.stages):
            x = stage.downsample(x)
            for i, block in enumerate(stage.blocks):
                name = f"stages.{s}.blocks.{i}"
                verb = ("before", "after", "parallel", "residual")[s] if i == 0 else "replace"
                sub = adapter.module_at(f"{name}.mlp").mix
                outer = {0: "before", 1: "after", 2: "replace"}.get(s) if i == 0 else None
                mix = adapter.module_at(name).mix if outer else None
                x = _block(block, x, verb, sub, outer, mix)
        return net.forward_head(net.norm_pre(x), pre_logits=True)


def _block(block: Any, x: Tensor, verb: str, sub: Any, outer: str | None, mix: Any) -> Tensor:
    def along(linear: Any, y: Tensor) -> Tensor:
        return 0.1 * linear(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    entered = x
    if outer == "before":
        x = x + along(mix, x)
    last = not block.use_conv_mlp
    h = block.conv_dw(x)
    h = block.norm(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if last else block.norm(h)
    if verb == "before":
        h = h + along(sub, h)
    y = block.mlp(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if last else block.mlp(h)
    if verb == "replace":
        y = y + along(sub, h)
    y = y if block.gamma is None else y * block.gamma.view(1, -1, 1, 1)
    if verb == "after":
        y = y + along(sub, y)
    elif verb in ("parallel", "residual"):
        source = h if verb == "parallel" else x
        y = y + source + along(sub, source)
    x = x + y
    if outer in ("after", "replace"):
        x = x + along(mix, x if outer == "after" else entered)
    return x


def test_one_sublayer_and_no_attention() -> None:
    model = load("v1")
    assert {p.role for p in model.points.select(kind="sublayer")} == {"mlp"}
    assert model.points.kinds == ("linear", "sublayer", "norm", "block")
    assert model.points.norm_before(model.points["stages.1.blocks.0.mlp"]).name == "stages.1.blocks.0.norm"
    assert [p.name for p in model.points.readers(model.points["stages.0.blocks.0.mlp"])] == ["stages.0.blocks.0.mlp.up"]
    for method, reason in (
        ("vpt", "needs tokens points"),
        ("prefix", "needs attention points"),
        ("meft", "lacks its attention"),
    ):
        with pytest.raises(AttachError, match=reason):
            load("v1", method)


def test_dora_on_convolutions_is_refused_and_on_projections_merges() -> None:
    with pytest.raises(AttachError, match="Conv2d"):
        load("v2, convolutions", zoo.adapter("lora", dora=True))
    model = load("v2", zoo.adapter("lora", dora=True))
    torch.testing.assert_close(model.merge()(images()), model(images()), rtol=1e-4, atol=1e-5)


def test_the_global_response_norm_is_trained() -> None:
    model = load("v2", zoo.adapter("norm", targets="**.grn"))
    grn = model.points["stages.0.blocks.0.mlp.grn"]
    assert isinstance(grn.module, GlobalResponseNorm) and grn.dim_out == 4 * 8
    assert model.num_parameters(trainable=True, head=False) == 2 * 4 * (8 + 2 * 12 + 16 + 24)
    assert model.probe(images()) == []


def test_outputs_and_size() -> None:
    model = load("v1")
    found = model.outputs(images(), want=("pooled", "maps"))
    assert [tuple(m.shape[1:]) for m in found["maps"]] == [(8, 8, 8), (12, 4, 4), (16, 2, 2), (24, 1, 1)]
    head: Any = model.backbone.head
    norm: Any = head.norm
    assert isinstance(norm, LayerNorm2d)
    pooled = F.layer_norm(found["maps"][-1].mean((2, 3)), (24,), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(found["pooled"], pooled)
    assert model.image_size == (32, 32) and zoo.load("convnext-t", device="meta").image_size == (224, 224)
