"""Reading what peft saved, and checking its settings and tensors. See `zoo.exchange.peft`."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.disk.layout import CONFIG, FLOATS, WEIGHTS, parse
from zoo.disk.saved import read_config_file, read_weights_file
from zoo.errors import ConfigError, WeightsError
from zoo.exchange.patterns import safe_pattern

_LOG = logging.getLogger("zoo")
PREFIX = "base_model.model."
NOTE = "zoo"  # of the weights file's metadata: what peft's config has no place for

# Settings of peft's LoRA that change the function, and why they have no equal here.
_REFUSED = {
    "lora_bias": "it trains a bias beside B",
    "layer_replication": "it changes the depth of the backbone",
    "target_parameters": "it targets bare parameters, which are no points",
    "trainable_token_indices": "it trains rows of an embedding",
    "arrow_config": "it routes between several adapters",
    "monteclora_config": "it samples its weights",
    "kasa_config": "it has a diagonal between A and B",
    "alora_invocation_tokens": "it acts on some tokens only",
    "loftq_config": "its backbone is a quantised one, changed together with the adapter",
}
_KNOWN_FLAGS = ("use_rslora", "use_dora")
# Values of init_lora_weights that leave the frozen weights as they are; "pissa" and "olora" change them (`peft_starts`)
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "pissa", "olora")
_BIASES = ("none", "all", "lora_only")
_MANY = 4096  # entries of a table of patterns


@dataclass
class PeftModule:
    """The tensors of one wrapped module, and its settings."""

    a: Tensor | None = None  # (R, in); of a convolution (R, channels * its size)
    b: Tensor | None = None  # (out, R)
    magnitude: Tensor | None = None  # (out,)
    alpha: float = 0.0

    @property
    def rank(self) -> int:
        """R."""
        assert self.a is not None
        return len(self.a)


@dataclass
class PeftAdapter:
    """A folder that peft (or `to_peft`) wrote, read and checked; module paths are those of the library."""

    folder: Path
    settings: dict[str, Any]
    modules: dict[str, PeftModule]
    whole: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # modules_to_save: path -> state
    biases: dict[str, Tensor] = field(default_factory=dict)  # biases of the backbone that were trained: path -> (out,)
    note: dict[str, Any] = field(default_factory=dict)

    @property
    def backbone_name(self) -> str:
        """As `to_peft` recorded it; "" if peft wrote the folder."""
        return str(self.note.get("backbone", {}).get("name", ""))

    @property
    def backbone_kwargs(self) -> dict[str, Any]:
        """Options with which the backbone was built."""
        return dict(self.note.get("backbone", {}).get("kwargs", {}))

    @property
    def fingerprint(self) -> str | None:
        """Of the backbone's weights, if known."""
        return self.note.get("backbone", {}).get("fingerprint")

    @property
    def classes(self) -> list[str] | None:
        """Names of the head's classes, if known."""
        return self.note.get("classes")

    def scale(self, module: PeftModule) -> float:
        """By which B A is multiplied in the forward pass."""
        return module.alpha / (module.rank**0.5 if self.settings.get("use_rslora") else module.rank)


def read_peft(folder: Path) -> PeftAdapter:
    """Read and check a folder; nothing is unpickled.

    Raises:
        ConfigError: no such folder, our own format, or settings without an equal here. WeightsError: damaged weights.
    """
    if not folder.is_dir():
        raise ConfigError(f"There is no folder '{folder}'. Name one that holds peft's {CONFIG} and {WEIGHTS}.")
    path = folder / WEIGHTS
    if os.path.lexists(folder / CONFIG):
        config = read_config_file(folder)
        _check_format(config, folder)
        tensors, metadata = parse(read_weights_file(folder), path)
    else:
        tensors, metadata = parse(read_weights_file(folder), path)
        config = _note(metadata).get(CONFIG, {})
        if not isinstance(config, dict) or not config:
            raise ConfigError(
                f"'{folder}' has no {CONFIG}, so it is not a saved adapter. Name a folder that holds one."
            )
        _LOG.warning("The last save to '%s' was cut off; using the complete copy in %s.", folder, WEIGHTS)
        _check_format(config, folder)
    for key, tensor in tensors.items():
        if tensor.dtype not in FLOATS or not bool(torch.isfinite(tensor).all()):
            raise WeightsError(
                f"'{path}': tensor '{key}' is not a tensor of finite numbers. Get another copy of the folder."
            )
    saved = PeftAdapter(folder, config, {}, note=_note(metadata))
    for key, tensor in tensors.items():
        _sort(saved, key, tensor, path)
    if config.get("bias", "none") == "all":  # then a bias without its weight was not saved whole, but trained alone
        alone = [name for name, state in saved.whole.items() if set(state) == {"bias"}]
        saved.biases |= {name: saved.whole.pop(name)["bias"] for name in alone}
        # of a module that was trained whole, peft saves the bias of the one that it stands for, too
        saved.biases = {name: value for name, value in saved.biases.items() if not name.endswith(".original_module")}
    for name, module in saved.modules.items():
        _check_module(saved, name, module, path)
    if not saved.modules:
        raise WeightsError(f"'{path}' holds no LoRA tensors ('{PREFIX}<module>.lora_A.weight'). Get another copy.")
    return saved


def _check_format(config: dict[str, Any], folder: Path) -> None:
    if "format_version" in config and "peft_type" not in config:
        raise ConfigError(f"'{folder}' holds an adapter in our own format: zoo.load(adapter={str(folder)!r}) reads it.")
    _check_settings(config, folder / CONFIG)


