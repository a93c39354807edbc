"""Backbones whose projections are kept in int8, int4 or nf4: numbers, every method on them, files, precision, refusals."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from method_models import FAMILIES, attach, each, gradients, images, loss_of, shake
from torch import Tensor, nn

import zoo
from zoo.errors import AttachError, ConfigError, MergeError, MismatchError, ZooError
from zoo.model import quantised
from zoo.model.quantised import FORMATS, NORMAL, Int4Linear, NF4Linear, Rounded

formats = pytest.mark.parametrize("to", list(FORMATS))


def loaded(family: str = "vit", to: str | None = "nf4", **options: object) -> zoo.Model:
    name, sizes = FAMILIES[family]
    return zoo.load(name, pretrained=False, num_classes=5, seed=0, quantise=to, **{**sizes, **options})  # type: ignore[arg-type]


def on_rounded_weights(model: zoo.Model, family: str = "vit") -> zoo.Model:
    """A model whose ordinary weights are those that a quantised one has."""
    plain = loaded(family, None)
    with torch.no_grad():
        for name, module in model.backbone.named_modules():
            if isinstance(module, Rounded):
                plain.backbone.get_submodule(name).weight.copy_(module.weight)  # type: ignore[union-attr,operator]
    return plain


# -- numbers --------------------------------------------------------------------------------------------------------------


def halves(packed: Tensor) -> list[int]:
    return [half for byte in packed.flatten().tolist() for half in (byte >> 4, byte & 15)]


def test_int4_by_hand() -> None:
    """Groups of all 6 inputs; an odd width is filled up to whole bytes; a group of one sign, and one of zeros."""
    linear = nn.Linear(7, 3, bias=False)
    linear.weight.data = torch.tensor([[-1, -0.5, 0, 0.25, 1, 2, 0.8], [1, 2, 3, 4, 5, 6, 7.5], [0.0] * 7])
    small = Int4Linear.of(linear)
    torch.testing.assert_close(small._buffers["scale"][:2, 0], torch.tensor([3 / 15, 7.5 / 15]))  # type: ignore[index]
    assert small._buffers["zero"].flatten().tolist()[:2] == [5, 0]  # type: ignore[union-attr]
    numbers = halves(small._buffers["int4"])  # type: ignore[arg-type]
    # -0.5 / 0.2 = -2.5 is rounded to the even -2, 0.25 / 0.2 = 1.25 to 1
    assert numbers[:8] == [0, 3, 5, 6, 10, 15, 9, 0] and numbers[8:15] == [2, 4, 6, 8, 10, 12, 15]
    torch.testing.assert_close(small.weight[0], torch.tensor([-1, -0.4, 0, 0.2, 1, 2, 0.8]))
    torch.testing.assert_close(small.weight[1], linear.weight[1])
    assert (small.weight[2] == 0).all() and small._buffers["int4"].shape == (3, 4)  # type: ignore[union-attr]


def test_nf4_by_hand() -> None:
    """Each entry the nearest of the table times its block's largest; scales in 8 bits around their mean; the last block short."""
    torch.manual_seed(0)
    linear = nn.Linear(50, 27)
    linear.weight.data[4:7] = 0  # whole blocks of zeros
    small = NF4Linear.of(linear)
    flat = linear.weight.flatten().tolist()
    blocks = [flat[i : i + 64] for i in range(0, len(flat), 64)]
    largest = [max(map(abs, b)) for b in blocks]
    mean = sum(largest) / len(largest)
    step = max(abs(v - mean) for v in largest) / 128
    expected: list[float] = []
    for block, top in zip(blocks, largest):
        scale = mean + max(-128, min(127, round((top - mean) / step))) * step
        nearest = [min(range(16), key=lambda k: abs(NORMAL[k] - v / (top or 1))) for v in block]
        expected += [scale * NORMAL[k] for k in nearest]
    torch.testing.assert_close(small.weight.flatten(), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert len(blocks) == 22 and largest.count(0) == 1 and (small.weight[5] == 0).all()


def test_equal_to_torchao() -> None:
    """What torchao makes of the same weights, where it takes their sizes: int8 and int4 to the bit; nf4 with its short table."""
    ao = pytest.importorskip("torchao.quantization.quant_primitives", reason="torchao is not installed")
    nf4 = pytest.importorskip("torchao.quantization", reason="torchao is not installed").NF4Tensor
    torch.manual_seed(0)
    linear = nn.Linear(256, 128)
    for to, group, least, most, kind in (("int8", 256, -127, 127, "SYMMETRIC"), ("int4", 128, 0, 15, "ASYMMETRIC")):
        held = torch.int8 if to == "int8" else torch.uint8
        scale, zero = ao.choose_qparams_affine(
            *(linear.weight, ao.MappingType[kind], (1, group), held, least, most),
            eps=torch.finfo(torch.float32).eps,
        )
        numbers = ao.quantize_affine(linear.weight, (1, group), scale, zero, held, least, most)
        wide = ao.dequantize_affine(numbers, (1, group), scale, zero, held, least, most)
        torch.testing.assert_close(FORMATS[to].of(linear).weight, wide, rtol=1e-6, atol=1e-7)
    theirs = nf4.from_tensor(linear.weight.detach(), 64, 256)
    short = type("Short", (NF4Linear,), {"table": tuple(round(v, 4) for v in NORMAL)}).of(linear)  # type: ignore[attr-defined]
    assert torch.equal(short._buffers["nf4"], theirs.quantized_data)
    assert torch.equal(short._buffers["scaler"], theirs.quantized_scalers)
    torch.testing.assert_close(short.weight, theirs.get_original_weight(), rtol=1e-5, atol=1e-7)


@formats
@pytest.mark.parametrize("shape", [(24, 40), (7, 131), (5, 3), (96, 128)])
def test_products_are_exact(to: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0])
    small, x = FORMATS[to].of(linear), torch.randn(6, shape[1], requires_grad=True)
    expected = F.linear(x, small.weight, linear.bias)
    assert small.weight.shape == shape and torch.equal(small(x), expected)
    found, wanted = (torch.autograd.grad(y.square().sum(), x)[0] for y in (small(x), expected))
    assert torch.equal(found, wanted)
    step = {"int8": 1 / 254, "int4": 1 / 15, "nf4": 0.16}[to]
    wrong, largest = (float(t.detach().abs().max()) for t in (small.weight - linear.weight, linear.weight))
    assert 0 < wrong <= step * largest + 1e-6
    twin = copy.deepcopy(small)
    twin.load_state_dict({k: v.clone() for k, v in small.state_dict().items()})
    assert torch.equal(twin(x), small(x)) and "kept_in=" + to in repr(small)


