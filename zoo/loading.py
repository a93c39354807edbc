"""`zoo.load`: one name in, a model out."""

from __future__ import annotations

import inspect
import logging
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zoo import registry
from zoo.adapters.base import Adapter
from zoo.arguments import DEVICE, DTYPE, FLAG, NAMES, NOTHING, PATH, TEXT, Kind, instance, one_of, shown, typed, whole
from zoo.backbone import WRAPPED
from zoo.disk.checkpoints import fill, own_options, read_checkpoint
from zoo.engine.memory import MEMORY_SETTINGS
from zoo.errors import ConfigError, UnknownNameError, WeightsError, ZooError, nearest
from zoo.heads.base import HEADS
from zoo.heads.names import class_names
from zoo.library import only_tensors
from zoo.model import Model
from zoo.model.lighter import quantise as quantised_copy
from zoo.model.lighter import quantise_in_place
from zoo.model.quantised import FORMATS
from zoo.model.stored import is_changed, load_changed
from zoo.sources import resolve
from zoo.wrapping import wrap

if TYPE_CHECKING:
    from zoo.disk import SavedAdapter

_LOG = logging.getLogger("zoo")


def _adapters(value: Any) -> Any:
    several = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(one, (str, Path, Adapter)) for one in several):
        raise TypeError
    return value


_ADAPTERS = Kind("a method's name, a config object (zoo.adapter), a saved adapter, or a list of these", _adapters)


