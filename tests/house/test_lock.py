"""The locks that `make` installs: exact, for everybody, and within the ranges of pyproject.toml."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PYTHONS = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
LOCKS = {p: ROOT / "requirements" / f"lock-py{p.replace('.', '')}.txt" for p in PYTHONS}


def pins(path: Path) -> dict[str, Requirement]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def ranges() -> list[Requirement]:
    """What `make demo` and `make test` ask for."""
    sections = [
        re.search(rf"^{name} = \[(.*?)\]$", PROJECT, re.MULTILINE | re.DOTALL)
        for name in ("dependencies", "demo", "data", "multimodal", "audio", "export", "trackers", "dev")
    ]
    texts = [text for found in sections if found for text in re.findall(r'"([^"]+)"', found[1])]
    return [r for r in map(Requirement, texts) if r.name != "adapter-zoo"]


@pytest.mark.parametrize("python", PYTHONS)
def test_a_lock_is_exact_and_for_everybody(python: str) -> None:
    text = LOCKS[python].read_text(encoding="utf-8")
    assert not re.search(r"\+cpu|\+cu|https?:|file:|--|@|/(home|opt|usr|work|tmp)/", text)
    for name, pin in pins(LOCKS[python]).items():
        (spec,) = pin.specifier
        assert spec.operator == "==" and "*" not in spec.version, name
        if name.startswith(("nvidia-", "cuda-")) or name == "triton":  # the wheels of other systems do without them
            assert pin.marker is not None and "sys_platform == 'linux'" in str(pin.marker).replace('"', "'")


@pytest.mark.parametrize("python", PYTHONS)
def test_a_lock_holds_what_the_project_asks_for(python: str) -> None:
    held = pins(LOCKS[python])
    asked = ranges()
    assert {"torch", "timm", "typer", "transformers", "scikit-learn", "pytest-xdist"} <= {r.name for r in asked}
    for wanted in asked:
        (spec,) = held[canonicalize_name(wanted.name)].specifier
        assert wanted.specifier.contains(spec.version, prereleases=True), wanted
        assert any(s.operator in ("<", "<=") for s in wanted.specifier), f"{wanted} has no upper end"


def test_this_environment_is_within_the_ranges() -> None:
    """Or it was not made by `make`, and what fails in it says nothing."""
    if f"{sys.version_info[0]}.{sys.version_info[1]}" not in PYTHONS:
        pytest.skip("a Python that pyproject.toml does not name")
    for wanted in ranges():
        assert wanted.specifier.contains(version(wanted.name).partition("+")[0], prereleases=True), wanted