@pytest.mark.parametrize(("to", "share"), [("int8", 0.52), ("int4", 0.30), ("nf4", 0.28)])
def test_bytes_of_vit_b16(to: str, share: float) -> None:
    """The whole backbone, norms, biases and embeddings in float32, against all of it in fp16."""
    model = zoo.load("vit-b16", num_classes=0, device="meta", quantise=to)
    fp16 = 2 * zoo.load("vit-b16", num_classes=0, device="meta").num_parameters()
    tensors = model.backbone.state_dict().values()
    assert fp16 == 2 * 85_798_656 and share - 0.02 < sum(t.nbytes for t in tensors) / fp16 <= share
    half = zoo.load("vit-b16", num_classes=0, device="meta", quantise=to, dtype=torch.bfloat16)
    assert sum(t.nbytes for t in half.backbone.state_dict().values()) / fp16 < share - 0.005


# -- every method ---------------------------------------------------------------------------------------------------------

ADDS = {"lora", "dora", "adapter", "ia3", "ssf", "bitfit", "norm", "prefix", "vpt", "ladder", "svfit", "vera", "fact"}
TRAINS = {"full", "partial", "lt-sft", "spt"}  # weights of projections: there are none to train


@each
def test_every_method(method: str) -> None:
    """On weights of 4 bits: the same function and gradients as on the rounded weights, or a refusal in words."""
    small = loaded()
    before = small(images())
    try:
        attach(small, method)
    except AttachError as error:
        assert "quantis" in str(error) and method not in ADDS
        small.remove_adapter(method) if method in small.adapters else None  # refused by its calibration
        assert torch.equal(small(images()), before) and not small.adapters
        return
    assert method not in TRAINS
    plain = on_rounded_weights(small)
    attach(plain, method)
    for model in (small, plain):
        shake(model, method)
    torch.testing.assert_close(small(images()), plain(images()), rtol=1e-4, atol=1e-5)
    ours, theirs = (gradients(m.train(), lambda m=m: loss_of(m)) for m in (small, plain))  # type: ignore[misc]
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-3, atol=1e-5)
    assert small.saved_bytes(images()) <= plain.saved_bytes(images())  # no float copy of a weight is kept


