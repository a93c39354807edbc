"""DTL: the side path written out, which blocks take part, gradients of blocks that run again, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from vision.adapters.dtl import _sharp, _soft

TINY: dict[str, Any] = {"embed_dim": 48, "depth": 6, "num_heads": 3}
SWIN: dict[str, Any] = {"img_size": 64, "window_size": 2, "embed_dim": 16, "num_heads": (1, 2, 4)}


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def load(adapter: Any, name: str = "vit-micro", **options: Any) -> zoo.Model:
    torch.manual_seed(0)
    model = zoo.load(name, adapter, pretrained=False, num_classes=5, **(options or TINY)).eval()
    with torch.no_grad():
        for each in model.adapters.values():
            for p in each.parameters():
                p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


@pytest.mark.parametrize("method", ["dtl", "dtl+"])
def test_against_the_equations(method: str) -> None:
    """Block by block, by hand, on the bare backbone."""
    model, x = load(zoo.adapter(method, layers=(1, 2, 3, 5), add_after=(2, 4, 5))), images()
    side, vit = model.adapters[method], model.backbone
    with model.disable(), torch.no_grad():
        tokens: Tensor = vit._pos_embed(vit.patch_embed(x))  # type: ignore[operator]
        h = torch.zeros_like(tokens)
        for i, block in enumerate(vit.blocks):  # type: ignore[arg-type]
            if i in (1, 2, 3, 5):
                a, b = (side.get_parameter(f"blocks.{i}.{n}") for n in "ab")
                h = h + tokens @ a.T @ b.T
            tokens = block(tokens)
            if i in (2, 4, 5):
                given = h * torch.sigmoid(100 * h)
                if method == "dtl+":
                    kernel = side.get_parameter("fusion_48.conv.weight")
                    patches = given[:, 1:].transpose(1, 2).unflatten(2, (8, 8))
                    patches = F.conv2d(patches, kernel, padding=1, groups=48).flatten(2).transpose(1, 2)
                    given = torch.cat([given[:, :1], patches], dim=1)
                tokens = tokens + given
        expected = model.head(vit.norm(tokens)[:, 0])  # type: ignore[operator]
    torch.testing.assert_close(model(x), expected)


def test_who_takes_part() -> None:
    """A half gives back; in stages the last two take part, each with a path of its own, and none collects for nobody."""

    def named(model: zoo.Model, method: str) -> set[str]:
        return {k.rpartition(".")[0] for k, _ in model.adapters[method].named_parameters()}

    vit = load("dtl")
    assert named(vit, "dtl") == {f"blocks.{i}" for i in range(6)}
    assert vit.adapters["dtl"].reruns == ("blocks.4", "blocks.5")
    swin = load("dtl+", "timm:swin_tiny_patch4_window7_224", depths=(1, 4, 1), **SWIN)
    late = {*(f"stages.1.blocks.{i}" for i in range(4)), "stages.2.blocks.0"}
    assert named(swin, "dtl+") == late | {"fusion_32.conv", "fusion_64.conv"}
    assert swin.probe(images(64)) == []
    short = load("dtl", "timm:swin_tiny_patch4_window7_224", depths=(1, 1, 1), **SWIN)
    assert named(short, "dtl") == {"stages.2.blocks.0"}


@pytest.mark.parametrize("method", ["dtl", "dtl+"])
@pytest.mark.parametrize("rerun", [1, 2, 4])
def test_blocks_that_run_again_give_the_same_gradients(method: str, rerun: int) -> None:
    found, kept = [], []
    for again in (0, rerun):
        model = load(zoo.adapter(method, rerun=again)).train()
        model(images()).square().sum().backward()
        found.append({k: p.grad for k, p in model.parameters_to_train().items()})
        kept.append(model.saved_bytes(images()))
    for key, grad in found[0].items():
        assert torch.equal(grad, found[1][key]), key  # type: ignore[arg-type]
    assert kept[1] < 0.4 * kept[0]


def test_no_graph_in_front_of_the_first_addition() -> None:
    model = load("dtl").train()
    seen: dict[int, bool] = {}

    def see(i: int) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            seen[i] = inputs[0].requires_grad

        return hook

    for i, block in enumerate(model.backbone.blocks):  # type: ignore[arg-type]
        block.register_forward_pre_hook(see(i))
    model(images())
    assert seen == {i: i > 3 for i in range(6)}


def test_half_precision() -> None:
    """beta h may be beyond what half precision holds: phi(h) is h or 0 there."""
    h = torch.tensor([1000.0, -1000.0, 0.0, 60_000.0], dtype=torch.float16)
    assert _soft(_sharp(h, 100.0), 100.0).tolist() == [1000.0, 0.0, 0.0, 60_000.0]
    for dtype in (torch.float16, torch.bfloat16):
        model = load("dtl+").to(dtype)
        assert model.features(images().to(dtype)).isfinite().all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"fusion": 4}, "expected 0 .* or an odd number"),
        ({"layers": ()}, "layers is empty"),
        ({"rerun": -1}, "rerun is -1"),
        ({"layers": (0, 6)}, "blocks 0 to 5"),
        ({"add_after": (7,)}, "blocks 0 to 5"),
        ({"layers": (3,), "add_after": (2, 4)}, "block 2 gives back before any block"),
        ({"layers": (1, 5), "add_after": (4,)}, "collects for none"),
    ],
)
def test_settings_are_checked(config: dict[str, Any], message: str) -> None:
    with pytest.raises(zoo.ZooError, match=message):
        load(zoo.adapter("dtl", **config))


def test_backbones_without_one_stream_are_refused() -> None:
    for name, message in (("clip-vit-b32", "several"), ("dit-xl2", "condition"), ("hiera-t", "changes their width")):
        with pytest.raises(zoo.ZooError, match=f"'dtl'.*{message}"):
            zoo.load(name, "dtl", pretrained=False, device="meta")
    with pytest.raises(zoo.ZooError, match="row by row in a grid of two axes"):
        zoo.load("wav2vec2-b", "dtl+", pretrained=False, device="meta")


@pytest.mark.parametrize("method", ["dtl", "dtl+"])
def test_other_numbers_of_tokens_are_refused(method: str) -> None:
    """Prompts that flow along join behind what the first block's side has seen."""
    with pytest.raises(
        zoo.ZooError, match=r"has tokens \(2, 65\) at 'blocks.1', and the block has \(2, 68\).*Switch it off"
    ):
        load([method, zoo.adapter("vpt", deep=False, num_tokens=3)])(images())
    assert load([method, zoo.adapter("vpt", num_tokens=3)]).probe(images()) == []  # these are keys and values alone