@typed(
    backbone=Kind("a backbone's name", lambda value: str(PATH.take(value)))
    | instance("a network (nn.Module)", torch.nn.Module)
    | NOTHING,
    adapter=_ADAPTERS | NOTHING,
    num_classes=whole(0, 10_000_000) | NOTHING,
    classes=NAMES | NOTHING,
    head=TEXT | NOTHING,
    pretrained=FLAG,
    device=DEVICE | NOTHING,
    dtype=DTYPE | NOTHING,
    memory=one_of(*MEMORY_SETTINGS),
    quantise=one_of(*FORMATS) | NOTHING,
    seed=whole(0, 2**64 - 1) | NOTHING,
    trust_backbone=FLAG | TEXT,
)
def load(
    backbone: str | torch.nn.Module | None = None,
    adapter: str | Adapter | Path | Sequence[str | Adapter | Path] | None = None,
    *,
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
    head: str | None = None,
    pretrained: bool = True,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    memory: str = "default",
    quantise: str | None = None,
    seed: int | None = None,
    trust_backbone: bool | str = False,
    **backbone_kwargs: Any,
) -> Model:
    """A backbone with adapters and a head.

    Args:
        backbone: a short name (`zoo.list_backbones()`), `timm:<model>`, a folder of `zoo.save_backbone`, or a network that
            you have built (`zoo.wrap`, whose `example=`, `name=`, `features=`, `head=`, `probe=` can be given, too); may be
            left out if `adapter` is a saved one, which knows its backbone.
        adapter: a method's name ("lora"), a config object (`zoo.adapter("lora", rank=4)`), the name of an embedded adapter,
            a folder, a Hub repository `user/name[@revision]`, or a list of these.
        num_classes: width of the head; None keeps the checkpoint's own (or the saved adapter's); 0 means features. A saved
            adapter's head stays where it is as wide, else a new, untrained one takes its place, with a warning.
        classes: names of the classes, in the order of the labels; without `num_classes` they say how many there are. A saved
            adapter's head stays where it has these names, or none.
        head: the kind of a new head, a name of `zoo.list_heads()`: "dense" says something of every pixel, for the task "segment"
            and its like. By default a linear one. It needs num_classes or classes.
        pretrained: load the backbone's weights; False gives random ones.
        device: where to build; "meta" takes no memory and loads no weights.
        dtype: precision of the backbone; large checkpoints are read in it, without a float32 copy. Adapters and heads stay in
            float32 beside a half-precision backbone.
        memory: "default", "low", "min" or "off" (`zoo.engine.memory`).
        quantise: keep the frozen projections' weights in "int8", "int4" or "nf4" (`zoo.quantise`): less memory for the same
            adapters, which then correct the rounded weights and are merged into no others. A saved adapter brings its own.
        seed: of the adapters' and head's initial values, and of random weights (pretrained=False).
        trust_backbone: a saved adapter may name a backbone of any repository or folder; one that is not of a source known here
            is built only with your word: True, or the backbone's name. (To name the backbone yourself is your word, too.)
        backbone_kwargs: handed to the library's builder, e.g. `img_size=384` (that is also understood where the library's own
            word is image_size, and the other way round); and `checkpoint=` (a file of your own weights), `source=` and
            `licence=` (where these are from, for cards).

    Returns:
        The model in evaluation mode, as it is used after training: no dropout, also in adapters. `zoo.fit` and `zoo.run` see to
        modes by themselves; in a loop of your own, and with trainers that keep the modes they find (Lightning), call
        `model.train()` first.

    Raises:
        UnknownNameError: no such backbone, method, folder or repository; with the nearest names.
        TrustError: a saved adapter names a backbone of an unknown source. Nothing of it was downloaded.
        MismatchError, ConfigError, WeightsError: a saved adapter does not fit, or is damaged.
    """
    if "quantize" in backbone_kwargs:
        raise ConfigError(f"It is spelled quantise here: quantise={backbone_kwargs['quantize']!r}.")
    if classes is not None:
        classes = class_names(classes)
        num_classes = len(classes) if num_classes is None else num_classes
        if num_classes != len(classes):
            raise ConfigError(
                f"num_classes is {num_classes}, and classes= names {len(classes)}. Leave num_classes out."
            )
    if head is not None:
        if head not in (kinds := registry.list_heads()):
            raise ConfigError(f"there is no head of the kind '{head}'. {nearest(head, kinds)}")
        if not num_classes:
            raise ConfigError(
                f"head is '{head}', and num_classes says not how wide it is. Pass num_classes= or classes=."
            )
    wanted = [adapter] if isinstance(adapter, (str, Adapter, Path)) else list(adapter or [])
    for text in (backbone, *wanted):
        _check_length(text)
    sources = [resolve(a) for a in wanted]
    saved = [s for s in sources if not isinstance(s, Adapter)]
    if saved:
        from zoo.disk import read

        packs = {id(s): read(s) for s in saved}
        if (
            num_classes is None
            and len(saved) == len(sources)
            and not any(p.has_head or p.backbone_kwargs.get("own_output") for p in packs.values())
        ):
            num_classes = 0  # saved on features, and so they come out again
    else:
        packs = {}
    if quantise is None and packs and not (isinstance(backbone, str) and is_changed(backbone)):
        quantise = _of_saved(next(iter(packs.values())))
    if backbone is None:
        if not packs:
            raise ConfigError(
                "Name a backbone, for example zoo.load('vit-micro'), or a saved adapter that knows its own."
            )
        first = next(iter(packs.values()))
        backbone = first.backbone_name
        if backbone.startswith(WRAPPED):
            raise ConfigError(
                f"The adapter in '{first.folder}' belongs to a network that its user built: "
                f"{first.backbone_kwargs.get('recipe')!s:.300}. Build the same one and hand it over: zoo.load(network, "
                "adapter=...). Nothing is imported by what a file says."
            )
        backbone_kwargs = of_file(backbone, first.backbone_kwargs, first.folder, trust_backbone, backbone_kwargs)
    elif packs and isinstance(backbone, str) and not is_changed(backbone):
        cls, own = registry.find_backbone(backbone)
        first = next(iter(packs.values()))
        if cls.point_options and registry.library_name(first.backbone_name) == own:
            from zoo.disk.trust import check_options

            points = {k: v for k, v in first.backbone_kwargs.items() if k in cls.point_options}
            check_options(cls.saved_options, points, first.folder, backbone)
            backbone_kwargs = {**points, **backbone_kwargs}
    needed = {k: v for s in sources if isinstance(s, Adapter) for k, v in s.point_options.items()}
    if needed and isinstance(backbone, str) and not is_changed(backbone):
        options = registry.find_backbone(backbone)[0].point_options
        backbone_kwargs = {**{k: v for k, v in needed.items() if k in options}, **backbone_kwargs}
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        width = num_classes if head is None else 0
        common: dict[str, Any] = {"num_classes": width, "device": device, "dtype": dtype, "memory": memory}
        if isinstance(backbone, str):
            model = load_backbone(backbone, pretrained=pretrained, quantise=quantise, **common, **backbone_kwargs)
        else:
            model = wrap(backbone, **common, **_for_wrap(backbone_kwargs))
            if quantise is not None:  # the network is the user's, and stays as it is
                model = quantised_copy(model, to=quantise)
                model.quantised = quantise
        if seed is not None:
            torch.manual_seed(seed)  # the same adapter and head on random weights and on pretrained ones
            if width:
                model.reset_head(width)
        if head is not None:
            model.reset_head(num_classes or 0, classes, kind=head)
        for source in sources:
            if isinstance(source, Adapter):
                model.add_adapter(source)
            else:
                from zoo.disk import attach

                attach(model, packs[id(source)], head=_keeps_head(packs[id(source)], num_classes, classes, head))
        if classes is not None:
            model.classes = classes
            model.name_readers(classes)
    return model


