"""Curr-ReFT: groups, advantages and loss against a computation by hand; going on between and inside of stages; bad input."""

import json
import math
from typing import Any

import pytest
import torch
from small_chat import SHORT, exercises, small_vlm
from torch.optim.optimizer import register_optimizer_step_pre_hook

import zoo
from multimodal.data.exercises import Exercise, open_exercises
from multimodal.families.vlm.micro import micro_tokenizer
from multimodal.regimes.curr_reft import CurrReFT
from multimodal.regimes.parts.grpo import GRPO, Scores
from multimodal.regimes.parts.rejection import Rule
from multimodal.regimes.parts.tuning import Tuning, inputs_of, write
from zoo.errors import CombinationError, ConfigError, DataError, MismatchError

pytest.importorskip("trl")

STAGE: dict[str, Any] = {
    "steps": 2,
    "prompts": 2,
    "generations": 3,
    "beta": 0.5,
    "lr": 0.1,
    "temperature": 1.0,
    "length": 4,
    "at_once": 0,
    "system": SHORT,
    "save_steps": 1,
    "clip": 1e9,
    "seed": 0,
}


@pytest.fixture
def rewarded(monkeypatch):
    """Completions are scored by how many letters they have, since random weights write no tags; what was scored is kept."""
    seen: list[Any] = []

    def accuracy(self: Scores, completions: Any, completion_ids: Any, row: Any, **_: Any) -> list[float]:
        seen.append([(list(ids), i, len(c[0]["content"]) / 10) for c, ids, i in zip(completions, completion_ids, row)])
        return [score for *_, score in seen[-1]]

    monkeypatch.setattr(Scores, "accuracy", accuracy)
    return seen


def log_probabilities(model: Any, data: Any, row: int, ids: list[int]) -> torch.Tensor:
    """Of the words of one answer: no batch, no padding, no trainer."""
    inputs = inputs_of(model.family.processor, [data.rows.read(row)[0]], SHORT, torch.device("cpu"))
    before, answer = inputs["input_ids"].shape[1], torch.tensor([ids])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(ids)))
    logits = model.passing(lambda: model.backbone(**inputs)).logits[0, before - 1 : -1]
    return logits.log_softmax(-1).gather(1, answer.T)[:, 0]


def put(model: Any, values: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, p in model.parameters_to_train().items():
            p.copy_(values[name])


def by_hand(model: Any, data: Any, drawn: list[Any], values: Any, start: Any, beta: float) -> dict[str, torch.Tensor]:
    """Gradients of the loss of one step."""
    groups: dict[int, list[float]] = {}
    for _, row, score in drawn:
        groups.setdefault(row, []).append(score)
    put(model, start)
    with torch.no_grad():
        references = [log_probabilities(model, data, row, ids) for ids, row, _ in drawn]
    put(model, values)
    total = torch.zeros(())
    for (ids, row, score), reference in zip(drawn, references, strict=True):
        scores = torch.tensor(groups[row])
        advantage = (score - scores.mean()) / (scores.std() + 1e-4)
        own = log_probabilities(model, data, row, ids)
        divergence = (reference - own).exp() - (reference - own) - 1
        total = total - ((own - own.detach()).exp() * advantage - beta * divergence).mean() / len(drawn)
    named = model.parameters_to_train()
    return dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))


LORA = zoo.adapter("lora", targets="all-linear")


