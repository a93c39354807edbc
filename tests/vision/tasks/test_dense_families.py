"""Every family that gives maps carries a decoder of maps; every other one says that it gives none."""

from __future__ import annotations

import pytest
import torch

from zoo import registry
from zoo.errors import MismatchError
from zoo.table import tiny_model


@pytest.mark.parametrize("family", registry.families())
def test_a_decoder_stands_on_every_family_with_maps(family: str) -> None:
    cls = registry.family(family)
    if cls.tiny is None:
        pytest.skip("no small member")
    model, batch = tiny_model(family)
    if "maps" not in model.family.gives:
        if model.family.pools:
            with pytest.raises(MismatchError, match="'maps'"):
                model.reset_head(5, kind="dense")
        return
    images = batch[:1]  # the images of a pair of images and texts
    maps = model.outputs(*images, want=("maps",))["maps"]
    assert model.family.map_channels == tuple(m.shape[1] for m in maps)
    model.reset_head(5, kind="dense")
    logits = model(*images)
    assert logits.shape == (len(images[0]), 5, *max((m.shape[-2:] for m in maps), key=lambda s: s[0] * s[1]))
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.head.parameters())
    assert torch.isfinite(logits).all()