@pytest.mark.parametrize(("family", "to"), [("vit", "int8"), ("vit", "int4"), ("swin", "nf4")])
def test_settings(family: str, to: str) -> None:
    """Memory settings, an adapter for each sample, half precision, merging: as on other weights, or refused."""
    small = loaded(family, to)
    for name in ("lora", "ssf"):
        attach(small, name)
        shake(small, name)
    plain = on_rounded_weights(small, family)
    for name in ("lora", "ssf"):
        attach(plain, name)
        plain.set_adapter_state(name, small.adapter_state(name))
    plain.heads.load_state_dict(small.heads.state_dict())
    close = {"rtol": 1e-4, "atol": 1e-5}
    for memory in ("default", "low", "min", "off"):
        small.memory = plain.memory = memory
        ours, theirs = (gradients(m.train(), lambda m=m: loss_of(m)) for m in (small, plain))  # type: ignore[misc]
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-3, atol=1e-5)
    small.eval().memory = plain.eval().memory = "default"
    route = ["lora", None, "ssf", "lora"]
    torch.testing.assert_close(small(images(), adapters=route), plain(images(), adapters=route), **close)
    with pytest.raises(MergeError, match=f"is kept in {to}, into which nothing can be merged"):
        small.merge()
    with torch.no_grad():
        expected, half = small(images()), copy.deepcopy(small).to(torch.bfloat16)
        found = half(images().to(torch.bfloat16)).float()
        assert float((found - expected).abs().max()) < 0.1 * float(expected.abs().max())


