"""`zoo push`, `zoo pull`, `zoo merge`: adapters to and from the Hub, and back into plain weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from zoo.cli.common import JSON_HELP, console, count, is_folder, print_json, size
from zoo.cli.options import TrustBackbone
from zoo.errors import ConfigError, SaveError

Json = Annotated[bool, typer.Option("--json", help=JSON_HELP)]
HubFolder = Annotated[
    Path | None, typer.Option("--hub-folder", help="A folder that stands for the Hub (also ZOO_HUB_FOLDER).")
]
Revision = Annotated[str | None, typer.Option(help="A branch, tag or commit; also user/name@revision.")]


def push(
    folder: Annotated[Path, typer.Argument(help="A folder that zoo fit or model.save_adapter wrote.")],
    repo: Annotated[str, typer.Argument(help="user/name, or user/name@branch.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository; default: as the account says.")
    ] = None,
    revision: Revision = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="The commit's message.")] = None,
    hub_folder: HubFolder = None,
    as_json: Json = False,
) -> None:
    """Publish a saved adapter with its card.

    Only the four files of the format are sent, in one commit, after they were read back and checked. Log in first:
    hf auth login, or set HF_TOKEN.

    \b
      zoo push out/ you/vit-b16-lora-photos
      zoo push out/ you/vit-b16-lora-photos@v2 --private -m "trained on twice the photos"
      zoo push out/ you/test --hub-folder /tmp/hub         # try it without the Hub
    """
    from zoo import hub

    address = hub.push(
        folder.expanduser(), repo, private=private, revision=revision, commit_message=message, hub_folder=hub_folder
    )
    if as_json:
        print_json({"repo": repo, "address": address})
        return
    console().print(f'published: {address}\nload it:   zoo.load(adapter="{repo}")', markup=False)


def pull(
    repo: Annotated[str, typer.Argument(help="user/name, or user/name@revision.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Copy it here; default: only the Hub's cache.")
    ] = None,
    revision: Revision = None,
    hub_folder: HubFolder = None,
    as_json: Json = False,
) -> None:
    """Fetch an adapter from the Hub, and check it.

    \b
      zoo pull you/vit-b16-lora-photos --out out/
      zoo pull you/vit-b16-lora-photos@v2
    """
    folder = download(repo, revision, hub_folder)
    if out is not None:
        from zoo import disk

        if out.exists() and not out.is_dir():
            raise SaveError(f"'{out}' is a file; name a folder with --out.")
        disk.write_files(out, disk.contents(folder))
        folder = out
    if as_json:
        print_json({"repo": repo, "folder": folder})
        return
    console().print(f"{repo} is in {folder}", markup=False, soft_wrap=True)


def download(repo: str, revision: str | None = None, hub_folder: Path | None = None) -> Path:
    """The local folder of a Hub repository.

    Raises:
        HubError: not found, not allowed, not reachable, or not an adapter.
    """
    from zoo import hub

    return hub.pull(repo, revision=revision, hub_folder=hub_folder)


def merge(
    target: Annotated[str, typer.Argument(help="A saved folder, a Hub repository, or an embedded adapter.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write, ending in .safetensors.")],
    pretrained: Annotated[bool, typer.Option(help="On the backbone's pretrained weights, or on random ones.")] = True,
    seed: Annotated[int, typer.Option(help="Of random weights (--no-pretrained): that of zoo fit.")] = 0,
    trust_backbone: TrustBackbone = False,
    as_json: Json = False,
) -> None:
    """Fold an adapter into its backbone's weights: a plain checkpoint of the library, nothing of ours left in it.

    Refused, with the reason, for methods whose mathematics does not allow it (prompts, prefixes).

    \b
      zoo merge out/ --out merged.safetensors
    """
    import torch
    from safetensors.torch import save

    from zoo import disk, registry
    from zoo.cli.evaluate import load_target

    if out.suffix != ".safetensors":
        raise ConfigError(f"--out is '{out}'; expected a file that ends in .safetensors (pickles are not written).")
    if not is_folder(target) and target in registry.list_backbones():
        raise ConfigError(f"'{target}' is a backbone without an adapter; there is nothing to merge.")
    model = load_target(target, pretrained, seed, trust_backbone)
    plain = model.merge()
    gap = _gap(model, plain)
    state = {name: value.detach().cpu().contiguous().clone() for name, value in plain.state_dict().items()}
    name = registry.find_backbone(model.backbone_name)[1]
    metadata = {"format": "pt", "backbone": name, "num_classes": str(model.num_classes)}
    data = save(state, metadata=metadata)
    out.parent.mkdir(parents=True, exist_ok=True)
    disk.write_file(out, data)
    facts: dict[str, Any] = {
        "out": out,
        "bytes": len(data),
        "parameters": sum(p.numel() for p in plain.parameters()),
        "class": f"{type(plain).__module__}.{type(plain).__qualname__}",
        "backbone": name,
        "num_classes": model.num_classes,
        "largest_difference": gap,
        "torch": str(torch.__version__),
    }
    if as_json:
        print_json(facts)
        return
    out_ = console()
    out_.print(
        f"{out}: {count(facts['parameters'])} parameters, {size(facts['bytes'])}, a plain {facts['class']}; the largest "
        f"difference of the outputs on a random batch is {gap:.1e}"
    )
    if name.startswith("timm:"):
        architecture = name.removeprefix("timm:").partition(".")[0]
        line = f'timm.create_model("{architecture}", num_classes={model.num_classes}, checkpoint_path="{out}")'
        out_.print(f"load it: {line}", markup=False, soft_wrap=True)


def _gap(model: Any, plain: Any) -> float:
    """The largest difference between the outputs of both on a random batch."""
    import torch

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        batch = model.example_batch()
        return float((model.eval()(*batch) - model.family.run(plain.eval(), *batch)).abs().max())
