"""`zoo convert`: LoRA adapters between our folders and the formats of peft, diffusers and kohya's scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from zoo.cli.common import JSON_HELP, console, print_json
from zoo.cli.options import TrustBackbone
from zoo.errors import ConfigError, SaveError

FORMATS = ("zoo", "peft", "diffusers")


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of ours or of peft, or a LoRA file, folder or Hub repository of diffusers or kohya."
        ),
    ],
    to: Annotated[str, typer.Option("--to", help="zoo, peft or diffusers.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    backbone: Annotated[
        str | None,
        typer.Option("--backbone", "-b", help="The backbone that it is for, where the source does not say so."),
    ] = None,
    adapter: Annotated[str | None, typer.Option("--adapter", help="Which one, where the source has several.")] = None,
    leave_out: Annotated[
        bool, typer.Option("--leave-out", help="Leave out what a file adapts besides the transformer (text encoders).")
    ] = False,
    pretrained: Annotated[bool, typer.Option(help="On the backbone's pretrained weights, or on random ones.")] = True,
    seed: Annotated[int, typer.Option(help="Of random weights (--no-pretrained): that of zoo fit.")] = 0,
    trust_backbone: TrustBackbone = False,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Write a LoRA adapter in another format, with the same outputs.

    The backbone is built, and the adapter is attached to it, so that what does not fit is refused and nothing is written.

    \b
      zoo convert out/ --to peft --out for-peft/
      zoo convert out/ --to diffusers --out for-diffusers/          # pipeline.load_lora_weights("for-diffusers/")
      zoo convert flux_style.safetensors --backbone flux-dev --to zoo --out style/    # of kohya's scripts
    """
    if to not in FORMATS:
        raise ConfigError(f"--to is '{to}'; expected {', '.join(FORMATS)}.")
    if out.exists() and not out.is_dir():
        raise SaveError(f"'{out}' is a file; name a folder with --out.")
    kind = format_of(source)
    options: dict[str, Any] = {"pretrained": pretrained, "seed": seed}
    model = _loaded(source, kind, backbone, leave_out, options, trust_backbone)
    name = adapter or next(iter(model.adapters))
    if to == "zoo":
        written: Path = model.save_adapter(out) if adapter is None else model.save_adapter(out, adapter)
    elif to == "peft":
        from zoo.exchange.peft import to_peft

        written = to_peft(model, out, name)
    else:
        write = getattr(model.family, "write_lora", None)
        if write is None:
            raise ConfigError(
                f"'{model.backbone_name}' is no network of diffusers, so there is no such format for it. Write --to peft."
            )
        written = write(model, out, name)
    facts = {"from": kind, "to": to, "out": written, "backbone": model.backbone_name, "adapter": name}
    if as_json:
        print_json(facts)
        return
    console().print(f"{source} ({kind}) -> {written} ({to}), for {model.backbone_name}", markup=False, soft_wrap=True)


def format_of(source: str) -> str:
    """ "zoo", "peft", or "diffusers" for anything that is no folder with an adapter's config."""
    config = Path(source).expanduser() / "adapter_config.json"
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "zoo" if not Path(source).expanduser().exists() and "/" not in source else "diffusers"
    return "zoo" if isinstance(found, dict) and "format_version" in found else "peft"


def _loaded(source: str, kind: str, backbone: str | None, leave_out: bool, options: dict[str, Any], trust: bool) -> Any:
    import zoo
    from zoo.cli.evaluate import load_target

    if kind == "zoo":
        if backbone is not None:
            return zoo.load(backbone, adapter=source, **options).eval()
        return load_target(source, options["pretrained"], options["seed"], trust)
    if kind == "peft":
        from zoo.exchange.peft import from_peft

        return from_peft(Path(source).expanduser(), backbone, trust_backbone=trust, **options).eval()
    if backbone is None:
        raise ConfigError(
            f"'{source}' does not say which backbone it is for. Name it: --backbone flux-dev, or --backbone diffusers:<source>."
        )
    model = zoo.load(backbone, **options)
    read = getattr(model.family, "read_lora", None)
    if read is None:
        raise ConfigError(
            f"'{source}' has no adapter_config.json, so it is neither ours nor peft's; and '{backbone}' is no network of "
            "diffusers."
        )
    read(model, source, leave_out=leave_out)
    return model.eval()
