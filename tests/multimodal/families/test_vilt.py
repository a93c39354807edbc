"""ViLT beside the library: images of several sizes, prefixes, skipped blocks (DAS), both kinds of heads, counts at full size."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from zoo.errors import AttachError, DataError
from zoo.table import tiny_model

pytest.importorskip("transformers")


def own(adapter: Any = None, **more: Any) -> zoo.Model:
    """A tiny random member with the library's classifier."""
    options = {**zoo.registry.family("vilt").tiny[1], **more}  # type: ignore[index]
    return zoo.load("vilt-b32", adapter, pretrained=False, seed=0, **options).eval()


def library(model: zoo.Model) -> Any:
    """The library's network with the same weights."""
    import transformers

    twin = transformers.ViltForQuestionAnswering(copy.deepcopy(model.backbone.config)).eval()
    head = {f"classifier.{k}": v for k, v in model.head.state_dict().items()}
    twin.load_state_dict({**model.backbone.state_dict(), **head})
    return twin


def batch() -> tuple[Tensor, ...]:
    """Three texts; the first image is filled up below, the second at its right, the third is whole."""
    generator = torch.Generator().manual_seed(1)
    ids, images = torch.randint(1, 60, (3, 7), generator=generator), torch.randn(3, 3, 32, 40, generator=generator)
    mask, there = torch.ones_like(ids), torch.ones(3, 32, 40, dtype=torch.long)
    mask[1, 4:] = 0
    there[0, 16:], there[1, :, 24:] = 0, 0
    return images * there[:, None], ids, mask, there


