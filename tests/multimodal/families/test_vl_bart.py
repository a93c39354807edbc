"""VL-BART's own, and the released checkpoints of both families; what both have in common stands in test_vl_t5.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import zoo
from zoo import registry
from zoo.errors import MismatchError, WeightsError
from zoo.table import tiny_model

pytest.importorskip("transformers", reason="the extra 'multimodal' is not installed")

FAMILIES = ("vl-t5", "vl-bart")
TOWERS = ("encoder", "decoder")


def random(family: str, **more: Any) -> Any:
    """Another tiny network, with weights of its own."""
    name, options = registry.family(family).tiny or ("", {})
    torch.manual_seed(17)
    return zoo.load(name, pretrained=False, **{**options, **more})


def write(path: Path, state: dict[str, Tensor], rename: Callable[[str], str] = lambda key: key) -> Path:
    """As the authors' runs write: a `module.` in front of all, tied tensors once more."""
    save_file({f"module.{rename(k)}": v.clone().contiguous() for k, v in state.items()}, path)
    return path


# -- released checkpoints ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norms", ["individual", "sum", "none"])
def test_a_released_checkpoint_uses_every_key(family: str, norms: str, tmp_path: Path) -> None:
    settings = {"use_vis_layer_norm": norms != "none", "individual_vis_layer_norm": norms == "individual"}
    source = random(family, feat_dim=7, vocab_size=70, n_images=3, **settings)
    _, (ids, mask, answer, *_) = tiny_model(family)
    features, boxes = torch.randn(2, 5, 7), torch.rand(2, 5, 4)
    state = source.backbone.state_dict()
    assert any(k.endswith("obj_order_embedding.weight") for k in state) and "lm_head.weight" in state
    old = (
        "encoder.version"
        if family == "vl-bart"
        else "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    )
    path = write(
        tmp_path / "Epoch30.safetensors",
        {**state, f"model.{old}" if family == "vl-bart" else old: torch.zeros(2)},
        lambda key: key.replace("encoder.visual_embedding", "vis_encoder.visual_embedding"),
    )
    name, options = registry.family(family).tiny or ("", {})
    options = {k: v for k, v in options.items() if k not in ("vocab_size", "feat_dim")}
    model = zoo.load(name, checkpoint=str(path), **options)
    loaded = model.backbone.state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(v, state[k]) for k, v in loaded.items())
    assert torch.equal(model(ids, mask, answer, features, boxes), source(ids, mask, answer, features, boxes))
    assert model.backbone.config.n_images == 3 and model.family.feat_dim == 7
    words = model.backbone.get_input_embeddings().weight
    assert model.backbone.lm_head.weight is words  # still one tensor
    assert model.family.encoder.visual_embedding.obj_order_embedding.weight is words


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_tied_copies(family: str, tmp_path: Path) -> None:
    source = random(family)
    name, options = registry.family(family).tiny or ("", {})
    copies = ("lm_head", "embed_tokens", "obj_order_embedding", "final_logits_bias")
    state = {k: v for k, v in source.backbone.state_dict().items() if not any(c in k for c in copies)}
    model = zoo.load(name, checkpoint=str(write(tmp_path / "a.safetensors", state)), **options)
    _, batch = tiny_model(family)
    assert torch.equal(model(*batch), source(*batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_wrong_with_a_checkpoint_is_said(family: str, tmp_path: Path) -> None:
    name, options = registry.family(family).tiny or ("", {})
    state = random(family).backbone.state_dict()
    prefix = "" if family == "vl-t5" else "model."

    def load(changed: dict[str, Tensor], file: str = "a.safetensors", **more: Any) -> Any:
        return zoo.load(name, checkpoint=str(write(tmp_path / file, changed)), **{**options, **more})

    for other in ("Epoch30.pth", "pytorch_model.bin", "a.pt"):
        (tmp_path / other).write_bytes(b"\x80\x02cos\nsystem\n")
        with pytest.raises(WeightsError, match=r"pickle.*save_file"):
            zoo.load(name, checkpoint=str(tmp_path / other), **options)
    with pytest.raises(WeightsError, match="There is no checkpoint"):
        zoo.load(name, checkpoint=str(tmp_path / "gone.safetensors"), **options)
    (tmp_path / "torn.safetensors").write_bytes(b"\x80\x02cos\nsystem\n" * 9)
    with pytest.raises(WeightsError, match="no whole safetensors file"):
        zoo.load(name, checkpoint=str(tmp_path / "torn.safetensors"), **options)
    with pytest.raises(WeightsError, match=r"1 tensors.*answer_head\.0\.weight"):
        load({**state, "answer_head.0.weight": torch.zeros(2)})
    norm = next(k for k in state if k.endswith("layer_norm.weight") and "decoder" in k)
    with pytest.raises(WeightsError, match="lacks 1 tensors"):
        load({k: v for k, v in state.items() if k != norm})
    with pytest.raises(MismatchError, match=r"\(31,\) in the checkpoint"):
        load({**state, norm: torch.zeros(31)})
    with pytest.raises(WeightsError, match="NaN"):
        load({**state, norm: state[norm] * float("nan")})
    with pytest.raises(WeightsError, match="one tensor for both"):
        load({**state, "lm_head.weight": state["lm_head.weight"] + 1})
    with pytest.raises(WeightsError, match=r"no '(model\.)?encoder\.visual_embedding"):
        load({k: v for k, v in state.items() if "visual_embedding" not in k})
    with pytest.raises(MismatchError, match="says feat_dim=6, and you say 9"):
        load(state, feat_dim=9)
    assert torch.equal(load(state).backbone.state_dict()[f"{prefix}shared.weight"], state[f"{prefix}shared.weight"])


# -- BART's own ----------------------------------------------------------------------------------------------------------


def test_visual_tokens_have_no_position_and_no_embedding_norm() -> None:
    model, (ids, mask, answer, features, boxes) = tiny_model("vl-bart")
    encoder = model.family.encoder
    seen: list[Tensor] = []
    handle = encoder.layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(ids, mask, answer, features, boxes)
    handle.remove()
    text = encoder.embed_tokens(ids) + encoder.embed_positions.weight[2 : 2 + ids.shape[1]]
    text = torch.nn.functional.layer_norm(
        text, (32,), encoder.layernorm_embedding.weight, encoder.layernorm_embedding.bias
    )
    torch.testing.assert_close(seen[0], torch.cat([text, encoder.visual_embedding(features, boxes)], dim=1))


def test_area_is_the_authors() -> None:
    from multimodal.families.seq2seq.visual_embedding import area

    boxes = torch.tensor([[0.1, 0.2, 0.5, 0.9]])
    torch.testing.assert_close(
        area(boxes), torch.tensor([[(0.9 - 0.5) * (0.2 - 0.1)]])
    )  # not (0.5 - 0.1) * (0.9 - 0.2)


def test_residual_source_of_a_post_norm_block_is_its_input() -> None:
    """`parallel` beside the mlp reads the same stream with source="input" and "residual": there is no norm between them."""
    outputs = []
    for source in ("input", "residual"):
        model, batch = tiny_model("vl-bart")
        torch.manual_seed(0)
        model.add_adapter(zoo.adapter("adapter", form="parallel", rank=4, source=source, targets="attn,cross,mlp"))
        with torch.no_grad():
            for parameter in model.parameters_to_train().values():
                parameter.normal_(std=0.3)
        outputs.append(model.eval()(*batch))
        assert model.probe(*batch) == []
    assert torch.equal(*outputs)


def test_trained_with_its_dropout() -> None:
    """`full` puts the network into training mode, with the library's dropout; the same seed gives the same numbers."""
    import transformers

    name, options = registry.family("vl-bart").tiny or ("", {})
    model = zoo.load(name, "full", pretrained=False, **options)
    _, (ids, mask, answer, *_) = tiny_model("vl-bart")
    plain = transformers.BartForConditionalGeneration(copy.deepcopy(model.backbone.config))
    plain.load_state_dict(model.backbone.state_dict(), strict=False)
    model.train(), plain.train()
    torch.manual_seed(0)
    expected = plain(ids, mask, answer, use_cache=False).logits
    torch.manual_seed(0)
    assert torch.equal(model(ids, mask, answer), expected)


@pytest.mark.parametrize(
    ("family", "positions"),
    [
        ("vl-t5", {f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for stack in TOWERS}),
        ("vl-bart", {f"model.{stack}.embed_positions.weight" for stack in TOWERS}),
    ],
)
def test_only_full_tuning_trains_tables(family: str, positions: set[str]) -> None:
    """Every parameter is that of a linear or a norm point, but for words, positions and the order of images."""
    model, batch = tiny_model(family)
    modules = [p.module for p in model.points if p.kind in ("linear", "norm")]
    covered = {id(p) for module in modules for p in module.parameters(recurse=False)}
    rest = {name for name, p in model.backbone.named_parameters() if id(p) not in covered}
    orders = {n for n in rest if n.endswith("visual_embedding.img_order_embedding.weight")}
    assert len(orders) == 1 and {n for n in rest if "shared" not in n} == positions | orders
    model.add_adapter("full")
    loss = model.train()(*batch, torch.tensor([0, 1, 1, 0, 1])).logsumexp(-1).sum()  # two images
    loss.backward()
    gradients = {k: p.grad for k, p in model.parameters_to_train().items()}
    (order,) = [g for k, g in gradients.items() if k.endswith("img_order_embedding.weight")]
    assert order is not None and bool(order[:2].any(dim=1).all())
