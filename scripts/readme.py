"""Write README's table of methods from their classes: name, first sentence of the file, count, promises, papers.

    python scripts/readme.py            writes it (part of `make format`)
    python scripts/readme.py --check    says whether it is up to date

Nobody edits the table by hand: a new method has its row when this has run, and a changed default its new count.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's code, whatever is installed

import zoo
from zoo import registry
from zoo.bench.sizes import trained
from zoo.cli.listing import summary
from zoo.errors import AttachError, MissingPackageError, SelectionError

README = Path(__file__).resolve().parents[1] / "README.md"
BACKBONE = "vit-b16"
HEAD = "| name | what it does | trained | merges | source |\n| --- | --- | ---: | --- | --- |\n"
TABLE = re.compile(re.escape(HEAD) + r"(\|.*\n)*")


def rows() -> list[str]:
    """One row for each method: by what it trains on ViT-B/16, then those that choose it, then those of other backbones."""
    model = zoo.load(BACKBONE, num_classes=0, device="meta")
    found: list[tuple[float, str, str]] = []
    for name in zoo.list_adapters():
        cls = registry.adapter_class(name)
        order, trained = _trained(model, name)
        what = summary(cls).rstrip(".")
        title, colon, rest = what.partition(": ")
        cells = (f"`{name}`", rest if colon else title, trained, "yes" if cls.merges else "no", cls.paper)
        found.append((order, name, "| " + " | ".join(cells) + " |"))
    return [re.sub(r"\|  \|$", "| |", row) for _, _, row in sorted(found)]


def _trained(model: zoo.Model, name: str) -> tuple[float, str]:
    try:
        adapter = model.add_adapter(name)
    except (AttachError, SelectionError, MissingPackageError):
        return float("inf"), "on other backbones"
    count = trained(model)
    model.remove_adapter(name)
    return (1e15, "chosen") if adapter.needs_calibration else (count, f"{count:,}")


def written(text: str) -> str:
    """README with the table as it should be."""
    if not TABLE.search(text):
        raise SystemExit(f"README.md has no table that begins with {HEAD.splitlines()[0]!r}.")
    return TABLE.sub(lambda _: HEAD + "\n".join(rows()) + "\n", text)


def main() -> None:
    """Write, or check."""
    text = README.read_text()
    new = written(text)
    if new == text:
        return
    if "--check" in sys.argv[1:]:
        raise SystemExit("README's table of methods is not that of the code: run `make format`.")
    README.write_text(new)
    print("README.md: the table of methods was written anew")


if __name__ == "__main__":
    main()
