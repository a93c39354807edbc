"""`zoo points`, `zoo info`: where something can be added, and what a name or a folder stands for."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo.cli.common import JSON_HELP, console, count, is_folder, print_json, size, table
from zoo.cli.listing import summary
from zoo.errors import AttachError, SelectionError, UnknownNameError, nearest

if TYPE_CHECKING:
    from zoo.model import Model
    from zoo.points import Point

Json = Annotated[bool, typer.Option("--json", help=JSON_HELP)]


def points(
    backbone: Annotated[str, typer.Argument(help="A short name such as vit-b16, or timm:<model>.")],
    selector: Annotated[str | None, typer.Argument(help="Only these, e.g. 'blocks.*.attn.{q,v}' or q,v.")] = None,
    kind: Annotated[
        str | None, typer.Option(help="linear, sublayer, attention, tokens, norm, block, condition.")
    ] = None,
    role: Annotated[str | None, typer.Option(help="q, k, v, o, up, down, attn, mlp ...")] = None,
    stage: Annotated[int | None, typer.Option(help="A stage of a hierarchical backbone.")] = None,
    block: Annotated[int | None, typer.Option(help="The index of a block.")] = None,
    every: Annotated[
        bool, typer.Option("--all", help="One line for each point instead of one for equal blocks.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show where methods can add something to a backbone: its points.

    Equal blocks share a line, whose name is a selector: what is printed can be typed, here and as a method's targets.
    No weights are downloaded.

    \b
      zoo points vit-b16
      zoo points vit-b16 'blocks.*.attn.{q,v}' --all
      zoo points swin-b --kind sublayer --stage 2
    """
    import zoo

    model = zoo.load(backbone, pretrained=False, num_classes=0, device="meta")
    chosen = model.points.select(selector, kind=kind, role=role, stage=stage, block=block)
    if as_json:
        print_json([_describe(p) for p in chosen])
        return
    columns = ["name", "kind", "role", "in", "out", "an adapter may"]
    rows: Iterable[tuple[str, Point]] = [(p.name, p) for p in chosen] if every else collapse(chosen)
    out = console()
    out.print(
        table(
            columns,
            [(n, p.kind, p.role, p.dim_in or "", p.dim_out or "", " ".join(p.verbs)) for n, p in rows],
            right=["in", "out"],
        )
    )
    out.print(f"{len(chosen)} of {len(model.points)} points of {model.backbone_name}")


def _describe(point: Point) -> dict[str, Any]:
    keys = ("name", "kind", "role", "path", "block", "stage", "tower", "dim_in", "dim_out", "verbs")
    return {k: getattr(point, k) for k in keys}


def collapse(chosen: Iterable[Point]) -> list[tuple[str, Point]]:
    """Points that differ only in the index of their block, as one selector and the first of them."""
    groups: dict[tuple[Any, ...], list[tuple[int, Point]]] = {}
    for point in chosen:
        parts = point.name.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        if not numbers:
            groups[point.name, None] = [(0, point)]
            continue
        at = numbers[-1]
        key = (
            tuple(parts[:at]),
            tuple(parts[at + 1 :]),
            point.kind,
            point.role,
            point.dim_in,
            point.dim_out,
            point.verbs,
        )
        groups.setdefault(key, []).append((int(parts[at]), point))
    rows = []
    for key, members in groups.items():
        first = members[0][1]
        if len(members) == 1:
            rows.append((first.name, first))
            continue
        indices = [i for i, _ in members]
        whole = indices == list(range(indices[0], indices[-1] + 1))
        middle = f"{{{indices[0]}..{indices[-1]}}}" if whole else "{" + ",".join(map(str, indices)) + "}"
        rows.append((".".join([*key[0], middle, *key[1]]), first))
    return rows


def info(
    target: Annotated[str, typer.Argument(help="A backbone, a method, a saved folder, or a Hub repository.")],
    as_json: Json = False,
) -> None:
    """Explain one backbone, one method, or one saved adapter.

    \b
      zoo info vit-b16        # size, points, and what each method would train on it
      zoo info lora           # what it does and its settings
      zoo info out/           # what a saved folder holds
      zoo info you/vit-b16-lora-photos
    """
    from zoo import registry
    from zoo.sources import embedded_adapters

    if is_folder(target):
        _show(_folder_info(Path(target).expanduser()), as_json)
    elif target in embedded_adapters():
        _show({**_folder_info(embedded_adapters()[target]), "folder": f"{target}, comes with the package"}, as_json)
    elif target in registry.list_adapters():
        _show(_method_info(target), as_json)
    else:
        try:
            registry.find_backbone(target)
        except UnknownNameError as error:
            if "/" in target and ":" not in target.partition("/")[0]:
                from zoo.cli.share import download

                _show(_folder_info(download(target)), as_json)
                return
            close = nearest(target, [*registry.list_adapters(), *registry.list_backbones()])
            raise UnknownNameError(f"'{target}' is no backbone, method, folder or Hub repository. {close}") from error
        _show(_backbone_info(target), as_json)


