"""A user's own checkpoint of a backbone: read as tensors, fitted to the network, or refused by the names of what does not fit.

Files are safetensors, or torch's format read as tensors only (`weights_only=True`); a plain pickle is refused unread. Trainers
wrap what they save ({"state_dict": ...}, "module." in front of each name): both are taken off. What a library does with its own
pretrained weights is done with these, too: renamed parameters, tables of positions for another resolution, other input
channels. Heads that the network does not have are dropped, and that is said; anything else that is missing, unexpected or of
another shape is an error.
"""

from __future__ import annotations

import inspect
import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.backbone import Backbone, OwnWeights
from zoo.disk.layout import parse
from zoo.errors import ConfigError, MismatchError, WeightsError
from zoo.families.timm_names import resampled
from zoo.library import only_tensors

__all__ = ["Bring", "fill", "own_options", "read_checkpoint"]

_LOG = logging.getLogger("zoo")
OVERLAY = ("file", "url", "hf_hub_id", "state_dict")  # places of weights in timm's `pretrained_cfg_overlay`
HEADS = ("head", "fc", "classifier", "score", "classification_head", "head.fc", "heads.head", "head_dist")
INSIDE = (
    "state_dict",
    "model_state_dict",
    "model",
    "state_dict_ema",
    "model_ema",
    "net",
    "network",
    "weights",
    "params",
)
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "network.", "net.", "base_model.", "encoder.", "student.")
PICKLES = (".pkl", ".pickle", ".joblib", ".dill")


@dataclass(frozen=True)
class Bring:
    """What a user says of weights of his own; `path` is None where the library reads them."""

    path: Path | None
    weights: OwnWeights


def own_options(cls: type[Backbone], options: dict[str, Any]) -> Bring | None:
    """Take `checkpoint`, `source` and `licence` out of the options of `zoo.load`; None: the weights are the library's.

    Raises:
        ConfigError: of another type, or words on weights that are not the user's.
    """
    said = {k: options.pop(k) for k in ("source", "licence") if k in options}
    for key, value in said.items():
        if not isinstance(value, str):
            raise ConfigError(f"{key} is {value!r}; expected a text.")
    overlay = options.get("pretrained_cfg_overlay")
    place = {k: v for k, v in overlay.items() if k in OVERLAY and v} if isinstance(overlay, Mapping) else {}
    if place:
        return Bring(None, OwnWeights(str(next(iter(place.values())))[:200].rpartition("/")[2], **said))
    name = "checkpoint" if "checkpoint" in options else "checkpoint_path"
    if options.get(name) is None or "checkpoint" in inspect.signature(cls.configure).parameters:
        if said and options.get(name) is None:
            raise ConfigError(
                f"{next(iter(said))}= is for weights of your own; name them: checkpoint='weights.safetensors'."
            )
        return None
    value = options.pop(name)
    if not isinstance(value, (str, Path)):
        raise ConfigError(f"{name} is {value!r:.80}; expected a file.")
    path = Path(value).expanduser()
    return Bring(path, OwnWeights(path.name, **said))


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU.

    Raises:
        ConfigError: no such file. WeightsError: a pickle, a damaged file, or none of weights.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        names = sorted(p.name for p in file.iterdir() if p.suffix in (".safetensors", ".pth", ".pt", ".bin"))
        raise ConfigError(
            f"checkpoint='{file}' is a folder. Name a file in it: {', '.join(names[:5]) or 'it has no weights'}."
        )
    if not file.is_file():
        raise ConfigError(f"There is no checkpoint '{file}'.")
    if file.suffix.lower() in PICKLES:
        raise WeightsError(
            f"'{file}' is a pickle, which can run any code when it is read, so it was not opened. Save the weights as "
            "safetensors: safetensors.torch.save_file(model.state_dict(), 'model.safetensors')."
        )
    if file.suffix.lower() == ".safetensors":
        return parse(file.read_bytes(), file)[0]
    try:
        with only_tensors():
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what reads pickles has no error of its own for every file that is none
        more = isinstance(error, pickle.UnpicklingError)
        what = "holds more than tensors, so it was not read: it could run any code" if more else "could not be read"
        told = next(iter(str(error).splitlines()), "")[:160]
        raise WeightsError(
            f"'{file}' {what} ({type(error).__name__}: {told}). Where you trust its source, save its weights as safetensors: "
            "safetensors.torch.save_file(state_dict, 'model.safetensors')."
        ) from error
    return _inside(found, file)


