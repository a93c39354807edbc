"""Forward context: values of one forward pass that reach every op of an adapter in the right rows, and tensors carried along.

A value is something about the batch or about each of its samples: the quality of an image, a task's name, labels, masks, the
inputs themselves. An adapter says in `attach` what it needs, and hands the answer to its module, which reads it in one line:

    quality = points.context("quality")                        attach: a `Value`
    self.quality.rows(x)                                       forward: (len(x), ...), the values of the samples that x holds

Who calls the model gives the values: `model(x, context={"quality": q})`, or `with model.context(task="birds"): ...`, or a task
(`Task.context`). In a forward pass a `Frame` holds them, checked and on the model's device:

- per-sample adapters: each adapter sees the values of the samples that it serves (narrowed once for each forward);
- windows: a value stands once for each of the k windows of its image, since an image's windows are neighbours; so with the
  beams of a text;
- recomputation in backward: a block that runs again sees the frame of its own forward (`State.place`);
- afterwards, also when the pass breaks off, the frame is gone.

`points.carried("h")` is a place for a tensor that an op hands to a later op of the same adapter within one forward (side
networks): `put`, `get`, `take`. What a recomputed block reads is what was there when it first ran.

A model whose adapters ask for nothing never makes a frame: this costs one look at an empty dict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ConfigError, ContextError, UnknownNameError, nearest

__all__ = ["Carried", "Context", "Frame", "Value", "Want", "batch_of"]

PER = ("sample", "batch")
GIVE = "model(x, context={{'{0}': ...}}), or `with model.context({0}=...):`"


@dataclass(frozen=True, eq=False)
class Want:
    """What one adapter asks for; `per` is "sample", "batch", "forward" for a carried tensor, "made" for generated weights."""

    owner: str
    name: str
    per: str = "sample"
    required: bool = True
    choices: tuple[str, ...] = ()
    example: Any = None
    windows: bool = False  # whether rows may be windows of an image, or beams of a text
    made: Any = None  # of generated weights: `zoo.engine.generated.Made`

    @property
    def of_inputs(self) -> bool:
        """Whether the value is one of the model's inputs, which nobody needs to give."""
        return self.name == "inputs" or self.name.startswith("inputs.")


@dataclass(eq=False)
class Frame:
    """The values of one forward pass, and the tensors on their way along its blocks. Keys: (adapter, name)."""

    values: dict[tuple[str, str], Any]
    carried: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    carries: bool = False
    per_sample: bool = False
    first: bool = False  # kept for recomputation, and not yet run with

    def kept(self) -> Frame:
        """As it is now, for a recomputation; the same object if nothing can change."""
        return Frame(self.values, dict(self.carried), True, self.per_sample, True) if self.carries else self

    def bare(self) -> Frame:
        """Its values alone. What is carried leads on to the graph, which must not come to hold itself."""
        return Frame(self.values, per_sample=self.per_sample)


@dataclass(eq=False)
class Context:
    """One model's: the frame of the forward pass under way (None: there is none), and what `with model.context` gives."""

    frame: Frame | None = None
    given: dict[str, Any] = field(default_factory=dict)

    def wide(self, tokens: Tensor, images: int) -> Tensor:
        """Tokens (1 or images, T, d) that several samples share, one copy for each if samples have values of their own."""
        if self.frame is None or not self.frame.per_sample or tokens.shape[0] != 1:
            return tokens
        return tokens.expand(images, -1, -1)


@dataclass(eq=False)
class Value:
    """A value as an adapter's module sees it; `points.context(...)` gives it."""

    context: Context
    want: Want

    @property
    def given(self) -> bool:
        """Whether there is a value in this forward pass; always, if it is required."""
        return (self.want.owner, self.want.name) in self._frame().values

    def rows(self, like: Tensor) -> Tensor:
        """(len(like), ...): the value of the sample that each row of `like` belongs to; numbers in the precision of `like`.

        Only of values per sample.

        Raises:
            ContextError: no value was given (one that is not required: look at `given`), or the rows are not those of samples.
        """
        if self.want.per != "sample":
            raise ContextError(
                f"'{self.want.name}' of '{self.want.owner}' is one value for the batch: read it by get()."
            )
        return spread(self.want, self.get(), like)

    def get(self) -> Any:
        """The value as it is: per batch what was given, per sample a tensor (n, ...) of the n samples that this adapter serves.

        Raises:
            ContextError: outside of a forward pass, or no value was given.
        """
        key = (self.want.owner, self.want.name)
        values = self._frame().values
        if key not in values:
            raise ContextError(_missing(self.want))
        return values[key]

    def _frame(self) -> Frame:
        frame = self.context.frame
        if frame is None:
            raise ContextError(
                f"'{self.want.owner}' read '{self.want.name}' outside of a forward pass; there are values only inside of "
                "model(...) and model.features(...)."
            )
        return frame


