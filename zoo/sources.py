"""What a name of an adapter stands for: a method, a trained adapter that comes along, a folder, or a repository on the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from zoo import registry
from zoo.adapters.base import Adapter
from zoo.errors import UnknownNameError, nearest

__all__ = ["embedded_adapters", "resolve"]


def resolve(source: str | Adapter | Path) -> Adapter | Path:
    """An adapter to attach fresh, or the folder of a saved one (downloaded if need be)."""
    if isinstance(source, Adapter):
        return source
    if isinstance(source, Path):
        if not source.is_dir():
            raise UnknownNameError(f"There is no folder '{source}' to load an adapter from.")
        return source
    if source in registry.list_adapters():
        return registry.adapter(source)
    embedded = embedded_adapters()
    if source in embedded:
        return embedded[source]
    if Path(source).is_dir():
        return Path(source)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", source):
        from zoo.hub import parse_repo_id, pull

        repo, revision = parse_repo_id(source)
        return pull(repo, revision=revision)
    known = [*registry.list_adapters(), *embedded]
    raise UnknownNameError(
        f"There is no adapter '{source}': no method, no embedded adapter, no folder of that name. {nearest(source, known)} "
        "A Hub repository is written 'user/name' or 'user/name@revision'."
    )


def embedded_adapters() -> dict[str, Path]:
    """Trained adapters that come with the packages: name -> folder."""
    found: dict[str, Path] = {}
    for cls in registry.described():
        folder = cls.weights_folder
        if folder is not None and folder.is_dir():
            found |= {p.name: p for p in sorted(folder.iterdir()) if (p / "adapter_config.json").is_file()}
    return found
