"""`zoo list`: backbones, methods, trained adapters, and the table of what works with what."""

from __future__ import annotations

import fnmatch
import inspect
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo.cli.common import JSON_HELP, console, print_json, table
from zoo.errors import UnknownNameError, nearest

if TYPE_CHECKING:
    pass

Json = Annotated[bool, typer.Option("--json", help=JSON_HELP)]


def list_(
    what: Annotated[str, typer.Argument(help="backbones, adapters, regimes, or a pattern such as 'vit*'.")] = "all",
    pattern: Annotated[str, typer.Argument(help="Only names that match, with * and ?.")] = "*",
    as_table: Annotated[
        bool,
        typer.Option("--table", help="Run every method on every family at tiny size: what works, and what is refused."),
    ] = False,
    as_json: Json = False,
) -> None:
    """List backbones, methods, regimes, and the trained adapters that come along.

    \b
      zoo list
      zoo list adapters
      zoo list backbones 'swin*'
      zoo list 'vit*' --json
      zoo list --table
      zoo list 'vl-*' --table

    Any other timm model of a listed family works too, by its own name: timm:vit_small_patch14_dinov2.lvd142m
    """
    if what not in ("all", "backbones", "adapters", "regimes"):
        what, pattern = "all", what
    if as_table:
        _table(pattern, as_json)
        return
    found: dict[str, list[dict[str, Any]]] = {}
    if what in ("all", "backbones"):
        found["backbones"] = _backbones(pattern)
    if what in ("all", "adapters"):
        found["adapters"] = _adapters(pattern)
    if what in ("all", "adapters"):
        found["trained"] = _trained(pattern)
    if what in ("all", "regimes"):
        found["regimes"] = _regimes(pattern)
    if not any(found.values()):
        import zoo

        known = [*zoo.list_backbones(), *zoo.list_adapters(), *zoo.list_regimes()]
        raise UnknownNameError(f"No name matches '{pattern}'. {nearest(pattern, known)}")
    if as_json:
        print_json(found)
        return
    out = console()
    if found.get("backbones"):
        rows = [(b["name"], b["family"], b["source"]) for b in found["backbones"]]
        out.print(table(["backbone", "family", "library's name"], rows))
    if found.get("adapters"):
        if found.get("backbones"):
            out.print()
        rows = [(a["name"], a["taxonomy"], a["summary"]) for a in found["adapters"]]
        out.print(table(["adapter", "kind", "what it is"], rows))
    if found.get("trained"):
        if found.get("backbones") or found.get("adapters"):
            out.print()
        trained = [(t["name"], t["backbone"], t["methods"], t["classes"] or "") for t in found["trained"]]
        out.print(table(["trained, comes along", "backbone", "methods", "classes"], trained, right=["classes"]))
    if found.get("regimes"):
        if any(found.get(k) for k in ("backbones", "adapters", "trained")):
            out.print()
        out.print(table(["regime", "what it is"], [(r["name"], r["summary"]) for r in found["regimes"]]))


def _table(pattern: str, as_json: bool) -> None:
    """The table of families and methods; `pattern` names families or methods."""
    from rich.progress import Progress

    import zoo
    from zoo import registry
    from zoo.table import STEPS

    families = [f for f in registry.families() if registry.family(f).tiny]
    methods = zoo.list_adapters()
    named = [f for f in families if fnmatch.fnmatch(f, pattern)]
    if not named and not fnmatch.filter(methods, pattern):
        raise UnknownNameError(
            f"No family and no method matches '{pattern}'. {nearest(pattern, [*families, *methods])}"
        )
    families, methods = (named, methods) if named else (families, fnmatch.filter(methods, pattern))
    cells = []
    out = console()
    with Progress(console=out, transient=True, disable=as_json) as bar:
        task = bar.add_task("running", total=len(families) * len(methods))
        for family in families:
            for method in methods:
                cells += zoo.compatibility([family], [method])
                bar.update(task, advance=1, description=f"{method} on {family}")
    if as_json:
        print_json([cell.as_dict() for cell in cells])
        return
    notes: dict[str, int] = {}
    by = {(c.family, c.method): c for c in cells}

    def words(cell: Any) -> str:
        answers = {step: getattr(cell, step) for step in STEPS}
        refused = {
            s: notes.setdefault(a, len(notes) + 1) for s, a in answers.items() if a not in ("yes", "not reached")
        }
        works = ", ".join(s for s, a in answers.items() if a == "yes")
        return " ".join([works, *(f"no {step} ({number})" for step, number in refused.items())]).strip()

    out.print(table(["method", *families], [[m, *(words(by[f, m]) for f in families)] for m in methods]))
    for reason, number in notes.items():
        out.print(f"({number}) {reason}", soft_wrap=True)


def _backbones(pattern: str) -> list[dict[str, Any]]:
    from zoo import registry

    rows = []
    for key in registry.families():
        cls = registry.family(key)
        for alias, source in cls.aliases.items():
            if fnmatch.fnmatch(alias, pattern):
                rows.append({"name": alias, "family": key, "modality": cls.modality, "source": source})
    return rows


def _adapters(pattern: str) -> list[dict[str, Any]]:
    from zoo import registry

    classes = {name: registry.adapter_class(name) for name in registry.list_adapters(pattern)}
    return [
        {"name": name, "summary": summary(cls), "paper": cls.paper, "taxonomy": cls.taxonomy}
        for name, cls in classes.items()
    ]


def _regimes(pattern: str) -> list[dict[str, Any]]:
    from zoo import registry

    classes = {name: registry.regime_class(name) for name in registry.list_regimes(pattern)}
    return [{"name": name, "summary": summary(cls), "paper": cls.paper} for name, cls in classes.items()]


def _trained(pattern: str) -> list[dict[str, Any]]:
    """Trained adapters that come with the packages."""
    from zoo.disk.saved import read
    from zoo.sources import embedded_adapters

    rows = []
    for name, folder in embedded_adapters().items():
        if fnmatch.fnmatch(name, pattern):
            saved = read(folder)
            methods = ", ".join(a.method for a in saved.adapters)
            rows.append(
                {"name": name, "backbone": saved.backbone_name, "methods": methods, "classes": saved.num_classes}
            )
    return rows


def summary(cls: type[Any]) -> str:
    """The first sentence of a method's or regime's file, or of its class."""
    module = sys.modules.get(cls.__module__)
    for text in (inspect.getdoc(module) if module else "", cls.__doc__):
        first = " ".join((text or "").strip().split("\n\n")[0].split())
        if first and not first.startswith(
            f"{cls.__name__}("
        ):  # a dataclass without a docstring documents its signature
            return first.split(". ")[0].rstrip(".") + "."
    return ""