@dataclass(eq=False)
class Carried:
    """A place for one tensor within one forward pass; `points.carried(name)` gives it."""

    context: Context
    want: Want

    def put(self, tensor: Tensor) -> None:
        """Leave a tensor for later ops of this adapter; its rows are those of the op that puts it."""
        self._held()[self.want.owner, self.want.name] = tensor

    def get(self, like: Tensor | None = None) -> Tensor | None:
        """What was put last in this forward pass, None if nothing was; with `like` in its rows (an image's windows).

        Raises:
            ContextError: outside of a forward pass, or rows that cannot be those of `like`.
        """
        tensor = self._held().get((self.want.owner, self.want.name))
        if tensor is None or like is None or like.shape[0] == tensor.shape[0]:
            return tensor
        times = like.shape[0] // tensor.shape[0]
        if not self.want.windows or times * tensor.shape[0] != like.shape[0]:
            raise ContextError(
                f"'{self.want.owner}' carries '{self.want.name}' with {tensor.shape[0]} rows to a place with {like.shape[0]}."
            )
        return tensor.repeat_interleave(times, dim=0)

    def take(self) -> Tensor | None:
        """As `get()`, and nothing is left there."""
        return self._held().pop((self.want.owner, self.want.name), None)

    def _held(self) -> dict[tuple[str, str], Tensor]:
        frame = self.context.frame
        if frame is None:
            raise ContextError(f"'{self.want.owner}' carries '{self.want.name}' outside of a forward pass.")
        return frame.carried


def spread(want: Want, value: Tensor, like: Tensor) -> Tensor:
    """`value` (n, ...) of n samples for the rows of `like`: itself, or once for each window of its image.

    Raises:
        ContextError: the rows are not those of samples.
    """
    count = like.shape[0]
    if count != value.shape[0]:
        times = count // value.shape[0] if value.shape[0] else 0
        if not want.windows or times * value.shape[0] != count:
            raise ContextError(
                f"'{want.owner}' wants '{want.name}' for {count} rows, and {value.shape[0]} samples have one: what "
                "passes there are not samples of the batch (texts of classes, tokens shared by all). Leave the point out of "
                "its targets."
            )
        value = value.repeat_interleave(times, dim=0)
    return value.to(like.dtype) if value.is_floating_point() and like.is_floating_point() else value


# -- making a frame -------------------------------------------------------------------------------------------------------


