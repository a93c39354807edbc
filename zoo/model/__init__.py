"""The model: backbone, adapters and head as one module; attaching, routing."""

from zoo.model.model import Model

__all__ = ["Model"]
