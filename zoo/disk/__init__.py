"""Adapters as folders of four files."""

from zoo.disk.store import SavedAdapter, alone, attach, contents, read, save, write, write_file, write_files

__all__ = ["SavedAdapter", "alone", "attach", "contents", "read", "save", "write", "write_file", "write_files"]
