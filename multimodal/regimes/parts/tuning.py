"""Answers written by a language model to chats, and supervised tuning on chats with their answers.

loss = mean over answers of mean over words of -log p(word | chat, words before)        of the answer's words alone
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.data.exercises import Exercise
from multimodal.data.visual_features import opened
from multimodal.regimes.parts.lending import Progress, chat, check_model, lent, order, passing, processor_of

if TYPE_CHECKING:
    from zoo.model import Model

__all__ = ["Tuning", "write"]

NONE = -100


def inputs_of(processor: Any, exercises: Sequence[Exercise], system: str, device: torch.device) -> dict[str, Tensor]:
    """Chats as the network takes them, with their padding in front."""
    texts, images = [], []
    for exercise in exercises:
        messages = chat(exercise, system)
        if exercise.image is not None:
            parts = [{"type": "image"}, {"type": "text", "text": exercise.question}]
            messages[-1] = {"role": "user", "content": parts}
            images.append(opened(exercise.image, f"exercise {exercise.key}"))
        texts.append(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    seen: dict[str, Any] = {"images": images} if images else {}
    made = processor(text=texts, **seen, padding=True, padding_side="left", return_tensors="pt")
    return {k: v.to(device) for k, v in made.items() if isinstance(v, Tensor)}


@torch.no_grad()
def write(
    model: Model,
    exercises: Sequence[Exercise],
    system: str,
    *,
    length: int,
    temperature: float = 0.0,
    at_once: int = 64,
) -> list[str]:
    """A completion of at most `length` words for each exercise, with the active adapters; temperature 0: the likeliest words."""
    processor, mode = processor_of(model), model.training
    tokenizer = getattr(processor, "tokenizer", processor)
    drawn: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    written: list[str] = []
    network: Any = model.backbone
    model.eval()
    try:
        for start in range(0, len(exercises), at_once):
            inputs = inputs_of(processor, exercises[start : start + at_once], system, model.device)
            options = {"max_new_tokens": length, "pad_token_id": tokenizer.pad_token_id}
            options |= drawn if temperature > 0 else {"do_sample": False}
            ids = model.passing(functools.partial(network.generate, **inputs, **options), **inputs)
            ids = ids[:, inputs["input_ids"].shape[1] :]
            written += [str(t).strip() for t in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    finally:
        model.train(mode)
    return written


@dataclass(frozen=True)
class Tuning:
    """Supervised tuning: what trains in its phase (`zoo.regimes.base.Outside`).

    Args:
        completions: what is to be written to each exercise of the phase's data, in its order.
        steps: of the optimizer. prompts: chats of one step. lr: rises for `warmup` of the steps, then falls linearly to 0.
        at_once: chats in one forward and backward pass; 0: all of a step.
        system: in front of every question. save_steps: a checkpoint after so many steps.
    """

    completions: tuple[str, ...]
    steps: int
    prompts: int
    lr: float
    system: str
    warmup: float = 0.05
    at_once: int = 0
    save_steps: int = 50
    clip: float = 1.0
    seed: int = 0

    def about(self) -> dict[str, Any]:
        """Its settings."""
        return {**asdict(self), "completions": list(self.completions)}

    def train(self, model: Model, data: Any, place: Path | None, options: Mapping[str, Any]) -> dict[str, Any]:
        """As `Outside.train`; `data`: exercises."""
        check_model(model)
        named, processor = model.parameters_to_train(), processor_of(model)
        optimizer = torch.optim.AdamW(named.values(), lr=self.lr, weight_decay=0.0)
        progress = Progress(self, named, optimizer, None if place is None else place / "last.safetensors")
        first = progress.go_on()
        exercises = [data.rows.read(int(i))[0] for i in data.indices]
        chosen = order(len(exercises), self.steps * self.prompts, self.seed)
        precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(str(options.get("precision")))
        with lent(model) as network:
            network.forward = passing(model, network.forward)
            model.train()
            progress.restore_random()
            for step in range(first, self.steps):
                for group in optimizer.param_groups:
                    group["lr"] = self.lr * self._rate(step)
                rows, losses = chosen[step * self.prompts : (step + 1) * self.prompts], []
                size = self.at_once or len(rows)
                for start in range(0, len(rows), size):
                    part = rows[start : start + size]
                    with torch.autocast(model.device.type, precision, enabled=precision is not None):
                        loss = self._loss(
                            network, processor, [exercises[i] for i in part], [self.completions[i] for i in part]
                        )
                    (loss * len(part) / len(rows)).backward()
                    losses.append(float(loss.detach()) * len(part) / len(rows))
                torch.nn.utils.clip_grad_norm_(named.values(), self.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                progress.done({"loss": sum(losses)})
        return progress.entry(len(exercises))

    def _rate(self, step: int) -> float:
        warm = math.ceil(self.warmup * self.steps)
        return (step + 1) / warm if step < warm else (self.steps - step) / max(1, self.steps - warm)

    def _loss(self, network: Any, processor: Any, exercises: Sequence[Exercise], texts: Sequence[str]) -> Tensor:
        device = next(network.parameters()).device
        inputs = inputs_of(processor, exercises, self.system, device)
        tokenizer = getattr(processor, "tokenizer", processor)
        ids = [tokenizer(t, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for t in texts]
        answers = torch.full((len(ids), max(map(len, ids))), NONE, device=device)
        for row, words in zip(answers, ids, strict=True):
            row[: len(words)] = torch.tensor(words)
        there, before = answers.ne(NONE), inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answers.masked_fill(~there, tokenizer.pad_token_id)], 1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], there.to(inputs["attention_mask"].dtype)], 1)
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in inputs:
                inputs[name] = F.pad(inputs[name], (0, answers.shape[1]))
        logits = network(**inputs, use_cache=False).logits[:, before - 1 : -1].float()
        words = F.cross_entropy(logits.flatten(0, 1), answers.flatten(), ignore_index=NONE, reduction="none")
        return (words.view_as(answers).sum(1) / there.sum(1)).mean()
