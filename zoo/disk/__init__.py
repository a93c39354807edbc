"""Adapters as folders of four files."""

from zoo.disk.attaching import attach
from zoo.disk.saved import SavedAdapter, contents, read
from zoo.disk.store import alone, save, write, write_file, write_files

__all__ = ["SavedAdapter", "alone", "attach", "contents", "read", "save", "write", "write_file", "write_files"]
