"""Group relative policy optimisation of a model of ours, by the trainer of `trl`.

For each question q the model writes a group of G answers o_1 .. o_G, which are scored: R_i.

    A_i  = (R_i - mean R) / (std R + 1e-4)                                     of the group; all equal: 0
    KL_t = exp(l_ref - l) - (l_ref - l) - 1                                    l, l_ref: log-probabilities of word t
    loss = - mean over answers of mean over words of [exp(l - sg(l)) A_i - beta KL_t]

The reference is the model as it was when the stage began. It is not a second model: while it is asked, the values that are
trained are exchanged for those of the beginning.

`trl.GRPOTrainer` draws, scores, and trains; it is given the library's own network, whose hooks are those of the adapters, and the
adapters as a part of it. What it does not do for models of ours is done here: trained copies stand in during each pass, the
order of the questions is fixed beforehand, and after every `save_steps` steps parameters, optimizer and random state are
written, from which a killed stage goes on to the same numbers (nothing is pickled).
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from multimodal.data.exercises import Exercise
from multimodal.data.visual_features import opened
from multimodal.metrics.rewards import REWARDS, answer_of, form
from multimodal.regimes.parts.lending import Progress, chat, check_model, lent, order, passing, processor_of
from zoo.errors import ConfigError, DataError
from zoo.library import library

if TYPE_CHECKING:
    from zoo.model import Model

__all__ = ["GRPO", "Scores"]

Reward = Callable[..., float]


class Scores:
    """Scores of completions, as reward functions of trl: `accuracy` and `form`, both between 0 and 1.

    Args:
        exercises: what the rows' numbers stand for.
        rewards: by name, instead of or besides those of `REWARDS`; called as (answer, reference).
    """

    def __init__(self, exercises: Sequence[Exercise], rewards: Mapping[str, Reward] | None = None) -> None:
        self.exercises, self.rewards = exercises, {**REWARDS, **(rewards or {})}

    def accuracy(self, completions: Sequence[Any], row: Sequence[int], **_: Any) -> list[float]:
        """By the reward of each exercise, of what stands in the answer's tags."""
        return [self.score(_words(c), self.exercises[i]) for c, i in zip(completions, row, strict=True)]

    def form(self, completions: Sequence[Any], row: Sequence[int], **_: Any) -> list[float]:
        """Whether thought and answer are in their tags; where a box is asked for openly, whether the answer has one."""
        return [form(_words(c), box=self._box(self.exercises[i])) for c, i in zip(completions, row, strict=True)]

    @staticmethod
    def _box(exercise: Exercise) -> bool:
        return exercise.scored == "boxes" and exercise.level == "open"

    def score(self, completion: str, exercise: Exercise) -> float:
        """Of one completion.

        Raises:
            ConfigError: the reward raised, or gave no number. DataError: a reference that it cannot read.
        """
        answer = answer_of(completion)
        if answer is None:
            return 0.0
        about = f"The reward '{exercise.scored}' of {answer!r:.60} as the answer to {exercise.question!r:.60}"
        try:
            value = float(self.rewards[exercise.scored](answer, exercise.answer))
        except DataError:
            raise
        except Exception as error:
            raise ConfigError(f"{about} raised {type(error).__name__}: {error}") from error
        if not math.isfinite(value):
            raise ConfigError(f"{about} is {value}; expected a number. Give 0 to an answer that cannot be judged.")
        return value


def _words(completion: Any) -> str:
    return completion if isinstance(completion, str) else "".join(str(m["content"]) for m in completion)


