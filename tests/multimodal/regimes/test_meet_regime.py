"""MEET's two stages on a small VL-T5: what each trains, what is left of them when one is left out, and what they measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from multimodal.data.questions import Question, open_questions
from zoo.errors import ConfigError, DataError

pytest.importorskip("transformers", reason="the extra 'multimodal' is not installed")

from multimodal.regimes.meet import OfQuality, of_qualities
from multimodal.tasks.generate import Generate

SMALL: dict[str, Any] = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 1, "feat_dim": 6}
SHAPES = ("circle", "triangle", "rectangle")
FIT: dict[str, Any] = {"batch_size": 6, "progress": False}
WORDS = {"good": "yes", "bad": "no"}


def model() -> Any:
    torch.manual_seed(0)
    return zoo.load("vl-t5-micro", pretrained=False, **SMALL)


def questions(wrong: bool = False) -> list[Question]:
    """Three things that features say plainly; the bad answers name another thing."""
    found = []
    for i in range(6):
        features = torch.zeros(2, 6)
        features[:, i % 3] = 1.0 + i // 3
        name = SHAPES[(i + wrong) % 3]
        found.append(Question((features, None), "what is it?", (f"a {name}",), i))
    return found


def ready(wrong: bool = False) -> Any:
    return open_questions(questions(wrong))


def data() -> dict[str, Any]:
    return {"good": ready(), "bad": ready(wrong=True)}


def run(network: Any, **settings: Any) -> Any:
    own = {"control_epochs": 1, "epochs": 1, "num_tokens": 2, "answer_length": 4, "fit": FIT, **settings}
    return zoo.run(network, "meet", own.pop("data", data()), own.pop("test", None), **own)


def values(network: Any, name: str) -> dict[str, Any]:
    return {k: v.detach().clone() for k, v in network.adapters[name].named_parameters()}


def test_stage_one_trains_controls_and_stage_two_the_network(tmp_path: Path) -> None:
    network = model()
    frozen = {k: v.clone() for k, v in network.backbone.state_dict().items()}
    report = run(network, test=ready(), out=tmp_path / "run")
    assert [p["name"] for p in report.phases] == ["controls", "model"]
    assert network.active == ("meet", "whole")
    assert [p["parameters"] for p in report.phases] == [
        128,
        128 + sum(v.numel() for v in values(network, "whole").values()),
    ]
    still = [k for k, v in values(network, "whole").items() if torch.equal(v, frozen[k.removeprefix("backbone.")])]
    assert all("absolute_vis_pos_embedding.0.weight" in name for name in still)  # there are no boxes
    network.remove_adapter("whole")
    assert all(torch.equal(v, frozen[k]) for k, v in network.backbone.state_dict().items())
    assert set(report.summary) == {"start", "controls", "model"}
    assert "| behind stage | score, good | score, bad | controllability |" in str(report.table())

    again = run(model(), test=ready(), out=tmp_path / "run")  # reads back what was done
    assert again.summary == report.summary


def test_controls_alone_are_a_tuned_prompt_for_each_quality() -> None:
    """With data of one quality it is prompt tuning, to the bit."""
    network, other = model(), model()
    run(network, data={"good": ready()}, stages="controls", fit={**FIT, "seed": 3})
    other.add_adapter(zoo.adapter("vpt", num_tokens=2, deep=False, pool="all", start="normal"))
    torch.manual_seed(0)
    zoo.data.seeds.seed_everything(0, "meet", "between", -1)
    prompt = torch.empty(1, 2, 32).normal_(0, 0.02)[0]
    with torch.no_grad():
        next(other.adapters["vpt"].parameters()).copy_(prompt)
    zoo.fit(
        other,
        questions(),
        task=Generate(answer_length=4),
        epochs=1,
        lr=1e-3,
        weight_decay=0.0,
        seed=3,
        val=None,
        **FIT,
    )
    (trained,), (expected,) = values(network, "meet").values(), values(other, "vpt").values()
    torch.testing.assert_close(trained[0], expected, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(expected, prompt)


def test_words_in_front_are_what_prompts_of_their_embeddings_are() -> None:
    """The start of `words`: the same scores as with the word in the input, which is what Chain of Hindsight tunes."""
    network = model()
    run(network, words=WORDS, stages="model", controls=False, lr=1e-12)
    plain = model()
    for quality, word in WORDS.items():
        task, spoken = Generate(answer_length=4), Generate(answer_length=4, prefix=f"{word} vqa: ")
        inputs, said = (t.open(plain, questions(), train=False)[0][0] for t in (task, spoken))
        batch, other = ([x[None] for x in row] for row in (inputs, said))
        with network.context(quality=quality), torch.no_grad():
            found = network(*batch)
        length = int(batch[1].sum())
        assert other[0][0, 1 : length + 1].tolist() == batch[0][0, :length].tolist()
        torch.testing.assert_close(found, plain(*other), rtol=1e-4, atol=1e-5)


def test_each_control_learns_its_own_answers() -> None:
    network = model()
    settings = {"control_epochs": 1, "epochs": 60, "lr": 1e-2, "control_lr": 1e-2}
    report = run(network, test=ready(), fit={**FIT, "batch_size": 12}, **settings)
    assert report.summary["model"]["scores"] == {"good": 1.0, "bad": 0.0}
    assert report.summary["model"]["controllability"] == 1.0
    task = OfQuality(Generate(answer_length=4), ("good", "bad"), always="bad")
    scores = zoo.evaluate(network, questions(wrong=True), task=task, progress=False, record="")
    assert scores["exact_match"] == 1.0


def test_equal_controls_control_nothing() -> None:
    report = run(model(), test=ready(), words={"good": "yes", "bad": "yes"}, stages="controls", control_lr=1e-12)
    assert report.summary["start"]["controllability"] == report.summary["controls"]["controllability"] == 0.0


def test_frozen_controls_stay_and_trained_ones_move() -> None:
    drawn = {}
    for controls in (True, False):
        network = model()
        run(network, words=WORDS, stages="model", controls=controls)
        drawn[controls] = next(iter(values(network, "meet").values()))
    words = model().family.tokenizer.convert_tokens_to_ids(list(WORDS.values()))
    start = model().backbone.get_input_embeddings().weight[words]
    assert torch.equal(drawn[False][:, 0], start) and not torch.equal(drawn[True], drawn[False])


def test_images_of_different_data_are_told_apart() -> None:
    """Both data sets count their images from 0."""
    twisted = [Question((q.image[0] + 5, None), q.text, q.answers, q.key) for q in questions()]
    joined = of_qualities({"good": questions(), "bad": twisted})
    opened = OfQuality(Generate(answer_length=4), ("good", "bad")).open(model(), joined, train=False)
    (first, target), (other, answer) = opened[0], opened[6]
    assert torch.equal(first[3] + 5, other[3]) and (target["quality"], answer["quality"]) == (0, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": ready()}, "dict of questions by the quality"),
        ({"data": {}}, "dict of questions by the quality"),
        ({"test": {"good": ready()}}, "one data set of questions with good answers"),
        ({"words": {"good": "yes"}}, "give one text for each"),
        ({"words": {"good": "yes", "bad": "not yes"}}, "as many of each"),
        ({"words": WORDS, "form": "lora"}, "the form 'lora' has none"),
        ({"stages": "third"}, "expected one of both"),
        ({"stages": "model", "controls": False}, "leaves the controls as they were drawn"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_done(settings: dict[str, Any], message: str) -> None:
    network = model()
    with pytest.raises((ConfigError, DataError), match=message):
        run(network, **settings)
    assert not network.adapters


def test_a_model_with_adapters_in_use_is_refused() -> None:
    network = model()
    network.add_adapter("lora")
    with pytest.raises(ConfigError, match="in use are lora"):
        run(network)
    with pytest.raises(DataError, match="say no quality"):
        OfQuality(Generate(), ("good", "bad")).open(network, questions(), train=True)


def test_lists_of_questions_are_data() -> None:
    """They need not be opened beforehand."""
    lists = {"good": questions(), "bad": questions(wrong=True)}
    pairs = ((lists, questions()), (data(), ready()))
    one, other = (run(model(), data=given, test=test, stages="controls").summary for given, test in pairs)
    assert one and one == other
