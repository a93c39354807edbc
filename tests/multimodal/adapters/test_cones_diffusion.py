"""ConES in diffusion transformers: rows of a class embedding, and the context of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import zoo

pytest.importorskip("open_clip")
pytest.importorskip("diffusers")

from zoo.errors import ConfigError, DataError, MergeError
from zoo.table import tiny_model


def test_a_class_row_of_a_diffusion_transformer() -> None:
    model, (latents, steps, _) = tiny_model("dit")
    frozen = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    labels = torch.tensor([4, 10])  # 10: no class
    with torch.no_grad():
        before = model(latents, steps, labels)
        model.add_adapter(zoo.adapter("cones", labels=(7, 4)))
        assert torch.equal(model(latents, steps, labels), before)
    assert set(model.parameters_to_train()) == {"cones/concept.shift"}
    assert model.num_parameters(trainable=True) == 2 * 16
    model.train()
    (model(latents, steps, labels) - 1).square().mean().backward()
    shift = model.parameters_to_train()["cones/concept.shift"]
    assert shift.grad is not None and shift.grad[1].any() and not shift.grad[0].any()  # 7 is not in the batch
    with torch.no_grad():
        shift.normal_()
        after = model.eval()(latents, steps, labels)
        assert not torch.allclose(after[0], before[0]) and torch.equal(after[1], before[1])
        plain = model.merge()
        table = plain.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight  # type: ignore[union-attr,index]
        own = frozen["transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"]
        torch.testing.assert_close(table[[7, 4]], own[[7, 4]] + shift)
        assert torch.equal(table[[0, 10]], own[[0, 10]])  # type: ignore[call-overload]
        torch.testing.assert_close(model.family.run(plain, latents, steps, labels), after, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(v, frozen[k]) for k, v in model.backbone.state_dict().items())


def test_a_row_then_with_lora() -> None:
    model, (latents, steps, labels) = tiny_model("dit")
    model.add_adapter(zoo.adapter("cones", labels=(int(labels[0]),)))
    model.add_adapter(zoo.adapter("lora", rank=2))
    model.train()
    assert model.probe(latents, steps, labels) == []
    alone = model(latents, steps, labels)
    torch.testing.assert_close(model(latents, steps, labels, adapters=["cones", "lora"]), alone)  # both at their start
    model.set_active("cones", "lora", train="lora")
    for setting in ("low", "min"):
        model.memory = setting
        model(latents, steps, labels).square().mean().backward()
        assert model.adapters["cones"].module_at("concept").shift.grad is None  # type: ignore[operator,union-attr]
        assert all(p.grad is not None for p in model.parameters_to_train().values())


def test_a_row_is_learned_by_the_denoising_loss() -> None:
    from multimodal.tasks.diffuse import Diffuse

    model, _ = tiny_model("dit")
    model.add_adapter(zoo.adapter("cones", labels=(3,)))
    with torch.no_grad():  # DiT starts its modulation at zero, where no condition acts
        for p in model.backbone.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    channels = model.family.latent_channels  # type: ignore[attr-defined]
    one = torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(2)).expand(16, -1, -1, -1).clone()
    data = zoo.open_dataset(TensorDataset(one, torch.full((16,), 3)), classes=[str(i) for i in range(10)])
    task = Diffuse(drop=0.2)
    before = zoo.evaluate(model, data, task=task, progress=False)["loss"]
    zoo.fit(model, data, task=task, epochs=8, batch_size=8, lr=0.05, progress=False)
    assert zoo.evaluate(model, data, task=task, progress=False)["loss"] < before


def text_model(family: str = "cogvideox", **settings: Any) -> tuple[zoo.Model, tuple[Tensor, ...]]:
    """A tiny model that knows the contexts of its batch, the second of which is another one."""
    model, batch = tiny_model(family)
    adapter: Any = model.add_adapter(zoo.adapter("cones", **settings))
    adapter.calibrate(model, [((batch[0], batch[2]), None)], "diffuse")
    return model, batch


@pytest.mark.parametrize("tokens", [(), (0, 2)])
@pytest.mark.parametrize("family", ["cogvideox", "unet"])
def test_the_text_context(family: str, tokens: tuple[int, ...], tmp_path: Path) -> None:
    bare, (latents, steps, text) = tiny_model(family)
    with torch.no_grad():
        before = bare(latents, steps, text)
    model, _ = text_model(family, tokens=tokens)
    length, width = text.shape[1:]
    shift = model.parameters_to_train()["cones/condition.text.shift"]
    assert shift.shape == (2, len(tokens) or length, width)
    with torch.no_grad():
        assert torch.equal(model(latents, steps, text), before)
        shift.normal_()
        adapter: Any = model.adapters["cones"]
        searched = adapter.embeddings()
        places = list(tokens) or list(range(length))
        assert torch.equal(searched[:, places], text[:, places] + shift)
        others = [i for i in range(length) if i not in places]
        assert torch.equal(searched[:, others], text[:, others])
        after = model(latents, steps, text)
        torch.testing.assert_close(after, bare(latents, steps, searched), rtol=1e-5, atol=1e-5)
        nothing = torch.zeros_like(text)  # the empty prompt, or any other
        assert torch.equal(model(latents, steps, nothing), bare(latents, steps, nothing))
        rounded = text.bfloat16().float()
        assert not torch.allclose(model(latents, steps, rounded), before, atol=1e-3)  # is known in spite of rounding
        assert torch.equal(model(latents, steps, text[:, :-1]), bare(latents, steps, text[:, :-1]))
    assert model.train().probe(latents, steps, text) == []
    with pytest.raises(MergeError, match="a text is no weight"):
        model.merge()
    model.save_adapter(tmp_path / "out")
    again, _ = tiny_model(family)
    from zoo.disk import attach, read

    attach(again, read(tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(again(latents, steps, text), after)


def test_texts_that_do_not_fit() -> None:
    model, batch = tiny_model("cogvideox")
    adapter: Any = model.add_adapter(zoo.adapter("cones", contexts=1))
    hooks = [len(m._forward_pre_hooks) for m in model.backbone.modules()]
    with pytest.raises(ConfigError, match="2 different texts or more, and it searches 1"):
        adapter.calibrate(model, [((batch[0], batch[2]), None)], "diffuse")
    with pytest.raises(DataError, match="no batch"):
        adapter.calibrate(model, [], "diffuse")
    with pytest.raises(ConfigError, match="no text embeddings"):
        adapter.embeddings()
    with pytest.raises(ConfigError, match="a context has"):
        text_model(tokens=(1000,))
    assert [len(m._forward_pre_hooks) for m in model.backbone.modules()] == hooks and not model.parameters_to_train()


def test_the_text_is_found_by_a_fit() -> None:
    model, (latents, _, text) = tiny_model("cogvideox")
    model.add_adapter("cones")
    items = [((latents[0], text[0]), 0)] * 4

    class Items(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(items)

        def __getitem__(self, index: int) -> Any:
            return items[index]

    zoo.fit(model, Items(), epochs=2, batch_size=2, lr=0.05, progress=False)
    adapter: Any = model.adapters["cones"]
    assert adapter.plan == {"contexts": 1, "length": text.shape[1]}
    assert not torch.equal(adapter.embeddings()[0], text[0])


def test_a_unets_own_pipeline_reads_the_searched_text() -> None:
    """By keyword, as pipelines call it; SD 1.5's whole context is 77 x 768. The merged network is the library's own again."""
    import diffusers

    model, (latents, steps, text) = text_model("unet")
    shift = model.parameters_to_train()["cones/condition.text.shift"]
    with torch.no_grad():
        shift.normal_()
        wanted = model(latents, steps, text)
        network: Any = model.backbone
        called = model.passing(
            lambda: network(sample=latents, timestep=steps, encoder_hidden_states=text).sample, latents, steps, text
        )
        assert torch.equal(called, wanted)
        model.remove_adapter("cones")
        plain: Any = model.merge()
    assert type(plain) is diffusers.UNet2DConditionModel and not hasattr(plain, "text_entry")
    assert not plain._forward_pre_hooks and not plain._forward_pre_hooks_with_kwargs
    with torch.no_grad():
        assert torch.equal(plain(latents, steps, text).sample, model(latents, steps, text))
        assert not torch.allclose(wanted, model(latents, steps, text), atol=1e-3)
    whole = zoo.load("sd15", device="meta")
    point = whole.points["condition.text"]
    assert (whole.family.text_tokens, point.dim_in) == (77, 768)  # type: ignore[attr-defined]
    adapter = zoo.adapter("cones")
    adapter.plan = {"contexts": 1, "length": 77}
    whole.add_adapter(adapter)
    assert whole.num_parameters(trainable=True) == 59_136
