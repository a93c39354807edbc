"""Cards say what was measured, all of it and nothing else."""

from __future__ import annotations

import ast
import inspect
import re
import types
import wave
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

import zoo
from zoo import disk, registry
from zoo.disk import cards, markdown
from zoo.disk.layout import CARD
from zoo.errors import ConfigError, MissingPackageError, SaveError

SMALL = {"pretrained": False, "depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32}
RECORD: dict[str, Any] = {
    "task": "image-classification",
    "data": {"name": "CIFAR-10", "train": 2000, "test": 10000, "hub_id": "uoft-cs/cifar10", "license": "unknown"},
    "metrics": {"test": {"accuracy": 0.9124, "loss": 0.31}, "val": {"accuracy": 0.9}},
    "hyperparameters": {"lr": 0.001, "batch_size": 64, "schedule": "cosine", "clip": None},
    "seconds": 234.5,
    "device": "cpu",
    "license": "apache-2.0",
    "notes": ["Trained once."],
    "tables": [{"title": "Three seeds", "columns": ["seed", "accuracy"], "rows": [[0, 0.91], [1, 0.92]]}],
}


@pytest.fixture
def model() -> zoo.Model:
    """A tiny model with LoRA of rank 8 on q and v of both blocks, and ten classes."""
    torch.manual_seed(0)
    model = zoo.load("timm:vit_tiny_patch16_224", adapter="lora", num_classes=10, **SMALL)
    model.family.pretrained = True  # the card names the source of weights only if they were loaded from it
    return model


def sections(text: str) -> dict[str, str]:
    """Section title -> text."""
    parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def assert_no_placeholder(text: str) -> None:
    body = re.sub(r"```python\n.*?```", "", text.split("---\n", 2)[2], flags=re.DOTALL)
    assert not re.search(
        r"more information|todo|tbd|\bNone\b|\bnan\b|\[[^\]]*\](?!\()|<[^>]+>|\{|\}", body, re.IGNORECASE
    )
    for title, section in sections(text).items():
        assert section.strip(), f"'{title}' is empty"


def test_a_full_card(model: zoo.Model) -> None:
    x = torch.zeros(4, 3, 32, 32)
    saved = model.saved_bytes(x)
    model.record = {**RECORD, "saved_bytes": {"default": saved}}
    text = cards.render(model, source="ann/vit-lora")
    assert_no_placeholder(text)
    found = sections(text)
    assert list(found) == [
        "How to load",
        "Results",
        "Data",
        "Parameters",
        "Memory",
        "Training",
        "Backbone",
        "Licence",
    ]
    assert '\nmodel = zoo.load(adapter="ann/vit-lora")\n' in found["How to load"]
    assert "| accuracy | test | 91.24 % |" in found["Results"] and "| loss | test | 0.31 |" in found["Results"]
    assert "### Three seeds" in found["Results"] and "| 1 | 0.92 |" in found["Results"]
    assert "CIFAR-10 (`uoft-cs/cifar10`): 2,000 train, 10,000 test" in found["Data"]
    # by hand: two blocks x two projections x (48 x 8 + 8 x 48), and a head of 48 x 10 + 10
    adapter, head = 2 * 2 * (48 * 8 + 8 * 48), 48 * 10 + 10
    frozen = sum(value.numel() for value in model.backbone.state_dict().values())
    assert f"| adapter | {adapter:,} | {100 * adapter / (adapter + frozen):.2f} % |" in found["Parameters"]
    share = 100 * (adapter + head) / (adapter + head + frozen)
    assert f"| adapter and head | {adapter + head:,} | {share:.2f} % |" in found["Parameters"]
    assert f"| frozen backbone | {frozen:,} |" in found["Parameters"]
    assert f"{saved / 1000:.1f} kB" in found["Memory"] and "batch of 64" in found["Memory"]
    assert "| lora.rank | 8 |" in found["Training"] and "| lr | 0.001 |" in found["Training"]
    assert "clip" not in found["Training"] and "4 min on cpu" in found["Training"]
    assert str(model.fingerprint) in found["Backbone"] and "apache-2.0" in found["Backbone"]
    assert "Trained once." in text


def test_the_hubs_metadata(model: zoo.Model) -> None:
    model.record = dict(RECORD)
    data = ModelCard(cards.render(model, source="ann/vit-lora")).data
    assert data.license == "apache-2.0" and data.library_name == "adapter-zoo"
    assert data.base_model == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert data.pipeline_tag == "image-classification" and data.datasets == ["uoft-cs/cifar10"]
    assert {"adapter-zoo", "lora", "vit"} <= set(data.tags) and data.metrics == ["accuracy", "loss"]
    results = {(r.dataset_split, r.metric_type): r.metric_value for r in data.eval_results}
    assert results == {("test", "accuracy"): 0.9124, ("test", "loss"): 0.31, ("val", "accuracy"): 0.9}
    assert {r.dataset_name for r in data.eval_results} == {"CIFAR-10"}


def test_nothing_is_said_that_was_not_measured(model: zoo.Model) -> None:
    text = cards.render(model)
    assert_no_placeholder(text)
    assert list(sections(text)) == ["Parameters", "Training", "Backbone"]
    data = ModelCard(text).data
    assert data.license is None and data.eval_results is None and data.datasets is None and data.metrics is None
    model.set_active()
    assert_no_placeholder(cards.render(model, source="x"))


def test_a_licence_that_the_hub_does_not_know(model: zoo.Model) -> None:
    model.record = {"license": "Free for research"}
    text = cards.render(model)
    data = ModelCard(text).data
    assert (data.license, data.license_name) == ("other", "Free for research")
    assert "Free for research" in sections(text)["Licence"]


def test_names_that_would_break_markdown_or_yaml(model: zoo.Model) -> None:
    name = 'a: "b" # c | d\n---\nlicense: mit'
    model.record = {"data": {"name": name}, "metrics": {"accuracy": 0.5}, "hyperparameters": {"x": "1 | 2\n| 3"}}
    text = cards.render(model)
    card = ModelCard(text)
    assert card.data.license is None and card.data.eval_results[0].dataset_name == name
    assert '# LoRA for timm:vit_tiny_patch16_224 on a: "b" # c \\| d --- license: mit\n' in text
    assert "| x | 1 \\| 2 \\| 3 |" in text


NASTY = [
    "<script>alert(1)</script>",
    "a\n\n<img src=x onerror=alert(1)>\n\n## Licence\n\nmit",
    "```\nimport os\n```",
    "~~~\nx",
    "[click](javascript:alert(1)) ![i](http://x/y.png)",
    "**bold** __b__ *i* _i_ `c` ``d`` ~~s~~",
    "a | b \\| c \\",
    "&lt;b&gt; &#60;",
    "1. one",
    "- a",
    "=== setext",
    "> quote",
    "<http://x.y>",
    "tab\tnull\x00 line\u2028end\x1b[31m",
    "\ud800 alone",
    'quote " and \\" and \'',
    "\U0001f426 \xe9",
]


def shown(text: str) -> tuple[set[str], str]:
    """Kinds of elements that a renderer of the Hub's Markdown makes of a text, and the text that a reader sees."""
    from markdown_it import MarkdownIt

    kinds, seen = set(), ""
    for token in MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text):
        for one in [token, *(token.children or [])]:
            kinds.add(one.type.removesuffix("_open").removesuffix("_close"))
            if one.type in ("text", "code_inline", "text_special", "fence", "html_block", "html_inline"):
                seen += one.content
    return kinds - {"inline", "text", "text_special"}, seen


