"""A `transformers:` name of a type that nothing serves says which type it is, and what is described.

Seen before: "There is no backbone ...", with no reason.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import zoo
from zoo.errors import UnknownNameError
from zoo.registry import families, family

pytest.importorskip("transformers")


def folder(tmp_path: Path, **config: object) -> str:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return f"transformers:{tmp_path}"


def test_the_type_is_said(tmp_path: Path) -> None:
    name = folder(tmp_path, model_type="some-new-type")
    with pytest.raises(
        UnknownNameError, match=r"of the type 'some-new-type', which no family describes; described are .*dinov3_vit"
    ):
        zoo.load(name)


def test_every_described_type_is_named(tmp_path: Path) -> None:
    name = folder(tmp_path, model_type="some-new-type")
    with pytest.raises(UnknownNameError) as caught:
        zoo.load(name)
    types = {t for key in families() for t in getattr(family(key), "library_classes", ())}
    assert len(types) > 12 and all(t in str(caught.value) for t in types)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"hidden_size": 8}, "names no model_type"),
        ({"model_type": ["vit"]}, "names no model_type"),
        ({"model_type": "vit", "attn_implementation": "some/kernel"}, "asks for code from a repository"),
    ],
)
def test_a_configuration_that_says_nothing(config: dict[str, object], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=reason):
        zoo.load(folder(tmp_path, **config))


def test_no_folder_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"'config.json' of .* could not be read"):
        zoo.load(f"transformers:{tmp_path}")
