"""What people install and read on an index page: types in every package, no link into a repository, all that make calls."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("hatchling", "hatch_fancy_pypi_readme"):
        pytest.importorskip(package, reason=f"{package} is not installed (make dev)")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_wheel(built: Path) -> None:
    """Its page showed broken pictures, and types were there for one package of four."""
    wheel = zipfile.ZipFile(next(built.glob("*.whl")))
    names = wheel.namelist()
    assert {f"{p}/py.typed" for p in ("zoo", "vision", "multimodal", "audio")} <= set(names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        "zoo",
        "vision",
        "multimodal",
        "audio",
    }
    metadata = wheel.read(next(n for n in names if n.endswith("/METADATA"))).decode()
    page = metadata.split("\n\n", 1)[1]
    assert "# adapter-zoo" in page and "[publishing]" not in page and "publishing" in page
    assert re.findall(r"!\[", page) == [] and re.findall(r"\]\((?!https?:)[^)]*\)", page) == []


def test_the_source_distribution_has_what_make_calls(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    called = set(re.findall(r"\bscripts/\w+\.py", makefile)) | {
        "Makefile",
        "README.md",
        "mkdocs.yml",
        "docs/gen_pages.py",
    }
    code = re.search(r"^CODE := (.*)$", makefile, re.MULTILINE)[1].split()
    assert called <= names and "requirements/lock-py311.txt" in names
    assert all(any(name.startswith(f"{folder}/") for name in names) for folder in code)


def test_extras_install_what_code_uses() -> None:
    """Extras of packages that no code imports were offered."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    imports = {"scikit-learn": "sklearn", "open_clip_torch": "open_clip", "mmsegmentation": "mmseg"}
    files = [p for folder in ("zoo", "vision", "multimodal", "audio") for p in (ROOT / folder).rglob("*.py")]
    code = "\n".join(p.read_text(encoding="utf-8") for p in files)
    for line in section.split("dev = [")[0].splitlines():
        for package in re.findall(r'"([A-Za-z_-]+)[><=]', line):
            name = imports.get(package, package.replace("-", "_"))
            assert re.search(rf"\b{name}\b", code), f"no code uses {package}"
