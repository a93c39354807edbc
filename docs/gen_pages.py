"""Pages that are made from the code when the site is built, so that they cannot be out of date.

- `compatibility.md`: which method works on which backbone, from `zoo.compatibility()`;
- `methods/<name>.md`: one page for each registered method, from its file;
- `contributing.md`: CONTRIBUTING.md;
- `cli.md`: the help of every command;
- `reference/<module>.md`: one page for each public module of `zoo`.

mkdocs calls `on_config` and `on_files` (see `hooks:` in mkdocs.yml).
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import pkgutil
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

# In this order first; whatever else there is follows by name.
FIRST = (
    "zoo.loading",
    "zoo.registry",
    "zoo.model",
    "zoo.points",
    "zoo.adapters.base",
    "zoo.backbone",
    "zoo.engine.memory",
    "zoo.train",
)
NOT_PUBLIC = ("zoo.cli", "zoo.disk.layout")

_pages: dict[str, str] = {}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Make the pages and put them into the navigation."""
    _pages.clear()
    methods, reference = _methods(), _reference()
    own = {"compatibility.md": _compatibility(), "cli.md": _command_line(), "contributing.md": _contributing()}
    _pages.update({**own, **methods, **reference})
    assert config.nav is not None
    config.nav += [
        {"Command line": "cli.md"},
        {"Compatibility": "compatibility.md"},
        {"Contributing": "contributing.md"},
        {"Methods": [{_stem(path): path} for path in methods]},
        {"API reference": [{_stem(path): path} for path in reference]},
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Hand the pages to mkdocs."""
    for path, text in _pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def _stem(path: str) -> str:
    return path.rsplit("/", 1)[-1].removesuffix(".md")


def _methods() -> dict[str, str]:
    from zoo import registry

    pages = {}
    for name in registry.list_adapters():
        cls = registry.adapter_class(name)
        pages[f"methods/{name}.md"] = f"""# {name}

```python
model = zoo.load("vit-b16", adapter="{name}", num_classes=100)
```
{_settings(cls)}
::: {cls.__module__}
"""
    return pages


def _settings(cls: Any) -> str:
    from zoo.cli.catalog import default

    fields = dataclasses.fields(cls)
    if not fields:
        return "\nThere is nothing to set.\n"
    # A bar inside a table's cell would end it.
    rows = [f"| `{f.name}` | {str(f.type).replace('|', 'or')} | `{default(f)!r}` |" for f in fields]
    return "\n".join(["\n| setting | type | default |", "| --- | --- | --- |", *rows, ""])


def _reference() -> dict[str, str]:
    import zoo

    found = [m.name for m in pkgutil.walk_packages(zoo.__path__, "zoo.") if not m.name.startswith(NOT_PUBLIC)]
    found = [m for m in found if not any(part.startswith("_") for part in m.split("."))]
    # methods have pages of their own
    found = [m for m in found if not m.startswith("zoo.adapters") or m == "zoo.adapters.base"]
    order = [m for m in FIRST if m in found] + sorted(set(found) - set(FIRST))
    return {f"reference/{name}.md": f"# `{name}`\n\n::: {name}\n" for name in order}


def _contributing() -> str:
    return (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()


def _command_line() -> str:
    from typer.main import get_command
    from typer.testing import CliRunner

    from zoo.cli import app

    os.environ["TERMINAL_WIDTH"] = "100"
    runner = CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"})
    parts = ["# Command line\n", _console(runner, app, [])]
    group: Any = get_command(app)
    for name in group.commands:
        parts += [f"## zoo {name}\n", _console(runner, app, [name])]
    return "\n".join(parts)


def _console(runner: Any, app: Any, command: list[str]) -> str:
    result = runner.invoke(app, [*command, "--help"])
    if result.exit_code:
        raise RuntimeError(f"zoo {' '.join(command)} --help failed: {result.output}")
    lines = [line.rstrip() for line in result.output.strip("\n").splitlines()]
    return "```text\n" + "\n".join(lines) + "\n```\n"


def _compatibility() -> str:
    import torch

    import zoo
    from zoo.table import as_markdown

    return f"""# Compatibility

Made on {datetime.date.today().isoformat()} with adapter-zoo {zoo.__version__} and torch {torch.__version__}. Every cell was
run then, on a tiny random member of the family: attaching, one training step in which
every trainable tensor got a gradient, saving and loading to the same outputs, and merging to the same outputs. What is refused is
refused with the reason below the table.

{as_markdown(zoo.compatibility())}"""
