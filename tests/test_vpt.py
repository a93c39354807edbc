"""VPT: against the straightforward form, alone and with other methods, and what its shortcuts must not change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from straightforward_vpt import StraightSwin, StraightViT
from torch import Tensor, nn

import zoo
from vision import vpt
from zoo.adapter_base import Adapter
from zoo.errors import AttachError, CombinationError, ConfigError, MergeError
from zoo.points import Points

SWIN_NAME = "timm:swin_tiny_patch4_window7_224"
VIT: dict[str, Any] = {"depth": 3, "embed_dim": 48, "num_heads": 3}
SWIN: dict[str, Any] = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
BACKBONES: dict[str, dict[str, Any]] = {
    "vit": VIT,
    "vit average": {**VIT, "global_pool": "avg"},
    "vit registers": {**VIT, "reg_tokens": 3, "qk_norm": True, "init_values": 0.3, "scale_attn_norm": True},
    "swin": SWIN,
    # 14 x 14 tokens in windows of 4: padded; merged to 7 x 7: padded too
    "swin padded": {**SWIN, "img_size": 56},
    "swin fused": SWIN,
}
EVERY = pytest.mark.parametrize("kind", list(BACKBONES))
BOTH = pytest.mark.parametrize("kind", ["vit", "swin"])
DEEP = pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])


def make(kind: str, *adapters: Any, **options: Any) -> zoo.Model:
    """A small model in float64 in which tokens differ and prompts matter."""
    torch.manual_seed(0)
    name = SWIN_NAME if kind.startswith("swin") else "vit-micro"
    model = zoo.load(name, list(adapters), pretrained=False, num_classes=5, **{**BACKBONES[kind], **options})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, p in [*model.backbone.named_parameters(), *model.adapters.named_parameters()]:
            scale = 1.0 if key.endswith("prompt") else 0.1
            p.add_(scale * torch.randn(p.shape, generator=generator))
    if kind == "swin fused":
        for block in model.family.blocks():
            block.attn.fused_attn = True  # type: ignore[union-attr]
    return model.double()


def images(kind: str, count: int = 3) -> Tensor:
    size = BACKBONES[kind].get("img_size", 32)
    return torch.randn(count, 3, size, size, dtype=torch.double, generator=torch.Generator().manual_seed(2))


def straightforward(model: zoo.Model, names: tuple[str, ...] = ("vpt",)) -> nn.Module:
    """The paper's form on the same weights; other adapters stay on the backbone, and see prompts as tokens."""
    adapters = [model.adapters[n] for n in names]
    blocks = list(zip(*([p for k, p in a.named_parameters() if k.endswith("prompt")] for a in adapters)))
    prompts = [torch.cat(block) for block in blocks]
    others = copy.deepcopy(model)
    others.set_active(*(n for n in model.active if n not in names))
    form = StraightSwin if "Swin" in type(model.backbone).__name__ else StraightViT
    return form(others.backbone, prompts, adapters[0].deep, adapters[0].pool)  # type: ignore[arg-type]


def loss(features: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, features[0].numel(), dtype=features.dtype)
    return (features.flatten(1) @ weights).square().sum()


def same_gradients(model: zoo.Model, reference: nn.Module, x: Tensor) -> None:
    features, expected = model.features(x), reference(x)
    torch.testing.assert_close(features, expected, rtol=1e-10, atol=1e-10)
    prompts = [p for k, p in model.adapters["vpt"].named_parameters() if k.endswith("prompt")]
    found = torch.autograd.grad(loss(features), prompts)
    wanted = torch.autograd.grad(loss(expected), list(reference.prompts))  # type: ignore[arg-type]
    for a, b in zip(found, wanted):
        assert b.abs().max() > 1e-4  # prompts matter
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * b.abs().max().item())


@pytest.mark.parametrize("pool", ["patches", "all"])
@DEEP
@EVERY
def test_equals_the_straightforward_form(kind: str, deep: bool, pool: str) -> None:
    model = make(kind, zoo.adapter("vpt", num_tokens=4, deep=deep, pool=pool)).train()
    same_gradients(model, straightforward(model), images(kind))


@pytest.mark.parametrize("memory", ["low", "min"])
@pytest.mark.parametrize("pool", ["patches", "all"])
@DEEP
@BOTH
def test_gradients_do_not_depend_on_the_memory_setting(kind: str, deep: bool, pool: str, memory: str) -> None:
    model = make(kind, zoo.adapter("vpt", num_tokens=4, deep=deep, pool=pool, dropout=0.2)).train()
    found = []
    for setting in ("default", memory):
        model.memory = setting
        torch.manual_seed(3)
        found.append(torch.autograd.grad(loss(model.features(images(kind))), list(model.adapters["vpt"].parameters())))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


