"""A small language model with eyes and random weights, and exercises about coloured squares."""

from __future__ import annotations

import random
from typing import Any

import torch
from PIL import Image

import zoo
from multimodal.data.exercises import Exercise, as_choice, as_judgement
from multimodal.families.vlm.micro import micro_config, micro_processor

COLORS = ("red", "blue", "green", "gray")
SHORT = "think, then answer."


def small_vlm(adapter: Any = "lora") -> zoo.Model:
    """A `Qwen2VLForConditionalGeneration` of two small blocks each in eyes and language."""
    from transformers import Qwen2VLForConditionalGeneration

    processor = micro_processor()
    config = micro_config(processor.tokenizer)
    config.vision_config.depth, config.vision_config.embed_dim = 1, 32
    config.vision_config.num_heads, config.vision_config.hidden_size = 1, 32
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.num_attention_heads = 32, 48, 1, 1
    text.layer_types = ["full_attention"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Qwen2VLForConditionalGeneration(config)
        output = network.lm_head
        model = zoo.wrap(network)
        network.lm_head, model.heads["default"] = output, torch.nn.Identity()
        network.requires_grad_(False)
        model.family.processor = processor
        model.add_adapter(adapter)
    return model


def exercises() -> list[Exercise]:
    """Four questions of each level."""
    draw = random.Random(0)
    opened = [Exercise(Image.new("RGB", (32, 32), color), "what color is it?", color, key=color) for color in COLORS]
    judged = [as_judgement(e, "red") for e in opened]
    return [*judged, *(as_choice(e, [c for c in COLORS if c != e.answer][:2], draw) for e in opened), *opened]
