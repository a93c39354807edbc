"""Plain decoders: LLaMA, Qwen2, Qwen3. Bit-equal to the library, more keys by hand, generation, counts at full size."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import zoo
from zoo import registry
from zoo.errors import AttachError, ConfigError, DataError
from zoo.families.precision import stored_dtype
from zoo.table import tiny_model

pytest.importorskip("transformers")

OPTIONS = dict(registry.family("decoder").tiny[1])  # type: ignore[index]
NAMES = ("llama-7b", "qwen2-0.5b", "qwen3-0.6b")


def tiny(name: str = "qwen2-0.5b", adapter: object = None, **more: object) -> zoo.Model:
    own = {"head_dim": 8} if name.startswith("qwen3") else {}
    return zoo.load(name, adapter, pretrained=False, seed=0, **{**OPTIONS, **own, **more}).eval()  # type: ignore[arg-type]


def texts() -> tuple[Tensor, Tensor]:
    ids = torch.arange(5, 19).reshape(2, 7)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return ids, mask


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_it_is_the_library(name: str, attention: str) -> None:
    """Scores of the whole text, and of an answer behind it, are those of the library's module, to the bit."""
    model = tiny(name, attn_implementation=attention)
    ids, mask = texts()
    answer = torch.tensor([[3, 7, 9], [4, -100, -100]])
    with torch.no_grad():
        for given in (None, mask):  # words are counted without padding, as when the library writes
            places = None if given is None else torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 2, 3, 4]])
            own = model.backbone(ids, attention_mask=given, position_ids=places)  # type: ignore[operator]
            assert torch.equal(model(ids, given), own.logits)
        together = torch.cat([ids, torch.tensor([[3, 7], [4, 0]])], 1)
        seen = torch.cat([mask, torch.tensor([[1, 1], [1, 0]])], 1)
        whole = model.backbone(together, attention_mask=seen).logits[:, 6:9]  # type: ignore[operator]
        there = answer.ne(-100)
        torch.testing.assert_close(model(ids, mask, answer)[there], whole[there], rtol=1e-5, atol=1e-5)
        assert torch.equal(model(ids, mask, answer), model(ids, mask, answer=answer))
    bare = whole.flatten(0, 1)[torch.tensor([0, 1, 2, 3])].log_softmax(1)
    expected = -bare[torch.arange(4), torch.tensor([3, 7, 9, 4])].mean()
    torch.testing.assert_close(model.family.loss(whole, answer), expected, rtol=1e-5, atol=1e-5)  # type: ignore[attr-defined]


def test_points_have_the_widths_of_their_projections() -> None:
    points = {p.name: p for p in tiny("qwen3-0.6b").points}
    widths = {
        n: (points[f"blocks.1.{n}"].dim_in, points[f"blocks.1.{n}"].dim_out)
        for n in ("attn.q", "attn.k", "mlp.gate", "mlp.down")
    }
    assert widths == {"attn.q": (32, 32), "attn.k": (32, 16), "mlp.gate": (32, 48), "mlp.down": (48, 32)}
    product = points["blocks.0.attn.product"]
    assert (product.num_heads, product.query_heads, product.head_dim, product.causal) == (2, 4, 8, True)  # type: ignore[attr-defined]
    assert points["blocks.0.attn.q_norm"].dim_out == 8 and "blocks.0.attn.q_norm" not in {p.name for p in tiny().points}


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(c)) v for q (h, M, c) and k, v (h_kv, K, c); mask (M, K)."""
    groups = len(q) // len(k)
    heads = []
    for i, own in enumerate(q):
        scores = own @ k[i // groups].T / q.shape[-1] ** 0.5
        heads.append(scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v[i // groups])
    return torch.cat(heads, -1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_prefix_is_seen_by_every_word(name: str, attention: str) -> None:
    """The first block's attention, put together by hand from its projections: extra keys have no place, and no mask."""
    model = tiny(name, zoo.adapter("prefix", num_tokens=3), attn_implementation=attention)
    torch.manual_seed(1)
    for parameter in model.adapters["prefix"].parameters():
        nn.init.normal_(parameter)
    ids, mask = texts()
    ids, mask = ids[:1], mask[:1]
    caught: dict[str, Tensor] = {}
    block = model.backbone.model.layers[0]  # type: ignore[union-attr,index]
    attn = block.self_attn
    hooks = [
        attn.register_forward_pre_hook(
            lambda m, a, k: caught.update(x=k["hidden_states"], place=k["position_embeddings"]), with_kwargs=True
        ),
        attn.register_forward_hook(lambda m, a, y: caught.update(y=y[0])),
    ]
    with torch.no_grad():
        model(ids, mask)
    for hook in hooks:
        hook.remove()
    x, (cos, sin) = caught["x"][0], (p[0] for p in caught["place"])  # type: ignore[attr-defined]

    def heads(projection: nn.Module, norm: str | None = None) -> Tensor:
        y = projection(x).unflatten(-1, (-1, attn.head_dim))
        y = getattr(attn, norm)(y) if norm and hasattr(attn, norm) else y
        return y.transpose(0, 1)

    def turned(y: Tensor) -> Tensor:
        first, second = y.chunk(2, -1)
        return y * cos + torch.cat([-second, first], -1) * sin

    with torch.no_grad():
        q, k, v = turned(heads(attn.q_proj, "q_norm")), turned(heads(attn.k_proj, "k_norm")), heads(attn.v_proj)
        keys, values = model.adapters["prefix"].module_at("blocks.0.attn.product")(1)
        assert keys.shape == (1, k.shape[0], 3, 8)
        seen = torch.cat([torch.ones(7, 3, dtype=torch.bool), torch.ones(7, 7, dtype=torch.bool).tril()], 1)
        expected = attn.o_proj(by_hand(q, torch.cat([keys[0], k], 1), torch.cat([values[0], v], 1), seen))
    torch.testing.assert_close(caught["y"][0], expected, rtol=1e-5, atol=1e-5)


