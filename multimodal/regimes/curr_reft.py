"""Curr-ReFT: a language model with eyes learns by rewards, from easy to hard, and then from its own good answers.

Idea: group relative policy optimisation (`multimodal.regimes.parts.grpo`) in three stages of rising difficulty, each from where
the former ended, with the divergence from its own beginning; then supervised tuning on answers that the model wrote itself and a
judge found good.

    judge    yes or no                reward: the verdict                                     4 answers to each question, 1 epoch
    choice   letters                  reward: the set of letters                              2 answers, 1 epoch
    open     anything                 reward: overlap of boxes, common labels, value, text    4 answers, 2 epochs
    improve  its own answers          kept: those with a score above 85 of 100                supervised tuning

    R = accuracy + form, each from 0 to 1     A = (R - mean R) / (std R + 1e-4)     loss: see `GRPO`, beta = 0.04, temperature 1

Every question is asked behind `system`, and answered by "<think>...</think><answer>...</answer>"; rewards are those of
`multimodal.metrics.rewards`, where each fault of the released ones is put right.

Data: exercises (`multimodal.data.exercises`), one data set with all levels, or a dict by level.
Points: none of its own; what the model trains is trained: an adapter of any method that learns by gradients alone, or `full`.

Defaults: the authors', of the trainer that they used: lr 1e-6 for full tuning (an adapter takes 1e-5 to 1e-3: set it), 8
questions a step, 256 words, no weight decay, linear decay; improvement: lr 2e-7, 32 chats a step, rising for 5 % of the steps.

Source: Deng et al., "Boosting the Generalization and Reasoning of Vision Language Models with Curriculum Reinforcement
Learning", 2025 (ding523/Curr_REFT). Deviations: the trainer is trl's own; what is asked is drawn as the data hold it (theirs
lists maths twice in the first stage, and trains on a test file in the third); their judge and the generation for it were not
released: the default here is a rule, and no service is called. Stages run in one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from multimodal.data.exercises import LEVELS, Exercise, open_exercises
from multimodal.metrics.rewards import REWARDS
from multimodal.regimes.parts.grpo import GRPO, Reward, Scores
from multimodal.regimes.parts.lending import check_model
from multimodal.regimes.parts.rejection import Judge, Rule, Sampled, digest
from multimodal.regimes.parts.tuning import Tuning, write
from zoo import Phase, Regime
from zoo.data.dataset import ImageDataset
from zoo.errors import DataError, nearest
from zoo.regimes import Run, RunReport
from zoo.registry import register_regime

if TYPE_CHECKING:
    from zoo.model import Model

__all__ = ["SYSTEM", "CurrReFT"]

SYSTEM = (
    "Think about the question first, then answer it: the thought between <think> and </think>, "
    "the answer alone between <answer> and </answer>."
)


@register_regime("curr-reft")
@dataclass(eq=False)
class CurrReFT(Regime):
    """Curriculum of rewards.

    `zoo.run(model, "curr-reft", data=exercises, test=held_out)`. `test` is measured before, between and after the stages.
    Rewards and a judge of yours: `regime = zoo.registry.regime("curr-reft"); regime.rewards["text"] = f; regime.judge = g`.

    Args:
        stages: levels, in this order; also several in one stage, joined by "+" ("judge+choice+open" is no curriculum).
        steps: of each stage; 0: as many as `epochs` make. epochs, generations: of each stage.
        prompts: questions of one step. lr, beta, temperature: of the learning by rewards.
        length: of an answer, in words of the vocabulary.
        improve: the last stage, on its own answers; improve_steps, improve_lr, improve_prompts: of it. keep: scores above.
        system: in front of every question.
        at_once: answers in one forward and backward pass; 0: all of a step.
        clip: norm of the gradients. save_steps: a checkpoint after so many steps.
    """

    stages: tuple[str, ...] = ("judge", "choice", "open")
    steps: tuple[int, ...] = (0, 0, 0)
    epochs: tuple[int, ...] = (1, 1, 2)
    generations: tuple[int, ...] = (4, 2, 4)
    prompts: int = 8
    lr: float = 1e-6
    beta: float = 0.04
    temperature: float = 1.0
    length: int = 256
    improve: bool = True
    improve_steps: int = 2000
    improve_lr: float = 2e-7
    improve_prompts: int = 32
    keep: float = 85.0
    system: str = SYSTEM
    at_once: int = 0
    clip: float = 1.0
    save_steps: int = 50

    needs_head: ClassVar[bool] = False
    opens: ClassVar[bool] = True
    items: ClassVar[tuple[type, ...]] = (Exercise,)
    paper: ClassVar[str] = "Deng et al. 2025"

    def __post_init__(self) -> None:
        super().__post_init__()
        count = len(self.stages)
        self.check(count > 0, "stages is empty; name levels, such as judge, choice, open.")
        for name in ("steps", "epochs", "generations"):
            values = getattr(self, name)
            self.check(len(values) == count, f"{name} has {len(values)} numbers for {count} stages; give one for each.")
        for stage in self.stages:
            unknown = [level for level in stage.split("+") if level not in LEVELS]
            self.check(not unknown, f"'{stage}' is no stage; expected {', '.join(LEVELS)}, or several joined by '+'.")
        self.check(
            all(g >= 2 for g in self.generations),
            f"generations is {self.generations}; a group needs two answers or more: the advantage of one alone is always 0.",
        )
        for name in ("prompts", "length", "save_steps", "improve_steps", "improve_prompts"):
            self.check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; expected 1 or more.")
        self.check(min(self.epochs) >= 1 and min(self.steps) >= 0, "epochs are 1 or more, steps 0 or more.")
        self.check(self.lr > 0 and self.improve_lr > 0, "learning rates are positive.")
        self.check(self.beta >= 0, f"beta is {self.beta}; expected 0 or more.")
        self.check(self.temperature > 0, f"temperature is {self.temperature}; expected a positive number.")
        self.check(self.clip > 0, f"clip is {self.clip}; expected a positive number.")
        self.check(0 <= self.keep < 100, f"keep is {self.keep}; scores go from 0 to 100.")
        for generations in self.generations:
            whole = self.at_once == 0 or (self.at_once > 0 and self.prompts * generations % self.at_once == 0)
            self.check(
                whole,
                f"at_once is {self.at_once}; {self.prompts} x {generations} answers do not divide into such parts.",
            )
        self.rewards: dict[str, Reward] = {}
        self.judge: Judge | None = None

    def open(self, model: Model, source: Any) -> ImageDataset:
        """Exercises."""
        return open_exercises(source)

    def read(self, source: str, split: str | None) -> ImageDataset:
        """Exercises, for the command line."""
        return open_exercises(source, split=split)

    def prepare(self, run: Run) -> None:
        """The model writes answers; every exercise can be read, and each stage has some.

        Raises:
            DataError: a damaged exercise, a stage without any. ConfigError: several processes.
        """
        check_model(run.model)
        for name, reward in self.rewards.items():  # of another name no exercise is
            self.check(name in REWARDS, f"rewards has '{name}'. {nearest(name, REWARDS)}")
            self.check(
                callable(reward), f"rewards['{name}'] is {reward!r:.60}; expected a function (answer, reference)."
            )
        self.check(self.judge is None or callable(self.judge), f"judge is {self.judge!r:.60}; expected a function.")
        stages = self._by_stage(run.data)
        for stage, data in stages.items():
            if not len(data):
                raise DataError(f"There is no exercise of the stage '{stage}'. Leave it out of stages, or add some.")
            self._check_context(run.model, data)
        seen = bool(getattr(run.model.family, "visual", ()))
        for stage, data in stages.items():
            there = [e.image is not None for e in _exercises(data)]
            if any(there) and not seen:
                having = data.where(there.index(True))
                raise DataError(f"'{run.model.backbone_name}' has no eyes, and the exercise at {having} has an image.")
            if any(there) and not all(there):
                other, having = (data.where(there.index(one)) for one in (False, True))
                raise DataError(
                    f"Of the stage '{stage}', the exercise at {other} has no image, and that at {having} has one; answers are "
                    "written for all of a batch at once. Give all of a stage an image, or none."
                )

    def _check_context(self, model: Model, data: ImageDataset) -> None:
        words: Any = model.family
        for place, exercise in enumerate(_exercises(data)):
            text = f"{self.system}{exercise.question}"
            if words.context is None or len(text.encode()) + self.length <= words.context:
                continue  # no token is less than a byte
            count = len(words.tokenizer(text)["input_ids"])
            if count + self.length > words.context:
                raise DataError(
                    f"{data.where(place)}: the question has {count} tokens with system=, and its answer up to {self.length} "
                    f"(length=), and the context of '{model.backbone_name}' is {words.context}. Shorten the question or the "
                    "answers, or leave the exercise out."
                )

    def phases(self, run: Run) -> Iterator[Phase]:
        """The stages, one after the other, then its own answers."""
        self._measure(run, "start")
        common = {
            name: getattr(self, name) for name in ("beta", "lr", "temperature", "length", "at_once", "system", "clip")
        }
        for number, (stage, data) in enumerate(self._by_stage(run.data).items()):
            steps = self.steps[number] or max(1, self.epochs[number] * len(data) // self.prompts)
            by = GRPO(
                steps=steps,
                prompts=self.prompts,
                generations=self.generations[number],
                save_steps=self.save_steps,
                seed=self.seed + number,
                rewards=self.rewards,
                **common,
            )
            yield Phase(stage.replace("+", "-"), data, by=by)
            self._measure(run, stage.replace("+", "-"))
        if self.improve:
            yield from self._improved(run)

    def _improved(self, run: Run) -> Iterator[Phase]:
        data = _all(run.data)
        exercises = _exercises(data)
        judge = self.judge or Rule(Scores(exercises, self.rewards))
        place = run.ledger.folder
        identity = {"model": digest(run.model), "seed": self.seed, "exercises": len(exercises)}
        identity |= {"length": self.length, "temperature": self.temperature, "system": self.system}
        sampled = Sampled(None if place is None else place / "judged.jsonl", identity)

        def judged() -> list[Any]:
            scores = sampled.collect(
                run.model,
                exercises,
                judge,
                system=self.system,
                length=self.length,
                temperature=self.temperature,
                at_once=self.at_once or 64,
                seed=self.seed,
            )
            return [[i, c] for i, (c, s) in enumerate(zip(sampled.completions, scores, strict=True)) if s > self.keep]

        kept = run.once("kept", judged)
        if not kept:
            raise DataError(
                f"None of the {len(exercises)} answers has a score above {self.keep}; there is nothing to improve with. Train "
                "longer, lower keep, or pass improve=False."
            )
        by = Tuning(
            tuple(c for _, c in kept),
            steps=self.improve_steps,
            prompts=min(self.improve_prompts, len(kept)),
            lr=self.improve_lr,
            system=self.system,
            at_once=self.at_once,
            save_steps=self.save_steps,
            clip=self.clip,
            seed=self.seed,
        )
        yield Phase("improve", data.select([i for i, _ in kept]), by=by)
        self._measure(run, "improve")

    def _measure(self, run: Run, name: str) -> None:
        if run.test is None:
            return
        parts = run.test if isinstance(run.test, Mapping) else {"test": run.test}

        def measured() -> dict[str, float]:
            return {part: self.accuracy(run.model, data) for part, data in parts.items()}

        run.once(f"accuracy after {name}" if name != "start" else "accuracy at the start", measured)

    def accuracy(self, model: Model, data: Any) -> float:
        """Mean reward (without that of the form) of the likeliest answers to exercises."""
        exercises = _exercises(open_exercises(data))
        scores = Scores(exercises, self.rewards)
        texts = write(model, exercises, self.system, length=self.length, at_once=self.at_once or 64)
        return sum(scores.score(t, e) for t, e in zip(texts, exercises, strict=True)) / len(exercises)

    def _by_stage(self, data: Any) -> dict[str, ImageDataset]:
        """Exercises of each stage.

        Raises:
            DataError: names that are no levels, or exercises of another level than the name says.
        """
        if isinstance(data, Mapping):
            if unknown := [name for name in data if name not in LEVELS]:
                raise DataError(f"Data of the level '{unknown[0]}'; expected {', '.join(LEVELS)}.")
            for name, part in data.items():
                if wrong := [e for e in _exercises(part) if e.level != name]:
                    raise DataError(f"The data '{name}' hold an exercise of the level '{wrong[0].level}'.")
        whole = _all(data)
        levels = [e.level for e in _exercises(whole)]
        return {s: whole.select([i for i, lv in enumerate(levels) if lv in s.split("+")]) for s in self.stages}

    def summary(self, run: Run) -> dict[str, Any]:
        """What was measured, and how many of its own answers were kept."""
        found = {name: value for name, value in run.values.items() if name.startswith("accuracy")}
        return {**found, **({"kept": len(run.values["kept"])} if "kept" in run.values else {})}

    def table(self, report: RunReport) -> tuple[list[str], list[list[Any]]]:
        """One row for each stage, with the means of its last quarter and the accuracy behind it."""
        tests = list(dict.fromkeys(k for v in report.values.values() if isinstance(v, dict) for k in v))
        columns = ["stage", "steps", "s", "reward", "accuracy", "form", "kl", *tests]
        rows: list[list[Any]] = [["start", 0, 0.0, "", "", "", "", *self._tested(report, "at the start", tests)]]
        for phase in report.phases:
            last = phase["history"][-max(1, len(phase["history"]) // 4) :]
            means = [
                sum(h[k] for h in last) / len(last) if last and all(k in h for h in last) else ""
                for k in ("reward", "accuracy", "form", "kl")
            ]
            tested = self._tested(report, f"after {phase['name']}", tests)
            rows.append([phase["name"], phase["steps"], round(phase["seconds"], 1), *means, *tested])
        return columns, rows

    @staticmethod
    def _tested(report: RunReport, when: str, tests: Sequence[str]) -> list[Any]:
        return [report.values.get(f"accuracy {when}", {}).get(name, "") for name in tests]

    def draw(self, figure: Any, report: RunReport) -> None:
        """Reward over the steps of all stages."""
        axes, start = figure.add_subplot(1, 1, 1), 0
        for phase in report.phases:
            points = [(start + h["epoch"], h["reward"]) for h in phase["history"] if "reward" in h]
            if points:
                axes.plot(*zip(*points, strict=True), lw=1.6, label=phase["name"])
            start += phase["steps"]
        axes.set_xlabel("step", fontsize=9)
        axes.set_title("reward, accuracy + form (0 to 2)", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)


def _exercises(data: ImageDataset) -> list[Exercise]:
    if not isinstance(data, ImageDataset):
        raise DataError(f"{data!r:.60} is no data set of exercises; give a list of them, or what open_exercises takes.")
    return [data.rows.read(int(i))[0] for i in data.indices]


def _all(data: Any) -> ImageDataset:
    """One data set of all levels."""
    if not isinstance(data, Mapping):
        return open_exercises(data)
    found = [e for part in data.values() for e in _exercises(part)]
    return open_exercises(found)