@dataclass(frozen=True)
class GRPO:
    """One stage: what trains in its phase (`zoo.regimes.base.Outside`).

    Args:
        steps: of the optimizer. prompts: questions of one step. generations: G, answers to each.
        beta: weight of the divergence from the stage's beginning. lr: falls linearly to 0.
        temperature, length: of what is written; at most so many words.
        at_once: answers in one forward and backward pass; 0: all of a step.
        system: in front of every question. save_steps: a checkpoint after so many steps.
        rewards: further ones by name, not part of what is compared when a run goes on.
    """

    steps: int
    prompts: int
    generations: int
    beta: float
    lr: float
    temperature: float
    length: int
    at_once: int
    system: str
    save_steps: int
    clip: float
    seed: int
    rewards: Mapping[str, Reward] | None = None

    def about(self) -> dict[str, Any]:
        """Its settings."""
        return {k: v for k, v in asdict(self).items() if k != "rewards"}

    def train(self, model: Model, data: Any, place: Path | None, options: Mapping[str, Any]) -> dict[str, Any]:
        """As `Outside.train`; `data`: exercises."""
        trl, datasets = library("trl", "rl"), library("datasets", "rl")
        check_model(model)
        named = model.parameters_to_train()
        optimizer = torch.optim.AdamW(named.values(), lr=self.lr, weight_decay=0.0)
        progress = Progress(self, named, optimizer, None if place is None else place / "last.safetensors")
        first = progress.go_on()
        start = progress.start
        rows = order(len(data), self.steps * self.prompts, self.seed)[first * self.prompts :]
        exercises = [data.rows.read(int(i))[0] for i in data.indices]
        scores = Scores(exercises, self.rewards)
        set_ = datasets.Dataset.from_dict({"row": rows}).with_transform(_Asked(exercises, self.system, data))
        if first < self.steps:
            with tempfile.TemporaryDirectory() as folder, lent(model) as network:
                arguments = self._arguments(trl, folder, self.steps - first, model, options)
                factor = functools.partial(_linear, first=first, total=self.steps)
                trainer = trl.GRPOTrainer(
                    network,
                    [scores.accuracy, scores.form],
                    arguments,
                    train_dataset=set_,
                    processing_class=processor_of(model),
                    optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)),
                    callbacks=[_callback(progress)],
                )
                for callback in ("PrinterCallback", "ProgressCallback"):
                    if not options.get("progress", False):
                        trainer.remove_callback(getattr(library("transformers", "rl"), callback))
                network.forward = passing(model, network.forward)
                trainer.beta, trainer.ref_model = self.beta, _AtStart(network, named, start) if self.beta else None
                trainer.train()
        return progress.entry(len(data))

    def _arguments(self, trl: Any, folder: str, steps: int, model: Model, options: Mapping[str, Any]) -> Any:
        """The trainer's own."""
        together = self.prompts * self.generations
        at_once = self.at_once or together
        return trl.GRPOConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=together // at_once,
            num_generations=self.generations,
            max_completion_length=self.length,
            temperature=self.temperature,
            beta=0.0,  # the reference is set afterwards: the trainer would read one from the Hub
            loss_type="grpo",
            scale_rewards="group",
            num_iterations=1,
            use_bias_correction_kl=False,  # the paper's divergence; the trainer's default weighs it by exp(l - sg(l))
            learning_rate=self.lr,
            max_grad_norm=self.clip,
            shuffle_dataset=False,
            gradient_checkpointing=False,
            bf16=options.get("precision") == "bf16",
            fp16=options.get("precision") == "fp16",
            use_cpu=model.device.type == "cpu",
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=not options.get("progress", False),
            seed=self.seed,
        )


def _linear(step: int, first: int, total: int) -> float:
    return max(0.0, 1 - (first + step) / total)


class _Asked:
    """Numbers of exercises -> rows of trl."""

    def __init__(self, exercises: Sequence[Exercise], system: str, data: Any) -> None:
        self.exercises, self.system, self.data = exercises, system, data
        self.seen = any(e.image is not None for e in exercises)

    def __call__(self, batch: Mapping[str, Sequence[int]]) -> dict[str, list[Any]]:
        chosen = [self.exercises[i] for i in batch["row"]]
        found: dict[str, list[Any]] = {"prompt": [chat(e, self.system) for e in chosen], "row": list(batch["row"])}
        if self.seen:
            pairs = zip(chosen, batch["row"], strict=True)
            found["image"] = [None if e.image is None else opened(e.image, self.data.where(i)) for e, i in pairs]
        return found


class _AtStart:
    """The network as it was at the beginning of the stage, called as the network is."""

    def __init__(self, network: nn.Module, named: Mapping[str, nn.Parameter], start: Mapping[str, Tensor]) -> None:
        self.network, self.named, self.start = network, named, start

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Any:
        own = {name: p.data for name, p in self.named.items()}
        try:
            for name, p in self.named.items():
                p.data = self.start[name].to(p.device)
            return self.network(**inputs)
        finally:
            for name, p in self.named.items():
                p.data = own[name]


LOGGED = {
    "loss": "loss",
    "reward": "reward",
    "rewards/accuracy/mean": "accuracy",
    "rewards/form/mean": "form",
    "kl": "kl",
    "entropy": "entropy",
    "completions/mean_length": "length",
    "frac_reward_zero_std": "equal_groups",
}


def _callback(progress: Progress) -> Any:
    """The trainer's callback: what is logged becomes history, and checkpoints are written."""
    base = library("transformers", "rl").TrainerCallback

    class Watching(base):  # type: ignore[misc, valid-type]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress.restore_random()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            found = {ours: logs[theirs] for theirs, ours in LOGGED.items() if theirs in (logs or {})}
            if "reward" in found:
                progress.noted(found)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress.step += 1

    return Watching()