OTHERS: dict[str, Adapter] = {
    "lora": zoo.adapter("lora", rank=2, targets="all-linear"),
    "dora": zoo.adapter("lora", rank=2, targets="all-linear", dora=True),
    "ssf": zoo.adapter("ssf"),
    "ia3": zoo.adapter("ia3"),
    "norm": zoo.adapter("norm"),
    "bitfit": zoo.adapter("bitfit"),
    "houlsby": zoo.adapter("adapter", form="houlsby", rank=2),
    "adaptformer": zoo.adapter("adapter", form="adaptformer", rank=2, dropout=0.0),
}


@pytest.mark.parametrize("other", list(OTHERS))
@DEEP
@BOTH
def test_with_another_method(kind: str, deep: bool, other: str) -> None:
    """What other methods do to tokens they do to prompts too, as if these were ordinary tokens."""
    model = make(kind, OTHERS[other], zoo.adapter("vpt", num_tokens=4, deep=deep)).train()
    x = images(kind)
    same_gradients(model, straightforward(model), x)
    others = [p for n in model.active if n != "vpt" for p in model.adapters[n].parameters()]
    assert all(g is not None for g in torch.autograd.grad(loss(model.features(x)), others, allow_unused=True))
    assert model.probe(x) == []


@dataclass(eq=False)
class ParallelAttention(Adapter):
    """Watches the attention's input, which the prompts pass too."""

    method = "parallel-attention"

    def attach(self, points: Points) -> None:
        for point in points.select(kind="sublayer", role="attn"):
            point.parallel(nn.Linear(point.dim_in, point.dim_in))


@DEEP
@BOTH
def test_with_a_branch_beside_the_attention(kind: str, deep: bool) -> None:
    model = make(kind, ParallelAttention(), zoo.adapter("vpt", num_tokens=4, deep=deep)).train()
    same_gradients(model, straightforward(model), images(kind))


@pytest.mark.parametrize("pool", ["patches", "all"])
@DEEP
@BOTH
def test_two_at_once_are_one_with_all_prompts(kind: str, deep: bool, pool: str) -> None:
    model = make(
        kind,
        zoo.adapter("vpt", num_tokens=3, deep=deep, pool=pool),
        zoo.adapter("vpt", num_tokens=2, deep=deep, pool=pool),
    ).train()
    x = images(kind)
    expected = straightforward(model, ("vpt", "vpt-2"))(x)
    torch.testing.assert_close(model.features(x), expected, rtol=1e-10, atol=1e-10)
    assert model.probe(x) == []