def _of_saved(pack: SavedAdapter) -> str | None:
    """In what the backbone of a saved adapter is kept; None: its weights are whole.

    Raises:
        ConfigError: a format that there is not.
    """
    if pack.quantised and pack.quantised not in FORMATS:
        raise ConfigError(
            f"The adapter in '{pack.folder}' was trained on weights kept in '{pack.quantised}'. "
            f"{nearest(pack.quantised, FORMATS)}"
        )
    return pack.quantised or None


def _keeps_head(saved: SavedAdapter, num_classes: int | None, classes: Sequence[str] | None, head: str | None) -> bool:
    """Whether the head of a saved adapter is the one that is asked for; where another is, a warning says that it is new."""
    if num_classes is None or not saved.has_head:
        return True
    named = saved.classes is None or classes is None or list(saved.classes) == list(classes)
    if saved.num_classes == num_classes and named and head in (None, saved.head_kind):
        return True
    kind = HEADS.get(saved.head_kind)
    written = getattr(kind, "reads_names", False) and not getattr(kind, "kept_texts", False)  # nothing in it is trained
    if num_classes and not (written and classes is not None):
        theirs = f"{saved.num_classes} classes" + (f" ({', '.join(saved.classes[:3])} ...)" if saved.classes else "")
        _LOG.warning(
            "The head saved in '%s' is for %s, not for the %d that are asked for: a new, untrained head stands in its place.",
            *(saved.folder, theirs, num_classes),
        )
    return False


def _for_wrap(options: dict[str, Any]) -> dict[str, Any]:
    known = ("example", "name", "features", "head", "probe", "source", "licence")
    if wrong := [k for k in options if k not in known]:
        raise ConfigError(
            f"'{wrong[0]}' is an option of a library's builder, and this network is built. {nearest(wrong[0], known)}"
        )
    return options


def of_file(
    name: str, options: dict[str, Any], where: Path, trust: bool | str, given: dict[str, Any]
) -> dict[str, Any]:
    """The options of the backbone that a file (a saved adapter) names, if it may have it built; the user's own come first.

    Raises:
        TrustError, ConfigError: see `zoo.disk.trust`.
    """
    from zoo.disk.trust import check_backbone, check_size

    if "~" in name:
        registry.find_backbone(name)  # says where changed backbones live
    sizes = ("img_size", "image_size")  # one thing: the user's word for it stands instead of either
    said = {*given, *sizes} if any(word in given for word in sizes) else set(given)
    theirs = {k: v for k, v in options.items() if k not in said}
    own_words = inspect.signature(load).parameters
    check_backbone(name, theirs, where, trust)
    cls, own = registry.find_backbone(name)
    more = registry.sized(cls, own, {k: v for k, v in given.items() if k not in own_words})
    own_options(cls, more)  # a checkpoint of the user's is filled in later

    def build(options: dict[str, Any]) -> torch.nn.Module:
        with torch.device("meta"), only_tensors():
            return registry.built(cls, own, pretrained=False, **{**options, **more})[1]

    check_size(name, build, {k: v for k, v in theirs.items() if k not in cls.point_options}, where)
    return {**theirs, **given}


