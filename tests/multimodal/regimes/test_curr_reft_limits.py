"""What Curr-ReFT refuses, and what data and models it takes."""

import math
from typing import Any

import pytest
import torch
from small_chat import SETTINGS, exercises, scored_by_length, small_vlm

import zoo
from multimodal.data.exercises import Exercise, open_exercises
from multimodal.families.vlm.micro import micro_tokenizer
from multimodal.regimes.parts import rejection
from multimodal.regimes.parts.grpo import Scores
from multimodal.regimes.parts.rejection import Asking, Rule
from zoo.errors import CombinationError, ConfigError, DataError, MismatchError

pytest.importorskip("trl")

rewarded = pytest.fixture(scored_by_length)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generations": (1, 2, 4)}, "a group needs two answers"),
        ({"stages": ("judge", "hard")}, "2 stages"),
        ({"stages": ("judge", "choice", "hard")}, "'hard' is no stage"),
        ({"at_once": 3}, "do not divide"),
        ({"temperature": 0.0}, "temperature"),
        ({"keep": 100.0}, "keep"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        zoo.registry.regime("curr-reft", **settings)


def test_wrong_data_models_and_rewards_are_refused(tmp_path):
    data = exercises()
    with pytest.raises(DataError, match="no exercise of the stage 'open'"):
        zoo.run(small_vlm(), "curr-reft", open_exercises(data[:8]), **SETTINGS)
    with pytest.raises(DataError, match="level 'judge'"):
        zoo.run(small_vlm(), "curr-reft", {"open": open_exercises(data[:1])}, **SETTINGS)
    for bad, message in (
        ({"question": "a?", "answer": "b"}, "no 'level'"),
        ({"question": " ", "answer": "b", "level": "open"}, "question is ' '"),
        ({"question": "a?", "answer": "b", "level": "hard"}, "level is 'hard'"),
        ({"question": "a?", "answer": "b", "level": "open", "reward": "box"}, "reward is 'box'.*boxes"),
    ):
        with pytest.raises(DataError, match=message):
            open_exercises([bad])[0]
    long = Exercise(None, "why? " * 2000, "so", "open", key="long")
    with pytest.raises(DataError, match=r"the question has \d+ tokens with system=.*the context of"):
        zoo.run(small_vlm(), "curr-reft", open_exercises([long, *data[:8]]), **SETTINGS)
    with pytest.raises(MismatchError, match="writes no answers"):
        zoo.run(
            zoo.load("vit-micro", "lora", num_classes=2, pretrained=False),
            "curr-reft",
            open_exercises(data),
            **SETTINGS,
        )
    with pytest.raises(CombinationError, match="adalora"):
        zoo.run(small_vlm("adalora"), "curr-reft", open_exercises(data), **SETTINGS)

    with pytest.raises(ConfigError, match=r"processor.*could not be loaded"):  # and there is none of random weights
        zoo.run(
            zoo.load("qwen2-vl-2b", "lora", pretrained=False, device="meta"),
            "curr-reft",
            open_exercises(data),
            **SETTINGS,
        )
    torn = [Exercise(b"no image", e.question, e.answer, e.level, key="torn") for e in data]
    with pytest.raises(DataError, match="torn"):
        zoo.run(small_vlm(), "curr-reft", open_exercises(torn), open_exercises(torn), **SETTINGS)

    for value, message in ((math.nan, "is nan"), (RuntimeError("broken"), "raised RuntimeError: broken")):

        def reward(answer: str, reference: str, value: Any = value) -> float:
            if isinstance(value, Exception):
                raise value
            return float(value)

        scores = Scores([Exercise(None, "what?", "red")], {"text": reward})
        with pytest.raises(ConfigError, match=message):
            scores.score("<answer>red</answer>", scores.exercises[0])
    assert Scores([]).score("red", data[-1]) == 0.0  # an answer without tags
    assert Scores([data[-1]]).form([[{"role": "assistant", "content": "<think></think><answer>a</answer>"}]], [0]) == [
        1.0
    ]
    box = Exercise(None, "where?", "[0, 0, 1, 1]", "judge", "boxes")
    tagged = "<think></think><answer>yes</answer>"
    assert Scores([box]).form([tagged], [0]) == [1.0]  # a detection question in an easy stage asks for no box


def test_data_come_from_a_table(tmp_path):
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for exercise in exercises():
        buffer = io.BytesIO()
        exercise.image.save(buffer, "PNG")
        rows.append(
            {
                "image": buffer.getvalue(),
                "question": exercise.question,
                "answer": exercise.answer,
                "level": exercise.level,
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    for source in (tmp_path, tmp_path / "train.parquet"):
        assert [e.level for e, _ in open_exercises(source, split="train")] == [e.level for e in exercises()]
    with pytest.raises(DataError, match="is not there"):
        open_exercises(tmp_path, split="test")


def test_a_model_without_eyes_learns_from_texts_alone(rewarded):
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = zoo.load("qwen2-0.5b", "lora", pretrained=False, num_key_value_heads=1, vocab_size=512, **small)
    model.family.tokenizer = micro_tokenizer()
    asked = [Exercise(None, f"is {i} even?", "no" if i % 2 else "yes", "judge") for i in range(4)]
    settings = {**SETTINGS, "stages": ("judge",), "steps": (2,), "epochs": (1,), "generations": (2,)}
    before = {k: p.detach().clone() for k, p in model.parameters_to_train().items()}
    report = zoo.run(model, "curr-reft", open_exercises(asked), **settings)
    assert report.phases[0]["steps"] == 2 and len(rewarded) == 2
    assert any(not torch.equal(p, before[k]) for k, p in model.parameters_to_train().items())
    with pytest.raises(DataError, match="has no eyes"):
        zoo.run(model, "curr-reft", open_exercises(exercises()[:4]), **settings)


def test_a_stage_with_and_without_images_is_refused():
    """Seen: a TypeError of the library while it trained."""
    model = zoo.load("vlm-micro", "lora", pretrained=False)
    mixed = [*exercises()[:1], Exercise(None, "is 3 even?", "no", exercises()[0].level)]
    settings = {**SETTINGS, "stages": (mixed[0].level,), "steps": (1,), "epochs": (1,), "generations": (2,)}
    with pytest.raises(DataError, match=r"row 1 has no image, and that at .*row 0 has one"):
        zoo.run(model, "curr-reft", open_exercises(mixed), **settings)


def test_the_command_line(tmp_path):
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from typer.testing import CliRunner

    from zoo.cli import app

    rows = []
    for exercise in exercises():
        buffer = io.BytesIO()
        exercise.image.save(buffer, "PNG")
        told = {name: getattr(exercise, name) for name in ("question", "answer", "level")}
        rows.append({"image": buffer.getvalue(), **told})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    words = "run curr-reft vlm-micro lora --quiet -s run.stages=[judge,open] -s run.steps=[1,1] -s run.epochs=[1,1]"
    words += " -s run.generations=[2,2] -s run.prompts=2 -s run.length=8 -s run.improve=false -s run.lr=1e-3"
    folders = ["--data", str(tmp_path), "--test", str(tmp_path), "--test-split", "train", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*words.split(), *folders])
    assert result.exit_code == 0, result.output
    assert "| judge | 1 |" in (tmp_path / "out" / "report.md").read_text()
    assert zoo.load(adapter=tmp_path / "out").active == ("lora",)
    result = CliRunner().invoke(app, [*words.split(), "--shots", "2", *folders[:2], "-o", str(tmp_path / "other")])
    assert result.exit_code != 0 and "--shots" in result.output


def test_a_level_without_exercises_is_refused() -> None:
    with pytest.raises(DataError, match="is no data set of exercises"):
        zoo.run(zoo.load("vlm-micro", "lora"), "curr-reft", {"open": []}, improve=False)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ({"txt": lambda a, r: 1.0}, "rewards has 'txt'.*'text'"),  # it was taken, and never asked
        ({"text": 5}, r"rewards\['text'\] is 5; expected a function"),
    ],
)
def test_rewards_that_no_exercise_has_are_refused(rewards: dict[str, Any], message: str) -> None:
    regime: Any = zoo.registry.regime("curr-reft", **SETTINGS)
    regime.rewards |= rewards
    with pytest.raises(ConfigError, match=message):
        zoo.run(small_vlm(), regime, open_exercises(exercises()))


