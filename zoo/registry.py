"""Names of backbones and methods. Both register through entry points and are imported only when asked for."""

from __future__ import annotations

import contextlib
import fnmatch
import importlib
import importlib.metadata
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from zoo.errors import ConfigError, ShadowError, UndescribedError, UnknownNameError, nearest
from zoo.heads import HEADS
from zoo.library import reaching

if TYPE_CHECKING:
    from zoo.adapters.base import Adapter
    from zoo.backbone import Backbone
    from zoo.tasks.base import Task

A = TypeVar("A", bound="type[Adapter]")
B = TypeVar("B", bound="type[Backbone]")
T = TypeVar("T", bound="type[Task]")
R = TypeVar("R", bound="type[Any]")

_adapters: dict[str, type[Adapter]] = {}
_families: dict[str, type[Backbone]] = {}
_tasks: dict[str, type[Task]] = {}
_regimes: dict[str, Any] = {}  # type[Regime]; regimes stand on floors above this one
OURS = ("vision", "multimodal", "audio")


def check_shadows(names: Sequence[str] = OURS) -> None:
    """Raise ShadowError if another package named like one of ours would be, or was, imported instead."""
    root = Path(__file__).resolve().parent.parent
    for name in names:
        module = sys.modules.get(name)
        origin: str | None
        if module is not None:
            origin = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", [])), None)
        else:
            spec = importlib.util.find_spec(name)
            if spec is None:
                continue
            origin = spec.origin or next(iter(spec.submodule_search_locations or []), None)
        if origin is None or not _is_ours(Path(origin), name, root):
            raise ShadowError(
                f"The package '{name}' found at {origin} is not adapter-zoo's; it hides ours at {root / name}. Uninstall "
                f"it, rename the local folder or file '{name}', or put adapter-zoo first on the import path."
            )


def _is_ours(origin: Path, name: str, root: Path) -> bool:
    folder = origin.parent if origin.suffix else origin
    return folder.resolve() == (root / name).resolve()


def register_adapter(name: str) -> Any:
    """Class decorator, above `@dataclass`: make a method known by name."""

    def decorate(cls: A) -> A:
        if "__dataclass_fields__" not in cls.__dict__:
            raise ConfigError(
                f"@register_adapter('{name}') stands above @dataclass; {cls.__name__} is not a dataclass."
            )
        known, entry = _adapters.get(name), _entry_points("zoo.adapters").get(name)
        taken = known.__module__ if known is not None else getattr(entry, "value", entry)
        # The same module again (a reload, a notebook cell run twice) replaces its own method.
        if taken is not None and taken.split(":")[0] != cls.__module__:
            raise ConfigError(f"the adapter name '{name}' is taken by {taken}; choose another.")
        cls.method = name
        # A dataclass compares by value and has no hash; a module in a tree of modules needs its identity.
        cls.__eq__ = object.__eq__  # type: ignore[method-assign]
        cls.__hash__ = object.__hash__  # type: ignore[method-assign]
        _adapters[name] = cls
        return cls

    return decorate


def register_backbone(cls: B) -> B:
    """Class decorator: make a family of backbones known by its `family` name and its aliases."""
    _families[cls.family] = cls
    return cls


def register_task(name: str) -> Any:
    """Class decorator: make a task known by name."""

    def decorate(cls: T) -> T:
        cls.name = name
        _tasks[name] = cls
        return cls

    return decorate


def register_regime(name: str) -> Any:
    """Class decorator, above `@dataclass(eq=False)`: make a training procedure known by name."""

    def decorate(cls: R) -> R:
        cls.name = name
        _regimes[name] = cls
        return cls

    return decorate


# How our own files say what they declare: the line that registers it. Nothing is imported to find a name.
_DECLARED = {
    "zoo.adapters": re.compile(r'^@register_adapter\("([\w+-]+)"\)', re.MULTILINE),
    "zoo.backbones": re.compile(r'^@register_backbone\n(?:.*\n)+?    family = "([\w-]+)"', re.MULTILINE),
    "zoo.tasks": re.compile(r'^@register_task\("([\w-]+)"\)', re.MULTILINE),
    "zoo.heads": re.compile(r'^@register_head\("([\w-]+)"\)', re.MULTILINE),
    "zoo.regimes": re.compile(r'^@register_regime\("([\w-]+)"\)', re.MULTILINE),
}
_ROOMS = {
    "zoo.adapters": "adapters",
    "zoo.backbones": "families",
    "zoo.heads": "heads",
    "zoo.regimes": "regimes",
    "zoo.tasks": "tasks",
}


