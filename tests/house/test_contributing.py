"""The code blocks of CONTRIBUTING.md, run as they stand: its example method, its example family, and their tests."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from zoo import registry

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```python\n# (?P<path>\S+\.py)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = {m["path"]: f"# {m['path']}\n{m['code']}" for m in BLOCK.finditer((ROOT / "CONTRIBUTING.md").read_text())}
SOURCES = [path for path in BLOCKS if not path.startswith("tests/")]
TESTS = [path for path in BLOCKS if path.startswith("tests/")]


def _import(path: str, folder: Path) -> Any:
    """Import a block as a module of its own (as a file, so that a failing assert shows its line)."""
    name = "contributing_" + Path(path).stem
    file = folder / f"{name}.py"
    file.write_text(BLOCKS[path])
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def registered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The example method and family, registered for the time of these tests only."""
    for path in SOURCES:
        _import(path, tmp_path_factory.mktemp("source"))
    yield
    for known in (registry._adapters, registry._families):  # what others asked for meanwhile stays
        for name in [n for n, cls in known.items() if cls.__module__.startswith("contributing_")]:
            del known[name]
    for name in [m for m in sys.modules if m.startswith("contributing_")]:
        del sys.modules[name]


def test_every_block_is_run() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert text.count("```python") == len(BLOCKS) == 4
    assert len(SOURCES) == len(TESTS) == 2


def test_no_path_inside_is_imported() -> None:
    """What a method or a family needs has a public name in `zoo`; a family of timm's stands on the parts of its own room."""
    for path in SOURCES:
        inside = re.findall(r"^(?:from|import) (zoo\.\S+)", BLOCKS[path], re.MULTILINE)
        assert inside == [], path


def test_every_path_is_there() -> None:
    """Files and folders that the text names, but for those of its examples."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`((?:zoo|vision|multimodal|audio|tests|docs|scripts)/[\w/.]*)`", text))
    examples = {*BLOCKS, "zoo/adapters/my_method.py", "tests/adapters/test_my_method.py"}
    assert [path for path in named - examples if not (ROOT / path).exists()] == []


def test_every_service_is_named() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    pages = sorted((ROOT / "docs" / "services").glob("*.md"))
    assert len(pages) >= 10
    assert [page.name for page in pages if f"](docs/services/{page.name}) |" not in text] == []


def test_the_method_is_short() -> None:
    """The promise of the text: about forty lines."""
    (method,) = [path for path in SOURCES if "adapters" in path]
    code = [line for line in BLOCKS[method].split('"""', 2)[2].splitlines() if line.strip()]
    assert len(code) <= 40


def test_the_examples_are_known_by_name() -> None:
    assert "outer" in registry.list_adapters()
    assert "relpos-s16" in registry.list_backbones()


@pytest.mark.parametrize("path", TESTS)
def test_blocks(path: str, tmp_path: Path) -> None:
    """The tests in the text, run by pytest itself in this process."""
    file = tmp_path / Path(path).name.replace("test_", "test_contributing_")
    file.write_text(BLOCKS[path])
    code = pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(file)])
    assert code == 0
