"""`zoo compress`: a trained adapter in far fewer bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zoo.cli.common import JSON_HELP, console, count, print_json, size
from zoo.cli.options import TrustBackbone
from zoo.errors import ConfigError


def compress(
    target: Annotated[str, typer.Argument(help="A saved folder, a Hub repository, or an embedded adapter.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    k: Annotated[float, typer.Option("--k", "-k", help="Per cent of the numbers that keep their sign.")] = 20.0,
    alpha: Annotated[
        float, typer.Option(help="What all of these become, in standard deviations of the change that training made.")
    ] = 1.0,
    pretrained: Annotated[bool, typer.Option(help="On the backbone's pretrained weights, or on random ones.")] = True,
    seed: Annotated[int, typer.Option(help="Of random weights (--no-pretrained): that of zoo fit.")] = 0,
    trust_backbone: TrustBackbone = False,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Write an adapter as signs at the places where training changed most (ComPEFT): 10 to 50 times smaller than in 16 bits.

    The result is loaded, measured, pushed and pulled like any other. What it costs in accuracy is to be measured; choose k (5,
    10, 20, 30, 50) and alpha (0.5 to 10) on validation data, not on test data. The head stays as it is.

    \b
      zoo compress out/ --out small/ -k 10 --alpha 2
      zoo eval small/ --data flowers/val
    """
    from zoo import registry
    from zoo.cli.common import is_folder
    from zoo.cli.evaluate import load_target
    from zoo.disk.layout import WEIGHTS
    from zoo.disk.sizes import sizes

    if not is_folder(target) and target in registry.list_backbones():
        raise ConfigError(f"'{target}' is a backbone without an adapter; there is nothing to compress.")
    if is_folder(target) and out.resolve() == Path(target).expanduser().resolve():
        raise ConfigError(
            f"--out is '{out}', the adapter itself; name another folder, since signs give no numbers back."
        )
    model = load_target(target, pretrained, seed, trust_backbone)
    folder = model.save_adapter(out, encoding="compeft", k=k, alpha=alpha)
    found, whole = sizes(folder), (folder / WEIGHTS).stat().st_size
    if as_json:
        print_json({"out": folder, "bytes": whole, "adapters": found})
        return
    for name, one in found.items():
        console().print(
            f"{name}: signs of {count(one['kept'])} of {count(one['numbers'])} numbers in {size(one['bytes'])}, "
            f"{one['ratio']:.1f} times smaller than in 16 bits (the paper's formula {size(one['golomb'])}, entropy "
            f"{size(one['entropy'])})",
            markup=False,
            soft_wrap=True,
        )
    console().print(f"{folder}: {size(whole)} with head, settings and card", markup=False, soft_wrap=True)
