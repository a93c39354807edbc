"""The floors of the house: imports run one way, those for types alone included, and no circle of files remains."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OURS = ("zoo", "vision", "multimodal", "audio")

# From the ground up. A file may import from its own floor (without a circle) and from those below. The longest name that
# fits a module says where it stands.
FLOORS: list[tuple[str, ...]] = [
    ("zoo.errors", "zoo.library", "zoo.arguments", "zoo.fields"),
    ("zoo.data",),
    ("zoo.points",),
    ("zoo.adapters.base", "zoo.adapters.structure", "zoo.backbone", "zoo.host", "zoo.tasks.base", "zoo.heads"),
    ("zoo.registry",),
    ("zoo.engine",),
    ("zoo.adapters.parts", "zoo.disk", "zoo.families", "zoo.hub", "zoo.tasks"),
    ("zoo.model",),
    ("zoo.train",),
    ("zoo.puzzle",),
    ("zoo.regimes",),
    ("zoo.loading", "zoo.sources", "zoo.starting", "zoo.wrapping"),
    ("zoo.adapters",),  # methods
    ("zoo.table", "zoo.exchange", "zoo.bench"),
    ("zoo.cli",),
]
# What belongs to a modality stands on the public names of the house, and on no command.
DOMAIN = ("vision", "multimodal", "audio")


def modules() -> dict[str, Path]:
    found = {}
    for package in OURS:
        for file in (ROOT / package).rglob("*.py"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


@cache
def imports(module: str) -> frozenset[str]:
    """Every module of ours that a file names in an import, inside functions and for types too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in MODULES else str(node.module))
    return frozenset(name for name in found if name.split(".")[0] in OURS) - {module}


def floor(module: str) -> int | None:
    """The number of the floor of a module of `zoo`; None for the front door (`zoo` itself)."""
    fitting = [
        (len(name), number)
        for number, names in enumerate(FLOORS)
        for name in names
        if module == name or module.startswith(name + ".")
    ]
    return max(fitting)[1] if fitting else None


def test_every_file_has_a_floor() -> None:
    assert [m for m in MODULES if m.startswith("zoo.") and floor(m) is None] == []


def test_imports_run_downwards() -> None:
    wrong = []
    for module in MODULES:
        own = floor(module)
        for other in imports(module):
            package, target = module.split(".")[0], other.split(".")[0]
            if package == "zoo" and target != "zoo":
                wrong.append(f"{module} -> {other}: the core imports a domain package")
            elif package in DOMAIN and target in DOMAIN and package != target:
                wrong.append(f"{module} -> {other}: domain packages do not import each other")
            elif package in DOMAIN and other.startswith("zoo.cli"):
                wrong.append(f"{module} -> {other}: commands are the top floor")
            elif package == "zoo" and own is not None:
                there = floor(other)
                if there is not None and there > own:
                    wrong.append(f"{module} (floor {own}) -> {other} (floor {there})")
    assert wrong == [], "\n".join(["imports that run upwards:", *sorted(wrong)])


def test_no_circle_of_files() -> None:
    """A package's `__init__` only opens its doors; what counts are the files that do the work."""
    graph = {m: {o for o in imports(m) if works(o)} for m in MODULES if works(m)}
    done: set[str] = set()
    path: list[str] = []

    def visit(node: str) -> None:
        if node in path:
            raise AssertionError(f"a circle: {' -> '.join([*path[path.index(node) :], node])}")
        if node in done or node not in graph:
            return
        path.append(node)
        for other in sorted(graph[node]):
            visit(other)
        path.pop()
        done.add(node)

    for module in graph:
        visit(module)


def works(module: str) -> bool:
    """Whether a file does more than open the doors of its package."""
    return MODULES[module].name != "__init__.py"


def test_names_of_test_files_are_unique() -> None:
    """pytest collects files by their name alone: of two of one name neither part of the suite would run."""
    names = [p.name for p in (ROOT / "tests").rglob("test_*.py")]
    assert sorted({n for n in names if names.count(n) > 1}) == []
