"""VPT on every family that has tokens: projected prompts are prompts, and where these start."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import zoo
from zoo import registry
from zoo.errors import MissingPackageError
from zoo.table import tiny_model


def with_tokens(family: str) -> Any:
    try:
        model, batch = tiny_model(family)
    except MissingPackageError as error:
        pytest.skip(str(error))
    if "tokens" not in model.points.kinds:
        pytest.skip(f"{family} has no tokens points")
    return model.eval(), batch


@pytest.mark.parametrize("family", [f for f in registry.families() if registry.family(f).tiny])
def test_projected_prompts_are_prompts(family: str) -> None:
    """W p + b in the place of each prompt, without any map, gives the same; and the map is one for each width."""
    model, batch = with_tokens(family)
    projected = model.add_adapter(zoo.adapter("vpt", num_tokens=2, project=3), "projected")
    widths = sorted({p.dim_in for p in model.points.select(kind="tokens")})
    state = dict(projected.named_parameters())
    assert sorted(int(k.split(".")[0].removeprefix("project_")) for k in state if k.endswith("weight")) == widths
    assert model.probe(*batch) == []
    with torch.no_grad():
        expected = model(*batch)
        model.remove_adapter("projected")
        bare = model(*batch)
        plain = model.add_adapter(zoo.adapter("vpt", num_tokens=2), "plain")
        for name, prompt in plain.named_parameters():
            linear = projected.get_submodule(f"project_{prompt.shape[1]}")
            prompt.copy_(linear(state[name]))
        torch.testing.assert_close(model(*batch), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(bare, expected, atol=1e-6)


def test_where_prompts_start() -> None:
    """U(-v, v) with v of the patch and the width, or N(0, 0.02^2)."""
    for start, bound, std in (
        ("uniform", math.sqrt(6 / 1536), math.sqrt(6 / 1536) / math.sqrt(3)),
        ("normal", 1.0, 0.02),
    ):
        torch.manual_seed(0)
        model: Any = zoo.load("vit-b16", num_classes=0, pretrained=False, depth=1)
        prompts = model.add_adapter(zoo.adapter("vpt", num_tokens=50, start=start))
        values = prompts.module_at("blocks.0.tokens").prompt.detach()
        assert values.abs().max() <= bound and values.std().item() == pytest.approx(std, rel=0.02)
        assert abs(values.mean().item()) < 4 * std / math.sqrt(values.numel())
    with pytest.raises(zoo.ZooError, match="start"):
        zoo.adapter("vpt", start="zeros")