@pytest.mark.parametrize("nasty", NASTY)
def test_texts_of_others_stay_texts(nasty: str) -> None:
    """Line breaks, HTML, fences and quotes in a card's fields broke out of their cells, stayed as HTML, changed its Python."""
    want = markdown.line(nasty)
    assert shown(markdown.plain(nasty)) == ({"paragraph"}, want) or not want
    kinds, seen = shown(markdown.table(["a", "b"], [[nasty, [nasty, 1]], ["x", 2.0]]))
    assert kinds == {"table", "thead", "tbody", "tr", "th", "td"} and seen == f"ab{want}{want}, 1x2"
    assert shown(markdown.code(nasty)) == ({"paragraph", "code_inline"}, want)
    kinds, seen = shown(markdown.prose(nasty))
    assert kinds <= {"paragraph", "code_inline"}
    assert seen.replace("`", "").split() == want.replace("`", "").split()
    written = markdown.python(nasty)
    assert "\n" not in written and ast.literal_eval(written) == nasty.encode("utf-8", "replace").decode()
    for address in (nasty, f"https://x.y/{nasty}"):
        kinds, seen = shown(markdown.link("name", address))
        assert kinds <= {"paragraph", "link", "code_inline"} and seen.startswith("name")
        assert ("link" in kinds) == address.startswith("https://x.y/")