@pytest.mark.parametrize(("adapter", "at_once"), [(LORA, 0), (LORA, 3), ("full", 0)], ids=["all", "parts", "full"])
def test_advantages_and_loss_are_those_computed_by_hand(rewarded, adapter, at_once):
    model, data = small_vlm(adapter), open_exercises(exercises())
    generator = torch.Generator().manual_seed(1)
    start = {k: p + 0.1 * torch.randn(p.shape, generator=generator) for k, p in model.parameters_to_train().items()}
    put(model, start)
    steps: list[Any] = []

    def keep(optimizer: Any, *_: Any) -> None:
        named = model.parameters_to_train()
        steps.append(({k: p.detach().clone() for k, p in named.items()}, {k: p.grad.clone() for k, p in named.items()}))

    handle = register_optimizer_step_pre_hook(keep)
    try:
        entry = GRPO(**{**STAGE, "at_once": at_once}).train(model, data, None, {})
    finally:
        handle.remove()
    assert len(steps) == len(rewarded) == entry["steps"] == 2
    assert entry["history"][0]["kl"] == pytest.approx(0, abs=1e-6) and entry["history"][1]["kl"] > 1e-3
    for (values, gradients), drawn in zip(steps, rewarded, strict=True):
        assert [len({row for _, row, _ in drawn}), len(drawn)] == [2, 6]  # two questions, three answers each
        assert len({score for *_, score in drawn}) > 1
        expected = by_hand(model, data, drawn, values, start, STAGE["beta"])
        assert max(float(g.abs().max()) for g in gradients.values()) > 0.01
        for name, value in expected.items():
            torch.testing.assert_close(gradients[name], value, rtol=1e-3, atol=1e-5)
    assert list(model.backbone._modules) == ["model", "lm_head"] and "forward" not in vars(model.backbone)


def test_equal_rewards_and_no_divergence_change_nothing():
    model, data = small_vlm(), open_exercises(exercises())
    before = {k: p.detach().clone() for k, p in model.parameters_to_train().items()}
    entry = GRPO(**{**STAGE, "beta": 0.0}).train(model, data, None, {})
    assert all(h["equal_groups"] == 1 and h["reward"] == 0 for h in entry["history"])
    assert all(torch.equal(p, before[k]) for k, p in model.parameters_to_train().items())


SETTINGS: dict[str, Any] = {
    "steps": (1, 2, 1),
    "prompts": 2,
    "length": 4,
    "lr": 0.1,
    "system": SHORT,
    "save_steps": 1,
    "improve": False,
}


def test_stages_go_on_between_and_inside(rewarded, tmp_path):
    data = open_exercises(exercises())
    whole = small_vlm()
    report = zoo.run(whole, "curr-reft", data, open_exercises(exercises()[-2:]), out=tmp_path / "whole", **SETTINGS)
    assert [p["name"] for p in report.phases] == ["judge", "choice", "open"]
    assert [p["steps"] for p in report.phases] == [1, 2, 1]
    rows = [{row for _, row, _ in drawn} for drawn in rewarded]
    assert set(report.summary) == {
        f"accuracy {w}" for w in ("at the start", "after judge", "after choice", "after open")
    }
    assert (
        len(rows) == 4
        and "| choice | 2 |" in report.table()
        and (tmp_path / "whole" / "report.png").stat().st_size > 1000
    )

    class Killed(BaseException):
        pass

    rewarded.clear()
    scored = Scores.accuracy

    def dies(self: Any, **given: Any) -> Any:
        if len(rewarded) == 2:  # in the second step of the second stage
            raise Killed
        return scored(self, **given)

    dies.__name__ = "accuracy"
    model = small_vlm()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Scores, "accuracy", dies)
        zoo.run(model, "curr-reft", data, open_exercises(exercises()[-2:]), out=tmp_path / "cut", **SETTINGS)
    assert (tmp_path / "cut" / "001-choice" / "last.safetensors").exists()
    again = zoo.run(model, "curr-reft", data, open_exercises(exercises()[-2:]), out=tmp_path / "cut", **SETTINGS)
    assert len(rewarded) == 4  # nothing was done twice
    assert not (tmp_path / "cut" / "001-choice" / "last.safetensors").exists()
    numbers = [
        [{k: v for k, v in h.items() if k != "loss"} for p in r.phases for h in p["history"]] for r in (report, again)
    ]
    assert numbers[0] == numbers[1] and report.summary == again.summary
    for name, p in whole.parameters_to_train().items():
        assert torch.equal(p, model.parameters_to_train()[name]), name


def good(completion: str) -> float:
    """A judge that likes every second answer."""
    return 100.0 if len(completion) % 2 else 0.0


