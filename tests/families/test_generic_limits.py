"""Networks that nobody described, at the edges: bad modules, weights in two places, samples in rows, memory, speed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo.errors import AttachError, ConfigError, SelectionError
from zoo.families.generic.micro import Micro


class Tied(nn.Module):
    """An embedding that is also the output, and one parameter in two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 8)
        self.q_proj, self.twin, self.v_proj = (nn.Linear(8, 8) for _ in range(3))
        self.twin.weight = self.q_proj.weight
        self.norm, self.after = nn.LayerNorm(8), nn.LayerNorm(8)
        self.after.bias = self.norm.bias
        self.lm_head = nn.Linear(8, 10, bias=False)
        self.lm_head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.v_proj(self.twin(self.q_proj(self.emb(ids))))
        return self.lm_head(self.after(self.norm(x)))  # type: ignore[no-any-return]


def test_tied_weights_are_refused_by_name() -> None:
    """A merge at one of the places would change the other, which the live adapter does not."""
    ids = torch.arange(6).view(2, 3)
    model = zoo.load(Tied(), "lora", example=ids)
    assert [p.name for p in model.points] == ["v_proj"] and model.probe(ids) == []
    for name, other in (("q_proj", "twin.weight"), ("lm_head", "emb.weight"), ("after", "norm.bias")):
        with pytest.raises(SelectionError, match=f"'{name}' cannot be chosen.*is tied: it is '{other}', too"):
            model.add_adapter(zoo.adapter("bitfit", targets=name), "other")


def test_a_module_that_is_called_twice_is_one_place() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = self.again = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.again(torch.tanh(self.fc1(x)))  # type: ignore[no-any-return]

    x = torch.randn(3, 8)
    model = zoo.load(Twice(), "lora", example=x).eval()
    nn.init.normal_(model.adapters["lora"].module_at("fc1").lora_b)
    assert len(model.points) == 1
    torch.testing.assert_close(model.merge()(x), model(x), rtol=1e-4, atol=1e-5)


def test_bad_modules_and_examples() -> None:
    x = torch.randn(2, 4)
    for module, example, words in (
        (nn.Sequential(nn.ReLU()), x, "has no parameters"),
        (nn.Sequential(nn.Embedding(3, 4)), torch.tensor([[1]]), "has no projection, convolution or norm"),
        (nn.Bilinear(4, 4, 2), x, r"does not run.*missing 1 required.*given a tensor \(2, 4\).*example=\(x, y\)"),
        (nn.Sequential(nn.Linear(4, 4)), x.to("meta"), r"The example is on meta, the network on cpu.*to\('cpu'\)"),
        (nn.Sequential(nn.Linear(4, 4)), {"nothing": x}, "does not run"),
        (nn.Linear, x, "takes a network|built network"),
        ("resnet", x, "Name backbones to zoo.load"),
    ):
        with pytest.raises(zoo.ZooError, match=words):
            zoo.wrap(module, example=example)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a model of zoo already"):
        zoo.wrap(zoo.wrap(Micro(), example=torch.zeros(1, 3, 32, 32)))
    with pytest.raises(ConfigError, match=r"name='a/b'"):
        zoo.wrap(Micro(), name="a/b")
    with pytest.raises(ConfigError, match="'img_size' is an option of a library's builder"):
        zoo.load(Micro(), "lora", img_size=3)


@pytest.mark.filterwarnings("ignore")
def test_quantised_projections() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)
            self.fc2.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc1(x) @ self.fc2.weight.float()  # type: ignore[no-any-return]

    model = zoo.wrap(Half(), example=torch.randn(2, 4))
    with pytest.raises(SelectionError, match=r"'fc2' cannot be chosen.*quantised \(int8\)"):
        model.add_adapter(zoo.adapter("lora", targets="fc2"))
    normed = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    model = zoo.load(normed, "lora", example=torch.randn(2, 4))
    assert [p.name for p in model.points] == ["1"] and "made of other parameters" in model.points.refused["0"]