@pytest.mark.parametrize("nasty", NASTY)
def test_a_card_of_texts_of_others(model: zoo.Model, nasty: str) -> None:
    """Every field at once: the card keeps its sections, its metadata, and its Python loads what was meant."""
    if "\ud800" in nasty:  # no file can hold it, so the record is refused
        model.record = {"data": {"name": nasty}}
        with pytest.raises(ConfigError, match="no Unicode"):
            cards.render(model)
        return
    data = {"name": nasty, "train": 3, "license": nasty, "hub_id": nasty, "url": nasty}
    texts = {"license": nasty, "device": nasty, "notes": [nasty, "plain"], "hyperparameters": {nasty: nasty}}
    tables = [{"title": nasty, "columns": [nasty, "b"], "rows": [[nasty, 1]]}]
    model.record = {"data": data, "metrics": {"accuracy": 0.5, nasty: 0.25}, "seconds": 3, "tables": tables, **texts}
    text = cards.render(model, source=nasty)
    _, body = text.split("\n---\n", 1)
    assert not shown(body)[0] & {"html_block", "html_inline", "image", "hr", "blockquote", "ordered_list"}
    from markdown_it import MarkdownIt

    links = [t for block in MarkdownIt("commonmark").enable("table").parse(body) for t in block.children or []]
    assert [t.attrs["href"][:22] for t in links if t.type == "link_open"] == [
        "https://huggingface.co"
    ]  # of the backbone
    assert list(sections(body)) == list(sections(text)) and "How to load" in sections(body)
    assert list(sections(body)) == ["How to load", "Results", "Data", "Parameters", "Training", "Backbone", "Licence"]
    assert len(re.findall(r"^```", body, re.MULTILINE)) == 2
    lines = re.search(r"```python\n(.*?)\n```", body, re.DOTALL)[1]
    (call,) = [
        node for node in ast.walk(ast.parse(lines)) if isinstance(node, ast.Call) and "load" in ast.dump(node.func)
    ]
    assert [k.value.value for k in call.keywords if k.arg == "adapter"] == [nasty]
    assert ModelCard(text).data.eval_results[0].dataset_name == nasty
    assert cards.retarget(text, "ann/other").count('zoo.load(adapter="ann/other")') == 1


def test_units() -> None:
    assert [cards._bytes(n) for n in (999, 1000, 12_345_678, 3_210_000_000)] == [
        "999 bytes",
        "1.0 kB",
        "12.3 MB",
        "3.21 GB",
    ]
    assert [cards._duration(s) for s in (12.4, 119, 234.5, 36000)] == ["12 s", "119 s", "4 min", "10.0 h"]
    assert cards._number("top5", 0.5) == "50.00 %" and cards._number("loss", 0.5) == "0.5"


def test_retarget_changes_only_where_to_load_from(model: zoo.Model) -> None:
    text = cards.render(model, source="out") + '\nI wrote: zoo.load(adapter="mine")\n'
    other = cards.retarget(text, "ann/x")
    assert 'model = zoo.load(adapter="ann/x")' in other
    assert other.replace("ann/x", "out") == text


def test_the_card_of_a_folder(model: zoo.Model, tmp_path: Path) -> None:
    model.record = dict(RECORD)
    folder = model.save_adapter(tmp_path / "vit-lora")
    assert (folder / CARD).read_text() == cards.render(model, source="vit-lora") == disk.read(folder).card
    assert str(tmp_path) not in (folder / CARD).read_text()  # no path of this machine in what is published
    assert cards.write_card(model, tmp_path) == tmp_path / CARD
    assert cards.write_card(model, tmp_path / "cards" / "one.md", source="ann/x").read_text().count("ann/x") == 1
    with pytest.raises(SaveError):
        cards.write_card(model, tmp_path / CARD / "below.md")


