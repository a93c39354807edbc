"""`zoo bench compare`: what methods learn at an equal number of parameters, on small data sets, over several seeds."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from zoo.cli.common import JSON_HELP, bars, console, print_json, table
from zoo.cli.repeated import numbers_of
from zoo.errors import ConfigError, SaveError, ZooError


def compare(
    backbone: Annotated[str, typer.Option(help="A short name such as vit-b16, or timm:<model>.")] = "vit-micro",
    data: Annotated[
        str, typer.Option(help="Data sets, comma-separated: folders below --data-root, paths, hf:owner/name, digits.")
    ] = "digits",
    methods: Annotated[
        str,
        typer.Option("--methods", "-m", help="Methods, comma-separated, with settings as spt:form=adapter; or all."),
    ] = "all",
    budget: Annotated[
        str, typer.Option(help="Trained parameters without the head, such as 0.05M; several with commas.")
    ] = "0.05M",
    also: Annotated[
        str | None, typer.Option(help="Methods that are compared at their own size beside them, such as full.")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the rows, tables and pictures; the same one goes on.")
    ] = Path("comparison"),
    data_root: Annotated[
        Path | None, typer.Option(help="Folder of data sets; by default that in ZOO_TEST_DATA.")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(help="Train on at most so many items of every class; by default on all.")
    ] = None,
    test_items: Annotated[
        int | None, typer.Option(help="Test on so many items, drawn once; by default on all.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run.")] = 200,
    search_steps: Annotated[int | None, typer.Option(help="Those of the search; by default half as many.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Samples in a batch.")] = 16,
    rates: Annotated[int, typer.Option(help="Learning rates that are tried for each method, 1 to 5.")] = 3,
    seeds: Annotated[str, typer.Option(help="Of the runs, comma-separated.")] = "0,1,2",
    rounds: Annotated[int, typer.Option(help="Times each step is measured; more is steadier.")] = 10,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default: the best there is.")] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16 (autocast).")] = "fp32",
    image_size: Annotated[
        int | None, typer.Option("--image-size", "--img-size", help="Another size of images than the backbone's own.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Save the adapters of the first seed, too.")] = False,
    finished: Annotated[
        bool, typer.Option("--finished", help="Train nothing; show what is finished and name what is not.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Compare what methods learn at an equal number of trained parameters.

    Every method is made as large as the budget allows (what cannot meet it is named, with the reason), gets a search of learning
    rates of equal size on items that are set aside from the training data, and is then trained with each seed and tested once.
    Every training is a row of rows.jsonl, with its config, seed, revision and versions: a comparison that was killed goes on
    behind the last of them when the same command is given again, and one more method costs its own trainings only.

    \b
      zoo bench compare --backbone vit-micro --data cifar10 --methods all --budget 0.05M
      zoo bench compare --data digits --methods lora,vpt,spt,spt:form=adapter --also full -o spt/
      zoo bench compare --data cifar10,flowers17 --budget 20k,100k --shots 50 --test-items 2000
      zoo bench compare --backbone ast-micro --data fsdd,esc10 --methods lora,adapter,prefix
    """
    from zoo import registry
    from zoo.bench.report import COLUMNS, cells, groups, lacking, left_out, lost, read, write
    from zoo.bench.sizes import parse_budget, parse_methods
    from zoo.bench.study import Protocol
    from zoo.bench.study import compare as run

    protocol = Protocol(
        steps=steps,
        search_steps=search_steps or max(1, steps // 2),
        batch_size=batch_size,
        rates=rates,
        seeds=_seeds(seeds),
        shots=shots,
        test_items=test_items,
        rounds=rounds,
        precision=precision,
    )
    registry.find_backbone(backbone)
    options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    names = [name.strip() for name in data.split(",") if name.strip()]
    budgets = [parse_budget(text) for text in budget.split(",")]
    chosen, beside = parse_methods(methods), parse_methods(also) if also else []
    with _bar(quiet or as_json) as tell:
        study = run(
            *(backbone, names, chosen, budgets, protocol),
            also=beside,
            out=out,
            data_root=data_root,
            device=device,
            keep=keep,
            finished=finished,
            tell=tell,
            **options,
        )
    broken = "\n".join(f"{f['method']} on {f['data']}: {f['error']}" for f in study.failed)
    before = out / "comparison.json"
    if not study.lines:
        rest = [f"left out: {line}" for line in left_out(study)] + [f"not finished: {line}" for line in lacking(study)]
        kept = f" What {out} held is as it was." if before.exists() else ""
        raise ZooError("\n".join([f"There is nothing to show, and no table is written.{kept}", *rest, broken]).strip())
    gone: list[str] = []
    if before.exists():
        try:
            gone = lost(read(before), study)
        except SaveError:  # somebody else's file, or half of one
            gone = [f"whatever {before} was: it could not be read"]
    write(study, out)
    if as_json:
        document = {"out": str(out), "lines": study.lines, "failed": study.failed, "left_out": left_out(study)}
        print_json({**document, "missing": study.missing, "no_longer_shown": gone})
    else:
        shown = console()
        for (name, size), lines in groups(study).items():
            title = f"{backbone} on {name}" + (f", {size:,} parameters" if size else "")
            shown.print(table(COLUMNS, [cells(line) for line in lines], title=title, right=COLUMNS[2:]))
        for line in left_out(study):
            shown.print(f"left out: {line}", markup=False, soft_wrap=True)
        for line in lacking(study):
            shown.print(f"not finished: {line}", markup=False, soft_wrap=True)
        for line in gone:
            shown.print(f"no longer in the table: {line}", markup=False, soft_wrap=True)
        shown.print(f"saved in {out}: rows.jsonl, comparison.md, comparison.json, comparison.png")
    if study.failed:
        raise ZooError(f"{len(study.failed)} of the comparisons broke off; the others are saved.\n{broken}")


def _seeds(text: str) -> tuple[int, ...]:
    found = tuple(numbers_of("--seeds", text))
    if not found or any(not 0 <= seed < 2**31 for seed in found):
        raise ConfigError(f"--seeds is '{text}'; expected whole numbers with commas: 0,1,2.")
    return found


def _bar(quiet: bool) -> Any:
    """A context that gives (text, done, total) -> None: a progress bar on a terminal, else a line for each training."""
    if quiet:
        return nullcontext(lambda text, done, total: None)
    return _Bar()


class _Bar:
    def __enter__(self) -> Any:
        self.console = console(stderr=True)
        self.last = ""
        self.progress = bars(self.console, disable=not self.console.is_terminal)
        self.progress.start()
        self.task = self.progress.add_task("", total=None)
        return self.tell

    def tell(self, text: str, done: int, total: int) -> None:
        self.progress.update(self.task, description=text, completed=done, total=total or None)
        if not self.console.is_terminal and text != self.last:
            self.console.print(f"{done}/{total} {text}" if total else text, markup=False, soft_wrap=True)
        self.last = text

    def __exit__(self, *error: object) -> None:
        self.progress.stop()
