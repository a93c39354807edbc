"""IST: in each step a few blocks learn, those that the loss is most sensitive to (importance-aware sparse tuning).

    zoo.fit(model, train, val, callbacks=[IST()])            # from zoo.train import IST

Idea: not every block needs to learn in every step. Which matter is found out on the way, as a bandit does: damp the adapters of
some blocks, look at the loss, and move the scores of the damped by how well that went.
Around any method whose parameters stand in blocks (LoRA, adapters, prompts of every block ...); nothing of it is saved.

    p = sigmoid(z)                                           z (L,): a score for each block, 0 at first; L blocks

    every 10th step, but the first:
        S_1, S_2, S_3  <- three different sets of floor(L / 2) blocks, drawn without replacement in proportion to p
        l_k = loss in evaluation mode, what the adapters of S_k change taken 0.25 times;   R_k = exp(-l_k)
        z_i <- z_i + 10 (R_k - mean R) p_i (1 - p_i)         for every k and the i in S_k; p from before
    every step:
        U <- floor(L / 4) blocks drawn in proportion to sigmoid(-z);   the others rest: no gradient, no step, no decay

A high score means that a block can be damped without harm: the authors' name for it, importance, is the other way round. What
stands in no block (head, embeddings, shared parts) learns in every step. Below the lowest block of U no graph is kept.

Start: z = 0: all blocks are equally likely. Counts: L = 12: 3 learn, 6 are damped; 24: 6, 12; 32: 8, 16. `every=None` never
looks: blocks are drawn evenly throughout (the authors' random sparse tuning).
Source: Yao et al., "Layer-wise Importance Matters: Less Memory for Better Performance in Parameter-efficient Fine-tuning of Large
Language Models", Findings of EMNLP 2024; antgroup/importance-aware-sparse-tuning-IST-paper.
Deviations: the loss is that of the batch that the step will train on, all of it, in all processes together, where theirs is of 16
samples of their own. Blocks without trained parameters are left out. At least one block learns and at least one is damped, where
theirs fails below four blocks; there are never more sets than different ones, where theirs draws forever. Each adapter is damped
by its own scale, where theirs gives all the scale of the last.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.adapters.base import Adapter
from zoo.errors import ConfigError
from zoo.model.damping import damped
from zoo.model.probing import Probe, probing, unwrapped
from zoo.train.optimizer import OptimizerService

__all__ = ["IST", "drawn", "moved"]


def drawn(p: Tensor, count: int, generator: torch.Generator) -> tuple[int, ...]:
    """`count` different indices in proportion to p (L,), sorted."""
    return tuple(sorted(torch.multinomial(p, count, generator=generator).tolist()))


def moved(scores: Tensor, sets: Sequence[Sequence[int]], losses: Sequence[float], rate: float) -> Tensor:
    """The scores (L,) after the blocks of each set were damped, with these losses."""
    rewards = [math.exp(-loss) for loss in losses]
    mean = sum(rewards) / len(rewards)
    p, after = scores.sigmoid(), scores.clone()
    for chosen, reward in zip(sets, rewards, strict=True):
        after[list(chosen)] += rate * (reward - mean) * (p * (1 - p))[list(chosen)]
    return after


@dataclass
class IST:
    """Which blocks learn in a step; a callback of `zoo.fit` and of `zoo.training_hooks`.

    Args:
        updated: part of the blocks that learn in a step.
        damped: part of the blocks that are damped together; factor: how much of their effect is left (0 switches them off, as
            prompts and the backbone's own parameters need it).
        every: steps from one look at the loss to the next; None: never.
        sets: how many sets of blocks are damped in turn; rate: how far the scores move.
        seed: of the draws, which are the same in every process and after a resumption.

    Afterwards `scores` (L,), and `updates`, how often each block learned, are of the blocks `blocks`; `history` has both at the
    end of each epoch. All are those of the epoch whose weights were kept.
    """

    updated: float = 0.25
    damped: float = 0.5
    factor: float = 0.25
    every: int | None = 10
    sets: int = 3
    rate: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("updated", "damped"):
            _check(name, getattr(self, name), lambda v: 0 < v < 1, "a number above 0 and below 1")
        _check("factor", self.factor, lambda v: 0 <= v < 1, "a number from 0 to below 1")
        _check("rate", self.rate, lambda v: 0 < v <= 1e6, "a number above 0")
        if self.every is not None:
            _check("every", self.every, lambda v: type(v) is int and v >= 1, "a whole number above 0, or None")
        _check("sets", self.sets, lambda v: type(v) is int and v >= 2, "2 or more, which are compared with each other")
        _check("seed", self.seed, lambda v: type(v) is int and v >= 0, "a whole number from 0")
        self.blocks: tuple[str, ...] = ()
        self.scores = torch.zeros(0)
        self.updates: list[int] = []
        self.history: list[dict[str, Any]] = []
        self._resting: tuple[str, ...] = ()
        self._begun = False

    # -- training ---------------------------------------------------------------------------------------------------

    def fit_start(self, model: Any, optimizer: OptimizerService, total_steps: int) -> None:
        """Scores of 0 for the blocks that hold trained parameters.

        Raises:
            ConfigError: there is no choice, or a method that needs all gradients, or whose effect cannot be damped.
        """
        if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
            raise ConfigError(
                "IST lets other blocks learn in every step, and a compiled model is compiled anew for each choice, until torch "
                "gives up. Train the model uncompiled, and compile what was trained."
            )
        model = unwrapped(model)
        self._service, self._block_of = optimizer, dict[str, str]()
        self._names = [p.name for p in model.points if p.kind == "block"]
        held = {self._block(name, model) for name in optimizer.parameters}
        self.blocks = tuple(name for name in self._names if name in held)
        self.scores, self.updates, self.history = torch.zeros(len(self.blocks)), [0] * len(self.blocks), []
        self._resting, self._begun = (), False
        if len(self.blocks) < 2:
            raise ConfigError(
                f"IST chooses among blocks, and {len(self.blocks)} of the {len(self._names)} that {model.backbone_name} is known "
                "to have hold parameters to train. Attach a method to several blocks, or train without IST."
            )
        for name in self._methods(model):
            method = type(model.adapters[name])
            if method.after_backward is not Adapter.after_backward or method.after_step is not Adapter.after_step:
                raise ConfigError(
                    f"'{name}' works with the gradients of all of its parameters in every step, and with IST most blocks have "
                    "none. Train it without IST, or take a method of fixed shape: lora, adapter, dylora."
                )
        if self.every is not None:
            try:
                with self._damping(model, range(len(self.blocks))):
                    pass
            except ConfigError as error:
                other = "factor=0, or draw blocks" if self.factor else "another method, or draw blocks"
                raise ConfigError(
                    f"IST damps adapters to score the blocks. {error} For IST: {other} evenly, every=None."
                ) from error

    def step_start(self, model: Any, step: int) -> None:
        """Look at the loss if it is time; then let some blocks learn and the others rest."""
        if step and not self._begun:
            raise ConfigError(
                f"IST sees step {step} first: the run that the checkpoint is of began without it. Resume it without IST, or pass "
                "resume=False to begin anew. A loop of your own counts steps from 0."
            )
        self._begun = True
        self._thaw()
        model, count = unwrapped(model), len(self.blocks)
        generator = torch.Generator().manual_seed(random.Random(f"ist {self.seed} {step}").getrandbits(62))
        if self.every is not None and step and step % self.every == 0:
            self._look(model, generator)
        chosen = drawn((-self.scores).sigmoid(), max(1, int(count * self.updated)), generator)
        for index in chosen:
            self.updates[index] += 1
        learning = {self.blocks[index] for index in chosen}
        trained = self._service.parameters
        places = {name: self._block(name, model) for name in trained}
        self._resting = tuple(name for name, block in places.items() if block and block not in learning)
        self._service.freeze([trained[name] for name in self._resting])
        _note(model)

    def step_end(self, model: Any, step: int) -> None:
        """Between steps nothing rests."""
        self._thaw()

    def epoch_end(self, model: Any, epoch: int) -> None:
        """A line of the history."""
        self.history.append({"epoch": epoch + 1, "scores": self.scores.tolist(), "updates": list(self.updates)})

    def by_layer(self, model: Any) -> dict[str, dict[str, float]]:
        """In how many steps of the epoch that is over each block learned, and its score."""
        if not self.history:
            return {}
        former = self.history[-2]["updates"] if len(self.history) > 1 else [0] * len(self.blocks)
        learned = [now - then for now, then in zip(self.history[-1]["updates"], former, strict=True)]
        found = {"steps in which it learned": learned, "score": self.history[-1]["scores"]}
        return {what: dict(zip(self.blocks, values, strict=True)) for what, values in found.items()}

    def fit_end(self, model: Any) -> None:
        """Nothing rests."""
        self._thaw()
        _note(unwrapped(model))

    def extra_state(self) -> dict[str, Any]:
        """For the checkpoint."""
        state = {"scores": self.scores, "updates": list(self.updates), "history": self.history}
        return {"settings": asdict(self), "blocks": list(self.blocks), **state}

    def load_extra_state(self, model: Any, state: Mapping[str, Any]) -> None:
        """Back from the checkpoint.

        Raises:
            ConfigError: it is of other settings, or of other blocks.
        """
        now, then = asdict(self), state["settings"]
        if other := [f"{name} was {then[name]}, is {now[name]}" for name in now if then[name] != now[name]]:
            raise ConfigError(
                f"The checkpoint is of a run with another IST: {'; '.join(other)}. Resume with the same, or pass resume=False."
            )
        if list(self.blocks) != list(state["blocks"]):
            raise ConfigError(
                f"The checkpoint's IST chose among {len(state['blocks'])} blocks, here {len(self.blocks)} have parameters to "
                "train. Resume with the same model, or pass resume=False."
            )
        self.scores, self.updates = state["scores"].clone(), list(state["updates"])
        self.history, self._begun = list(state["history"]), True

    # -- inside -----------------------------------------------------------------------------------------------------

    def _thaw(self) -> None:
        trained = self._service.parameters
        self._service.unfreeze([trained[name] for name in self._resting if name in trained])
        self._resting = ()

    def _block(self, name: str, model: Any) -> str:
        """The block in which a trained parameter (`lora/blocks.3.attn.q.lora_a`) stands, "" if in none."""
        if name not in self._block_of:
            owner, _, place = name.partition("/")
            found = [b for b in self._names if place.startswith(f"{b}.")] if owner in model.adapters else []
            self._block_of[name] = max(found, key=len, default="")
        return self._block_of[name]

    def _methods(self, model: Any) -> list[str]:
        """The active adapters that are trained in blocks."""
        owners = {name.partition("/")[0] for name in self._service.parameters if self._block(name, model)}
        return [name for name in model.active if name in owners]

    @contextmanager
    def _damping(self, model: Any, chosen: Sequence[int]) -> Iterator[None]:
        with ExitStack() as stack:
            for name in self._methods(model):
                stack.enter_context(damped(model, name, {self.blocks[index]: self.factor for index in chosen}))
            yield

    def _look(self, model: Any, generator: torch.Generator) -> None:
        """Damp a few sets of blocks, and move their scores."""
        count = len(self.blocks)
        size, p = max(1, int(count * self.damped)), self.scores.sigmoid()
        sets: list[tuple[int, ...]] = []
        while len(sets) < min(self.sets, math.comb(count, size)):
            chosen = drawn(p, size, generator)
            if chosen not in sets:
                sets.append(chosen)
        exact = torch.float32 if model.device.type == "mps" else torch.float64
        sums = torch.zeros(len(sets) + 1, dtype=exact, device=model.device)  # of the losses, and the number of samples
        with probing(model, self._service.task) as probe:
            for parameter in model.parameters():
                parameter.requires_grad_(False)  # no graph; `probing` puts it back
            for index, chosen in enumerate(sets):
                with self._damping(model, chosen):
                    sums[index] = self._loss(probe)
        sums[-1] = sum(_length(inputs) for inputs, _ in self._service.batches)
        *losses, samples = self._service.reduce(sums).tolist()
        if not samples:
            raise ConfigError(
                "IST has no batch to look at. In a loop of your own give the optimizer service that of the step: service = "
                "OptimizerService.wrap(optimizer, model, total_steps=n); hooks.fit_start(service, n); and before each "
                "hooks.step_start, service.batches = [(inputs, targets)]. Or draw blocks evenly, every=None."
            )
        means = [loss / samples for loss in losses]
        if all(math.isfinite(mean) for mean in means):  # what is not, training itself will stop at
            self.scores = moved(self.scores, sets, means, self.rate)

    def _loss(self, probe: Probe) -> float:
        """Summed over the samples of this process."""
        return sum(probe.loss(i, t).item() * _length(i) for i, t in self._service.batches)


def _note(model: Any) -> None:
    """Of blocks that are run again in backward, those that rest below all that learn need not be."""
    if model.memory == "min":
        model._watch_memory()


def _length(inputs: Any) -> int:
    if isinstance(inputs, Mapping):
        inputs = list(inputs.values())
    return len(inputs[0]) if isinstance(inputs, (tuple, list)) else len(inputs)


def _check(name: str, value: Any, fine: Any, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not fine(value):
        raise ConfigError(f"IST: {name} is {value!r}; expected {expected}.")
