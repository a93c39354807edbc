"""Structure that changes: parameters of an adapter that are resized, grown or dropped, also in the middle of a fit.

One call changes everything that hangs on a parameter: the registered parameter itself, its place in the optimizer with the
matching rows of its state, its schedule, and the adapter's `plan`, in which every change stands as `{"structure": {name:
shape}}` (None: dropped). The plan goes wherever the adapter goes (a file, a copy, a checkpoint), and attaching makes those
shapes again; so neither saving nor resuming needs anything from a method that changes its structure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from zoo.errors import CombinationError, ConfigError, MismatchError, nearest

__all__ = ["Structured", "Training"]

KEY = "structure"  # of `plan`


class Training(Protocol):
    """The optimizer service (`zoo.train.OptimizerService`), as an adapter sees it."""

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by the names of `model.parameters_to_train()`."""

    def settings(self, parameter: str) -> dict[str, Any]:
        """Learning-rate multiplier and weight decay of a parameter, as `add` takes them."""

    @property
    def add(self) -> Callable[..., None]:
        """Train these from now on, with a schedule that begins now."""

    def drop(self, chosen: str) -> None:
        """Train these no longer."""

    def replace(self, old: str, new: nn.Parameter, *, keep: Any = None, place: Any = None) -> None:
        """Another parameter in the place of one, with the matching part of its state."""

    def reduce(self, values: Tensor) -> Tensor:
        """The sum over the processes that train together."""

    @property
    def parts(self) -> int:
        """In how many a batch comes: accumulated ones, times the processes that train together."""

    @property
    def factor(self) -> float:
        """What the gradients of this step were multiplied by since backward."""


class _Link:
    """The fit in progress. Not copied with an adapter: a copied model is in no fit."""

    def __init__(self) -> None:
        self.service: Training | None = None
        self.changer: str | None = None  # who changes this adapter's structure in this fit

    def __deepcopy__(self, memo: dict[int, Any]) -> _Link:
        return _Link()