@BOTH
def test_deep_and_flowing_prompts_together(kind: str) -> None:
    """Flowing prompts are tokens; the deep ones of another adapter are keys and values for them too."""
    model = make(kind, zoo.adapter("vpt", num_tokens=3, deep=False), zoo.adapter("vpt", num_tokens=2)).train()
    x = images(kind)
    assert model.probe(x) == []
    if kind == "vit":
        model.set_active("vpt")
        others = copy.deepcopy(model)
        others.set_active("vpt-2")
        flowing = StraightViT(others.backbone, list(model.adapters["vpt"].parameters()), deep=False)
        model.set_active("vpt", "vpt-2")
        torch.testing.assert_close(model.features(x), flowing(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pool", ["patches", "all"])
@DEEP
@EVERY
def test_an_image_does_not_depend_on_the_others(kind: str, deep: bool, pool: str) -> None:
    model = make(kind, zoo.adapter("vpt", num_tokens=4, deep=deep, pool=pool)).eval()
    x = images(kind, 4)
    together = model(x)
    for i in range(4):
        torch.testing.assert_close(together[i : i + 1], model(x[i : i + 1]), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(together.flip(0), model(x.flip(0)), rtol=1e-11, atol=1e-11)


@DEEP
@BOTH
def test_dropout_draws_for_each_image(kind: str, deep: bool) -> None:
    model = make(kind, zoo.adapter("vpt", num_tokens=4, deep=deep, dropout=0.5)).train()
    x = images(kind)[:1].expand(3, -1, -1, -1).clone()
    torch.manual_seed(5)
    features = model.features(x)
    assert (features[0] - features[1]).abs().max() > 1e-4
    torch.manual_seed(5)
    drawn = [m(3) for m in model.adapters["vpt"].modules() if isinstance(m, vpt.Prompt)]
    assert all(len(p) == 3 for p in drawn)
    reference = straightforward(model)
    reference.prompts = nn.ParameterList([nn.Parameter(p) for p in drawn])
    torch.testing.assert_close(features, reference(x), rtol=1e-10, atol=1e-10)
    model.eval()
    assert torch.equal(model.features(x), model.features(x))


@BOTH
def test_projected_prompts(kind: str) -> None:
    model = make(kind, zoo.adapter("vpt", num_tokens=4, project=6)).train()
    adapter = model.adapters["vpt"]
    widths = sorted({p.dim_in for p in model.points if p.kind == "tokens"})
    names = [k for k, _ in adapter.named_parameters()]
    assert [n for n in names if "project" in n] == [f"project_{w}.{k}" for w in widths for k in ("weight", "bias")]
    reference = straightforward(model)
    blocks = [m for m in adapter.modules() if isinstance(m, vpt.Prompt)]
    reference.prompts = nn.ParameterList([nn.Parameter(m(1)[0]) for m in blocks])
    x = images(kind)
    torch.testing.assert_close(model.features(x), reference(x), rtol=1e-10, atol=1e-10)
    assert model.probe(x) == []


# -- attention of ours ------------------------------------------------------------------------------------------------


@EVERY
def test_the_attention_equals_timms(kind: str) -> None:
    """The replacement without extra keys is the library's forward; switched off, the library's forward itself runs."""
    model = make(kind, zoo.adapter("vpt", num_tokens=4))
    for block in model.family.blocks():
        attention: Any = block.attn
        site = attention.forward.__self__
        keys = list(attention.state_dict())
        model.set_active()
        if kind.startswith("swin"):
            shifted = block.attn_mask
            windows = 4 if shifted is None else len(shifted)
            x = torch.randn(2 * windows, attention.window_area, block.dim, dtype=torch.double)
            settings: list[dict[str, Any]] = [{"mask": shifted}]
            site.images = 2
        else:
            x = torch.randn(2, 7, 48, dtype=torch.double)
            mask = torch.randn(7, 7, dtype=torch.double)
            settings = [{}, {"attn_mask": mask}, {"attn_mask": mask > 0}, {"is_causal": True}]
        for fused in (True, False):
            attention.fused_attn = fused
            for setting in settings:
                setting["attn_mask"] = setting["attn_mask"].fill_diagonal_(1) if "attn_mask" in setting else None
                setting = {k: v for k, v in setting.items() if v is not None}
                expected = type(attention).forward(attention, x, **setting)
                assert torch.equal(attention(x, **setting), expected)
                torch.testing.assert_close(site.extended(x, **setting), expected, rtol=1e-10, atol=1e-10)
        model.set_active("vpt")
        assert list(attention.state_dict()) == keys


def test_masks_leave_prompts_visible() -> None:
    model = make("vit", zoo.adapter("vpt", num_tokens=4)).eval()
    block: Any = model.family.blocks()[0]
    x = torch.randn(2, 6, 48, dtype=torch.double)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    expected = block.attn(x, attn_mask=causal)
    torch.testing.assert_close(block.attn(x, is_causal=True), expected)
    torch.testing.assert_close(block.attn(x, attn_mask=torch.zeros(6, 6).double().masked_fill(~causal, -1e30)), expected)
    # alone, the first token sees itself and the prompts
    torch.testing.assert_close(block.attn(x[:, :1]), expected[:, :1])


@DEEP
@BOTH
def test_removal_leaves_the_backbone_as_it_was(kind: str, deep: bool) -> None:
    model = make(kind)
    x = images(kind)
    before, state = model(x), copy.deepcopy(model.backbone.state_dict())
    model.add_adapter(zoo.adapter("vpt", deep=deep, pool="all"))
    assert not torch.equal(model(x), before)
    with model.disable():
        assert torch.equal(model(x), before)
    model.remove_adapter("vpt")
    assert torch.equal(model(x), before)
    assert list(state) == list(model.backbone.state_dict())
    assert all(torch.equal(v, state[k]) for k, v in model.backbone.state_dict().items())
    for module in model.backbone.modules():
        assert "forward" not in module.__dict__ and not module._forward_hooks and not module._forward_pre_hooks


# -- evaluation -------------------------------------------------------------------------------------------------------


def counted(model: zoo.Model, name: str = "vpt") -> Callable[[], int]:
    """How often the prompts of any block were asked for since the last call."""
    calls = [0]
    for module in model.adapters[name].modules():
        if isinstance(module, vpt.Prompt):
            module.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))

    def since() -> int:
        number, calls[0] = calls[0], 0
        return number

    return since


@BOTH
def test_in_evaluation_keys_and_values_are_computed_once(kind: str) -> None:
    other = zoo.adapter("lora", rank=2, targets=("k", "v"))
    model = make(kind, other, zoo.adapter("vpt", num_tokens=4)).eval()
    x, blocks, since = images(kind), len(model.family.blocks()), counted(model)

    def computed(expected: int, fresh: bool = True) -> None:
        """The number of blocks whose prompts were computed; the result is that of a model that keeps nothing."""
        with torch.no_grad():
            found = model(x)
        assert since() == expected
        if fresh:
            torch.testing.assert_close(found, model(x), rtol=1e-12, atol=1e-12)  # with gradients on: not from what was kept
            since()

    def first(*names: str) -> Tensor:
        return next(p for k, p in model.named_parameters() if all(n in k for n in names))

    computed(blocks)
    with torch.no_grad():
        model(x)
        model(x[:1])
    assert since() == 0
    with torch.inference_mode():
        model(x)
    assert since() == 0
    model(x)
    assert since() == blocks  # gradients are on
    computed(blocks, fresh=False)
    with torch.no_grad():
        first("vpt", "prompt").mul_(1.5)
    computed(1)
    computed(blocks)
    for name in (("lora", "lora_b"), ("backbone", "norm1.weight"), ("backbone", "qkv.bias")):
        with torch.no_grad():
            model(x)
            since()
            first(*name).add_(0.3)
        computed(1)
    with torch.no_grad():
        model(x)
        since()
    changed = {k: v + 0.1 for k, v in model.adapters["vpt"].state_dict().items()}
    model.adapters["vpt"].load_state_dict(changed)
    computed(blocks)
    with torch.no_grad():
        model(x)
        since()
    model.adapters["vpt"].load_state_dict({k: v + 0.1 for k, v in changed.items()}, assign=True)
    computed(blocks)
    with torch.no_grad():
        model(x)
        since()
    model.set_active("vpt")
    computed(blocks)
    model.set_active("lora", "vpt")
    computed(blocks)
    with torch.no_grad():
        model(x)
        since()
        first("vpt", "prompt").data.mul_(0.5)  # unseen by autograd
    model.train()
    with torch.no_grad():
        model(x)
    assert since() == blocks
    model.eval()
    computed(blocks)


def test_what_is_kept_knows_the_precision() -> None:
    model = make("vit", zoo.adapter("vpt", num_tokens=4)).float().eval()
    x = images("vit").float()
    with torch.no_grad():
        plain = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = model(x)
        again = model(x)
    assert torch.equal(plain, again) and not torch.equal(plain, low)
    torch.testing.assert_close(low.float(), plain, rtol=0.1, atol=0.1)


def test_a_copied_model_keeps_to_itself() -> None:
    model = make("vit", zoo.adapter("lora", targets=("k", "v")), zoo.adapter("vpt", num_tokens=4)).eval()
    twin = copy.deepcopy(model)
    x = images("vit")
    with torch.no_grad():
        before = model(x)
        assert torch.equal(twin(x), before)
        for adapter in twin.adapters.values():
            for p in adapter.parameters():
                p.add_(0.2)
        moved = twin(x)
        assert torch.equal(model(x), before)
    torch.testing.assert_close(twin(x), moved)
    assert not torch.equal(moved, before)


# -- per-sample adapters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@BOTH
def test_deep_prompts_per_sample_in_one_pass(kind: str, dropout: float) -> None:
    model = make(
        kind,
        zoo.adapter("vpt", num_tokens=3, dropout=dropout),
        zoo.adapter("vpt", num_tokens=2),
        zoo.adapter("lora", rank=2, targets="all-linear"),
        zoo.adapter("prefix", num_tokens=3),
    )
    model.train(dropout > 0)
    x, names = images(kind, 7), ["vpt", None, "lora", "vpt-2", "vpt", "prefix", None]
    passes = [0]
    model.backbone.patch_embed.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))  # type: ignore[union-attr]
    torch.manual_seed(4)
    together = model(x, adapters=names)
    assert passes == [1]
    parameters = [p for n in ("vpt", "vpt-2", "prefix") for p in model.adapters[n].parameters()]
    gradients = torch.autograd.grad(together.square().sum(), parameters)
    if dropout:
        assert all(g.isfinite().all() for g in gradients)
        return
    single = []
    for i, name in enumerate(names):
        model.set_active(*([name] if name else []))
        single.append(model(x[i : i + 1]))
    torch.testing.assert_close(together, torch.cat(single), rtol=1e-10, atol=1e-10)
    for p in parameters:
        p.requires_grad_(True)
    expected = torch.autograd.grad(torch.cat(single).square().sum(), parameters)
    for a, b in zip(gradients, expected):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@BOTH