def test_judges_give_numbers_from_0_to_100(monkeypatch: pytest.MonkeyPatch) -> None:
    exercise, answer = Exercise(None, "what?", "red"), "<think></think><answer>red</answer>"
    assert Rule(Scores([exercise]))(exercise, answer) == 100.0
    with pytest.raises(ConfigError, match="the reward 'text' is 5, and this rule takes 0 to 1"):
        Rule(Scores([exercise], {"text": lambda a, r: 5.0}))(exercise, answer)
    asking = Asking(small_vlm())
    for reply, score in (("85", 85.0), ("Score-90.5 of 100", 90.5)):
        monkeypatch.setattr(rejection, "write", lambda *_, reply=reply, **__: [reply])
        assert asking(exercise, answer) == score
    for reply in ("-5", "none", "120"):
        monkeypatch.setattr(rejection, "write", lambda *_, reply=reply, **__: [reply])
        with pytest.raises(DataError, match="expected a number from 0 to 100"):
            asking(exercise, answer)

    def heard(model: Any, asked: Any, *_: Any, **__: Any) -> list[str]:
        assert asked[0].question == "Is {this} what?? red"
        return ["7"]

    monkeypatch.setattr(rejection, "write", heard)
    assert Asking(small_vlm(), "Is {this} {question}? {reference}{answer}")(exercise, "") == 7.0
    with pytest.raises(ConfigError, match=r"with \{answer\} in it"):
        Asking(small_vlm(), "Is it right?")
