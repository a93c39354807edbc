"""`zoo new method`: what it writes works as it is, and nothing else has to be touched; what it refuses."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from zoo.cli.new import write_method
from zoo.errors import ConfigError, SaveError

ROOT = Path(__file__).resolve().parents[2]


# The tests, then README's table, by one interpreter.
TRIED = """
import runpy, sys
import pytest
assert pytest.main(sys.argv[1:]) == 0
sys.argv[1:] = []
runpy.run_path("scripts/readme.py", run_name="__main__")
"""


def checkout(folder: Path) -> Path:
    """The least that counts as one."""
    (folder / "tests" / "parts").mkdir(parents=True)
    return folder


@pytest.mark.slow
def test_the_whole_way(tmp_path: Path) -> None:
    """In a copy of this checkout: written by the command, found by name, tried by its own and by all methods' tests."""
    skip = shutil.ignore_patterns("weights", "__pycache__")
    for folder in ("zoo", "vision", "multimodal", "audio", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=skip)
    for name in ("README.md", "pyproject.toml", "scripts/readme.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)

    def python(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "200", "NO_COLOR": "1"}
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.py")}
    said = python("-m", "zoo.cli", "new", "method", "rank_one")
    new = [path for path in tmp_path.rglob("*.py") if path not in before]
    assert sorted(new) == [tmp_path / "tests/adapters/test_rank_one.py", tmp_path / "zoo/adapters/rank_one.py"]
    assert all(str(path) in said for path in new)
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())

    tests = ("tests/adapters/test_rank_one.py", "tests/adapters/test_methods.py")
    result = python("-c", TRIED, "-q", "-p", "no:cacheprovider", *tests, "-k", "rank_one or every_method_is_here")
    assert "skipped" not in result and "passed" in result
    row = "| `rank_one` | a rank-one change of projections, to begin from | 36,864 | yes | Author et al. 2024 |"
    assert row in (tmp_path / "README.md").read_text().splitlines()
    pytest.importorskip("ruff")
    python("-m", "ruff", "check", "-q", *map(str, new))
    python("-m", "ruff", "format", "--check", *map(str, new))


@pytest.mark.parametrize("domain", ["zoo", "vision", "multimodal", "audio"])
def test_rooms(domain: str, tmp_path: Path) -> None:
    source, test = write_method("rank_one", domain, checkout(tmp_path))
    assert source == tmp_path / domain / "adapters" / "rank_one.py"
    assert test == tmp_path / "tests" / ("." if domain == "zoo" else domain) / "adapters" / "test_rank_one.py"
    assert (source.parent / "__init__.py").exists()
    for file in (source, test):
        assert ast.get_docstring(ast.parse(file.read_text()))
        assert "$" not in file.read_text()
    assert "class RankOne(Adapter):" in source.read_text()


@pytest.mark.parametrize(
    "name", ["", "Rank", "rank-one", "1rank", "rank__one", "rank_", "../rank", "lambda", "rank one", "rang\u00e9"]
)
def test_impossible_names(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot name a method"):
        write_method(name, "zoo", checkout(tmp_path))
    assert not list(tmp_path.rglob("*.py"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lora", "there is a method 'lora' already"),
        ("vpt", "there is a method 'vpt' already"),
        ("classify", "there is a task 'classify' already"),
        ("ast", "there is a backbone 'ast' already"),
        ("train", "a model uses the word"),  # a key of nn.ModuleDict
        ("default", "a model uses the word"),
        ("head", "a model uses the word"),
        ("parts", "a model uses the word"),
    ],
)
def test_taken_names(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=reason):
        write_method(name, "zoo", checkout(tmp_path))
    assert not list(tmp_path.rglob("*.py"))


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    root = checkout(tmp_path)
    test = root / "tests" / "engine" / "test_rank_one.py"  # a test's file name is unique
    test.parent.mkdir()
    test.write_text("mine")
    with pytest.raises(ConfigError, match=r"test_rank_one.py exists already"):
        write_method("rank_one", "vision", root)
    source = root / "audio" / "adapters" / "rank_two.py"
    source.parent.mkdir(parents=True)
    source.write_text("mine")
    with pytest.raises(ConfigError, match=r"rank_two.py exists already"):
        write_method("rank_two", "vision", root)
    assert test.read_text() == source.read_text() == "mine"
    assert [p for p in root.rglob("*.py") if p not in (test, source)] == []


def test_all_or_nothing(tmp_path: Path) -> None:
    root = checkout(tmp_path)
    (root / "tests" / "adapters").write_text("a file where the folder should be")
    with pytest.raises(SaveError, match="Nothing was left behind"):
        write_method("rank_one", "zoo", root)
    assert list(root.rglob("*.py")) == []


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no domain 'sound'"):
        write_method("rank_one", "sound", checkout(tmp_path))
    with pytest.raises(ConfigError, match="not a checkout"):
        write_method("rank_one", "zoo", tmp_path / "site-packages")
