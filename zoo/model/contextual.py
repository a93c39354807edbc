"""The part of a model that hands values to its adapters' ops for the time of a forward pass (`zoo.engine.context`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from zoo.engine.context import PER, Want, batch_of, check_names, make_frame
from zoo.model.attaching import AdapterHost

__all__ = ["Contextual"]


class Contextual(AdapterHost):
    """Base of `Model`."""

    @contextmanager
    def context(self, **values: Any) -> Iterator[None]:
        """Values for every forward pass inside: `with model.context(task="birds"): ...`; an inner one goes before an outer one.

        A value is one for the batch, or one for each sample (a tensor or list of B), as the adapter that reads it wants.

        Raises:
            UnknownNameError: no attached adapter reads a value of this name (`model.wanted`).
        """
        check_names(values, self._all_wants())
        context = self._state.context
        before = context.given
        context.given = {**before, **values}
        try:
            yield
        finally:
            context.given = before

    @property
    def wanted(self) -> dict[str, tuple[str, ...]]:
        """Names of the context values that attached adapters read, each with these adapters."""
        found: dict[str, tuple[str, ...]] = {}
        for want in self._all_wants():
            if want.per in PER and not want.of_inputs:
                found[want.name] = (*found.get(want.name, ()), want.owner)
        return found

    def example_context(self, *inputs: Any, **kwargs: Any) -> dict[str, Any]:
        """Values that the active adapters name as examples, for inputs like these: what `probe` and tables call the model with.

        An example may be a function of the number of samples, or, if it has the attribute `of_inputs`, of the first input.
        """
        first = batch_of(inputs, kwargs)
        count = 0 if first is None else first.shape[0]
        wants = [w for n in self._state.active for w in self._wants.get(n, ())]
        examples = {w.name: _example(w.example, first, count) for w in wants}
        return {name: value for name, value in examples.items() if value is not None}

    def train(self, mode: bool = True) -> Contextual:
        """As torch's; what generators made for evaluation is forgotten."""
        super().train(mode)
        for wants in self._wants.values():
            for want in wants:
                if want.made is not None:
                    want.made.forget()
        return self

    def passing(self, run: Callable[[], Any], *inputs: Any, **kwargs: Any) -> Any:
        """`run()`, in which a library calls the backbone by itself (text generation), as one forward pass over these inputs.

        Raises:
            ContextError: a value that an active adapter needs is missing.
        """
        risen = self._enter()
        try:
            return self._framed(run, (), {}, call=(inputs, kwargs)) if self._needs_frame(None) else run()
        finally:
            self._state.settle(risen)

    def passing_routed(
        self, run: Callable[..., Any], names: Sequence[str | None], *inputs: Any
    ) -> list[tuple[Tensor, Any]]:
        """As `passing` of `run(*inputs)`, with the adapter of each sample: (rows, result), for the batch or each adapter."""
        from zoo.model.routing import passing_routed

        return passing_routed(self, run, names, inputs)  # type: ignore[arg-type]

    def _all_wants(self) -> list[Want]:
        return [want for wants in self._wants.values() for want in wants]

    def _needs_frame(self, context: Mapping[str, Any] | None) -> bool:
        return context is not None or bool(self._wants)

    def _framed(
        self,
        run: Callable[..., Any],
        inputs: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: Mapping[str, Any] | None = None,
        *,
        owners: Sequence[str] | None = None,
        rows: Mapping[str, Tensor] | None = None,
        call: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
    ) -> Any:
        """`run(*inputs, **kwargs)` with the values of `context` in front of those of `with model.context`.

        `owners`: the adapters that run, by default the active ones; `rows`: the samples that each serves, among those of `call`.
        """
        if context is not None:
            check_names(context, self._all_wants())
        state = self._state.context
        names = self._state.active if owners is None else owners
        wants = [want for name in names if name in self._wants for want in self._wants[name]]
        given = {**state.given, **context} if context else state.given
        args, options = (inputs, kwargs) if call is None else call
        frame = make_frame(wants, given, args, options, self.device, rows) if wants else None
        before = state.frame
        state.frame = frame
        try:
            for want in wants:
                if want.made is not None and frame is not None:
                    frame.values[want.made.key] = want.made.make()
            return run(*inputs, **kwargs)
        finally:
            state.frame = before


def _example(example: Any, first: Tensor | None, count: int) -> Any:
    if not callable(example):
        return example
    return example(first) if getattr(example, "of_inputs", False) else example(count)