def _method_info(name: str) -> dict[str, Any]:
    from zoo import registry

    cls = registry.adapter_class(name)
    hints = typing.get_type_hints(cls)
    return {
        "adapter": name,
        "summary": summary(cls),
        "paper": cls.paper,
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "needs_calibration": cls.needs_calibration,
        "learning_rate": cls.default_lr,
        "settings": [
            {
                "name": f.name,
                "type": inspect.formatannotation(hints[f.name]).replace("typing.", ""),
                "default": default(f),
            }
            for f in dataclasses.fields(cls)
        ],
    }


def default(field: dataclasses.Field[Any]) -> Any:
    """The default value of a setting."""
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else "(required)"


def _backbone_info(name: str) -> dict[str, Any]:
    import zoo
    from zoo import registry

    model = zoo.load(name, pretrained=False, num_classes=0, device="meta")
    cls, source = registry.find_backbone(name)
    data = model.family.data_config()
    return {
        "backbone": name,
        "family": cls.family,
        "modality": cls.modality,
        "source": source,
        "parameters": model.num_parameters(),
        "features" if cls.pools else "outputs": model.family.feature_dim,
        "image_size": list(model.image_size) if "input_size" in data else None,
        "data": data if "input_size" not in data else {},
        "licence": model.family.licence(),
        "points": {kind: sum(p.kind == kind for p in model.points) for kind in model.points.kinds},
        "methods": [_try(model, method) for method in registry.list_adapters()],
    }


def _try(model: Model, method: str) -> dict[str, Any]:
    """What a method would train on this backbone, or why it is refused."""
    try:
        adapter = model.add_adapter(method)
    except (AttachError, SelectionError) as error:
        return {"name": method, "trainable": None, "reason": str(error)}
    trainable = model.num_parameters(trainable=True, head=False)
    model.remove_adapter(model.active[-1])
    if adapter.needs_calibration and not trainable:
        return {"name": method, "trainable": None, "reason": "a pass over the training data chooses, within its budget"}
    return {"name": method, "trainable": trainable, "reason": ""}


def _folder_info(folder: Path) -> dict[str, Any]:
    from zoo import disk

    saved = disk.read(folder)
    return {
        "folder": str(folder),
        "backbone": saved.backbone_name,
        "fingerprint": saved.fingerprint,
        "adapters": [{"name": a.name, "method": a.method, "config": a.config} for a in saved.adapters],
        "num_classes": saved.num_classes,
        "classes": saved.classes,
        "parameters": sum(t.numel() for t in saved.tensors.values()),
        "bytes": sum(t.numel() * t.element_size() for t in saved.tensors.values()),
        "zoo_version": saved.zoo_version,
        "record": saved.record,
    }


def _show(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(facts)
        return
    out = console()
    out.print(table(["", ""], [(k, _cell(k, v)) for k, v in facts.items() if k not in ("settings", "methods") and v]))
    if facts.get("settings"):
        out.print()
        rows = [(s["name"], s["type"], repr(s["default"])) for s in facts["settings"]]
        out.print(table(["setting", "type", "default"], rows))
    if facts.get("methods"):
        out.print()
        rows = [
            (m["name"], "-" if m["trainable"] is None else count(m["trainable"]), m["reason"]) for m in facts["methods"]
        ]
        out.print(table(["method", "trains", ""], rows, right=["trains"]))


def _cell(key: str, value: Any) -> str:
    if key == "bytes":
        return size(value)
    if key == "adapters":
        return "\n".join(
            f"{a['name']}: {a['method']}({', '.join(f'{k}={v!r}' for k, v in a['config'].items())})" for a in value
        )
    if key == "record":
        return "\n".join(
            f"{k}: {_cell(k, value[k])}" for k in ("task", "data", "metrics", "saved_bytes") if value.get(k)
        )
    if key == "classes":
        return f"{', '.join(value[:8])}{f' and {len(value) - 8} more' if len(value) > 8 else ''}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_cell(k, v)}" for k, v in value.items())
    if isinstance(value, list):
        return " x ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.4f}"
    return count(value) if isinstance(value, int) and not isinstance(value, bool) else str(value)


__all__ = ["collapse", "default", "info", "points"]
