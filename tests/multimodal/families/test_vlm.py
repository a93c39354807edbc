"""Language models with eyes: to the bit what the library computes, nothing dead, images of any size, adapters for each sample."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo.errors import ConfigError, DataError

pytest.importorskip("transformers")

from vlm_models import QWEN, TINY, of_library, tiny


@pytest.mark.parametrize("name", TINY)
def test_it_is_the_library(name: str) -> None:
    """Scores of the text and of an answer, with padding in front, with and without images; also of a wrapped network."""
    model = tiny(name)
    ids, mask, answer, *seen = model.family.tiny_batch()
    answer[1, 2:] = -100
    module: nn.Module = model.backbone
    wrapped = zoo.wrap(copy.deepcopy(module), name="mine").eval()
    assert wrapped.family.family == "vlm" and [p.name for p in wrapped.points] == [p.name for p in model.points]
    with torch.no_grad():
        expected = module(**of_library(model, ids, mask, *seen), use_cache=False).logits
        assert torch.equal(model(ids, mask, None, *seen), expected)
        assert torch.equal(wrapped(ids, mask, None, *seen), expected)
        flat = of_library(model, ids, mask, *seen)  # as the processors give them, by name
        assert torch.equal(model(**flat), expected)
        words = torch.cat([ids, answer[:, :-1].clamp(min=0)], 1)
        there = torch.cat([mask, answer[:, :-1].ne(-100).long()], 1)
        whole = module(**of_library(model, words, there, *seen), use_cache=False).logits[:, ids.shape[1] - 1 :]
        found = model(ids, mask, answer, *seen)
        torch.testing.assert_close(found[answer != -100], whole[answer != -100], rtol=1e-5, atol=1e-5)
        text = ids.masked_fill(ids == 4, 5)
        places = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
        assert torch.equal(model(text, mask), module(text, attention_mask=mask, position_ids=places).logits)
    other = [seen[0] + 1.0, *seen[1:]]
    assert not torch.equal(model(ids, mask, None, *other), expected)  # images are seen


@pytest.mark.parametrize("name", TINY)
def test_every_point_is_alive(name: str) -> None:
    """LoRA at every projection, both towers and between: each gets a gradient; merged it is the same."""
    model = tiny(
        name,
        zoo.adapter("lora", targets="visual.**.{q,k,v,o,up,down},text.**.{q,k,v,o,gate,up,down},projector**", rank=2),
    )
    batch = model.family.tiny_batch()
    assert model.probe(*batch) == []
    for parameter in model.adapters["lora"].parameters():
        nn.init.normal_(parameter, std=0.2)
    towers = {p.tower for p in model.points}
    assert towers == {"visual", "text"} and {p.kind for p in model.points} == {
        "linear",
        "norm",
        "sublayer",
        "attention",
        "block",
    }
    with torch.no_grad():
        torch.testing.assert_close(model.family.run(model.merge(), *batch), model(*batch), rtol=1e-4, atol=1e-4)


def test_llava_has_no_points_at_blocks_that_nobody_reads() -> None:
    model = tiny("llava-1.5-7b", "full")
    assert {p.block for p in model.points if p.tower == "visual" and p.block is not None} == {0, 1}  # of three
    assert model.probe(*model.family.tiny_batch()) == []
    assert not [k for k in model.parameters_to_train() if ("layers.2." in k and "vision" in k) or "post_layernorm" in k]


def uneven(model: zoo.Model) -> tuple[Tensor, ...]:
    """Three samples with images of 4 x 4, 4 x 8 and twice 4 x 4 patches; in front of the texts padding."""
    torch.manual_seed(3)
    grid = torch.tensor([[[1, 4, 4], [0, 0, 0]], [[1, 4, 8], [0, 0, 0]], [[1, 4, 4], [1, 4, 4]]])
    pixels = torch.randn(3, 32, 96)
    ids = torch.full((3, 14), 0)
    mask = torch.zeros_like(ids)
    for i, texts in enumerate(([7, 8, *[4] * 4, 9], [7, *[4] * 8, 9, 10], [7, *[4] * 4, 9, *[4] * 4, 11, 12])):
        ids[i, -len(texts) :], mask[i, -len(texts) :] = torch.tensor(texts), 1
    return ids, mask, torch.tensor([[5, 6], [7, -100], [8, 9]]), pixels, grid


@pytest.mark.parametrize("name", QWEN)
def test_images_of_different_sizes_and_numbers(name: str) -> None:
    """A batch is what each sample alone is, and what lies behind a sample's patches is not seen."""
    model = tiny(name)
    batch = uneven(model)
    with torch.no_grad():
        together = model(*batch)
        for i in range(3):
            ids, mask, answer, pixels, grid = (x[i : i + 1] for x in batch)
            start, count = int(14 - mask.sum()), int(grid.prod(-1).sum())
            alone = model(
                ids[:, start:], mask[:, start:], answer, pixels[:, :count], grid[:, : int((grid.prod(-1) > 0).sum())]
            )
            there = answer[0] != -100
            torch.testing.assert_close(alone[0, there], together[i, there], rtol=1e-4, atol=1e-4)
        batch[3][0, 16:] = 100.0
        assert torch.equal(model(*batch), together)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("different", [False, True])
