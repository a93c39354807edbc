"""Ladder side-tuning: gates at their ends, what is kept, what gets gradients, initial values cut out of the backbone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from method_models import SWIN, bare, images, targets
from torch import Tensor, nn
from train_parts import Stop, StopAt, easy_data, fit, tiny_model

import zoo
from zoo.adapters.parts.side import SideBlock
from zoo.errors import AttachError, ConfigError, DataError


def build(family: str = "vit", depth: int = 4, **settings: Any) -> zoo.Model:
    model = bare(family, **({"depth": depth} if family == "vit" else {})).double()
    torch.manual_seed(2)
    model.add_adapter(zoo.adapter("ladder", **{"reduction": 4, **settings}))
    return model.train()


def x() -> Tensor:
    return images().double()


def gradients(model: zoo.Model, **options: Any) -> dict[str, Tensor]:
    parameters = model.parameters_to_train()
    loss = nn.functional.cross_entropy(model(x(), **options), targets())
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("memory", ["default", "min"])
def test_running_blocks_again_gives_the_same_gradients(family: str, memory: str) -> None:
    found = []
    for rerun in (0, 1, 3, 99):
        model = build(family, rerun=rerun)
        model.memory = memory
        found.append(gradients(model))
        again = gradients(model)
        assert all(torch.equal(again[k], v) for k, v in found[-1].items())
    for other in found[1:]:
        assert all(torch.equal(other[k], v) for k, v in found[0].items())


def test_another_set_is_active_when_blocks_run_again() -> None:
    model = build()
    model.add_adapter("lora", activate=False)
    for p in model.adapters["lora"].parameters():
        p.data += 0.1
    expected = gradients(model)
    parameters = model.parameters_to_train()
    loss = nn.functional.cross_entropy(model(x()), targets())
    model.set_active("lora", "ladder", train="ladder")
    found = torch.autograd.grad(loss, list(parameters.values()))
    assert model.active == ("lora", "ladder")
    assert all(torch.equal(a, b) for a, b in zip(found, expected.values()))


def test_keeps_little_and_nothing_of_the_blocks() -> None:
    """At the default memory setting, against full fine-tuning of the same ViT (12 blocks)."""
    kept = {}
    for method, settings in (("full", {}), ("ladder", {}), ("ladder", {"rerun": 0})):
        model = zoo.load("vit-micro", pretrained=False, num_classes=5, embed_dim=192, depth=12, num_heads=3)
        model.add_adapter(zoo.adapter(method, **settings))
        graphs: list[bool] = []
        if method == "ladder":
            for block in model.backbone.blocks:
                block.mlp.register_forward_hook(lambda m, i, o, graphs=graphs: graphs.append(o.requires_grad))
        kept[method, bool(settings)] = model.saved_bytes(images())
        assert not any(graphs)
    full = kept["full", False]
    assert kept["ladder", False] < 0.10 * full
    assert kept["ladder", False] < 0.2 * kept["ladder", True] < 0.2 * 0.3 * full


def test_the_input_gets_no_gradient() -> None:
    model = build()
    image = x().requires_grad_()
    model(image).sum().backward()
    model.outputs(image, want=("tokens",))["tokens"].sum().backward()
    assert image.grad is None
    assert all(p.grad is not None for p in model.parameters_to_train().values())
    assert all(p.grad is None for p in model.backbone.parameters())


@pytest.mark.parametrize("add", [False, True])
def test_beside_another_adapter_gradients_are_exact(add: bool) -> None:
    """LoRA in the backbone learns through the ladder; central differences."""
    model = build(depth=2, add=add)
    torch.manual_seed(5)
    model.add_adapter("lora")
    for p in model.adapters["lora"].parameters():
        p.data += 0.1 * torch.randn_like(p)
    found = gradients(model)
    key = "lora/blocks.0.attn.q.lora_a"
    parameter, step = model.parameters_to_train()[key], 1e-5
    for place in ((0, 0), (1, 3)):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[place] += sign * step
                losses.append(nn.functional.cross_entropy(model(x()), targets()))
                parameter[place] -= sign * step
        assert float(found[key][place]) == pytest.approx(float(losses[0] - losses[1]) / (2 * step), rel=1e-4, abs=1e-9)


def test_it_reads_what_another_side_path_gives_back() -> None:
    """The last block's gift was dead, and the others' was read one block later, where the ladder was attached first."""
    found = []
    for order in (("ladder", "dtl"), ("dtl", "ladder")):
        for rerun in (0, 3):
            model = bare("vit", depth=2).double()
            for name in order:
                torch.manual_seed(2)
                settings = {"reduction": 4, "rerun": rerun} if name == "ladder" else {"rerun": rerun}
                model.add_adapter(zoo.adapter(name, **settings))
            torch.manual_seed(5)
            for _, p in sorted(model.adapters["dtl"].named_parameters()):
                p.data += 0.1 * torch.randn_like(p)
            assert model.train().probe(x()) == []
            found.append(gradients(model))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-11)


# -- the gates ------------------------------------------------------------------------------------------------------------


def blur(block: nn.Module) -> None:
    with torch.no_grad():
        for p in block.parameters():
            p.mul_(1.5)


def test_gates_wide_open_remove_every_rung() -> None:
    """alpha -> +inf: what leaves the blocks is not looked at."""
    model = build(alpha=1e4)
    before = model(x())
    blur(model.backbone.blocks[1])
    assert torch.equal(model(x()), before)
    model = build()
    before = model(x())
    blur(model.backbone.blocks[1])
    assert not torch.allclose(model(x()), before)


def test_one_closed_gate_leaves_one_rung() -> None:
    """alpha -> -inf at one layer: only its down-projection counts, not the start."""
    model = build(alpha=-1e4, layers=(2,))
    names = [k for k in model.adapters["ladder"].state_dict() if ".down." in k]
    assert names == ["blocks.2.down.weight", "blocks.2.down.bias"]
    before = model(x())
    blur(model.adapters["ladder"].get_submodule("blocks.0").start)
    blur(model.backbone.blocks[3])  # behind it
    assert torch.equal(model(x()), before)
    blur(model.adapters["ladder"].get_submodule("blocks.2").down)
    assert not torch.allclose(model(x()), before)


def test_layers_and_sum() -> None:
    model = build(layers=(0, 3))
    assert model.probe(x()) == []
    alone = model.features(x())
    model.remove_adapter("ladder")
    own = model.features(x())
    torch.manual_seed(2)
    model.add_adapter(zoo.adapter("ladder", reduction=4, layers=(0, 3), add=True))
    torch.testing.assert_close(model.features(x()), alone + own)


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_pools_as_the_family_does(pool: str) -> None:
    """With a mean, timm's ViT has its norm behind the pooling: the ladder takes the last block's place."""
    model = bare("vit", global_pool=pool, class_token=True)
    adapter = model.add_adapter(zoo.adapter("ladder", reduction=4))
    assert model.probe(images()) == []
    names = set(adapter.state_dict())
    assert ("blocks.1.top.up.weight" in names) == (pool == "avg") and ("norm.up.weight" in names) == (pool == "token")
    model.eval()
    compiled = model.features(images())
    assert compiled.shape == (4, 48)


def test_windows_of_the_side_net() -> None:
    """Swin: a token moves its own window; windows shifted by half meet around the edges."""
    model = zoo.load("timm:swin_tiny_patch4_window7_224", pretrained=False, num_classes=3, **SWIN)
    points = [p for p in model.points if p.name.startswith("stages.0.blocks.0.")]
    tokens = torch.randn(1, 8, 8, 6, requires_grad=True)
    for number, rows in ((0, range(4)), (1, [6, 7, 0, 1])):
        side = SideBlock(points, 6, 4, number)
        (grad,) = torch.autograd.grad(side.attend(tokens)[0, 0, 0].sum(), tokens)
        touched = grad[0].abs().sum(-1) > 0
        expected = torch.zeros(8, 8, dtype=torch.bool)
        expected[torch.tensor(list(rows))[:, None], torch.tensor(list(rows))] = True
        assert torch.equal(touched, expected)
    assert side.attend(torch.randn(2, 7, 5, 6)).shape == (2, 7, 5, 6)


def test_compiles() -> None:
    model = build(depth=2)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x()), model(x()))
    parameters = model.parameters_to_train()
    found = torch.autograd.grad(nn.functional.cross_entropy(compiled(x()), targets()), list(parameters.values()))
    for a, b in zip(found, gradients(model).values(), strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


# -- initial values -------------------------------------------------------------------------------------------------------


def best(score: Tensor, count: int) -> list[int]:
    return sorted(sorted(range(len(score)), key=lambda i: -float(score[i]))[:count])


def cut_by_hand(
    block: Any, importance: dict[str, Tensor], columns: list[int] | None, width: int
) -> tuple[dict[str, Tensor], list[int]]:
    d = block.attn.proj.in_features
    q, k, v = importance["attn.qkv"].split(d)
    if columns is None:
        columns = best(q.sum(0) * k.sum(0) * v.sum(0), width)
    made = {"norm1.weight": block.norm1.weight[columns], "norm1.bias": block.norm1.bias[columns]}
    rows = best(q.sum(1) * k.sum(1) * v.sum(1), width)
    three = [i + shift for shift in (0, d, 2 * d) for i in rows]
    made |= {"qkv.weight": block.attn.qkv.weight[three][:, columns], "qkv.bias": block.attn.qkv.bias[three]}
    out = best(importance["attn.proj"].sum(1), width)
    made |= {"proj.weight": block.attn.proj.weight[out][:, rows], "proj.bias": block.attn.proj.bias[out]}
    made |= {"norm2.weight": block.norm2.weight[out], "norm2.bias": block.norm2.bias[out]}
    hidden = best(importance["mlp.fc1"].sum(1), block.mlp.fc1.out_features * width // d)
    made |= {"fc1.weight": block.mlp.fc1.weight[hidden][:, out], "fc1.bias": block.mlp.fc1.bias[hidden]}
    last = best(importance["mlp.fc2"].sum(1), width)
    made |= {"fc2.weight": block.mlp.fc2.weight[last][:, hidden], "fc2.bias": block.mlp.fc2.bias[last]}
    return made, last


PARTS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@pytest.mark.parametrize("init", ["magnitude", "fisher"])
def test_side_blocks_cut_out_of_the_backbone(init: str) -> None:
    model = bare("vit", depth=3)
    importance = [{n: block.get_submodule(n).weight.abs() for n in PARTS} for block in model.backbone.blocks]
    if init == "fisher":
        twin = bare("vit", depth=3)  # the same weights
        twin.backbone.requires_grad_(True)
        importance = [dict.fromkeys(PARTS, torch.zeros(())) for _ in importance]
        for i in range(3):
            twin.zero_grad()
            nn.functional.cross_entropy(twin(images()[i : i + 1]), targets()[i : i + 1]).backward()
            for found, block in zip(importance, twin.backbone.blocks):
                for n in PARTS:
                    found[n] = found[n] + block.get_submodule(n).weight.grad ** 2
    adapter = model.add_adapter(zoo.adapter("ladder", reduction=4, init=init, samples=3, layers=(0, 2)))
    assert adapter.needs_calibration == (init == "fisher")
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    if init == "fisher":
        adapter.calibrate(model, [(images(), targets())])
        assert adapter.plan == {"init": "fisher"}
    columns: list[int] | None = None
    for i in (0, 2):
        made, columns = cut_by_hand(model.backbone.blocks[i], importance[i], columns, 12)
        side = adapter.get_submodule(f"blocks.{i}.side").state_dict()
        assert made.keys() == side.keys()
        assert all(torch.equal(side[k], v) for k, v in made.items())
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items())
    assert model.probe(images()) == []


def test_fisher_while_training_and_going_on(tmp_path: Any) -> None:
    def made() -> zoo.Model:
        return tiny_model(zoo.adapter("ladder", reduction=2, init="fisher", samples=8))

    whole, cut, again = made(), made(), made()
    report = fit(whole, easy_data(), out=str(tmp_path / "a"), epochs=3)
    assert report.history[-1]["loss"] < report.history[0]["loss"]
    with pytest.raises(Stop):
        fit(cut, easy_data(), out=str(tmp_path / "b"), epochs=3, callbacks=[StopAt(1, "epoch_end")])
    fit(again, easy_data(), out=str(tmp_path / "b"), epochs=3)
    for key, value in whole.parameters_to_train().items():
        assert torch.equal(value, again.parameters_to_train()[key]), key


# -- refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reduction": 0}, "reduction is 0"),
        ({"layers": ()}, "layers is empty"),
        ({"init": "svd"}, "expected one of linear, magnitude, fisher"),
        ({"temperature": 0.0}, "more than 0"),
        ({"rerun": -1}, "rerun is -1"),
        ({"samples": 0}, "samples is 0"),
        ({"layers": (9,)}, "has blocks 0 to 3"),
        ({"layers": (1, 1)}, "has blocks 0 to 3"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**settings)


def test_what_it_cannot_stand_beside() -> None:
    with pytest.raises(ConfigError, match="leaves out the last stage"):
        build("swin", layers=(0, 1))
    model = build()
    model.add_adapter(zoo.adapter("vpt", deep=False, num_tokens=2))
    with pytest.raises(AttachError, match="another adapter puts tokens in"):
        model(x())
    assert model._state.context.frame is None
    model.set_active("ladder")
    model(x())
    with pytest.raises(ConfigError, match="classification head"):
        headless = bare("vit")
        headless.reset_head(0)
        headless.add_adapter(zoo.adapter("ladder", init="fisher", reduction=4)).calibrate(
            headless, [(images(), targets())]
        )
    model = bare("vit")
    with pytest.raises(DataError, match="no data"):
        model.add_adapter(zoo.adapter("ladder", init="fisher", reduction=4)).calibrate(model, [])