def executed(model: zoo.Model, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the Python of the card makes, in a folder with a photo and a sound; weights are random, for want of a network."""
    model.save_adapter(folder / "out")
    code = re.search(r"```python\n(.*?)```", (folder / "out" / CARD).read_text(), re.DOTALL)
    assert code is not None
    real, pretrained = zoo.load, model.family.pretrained

    def load_random(**options: Any) -> zoo.Model:
        again = real(**options, pretrained=False, seed=5)
        again.family.pretrained = pretrained
        return again

    monkeypatch.chdir(folder)
    monkeypatch.setattr(zoo, "load", load_random)
    Image.new("RGB", (40, 50), "red").save("photo.jpg")
    with wave.open("sound.wav", "wb") as file:
        file.setparams((1, 2, 16_000, 8_000, "NONE", ""))
        file.writeframes(bytes(range(250)) * 64)
    names: dict[str, Any] = {}
    exec(code[1], names)
    assert torch.equal(names["model"].backbone.state_dict().popitem()[1], model.backbone.state_dict().popitem()[1])
    return names


def small(family: str, name: str | None = None, num_classes: int | None = None, **more: Any) -> zoo.Model:
    """A random adapted member of a family, of the size of its tiny one, with a seed that can be given again."""
    tiny, options = registry.family(family).tiny or ("", {})
    try:
        return zoo.load(name or tiny, "lora", num_classes=num_classes, pretrained=False, seed=5, **{**options, **more})
    except MissingPackageError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("family", ["vit", "swin", "groupmamba", "clip", "ast", "wav2vec2"])
@pytest.mark.parametrize("classes", [0, 3])
def test_the_lines_run(family: str, classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if registry.family(family).modality == "audio":
        pytest.importorskip("soundfile")
    model = small(family, num_classes=classes)
    names = executed(model, tmp_path, monkeypatch)
    if family == "clip" and not classes:
        assert names["scores"].shape == (1, 2)
        torch.testing.assert_close(names["scores"].sum(), torch.tensor(1.0))
        return
    item = names["sound" if "sound" in names else "image"]
    result = names["logits" if classes else "features"]
    assert result.shape == (1, classes or model.family.feature_dim)
    assert torch.equal(result, model(item[None]))
    written = re.search(r"# \((.*)\)$", (tmp_path / "out" / CARD).read_text(), re.MULTILINE)
    assert written is not None and written[1] == f"1, {result.shape[1]}"


@pytest.mark.parametrize("seen", ["photo", "features", "nothing"])
def test_the_lines_of_networks_that_write(seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    if seen == "photo":
        model = zoo.load("vl-t5-micro", "lora", pretrained=False, seed=5)
    else:
        own = {"words": ["what", "is", "?"], "feat_dim": 5 if seen == "features" else None}
        model = small("vl-t5", vocab_size=None, **own)
    assert ModelCard(cards.render(model)).data.pipeline_tag == (
        "text-generation" if seen == "nothing" else "visual-question-answering"
    )
    names = executed(model, tmp_path, monkeypatch)
    assert len(names["answers"]) == 1 and isinstance(names["answers"][0], str)


def test_the_lines_of_diffusion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model of pixels; of one whose pipeline is on the Hub, with small parts in its place; of one without."""
    pytest.importorskip("diffusers")
    from diffusion_models import XL, tiny_vae

    import multimodal.families.diffusion.pipelines as pipelines

    assert executed(small("dit"), tmp_path / "a", monkeypatch)["images"].shape == (2, 3, 8, 8)
    monkeypatch.undo()
    assert len(executed(small("flux"), tmp_path / "b", monkeypatch)["prediction"]) == 2
    monkeypatch.undo()
    real = pipelines.pipeline
    monkeypatch.setattr(pipelines, "pipeline", lambda model: real(model, vae=tiny_vae()))
    latent = zoo.load("dit-xl2", "lora", pretrained=False, seed=5, **XL)
    latent.family.pretrained = True
    assert executed(latent, tmp_path / "c", monkeypatch)["image"].size == (32, 32)


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("dit-xl2", "unconditional-image-generation"),
        ("pixart-xl2", "text-to-image"),
        ("sd3-medium", "text-to-image"),
        ("flux-dev", "text-to-image"),
        ("cogvideox-5b", "text-to-video"),
        ("cogvideox-5b-i2v", "image-to-video"),
    ],
)
def test_pipelines_are_called_as_they_are_made(name: str, tag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class of the checkpoint's pipeline takes the arguments of the card's call, and the Hub's tag is its kind."""
    diffusers = pytest.importorskip("diffusers")
    import multimodal.families.diffusion.pipelines as pipelines

    model = small(name.split("-")[0], name, **({"in_channels": 8} if "i2v" in name else {}))
    model.family.pretrained = True
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", classmethod(lambda cls, *a, **k: Called(cls)))
    text = cards.render(model, source="ann/x")
    code = re.search(r"```python\n.*?\n\nmodel = [^\n]*\n(.*?)```", text, re.DOTALL)
    assert code is not None and ModelCard(text).data.pipeline_tag == tag
    monkeypatch.setattr(Image, "open", lambda path: Image.new("RGB", (8, 8)))
    exec(code[1], {"model": model, "pipeline": pipelines.pipeline, "Image": Image})


class Called:
    """A pipeline that only looks at how it is called."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        bound = inspect.signature(self.kind.__call__).bind(self, *arguments, **options).arguments
        assert {"prompt", "class_labels"} & bound.keys()
        return types.SimpleNamespace(images=["x"], frames=["x"])
