"""A model of ours in the hands of another trainer: its network lent out, and how far the training is, written down.

The library's own network is lent with the adapters as a part of it, and each of its passes is one of the model: trained copies
stand in, frozen parts stay in eval mode. A checkpoint holds parameters, optimizer, random state and what was logged; training
goes on from it to the same numbers. Nothing is pickled.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from multimodal.data.exercises import Exercise
from zoo import Adapter
from zoo.errors import CombinationError, ConfigError, MismatchError
from zoo.train.checkpoint import read_state, write_state
from zoo.train.hooks import HOOKS

if TYPE_CHECKING:
    from zoo.model import Model

__all__ = ["Progress", "chat", "check_model", "lent", "order", "passing", "processor_of"]


def processor_of(model: Model) -> Any:
    """What makes input of chats: the family's processor, or its tokenizer if it has no eyes.

    Raises:
        MismatchError: the model writes no text. ConfigError: the processor cannot be had.
    """
    family: Any = model.family
    if not hasattr(model.backbone, "generate") or not (hasattr(family, "processor") or hasattr(family, "tokenizer")):
        raise MismatchError(
            f"'{model.backbone_name}' is of the family '{family.family}', which writes no answers to chats; take a language "
            "model such as 'vlm-micro' or 'transformers:Qwen/Qwen2.5-VL-3B-Instruct'."
        )
    found = family.processor if hasattr(family, "processor") else family.tokenizer
    if getattr(found, "chat_template", None) is None:
        raise ConfigError(
            f"The processor of '{model.backbone_name}' has no chat template, by which questions become input."
        )
    return found


def check_model(model: Model) -> None:
    """Raise unless the model's adapters can be trained here.

    Raises:
        CombinationError: a method that takes part in training beyond its gradients, of which the other trainer knows nothing.
    """
    processor_of(model)
    for name in model.active:
        adapter: Any = model.adapters[name]
        own = [hook for hook in HOOKS if getattr(type(adapter), hook) is not getattr(Adapter, hook)]
        if own or adapter.needs_calibration:
            raise CombinationError(
                f"'{name}' ({adapter.method}) takes part in training ({', '.join(own) or 'calibrate'}), which the trainer of trl "
                "does not call. Take a method that learns by gradients alone, such as lora, adapter, dora or full."
            )


def chat(exercise: Exercise, system: str) -> list[dict[str, Any]]:
    """Messages of a question, as trl and chat templates take them; the image is given beside them."""
    asked = [{"role": "user", "content": exercise.question}]
    return [{"role": "system", "content": system}, *asked] if system else asked


def order(count: int, total: int, seed: int) -> list[int]:
    """`total` indices below `count`: one random order of all after the other."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(count, generator=generator) for _ in range(math.ceil(total / count))]
    return torch.cat(rounds)[:total].tolist()  # type: ignore[no-any-return]


@contextmanager
def lent(model: Model) -> Iterator[Any]:
    """The library's network with the adapters as a part of it, where the trainer finds them; afterwards as it was."""
    network: Any = model.backbone
    generation = getattr(network, "generation_config", None)
    padding = generation.pad_token_id if generation is not None else None
    text = network.config.get_text_config()
    kept, mode, before = text.pad_token_id, model.training, set(network.__dict__)
    network.add_module("adapters_in_training", model.adapters)
    try:
        yield network
    finally:
        del network._modules["adapters_in_training"]
        for name in set(network.__dict__) - before:  # the trainer's forward, marks
            del network.__dict__[name]
        text.pad_token_id = kept
        if generation is not None:
            generation.pad_token_id = padding
        for parameter in model.parameters():
            parameter.grad = None
        model.train(mode)


def passing(model: Model, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that is a pass of the model: trained copies stand in, frozen parts stay in eval mode."""
    frozen = not any(getattr(model.adapters[n], "trains_backbone", False) for n in model.active)

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if frozen:
            for name, child in model.backbone.named_children():
                if child.training and name != "adapters_in_training":
                    child.eval()
        return model.passing(lambda: forward(*args, **kwargs), *args, **kwargs)

    return run


class Sized(Protocol):
    """Of a stage's settings, what its progress reads."""

    @property
    def steps(self) -> int:
        """Of the whole stage."""

    @property
    def prompts(self) -> int:
        """Of one step."""

    @property
    def save_steps(self) -> int:
        """From one checkpoint to the next."""


class Progress:
    """How far a stage is: what a checkpoint holds."""

    def __init__(
        self, settings: Sized, named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, file: Path | None
    ) -> None:
        self.settings, self.named, self.optimizer, self.file = settings, named, optimizer, file
        self.start = {name: p.detach().clone() for name, p in named.items()}
        self.history: list[dict[str, Any]] = []
        self.step, self.seconds = 0, 0.0
        self.began = time.perf_counter()
        self.random: dict[str, Tensor] = {}

    def go_on(self) -> int:
        """Take over a checkpoint, if there is one; returns the steps that are done."""
        found = None if self.file is None else read_state(self.file)
        if found is None:
            return 0
        tensors, about = found
        with torch.no_grad():
            for name, p in self.named.items():
                p.copy_(tensors[f"parameter:{name}"])
                moments = {k.split("|")[1]: v for k, v in tensors.items() if k.startswith(f"optimizer:{name}|")}
                if moments:
                    self.optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in moments.items()}
        self.random = {k: v for k, v in tensors.items() if k.startswith("random:")}
        self.step, self.seconds, self.history = about["step"], about["seconds"], about["history"]
        return self.step

    def restore_random(self) -> None:
        """Put the random state back, once, when the first step begins."""
        if self.random:
            torch.set_rng_state(self.random["random:cpu"])
            if "random:cuda" in self.random and torch.cuda.is_available():
                torch.cuda.set_rng_state(self.random["random:cuda"])
            self.random = {}

    def done(self, numbers: Mapping[str, float]) -> None:
        """One more step."""
        self.step += 1
        self.noted(numbers)

    def noted(self, numbers: Mapping[str, float]) -> None:
        """Numbers of the step that is done; writes a checkpoint where one is due."""
        self.history.append({"epoch": self.step, **numbers})
        if self.step % self.settings.save_steps == 0 and self.step < self.settings.steps:
            self.write()

    def entry(self, items: int) -> dict[str, Any]:
        """What the phase's trainer returns; `items`: of its data."""
        last = self.history[-1] if self.history else {}
        return {
            "epochs": self.settings.steps * self.settings.prompts / items,
            "steps": self.settings.steps,
            "seconds": self.seconds + time.perf_counter() - self.began,
            "parameters": sum(p.numel() for p in self.named.values()),
            "metrics": {k: v for k, v in last.items() if k != "epoch"},
            "history": self.history,
        }

    def write(self) -> None:
        """The checkpoint."""
        if self.file is None:
            return
        tensors: dict[str, Tensor] = {f"parameter:{name}": p for name, p in self.named.items()}
        for name, p in self.named.items():
            tensors |= {f"optimizer:{name}|{k}": v for k, v in self.optimizer.state[p].items()}
        tensors["random:cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random:cuda"] = torch.cuda.get_rng_state()
        seconds = self.seconds + time.perf_counter() - self.began
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_state(self.file, tensors, {"step": self.step, "seconds": seconds, "history": self.history})