def batch_of(inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first tensor among a call's inputs, dicts of tensors included: its rows are the samples."""
    given = (each for x in (*inputs, *kwargs.values()) for each in (x.values() if isinstance(x, Mapping) else (x,)))
    return next((x for x in given if isinstance(x, Tensor) and x.dim()), None)


def make_frame(
    wants: Sequence[Want],
    given: Mapping[str, Any],
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    device: torch.device,
    rows: Mapping[str, Tensor] | None = None,
) -> Frame | None:
    """The frame of a forward pass; None if the adapters that run want nothing.

    Args:
        wants: of the adapters that run.
        given: values by name; those that nobody wants are left alone.
        inputs: the call's, and its keywords.
        rows: the samples that each adapter serves; None: all serve all.

    Raises:
        ContextError: a value that is missing, or has another length than the batch.
        UnknownNameError: a value that is none of the choices.
    """
    if not wants:
        return None
    first = batch_of(inputs, kwargs)
    frame = Frame({})
    for want in wants:
        if want.per == "forward":
            frame.carries = True
            continue
        if want.made is not None:  # made as soon as the other values are there
            continue
        value = _input(want, inputs, kwargs) if want.of_inputs else given.get(want.name)
        if value is None:
            if want.required:
                raise ContextError(_missing(want))
            continue
        if want.per == "sample" and first is None:
            raise ContextError(
                f"'{want.owner}' needs '{want.name}' for each sample, and the call has no tensor of samples."
            )
        index = None if rows is None else rows[want.owner]
        if want.per == "sample":
            assert first is not None
            value = _per_sample(want, value, first.shape[0], device)
            value = value if index is None else value.index_select(0, index)
            frame.per_sample = True
        else:
            value = _per_batch(want, value, device, None if first is None else first.shape[0], index)
        frame.values[want.owner, want.name] = value
    return frame


def check_names(given: Mapping[str, Any], wants: Sequence[Want]) -> None:
    """Raise UnknownNameError for a value that no attached adapter would read, ContextError for what is no dict."""
    if not isinstance(given, Mapping):
        raise ContextError(f"context is {type(given).__name__}; expected a dict of values by name, {{'task': ...}}.")
    known = {w.name for w in wants if w.per in PER and not w.of_inputs}
    for name in given:
        if name not in known:
            raise UnknownNameError(
                f"no adapter of this model reads a context value '{name}'. {nearest(name, known)} model.wanted tells what is "
                "read."
            )


def _missing(want: Want) -> str:
    each = "one for each sample" if want.per == "sample" else "one for the batch"
    among = f"; known: {', '.join(want.choices)}" if want.choices else ""
    how = "the call has no such input" if want.of_inputs else f"give it by {GIVE.format(want.name)}"
    return f"'{want.owner}' needs '{want.name}' ({each}{among}), and there is none: {how}."


def _input(want: Want, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """`inputs` is the first tensor of the call, `inputs.1` its second argument, `inputs.mask` the keyword `mask`."""
    if want.name == "inputs":
        return batch_of(inputs, kwargs)
    key = want.name.partition(".")[2]
    if key.isdigit():
        return inputs[int(key)] if int(key) < len(inputs) else None
    return kwargs.get(key)


def _per_sample(want: Want, value: Any, batch: int, device: torch.device) -> Tensor:
    """(B, ...) on the device; one value alone is that of every sample, a name becomes its number among the choices."""
    if isinstance(value, str):
        value = [value] * batch
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, str) for v in value):
        if not want.choices:
            raise ContextError(f"'{want.name}' is a number or tensor for each sample to '{want.owner}', not a name.")
        value = [want.choices.index(_choice(want, v)) for v in value]
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, Tensor) for v in value):
        value = torch.stack(list(value))
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise ContextError(
                f"'{want.name}' for '{want.owner}' is a {type(value).__name__}; expected a tensor or list of {batch} values, one "
                "for each sample."
            ) from None
    if value.dim() == 0:
        value = value.expand(batch)
    if value.shape[0] != batch:
        raise ContextError(
            f"'{want.name}' for '{want.owner}' has {value.shape[0]} values for a batch of {batch}; give one for each sample."
        )
    return value.to(device)


def _per_batch(want: Want, value: Any, device: torch.device, batch: int | None, index: Tensor | None) -> Any:
    """One value; of a list with one name for each sample, the one that all samples of this adapter share."""
    if want.choices:
        if isinstance(value, (list, tuple)):
            if batch is None or len(value) != batch:
                raise ContextError(
                    f"'{want.name}' for '{want.owner}' has {len(value)} names for a batch of {batch}; give one for the batch, or "
                    "one for each sample."
                )
            mine = value if index is None else [value[i] for i in index.tolist()]
            if len(set(mine)) != 1:
                names = ", ".join(sorted(set(mine)))
                raise ContextError(
                    f"'{want.owner}' takes one '{want.name}' for all its samples of a batch, and got {names}. "
                    "Give each a batch of its own."
                )
            value = mine[0]
        return _choice(want, value)
    return value.to(device) if isinstance(value, Tensor) else value


def _choice(want: Want, value: Any) -> str:
    if value not in want.choices:
        raise UnknownNameError(f"'{want.owner}' knows no {want.name} '{value}'. {nearest(str(value), want.choices)}")
    return str(value)


def make_want(
    owner: str, name: str, per: str, required: bool, choices: Sequence[str], example: Any, windows: bool
) -> Want:
    """Checked, as `points.context` was called.

    Raises:
        ConfigError: a name that is none, or a `per` that does not exist.
    """
    if per not in (*PER, "forward"):
        raise ConfigError(f"'{owner}': per is '{per}'; expected one of {', '.join(PER)}.")
    if not all(part.isidentifier() or part.isdigit() for part in name.split(".")) or (
        "." in name and not name.startswith("inputs.")
    ):
        raise ConfigError(
            f"'{owner}': '{name}' cannot name a context value; use an identifier, or inputs.<position or keyword>."
        )
    want = Want(owner, name, per, required, tuple(choices), example, windows)
    if want.of_inputs and per == "batch":
        raise ConfigError(f"'{owner}': the model's inputs are values per sample.")
    return want
