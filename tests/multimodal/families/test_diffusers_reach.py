"""How many of diffusers' transformers a table describes, by name."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")

import diffusers
from diffusers.models import transformers as room

from multimodal.families.diffusion.names import FAMILIES
from zoo.registry import families, family


def test_described_classes() -> None:
    """At least 25 of the library's classes, each of a family that is there; no name that the library does not have."""
    classes = {n for n, c in vars(room).items() if isinstance(c, type) and issubclass(c, diffusers.ModelMixin)}
    described = sorted(classes & set(FAMILIES))
    print(f"{len(described)} of {len(classes)}: {', '.join(described)}")
    assert len(described) >= 27
    assert set(FAMILIES) - classes == {"UNet2DConditionModel"}
    assert set(FAMILIES.values()) <= set(families())
    for made, name in FAMILIES.items():
        cls = family(name)
        assert made in getattr(cls, "members", {}) or cls.diffusers_class == made  # type: ignore[attr-defined]
        assert cls.accepts(f"diffusers:{made}") is True


def test_a_class_is_built_by_its_name_without_weights() -> None:
    import zoo

    for made in ("FluxTransformer2DModel", "WanTransformer3DModel", "UNet2DConditionModel"):
        own = sum(p.numel() for p in zoo.load(f"diffusers:{made}", device="meta").backbone.parameters())
        assert own > 1e8
        with pytest.raises(zoo.errors.ConfigError, match="it has no weights"):
            zoo.load(f"diffusers:{made}")