@pytest.mark.parametrize("filled", [True, False])
@torch.no_grad()
def test_it_is_the_library(filled: bool) -> None:
    """To the rounding, since its order of patches is drawn at random; ours is the same each time."""
    model = own()
    images, ids, mask, there = batch()
    given = (images, ids, mask, there) if filled else (images, ids, mask)
    whole = there if filled else torch.ones_like(there)
    expected = library(model)(input_ids=ids, attention_mask=mask, pixel_values=images, pixel_mask=whole).logits
    torch.testing.assert_close(model(*given), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(*given), model(*given))
    alone = model(images[1:2, :, :, :24], ids[1:2, :4])  # without any filling
    if filled:
        torch.testing.assert_close(model(*given)[1:2], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_skipped_block_is_as_if_it_were_not_there() -> None:
    """With W_u = 0; the first block, too."""
    model = own(zoo.adapter("das", skip=(0, 2), bottleneck=4), num_hidden_layers=4)
    for name, parameter in model.adapters["das"].named_parameters():
        if ".up." in name:
            parameter.zero_()
    plain = library(model)
    for i in (2, 0):
        del plain.vilt.encoder.layer[i]
    images, ids, mask, there = batch()
    expected = plain(input_ids=ids, attention_mask=mask, pixel_values=images, pixel_mask=there).logits
    torch.testing.assert_close(model(images, ids, mask, there), expected, rtol=1e-5, atol=1e-5)
    ran: list[int] = []
    for i, block in enumerate(model.backbone.vilt.encoder.layer):  # type: ignore[union-attr, arg-type]
        block.intermediate.register_forward_hook(lambda *_, i=i: ran.append(i))
    model(images, ids, mask, there)
    assert ran == [1, 3]


@torch.no_grad()
def test_prefixes_are_keys_that_words_and_patches_see() -> None:
    model = own(zoo.adapter("prefix", num_tokens=2))
    torch.manual_seed(3)
    for parameter in model.adapters["prefix"].parameters():
        parameter.normal_()
    images, ids, mask, there = batch()
    found = model(images, ids, mask, there)
    plain = library(model)
    for i, layer in enumerate(plain.vilt.encoder.layer):
        place = model.adapters["prefix"].module_at(f"blocks.{i}.attn.product")  # type: ignore[operator, union-attr]
        keys, values = (part[0] for part in place(1)[:2])  # (h, T, c)

        def forward(
            x: Tensor, mask: Tensor | None = None, _: bool = False, own: Any = layer, kv: Any = (keys, values)
        ) -> Any:
            a = own.attention.attention
            q, k, v = (m(x).unflatten(-1, (3, 16)).transpose(1, 2) for m in (a.query, a.key, a.value))
            k, v = (torch.cat([e.expand(len(x), -1, -1, -1), t], dim=2) for e, t in zip(kv, (k, v), strict=True))
            scores = q @ k.mT / 4
            scores[..., 2:] += 0 if mask is None else mask
            return ((scores.softmax(-1) @ v).transpose(1, 2).flatten(2),)

        layer.attention.attention.forward = forward
    expected = plain(input_ids=ids, attention_mask=mask, pixel_values=images, pixel_mask=there).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_both_kinds_of_heads_and_a_merge(tmp_path: Path) -> None:
    images, ids, mask, there = batch()
    for classes in (None, 5):
        model = own("lora", num_classes=classes)
        with torch.no_grad():
            for parameter in model.adapters["lora"].parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
            assert model.num_classes == (2 if classes is None else 5)
            found = model(images, ids, mask, there)
            plain: Any = model.merge()
            assert type(plain.classifier) is torch.nn.Sequential
            answered = plain(input_ids=ids, attention_mask=mask, pixel_values=images, pixel_mask=there).logits
            torch.testing.assert_close(answered, found, rtol=1e-4, atol=1e-5)
            again = own(num_classes=classes)
            zoo.disk.attach(again, zoo.disk.read(model.save_adapter(tmp_path / str(classes))))
            assert torch.equal(again.eval()(images, ids, mask, there), found)


def test_das_finds_blocks_of_it() -> None:
    """The whole procedure on questions about two patterns."""
    generator = torch.Generator().manual_seed(0)
    patterns, words = torch.randn(2, 3, 24, 24, generator=generator), torch.randint(1, 60, (5,), generator=generator)

    class Questions(torch.utils.data.Dataset[Any]):
        classes = ("yes", "no")

        def __len__(self) -> int:
            return 24

        def __getitem__(self, index: int) -> Any:
            return (patterns[index % 2], words, torch.ones(5, dtype=torch.long)), index % 2

    model = own(num_classes=2, num_hidden_layers=4)
    fit = {"batch_size": 8, "progress": False}
    settings: dict[str, Any] = {"skip": 2, "bottleneck": 8, "search_epochs": 2, "epochs": 2, "turn": 1, "draws": 2}
    report = zoo.run(model, "das", Questions(), Questions(), fit=fit, **settings)
    assert len(report.summary["skip"]) == 2 and 0.2 < report.summary["saved"] < 0.6
    assert model.adapters["das"].config()["skip"] == report.summary["skip"]  # type: ignore[operator, union-attr]


def test_counts_at_full_size() -> None:
    model = zoo.load("vilt-b32", num_classes=0, device="meta")
    assert sum(p.numel() for p in model.backbone.parameters()) == 111_595_008
    whole = zoo.load("vilt-b32-vqa", zoo.adapter("das", skip=(3,)), device="meta")
    assert whole.num_classes == 3129 and whole.num_parameters(trainable=True, head=False) == 3_594_240
    without = zoo.load("vilt-b32", "das", num_classes=0, device="meta")
    assert len(without.adapters["das"].candidates) == 12  # type: ignore[arg-type, union-attr]
    assert without.num_parameters(trainable=True) == 12 * 2 * 149_856 == 3_596_544


def test_what_does_not_fit_is_refused() -> None:
    model, (images, ids, mask) = tiny_model("vilt")
    for given, message in (
        ((images,), "input_ids is NoneType"),
        ((images, "what?"), "input_ids is str"),
        ((images, mask.float()), r"input_ids is torch.float32"),
        ((ids, ids), "reads an image and its text"),
        ((images[:, :1], ids, mask), "reads an image and its text"),
        ((images[:1], ids, mask), "expected one for each"),
        ((images[..., :20], ids, mask), "of whole patches of 8 pixels"),
        ((images, ids, mask, torch.ones(2, 5, 5)), "1 where the image is"),
        ((images, ids + 90, mask), "words from"),
        ((images, ids.repeat(1, 3), mask.repeat(1, 3)), "has places for 16"),
    ):
        with pytest.raises(DataError, match=message):
            model(*given)
    with pytest.raises(AttachError, match="needs tokens points"):
        model.add_adapter("vpt")
