"""The Python blocks of README.md and of the guide, run in order page by page, with the small backbone in place of ViT-B/16."""

from __future__ import annotations

import re
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import zoo

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from readme import written

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# Fewer epochs, and the three classes of the folder below.
SMALLER = (("vit-b16", "vit-micro"), (r"\bepochs=\d+", "epochs=1"), (r"num_classes=17\b", "num_classes=3"))
SMALLER += (("vit_base_patch16_224", "vit_tiny_patch16_224"), (r'val="flowers/val"\)', 'val="flowers/val", epochs=1)'))


@pytest.fixture
def flowers(tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`flowers/` with train, val and test and three classes, in the working directory."""
    for split in ("train", "val", "test"):
        source = image_folder / ("train" if split == "train" else "test")
        for name, colour in (("daffodil", "red"), ("iris", "blue"), ("tulip", "red")):
            folder = tmp_path / "flowers" / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                shutil.copy(source / colour / f"{i}.png", folder / f"00{i}.png")
        shutil.copy(folder / "000.png", folder / "001.jpg")  # read by content, as the text names it
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
@pytest.mark.usefixtures("flowers")
def test_page_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text()
    module = types.ModuleType(f"page_{page.stem}")  # a dataclass looks up its module
    monkeypatch.setitem(sys.modules, module.__name__, module)
    names: dict[str, Any] = module.__dict__
    for block in BLOCK.finditer(text):
        code = block[1]
        for old, new in SMALLER:
            code = re.sub(old, new, code)
        above = text[: block.start(1)].count("\n")  # so that a failure points to its line of the page
        exec(compile("\n" * above + code, str(page), "exec"), names)


def test_table_of_methods_in_the_readme() -> None:
    """Names, counts and mergers are those of the code: `scripts/readme.py` writes them."""
    text = (ROOT / "README.md").read_text()
    assert written(text) == text, "run `make format` (or python scripts/readme.py)"
    rows = re.findall(r"^\| `([\w+-]+)` \| .* \| ([\d,]+|chosen|on other backbones) \| (yes|no) \|", text, re.MULTILINE)
    assert sorted(name for name, _, _ in rows) == zoo.list_adapters()
    cells = {cell.method: cell for cell in zoo.compatibility(["vit"])}
    for name, trained, merged in rows:
        assert (trained == "on other backbones") == (cells[name].attach != "yes"), name
        if cells[name].attach == "yes":
            assert (merged == "yes") == (cells[name].merge == "yes"), name


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if (
            "://" in target
            or target.startswith("reference/")
            or target in ("compatibility.md", "cli.md", "contributing.md")
        ):
            continue  # pages that are generated; the site's strict build checks them
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_console_lines_parse() -> None:
    """Every `$ zoo ...` line and every example in a help text names a command and options that exist."""
    import shlex

    from typer.main import get_command

    from zoo.cli import app

    group: Any = get_command(app)
    lines = [line[6:] for p in PAGES for line in re.findall(r"^\$ zoo .*$", p.read_text(), re.MULTILINE)]
    for command in group.commands.values():
        lines += [line.strip()[4:] for line in re.findall(r"^ +zoo .*$", command.help or "", re.MULTILINE)]
    assert len(lines) > 20
    for line in lines:
        name, *arguments = shlex.split(line.split("     ")[0], comments=True)
        if arguments and f"{name} {arguments[0]}" in group.commands:  # zoo bench compare
            name = f"{name} {arguments.pop(0)}"
        command = group.commands[name]
        with command.make_context(name, arguments, resilient_parsing=False):
            pass