def test_adapters_for_each_sample(name: str, different: bool) -> None:
    """LoRA in both towers: each row is what its adapter alone gives; in one pass where images are alike, else in several."""
    model = tiny(name, ["lora", zoo.adapter("lora", targets="all-linear", rank=2)])
    first, second = model.adapters
    torch.manual_seed(1)
    for adapter in model.adapters.values():
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.3)
    if different and name not in QWEN:
        pytest.skip("images of other processors are all of one size")
    batch = uneven(model) if different else model.family.example(3, 8, 2, 4)
    assert model.family.even(*batch) is not different
    names = [first, second, None]
    calls = []
    hook = model.backbone.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        routed = model(*batch, adapters=names)
        assert len(calls) == (3 if different else 1)
        hook.remove()
        for i, each in enumerate(names):
            model.set_active(*([each] if each else []))
            there = batch[2][i] != -100
            torch.testing.assert_close(routed[i, there], model(*batch)[i, there], rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    model = tiny(adapter="lora")
    ids, mask, _, pixels, grid = model.family.tiny_batch()
    with pytest.raises(DataError, match="no images are given"):
        model(ids, mask)
    with pytest.raises(DataError, match="more or fewer places"):
        model(ids, mask, None, pixels[:, :8], torch.tensor([[1, 2, 4]] * 2))
    with pytest.raises(DataError, match="of different images"):
        model(ids, mask, None, pixels[:, :8], grid)
    with pytest.raises(DataError, match="image_grid_thw is None"):
        model(ids, mask, None, pixels)
    with pytest.raises(ConfigError, match="images come by sample"):
        model(ids, mask, None, pixels.flatten(0, 1), grid, adapters=["lora", None])
    with pytest.raises(ConfigError, match="in their places"):
        model(ids, mask, pixel_values=pixels, image_grid_thw=grid, adapters=["lora", None])
    with pytest.raises(ConfigError, match="'text_config' has no option 'num_layers'"):
        tiny(text_config={"num_layers": 2})
    with pytest.raises(zoo.ZooError, match=r"positions is 2, and at 'text\.blocks\.0'"):
        tiny(adapter=zoo.adapter("loreft", positions=2, targets="text.blocks.*"))
    with pytest.raises(zoo.ZooError, match="one sequence"):
        tiny(adapter=zoo.adapter("loreft", positions=2, targets="visual.blocks.*"))(ids, mask, None, pixels, grid)
    model.family.name = "zoo:nothing"
    with pytest.raises(ConfigError, match=r"model\.family\.processor"):
        model.family.processor  # noqa: B018


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("qwen2-vl-2b", 2_208_985_600),
        ("qwen2.5-vl-3b", 3_754_622_976),
        ("qwen3-vl-2b", 2_127_532_032),
        ("smolvlm-256m", 256_484_928),
        ("smolvlm2-2.2b", 2_246_784_880),
        ("llava-1.5-7b", 7_063_427_072),
    ],
)
def test_counts_at_full_size(name: str, total: int) -> None:
    """The networks' counts are those of their published files; LoRA at all projections of the text adds what it must."""
    model = zoo.load(name, zoo.adapter("lora", rank=8, targets="text.**.{q,k,v,o,gate,up,down}"), device="meta")
    assert sum(p.numel() for p in model.backbone.parameters()) == total
    text = model.family.text_config  # type: ignore[attr-defined]
    width, keys = (
        text.hidden_size,
        text.num_key_value_heads * getattr(text, "head_dim", text.hidden_size // text.num_attention_heads),
    )
    queries = keys // text.num_key_value_heads * text.num_attention_heads
    each = 2 * (width + queries) + 2 * (width + keys) + 3 * (width + text.intermediate_size)
    assert model.num_parameters(trainable=True) == text.num_hidden_layers * 8 * each


@pytest.mark.parametrize("name", ["smolvlm-256m", "llava-1.5-7b"])
def test_prefixes_for_each_sample_of_several_images(name: str) -> None:
    """Extra keys in both towers: all images of a sample are read with its adapter's, and its words too."""
    model = tiny(name, [zoo.adapter("prefix", num_tokens=2), zoo.adapter("prefix", num_tokens=3)])
    first, second = model.adapters
    torch.manual_seed(1)
    for adapter in model.adapters.values():
        for parameter in adapter.parameters():
            nn.init.normal_(parameter)
    ids, mask, answer, *seen = model.family.example(3, 8, 2, 4)  # type: ignore[attr-defined]
    image = ids[:, 4:-4]
    ids = torch.cat([ids[:, :4], image, ids[:, 4:]], 1)  # two images each
    mask = torch.cat([torch.ones_like(image), mask], 1)
    seen = [torch.cat([torch.randn_like(seen[0]), seen[0]], 1), *(torch.cat([x, x], 1) for x in seen[1:])]
    names = [second, None, first]
    with torch.no_grad():
        routed = model(ids, mask, answer, *seen, adapters=names)
        for i, each in enumerate(names):
            model.set_active(*([each] if each else []))
            alone = model(ids, mask, answer, *seen)
            torch.testing.assert_close(routed[i], alone[i], rtol=1e-4, atol=1e-4)
            assert not torch.allclose(routed[i - 1], alone[i - 1], atol=1e-2)  # served by another


@pytest.mark.parametrize("name", QWEN)
def test_prefixes_of_the_language_blocks_alone(name: str) -> None:
    """Qwen's eyes have no place for them: that is said where no tower is named, and no obstacle where one is."""
    with pytest.raises(zoo.ZooError, match=r"Name the tower \('text"):
        tiny(name, "prefix")
    model = tiny(name, zoo.adapter("prefix", targets="text.**", num_tokens=2))
    assert {name.split(".")[0] for name, _ in model.adapters["prefix"].named_parameters()} == {"text"}
    assert model.probe(*model.family.tiny_batch()) == []
