"""A small language model with eyes and random weights, and exercises about coloured squares."""

from __future__ import annotations

import random
from typing import Any

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
