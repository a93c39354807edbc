"""What of other libraries can be adapted by name: how much a family describes, and how much loads at all.

    python benchmarks/reach.py                       # all libraries; results/reach.{json,md}
    python benchmarks/reach.py --library timm        # one of them, its part of the results is replaced
    python benchmarks/reach.py --again               # of timm and open_clip only what another family takes now, or did not load
    python benchmarks/reach.py --library timm --only "vit_*"    # shown, nothing written

Each network is built on the meta device (no weights, no network connection) and gets LoRA at its default places:

- *described*: a family with a table takes it: it has all the kinds of points that its blocks have (in both towers of a CLIP);
- *LoRA*: it loads with LoRA, by a family or by the generic one, which finds projections and convolutions by their type;
- *shown*: a forward pass on shapes has shown that every place is called (else the first real batch shows it).

timm is counted by pretrained tags (each architecture is built once), open_clip by pairs of architecture and tag, diffusers by its
transformer and UNet classes, transformers by the model types that its image and audio classes take.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # configurations come with the libraries; nothing is asked for

import torch

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

Case = tuple[str, int, Callable[[], Any]]  # name, how many tags it stands for, what loads it with LoRA


def timm_cases() -> Iterator[Case]:
    """Architectures that have pretrained weights, each with the number of its tags."""
    import timm

    import zoo

    timm.layers.weight_init._trunc_normal_ = lambda tensor, *_: tensor  # slow on the meta device, where it does nothing
    counts = Counter(tag.split(".")[0] for tag in timm.list_pretrained())
    for name, count in counts.items():
        yield name, count, lambda name=name: zoo.load(f"timm:{name}", "lora", device="meta")


def open_clip_cases() -> Iterator[Case]:
    """Pairs of architecture and tag."""
    import open_clip

    import zoo

    counts = Counter(name for name, _ in open_clip.list_pretrained())
    for name, count in counts.items():
        yield name, count, lambda name=name: zoo.load(f"open_clip:{name}", "lora", device="meta")


def diffusers_cases() -> Iterator[Case]:
    """The library's transformers that have public names, and its UNets, as their own defaults build them."""
    import diffusers
    from diffusers.models import transformers as room

    import zoo

    classes = {n: c for n, c in vars(room).items() if isinstance(c, type) and issubclass(c, diffusers.ModelMixin)}
    names = sorted(n for n in classes if hasattr(diffusers, n))
    for name in (*names, "UNet2DConditionModel", "UNet2DModel", "UNet3DConditionModel"):
        yield name, 1, lambda name=name: loaded_class(zoo, name)


# Of classes whose defaults do not make a network: what a repository's configuration says at least
SETTINGS: dict[str, dict[str, Any]] = {
    "DreamLiteTransformer2DModel": {"in_channels": 32},
    "EasyAnimateTransformer3DModel": {"in_channels": 16, "out_channels": 16, "patch_size": 2},
    "HunyuanDiT2DModel": {"in_channels": 4, "patch_size": 2, "sample_size": 128, "hidden_size": 1408},
    "LuminaNextDiT2DModel": {"num_kv_heads": 8},
    "TransformerTemporalModel": {"in_channels": 32},
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2,
        "caption_channels": [4096, 4096],
        "llama_layers": list(range(32)),
    },
    "LatteTransformer3DModel": {
        "in_channels": 4,
        "out_channels": 8,
        "patch_size": 2,
        "caption_channels": 4096,
        "attention_head_dim": 72,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "cross_attention_dim": 1152,
        "activation_fn": "gelu-approximate",
    },
    "OmniGenTransformer2DModel": {
        "rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}
    },
    "Transformer2DModel": {"in_channels": 32},
}


def loaded_class(zoo: Any, name: str) -> Any:
    """A class of diffusers with its default settings, from a configuration file as a repository has it."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        settings = {"_class_name": name, **SETTINGS.get(name, {})}
        (Path(folder) / "config.json").write_text(json.dumps(settings))
        return zoo.load(f"diffusers:{folder}", "lora", device="meta")


def transformers_cases() -> Iterator[Case]:
    """Model types of the library's image and audio classes."""
    import transformers

    import zoo

    mappings = (
        *("IMAGE", "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION", "AUDIO_CLASSIFICATION", "SPEECH_SEQ_2_SEQ"),
        *("CTC", "ZERO_SHOT_IMAGE_CLASSIFICATION", "DEPTH_ESTIMATION", "MASKED_IMAGE_MODELING"),
    )
    types: set[str] = set()
    for mapping in mappings:
        auto = getattr(transformers.models.auto.modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {})
        types |= set(auto)
    for name in sorted(types):
        yield name, 1, lambda name=name: loaded_type(zoo, name)