class Gated(nn.Module):
    """Three keys for two heads, gates for four heads of queries."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Parameter(torch.randn(2, 1, 2, 3, 8))
        self.gate = nn.Parameter(torch.zeros(1, 4, 1, 1))

    def forward(self, images: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.pair[0], self.pair[1], self.gate


def test_gated_prompts_have_a_gate_for_each_head_of_queries() -> None:
    from dataclasses import dataclass

    @dataclass(eq=False)
    class Gates(zoo.Adapter):
        def attach(self, points: zoo.Points) -> None:
            for point in points.select(kind="attention"):
                point.gate(Gated())

    Gates.method = "gates"
    model = tiny()
    ids, mask = texts()
    with torch.no_grad():
        before = model(ids, mask)
        model.add_adapter(Gates())
        assert torch.equal(model.eval()(ids, mask), before)
        adapter = model.adapters["gates"]
        gates = [adapter.module_at(f"blocks.{i}.attn.product") for i in range(2)]
        gates[0].gate[0, 1] = 0.5  # one head of the first block
        caught: dict[str, Tensor] = {}
        o = model.backbone.model.layers[0].self_attn.o_proj  # type: ignore[union-attr,index]
        hook = o.register_forward_pre_hook(lambda m, a: caught.update(y=a[0]))
        model(ids, mask)
        with_gate = caught["y"]
        gates[0].gate.zero_()
        model(ids, mask)
        hook.remove()
        change = (with_gate - caught["y"]).unflatten(-1, (4, 8))
        assert change[:, :, 1].abs().min() > 0 and not change[:, :, [0, 2, 3]].any()


@pytest.mark.parametrize("name", NAMES)
def test_writing_with_a_cache_is_writing_without(name: str) -> None:
    """Greedy generation with a prefix and a LoRA: the same words with and without the cache, and as word by word by hand."""
    model = tiny(name, [zoo.adapter("prefix", num_tokens=3), zoo.adapter("lora", targets="all-linear")])
    torch.manual_seed(1)
    for n in ("prefix", "lora"):
        for parameter in model.adapters[n].parameters():
            nn.init.normal_(parameter, std=0.5)
    model.set_active("prefix", "lora")
    ids, mask = texts()
    given = {
        "input_ids": ids,
        "attention_mask": mask,
        "max_new_tokens": 5,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }

    def write(**more: object) -> Tensor:
        return model.passing(lambda: model.backbone.generate(**given, **more), ids)  # type: ignore[operator,no-any-return]

    written = write()
    assert torch.equal(written, write(use_cache=False))
    words, seen = ids, mask
    for _ in range(5):
        with torch.no_grad():
            words = torch.cat([words, model(words, seen)[:, -1:].argmax(-1)], 1)
        seen = torch.cat([seen, torch.ones(2, 1, dtype=seen.dtype)], 1)
    assert torch.equal(written, words)


def test_a_network_of_the_library_is_wrapped_with_these_points() -> None:
    model = tiny("llama-7b")
    module = copy.deepcopy(model.backbone)
    wrapped = zoo.wrap(module, name="mine").eval()
    assert wrapped.family.family == "decoder" and [p.name for p in wrapped.points] == [p.name for p in model.points]
    ids, mask = texts()
    with torch.no_grad():
        assert torch.equal(wrapped(ids, mask), model(ids, mask))


def test_what_does_not_fit_is_refused() -> None:
    model = tiny()
    ids, mask = texts()
    with pytest.raises(ConfigError, match="padding in front"):
        model(ids, mask.flip(1), torch.tensor([[3], [4]]))
    with pytest.raises(ConfigError, match="takes input_ids, attention_mask, answer"):
        model(ids, mask, None, torch.ones(2, 3))
    with pytest.raises(ConfigError, match="no option 'num_layer'"):
        tiny(num_layer=3)
    with pytest.raises(AttachError, match="tokens points"):
        tiny(adapter="vpt")
    model.family.name = "zoo:nothing"
    with pytest.raises(ConfigError, match=r"family\.tokenizer"):
        model.family.pretrained_part("AutoTokenizer", "tokenizer")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "total", "trained"),
    [
        ("llama-7b", 6_738_415_616, 32 * 8 * 2 * (4096 + 4096)),
        ("llama-65b", 65_285_660_672, 80 * 8 * 2 * (8192 + 8192)),
        ("qwen2-0.5b", 494_032_768, 24 * 8 * (896 + 896 + 896 + 128)),
        ("qwen3-0.6b", 596_049_920, 28 * 8 * (1024 + 2048 + 1024 + 1024)),
    ],
)
def test_counts_at_full_size(name: str, total: int, trained: int) -> None:
    """LoRA of rank 8 at q and v; the networks' own counts are those of their files."""
    model = zoo.load(name, zoo.adapter("lora", rank=8, targets="q,v"), device="meta")
    assert sum(p.numel() for p in model.backbone.parameters()) == total
    assert model.num_parameters(trainable=True) == trained