def test_flowing_prompts_per_sample(kind: str) -> None:
    model = make(kind, zoo.adapter("vpt", num_tokens=3, deep=False), zoo.adapter("vpt", num_tokens=2, deep=False)).eval()
    x, names = images(kind, 4), ["vpt", "vpt-2", None, "vpt"]
    together = model(x, adapters=names)
    for i, name in enumerate(names):
        model.set_active(*([name] if name else []))
        torch.testing.assert_close(together[i : i + 1], model(x[i : i + 1]), rtol=1e-10, atol=1e-10)


# -- memory, compiler, files, errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("backbone", "options"), [("vit-b16", {"depth": 2}), ("swin-t", {"depths": (2, 2)})])
def test_keeps_no_more_than_bitfit(backbone: str, options: dict[str, Any]) -> None:
    """At real shapes; the keys and values of 50 prompts and of the whole sequence behind them are not kept twice."""
    model = zoo.load(backbone, "bitfit", pretrained=False, num_classes=0, **options)
    x = torch.zeros(2, 3, 224, 224)
    bitfit = model.saved_bytes(x)
    model.remove_adapter("bitfit")
    model.add_adapter(zoo.adapter("vpt", num_tokens=50))
    assert 0.8 * bitfit < model.saved_bytes(x) <= 1.03 * bitfit