def loaded_type(zoo: Any, name: str) -> Any:
    """A model type of transformers with its default settings."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({"model_type": name}))
        return zoo.load(f"transformers:{folder}", "lora", device="meta")


LIBRARIES: dict[str, Callable[[], Iterator[Case]]] = {
    "timm": timm_cases,
    "open_clip": open_clip_cases,
    "diffusers": diffusers_cases,
    "transformers": transformers_cases,
}


def tried(case: Case) -> dict[str, Any]:
    """One network: the family that took it, its kinds of points, or why it does not load."""
    name, tags, load = case
    start = time.perf_counter()
    try:
        model = load()
    except Exception as error:  # the sweep reports whatever there is
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
        return {"name": name, "tags": tags, "family": None, "reason": reason}
    family = model.family
    return {
        "name": name,
        "tags": tags,
        "family": family.family,
        "kinds": list(model.points.kinds),
        "lora": model.num_parameters(trainable=True, head=False),
        "shown": bool(getattr(family, "proven", True)),
        "refused": len(model.points.refused),
        "seconds": round(time.perf_counter() - start, 2),
        **({"whole": False} if getattr(getattr(family, "looked", None), "passes", None) else {}),
    }


def sweep(library: str, only: str = "*", before: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Every network of a library.

    Args:
        before: rows of an earlier sweep, that stay where the same family takes the name.
    """
    from zoo import registry

    known = {row["name"]: row for row in before or []}
    rows = []
    for case in LIBRARIES[library]():
        if not fnmatch.fnmatch(case[0], only):
            continue
        row = known.get(case[0])
        if row is not None and library in ("timm", "open_clip") and row["family"] is not None:
            taken = registry.find_backbone(f"{library}:{case[0]}")[0].family
            if taken == row["family"]:
                rows.append({**row, "tags": case[1]})
                continue
        rows.append(tried(case))
        row = rows[-1]
        print(f"{library} {row['name']}: {row['family'] or row['reason']}", flush=True)
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Counts by tags."""
    total = sum(r["tags"] for r in rows)
    described = sum(r["tags"] for r in rows if r["family"] not in (None, "generic") and r.get("whole", True))
    loads = sum(r["tags"] for r in rows if r["family"] is not None)
    shown = sum(r["tags"] for r in rows if r.get("shown"))
    return {"total": total, "described": described, "lora": loads, "shown": shown}


def as_markdown(results: dict[str, Any]) -> str:
    """The table of the documentation, and every network that does not load with its reason."""
    lines = [
        "| library | counted | described by a family | LoRA | shown by a pass |",
        "| --- | --- | --- | --- | --- |",
    ]
    for library, part in results["libraries"].items():
        s = summary(part)
        share = [f"{s[k]} ({100 * s[k] / s['total']:.0f} %)" for k in ("described", "lora", "shown")]
        lines.append(f"| {library} {results['versions'][library]} | {s['total']} | " + " | ".join(share) + " |")
    lines += ["", "| library | family | networks | tags |", "| --- | --- | --- | --- |"]
    for library, part in results["libraries"].items():
        for family, count in Counter(r["family"] for r in part if r["family"]).most_common():
            tags = sum(r["tags"] for r in part if r["family"] == family)
            lines.append(f"| {library} | `{family}` | {count} | {tags} |")
    failed = [(library, r) for library, part in results["libraries"].items() for r in part if r["family"] is None]
    if failed:
        lines += ["", "What does not load:", ""]
        lines += [f"- {library} `{r['name']}`: {r['reason']}" for library, r in failed]
    return "\n".join(lines) + "\n"


def main() -> None:
    """See the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=list(LIBRARIES), action="append")
    parser.add_argument(
        "--again", action="store_true", help="keep rows of the results where the same family takes the name"
    )
    parser.add_argument("--only", default="*", help="a glob of names; nothing is written")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    torch.manual_seed(0)
    file = RESULTS / "reach.json"
    results = json.loads(file.read_text()) if file.is_file() else {"versions": {}, "libraries": {}}
    for library in options.library or list(LIBRARIES):
        before = results["libraries"].get(library) if options.again else None
        rows = sweep(library, options.only, before)
        results["libraries"][library] = rows
        results["versions"][library] = __import__(library).__version__
        print(library, summary(rows) if rows else "nothing")
    if options.only == "*":
        file.write_text(json.dumps(results, indent=1) + "\n")
        (RESULTS / "reach.md").write_text(as_markdown(results))


if __name__ == "__main__":
    main()
