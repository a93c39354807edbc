"""The books of a run: `out/state.json` and the state of the model at the end of each phase, from which a killed run goes on.

| file | content |
| --- | --- |
| `state.json` | regime, settings, data, backbone; the phases that are done with their reports; what was measured between them |
| `start.safetensors` | the adapters and heads that the run began with |
| `<number>-<name>/done.safetensors` | those at the end of a phase |
| `<number>-<name>/` | while the phase is trained: the checkpoints of its fit |

A state holds all adapters and heads, those too that are not in use. The state of a phase is written before `state.json` names the
phase, and the checkpoints go last, so that a kill at any moment leaves a whole state. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.data.dataset import ImageDataset
from zoo.data.digest import content
from zoo.disk import write_file
from zoo.errors import ConfigError, WeightsError
from zoo.train.checkpoint import read_state, write_state
from zoo.train.states import State, take

if TYPE_CHECKING:
    from zoo.model import Model

__all__ = ["Ledger", "State", "data_identity", "structure", "take"]

STATE, START, DONE = "state.json", "start.safetensors", "done.safetensors"
FORMAT = 1


def structure(model: Model) -> dict[str, Any]:
    """Which adapters and heads a model has, as JSON."""
    adapters: Any = model.adapters
    return {
        "backbone": [model.backbone_name, model.fingerprint],
        "adapters": {name: [a.method, a.config()] for name, a in adapters.items()},
        "heads": {name: int(getattr(head, "out_features", 0)) for name, head in model.heads.items()},
        "active": list(model.active),
    }


def data_identity(data: Any) -> Any:
    """What makes data these and no others, as JSON (`zoo.data.digest`), in the structure in which they were given."""
    if isinstance(data, Mapping):
        return {str(name): data_identity(part) for name, part in data.items()}
    if isinstance(data, (list, tuple)):
        return [data_identity(part) for part in data]
    return content(data) if isinstance(data, ImageDataset) else None if data is None else repr(type(data))


class Ledger:
    """The folder of a run; None keeps everything in memory. Only the main process writes.

    Args:
        identity: what makes it this run and no other, as JSON.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any], main: bool) -> None:
        self.folder, self.main = folder, main
        self.identity = json.loads(json.dumps(identity))
        self.phases: list[dict[str, Any]] = []
        self.values: dict[str, Any] = {}
        self.seconds = 0.0

    def open(self, resume: bool) -> State | None:
        """The state that the run began with, if the folder holds this run and it is to go on.

        Raises:
            ConfigError: the folder holds another run. WeightsError: it is damaged.
        """
        if self.folder is None or not resume or not (self.folder / STATE).exists():
            return None
        try:
            found = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
            former, version = found["identity"], found["format"]
            self.phases, self.values, self.seconds = found["phases"], found["values"], found["seconds"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WeightsError(
                f"'{self.folder / STATE}' is not the state of a run ({error}). Delete the folder, or pass resume=False."
            ) from error
        if version != FORMAT:
            raise ConfigError(f"'{self.folder / STATE}' is of another version of adapter-zoo. Pass resume=False.")
        different = sorted(_differences(former, self.identity))
        if different:
            raise ConfigError(
                f"'{self.folder}' holds another run: {'; '.join(different)}. Go on with the same regime, model, data and "
                "settings, choose another out=, or pass resume=False to begin anew."
            )
        return self._read(self.folder / START)

    def begin(self, start: State) -> None:
        """A new run: forget what the folder holds of a former one, and write the state that it begins with."""
        self.phases, self.values, self.seconds = [], {}, 0.0
        if self.folder is None or not self.main:
            return
        with contextlib.suppress(FileNotFoundError):
            (self.folder / STATE).unlink()
        for old in self.folder.glob("[0-9][0-9][0-9]-*") if self.folder.is_dir() else ():
            self._empty(old)
        write_state(self.folder / START, start.tensors, start.about)
        self.write()

    def withdraw(self) -> None:
        """A run that is refused before anything was done leaves nothing that would refuse the same run put right."""
        if self.folder is None or not self.main or self.phases or self.values:
            return
        if next(self.folder.glob("[0-9][0-9][0-9]-*"), None) is None:
            for file in (STATE, START):
                (self.folder / file).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.folder.rmdir()  # only if it is empty

    def write(self) -> None:
        """Write `state.json`."""
        if self.folder is None or not self.main:
            return
        state = {
            "format": FORMAT,
            "identity": self.identity,
            "phases": self.phases,
            "values": self.values,
            "seconds": self.seconds,
        }
        write_file(self.folder / STATE, json.dumps(state, indent=1).encode())

    def place(self, number: int, name: str) -> Path | None:
        """The folder of a phase."""
        return None if self.folder is None else self.folder / f"{number:03d}-{name}"

    def close_phase(self, entry: dict[str, Any], state: State) -> None:
        """A phase is done: write the model's state, then its entry, then remove its checkpoints."""
        place = self.place(len(self.phases), entry["name"])
        if place is not None and self.main:
            write_state(place / DONE, state.tensors, state.about)
        self.phases.append(json.loads(json.dumps(entry)))
        self.write()
        if place is not None and self.main:
            self._empty(place, keep=DONE)

    def state_after(self, number: int) -> State:
        """The state at the end of a phase that is done."""
        place = self.place(number, self.phases[number]["name"])
        assert place is not None
        return self._read(place / DONE)

    @staticmethod
    def _read(path: Path) -> State:
        found = read_state(path)
        if found is None:
            raise WeightsError(f"'{path}' is gone, which the run's state names. Pass resume=False to begin anew.")
        return State(*found)

    @staticmethod
    def _empty(folder: Path, keep: str = "") -> None:
        """Remove what a phase wrote, and nothing else that somebody put there."""
        for file in folder.glob("*.safetensors"):
            if file.name != keep and (file.name in (DONE, "last.safetensors") or file.name.startswith("best-")):
                with contextlib.suppress(OSError):
                    file.unlink()
        with contextlib.suppress(OSError):
            folder.rmdir()  # only if it is empty


def _differences(former: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found = []
    for part in now:
        then = former.get(part)
        if part == "settings" and isinstance(then, Mapping):
            keys = dict.fromkeys([*then, *now[part]])
            found += [
                f"{k} was {then.get(k)!r}, is {now[part].get(k)!r}" for k in keys if then.get(k) != now[part].get(k)
            ]
        elif then != now[part]:
            found.append(f"the {part} changed" if part != "regime" else f"its regime is '{then}'")
    return found
