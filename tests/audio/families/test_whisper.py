"""Whisper with decoder and without: against transformers' own forward, prompts written out, caches, checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo.errors import ConfigError, DataError, WeightsError
from zoo.registry import family

transformers = pytest.importorskip("transformers")

KINDS = {"whisper": "whisper-b", "whisper-encoder": "whisper-encoder-b"}
each = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, adapter: Any = None, **options: Any) -> zoo.Model:
    tiny = family(kind).tiny
    assert tiny is not None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classes = {"num_classes": 3} if kind == "whisper-encoder" else {}
        model = zoo.load(KINDS[kind], pretrained=False, **{**classes, **tiny[1], **options})
        if adapter is not None:
            model.add_adapter(adapter)
    return model.double().eval()


def batch(model: zoo.Model) -> tuple[Tensor, ...]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return tuple(x.double() if x.is_floating_point() else x for x in model.family.tiny_batch())


def library(model: zoo.Model) -> Any:
    """transformers' own module with the same weights, and nothing of ours in it."""
    config: Any = copy.deepcopy(model.backbone.config)
    config.num_labels = 3
    module = type(model.backbone)(config).double()
    assert not module.load_state_dict({**model.backbone.state_dict(), **model.head.state_dict()}).missing_keys
    return module.requires_grad_(False).eval()


def settle(model: zoo.Model) -> None:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        for parameter in model.parameters_to_train().values():
            parameter += 0.05 * torch.randn_like(parameter)


def answer(module: Any, *inputs: Tensor) -> Tensor:
    if len(inputs) > 1:
        return module(inputs[0], decoder_input_ids=inputs[1], use_cache=False).logits  # type: ignore[no-any-return]
    return module(*inputs).logits  # type: ignore[no-any-return]


@each
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equals_the_library(kind: str, attention: str) -> None:
    model = make(kind, attn_implementation=attention)
    inputs, module = batch(model), library(model)
    if kind == "whisper":
        assert torch.equal(model(*inputs), answer(module, *inputs))  # to the bit
    else:
        tokens = module.encoder(*inputs).last_hidden_state
        assert torch.equal(model.features(*inputs), tokens.mean(1))
        assert torch.equal(model.outputs(*inputs, want=("tokens",))["tokens"], tokens)
        torch.testing.assert_close(model(*inputs), answer(module, *inputs), rtol=1e-10, atol=1e-12)


@each
@pytest.mark.parametrize("method", ["norm", "bitfit", "ssf", "lora"])
def test_nothing_is_dead_and_merges_are_exact(kind: str, method: str) -> None:
    options = {"targets": "all-linear", "rank": 2} if method == "lora" else {}
    model = make(kind, zoo.adapter(method, **options))
    inputs = batch(model)
    assert model.probe(*inputs) == []
    settle(model)
    torch.testing.assert_close(answer(model.merge(), *inputs), model(*inputs), rtol=1e-9, atol=1e-9)
    if method == "norm":
        norms = [m for m in model.backbone.modules() if isinstance(m, nn.LayerNorm)]
        assert {id(p.module) for p in model.points.select(kind="norm")} == {id(m) for m in norms}
    if method == "lora":
        linears = [n for n, m in model.backbone.named_modules() if isinstance(m, nn.Linear) and ".layers." in n]
        assert sorted(p.path for p in model.points.linears("all-linear")) == sorted(linears)


def straightforward(module: Any, x: Tensor, words: Any, prompts: list[Tensor], deep: bool, pool: str) -> Tensor:
    """Prompts as tokens [prompts | sound] that run through whole blocks of the library's encoder."""
    encoder = getattr(module, "model", module).encoder
    count = len(prompts[0])

    def enter(number: int) -> Any:
        def hook(block: Any, args: tuple[Any, ...]) -> Any:
            if number and not deep:
                return args
            rest = args[0][:, count if number else 0 :]
            return (torch.cat([prompts[number].expand(len(x), -1, -1), rest], dim=1), *args[1:])

        return hook

    for i, block in enumerate(encoder.layers):
        block.register_forward_pre_hook(enter(i))
    if pool != "all":
        encoder.layers[-1].register_forward_hook(lambda block, args, hidden: hidden[:, count:])
    return answer(module, x, *words)