@cache
def _declared(group: str) -> dict[str, str]:
    """Name -> module of what the files of this installation declare."""
    root = Path(__file__).resolve().parent.parent
    found: dict[str, str] = {}
    for package in ("zoo", *OURS):
        for file in sorted((root / package / _ROOMS[group]).rglob("*.py")):
            for match in _DECLARED[group].finditer(file.read_text(encoding="utf-8")):
                found[match[1]] = ".".join(file.relative_to(root).with_suffix("").parts)
    return found


@cache
def _entry_points(group: str) -> dict[str, Any]:
    """What can be asked for by name: our own, by their files, and other packages' entry points."""
    others = importlib.metadata.entry_points(group=group)
    # an older installation of ours may still list modules that have moved
    return {e.name: e for e in others if e.dist is None or e.dist.name != "adapter-zoo"} | _declared(group)


def _load(group: str, name: str) -> None:
    entry = _entry_points(group)[name]
    if isinstance(entry, str):
        check_shadows([package for package in OURS if entry.startswith(f"{package}.")])
        importlib.import_module(entry)
        known: dict[str, Any] = {
            "zoo.backbones": _families,
            "zoo.adapters": _adapters,
            "zoo.tasks": _tasks,
            "zoo.regimes": _regimes,
        }
        if name not in known.get(group, HEADS):
            # its module is there, but broke off before it registered: run it again, so that the cause is shown each time
            sys.modules.pop(entry, None)
            importlib.import_module(entry)
        return
    loaded = entry.load()
    if group == "zoo.tasks" and isinstance(loaded, type):  # an entry point may name the class instead of registering it
        _tasks.setdefault(name, loaded)


def adapter_class(name: str) -> type[Adapter]:
    """The class of a method.

    Raises:
        UnknownNameError: with the nearest names.
    """
    if name not in _adapters and name in _entry_points("zoo.adapters"):
        _load("zoo.adapters", name)
    if name not in _adapters:
        raise UnknownNameError(f"There is no adapter method '{name}'. {nearest(name, list_adapters())}")
    return _adapters[name]


def adapter(name: str, **config: Any) -> Adapter:
    """A method by name with its settings: `zoo.adapter("lora", rank=4)`.

    Raises:
        UnknownNameError: no such method. ConfigError: a setting that it does not have, or of the wrong type.
    """
    return adapter_class(name).from_config(config)


def family(name: str) -> type[Backbone]:
    """The class that declares a family of backbones, by its family name."""
    if name not in _families and name in _entry_points("zoo.backbones"):
        _load("zoo.backbones", name)
    if name not in _families:
        raise UnknownNameError(f"There is no backbone family '{name}'. {nearest(name, families())}")
    return _families[name]


def described() -> Iterator[type[Backbone]]:
    """All families that can be had; one that is hidden by a package of its name is in nobody's way who does not need it."""
    for name in families():
        with contextlib.suppress(ShadowError):
            yield family(name)


def _check_hidden() -> None:
    """Raise ShadowError if a family is hidden: a name that was not found may be one of its."""
    for name in families():
        family(name)


def task(name: str) -> Task:
    """A task with its default settings, by name.

    Raises:
        UnknownNameError: with the nearest names. MissingPackageError: it needs an extra that is not installed.
    """
    if name not in _tasks and name in _entry_points("zoo.tasks"):
        _load("zoo.tasks", name)
    if name not in _tasks:
        raise UnknownNameError(f"There is no task '{name}'. {nearest(name, list_tasks())}")
    return _tasks[name]()


def regime(name: str, **settings: Any) -> Any:
    """A regime by name with its settings: `zoo.registry.regime("lae", epochs=5)`.

    Raises:
        UnknownNameError: no such regime. ConfigError: a setting that it does not have, or of the wrong type.
    """
    return regime_class(name).from_config(settings)


def regime_class(name: str) -> type[Any]:
    """The class of a regime.

    Raises:
        UnknownNameError: with the nearest names.
    """
    if name not in _regimes and name in _entry_points("zoo.regimes"):
        _load("zoo.regimes", name)
    if name not in _regimes:
        raise UnknownNameError(f"There is no regime '{name}'. {nearest(name, list_regimes())}")
    return _regimes[name]


def list_regimes(pattern: str = "*") -> list[str]:
    """Names of regimes that match a glob."""
    return sorted(n for n in set(_entry_points("zoo.regimes")) | set(_regimes) if fnmatch.fnmatch(n, pattern))


def head_class(kind: str) -> type[Any]:
    """The class of a kind of heads.

    Raises:
        ConfigError: no such kind; with all there are.
    """
    if kind not in HEADS and kind in _entry_points("zoo.heads"):
        _load("zoo.heads", kind)
    if kind not in HEADS:
        raise ConfigError(f"there is no head of the kind '{kind}'. {nearest(kind, list_heads())}")
    return HEADS[kind]