def _note(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        note = json.loads(metadata.get(NOTE, "{}"))
    except ValueError:
        return {}
    backbone = note.get("backbone", {}) if isinstance(note, dict) else None
    whole = isinstance(backbone, dict) and isinstance(backbone.get("kwargs", {}), dict)
    return note if whole else {}


def _check_settings(config: dict[str, Any], path: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"'{path}' has peft_type {kind!r}; only LORA can be imported.")
    for key, reason in _REFUSED.items():
        if config.get(key):
            raise ConfigError(f"'{path}' sets {key}: {reason}, which LoRA here does not do. It cannot be imported.")
    for key, value in config.items():
        if key.startswith("use_") and value and key not in _KNOWN_FLAGS:
            raise ConfigError(f"'{path}' sets {key}, a variant of LoRA that is not known here. It cannot be imported.")
    if config.get("bias", "none") not in _BIASES:
        raise ConfigError(f"'{path}' has bias={config['bias']!r}; expected one of {', '.join(_BIASES)}.")
    start = config.get("init_lora_weights", True)
    if isinstance(start, (dict, list)) or start not in _STARTS:
        why = (
            "drew random numbers that are not saved" if "niter" in str(start) else "also changed the backbone's weights"
        )
        raise ConfigError(
            f"'{path}' has init_lora_weights={start!r}, which {why}. Save it in peft with "
            "path_initial_model_for_weight_conversion, which turns it into a plain LoRA."
        )
    checks: tuple[tuple[str, Any, Callable[[Any], bool], str], ...] = (
        ("r", 8, lambda v: type(v) is int and v >= 1, "a whole number from 1"),
        ("lora_alpha", 8, _number, "a number"),
        ("lora_dropout", 0.0, lambda v: _number(v) and 0 <= v < 1, "a number from 0 to below 1"),
        (
            "rank_pattern",
            {},
            lambda v: isinstance(v, dict) and len(v) <= _MANY and all(type(n) is int for n in v.values()),
            f"at most {_MANY:,} names and ranks",
        ),
        (
            "alpha_pattern",
            {},
            lambda v: isinstance(v, dict) and len(v) <= _MANY and all(_number(n) for n in v.values()),
            f"at most {_MANY:,} names and numbers",
        ),
    )
    for key, default, fits, expected in checks:
        value = config.setdefault(key, default)
        value = config[key] = default if value is None else value
        if not fits(value):
            raise ConfigError(f"'{path}': {key} is {value!r}; expected {expected}.")
    if config.get("use_dora") and config["lora_dropout"]:
        raise ConfigError(
            f"'{path}' has use_dora with lora_dropout={config['lora_dropout']}; DoRA here has no dropout. If you do not want "
            "to train it on, set lora_dropout to 0 in the file: the outputs in evaluation are the same."
        )


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _sort(saved: PeftAdapter, key: str, tensor: Tensor, path: Path) -> None:
    """Put one tensor where it belongs: A, B or magnitude of a module, or a module that was trained whole."""
    if key.startswith(PREFIX):
        name = key.removeprefix(PREFIX)
        if match := re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", name):
            setattr(saved.modules.setdefault(match[1], PeftModule()), match[2].lower(), tensor)
            return
        if match := re.fullmatch(r"(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?", name):
            saved.modules.setdefault(match[1], PeftModule()).magnitude = tensor
            return
        if match := re.fullmatch(r"(.+)\.base_layer\.bias", name):
            saved.biases[match[1]] = tensor
            return
        if match := re.fullmatch(r"(.+?)(?:\.modules_to_save(?:\.default)?)?\.(weight|bias)", name):
            saved.whole.setdefault(match[1], {})[match[2]] = tensor
            return
    raise ConfigError(f"'{path}' holds tensor '{key}', which is no part of a plain LoRA. It cannot be imported.")


def _check_module(saved: PeftAdapter, name: str, module: PeftModule, path: Path) -> None:
    a, b, config = module.a, module.b, saved.settings
    if a is not None and b is not None and a.dim() == b.dim() > 2 and b.shape[2:].numel() == 1:  # of a convolution
        a, b = module.a, module.b = a.flatten(1), b.flatten(1)
    if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        shapes = [tuple(t.shape) if t is not None else "none" for t in (a, b)]
        raise WeightsError(
            f"'{path}': A and B of '{name}' have shapes {shapes[0]} and {shapes[1]}; expected (r, in) and (out, r) of an "
            "nn.Linear, or those of a convolution. LoRA on embeddings cannot be imported."
        )
    rank = _pattern(config["rank_pattern"], name, config["r"], saved.folder)
    if rank != len(a):
        raise WeightsError(
            f"'{path}': '{name}' has rank {len(a)}, and {CONFIG} says {rank}. Get another copy of the folder."
        )
    wants = bool(config.get("use_dora"))
    if wants != (module.magnitude is not None) or (module.magnitude is not None and module.magnitude.numel() != len(b)):
        raise WeightsError(
            f"'{path}': '{name}' {'lacks its' if wants else 'has a'} magnitude vector ({CONFIG}: use_dora={wants})."
        )
    module.alpha = float(_pattern(config["alpha_pattern"], name, config["lora_alpha"], saved.folder))


def _pattern(table: Mapping[str, Any], name: str, default: Any, folder: Path) -> Any:
    """peft's rule: the first key that, as a regular expression, matches the end of the name."""
    for key, value in table.items():
        if key == name or safe_pattern(rf"(.*\.)?({key})$", f"'{folder / CONFIG}'").match(name):
            return value
    return default
