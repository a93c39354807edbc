"""Conformer adapters: the equation written out in each form, running statistics, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from zoo.errors import AttachError, ConfigError

pytest.importorskip("transformers")

SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 96, "max_length": 40, "num_mel_bins": 32}
BODY = "audio_spectrogram_transformer"


def ast(adapter: Any = None, **options: Any) -> zoo.Model:
    """A small AST in double precision, its adapter away from the start if there is one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = zoo.load("ast-micro", pretrained=False, **{"num_classes": 3, **SMALL, **options}).double()
        if adapter is not None:
            shake(model, model.add_adapter(adapter).double())
    return model.eval()


@torch.no_grad()
def shake(model: zoo.Model, adapter: Any) -> None:
    for value in [*adapter.parameters(), *(b for b in adapter.buffers() if b.is_floating_point())]:
        value += 0.2 * torch.rand_like(value)


def spectrograms(count: int = 3) -> Tensor:
    return torch.randn(count, 40, 32, generator=torch.Generator().manual_seed(1)).double()


def module_written_out(part: Any, x: Tensor, training: bool) -> Tensor:
    """A(x) by sums over shifted tokens, without a convolution or a batch norm of torch."""
    if part.adapter_norm is not None:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        x = x * part.adapter_norm.weight + part.adapter_norm.bias
    both = x @ part.adapter_down.weight.T + part.adapter_down.bias
    value, gate = both.chunk(2, -1)
    hidden = value * gate.sigmoid()
    kernel = part.adapter_conv.weight[:, 0]  # (c, K)
    half, count = kernel.shape[1] // 2, x.shape[1]
    mixed = torch.zeros_like(hidden) + part.adapter_conv.bias
    for k in range(kernel.shape[1]):
        for token in range(count):
            source = token + k - half
            if 0 <= source < count:
                step = torch.zeros_like(mixed)
                step[:, token] = kernel[:, k] * hidden[:, source]
                mixed = mixed + step
    if part.moments is not None:
        mean, variance = part.moments.mean, part.moments.variance
        if training:
            mean, variance = mixed.mean((0, 1)), mixed.var((0, 1), correction=0)
        mixed = (mixed - mean) / (variance + 1e-5).sqrt() * part.moments.weight + part.moments.bias
    return (mixed * mixed.sigmoid()) @ part.adapter_up.weight.T + part.adapter_up.bias


def written_out(model: zoo.Model, config: Any, x: Tensor) -> Tensor:
    """(B, d) from the library's modules."""
    body: Any = model.backbone.get_submodule(BODY)
    u = body.embeddings(x)
    for i, layer in enumerate(body.layers):
        for role, norm, branch in (
            ("attn", layer.layernorm_before, lambda t, m=layer: m.attention(t, None)[0]),
            ("mlp", layer.layernorm_after, layer.mlp),
        ):
            part = model.adapters["conformer"]._modules["blocks"]._modules[str(i)]._modules.get(role)  # type: ignore[union-attr,index]
            if not hasattr(part, "adapter_down"):
                u = u + branch(norm(u))
                continue
            source = norm(u)
            if config.form == "sequential" and config.place == "before":
                u = u + branch(source + module_written_out(part, source, model.training))
                continue
            h = branch(source)
            source = h if config.form == "sequential" else source
            out = module_written_out(part, source, model.training) + (source if config.residual else 0)
            u = u + out if config.form == "sequential" else u + h + out
    return body.layernorm(u)[:, :2].mean(1)


