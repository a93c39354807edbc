"""`zoo.adapter`: a method with its settings, and what its values start as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo import registry
from zoo.adapters.base import Adapter
from zoo.errors import ConfigError, UnknownNameError, nearest
from zoo.fields import fits, hints_of

__all__ = ["adapter"]


def adapter(name: str, *, init: Any = None, init_like: str = "values", **config: Any) -> Adapter:
    """A method by name with its settings: `zoo.adapter("lora", rank=4)`.

    Args:
        init: a saved adapter of the same method on the same backbone (a folder, an embedded name, a Hub repository
            `user/name[@revision]`), whose values it starts with instead of random ones; its head stays there. Settings that are
            not given are the source's; a length or rank may differ (`zoo.disk.starts`). A method with a setting of this name
            (`prefix`, `coop`) takes what is a value of it for that; a `Path` is always a source.
        init_like: "values", or "scale" for random values with the source's mean and standard deviation of each tensor.
        config: the settings.

    Raises:
        UnknownNameError: no such method, no such source. ConfigError: a setting that the method does not have, of the wrong
        type, or under which the source's values would mean something else. MismatchError: the source is of another method.
    """
    cls = registry.adapter_class(name)
    hints = hints_of(cls)
    own = "init" in cls.__dataclass_fields__ and not isinstance(init, Path) and fits(init, hints["init"])
    if init is None or own:
        if init_like != "values":
            raise ConfigError(
                "init_like says what is taken of a source, and there is none: name a saved adapter by init=."
            )
        return cls.from_config(config if init is None else {"init": init, **config})
    from zoo.disk import read
    from zoo.disk.starts import LIKE, start_from
    from zoo.sources import resolve

    if init_like not in LIKE:
        raise ConfigError(
            f"init_like is {init_like!r}; expected one of {', '.join(LIKE)}. {nearest(str(init_like), LIKE)}"
        )
    if not isinstance(init, (str, Path)):
        raise ConfigError(
            f"init is {init!r:.60}; expected a saved adapter: its folder, its name here, or a Hub repository."
        )
    try:
        source = resolve(init)
    except UnknownNameError:
        if "init" not in cls.__dataclass_fields__:
            raise
        return cls.from_config(
            {"init": init, **config}
        )  # a wrong value of the method's own setting, which names the right ones
    if isinstance(source, Adapter):
        raise ConfigError(
            f"init is '{init}', which is a method and holds no values. Name a saved adapter: its folder, its name here, or a Hub "
            "repository."
        )
    return start_from(read(source), name, config, init_like)