@pytest.mark.filterwarnings("ignore")
def test_projections_of_torch_s_own_quantisation_are_named() -> None:
    """'all-linear' left them out without a word: they hold no parameter, and a child with packed numbers."""
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    light = torch.ao.quantization.quantize_dynamic(network, {"0": torch.ao.quantization.default_dynamic_qconfig})
    model = zoo.wrap(light, example=torch.randn(2, 4))
    assert [p.name for p in model.points] == ["2"] and "quantised" in model.points.refused["0"]


def test_networks_inside_of_torch_s_own_containers() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(ConfigError, match=r"a graph of TorchScript.*Wrap the network that it was made of"):
        zoo.wrap(torch.jit.trace(network, torch.randn(2, 4)), example=torch.randn(2, 4))
    with pytest.raises(ConfigError, match=r"stands in DataParallel.*\(module\.module\)"):
        zoo.wrap(nn.DataParallel(network), example=torch.randn(2, 4))


def test_lighter_weights_of_a_wrapped_network(tmp_path: Path) -> None:
    """int8 weights, and a folder that cannot be: nothing here builds the network again."""
    x = torch.randn(3, 3, 32, 32)
    model = zoo.load(Micro(), "lora", example=x, name="mine").eval()
    light = zoo.quantise(model)
    assert light.points["layers.0.attn.to_q"].module is not None and light.active == ("lora",)
    torch.testing.assert_close(light.eval()(x), model(x), rtol=0.1, atol=0.1)
    with pytest.raises(ConfigError, match="its user built, and nothing here builds it again"):
        zoo.save_backbone(light, tmp_path / "out")