class Structured(nn.Module):
    """Base of `Adapter`: parameters by their names in the adapter (`blocks.3.attn.q.lora_a`), whose shapes may change."""

    name: str
    method: ClassVar[str]
    plan: dict[str, Any] | None
    stand_ins: set[str]

    def _init_structure(self) -> None:
        self.name = ""  # under which a model holds it; set when it is attached
        self.stand_ins = set()  # parameters that stand in for ones of the backbone: their shapes are not ours
        # Parameters whose entries this step has put into another order (where each stood before, -1: it is new), with the
        # state of the optimizer: for what else follows them entry by entry
        self.rearranged: dict[str, Tensor] = {}
        self._link = _Link()

    @property
    def training_service(self) -> Training | None:
        """The optimizer service while a fit is in progress."""
        return self._link.service

    def join(self, service: Training | None) -> None:
        """A fit begins (its optimizer service), or is over (None). `zoo.train.Hooks` calls it."""
        self._link = _Link()
        self._link.service = service

    # -- what a method calls ----------------------------------------------------------------------------------------

    def resize(
        self,
        name: str,
        *,
        keep: Tensor | Iterable[int] | None = None,
        rows: int | None = None,
        dim: int = 0,
        new: Tensor | None = None,
        by: str | None = None,
    ) -> nn.Parameter:
        """Give a parameter fewer or more rows, with its optimizer state; returns the parameter that is there now.

        Args:
            name: in this adapter, such as "blocks.3.attn.q.lora_a".
            keep: indices along `dim` that stay, in their new order, or a mask; None keeps all.
            rows: how many there are afterwards. Those behind the kept ones are `new` (zeros by default), and the
                optimizer knows nothing of them yet.
            by: who asks, if it is not this adapter itself.

        Raises:
            ConfigError: no such parameter, fewer than one row, rows that do not exist or do not fit; nothing is changed.
            CombinationError: another method changes this adapter's structure in this fit.
        """
        who = self._claim(by)
        old = self._named(name)
        if not -old.ndim <= dim < old.ndim:
            raise ConfigError(f"'{self._full(name)}' has {old.ndim} dimensions; there is no dim={dim}.")
        dim %= old.ndim
        length = old.shape[dim]
        chosen = (
            torch.arange(length) if keep is None else keep if isinstance(keep, Tensor) else torch.tensor(list(keep))
        )
        if chosen.is_floating_point() and chosen.numel():
            raise ConfigError(f"'{self._full(name)}': keep= are whole numbers or a mask, not {chosen.dtype}.")
        if chosen.dtype == torch.bool and chosen.shape != (length,):
            raise ConfigError(
                f"'{self._full(name)}' has {length} rows along dim {dim}; the mask has {tuple(chosen.shape)}."
            )
        index = (chosen.nonzero() if chosen.dtype == torch.bool else chosen.long()).reshape(-1).cpu()
        count = len(index) if rows is None else rows
        if count < 1:
            raise ConfigError(
                f"'{self._full(name)}' would be resized to {count} rows; at least 1 must stay. "
                "To take a parameter away, call drop."
            )
        if not all(0 <= i < length for i in index.tolist()):
            raise ConfigError(
                f"'{self._full(name)}' has {length} rows along dim {dim}; keep= names {index.tolist()}, which do not all exist."
            )
        if count < len(index):
            raise ConfigError(f"'{self._full(name)}': rows={count} is less than the {len(index)} rows of keep=.")
        shape = [*old.shape[:dim], count, *old.shape[dim + 1 :]]
        fresh = [*old.shape[:dim], count - len(index), *old.shape[dim + 1 :]]
        if new is not None and list(new.shape) != fresh:
            raise ConfigError(f"'{self._full(name)}': new= has shape {tuple(new.shape)}; expected {tuple(fresh)}.")
        index = index.to(old.device)

        def rows_of(tensor: Tensor, added: Tensor | None) -> Tensor:
            kept = tensor.detach().index_select(dim, index)
            if not fresh[dim]:
                return kept
            return torch.cat([kept, tensor.new_zeros(fresh) if added is None else added.detach().to(tensor)], dim)

        made = nn.Parameter(rows_of(old, new), requires_grad=old.requires_grad)
        if old.grad is not None:  # the step is under way
            made.grad = rows_of(old.grad, None)
        front = (slice(None),) * dim
        service = self._link.service
        if service is not None and self._full(name) in service.parameters:
            place = (*front, slice(0, len(index))) if fresh[dim] else None
            service.replace(self._full(name), made, keep=(*front, index), place=place)
        self._set(name, made)
        self._note(name, shape, who)
        return made

    def grow(
        self, name: str, value: Tensor, *, like: str | None = None, by: str | None = None, **settings: Any
    ) -> nn.Parameter:
        """A further parameter, trained from now on with a schedule that begins now.

        Args:
            name: in this adapter; the module that it stands in must be there.
            like: the parameter whose learning rate and weight decay it gets; by default the first of this adapter.
            settings: further arguments of `OptimizerService.add` (lr_scale, weight_decay, warmup ...).

        Raises:
            ConfigError: the name is taken, or has no place; nothing is changed.
            CombinationError: another method changes this adapter's structure in this fit.
        """
        who = self._claim(by)
        parent, last = self._place(name)
        if parent._parameters.get(last) is not None or last in parent._modules:
            raise ConfigError(f"'{self._full(name)}' is there already; resize it, or grow another name.")
        if value.numel() < 1:
            raise ConfigError(
                f"'{self._full(name)}' would be empty, {tuple(value.shape)}; at least 1 row must be there."
            )
        near = next(self.parameters(), value)
        made = nn.Parameter(value.detach().to(near).clone())
        service = self._link.service
        if service is not None:
            mine = [n for n in service.parameters if n.startswith(f"{self.name}/")]
            if like is not None and self._full(like) not in mine:
                raise ConfigError(f"'{self._full(like)}' is not trained. {nearest(self._full(like), mine)}")
            model_of = self._full(like) if like is not None else next(iter(mine), None)
            found = service.settings(model_of) if model_of is not None else {}
            service.add({self._full(name): made}, **{**found, **settings})
        self._set(name, made)
        self._note(name, list(made.shape), who)
        return made

    def drop(self, *names: str, by: str | None = None) -> None:
        """Take parameters away, from the optimizer too. Their attributes are None from now on.

        Raises:
            ConfigError: no such parameter; nothing is changed.
            CombinationError: another method changes this adapter's structure in this fit.
        """
        who = self._claim(by)
        for name in names:
            self._named(name)
        for name in names:
            self._forget(name)
            self._set(name, None)
            self._note(name, None, who)

    # -- what the house calls ---------------------------------------------------------------------------------------

    def restructure(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Make the shapes that `plan` names, as after attaching; or those of `tensors`, by the names of parameters.

        New values are zeros: they are filled from a file or a checkpoint. A change takes the optimizer's state away.

        Raises:
            MismatchError: the structure does not belong to this adapter.
        """
        changes = {n: None if s is None else tuple(s) for n, s in self._structure().items()}
        if tensors is not None:
            mine = {n: p for n, p in self.named_parameters() if n not in self.stand_ins}
            for name in [*mine, *changes]:
                changes[name] = tuple(tensors[name].shape) if name in tensors else None
        for name, shape in changes.items():
            try:
                parent, last = self._place(name)
            except ConfigError as error:
                raise MismatchError(
                    f"The plan of '{self.method}' changes '{name}', which it has not here: {error}"
                ) from error
            held = parent._parameters.get(last)
            if shape is not None and held is not None and tuple(held.shape) == shape:
                continue
            if name in self.stand_ins or (held is not None and shape is not None and len(shape) != held.ndim):
                raise MismatchError(
                    f"The plan of '{self.method}' gives '{name}' the shape {shape}; here it has {tuple(held.shape)}. "  # type: ignore[union-attr]
                    "It was made for another backbone, or was changed."
                )
            self._forget(name)
            near = held if held is not None else next(self.parameters(), torch.zeros(1))
            self._set(name, None if shape is None else nn.Parameter(near.new_zeros(shape)))

    def check_structure(self, tensors: Mapping[str, Tensor]) -> None:
        """Before shapes are made: a file's plan must name those of its tensors. Raises MismatchError."""
        for name, shape in self._structure().items():
            found = list(tensors[name].shape) if name in tensors else None
            if found != (None if shape is None else list(shape)):
                raise MismatchError(
                    f"The plan of '{self.method}' gives '{name}' the shape {shape}, the file holds {found}. It was changed: load "
                    "it as it was saved."
                )

    def _structure(self) -> dict[str, list[int] | None]:
        found = (self.plan or {}).get(KEY) or {}
        if not isinstance(found, dict) or not all(s is None or _is_shape(s) for s in found.values()):
            raise MismatchError(
                f"The plan of '{self.method}' names shapes that are none: {found!r:.200}. Load it as it was saved."
            )
        return found

    # -- inside -----------------------------------------------------------------------------------------------------

    def _full(self, name: str) -> str:
        return f"{self.name or self.method}/{name}"

    def _claim(self, by: str | None) -> str:
        """Who asks; one method alone changes an adapter's structure in a fit."""
        who = by or self.name or self.method
        if self._link.changer not in (None, who):
            raise CombinationError(
                f"'{who}' and '{self._link.changer}' would both change the structure of '{self.name or self.method}' in one fit. "
                "Use one of them."
            )
        return who

    def _place(self, name: str) -> tuple[nn.Module, str]:
        path, _, last = name.rpartition(".")
        try:
            return self.get_submodule(path), last
        except AttributeError as error:
            places = [n for n, _ in self.named_parameters()]
            raise ConfigError(f"'{self.name or self.method}' has no place '{path}'. {nearest(name, places)}") from error

    def _named(self, name: str) -> nn.Parameter:
        parent, last = self._place(name)
        found = parent._parameters.get(last)
        if found is None:
            known = [n for n, _ in self.named_parameters()]
            raise ConfigError(f"'{self.name or self.method}' has no parameter '{name}'. {nearest(name, known)}")
        if name in self.stand_ins:
            raise ConfigError(
                f"'{self._full(name)}' stands in for a parameter of the backbone, so its shape is the backbone's. "
                "Only what the adapter adds can be resized."
            )
        return found

    def _set(self, name: str, value: nn.Parameter | None) -> None:
        parent, last = self._place(name)
        if isinstance(parent, nn.ParameterList) and value is not None and last == str(len(parent)):
            parent.append(value)
        else:
            parent.register_parameter(last, value)

    def _forget(self, name: str) -> None:
        service = self._link.service
        if service is not None and self._full(name) in service.parameters:
            service.drop(self._full(name))

    def _note(self, name: str, shape: list[int] | None, who: str) -> None:
        self._link.changer = who
        plan = self.plan or {}
        self.plan = {**plan, KEY: {**plan.get(KEY, {}), name: shape}}


def _is_shape(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(type(n) is int and n >= 1 for n in value)
