"""Errors for people: what was wrong, what was expected, what to do.

Every error that a user can cause is a `ZooError`. Each subclass also derives from the built-in exception that fits, so
that `except ValueError` in somebody's code keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ZooError(Exception):
    """The base of all errors that this package raises on purpose."""


class UnknownNameError(ZooError, KeyError):
    """A backbone, adapter, point or option of that name does not exist; the message lists the nearest names."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class SelectionError(ZooError, ValueError):
    """A selector matched no point, or only a part of what it names."""


class AttachError(ZooError, RuntimeError):
    """An adapter cannot be attached: no such point here, a verb that the point does not offer, dead parameters."""


class CombinationError(AttachError):
    """Two methods that cannot be combined, or a combination that an operation does not support."""


class MergeError(ZooError, RuntimeError):
    """An adapter cannot be folded into the weights."""


class DerivativeError(ZooError, RuntimeError):
    """A derivative was asked for that an operation cannot give exactly."""


class ConfigError(ZooError, ValueError):
    """A setting is missing, unknown, of the wrong type or out of range."""


class AbsentError(ConfigError, AttributeError):
    """A property that this model does not have (the image size of a network of sounds); `hasattr` is false there."""


class ContextError(ZooError, ValueError):
    """A value that an adapter needs for a forward pass is missing, or not one for each sample."""


class TrustError(ConfigError):
    """A file asks for something that needs the user's word first, such as a backbone of an unknown source."""


class CallError(ConfigError):
    """A model was called with what is no batch of its backbone's."""


class MismatchError(ZooError, ValueError):
    """An adapter belongs to another backbone, width, depth or set of weights."""


class UndescribedError(MismatchError):
    """A network of a family's library that the family does not describe: the generic family takes it."""


class WeightsError(ZooError, ValueError):
    """A weights file is damaged, holds NaN or Inf, or is in a format that is not read (pickle)."""


class SaveError(ZooError, OSError):
    """Writing failed; what was there before is still whole."""


class DataError(ZooError, ValueError):
    """A data set, image or label is not what was expected."""


class HubError(ZooError, RuntimeError):
    """The Hub refused, or what it sent is not an adapter."""


class ShadowError(ZooError, ImportError):
    """Another installed package named `vision`, `multimodal` or `audio` hides ours."""


class MissingPackageError(ZooError, ImportError):
    """An optional package is needed; the message names the extra to install."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """A sentence with the known names nearest to `name`, or with all of them if they are few."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=count, cutoff=0.5)
    if close:
        return "Did you mean " + " or ".join(f"'{c}'" for c in close) + "?"
    if len(names) <= 40:  # the settings of a regime, say; more are methods or backbones
        return "Known: " + (", ".join(names) or "none") + "."
    return f"There are {len(names)}; list them with `zoo list`."
