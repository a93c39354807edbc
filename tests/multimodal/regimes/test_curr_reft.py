"""Curr-ReFT: groups, advantages and loss against a computation by hand; going on between and inside of stages; bad input."""

import json
import math
from typing import Any

import pytest
import torch
from small_chat import SETTINGS, SHORT, exercises, scored_by_length, small_vlm
from torch.optim.optimizer import register_optimizer_step_pre_hook

import zoo
from multimodal.data.exercises import Exercise, open_exercises
from multimodal.regimes.curr_reft import CurrReFT
from multimodal.regimes.parts.grpo import GRPO, Scores
from multimodal.regimes.parts.rejection import Rule
from multimodal.regimes.parts.tuning import Tuning, inputs_of, write
from zoo.errors import ConfigError, DataError

pytest.importorskip("trl")

rewarded = pytest.fixture(scored_by_length)

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


def test_the_paper_s_model_with_lora_is_attached_and_counted():
    """Qwen2.5-VL-3B: 36 blocks of width 2,048, 16 heads on 2 pairs of keys and values of width 128."""
    lora = zoo.adapter("lora", rank=8, targets="text.blocks.*.attn.{q,v}")
    model = zoo.load("qwen2.5-vl-3b", lora, pretrained=False, device="meta")
    assert model.num_parameters(trainable=True) == 36 * 8 * ((2048 + 2048) + (2048 + 256)) == 1_843_200
    assert model.num_parameters() - 1_843_200 == 3_754_622_976
