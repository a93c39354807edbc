"""`zoo bench`: what each method costs in time and memory on this machine, relative to full fine-tuning."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from zoo.cli.common import JSON_HELP, console, count, print_json, size, table
from zoo.errors import AttachError, ConfigError, SelectionError

DEFAULT_METHODS = ("linear", "bitfit", "lora", "adapter", "vpt")


def bench(
    backbone: Annotated[str, typer.Argument(help="A short name such as vit-b16, or timm:<model>.")] = "vit-micro",
    adapters: Annotated[
        str | None,
        typer.Option(
            "--adapters",
            "-a",
            help=f"Methods, comma-separated; default: those of {', '.join(DEFAULT_METHODS)} that the backbone takes.",
        ),
    ] = None,
    memory: Annotated[str, typer.Option(help="Memory settings, comma-separated: default, low, min, off.")] = "default",
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Samples in a batch.")] = 8,
    rounds: Annotated[int, typer.Option(help="Times each method is measured; more is steadier.")] = 10,
    num_classes: Annotated[int, typer.Option(help="Classes of the head, of backbones that classify.")] = 100,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default: the best there is.")] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16 (autocast).")] = "fp32",
    png: Annotated[Path | None, typer.Option(help="Also draw time against memory into this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Measure step time and saved bytes of methods, relative to full fine-tuning. What they learn: zoo bench compare.

    The reference is full fine-tuning of the library's own module, without anything of ours. Every round runs one training
    step of each method in turn, so a busy machine slows all of them alike; the ratio is the median over rounds of a
    method's time by the reference's in the same round. Saved bytes are what is kept for the backward pass, a count that
    does not depend on the machine. Weights are random: they do not change the cost. Inputs are of the shapes that the
    backbone is made for. One that classifies (images, sounds) gets a head; others are measured on their own output.

    \b
      zoo bench vit-b16
      zoo bench vit-b16 -a lora,vpt --memory default,low,min --png bench.png
      zoo bench swin-t -a lora -b 32 --device cuda --precision bf16 --json
      zoo bench ast-micro
    """
    from zoo.bench.costs import machine, measure

    left_out: dict[str, str] = {}
    if adapters is None:
        left_out = _refused(backbone, num_classes)
        methods = [m for m in DEFAULT_METHODS if m not in left_out]
    else:
        methods = [m.strip() for m in adapters.split(",") if m.strip()]
    levels = [m.strip() for m in memory.split(",") if m.strip()]
    if not methods:
        raise ConfigError("--adapters names no method; for example: --adapters lora,vpt.")
    shown: Any = nullcontext() if as_json else console(stderr=True).status("")
    with shown as status:
        rows = measure(
            *(backbone, methods, levels, batch_size, rounds, num_classes),
            device=device,
            precision=precision,
            say=status.update if status is not None else str,
        )
    report = {"backbone": backbone, "batch_size": batch_size, "rounds": rounds, "precision": precision, "methods": rows}
    report |= {"left_out": left_out, **machine(device)}
    if png is not None:
        draw(rows, png, f"{backbone}, batch {batch_size}, {report['device']}")
    if as_json:
        print_json(report)
        return
    out = console()
    out.print(
        table(
            ["method", "memory", "trainable", "saved", "saved / full", "step ms", "step / full"],
            [
                (
                    r["method"],
                    r["memory"],
                    count(r["trainable"]),
                    size(r["saved_bytes"]),
                    f"{r['saved_ratio']:.3f}",
                    f"{r['step_seconds'] * 1e3:.1f}",
                    f"{r['step_ratio']:.3f}",
                )
                for r in rows
            ],
            title=f"{backbone}, batch {batch_size}, {precision}, {report['device']}, {report['threads']} threads",
            right=["trainable", "saved", "saved / full", "step ms", "step / full"],
        )
    )
    for method, reason in left_out.items():
        out.print(f"left out: {method}: {reason}", markup=False, soft_wrap=True)
    if png is not None:
        out.print(f"drawn in {png}")


def _refused(backbone: str, num_classes: int) -> dict[str, str]:
    """Which of the default methods this backbone does not take, and why."""
    import zoo
    from zoo.bench.costs import head_width

    width, found = head_width(backbone, num_classes), {}
    model = zoo.load(backbone, pretrained=False, num_classes=0, device="meta")
    for method in DEFAULT_METHODS:
        try:
            model.add_adapter(method)
        except (AttachError, SelectionError) as error:
            found[method] = str(error)
            continue
        if not width and not model.num_parameters(trainable=True):
            found[method] = "it trains nothing but a head, and this backbone has none"
        model.remove_adapter(model.active[-1])
    return found


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Step time against saved bytes, both relative to full fine-tuning, one labelled point for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5), dpi=150)
    colours = {"default": "#1f77b4", "low": "#ff7f0e", "min": "#2ca02c", "off": "#7f7f7f"}
    axes.axhline(1, color="#999999", lw=0.8)
    axes.axvline(1, color="#999999", lw=0.8)
    width, height = (1.12 * max([1.0, *(r[key] for r in rows)]) for key in ("saved_ratio", "step_ratio"))
    taken: list[tuple[float, float]] = []
    for level in dict.fromkeys(r["memory"] for r in rows if r["memory"]):
        mine = [(r["saved_ratio"], r["step_ratio"], r["method"]) for r in rows if r["memory"] == level]
        axes.scatter(
            [x for x, _, _ in mine],
            [y for _, y, _ in mine],
            label=f'memory="{level}"',
            color=colours.get(level),
            zorder=3,
        )
        for x, y, method in sorted(mine, key=lambda m: -m[1]):
            close = any(abs(x - a) < 0.12 * width and 0 <= b - y < 0.045 * height for a, b in taken)
            axes.annotate(method, (x, y), (5, -11 if close else 4), textcoords="offset points")
            taken.append((x, y))
    axes.set(xlim=(0, width), ylim=(0, height), title=title)
    axes.set(xlabel="kept for backward / full fine-tuning", ylabel="step time / full fine-tuning")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