def load_backbone(
    name: str,
    *,
    num_classes: int | None = None,
    pretrained: bool = True,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    memory: str = "default",
    quantise: str | None = None,
    **kwargs: Any,
) -> Model:
    """A bare model: the backbone and its head."""
    if is_changed(name):
        if quantise is not None:
            raise ConfigError(
                f"'{name}' is built as its recipe says, and is not quantised on the way. Do it afterwards: "
                f"zoo.quantise(model, to={quantise!r})."
            )
        if kwargs:
            raise ConfigError(f"'{name}' is built as its recipe says; it takes no options ({', '.join(kwargs)}).")
        options = {"num_classes": num_classes, "pretrained": pretrained, "device": device, "dtype": dtype}
        return load_changed(name, memory=memory, **options)  # type: ignore[arg-type]
    cls, own = registry.find_backbone(name)
    for option in ("weights_only", "trust_remote_code"):
        if option in kwargs:
            raise ConfigError(
                f"'{option}' is no option here: weights are read as tensors only, and no repository's code is run. Leave it out."
            )
    kwargs = registry.sized(cls, own, kwargs)
    bring = own_options(cls, kwargs)
    state = None if bring is None or bring.path is None else read_checkpoint(bring.path)
    kwargs = cls.options(num_classes, kwargs)
    where = torch.device(device) if device is not None else None
    meta = where is not None and where.type == "meta"
    given = pretrained and state is None  # the library's own weights
    if meta:
        try:
            with torch.device("meta"), only_tensors():
                cls, module = registry.built(cls, own, pretrained=False, **kwargs)
        except Exception as error:
            _of_options(name, kwargs, error)
            raise
        module = module.to("meta")
    else:
        precision = {"dtype": dtype} if cls.loads_in_dtype and given else {}
        try:
            with only_tensors():
                cls, module = registry.built(cls, own, pretrained=given, **precision, **kwargs)
        except ZooError:
            raise
        except Exception as error:
            if not _of_pickle(error):
                _of_options(name, kwargs, error)
                raise
            raise WeightsError(
                f"A file of '{name}' holds more than tensors, so it was not read: it could run any code. Ask for safetensors, or "
                f"convert it where you trust its source. {type(error).__name__}: {str(error).splitlines()[0][:200]}"
            ) from error
        if state is not None and not fill(module, state, str(bring.path)) and num_classes is None:  # type: ignore[union-attr]
            num_classes = 0  # a classifier that is in no file is none
    family = cls(module, name)
    family.pretrained = (pretrained or state is not None) and not meta
    family.own_weights = None if bring is None else bring.weights
    family.configure(**kwargs)
    model = Model(family, num_classes=num_classes, memory=memory, kwargs=kwargs)
    if quantise is not None:  # of the numbers as they were read, whatever precision they are used in
        quantise_in_place(model, quantise)
    if not meta and (where is not None or dtype is not None):
        model.to(device=where, dtype=dtype)
    elif dtype is not None:
        model.to(dtype=dtype)
    return model


def _of_options(name: str, options: dict[str, Any], error: Exception) -> None:
    """Say which options were given where a library's builder broke over values that it was not made for.

    Raises:
        ConfigError: the error is one of wrong values. Those of files, of the network and of memory are left as they are.
    """
    kinds = (TypeError, ValueError, AssertionError, AttributeError, LookupError, ArithmeticError, RuntimeError)
    if not options or isinstance(error, ZooError) or not isinstance(error, kinds):
        return
    given = ", ".join(f"{key}={shown(value)}" for key, value in options.items())
    reason = next(iter(str(error).splitlines()), "")[:200]
    raise ConfigError(
        f"'{name}' cannot be built with {given} ({type(error).__name__}: {reason}). Options are handed to the library's builder: "
        "see what it takes."
    ) from error


def _of_pickle(error: BaseException | None) -> bool:
    """Whether an error came of torch's refusal to unpickle."""
    while error is not None and not isinstance(error, pickle.UnpicklingError):
        error = error.__cause__ or error.__context__
    return error is not None


def _check_length(name: Any) -> None:
    """Raise UnknownNameError for a text that no system takes as a path, before it is asked for one."""
    if isinstance(name, (str, Path)) and any(len(part.encode(errors="replace")) > 255 for part in str(name).split("/")):
        raise UnknownNameError(
            f"'{str(name)[:60]}...' has {len(str(name)):,} characters, and is neither a name here nor a path: a part of one "
            "ends at 255 bytes."
        )