CASES: list[dict[str, Any]] = [
    {},
    {"form": "sequential", "targets": None, "norm": False},
    {"form": "sequential", "place": "before", "batch_norm": False},
    {"residual": True, "targets": "attn"},
    {"form": "sequential", "residual": False},
]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c.values())) or "default")
def test_against_the_equations(case: dict[str, Any], training: bool) -> None:
    config = zoo.adapter("conformer", rank=3, kernel=5, **case)
    model, x = ast(config).train(training), spectrograms()
    parameters = dict(model.adapters["conformer"].named_parameters())
    found = model.features(x)
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    ours = torch.autograd.grad((found * weights).sum(), list(parameters.values()))
    buffers = {k: b.clone() for k, b in model.adapters["conformer"].named_buffers()}
    with model.disable():
        for p in parameters.values():
            p.requires_grad_(True)
        expected = written_out(model, config, x)
        theirs = torch.autograd.grad((expected * weights).sum(), list(parameters.values()))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for name, a, b in zip(parameters, ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    assert (len(buffers) > 0) == config.batch_norm


def test_starts_as_nothing_and_counts() -> None:
    model, x = ast(), spectrograms()
    before = model(x)
    model.add_adapter(zoo.adapter("conformer", rank=3, kernel=5))
    model.double()
    assert torch.equal(model(x), before) and torch.equal(model.train()(x), before)
    d, c, k = 48, 3, 5
    assert model.num_parameters(trainable=True, head=False) == 2 * (
        2 * d + 2 * c * (d + 1) + c * (k + 1) + 2 * c + d * (c + 1)
    )
    assert zoo.adapter("conformer").rank_at(768) == 8 and zoo.adapter("conformer", reduction=1e4).rank_at(768) == 1


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 252_288),
        ({"reduction": 64.0}, 364_608),
        ({"norm": False}, 233_856),
        ({"targets": ("attn", "mlp")}, 504_576),
    ],
)
def test_counts_of_the_paper(settings: dict[str, Any], count: int) -> None:
    """`norm=False` has none of the layer norms that the authors' code counts and does not use, 12 * 2 * 768."""
    model = zoo.load("ast", zoo.adapter("conformer", **settings), device="meta", num_classes=0)
    assert model.num_parameters(trainable=True) == count
    model.add_adapter(zoo.adapter("norm", targets=("blocks.*.norm2", "norm*")), "norms", activate=False)
    model.set_active("conformer", "norms")
    assert model.num_parameters(trainable=True) == count + 19_968


# -- running statistics ---------------------------------------------------------------------------------------------------


def statistics(model: zoo.Model) -> dict[str, Tensor]:
    return {k: b.clone() for k, b in model.adapters["conformer"].named_buffers()}