def test_its_own_good_answers_are_kept_and_a_failing_judge_costs_one(tmp_path):
    data = open_exercises(exercises())
    asked: list[Any] = []

    def judge(exercise: Exercise, completion: str) -> float:
        asked.append(exercise.key)
        if len(asked) == 6:
            raise OSError("the line is dead")
        return 90.0 if len(asked) % 2 else 85.0  # 85 is not above 85

    def regime() -> CurrReFT:
        settings = {
            **SETTINGS,
            "stages": ("judge",),
            "steps": (1,),
            "epochs": (1,),
            "generations": (2,),
            "improve": True,
        }
        made = CurrReFT(**settings, improve_steps=3, improve_lr=0.05, improve_prompts=4)
        made.judge = judge
        return made

    model = small_vlm()
    with pytest.raises(ConfigError, match=r"the line is dead.* 5 scores are kept"):
        zoo.run(model, regime(), data, out=tmp_path)
    report = zoo.run(model, regime(), data, out=tmp_path)
    assert len(asked) == 13  # twelve answers, one of them twice
    assert report.summary["kept"] == len([i for i in (*range(1, 6), *range(7, 14)) if i % 2])
    improve = report.phases[-1]
    assert improve["name"] == "improve" and improve["steps"] == 3
    assert improve["history"][-1]["loss"] < improve["history"][0]["loss"]
    lines = (tmp_path / "judged.jsonl").read_text().splitlines()
    assert len(lines) == 13 and len(json.loads(lines[0])["completions"]) == 12

    nothing = regime()
    nothing.judge = lambda exercise, completion: 0.0
    with pytest.raises(DataError, match="None of the 12 answers"):
        zoo.run(small_vlm(), nothing, data)
    broken = regime()
    broken.judge = lambda exercise, completion: math.nan
    with pytest.raises(ConfigError, match="gave nan"):
        zoo.run(small_vlm(), broken, data)


def test_the_rule_keeps_what_is_right_in_its_form():
    scores = Scores([])
    rule = Rule(scores)
    asked = Exercise(None, "what is it?", "red", "open")
    assert rule(asked, "<think>a</think><answer>red</answer>") == 100
    assert rule(asked, "<answer>red</answer>") == 80 and rule(asked, "<think>a</think><answer>blue</answer>") == 20


def test_tuning_counts_the_words_of_the_answer_alone_and_learns_them():
    model, data = small_vlm(zoo.adapter("lora", targets="all-linear", rank=8)), open_exercises(exercises())
    texts = ["<answer>yes</answer>", "no", "red"] * 4
    entry = Tuning(tuple(texts), steps=40, prompts=6, lr=0.05, system=SHORT).train(model, data, None, {})
    losses = [h["loss"] for h in entry["history"]]
    assert losses[0] == pytest.approx(math.log(512), rel=0.05)
    assert losses[-1] < losses[0] - 0.4  # what 32 numbers of a random word table can say

    plain = small_vlm()
    tuning = Tuning(("red", "a longer answer"), steps=1, prompts=2, lr=1.0, system=SHORT)
    processor, two = plain.family.processor, exercises()[-2:]
    together = tuning._loss(plain.backbone, processor, two, tuning.completions)
    alone = [tuning._loss(plain.backbone, processor, [e], [t]) for e, t in zip(two, tuning.completions)]
    torch.testing.assert_close(together, sum(alone) / 2)  # padding and batches change nothing


def test_answers_do_not_depend_on_the_batch():
    model, asked = small_vlm(), exercises()
    one = write(model, asked, SHORT, length=5, at_once=1)
    assert one == write(model, asked, SHORT, length=5, at_once=12) and len(one) == 12


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
    with pytest.raises(DataError, match="has no image, and exercise"):
        zoo.run(model, "curr-reft", open_exercises(mixed), **settings)


def test_the_paper_s_model_with_lora_is_attached_and_counted():
    """Qwen2.5-VL-3B: 36 blocks of width 2,048, 16 heads on 2 pairs of keys and values of width 128."""
    lora = zoo.adapter("lora", rank=8, targets="text.blocks.*.attn.{q,v}")
    model = zoo.load("qwen2.5-vl-3b", lora, pretrained=False, device="meta")
    assert model.num_parameters(trainable=True) == 36 * 8 * ((2048 + 2048) + (2048 + 256)) == 1_843_200
    assert model.num_parameters() - 1_843_200 == 3_754_622_976


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
