"""Rows of finished work as JSON lines: one is written when its work is done, so what was killed goes on behind the last of them.

A row has the identity of its work under "config" (JSON types, everything that its numbers depend on), what was found under
"result", and of what it was made: "revision" (the commit of this project), "versions", "device".
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.disk.store import alone
from zoo.errors import SaveError

__all__ = ["Journal"]


class Journal:
    """The rows of a file. Several processes may append to one; each line is written at once.

    Raises:
        SaveError: a line of the file is no row; the last may be half written, and is cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[str, dict[str, Any]] = {}
        self._size = 0
        if path.exists():
            with alone(path.parent):
                self._mend()

    def _mend(self) -> None:
        """Take in the whole lines, and cut off one whose writer was killed. Only while nobody else writes."""
        whole = self._read()
        if whole < self._size:
            with self.path.open("r+b") as file:
                file.truncate(whole)

    def _read(self) -> int:
        """Take in the whole lines; returns where they end."""
        data = self.path.read_bytes()
        self._size = len(data)
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
                self._rows[_key(row["config"])] = row
            except (ValueError, KeyError, TypeError) as error:
                raise SaveError(
                    f"{self.path}: line {number} is no row of a comparison ({error!r}). Take it out, or name another folder."
                ) from error
        return whole

    def find(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """The finished row of this work, if there is one; another process may have written it meanwhile."""
        if _key(config) not in self._rows and self.path.exists() and self.path.stat().st_size != self._size:
            self._read()
        return self._rows.get(_key(config))

    def add(self, row: dict[str, Any]) -> None:
        """Write a row, to the disk before this returns.

        Raises:
            SaveError: it cannot be written.
        """
        line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with alone(self.path.parent), self.path.open("ab") as file:
                self._mend()
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise SaveError(f"{self.path} cannot be written: {error.strerror or error}.") from error
        self._rows[_key(row["config"])] = row


def _key(config: Mapping[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)