def test_running_statistics_are_those_of_torch() -> None:
    from audio.adapters.conformer import Moments

    ours, theirs = Moments(3), torch.nn.BatchNorm1d(3)
    for step in range(3):
        x = torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(step)) + step
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.mean, theirs.running_mean)
    torch.testing.assert_close(ours.variance, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_they_move_once_for_each_pass() -> None:
    """Whatever is run again for backward, and whoever looks at the model besides."""
    x, found = spectrograms(), {}
    for memory in ("off", "default", "low", "min"):
        model = ast(zoo.adapter("conformer", rank=3, kernel=5)).train()
        model.memory = memory
        before = statistics(model)
        assert model.probe(x) == [] and model.saved_bytes(x) > 0
        with zoo.probing(model, train=True) as probe:
            probe.loss(x, torch.tensor([0, 1, 2])).backward()
        assert all(torch.equal(v, before[k]) for k, v in statistics(model).items()), memory
        model(x).square().sum().backward()
        found[memory] = statistics(model)
        assert not any(torch.equal(v, before[k]) for k, v in found[memory].items())
    for memory in ("default", "low", "min"):
        assert all(torch.equal(v, found["off"][k]) for k, v in found[memory].items()), memory


def test_they_are_saved_and_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    data = torch.utils.data.TensorDataset(spectrograms(12).float(), torch.arange(12) % 3)
    options: dict[str, Any] = {"batch_size": 4, "lr": 1e-2, "progress": False, "device": "cpu"}
    options |= {"schedule": "constant", "warmup": 0.0}

    def fresh() -> zoo.Model:
        torch.manual_seed(0)
        return zoo.load(
            "ast-micro",
            zoo.adapter("conformer", rank=3, kernel=5),
            pretrained=False,
            num_classes=3,
            **SMALL,  # type: ignore[arg-type]
        )

    whole, broken = fresh(), fresh()
    zoo.fit(whole, data, data, epochs=3, **options)
    for steps in (3, 9):
        zoo.fit(broken, data, data, steps=steps, checkpoint=tmp_path / "c", resume=True, **options)
    unbroken = fresh()
    zoo.fit(unbroken, data, data, steps=9, **options)
    assert all(torch.equal(v, statistics(broken)[k]) for k, v in statistics(unbroken).items())
    whole.save_adapter(tmp_path / "out")
    torch.manual_seed(0)
    again = zoo.load(adapter=tmp_path / "out", pretrained=False)
    assert torch.equal(again(spectrograms().float()), whole(spectrograms().float()))
    assert any((b != 0).any() for k, b in again.adapters["conformer"].named_buffers() if k.endswith("mean"))


def test_batches_in_parts_are_refused() -> None:
    data = torch.utils.data.TensorDataset(spectrograms(12).float(), torch.arange(12) % 3)
    for allowed in (False, True):
        model = ast(zoo.adapter("conformer", rank=2, kernel=3, batch_norm=not allowed)).float()
        options: dict[str, Any] = {"epochs": 1, "batch_size": 4, "accumulate": 2, "progress": False, "device": "cpu"}
        if allowed:
            zoo.fit(model, data, **options)
            continue
        with pytest.raises(ConfigError, match=r"conformer: .*2 parts.*batch_norm=False"):
            zoo.fit(model, data, **options)


def test_rows_of_their_own_only_without_batch_norm() -> None:
    x = spectrograms()
    for batch_norm in (True, False):
        model = ast(zoo.adapter("conformer", rank=2, kernel=3, batch_norm=batch_norm))
        expected = model(x)
        routed = model(x, adapters=["conformer", None, "conformer"])
        torch.testing.assert_close(routed[[0, 2]], expected[[0, 2]])
        model.train()
        if batch_norm:
            with pytest.raises(ConfigError, match="normalises over the batch"):
                model(x, adapters=["conformer", None, "conformer"])
        else:
            torch.testing.assert_close(model(x, adapters=["conformer", None, "conformer"]), routed)


@pytest.mark.parametrize("memory", ["off", "low", "min"])
def test_one_that_is_not_trained_runs_by_its_statistics(memory: str) -> None:
    """And leaves them alone: beside a trained one, and for the rows of its own; rows and parts are not refused then."""
    model, x = ast(zoo.adapter("conformer", rank=2, kernel=3)), spectrograms()
    shake(model, model.add_adapter(zoo.adapter("lora", rank=2), "b").double())
    model.memory = memory
    model.set_active("conformer", "b", train="b")
    before, expected = statistics(model), model(x)
    model.train()
    found = model(x)
    found.square().sum().backward()
    torch.testing.assert_close(found, expected)
    assert all(torch.equal(v, before[k]) for k, v in statistics(model).items())
    alone = model(x, adapters=["conformer", None, "b"])
    torch.testing.assert_close(alone, model.eval()(x, adapters=["conformer", None, "b"]))
    assert all(torch.equal(v, before[k]) for k, v in statistics(model).items())
    model.set_active("conformer", "b")
    model.train()(x)
    assert not any(torch.equal(v, before[k]) for k, v in statistics(model).items())


def test_parts_are_fine_for_one_that_is_not_trained() -> None:
    data = torch.utils.data.TensorDataset(spectrograms(12).float(), torch.arange(12) % 3)
    model = ast(zoo.adapter("conformer", rank=2, kernel=3)).float()
    model.add_adapter(zoo.adapter("lora", rank=2), "b")
    model.set_active("conformer", "b", train="b")
    before = statistics(model)
    zoo.fit(model, data, epochs=1, batch_size=4, accumulate=2, progress=False, device="cpu")
    assert all(torch.equal(v, before[k]) for k, v in statistics(model).items())


# -- refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kernel": 4}, "odd"),
        ({"reduction": 0.0}, "above 0"),
        ({"rank": 0}, "1 or more"),
        ({"place": "before"}, "sequential form"),
        ({"form": "beside"}, "parallel"),
    ],
)
def test_bad_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        zoo.adapter("conformer", **settings)


def test_tokens_that_must_not_see_what_is_behind_them() -> None:
    pytest.importorskip("open_clip")
    model = zoo.load("clip-micro", pretrained=False)
    with pytest.raises(AttachError, match=r"mixes each token.*causal.*'adapter'"):
        model.add_adapter(zoo.adapter("conformer", targets="text.**.mlp"))
    assert not model.adapters
    model.add_adapter(zoo.adapter("conformer", targets="image.**.mlp"))


def test_mixed_precision() -> None:
    """In bfloat16 the statistics stay in float32, and what comes out is near."""
    model, x = ast(zoo.adapter("conformer", rank=3, kernel=5)).float().train(), spectrograms().float()
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x)
    torch.testing.assert_close(rough.float(), expected, rtol=0.1, atol=0.1)
    assert all(b.dtype == torch.float32 for b in model.adapters["conformer"].buffers())
    assert F.cross_entropy(rough.float(), torch.tensor([0, 1, 2])).isfinite()