@formats
def test_compiled(to: str) -> None:
    """In one graph, with its gradient."""
    torch.manual_seed(0)
    layer, x = FORMATS[to].of(nn.Linear(40, 24)), torch.randn(5, 40, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    ours, theirs = (torch.autograd.grad(run(x).square().sum(), x)[0] for run in (compiled, layer))
    torch._dynamo.reset()
    torch.testing.assert_close(ours, theirs)


# -- files ----------------------------------------------------------------------------------------------------------------


@formats
def test_saved_and_loaded(to: str, tmp_path: Path) -> None:
    """An adapter brings the format of its backbone's weights; the backbone may also be a folder of its own."""
    small = loaded("vit", to)
    attach(small, "lora")
    shake(small, "lora")
    small.eval().save_adapter(tmp_path / "out")
    again = zoo.load(adapter=tmp_path / "out", pretrained=False, seed=0)
    assert again.quantised == to and torch.equal(again(images()), small(images()))
    named = zoo.load("vit-micro", tmp_path / "out", pretrained=False, seed=0, **FAMILIES["vit"][1])
    assert torch.equal(named(images()), small(images()))
    other = "int4" if to != "int4" else "nf4"
    with pytest.raises(MismatchError, match=f"quantised to {to}, and this model's is quantised to {other}"):
        zoo.load(adapter=tmp_path / "out", pretrained=False, seed=0, quantise=other)
    zoo.save_backbone(small, tmp_path / "backbone")
    folder = zoo.load(tmp_path / "backbone", tmp_path / "out")
    assert torch.equal(folder(images()), small(images()))
    with pytest.raises(ConfigError, match="not quantised on the way"):
        zoo.load(str(tmp_path / "backbone"), quantise="int8")
    whole = loaded("vit", None)
    attach(whole, "lora")
    whole.save_adapter(tmp_path / "whole")
    with pytest.raises(MismatchError, match=f"is not quantised, and this model's is quantised to {to}"):
        zoo.load(adapter=tmp_path / "whole", pretrained=False, seed=0, quantise=to)


def test_same_as_quantised_afterwards() -> None:
    """`zoo.load(quantise=)` and `zoo.quantise` make the same numbers, whatever precision they are used in."""
    small, copied = loaded(), zoo.quantise(loaded("vit", None), to="nf4")
    assert small.fingerprint == copied.fingerprint
    half = loaded(dtype=torch.bfloat16)
    assert half.fingerprint == small.fingerprint and half.dtype == torch.bfloat16
    own = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    model = zoo.load(own, "lora", quantise="int4", example=torch.randn(2, 8))
    assert isinstance(model.backbone[0], Int4Linear) and isinstance(own[0], nn.Linear)  # type: ignore[index]
    assert not isinstance(own[0], Rounded) and model.quantised == "int4"  # the user's network stays as it is


def test_a_damaged_file(tmp_path: Path) -> None:
    small = loaded()
    attach(small, "lora")
    small.save_adapter(tmp_path / "out")
    file = tmp_path / "out" / "adapter_config.json"
    config = json.loads(file.read_text())
    for value, match in ((3, "backbone.quantised"), ("../nf4", "backbone.quantised"), ("nf5", "'nf4'")):
        config["backbone"]["quantised"] = value
        file.write_text(json.dumps(config))
        with pytest.raises(ZooError, match=match):
            zoo.load(adapter=tmp_path / "out", pretrained=False)


def test_refused() -> None:
    with pytest.raises(ZooError, match=r"quantise is 'int3'.*int8, int4, nf4"):
        loaded("vit", "int3")
    with pytest.raises(ConfigError, match="spelled quantise here: quantise='nf4'"):
        zoo.load("vit-micro", quantize="nf4")
    model = loaded("vit", None)
    with pytest.raises(ConfigError, match=r"cannot be kept in 'nf5'. .*'nf4'"):
        zoo.quantise(model, to="nf5")
    with pytest.raises(ConfigError, match=r"only nn\.Linear is kept in nf4"):
        zoo.quantise(model, "patch_embed", to="nf4")
    for none in ([], (), ""):
        with pytest.raises(ConfigError, match="nothing to quantise"):
            zoo.quantise(model, none, to="nf4")
    with torch.no_grad():
        model.backbone.blocks[1].mlp.fc1.weight[0, 0] = float("nan")  # type: ignore[index,union-attr]
    with pytest.raises(ConfigError, match=r"'blocks.1.mlp.fc1' holds NaN or Inf"):
        zoo.quantise(model, to="int4")
    small = loaded()
    with pytest.raises(ConfigError, match="NF4Linear; only"):
        zoo.quantise(small)
    with pytest.raises(ConfigError, match=r"has nf4 weights. Make weights sparse first"):
        zoo.sparsify(small, "up")
    both_ways = zoo.quantise(zoo.quantise(model, "q,k,v", to="nf4"), "down", to="int8")
    assert {type(p.module).__name__ for p in both_ways.points.linears("q,down")} == {"NF4Linear", "Int8Linear"}
    assert quantised.group_of(131) == 131 and quantised.group_of(192) == 96 and quantised.group_of(768) == 128


def test_peft_s_files_say_beside_what_they_were_trained(tmp_path: Path) -> None:
    model = loaded("vit", "nf4")
    attach(model, "lora")
    with pytest.warns(UserWarning, match="rounded to nf4"):
        zoo.to_peft(model, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_what_scores_weights_is_refused_before_it_is_attached() -> None:
    model = loaded()
    with pytest.raises(AttachError, match=r"that of 'blocks.0.attn.q' is kept in nf4, which has none"):
        model.add_adapter(zoo.adapter("spt", budget=0.001))
    assert not model.adapters