def test_a_class_that_changes_its_weight_first() -> None:
    """What is added to the output is right; a merge, or another weight in its place, would not be."""

    class Doubling(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.linear(input, self.weight / self.weight.norm(), self.bias)

    x = torch.randn(2, 4)
    model = zoo.load(nn.Sequential(Doubling(4, 4)), "lora", example=x)
    with pytest.raises(zoo.errors.MergeError, match="the class Doubling does not use its weight as it stands"):
        model.merge()
    with pytest.raises(AttachError, match="another weight cannot take its place"):
        model.add_adapter(zoo.adapter("lora", dora=True), "dora")


def test_scales_behind_norms_of_images() -> None:
    """A norm over (B, C, H, W) is scaled along its channels, also where the width has as many."""
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.GroupNorm(2, 6), nn.Flatten())
    x = torch.randn(2, 3, 6, 6)
    model = zoo.load(net, zoo.adapter("ssf", init_std=0.3), example=x).eval()
    assert model.probe(x) == []
    torch.testing.assert_close(model.merge()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_weights_that_are_stored_as_in_by_out(dora: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=8)
    ids = torch.arange(12).view(2, 6)
    model = zoo.load(transformers.GPT2Model(config), zoo.adapter("lora", dora=dora, targets="all-linear"), example=ids)
    assert {p.role for p in model.points if p.kind == "linear"} == {"qkv", "o", "up", "down"}
    assert model.probe(ids) == []
    with torch.no_grad():
        for p in model.adapters.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.eval()
    merged = model.merge()
    torch.testing.assert_close(merged(ids).last_hidden_state.mean(1), model(ids), rtol=1e-4, atol=1e-5)
    assert type(merged) is transformers.GPT2Model


def test_inputs_by_name_and_what_comes_out() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20
    )
    batch = {"input_ids": torch.arange(8).view(2, 4), "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}
    net = transformers.BertModel(config)
    model = zoo.load(net, "lora", example=batch, num_classes=3).eval()
    assert model(**batch).shape == (2, 3) and torch.equal(model(*batch.values()), model(**batch))
    with torch.no_grad(), model.disable():
        assert torch.equal(model.features(**batch), net(**batch).pooler_output)
    field = zoo.wrap(transformers.BertModel(config), example=batch, features="last_hidden_state")
    assert field.features(**batch).shape == (2, 16)
    with pytest.raises(ConfigError, match=r"features='nothing' is no field.*last_hidden_state"):
        zoo.wrap(transformers.BertModel(config), example=batch, features="nothing")


class SequenceFirst(nn.Module):
    """Tokens stand in rows, samples in columns."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.v_proj(self.q_proj(x.transpose(0, 1)).tanh()).transpose(0, 1).mean(1)  # type: ignore[no-any-return]


def test_adapters_for_each_sample_or_a_refusal() -> None:
    x = torch.randn(4, 3, 32, 32)
    model = zoo.load(Micro(), "lora", example=x)
    model.add_adapter("lora", "b", activate=False)
    with torch.no_grad():
        for p in model.adapters.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.eval()
    routed = model(x, adapters=["lora", None, "b", "lora"])
    for i, name in enumerate(("lora", None, "b", "lora")):
        model.set_active(*([name] if name else []))
        torch.testing.assert_close(routed[i], model(x)[i], rtol=1e-4, atol=1e-5)
    turned = zoo.load(SequenceFirst(), "lora", example=torch.randn(2, 6, 4))
    turned.add_adapter("lora", "b", activate=False)
    with pytest.raises(ConfigError, match=r"rows at 'q_proj' do not belong to one sample each"):
        turned(torch.randn(2, 6, 4), adapters=["lora", "b"])


@pytest.mark.parametrize("setting", ["default", "low", "min", "off"])
def test_memory_settings_change_no_gradient(setting: str) -> None:
    x = torch.randn(3, 3, 32, 32)
    torch.manual_seed(0)
    model = zoo.load(Micro(), zoo.adapter("lora", targets="all-linear"), example=x, memory="off").train()
    nn.init.normal_(model.adapters["lora"].module_at("layers.0.mlp.fc2").lora_b)
    found: list[dict[str, Tensor]] = []
    kept = []
    for memory in ("off", setting):
        model.memory = memory
        model.zero_grad()
        model(x).square().sum().backward()
        found.append({k: p.grad.clone() for k, p in model.parameters_to_train().items() if p.grad is not None})
        kept.append(model.saved_bytes(x))
    assert all(torch.equal(found[1][k], v) for k, v in found[0].items())
    assert kept[1] < kept[0] or setting == "off"


def test_the_pass_can_be_left_out() -> None:
    x = torch.randn(2, 3, 32, 32)
    calls: list[Any] = []
    net = Micro()
    net.register_forward_hook(lambda *_: calls.append(1))
    model = zoo.load(net, "lora", example=x, probe=False)
    assert not calls and model.num_classes == 0  # nothing was run, so no output is known to be a classifier's
    zoo.load("timm:resnet18", "lora", probe=False, device="meta")


def test_attaching_to_a_billion_parameters() -> None:
    """On the meta device, with the pass: within two seconds of an idle machine; the bound here is for a busy one."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(2048, 2048) for _ in range(4))
            self.fc1, self.fc2, self.norm = nn.Linear(2048, 8192), nn.Linear(8192, 2048), nn.LayerNorm(2048)

        def forward(self, x: Tensor) -> Tensor:
            x = self.o_proj(self.q_proj(x) * self.k_proj(x) + self.v_proj(x))
            return self.norm(self.fc2(self.fc1(x)))  # type: ignore[no-any-return]

    with torch.device("meta"):
        net = nn.Sequential(*(Layer() for _ in range(20)))
    assert sum(p.numel() for p in net.parameters()) > 1e9
    start = time.process_time()
    model = zoo.load(net, "lora", example=torch.zeros(1, 16, 2048))
    assert time.process_time() - start < 2
    assert model.family.proven and len(model.points.select("q,v")) == 40
