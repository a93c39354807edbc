"""A small language model with eyes and random weights, and exercises about coloured squares."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from PIL import Image

import zoo
from multimodal.data.exercises import Exercise, as_choice, as_judgement

COLORS = ("red", "blue", "green", "gray")
SHORT = "think, then answer."


def small_vlm(adapter: Any = "lora") -> zoo.Model:
    """`vlm-micro` of one narrow block each in eyes and language."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return zoo.load(
            "vlm-micro",
            adapter,
            pretrained=False,
            vision_config={"depth": 1, "embed_dim": 32, "num_heads": 1, "hidden_size": 32},
            text_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 1},
        )


def exercises() -> list[Exercise]:
    """Four questions of each level."""
    draw = random.Random(0)
    opened = [Exercise(Image.new("RGB", (32, 32), color), "what color is it?", color, key=color) for color in COLORS]
    judged = [as_judgement(e, "red") for e in opened]
    return [*judged, *(as_choice(e, [c for c in COLORS if c != e.answer][:2], draw) for e in opened), *opened]


SETTINGS: dict[str, Any] = {
    "steps": (1, 2, 1),
    "prompts": 2,
    "length": 4,
    "lr": 0.1,
    "system": SHORT,
    "save_steps": 1,
    "improve": False,
}


def scored_by_length(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Completions are scored by how many letters they have, since random weights write no tags; what was scored is kept."""
    from multimodal.regimes.parts.grpo import Scores

    seen: list[Any] = []

    def accuracy(self: Scores, completions: Any, completion_ids: Any, row: Any, **_: Any) -> list[float]:
        seen.append([(list(ids), i, len(c[0]["content"]) / 10) for c, ids, i in zip(completions, completion_ids, row)])
        return [score for *_, score in seen[-1]]

    monkeypatch.setattr(Scores, "accuracy", accuracy)
    return seen
