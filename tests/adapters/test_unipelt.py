"""UniPELT: gates that leave one method alone, that belong to one image, and where they are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zoo
from zoo.errors import AttachError, ConfigError

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}


def build(name: str = "vit-micro", adapter: Any = None, **config: Any) -> Any:
    torch.manual_seed(0)
    sizes = SWIN if name == "swin-t" else SMALL
    adapter = adapter or zoo.adapter("unipelt", **{"num_tokens": 3, "rank": 2, "reduction": 8.0, **config})
    return zoo.load(name, adapter, num_classes=5, pretrained=False, **sizes).eval()


@torch.no_grad()
def shake(model: Any, name: str = "unipelt") -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.adapters[name].parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def turn(model: Any, **gates: float) -> None:
    """Gates that do not look at the input: sigmoid(+-40) is 1, or 0."""
    for name, module in model.adapters["unipelt"].named_modules():
        place = name.rpartition(".")[2]
        kind = "adapter" if name.endswith("mlp.gate") else place if ".gates." in name else ""
        if kind in gates:
            module.weight.zero_()
            module.bias.fill_(80 * gates[kind] - 40)


@pytest.mark.parametrize("name", ["vit-micro", "swin-t"])
def test_one_gate_open_is_that_method_alone(name: str) -> None:
    images = torch.randn(3, 3, 32, 32)
    for open_gate in ("lora", "adapter"):
        model = build(name, methods=("lora", "adapter"))
        shake(model)
        gate = float(open_gate == "lora")
        turn(model, q=gate, v=gate, adapter=1 - gate)
        if open_gate == "lora":
            alone = build(name, zoo.adapter("lora", rank=2))
        else:
            alone = build(name, zoo.adapter("adapter", form="pfeiffer", reduction=8.0))
        method = alone.active[0]
        state = model.adapters["unipelt"].state_dict()
        own = {k: v for k, v in state.items() if k in alone.adapters[method].state_dict()}
        alone.adapters[method].load_state_dict(own)
        alone.head.load_state_dict(model.head.state_dict())
        torch.testing.assert_close(model(images), alone(images), rtol=1e-5, atol=1e-5)


def test_a_closed_prefix_keeps_its_share() -> None:
    """g = 0: keys and values of zeros, which is prefix tuning with a prefix of zeros and not the backbone alone."""
    images = torch.randn(3, 3, 32, 32)
    model, alone = build(methods=("prefix",)), build(adapter=zoo.adapter("prefix", num_tokens=3))
    shake(model)
    turn(model, prefix=1.0)
    alone.head.load_state_dict(model.head.state_dict())
    state = {k: v for k, v in model.adapters["unipelt"].state_dict().items() if "gates" not in k}
    alone.adapters["prefix"].load_state_dict(state)
    torch.testing.assert_close(model(images), alone(images), rtol=1e-5, atol=1e-5)
    turn(model, prefix=0.0)
    with torch.no_grad():
        for parameter in alone.adapters["prefix"].parameters():
            parameter.zero_()
    torch.testing.assert_close(model(images), alone(images), rtol=1e-5, atol=1e-5)
    with model.disable():
        assert not torch.allclose(model(images), alone(images), atol=1e-5)


@pytest.mark.parametrize("name", ["vit-micro", "swin-t"])
@pytest.mark.parametrize("central", [False, True])
def test_an_images_gates_are_its_own(name: str, central: bool) -> None:
    """Alone or among others, one after the other without gradients: nothing is kept of the image before."""
    model = build(name, central=central)
    shake(model)
    images = 2 * torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        together = model(images)
        for i in range(4):
            torch.testing.assert_close(model(images[i : i + 1]), together[i : i + 1], rtol=1e-5, atol=1e-5)


def test_beside_deep_prompts_the_gates_see_the_images() -> None:
    """LoRA changes prompts, too, by the gates of each image; against prompts as tokens that all blocks' parts pass."""
    model = build(methods=("lora", "prefix"))
    shake(model)
    model.add_adapter(zoo.adapter("vpt", num_tokens=2))
    images = torch.randn(3, 3, 32, 32)
    together = model(images)
    for i in range(3):
        torch.testing.assert_close(model(images[i : i + 1]), together[i : i + 1], rtol=1e-5, atol=1e-5)
    model.set_active("unipelt")
    assert not torch.allclose(model(images), together, atol=1e-4)


def test_refused() -> None:
    for config, message in (
        ({"methods": ()}, "expected some of prefix, lora, adapter"),
        ({"methods": ("lora", "lora")}, "each once"),
        ({"methods": ("ia3",)}, "ia3"),
        ({"num_tokens": 0}, "num_tokens is 0"),
        ({"rank": 0}, "rank is 0"),
        ({"reduction": 0.0}, "reduction is 0"),
        ({"central": True, "methods": ("lora", "adapter")}, "expected both among them"),
    ):
        with pytest.raises(ConfigError, match=message):
            zoo.adapter("unipelt", **config)  # type: ignore[arg-type]
    with pytest.raises(AttachError, match="which of them are padding"):
        zoo.load("wav2vec2-b", "unipelt", device="meta", num_classes=0)
