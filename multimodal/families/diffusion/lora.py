"""LoRA in the format of diffusers, out and in: `pytorch_lora_weights.safetensors` with keys `transformer.<module>.lora_A.weight`.

    pipeline.load_lora_weights(folder)                  or          transformer.load_lora_adapter(folder, prefix="transformer")

That format has no settings: the change of a module's weight is B A, of the rank that A has. So the scale is folded into B, and
all modules are brought to one rank with rows of zeros, since releases of diffusers differ in the scale that they give to
modules of another rank. Coming in, files with settings (`lora_adapter_metadata`) and with `alpha` tensors are read, too, and
those of kohya's scripts and others (`multimodal.families.diffusion.kohya`), whose names the library or the transformer knows.
DiT and PixArt have no `load_lora_adapter` in the library; `zoo.exchange.peft.to_peft` writes what `peft.PeftModel` loads on them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import save as dump_safetensors
from torch import Tensor, nn

from multimodal.families.diffusion.kohya import is_foreign, other_part, to_diffusers
from zoo.disk.layout import parse
from zoo.errors import ConfigError, MismatchError, WeightsError
from zoo.exchange.peft import NOTE, PREFIX, attach_saved, by_module, choose, write_module
from zoo.exchange.peft_reader import PeftAdapter, PeftModule

if TYPE_CHECKING:
    from zoo.adapters.lora import LoRA
    from zoo.model import Model

FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
_KINDS = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "magnitude", "alpha": "alpha"}


def save_lora_weights(
    model: Model, folder: str | Path, adapter: str | None = None, prefix: str = "transformer"
) -> Path:
    """Write a LoRA adapter so that diffusers loads it on the same transformer, with the same outputs.

    Args:
        folder: made if need be. adapter: which one; by default the active one. prefix: the part of a pipeline that it is for.

    Returns:
        The file.

    Raises:
        ConfigError: the adapter is not a LoRA, or several are active, or the library loads none into this transformer.
        MismatchError: a point that is no nn.Linear of the library.
    """
    from zoo.disk import write_file

    if not hasattr(type(model.backbone), "load_lora_adapter"):
        raise ConfigError(
            f"diffusers loads no LoRA into a {type(model.backbone).__name__}. Write it with zoo.exchange.peft.to_peft(model, "
            "folder), load it with peft.PeftModel.from_pretrained; or put the merged transformer into a pipeline (model.merge())."
        )
    lora: LoRA = model.adapters[choose(model, adapter)]  # type: ignore[assignment]
    groups = by_module(lora.selected(model.points))
    found: dict[str, Tensor] = {}
    for path, points in groups.items():
        module = model.backbone.get_submodule(path)
        if not isinstance(module, nn.Linear):
            raise MismatchError(
                f"'{points[0].name}' is a {type(module).__name__}; a LoRA can be written in the format of diffusers only where "
                "the library has an nn.Linear. Leave it out of the targets, or save with model.save_adapter."
            )
        scale = write_module(found, path, module, [(p, lora.module_at(p)) for p in points])
        found[f"{PREFIX}{path}.lora_B.weight"] *= scale
    rank = max(len(value) for key, value in found.items() if key.endswith("lora_A.weight"))
    tensors: dict[str, Tensor] = {}
    for key, value in found.items():
        if key.endswith("lora_A.weight"):
            value = F.pad(value, (0, 0, 0, rank - len(value)))
        elif key.endswith("lora_B.weight"):
            value = F.pad(value, (0, rank - value.shape[1]))
        tensors[f"{prefix}.{key.removeprefix(PREFIX)}"] = value.detach().cpu().clone().contiguous()
    note = {
        "backbone": {"name": model.backbone_name, "fingerprint": model.fingerprint, "kwargs": model.backbone_kwargs}
    }
    file = Path(folder) / FILE
    write_file(file, dump_safetensors(tensors, {"format": "pt", NOTE: json.dumps(note)}))
    return file


def load_lora_weights(
    model: Model,
    source: str | Path,
    name: str | None = None,
    prefix: str = "transformer",
    file: str = FILE,
    leave_out: bool = False,
) -> str:
    """Attach a LoRA of diffusers' format or kohya's, and return its name in the model; all or nothing.

    Args:
        source: a safetensors file, a folder with `file`, or a Hub repository.
        prefix: the part of a pipeline that it is for.
        leave_out: take what is for this part alone, where the file also adapts others (text encoders): without them the
            images are not those that the file was trained for. By default such a file is refused.

    Raises:
        ConfigError: no such source, or LoRAs of other parts. MismatchError: it does not fit this transformer.
        WeightsError: damaged weights, or keys that are no LoRA.
    """
    path = _find(source, file)
    tensors, metadata = parse(path.read_bytes(), path)
    broken = [
        key for key, value in tensors.items() if value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
    if broken:
        raise WeightsError(f"'{path.name}': tensor '{broken[0]}' is not a tensor of finite numbers. Get another copy.")
    others = sorted({part for key in tensors if (part := other_part(key))})
    if others and not leave_out:
        raise ConfigError(
            f"'{path.name}' also adapts {', '.join(others)}; only its '{prefix}' can be attached here. Pass leave_out=True to "
            "take that alone (the images are then not quite those that it was trained for), or load it with diffusers."
        )
    tensors = {key: value for key, value in tensors.items() if not other_part(key)}
    if not tensors:
        raise ConfigError(
            f"'{path.name}' adapts {', '.join(others) or 'nothing'}, and no '{prefix}'. Load it with diffusers."
        )
    if is_foreign(tensors):
        tensors = to_diffusers(model, tensors, path, prefix)
    saved = PeftAdapter(path, {"lora_dropout": 0.0}, {}, note=_json(metadata.get(NOTE)))
    foreign = sorted({k.split(".")[0] for k in tensors} - {prefix})
    bare = prefix not in {k.split(".")[0] for k in tensors}
    if foreign and not bare:
        raise ConfigError(
            f"'{path.name}' also adapts {', '.join(foreign)}; only its '{prefix}' can be attached here. Load it with diffusers."
        )
    for key, tensor in tensors.items():
        module, kind = _sort(key if bare else key.removeprefix(f"{prefix}."), path)
        entry = saved.modules.setdefault(module, PeftModule(alpha=-1.0))
        setattr(entry, kind, float(tensor) if kind == "alpha" else tensor)
    if not saved.modules or any(m.a is None or m.b is None for m in saved.modules.values()):
        raise WeightsError(f"'{path.name}' lacks lora_A or lora_B of a module. Get another copy.")
    settings = {k.removeprefix(f"{prefix}."): v for k, v in _json(metadata.get(METADATA)).items()}
    saved.settings |= {"use_rslora": bool(settings.get("use_rslora")), "use_dora": False}
    saved.settings["use_dora"] = any(m.magnitude is not None for m in saved.modules.values())
    for module, entry in saved.modules.items():
        if entry.alpha < 0:  # without settings it is the rank
            alphas = settings.get("alpha_pattern") or {}
            own = next((v for k, v in alphas.items() if module == k.lstrip("^") or module.endswith(f".{k}")), None)
            entry.alpha = float(settings.get("lora_alpha", entry.rank) if own is None else own)
    return attach_saved(model, saved, name)


def _sort(key: str, path: Path) -> tuple[str, str]:
    """ "blocks.0.to_q.lora_A.weight" -> ("blocks.0.to_q", "a")."""
    for ending, kind in _KINDS.items():
        if key.endswith(f".{ending}"):
            return key[: -len(ending) - 1], kind
    raise WeightsError(
        f"'{path.name}' has the key '{key}', which is no LoRA in the format of diffusers ('<module>.lora_A.weight') or of "
        "kohya's scripts. Load it once with pipeline.load_lora_weights, which knows further formats, and save it with "
        "save_lora_adapter."
    )


def _json(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _find(source: str | Path, file: str) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / file).is_file():
            raise ConfigError(f"'{path}' has no '{file}'. Name the file of the LoRA.")
        return path / file
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(str(source), file))
    except Exception as error:
        raise ConfigError(f"There is no file, folder or repository '{source}' with '{file}': {error}") from error