@each
@pytest.mark.parametrize(("deep", "pool"), [(True, "patches"), (True, "all"), (False, "patches"), (False, "all")])
def test_prompts_equal_the_straightforward_form(kind: str, deep: bool, pool: str) -> None:
    model = make(kind, zoo.adapter("vpt", num_tokens=3, deep=deep, pool=pool))
    x, *words = batch(model)
    prompts = [p.detach().clone().requires_grad_() for p in model.adapters["vpt"].parameters()]
    expected = straightforward(library(model), x, words, prompts, deep, pool)
    found = model(x, *words)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    grads = torch.autograd.grad((expected * weights).sum(), prompts)
    (found * weights).sum().backward()
    for parameter, grad in zip(model.adapters["vpt"].parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("method", ["prefix", "vpt", "lora"])
def test_writing_with_the_cache_is_writing_without(method: str) -> None:
    """Extra keys stand in front of what the cache holds; word by word it is the whole forward's best."""
    from transformers.generation import GenerationMixin

    model = make("whisper", method)
    settle(model)
    x, _ = batch(model)
    words = torch.full((2, 1), 2)
    with torch.no_grad():
        for _ in range(6):
            words = torch.cat([words, model(x, words)[:, -1:].argmax(-1)], dim=1)
        for cached in (True, False):
            options = {"max_new_tokens": 6, "do_sample": False, "use_cache": cached, "eos_token_id": None}
            start = torch.full((2, 1), 2)
            found = GenerationMixin.generate(model.backbone, x, decoder_input_ids=start, **options)  # type: ignore[arg-type]
            assert torch.equal(found, words)


def test_labels_are_shifted() -> None:
    model = make("whisper", "lora")
    x, words = batch(model)
    labels = torch.cat([words[:, 1:], torch.tensor([[1], [-100]])], dim=1)
    given = torch.cat([torch.full((2, 1), 2), labels[:, :-1]], dim=1)
    assert torch.equal(model(x, labels=labels), model(x, given))
    assert model.family.shift(labels).min() >= 0
    expected = library(make("whisper"))(x, labels=labels).loss
    torch.testing.assert_close(
        model.family.loss(model(x, labels=labels), labels).double(), expected, rtol=1e-6, atol=1e-6
    )
    with pytest.raises(ConfigError, match=r"either decoder_input_ids.*or labels"):
        model(x)
    with pytest.raises(DataError, match=r"expected \(B, 16, 40\)"):
        model(x[:, :, :30], words)


@each
def test_memory_and_removal(kind: str) -> None:
    model = make(kind)
    inputs = batch(model)
    before = model(*inputs)
    model.add_adapter(zoo.adapter("adapter", form="houlsby", rank=2))
    settle(model)
    found = {}
    for memory in ("default", "low", "min"):
        model.memory = memory
        model.zero_grad()
        model.train()(*inputs).square().sum().backward()
        found[memory] = [p.grad.clone() for p in model.adapters.parameters()]  # type: ignore[union-attr]
    for memory in ("low", "min"):
        for one, other in zip(found[memory], found["default"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11)
    model.eval().remove_adapter("adapter")
    fresh = make(kind)
    for name, parameter in model.head.named_parameters():
        parameter.data.copy_(fresh.head.get_parameter(name))
    assert torch.equal(model(*inputs), before)


def test_checkpoints(tmp_path: Path) -> None:
    """A network of transcription; its encoder by another name; one with a classifier, which is the encoder's family."""
    from safetensors.torch import load_file, save_file

    first = make("whisper", "lora")
    settle(first)
    x, words = batch(first)
    plain: Any = first.merge()
    plain.save_pretrained(tmp_path / "words")
    again = zoo.load(f"transformers:{tmp_path / 'words'}").double().eval()
    assert again.family.family == "whisper"
    torch.testing.assert_close(again(x, words), first(x, words), rtol=1e-5, atol=1e-5)
    encoder = zoo.load(f"whisper-encoder:{tmp_path / 'words'}", "lora", num_classes=3).double().eval()
    assert torch.equal(encoder.backbone.encoder.conv1.weight, again.backbone.model.encoder.conv1.weight)
    encoder.save_adapter(tmp_path / "adapter")
    with pytest.raises(zoo.errors.TrustError):
        zoo.load(adapter=tmp_path / "adapter")
    loaded = zoo.load(adapter=tmp_path / "adapter", trust_backbone=True).double().eval()
    torch.testing.assert_close(loaded(x), encoder(x))
    encoder.classes = ["a", "b", "c"]
    merged: Any = encoder.merge()
    merged.save_pretrained(tmp_path / "classes")
    third = zoo.load(f"transformers:{tmp_path / 'classes'}").double().eval()
    assert (third.family.family, third.num_classes) == ("whisper-encoder", 3)
    assert third.backbone.config.id2label == {0: "a", 1: "b", 2: "c"}
    torch.testing.assert_close(third(x), encoder(x), rtol=1e-5, atol=1e-5)
    file = tmp_path / "words" / "model.safetensors"
    state = load_file(file)
    save_file({k: v for k, v in state.items() if "decoder.layer_norm" not in k}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"no weights for .*decoder.layer_norm"):
        zoo.load(f"transformers:{tmp_path / 'words'}")
    save_file({**state, "model.decoder.more": torch.ones(2)}, file, {"format": "pt"})
    with pytest.raises(WeightsError, match=r"has over 1: .*decoder.more"):
        zoo.load(f"transformers:{tmp_path / 'words'}")


def test_counts() -> None:
    assert zoo.load("whisper-b", device="meta").num_parameters() == 72_593_920
    assert zoo.load("whisper-encoder-b", num_classes=0, device="meta").num_parameters() == 20_590_592
    lora = zoo.load("whisper-s", "lora", device="meta")  # q and v of 12 + 12 + 12 attentions of width 768, rank 8
    assert lora.num_parameters(trainable=True) == 3 * 294_912
    assert 1_543e6 < zoo.load("whisper-l", device="meta").num_parameters() < 1_544e6


@pytest.mark.parametrize("bins", [80, 128])
def test_features_are_those_of_the_library(bins: int) -> None:
    from audio.data.whisper_features import WhisperTransform

    wave = torch.sin(torch.arange(40_000) * 0.05) * 0.3 + 0.05 * torch.randn(40_000)
    extractor = transformers.WhisperFeatureExtractor(feature_size=bins)
    expected = extractor(wave.numpy(), sampling_rate=16_000, return_tensors="pt")["input_features"][0]
    prepare = WhisperTransform({"num_mel_bins": bins, "frames": 3000})
    torch.testing.assert_close(prepare(wave), expected, rtol=1e-4, atol=2e-4)
    short = WhisperTransform({"num_mel_bins": bins, "frames": 40})
    assert short(wave).shape == (bins, 40)
    with pytest.raises(ConfigError, match="augment 'mask'"):
        WhisperTransform({"num_mel_bins": bins, "frames": 40}, True, augment="mask")


def test_a_file_of_weights_need_not_hold_tied_tensors_twice(tmp_path: Path) -> None:
    """The output is the table of words: safetensors keep one of the two names."""
    from safetensors.torch import save_file

    tiny = family("whisper").tiny
    assert tiny is not None
    model = zoo.load("whisper-b", pretrained=False, **tiny[1]).eval()
    state = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    inputs = model.family.tiny_batch()
    for name in ("proj_out.weight", "model.decoder.embed_tokens.weight"):
        save_file({k: v for k, v in state.items() if k != name}, tmp_path / "own.safetensors")
        again = zoo.load("whisper-b", checkpoint=tmp_path / "own.safetensors", **tiny[1]).eval()
        assert torch.equal(again(*inputs), model(*inputs))
    save_file(
        {k: v for k, v in state.items() if "embed_tokens" not in k and "proj_out" not in k},
        tmp_path / "own.safetensors",
    )
    with pytest.raises(zoo.errors.MismatchError, match="2 missing"):
        zoo.load("whisper-b", checkpoint=tmp_path / "own.safetensors", **tiny[1])
