"""Networks that no family describes give, once wrapped, what they gave before: or they are refused by name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo.errors import ConfigError


def batch(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Two projections, called as a function says."""

    def __init__(self, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.fc = nn.Linear(8, 8), nn.Linear(8, 5)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def changed(model: zoo.Model) -> zoo.Model:
    """Adapters away from their start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.adapters.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def in_place(net: Any, x: Tensor) -> Tensor:
    y = net.fc(net.a(x).relu())
    y.mul_(0.1)
    return y  # type: ignore[no-any-return]


def one_column(net: Any, x: Tensor) -> Tensor:
    y = net.fc(net.a(x).relu())
    y[:, 0] = 0
    return y  # type: ignore[no-any-return]


def reads_its_head(net: Any, x: Tensor) -> Tensor:
    return net.fc(net.a(x).view(-1, net.fc.in_features))  # type: ignore[no-any-return]


@pytest.mark.parametrize("call", [in_place, one_column, reads_its_head])
@torch.no_grad()
def test_a_classifier_that_is_not_the_last_word(call: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A change of the logits in place was lost (off by 2.9); a forward that reads its classifier broke with AttributeError."""
    x, net = batch(4, 8), Net(call)
    own = net(x)
    with caplog.at_level(logging.WARNING, logger="zoo"):
        model = zoo.load(net, "lora", example=x)
    torch.testing.assert_close(model(x), own)
    assert model.num_classes == 0 and "its own output comes out" in caplog.text and "'fc'" in caplog.text
    live = changed(model)(x)
    torch.testing.assert_close(model.merge()(x), live)
    wide = zoo.load(Net(call), example=x, num_classes=3)
    assert wide(x).shape == (4, 3)
    with pytest.raises(zoo.errors.MergeError, match="no place for a classifier"):
        wide.merge()


@torch.no_grad()
def test_a_classifier_that_is_the_last_word_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    x, net = batch(4, 8), Net(lambda net, x: net.fc(net.a(x).relu()))
    own = net(x)
    model = zoo.wrap(net, example=x)
    assert model.num_classes == 5 and not caplog.text
    torch.testing.assert_close(model(x), own)
    torch.testing.assert_close(model.merge()(x), own)


@pytest.mark.parametrize("head", ["fc", "a"])
@torch.no_grad()
def test_a_named_head_that_is_not_last_is_refused(head: str) -> None:
    """`head="fc"` in front of a softmax, or a layer of the middle, was believed: probabilities came out off by 2."""
    x, net = batch(4, 8), Net(lambda net, x: net.fc(net.a(x).relu()).softmax(-1))
    own = net(x)
    with pytest.raises(ConfigError, match=f"head='{head}'.*does not give what the network itself gives"):
        zoo.wrap(net, example=x, head=head)
    assert torch.equal(net(x), own)  # nothing was taken off


@torch.no_grad()
def test_a_subclass_of_timm_with_a_forward_of_its_own() -> None:
    """Its scaling of images and outputs was lost: off by 10.6."""
    timm = pytest.importorskip("timm")

    class Mine(timm.models.VisionTransformer):  # type: ignore[misc, name-defined]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward((x - 0.5) * 2) * 0.1  # type: ignore[no-any-return]

    torch.manual_seed(0)
    net = Mine(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=5).eval()
    x = batch(2, 3, 32, 32)
    own = net(x)
    torch.testing.assert_close(zoo.wrap(net, example=x)(x), own)


@torch.no_grad()
def test_a_second_classifier_of_timm() -> None:
    """VOLO adds the best of its patches' logits: by name they were dropped, and a merge made others."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model("volo_d1_224", img_size=32, num_classes=5).eval()
    for p in net.parameters():
        p.add_(0.05 * torch.randn_like(p))
    x = batch(2, 3, 32, 32)
    own = net(x)
    model = zoo.wrap(net, example=x)
    torch.testing.assert_close(model(x), own)
    torch.testing.assert_close(model.merge()(x), own)
    new = zoo.load("timm:volo_d1_224", pretrained=False, num_classes=5, img_size=32)
    torch.testing.assert_close(new.merge()(x), new(x))


@pytest.mark.parametrize("name", ["efficientvit_m0", "repvit_m0_9", "caformer_s18"])
@torch.no_grad()
def test_classifiers_of_timm_that_are_no_plain_projection(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A norm inside of the classifier was dropped (off by 0.06), and other classifiers vanished without a word."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model(name)
    x = batch(2, 3, *timm.data.resolve_model_data_config(net)["input_size"][1:])
    net.train()(x)
    net.eval()
    own = net(x)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    with caplog.at_level(logging.WARNING, logger="zoo"):
        named = zoo.load(f"timm:{name}", "lora", checkpoint=tmp_path / "net.pth")
    assert "its own output comes out" in caplog.text
    torch.testing.assert_close(named(x), own)
    changed(named).save_adapter(tmp_path / "out")
    again = zoo.load(f"timm:{name}", tmp_path / "out", checkpoint=tmp_path / "net.pth")
    torch.testing.assert_close(again(x), named(x))
    torch.testing.assert_close(again.merge()(x), named(x), rtol=1e-4, atol=1e-4)
    assert (
        zoo.load(f"timm:{name}", pretrained=False, num_classes=0)(x).shape[-1] != 5
    )  # features, where these are asked for


@torch.no_grad()
def test_a_dense_output_comes_out_as_it_is() -> None:
    """Logits for each place were averaged over places."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        num_encoder_blocks=1, depths=[1], sr_ratios=[2], hidden_sizes=[16], num_attention_heads=[2], patch_sizes=[7],
        strides=[4], mlp_ratios=[2], decoder_hidden_size=16, num_labels=5,
    )  # fmt: skip
    net = transformers.SegformerForSemanticSegmentation(config).eval()
    x = batch(2, 3, 32, 32)
    own = net(x).logits
    model = zoo.load(net, "lora", example=x)
    assert own.shape == (2, 5, 8, 8)
    torch.testing.assert_close(model(x), own)