@pytest.mark.parametrize("settings", [{}, {"deep": False}, {"pool": "all", "dropout": 0.2}], ids=["deep", "shallow", "all"])
@BOTH
def test_compiles_in_one_piece(kind: str, settings: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model = make(kind, zoo.adapter("vpt", num_tokens=4, **settings), **({"depth": 2} if kind == "vit" else {})).train()
    x = images(kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for run in (model, compiled):
        torch.manual_seed(6)
        found.append(torch.autograd.grad(run(x).square().sum(), list(model.adapters["vpt"].parameters())))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-10, atol=1e-10)
    torch._dynamo.reset()


@DEEP
@BOTH
def test_saves_and_reloads(kind: str, deep: bool, tmp_path: Path) -> None:
    adapter = zoo.adapter("vpt", num_tokens=4, deep=deep, project=5, pool="all", dropout=0.1)
    model = make(kind, adapter).eval()
    model.save_adapter(tmp_path / "saved")
    twin = make(kind)
    twin.load_state_dict({**twin.state_dict(), **{f"backbone.{k}": v for k, v in model.backbone.state_dict().items()}})
    from zoo.disk import attach, read

    twin.fingerprint = model.fingerprint
    attach(twin, read(tmp_path / "saved"))
    assert twin.adapters["vpt"].config() == adapter.config()  # type: ignore[operator]
    assert torch.equal(twin.eval()(images(kind)), model(images(kind)))


@dataclass(eq=False)
class Replace(Adapter):
    """Runs the blocks its own way."""

    method = "replace"

    def attach(self, points: Points) -> None:
        for point in points.select(kind="block"):
            point.replace(Runs())


class Runs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return self.scale * run(x)


def test_refuses_what_cannot_be_combined() -> None:
    """Flowing prompts go through the inside of a Swin block, which somebody else runs."""
    model = make("swin", Replace())
    x = images("swin")
    before = model(x)
    with pytest.raises(CombinationError, match="replace"):
        model.add_adapter(zoo.adapter("vpt", deep=False))
    assert list(model.adapters) == ["replace"] and torch.equal(model(x), before)
    model.add_adapter(zoo.adapter("vpt"))
    assert model.probe(x) == []
    both = make("swin", zoo.adapter("vpt", deep=False))
    with pytest.raises(CombinationError, match="vpt"):
        both.add_adapter(Replace())
    assert both.probe(x) == []


@pytest.mark.parametrize(
    "settings", [{"num_tokens": 0}, {"dropout": 1.0}, {"pool": "mean"}, {"project": 0}, {"num_tokens": 2.5}]
)
def test_wrong_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        zoo.adapter("vpt", **settings)


def test_refuses_an_attention_that_is_not_described() -> None:
    model = zoo.load("vit-micro", pretrained=False, num_classes=5, **VIT, attn_layer="diff")
    with pytest.raises(AttachError, match="Diff"):
        model.add_adapter("vpt")
    assert not model.adapters


def test_cannot_be_merged() -> None:
    with pytest.raises(MergeError, match="vpt"):
        make("vit", "vpt").merge()
