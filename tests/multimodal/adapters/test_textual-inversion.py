"""Textual inversion: a word beside the table, the pipeline's own encoder, and nothing else that learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import zoo

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import diffusers
import transformers
from diffusion_models import tiny_vae

from multimodal.adapters.textual_inversion import new_word, teach
from multimodal.tasks.invert import Invert
from zoo.errors import AttachError, ConfigError, MismatchError

LENGTH = 12


def tokenizer() -> Any:
    """CLIP's, of letters and one longer word."""
    letters = "abcdefghijklmnopqrstuvwxyz<>,.-_123"
    words = [*letters, *(f"{c}</w>" for c in letters), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    merges = [("c", "a"), ("ca", "t</w>")]
    vocab = {w: i for i, w in enumerate(words)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=40)


def encoder(words: Any, seed: int = 0, cls: str = "CLIPTextModel", **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=40,
        **{"eos_token_id": words.eos_token_id, **changes},
    )
    return getattr(transformers, cls)(config).eval()


def wrapped(module: Any) -> zoo.Model:
    return zoo.wrap(module, example=(torch.ones(2, LENGTH, dtype=torch.long),), name="words")


def ids(words: Any, *texts: str) -> Tensor:
    found = words(list(texts), padding="max_length", max_length=LENGTH, return_tensors="pt")
    return found.input_ids  # type: ignore[no-any-return]


@pytest.mark.parametrize("count", [1, 3])
def test_a_word_starts_as_another_and_old_texts_stay(count: int) -> None:
    words = tokenizer()
    model = wrapped(encoder(words))
    old = ids(words, "a cat", "dog.")
    before = model(old)
    frozen = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    size = len(words)
    made = new_word(model, words, "<toy>", start="cat", num_vectors=count)
    assert torch.equal(model(old), before) and len(words) == size + count
    assert model.num_parameters(trainable=True, head=False) == 16 * count
    assert [k.rpartition(".")[2] for k in model.parameters_to_train()] == ["vectors"]
    if count == 1:
        assert torch.equal(model(ids(words, "a <toy>")), before[:1])
    model.train()
    new = ids(words, f"a {made.text} cat")
    assert (new >= size).sum() == count
    (model(new) * torch.linspace(-1, 1, 16)).sum().backward()
    (vectors,) = model.parameters_to_train().values()
    assert vectors.grad is not None and vectors.grad.ne(0).any(dim=1).all()
    # against the library's own module with a longer table
    plain = encoder(words, cls="CLIPTextModel")
    with torch.no_grad():
        table = plain.get_input_embeddings()
        rows = torch.cat([frozen[next(k for k in frozen if k.endswith("token_embedding.weight"))], vectors])
        plain.load_state_dict({k: rows if k.endswith("token_embedding.weight") else v for k, v in frozen.items()})
        vectors.normal_()
        table.weight[size:] = vectors
        torch.testing.assert_close(model.eval().backbone(new)[0], plain(new)[0])
    model.remove_adapter("textual-inversion")
    assert torch.equal(model(old), before)
    assert all(torch.equal(v, frozen[k]) for k, v in model.backbone.state_dict().items())


def test_a_row_inside_of_a_table_with_padding() -> None:
    """T5's table has more rows than its tokenizer tokens."""
    words = tokenizer()
    config = transformers.T5Config(vocab_size=len(words) + 20, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    model = wrapped(transformers.T5EncoderModel(config).eval())
    new_word(model, words, "<toy>", start="cat")
    assert torch.equal(model(ids(words, "a <toy>")), model(ids(words, "a cat")))


def test_is_saved_and_taught(tmp_path: Path) -> None:
    words = tokenizer()
    model = wrapped(encoder(words))
    new_word(model, words, "<toy>", start="cat")
    with torch.no_grad():
        for p in model.parameters_to_train().values():
            p.normal_()
    text = ids(words, "a <toy>")
    model.save_adapter(tmp_path / "out")
    fresh = tokenizer()
    again = zoo.load(
        encoder(fresh), adapter=tmp_path / "out", example=(torch.ones(2, LENGTH, dtype=torch.long),), name="words"
    )
    adapter: Any = again.adapters["textual-inversion"]
    teach(fresh, adapter)
    assert torch.equal(ids(fresh, "a <toy>"), text) and torch.equal(again(text), model(text))
    with pytest.raises(ConfigError, match="'<toy>' already"):
        teach(fresh, adapter)
    other = tokenizer()
    other.add_tokens(["<else>"])
    with pytest.raises(MismatchError, match="next one is"):
        teach(other, adapter)


def test_what_is_refused() -> None:
    words = tokenizer()
    model = wrapped(encoder(words))
    with pytest.raises(AttachError, match="needs the tokenizer"):
        model.add_adapter("textual-inversion")
    with pytest.raises(AttachError, match="no embedding of words"):
        zoo.load("vit-micro", "textual-inversion", num_classes=3, pretrained=False)
    with pytest.raises(ConfigError, match="'dog', which is 3 tokens"):
        new_word(model, words, "<toy>", start="dog")
    with pytest.raises(ConfigError, match="without spaces"):
        new_word(model, words, "my toy")
    assert "<toy>" not in words.get_vocab() and not model.adapters
    pooled = wrapped(encoder(words, cls="CLIPTextModelWithProjection", eos_token_id=2))
    with pytest.raises(ConfigError, match="eos_token_id is 2"):
        new_word(pooled, words, "<toy>", start="cat")
    with pytest.raises(ConfigError, match="not described here"):
        Invert(model, object(), "<toy>")


def test_a_pipeline_learns_a_word() -> None:
    words = tokenizer()
    denoiser = zoo.load(
        "sd15",
        pretrained=False,
        seed=0,
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=16,
        norm_num_groups=4,
    )
    vae = diffusers.AutoencoderKL(**{**tiny_vae().config, "latent_channels": 4})
    pipe = diffusers.StableDiffusionPipeline(
        vae,
        encoder(words),
        words,
        denoiser.backbone,
        denoiser.family.scheduler(),
        None,
        None,
        requires_safety_checker=False,
    )
    text = wrapped(pipe.text_encoder)
    made = new_word(text, words, "<toy>", start="cat")
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)).expand(4, -1, -1, -1).clone()
    data = TensorDataset(pixels, torch.zeros(4, dtype=torch.long))
    frozen = {k: v.clone() for k, v in denoiser.backbone.state_dict().items()}
    task = Invert(denoiser, pipe, made.text, templates=("a {}", "my {}"))
    before = zoo.evaluate(text, data, task=task, progress=False)["loss"]
    assert before == zoo.evaluate(text, data, task=task, progress=False)["loss"]
    zoo.fit(text, data, task=task, epochs=1, batch_size=4, augment="none", progress=False)
    text.eval()
    (vectors,) = text.parameters_to_train().values()
    loss, _ = task.loss(text, pixels, None)  # in evaluation the noise is always the same
    loss.backward()
    assert vectors.grad is not None and all(p.grad is None for p in denoiser.parameters())
    with torch.no_grad():
        vectors -= 0.05 * vectors.grad / vectors.grad.norm()
        assert task.loss(text, pixels, None)[0] < loss
    assert all(torch.equal(v, frozen[k]) for k, v in denoiser.backbone.state_dict().items())
    pipe.set_progress_bar_config(disable=True)

    def sample(prompt: str) -> Tensor:
        noise = torch.Generator().manual_seed(3)
        options: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
        return pipe(prompt, generator=noise, **options).images  # type: ignore[no-any-return]

    with_word, without = sample("a <toy>"), sample("a cat")
    assert not torch.equal(with_word, without)
    with text.disable():
        assert torch.equal(sample("a cat"), without)
    with pytest.raises(MismatchError, match="no text encoder of this pipeline"):
        zoo.evaluate(wrapped(encoder(words)), data, task=task, progress=False)
    with pytest.raises(ConfigError, match="no token '<else>'"):
        zoo.evaluate(text, data, task=Invert(denoiser, pipe, "<else>"), progress=False)


def test_count() -> None:
    words = tokenizer()
    config = transformers.CLIPTextConfig(vocab_size=49408, hidden_size=768, num_hidden_layers=1, intermediate_size=8)
    model = wrapped(transformers.CLIPTextModel(config))
    new_word(model, words, "<toy>")
    assert model.num_parameters(trainable=True, head=False) == 768