@torch.no_grad()
def test_a_single_number_comes_out() -> None:
    x, net = batch(4, 8), Net(lambda net, x: net.a(x).mean())
    own = net(x)
    torch.testing.assert_close(zoo.load(net, "lora", example=x)(x), own)


def test_a_reload_of_a_network_needs_its_example(tmp_path: Path) -> None:
    """Without the example no classifier is taken off, and the refusal spoke of other weights."""
    x = batch(4, 8)

    def net() -> Net:
        return Net(lambda net, x: net.fc(net.a(x).relu()))

    model = changed(zoo.load(net(), "lora", example=x))
    model.save_adapter(tmp_path / "out")
    with pytest.raises(zoo.errors.MismatchError, match=r"zoo.load\(network, adapter=..., example=batch\)"):
        zoo.load(net(), tmp_path / "out")
    torch.testing.assert_close(zoo.load(net(), tmp_path / "out", example=x)(x), model(x))


@torch.no_grad()
def test_an_adapter_names_the_backbone_of_a_checkpoint(tmp_path: Path) -> None:
    """`zoo.load(adapter=folder, checkpoint=file)` handed the file to timm, which does not take it."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net, x = timm.create_model("resnet10t").eval(), batch(2, 3, 64, 64)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    model = changed(zoo.load("timm:resnet10t", "lora", checkpoint=tmp_path / "net.pth"))
    model.save_adapter(tmp_path / "out")
    again = zoo.load(adapter=tmp_path / "out", checkpoint=tmp_path / "net.pth")
    torch.testing.assert_close(again(x), model(x))


@torch.no_grad()
def test_a_hook_of_the_users_on_a_point() -> None:
    """A hook acts in front of the adapter; merged, it would act behind it (off by 1.5)."""
    x, net = batch(4, 8), Net(lambda net, x: net.fc(net.a(x).relu()))
    net.a.register_forward_hook(lambda module, args, output: output * 3)
    own = net(x)
    model = zoo.load(net, "lora", example=x)
    torch.testing.assert_close(model(x), own)
    with pytest.raises(zoo.errors.MergeError, match=r"'a'.*a forward hook of the user's stands on it"):
        model.merge()


@pytest.mark.parametrize("method", ["lora", "ssf"])
def test_a_weight_that_is_called_and_read(method: str) -> None:
    """A merge changed what is read there, too, which the live adapter does not (off by 4.1)."""
    x = batch(4, 8)
    net = Net(
        lambda net, x: net.fc(nn.functional.linear(net.a(x), net.a.weight.t()).relu() + net.a.weight.dtype.itemsize)
    )
    with pytest.raises(zoo.errors.SelectionError, match=r"'1.a' cannot be chosen.*is also read besides its call"):
        zoo.load(nn.Sequential(nn.Linear(8, 8), net), zoo.adapter(method, targets="1.a"), example=x)


def test_a_network_that_is_wrapped_already(tmp_path: Path) -> None:
    """The second model had no classifier, and its training moved the output of the first."""
    x, net = batch(4, 8), Net(lambda net, x: net.fc(net.a(x).relu()))
    first = zoo.load(net, "lora", example=x)
    for again in (net, nn.Sequential(net), net.a):
        with pytest.raises(ConfigError, match="in a model of zoo already"):
            zoo.load(again, "lora", example=x)
    assert zoo.load(first.merge(), "lora", example=x).num_classes == 5


def test_rows_that_are_chosen_by_their_values() -> None:
    """One good batch stood for all: later the rows of the others went through the wrong adapter (off by 0.9)."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.fc = nn.Linear(8, 16), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            k = x.abs().sum(-1) > 0
            o = x.new_zeros(*x.shape[:2], 16)
            o[k] = self.a(x[k])
            return self.fc(o.mean(1))  # type: ignore[no-any-return]

    x = batch(4, 3, 8)
    model = zoo.load(Packed(), "lora", example=x)
    for _ in range(2):
        with pytest.raises(ConfigError, match="chooses rows by their values"):
            model(x, adapters=["lora", None, None, None])


def test_what_cannot_be_adapted_is_called_by_its_name() -> None:
    """Complex weights were called quantised, and a bare projection was told that it had none."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.complex64))
    with pytest.raises(zoo.errors.SelectionError, match=r"of complex numbers \(complex64\)"):
        zoo.load(net, zoo.adapter("lora", targets="1"))
    with pytest.raises(zoo.errors.AttachError, match=r"itself such a module: in an nn.Sequential"):
        zoo.load(nn.Linear(4, 4), "lora", example=batch(2, 4))


@torch.no_grad()
def test_scales_of_convolutions_without_a_batch() -> None:
    """Of one image (C, H, W) the rows were scaled in place of the channels (off by 1.8)."""
    net, x = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 7, 3, padding=1)), batch(2, 3, 6, 6)
    model = zoo.load(net, zoo.adapter("ssf", init_std=0.3), example=x)
    torch.testing.assert_close(model(x[0]), model(x)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.merge()(x), model(x), rtol=1e-4, atol=1e-5)
