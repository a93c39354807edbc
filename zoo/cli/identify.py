"""`zoo identify`: probes against a gallery of known identities."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from zoo.cli.common import console, numbers, print_json
from zoo.cli.evaluate import load_target
from zoo.cli.options import (
    BatchSize,
    Device,
    Json,
    Precision,
    Pretrained,
    Quiet,
    SeedOfWeights,
    SkipBroken,
    TrustBackbone,
    Workers,
    data_option,
)


def identify(
    target: Annotated[str, typer.Argument(help="A saved folder, a Hub repository, or a backbone.")],
    data: Annotated[str, data_option("The probes, with whose they are: class folders, Parquet files, hf:owner/name.")],
    split: Annotated[str | None, data_option("Split of --data, where it has several.")] = None,
    gallery: Annotated[str | None, data_option("The gallery; by default images of --data are.")] = None,
    gallery_split: Annotated[str | None, data_option("Split of --gallery, where it has several.")] = None,
    enrol: Annotated[int, data_option("Without --gallery: how many images of each identity are the gallery.")] = 1,
    probe_scale: Annotated[float, data_option("Lower the resolution of the probes by this number.")] = 1.0,
    gallery_scale: Annotated[float, data_option("Lower the resolution of the gallery by this number.")] = 1.0,
    singles: Annotated[
        str, data_option("Identities without a probe: refuse them, leave them out, or keep them in the gallery.")
    ] = "refuse",
    batch_size: BatchSize = 64,
    pretrained: Pretrained = True,
    seed: SeedOfWeights = 0,
    trust_backbone: TrustBackbone = False,
    precision: Precision = "fp32",
    device: Device = None,
    workers: Workers = None,
    skip_broken: SkipBroken = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Who is it: ranks 1, 5 and 20, and true accepts at false ones, of faces or anything else that has identities.

    Identities need not be those of the training; no head is asked.

    \b
      zoo identify out/ --data faces/                       the first image of each identity is the gallery
      zoo identify out/ --data faces/ --probe-scale 4       probes of a quarter of the resolution
      zoo identify out/ --data probes/ --gallery known/
    """
    import zoo
    from zoo import registry

    made: Any = type(registry.task("identify"))
    what = made(
        enrol if gallery is None else gallery,
        gallery_split=gallery_split,
        probe_scale=probe_scale,
        gallery_scale=gallery_scale,
        singles=singles,
    )
    model = load_target(target, pretrained, seed, trust_backbone)
    dataset = model.family.open_dataset(data, split=split, on_error="skip" if skip_broken else "raise")
    result = zoo.evaluate(
        model,
        dataset,
        record="",
        batch_size=batch_size,
        precision=precision,
        device=device,
        workers=workers,
        progress=not (quiet or as_json),
        task=what,
    )
    if as_json:
        print_json({"target": target, "data": data, "gallery": gallery or enrol, **result})
        return
    console().print(numbers(result))