def list_heads() -> list[str]:
    """Names of all kinds of heads."""
    return sorted(set(_entry_points("zoo.heads")) | set(HEADS))


def list_tasks() -> list[str]:
    """Names of all tasks."""
    return sorted(set(_entry_points("zoo.tasks")) | set(_tasks))


def families() -> list[str]:
    """Names of all families."""
    return sorted(set(_entry_points("zoo.backbones")) | set(_families))


def list_adapters(pattern: str = "*") -> list[str]:
    """Names of methods that match a glob."""
    return sorted(n for n in set(_entry_points("zoo.adapters")) | set(_adapters) if fnmatch.fnmatch(n, pattern))


def list_backbones(pattern: str = "*") -> list[str]:
    """Short names of backbones that match a glob. Any other model of a family works as `timm:<name>` and the like."""
    names = [alias for cls in described() for alias in cls.aliases]
    return sorted(n for n in names if fnmatch.fnmatch(n, pattern))


def known_backbone(name: str) -> bool:
    """Whether the weights of a backbone come from a source that is registered here or in its library; asks no network."""
    return any(name in cls.aliases or cls.known(name) for cls in described())


def library_name(name: str) -> str:
    """The library's own name of a backbone, by the short names alone: two names of one backbone give the same."""
    return next((cls.aliases[name] for cls in described() if name in cls.aliases), name)


def find_backbone(name: str) -> tuple[type[Backbone], str]:
    """The family that serves a backbone name, and the library's own name for it.

    Raises:
        UnknownNameError: no family knows it; the message has the nearest names.
    """
    for cls in described():
        if name in cls.aliases:
            return cls, cls.aliases[name]
    if "~" in name:
        raise UnknownNameError(
            f"'{name}' is a changed backbone (zoo.prune, zoo.sparsify, zoo.quantise), which lives in a folder of its own "
            "(zoo.save_backbone). Name the folder: zoo.load('<folder>', adapter=...)."
        )
    reasons = []
    # what no family describes goes to one that can be found without knowing the network, if there is such a network at all
    for cls in sorted(described(), key=lambda cls: cls.fallback):
        if cls.fallback:
            _check_hidden()
        answer = cls.accepts(name)
        if answer is True:
            return cls, name
        if isinstance(answer, str):
            reasons.append(answer)
    _check_hidden()
    hint = " ".join(dict.fromkeys(reasons)) or nearest(name, list_backbones())
    raise UnknownNameError(
        f"There is no backbone '{name}'. {hint} A model of a supported family also works by "
        "its library's name, for example 'timm:vit_small_patch16_224'."
    )


_SIZE = ("img_size", "image_size")  # timm's word and that of transformers and open_clip, for one thing


def sized(cls: type[Backbone], name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of `zoo.load` with the size of images under the word of the family's library; either word is understood.

    Raises:
        ConfigError: both words, no whole number of pixels, or a size for a family that has none to choose.
    """
    given = [word for word in _SIZE if word in options]
    if not given or not cls.saved_options:
        return options
    if len(given) == 2:
        raise ConfigError(
            "img_size= and image_size= are two words for one thing, the size of images; give one of them."
        )
    known = [word for word in _SIZE if word in cls.saved_options]
    if not known:
        sizes = ", ".join(f"{word}=" for word in cls.saved_options if word.endswith("size")) or "none"
        raise ConfigError(
            f"'{name}' of the family '{cls.family}' has no size of images to choose ({given[0]}=). Sizes that it has: {sizes}."
        )
    size = options[given[0]]
    sides = size if isinstance(size, (list, tuple)) and len(size) == 2 else [size]
    if size is not None and not all(isinstance(n, Integral) and not isinstance(n, bool) and int(n) >= 1 for n in sides):
        raise ConfigError(
            f"{given[0]} is {size!r}; expected a whole number of pixels, 1 or more, or two of them: height and width."
        )
    word = known[0] if len(known) == 1 else _SIZE[name.startswith("transformers:")]
    return {word if k in given else k: v for k, v in options.items()}


def built(cls: type[Backbone], name: str, **options: Any) -> tuple[type[Backbone], Any]:
    """A family's network by its library's name, and the family that describes it.

    A library builds networks of several shapes by names of one kind. What the family that takes the name does not describe
    goes to one that finds its points without knowing it.
    """
    try:
        with reaching() if options.get("pretrained") else contextlib.nullcontext():
            return cls, cls.build(name, **options)
    except UndescribedError:
        other = next((c for c in described() if c.fallback and c.accepts(name) is True), None)
        if other is None:
            raise
        options = {k: v for k, v in options.items() if k != "dtype" or other.loads_in_dtype}
        with reaching() if options.get("pretrained") else contextlib.nullcontext():
            return other, other.build(name, **options)
