"""LoRA adapters in peft's format, out and in: `adapter_config.json` and `adapter_model.safetensors` as peft writes them.

peft wraps whole modules of the library and knows no slices. So, for a fused q/k/v of width d_out = 3 d:

    out:  the slices' own pairs (A_q, B_q), (A_k, B_k), ... become one pair of rank r_q + r_k + ...
              A = [A_q; A_k; A_v]   (R, d_in)        B = diag(B_q, B_k, B_v)   (d_out, R)
          and alpha is adapted, so that the scale stays what it was. A slice without an adapter gets rows of zeros in B.
    in:   each slice gets a copy of A and its own rows of B, which gives the same function; the copies are trained apart.

DoRA works on rows of the weight, so it splits and joins in the same way. What peft trained beside A and B comes in as methods
of its own (`peft_extras`: biases, normalisations), and starts that change the frozen weight as plain LoRA (`peft_starts`).
The head goes along as `modules_to_save`. The same module of the library, with the same weights, is to be loaded on the other
side; peft does not check that, but a folder that was written here also carries the fingerprint of the weights, which is
checked when it comes back.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from safetensors.torch import save as dump_safetensors
from torch import Tensor, nn

from zoo.adapters.lora import LoRA
from zoo.adapters.parts.low_rank import LowRank
from zoo.arguments import MODEL, PATH, typed
from zoo.disk.layout import CONFIG, WEIGHTS, to_json
from zoo.engine.sharded import refuse
from zoo.errors import ConfigError, MismatchError, SaveError, UnknownNameError, nearest
from zoo.exchange.peft_extras import extras
from zoo.exchange.peft_head import fits
from zoo.exchange.peft_reader import NOTE, PREFIX, PeftAdapter, read_peft
from zoo.exchange.peft_translate import translate
from zoo.points import LinearPoint

if TYPE_CHECKING:
    from zoo.model import Model

# -- out --------------------------------------------------------------------------------------------------------------


@typed(model=MODEL, folder=PATH)
def to_peft(model: Model, folder: str | Path, adapter: str | None = None) -> Path:
    """Write a LoRA adapter and the head so that peft loads them on the same backbone, with the same outputs.

        peft.PeftModel.from_pretrained(timm.create_model("vit_base_patch16_224", num_classes=100), folder)

    Args:
        folder: made if need be; must not hold an adapter in our own format.
        adapter: which one; by default the active one.

    Raises:
        ConfigError: the adapter is not a LoRA, several are active, or the folder is in use.
        MismatchError: a point or head that peft's format cannot name. SaveError: writing failed; old files stay whole.
    """
    refuse(
        model,
        ConfigError,
        "peft's format is not written here",
        "Save the adapter, and convert it in one process that loads it.",
    )
    folder = Path(PATH.of("folder", folder))
    name = choose(model, adapter)
    lora: LoRA = model.adapters[name]  # type: ignore[assignment]
    _check_folder(folder)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, points in by_module(lora.selected(model.points)).items():
        module = model.backbone.get_submodule(path)
        if not isinstance(module, nn.Linear):
            raise MismatchError(
                f"'{points[0].name}' is a {type(module).__name__}; it can be written in peft's format only where the library "
                "has an nn.Linear. Save this adapter with model.save_adapter."
            )
        # transformers' own load_adapter finds lengths by this name alone; peft by it and by its own, without `.weight`
        members = [(p, lora.module_at(p)) for p in points]
        scale = write_module(tensors, path, module, members, "lora_magnitude_vector.weight")
        ranks[path] = len(tensors[f"{PREFIX}{path}.lora_A.weight"])
        alphas[path] = scale * ranks[path]
    own_head = name if name in model.heads else "default"
    head, head_path = model.heads[own_head], model.family.head_path()
    if not isinstance(head, nn.Identity):
        if head_path is None or not fits(model, head):
            raise MismatchError(
                f"The head of '{name}' ({type(head).__name__}) is not of the library's kind on the backbone's own features, so "
                "the library's module has no place for it. Save this adapter with model.save_adapter."
            )
        tensors.update({f"{PREFIX}{head_path}.{key}": value for key, value in head.state_dict().items()})
    modules = [path for path, _ in model.backbone.named_modules()]
    config = _config(model, lora, ranks, alphas, modules, None if isinstance(head, nn.Identity) else head_path)
    note = {
        "backbone": {"name": model.backbone_name, "fingerprint": model.fingerprint, "kwargs": model.backbone_kwargs},
        "config": {**lora.config(), "learn_scale": False},
        "classes": None if isinstance(head, nn.Identity) else model.classes_of(own_head),
    }
    plain = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    metadata = {"format": "pt", NOTE: json.dumps({**note, CONFIG: config})}
    _replace(folder, dump_safetensors(plain, metadata), to_json(config, "the config").encode())
    if model.quantised:
        warnings.warn(
            f"This adapter stands beside weights that are rounded to {model.quantised}. Loaded with peft onto the backbone in "
            "floating point, its outputs differ by that rounding: quantise the backbone in the same way.",
            stacklevel=2,
        )
    return folder


def _replace(folder: Path, weights: bytes, config: bytes) -> None:
    """Write both files so that no reader joins those of two saves, whenever this one is killed.

    peft's format is two files that do not know each other. So a config that is going to change goes first: without one peft
    refuses the folder, and `from_peft` takes the copy in the weights file.
    """
    from zoo.disk import alone, write_file

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder):
            if (folder / CONFIG).exists() and (folder / CONFIG).read_bytes() != config:
                (folder / CONFIG).unlink()
            write_file(folder / WEIGHTS, weights)
            write_file(folder / CONFIG, config)
    except OSError as error:
        raise SaveError(
            f"Could not save to '{folder}': {error.strerror or error}. Choose a folder that you may write to, and save again."
        ) from error


def choose(model: Model, wanted: str | None) -> str:
    """The name of the LoRA that is meant: the wanted or the only active one."""
    names = list(model.active) if wanted is None else [wanted]
    if wanted is not None and wanted not in model.adapters:
        raise UnknownNameError(f"The model has no adapter '{wanted}'. {nearest(wanted, model.adapters.keys())}")
    if len(names) != 1:
        what = "none is active" if not names else f"active are {', '.join(names)}"
        raise ConfigError(f"The format holds one adapter, and {what}. Name one with adapter=...")
    method = model.adapters[names[0]]
    if type(method) is not LoRA:
        raise ConfigError(
            f"'{names[0]}' is a {type(method).__name__}; only 'lora' can be written in this format. Save it with "
            "model.save_adapter."
        )
    return names[0]


def _check_folder(folder: Path) -> None:
    try:
        present = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        return
    if isinstance(present, dict) and "format_version" in present:
        raise ConfigError(
            f"'{folder}' holds an adapter in our own format, whose files have the same names. Choose another folder."
        )


def by_module(points: Iterable[LinearPoint]) -> dict[str, list[LinearPoint]]:
    """Points by the module that they are (slices of), slices in order of their rows."""
    found: dict[str, list[LinearPoint]] = {}
    for point in points:
        found.setdefault(point.path, []).append(point)
    return {path: sorted(members, key=lambda p: p.start) for path, members in found.items()}


def write_module(
    tensors: dict[str, Tensor],
    path: str,
    module: nn.Linear,
    members: list[tuple[LinearPoint, Any]],
    lengths: str = "lora_magnitude_vector",
) -> float:
    """Add A (R, in), B (out, R) and, for DoRA, the magnitudes (out,) of one module to `tensors`; returns its scale.

    `lengths`: what the magnitudes are called in the file.
    """
    scale = max((float(part.scale) for _, part in members), key=abs)
    a = torch.cat([part.lora_a.detach() for _, part in members])
    b = a.new_zeros(module.out_features, len(a))
    column = 0
    for point, part in members:
        rank = len(part.lora_a)
        ratio = part.scale / scale if scale else 0.0
        b[point.start : point.stop, column : column + rank] = _b(part) * ratio
        column += rank
    tensors[f"{PREFIX}{path}.lora_A.weight"], tensors[f"{PREFIX}{path}.lora_B.weight"] = a, b
    if hasattr(members[0][1], "magnitude"):
        magnitude = module.weight.detach().norm(dim=1)  # rows without an adapter keep their length
        for point, part in members:
            magnitude[point.start : point.stop] = part.magnitude.detach()
        tensors[f"{PREFIX}{path}.{lengths}"] = magnitude
    return scale


def _b(part: Any) -> Tensor:
    """B of one point, times its learned scale, which the format has no place for."""
    return (part.scaled_b() if isinstance(part, LowRank) else part.lora_b).detach()  # type: ignore[no-any-return]


def _config(
    model: Model,
    lora: LoRA,
    ranks: dict[str, int],
    alphas: dict[str, float],
    modules: list[str],
    head_path: str | None,
) -> dict[str, Any]:
    """peft's `adapter_config.json`; fields that are left out have their defaults there."""
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    uniform = len(set(ranks.values())) == len(set(alphas.values())) == 1
    # With one rank and alpha the flag can be kept; peft warns of it beside patterns, so there the scale holds it alone.
    rslora = lora.rslora and uniform
    return {
        "peft_type": "LORA",
        "auto_mapping": {
            "base_model_class": type(model.backbone).__name__,
            "parent_library": type(model.backbone).__module__,
        },
        "base_model_name_or_path": None,  # as peft leaves it for timm; it would look a name up on the Hub
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _whole(alpha / math.sqrt(rank) if rslora else alpha),
        "rank_pattern": _patterns(ranks, rank),
        "alpha_pattern": {key: _whole(value) for key, value in _patterns(alphas, alpha).items()},
        "use_rslora": rslora,
        "use_dora": lora.dora,
        "lora_dropout": lora.dropout,
        "target_modules": _suffixes(ranks, [*modules, *([head_path] if head_path else [])]),
        "modules_to_save": [head_path] if head_path else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _whole(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Regular expressions, as peft reads them, for the modules whose value is not the default."""
    found: dict[str, Any] = {}
    for value in dict.fromkeys(v for v in values.values() if v != default):
        short = _suffixes([path for path, v in values.items() if v == value], list(values))
        for key in [short] if isinstance(short, str) else [re.escape(s) for s in short]:
            found[key] = value
    return found


def _suffixes(wanted: Iterable[str], modules: list[str]) -> list[str] | str:
    """The shortest ends of module paths that match exactly the wanted ones; one regular expression if no ends can."""
    rest = list(wanted)
    whole = set(rest)
    found: list[str] = []
    while rest:
        parts = rest[0].split(".")
        for count in range(1, len(parts) + 1):
            end = ".".join(parts[-count:])
            hits = {m for m in modules if m == end or m.endswith("." + end)}
            if hits <= whole:
                break
        else:
            return "|".join(re.escape(path) for path in sorted(whole))
        found.append(end)
        rest = [path for path in rest if path not in hits]
    return found


# -- in ---------------------------------------------------------------------------------------------------------------


@overload
def from_peft(
    folder: str | Path,
    backbone: str | None = None,
    *,
    model: None = None,
    name: str | None = None,
    trust_backbone: bool | str = False,
    **options: Any,
) -> Model: ...


@overload
def from_peft(folder: str | Path, *, model: Model, name: str | None = None) -> str: ...


def from_peft(
    folder: str | Path,
    backbone: str | None = None,
    *,
    model: Model | None = None,
    name: str | None = None,
    trust_backbone: bool | str = False,
    **options: Any,
) -> Model | str:
    """Read a LoRA adapter that peft saved; all or nothing.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        backbone: build this backbone (as `zoo.load` does, with `options`) and return the model; may be left out if the
            folder was written by `to_peft`.
        model: attach to this model instead, and return the adapter's name there.
        name: of the adapter; by default "lora". Biases and normalisations that were trained too become adapters beside it.
        trust_backbone: as of `zoo.load`, where the folder names the backbone.

    Raises:
        TrustError: the folder names a backbone of an unknown source.
        ConfigError: a setting of peft that has no equal here (named, with the reason).
        MismatchError: the adapter belongs to another backbone, width, depth or set of weights.
        WeightsError: the weights are damaged, a pickle, or not finite.
    """
    from zoo.loading import load, of_file

    saved = read_peft(Path(folder))
    if model is not None:
        if backbone is not None or options:
            raise ConfigError("Give from_peft a backbone (with options) to build, or a model that is there; not both.")
        return attach_saved(model, saved, name)
    if backbone is None:
        if not saved.backbone_name:
            raise ConfigError(
                f"'{folder}' does not say which backbone it is for. Name it: from_peft(folder, 'vit-b16'), or "
                "from_peft(folder, model=model)."
            )
        backbone = saved.backbone_name
        options = of_file(backbone, saved.backbone_kwargs, saved.folder, trust_backbone, options)
    built = load(backbone, **options)
    attach_saved(built, saved, name)
    return built


def attach_saved(model: Model, saved: PeftAdapter, name: str | None) -> str:
    """Attach what was read, all or nothing, and return its name in the model."""
    if saved.fingerprint and model.fingerprint and saved.fingerprint != model.fingerprint:
        raise MismatchError(
            f"The adapter in '{saved.folder}' was trained on other weights: their fingerprint is {saved.fingerprint}, this "
            f"model's is {model.fingerprint}. Load the weights that it was trained on ('{saved.backbone_name}')."
        )
    lora, parts, head = translate(saved, model)
    lora.of_values = True
    beside = extras(saved, model)
    shared = bool(model.adapters)  # then the head belongs to the new adapter alone
    before = set(model.adapters)
    with model.all_or_nothing():
        model.add_adapter(lora, name, num_classes=head.num_classes if head and shared else None)
        added = next(n for n in model.adapters if n not in before)
        for point, values in parts.items():
            model.adapters[added].get_submodule(point).load_state_dict(values)
        for method, state in beside:
            known = set(model.adapters)
            model.add_adapter(method)
            model.adapters[next(n for n in model.adapters if n not in known)].load_state_dict(state)
        if head:
            if not shared:  # a new one: the old one is put back if anything fails
                model.heads["default"] = model._new_head(head.num_classes, model.family.feature_dim)
            model.head.load_state_dict(head.state)
            model.take_names(saved.classes)
            model.train(model.training)
    return added