def test_a_checkpoint_of_a_folder_is_read(tmp_path: object) -> None:
    """In float32 or another precision, as it is or with fields of its configuration changed."""
    model = tiny()
    model.backbone.save_pretrained(tmp_path)  # type: ignore[operator]
    with torch.no_grad():
        assert torch.equal(zoo.load(f"transformers:{tmp_path}").eval()(*texts()), model(*texts()))
    half = zoo.load(f"transformers:{tmp_path}", dtype="bfloat16", rms_norm_eps=1e-3)
    assert half.dtype == torch.bfloat16 and half.backbone.config.rms_norm_eps == 1e-3  # type: ignore[union-attr]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_an_adapter_fits_the_network_in_every_precision(
    stored: torch.dtype, wanted: torch.dtype, tmp_path: Path
) -> None:
    """One that was trained in float32 was refused in bfloat16: "trained on other weights"."""
    network: Any = tiny().backbone.to(stored)
    network.save_pretrained(tmp_path / "base")
    model = zoo.load(f"transformers:{tmp_path / 'base'}", "lora")
    model.save_adapter(tmp_path / "out")
    again = zoo.load(f"transformers:{tmp_path / 'base'}", tmp_path / "out", dtype=wanted)
    assert again.fingerprint == model.fingerprint
    for name, own in network.named_parameters():
        assert torch.equal(again.backbone.get_parameter(name), own.float().to(wanted)), name
    if stored != torch.float32:  # nor was it read in float32
        assert stored_dtype(str(tmp_path / "base"), "", "model.safetensors") == stored


def test_a_spare_tensor_says_nothing_of_the_precision(tmp_path: Path) -> None:
    """Of LLaMA's checkpoints in float16 the turning frequencies are kept in float32, and not read."""
    save_file(
        {"a": torch.zeros(2, dtype=torch.float16), "layers.0.rotary_emb.inv_freq": torch.zeros(2)},
        tmp_path / "model.safetensors",
    )
    assert stored_dtype(str(tmp_path), "", "model.safetensors", ("*.rotary_emb.inv_freq",)) == torch.float16


def test_what_is_no_text_is_refused_in_words() -> None:
    model, (ids, mask, answer) = tiny_model("decoder")
    for given, message in (
        (("what is it?",), "input_ids is str; .* takes the numbers of words"),
        ((["a", "b"],), "input_ids is list"),
        ((torch.randn(2, 5),), r"input_ids is torch.float32 \(2, 5\)"),
        ((ids[0],), r"input_ids is torch.int64 \(7,\)"),
        ((ids > 3,), "input_ids is torch.bool"),
        ((ids + 1000,), "the text has words from .* knows 60, counted from"),
        ((ids, mask[:, :4]), r"attention_mask is \(2, 4\); expected \(2, 7\)"),
        ((ids, mask, answer.float()), "answer is torch.float32"),
        ((ids, mask, answer[:1]), r"answer is torch.int64 \(1, 4\)"),
    ):
        with pytest.raises(DataError, match=f"(?i){message}"):
            model(*given)


@pytest.mark.parametrize("family", ["decoder", "vlm"])
def test_a_misspelt_input_is_refused(family: str) -> None:
    """The library's forward takes any name: a misspelt mask was no mask, in silence."""
    model, batch = tiny_model(family)
    ids, mask, _, *seen = batch
    more = dict(zip(model.family.visual, seen))  # type: ignore[attr-defined]
    expected = model(ids, mask, None, **more)
    assert torch.equal(model(ids, attention_mask=mask, use_cache=False, **more), expected)
    with pytest.raises(ConfigError, match=r"has no input 'atention_mask'.*'attention_mask'"):
        model(ids, atention_mask=mask, **more)
