"""`zoo export`: a trained model as a file for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zoo.cli.common import JSON_HELP, console, print_json, size
from zoo.cli.options import TrustBackbone


def export(
    target: Annotated[
        str, typer.Argument(help="A saved folder, a Hub repository, an embedded adapter, or a backbone.")
    ],
    onnx: Annotated[Path, typer.Option("--onnx", help="The file to write, ending in .onnx.")],
    merged: Annotated[
        bool | None,
        typer.Option("--merged/--live", help="Adapters folded into the weights, or not; default: where they can be."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", help="Of batches of one size only; default: any size.")
    ] = None,
    pretrained: Annotated[bool, typer.Option(help="On the backbone's pretrained weights, or on random ones.")] = True,
    seed: Annotated[int, typer.Option(help="Of random weights (--no-pretrained): that of zoo fit.")] = 0,
    trust_backbone: TrustBackbone = False,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Write a model as an ONNX file, and check it: ONNX Runtime and the model give the same outputs, or nothing is written.

    What goes in are preprocessed batches, as model.preprocess() makes them; names of the classes are in the file's metadata.

    \b
      zoo export out/ --onnx out.onnx
      zoo export out/ --onnx out.onnx --live            adapters beside the weights, as prompts and prefixes must be
      zoo export out/ --onnx out.onnx --batch-size 1
    """
    from zoo.cli.evaluate import load_target
    from zoo.exchange.onnx import to_onnx

    facts = to_onnx(load_target(target, pretrained, seed, trust_backbone), onnx, merged=merged, batch_size=batch_size)
    if as_json:
        print_json(facts)
        return
    how = "merged" if facts["merged"] else "live"
    shapes = ", ".join(f"{name} {tuple(shape)}" for name, shape in facts["inputs"].items())
    console().print(
        f"{onnx}: {how}, {size(facts['bytes'])}, takes {shapes}; the largest difference of the outputs from the model's is "
        f"{facts['largest_difference']:.1e} (of {facts['largest_output']:.3g})",
        markup=False,
        soft_wrap=True,
    )
