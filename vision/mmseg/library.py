"""mmsegmentation as it is installed here, or what is missing of it."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from zoo.errors import MissingPackageError
from zoo.library import library

__all__ = ["mmseg_models"]

# mmseg's models import ftfy and regex, which its package does not ask for; the extra does
HOW = "pip install 'adapter-zoo[seg]', then zoo install-mmcv"


def mmseg_models() -> Any:
    """mmseg's registry of models, with all of its own in it.

    Raises:
        MissingPackageError: mmsegmentation, mmengine or mmcv with its compiled operations is missing, or does not fit the others.
    """
    library("mmengine", "seg")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old interfaces of torch and of setuptools
            importlib.import_module("mmcv.ops")
    except ImportError as error:
        compiled = "_ext" in str(error)
        what = "is installed without its compiled operations" if compiled else f"cannot be imported ({error})"
        raise MissingPackageError(
            f"mmsegmentation needs the package mmcv, which {what}. There are no wheels of it for this torch; it is built in some "
            f"minutes: {HOW}."
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("mmseg.models")
            registry = importlib.import_module("mmseg.registry")
    except (ImportError, AssertionError) as error:  # mmseg asserts versions of the others
        raise MissingPackageError(f"mmsegmentation cannot be imported ({error}). Install what fits: {HOW}.") from error
    return registry.MODELS