def _inside(found: Any, file: Path) -> dict[str, Tensor]:
    """The state dict in what a trainer saved."""
    for _ in range(3):
        if not isinstance(found, Mapping):
            raise WeightsError(
                f"'{file}' holds a {type(found).__name__}; expected the tensors of a network by name (a state_dict)."
            )
        name = next((n for n in INSIDE if isinstance(found.get(n), Mapping)), None)
        if name is None:
            break
        _LOG.info("'%s': taking its '%s'.", file, name)
        found = found[name]
    state = {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
    if not state:
        raise WeightsError(
            f"'{file}' holds no tensors by name; its entries are {', '.join(map(str, list(found)[:5])) or 'none'}."
        )
    return state


def fill(module: nn.Module, state: dict[str, Tensor], file: str | Path) -> bool:
    """Put a checkpoint into a network, whose classifier gets the checkpoint's width; returns whether that has one.

    Raises:
        MismatchError: of another architecture, or with missing, unexpected or odd tensors, named.
    """
    heads = head_paths(module)
    plain = _unprefixed(dict(state), module.state_dict())
    for path in heads:
        own, weight = module.get_submodule(path), plain.get(f"{path}.weight")
        if not isinstance(own, nn.Linear) or weight is None or weight.ndim != 2:
            continue
        if len(weight) != own.out_features and weight.shape[1] == own.in_features:
            made = nn.Linear(own.in_features, len(weight), bias=own.bias is not None)
            parent, _, name = path.rpartition(".")
            module.get_submodule(parent)._modules[name] = made.to(own.weight)
    return fit_checkpoint(module, plain, file, heads)


def head_paths(module: nn.Module) -> tuple[str, ...]:
    """Paths of a network's classifiers, by timm's word or by usual names."""
    if hasattr(module, "get_classifier"):
        own: Any = module.get_classifier()  # type: ignore[operator]
        owns = own if isinstance(own, tuple) else (own,)
        return tuple(
            p for p, m in module.named_modules() if any(m is o for o in owns) and not isinstance(m, nn.Identity)
        )
    paths = dict(module.named_modules())
    return tuple(path for path in HEADS if path in paths)


def fit_checkpoint(module: nn.Module, state: dict[str, Tensor], file: str | Path, heads: tuple[str, ...]) -> bool:
    """Put the tensors into a network; returns whether its classifier came along.

    Args:
        heads: paths of the network's classifier.

    Raises:
        MismatchError: of another architecture, or with missing, unexpected or odd tensors, named. The network is unusable then.
    """
    own = module.state_dict()
    state = resampled(dict(state), module)
    inside = tuple(f"{path}." for path in heads)

    def of_head(name: str) -> bool:
        return name.startswith(inside)

    shared = [k for k in own if k in state]
    body = [k for k in own if not of_head(k)]
    if len([k for k in shared if not of_head(k)]) * 2 < len(body):
        raise MismatchError(
            f"'{file}' is a checkpoint of another architecture than this {type(module).__name__}: it has {len(shared)} of its "
            f"{len(own)} tensors by name. The file has {_some(state)}; the network has {_some(own)}."
        )
    odd = [k for k in shared if state[k].shape != own[k].shape]
    bad = [k for k in odd if not of_head(k)]
    # one tensor under two names (words that are read and written) need not stand twice in a file
    given = {(own[k].data_ptr(), own[k].shape) for k in shared}
    absent = [k for k in body if k not in state and not k.endswith("num_batches_tracked")]
    missing = [k for k in absent if (own[k].data_ptr(), own[k].shape) not in given]
    others = {k.split(".")[0] for k in own}
    unexpected = [k for k in state if k not in own]
    foreign = [k for k in unexpected if k.split(".")[0] in others and not of_head(k)]
    if bad or missing or foreign:
        shapes = [f"{k}: {tuple(state[k].shape)}, here {tuple(own[k].shape)}" for k in bad]
        told = [
            f"{len(bad)} of another shape ({_some(shapes)})" if bad else "",
            f"{len(missing)} missing ({_some(missing)})" if missing else "",
            f"{len(foreign)} unexpected ({_some(foreign)})" if foreign else "",
        ]
        raise MismatchError(
            f"The tensors of '{file}' do not fit this {type(module).__name__}: {', '.join(filter(None, told))}. Nothing is "
            "made up for them: name the options that it was trained with (img_size=, in_chans=, ...), or the right backbone."
        )
    kept = {k: v for k, v in state.items() if k in own and k not in odd}
    module.load_state_dict({**own, **kept})
    dropped = [*odd, *(k for k in unexpected if k not in foreign)]
    if dropped:
        _LOG.warning("'%s': %d tensors of other heads are dropped: %s.", file, len(dropped), _some(dropped))
    mine = [k for k in own if of_head(k)]
    return bool(mine) and all(k in kept for k in mine)


def _unprefixed(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what trainers put in front of all names, where more names fit without it."""
    for _ in range(3):
        best, fit = state, sum(k in own for k in state)
        for prefix in PREFIXES:
            if any(k.startswith(prefix) for k in state):
                cut = {k.removeprefix(prefix): v for k, v in state.items()}
                if sum(k in own for k in cut) > fit:
                    best, fit = cut, sum(k in own for k in cut)
        if best is state:
            return state
        state = best
    return state


def _some(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
