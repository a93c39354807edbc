"""Memory: keep for backward only what cannot be given back, with exact gradients.

Autograd keeps the inputs of every operation whose backward needs them. Behind a frozen backbone many of them are the output
of an elementwise function of a tensor that is kept anyway: a LoRA on `mlp.down` keeps GELU(h) although GELU's own
backward already keeps h; a LoRA on q keeps LayerNorm(x) although LayerNorm keeps x. `Saver` notices such tensors when
autograd packs them and keeps a `Recipe` (the function and its inputs) instead; unpacking runs the same function on the
same tensors, so gradients are equal to the bit.

Settings (`model.memory`):

- "off": everything is kept that torch keeps, and no hook on saved tensors is installed.
- "default": outputs of norms, activations and the adapters' own elementwise steps are recomputed.
- "low": also the up-projection of each MLP and its gate, a third of the block's matrix products, whose output is the largest
  tensor.
- "min": blocks are checkpointed: only their inputs are kept.

Under `torch.compile` nothing of this is active: the compiler's partitioner makes the same trade by itself. Nor is it inside of
`zoo.second_order` and of torch's function transforms, which know no such hooks (`zoo.engine.second_order`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.engine.second_order import exact

MEMORY_SETTINGS = ("default", "low", "min", "off")

_recording: Saver | None = None  # the saver of the model whose forward runs now


class Recipe:
    """A tensor that is not kept: the function that gives it back, and that function's inputs (tensors or recipes)."""

    __slots__ = ("autocast", "fn", "inputs", "pending", "value")

    def __init__(
        self, fn: Callable[..., Tensor], inputs: tuple[Any, ...], autocast: tuple[str, bool, torch.dtype]
    ) -> None:
        self.fn = fn
        self.inputs = inputs
        self.autocast = autocast
        self.pending = 0  # how often autograd will still ask
        self.value: Tensor | None = None

    def compute(self) -> Tensor:
        """The tensor, computed anew unless a later user of it already asked."""
        if self.value is not None:
            return self.value
        device, enabled, dtype = self.autocast
        with torch.no_grad(), torch.autocast(device, dtype, enabled=enabled):
            value = self.fn(*(i.compute() if isinstance(i, Recipe) else i for i in self.inputs))
        if self.pending > 0:
            self.value = value
        return value

    def tensors(self) -> Iterable[Tensor]:
        """What this recipe keeps alive."""
        for item in self.inputs:
            if isinstance(item, Recipe):
                yield from item.tensors()
            elif isinstance(item, Tensor):
                yield item


def _view(whole: Tensor, size: torch.Size, stride: tuple[int, ...], offset: int) -> Tensor:
    return whole.as_strided(size, stride, whole.storage_offset() + offset)


class _Packed:
    """One reference that autograd holds to a recipe: a view of its tensor."""

    __slots__ = ("offset", "recipe", "size", "stride")

    def __init__(self, recipe: Recipe, tensor: Tensor, offset: int) -> None:
        self.recipe = recipe
        self.size, self.stride, self.offset = tensor.size(), tensor.stride(), offset
        recipe.pending += 1

    def unpack(self) -> Tensor:
        self.recipe.pending -= 1
        value = self.recipe.compute()
        if self.recipe.pending <= 0:
            self.recipe.value = None
        return value.as_strided(self.size, self.stride, value.storage_offset() + self.offset)


class _Entry:
    __slots__ = ("offset", "recipe", "ref", "stride", "version")

    def __init__(self, tensor: Tensor, recipe: Recipe, ref: weakref.ref[Tensor]) -> None:
        self.recipe, self.ref = recipe, ref
        self.version, self.stride, self.offset = tensor._version, tensor.stride(), int(tensor.storage_offset())


class Saver:
    """Watches what autograd packs during one forward pass. `with saver.record(): ...`"""

    def __init__(self) -> None:
        self.recording = False
        self.off = False  # memory="off"
        self._entries: dict[int, _Entry] = {}
        self._autocast: tuple[str, bool, torch.dtype] = ("cpu", False, torch.bfloat16)
        self._regions = False  # whether the device has such regions
        self._counted: dict[int, int] | None = None
        self._ignored: set[int] = set()

    def record(self, device: torch.device) -> _Recording:
        """A context in which tensors that can be given back are not kept. `device` is where the model runs."""
        return _Recording(self, device)

    def note(self, output: Tensor, fn: Callable[..., Tensor], inputs: tuple[Any, ...], constant: bool = False) -> None:
        """`output` is `fn(*inputs)` and need not be kept, if the inputs are. `fn` must be deterministic."""
        if not self.recording or not isinstance(output, Tensor) or not (output.requires_grad or constant):
            return
        held = tuple(self._find(i) or i.detach() if isinstance(i, Tensor) else i for i in inputs)
        key = output.untyped_storage().data_ptr()
        entries = self._entries

        def forget(_: Any, key: int = key) -> None:
            entries.pop(key, None)

        entries[key] = _Entry(output, Recipe(fn, held, self._precision()), weakref.ref(output, forget))

    def _precision(self) -> tuple[str, bool, torch.dtype]:
        """Of products here: adapters of a half-precision backbone run in a region of their own."""
        device = self._autocast[0]
        if not self._regions:
            return self._autocast
        return (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor can be given back already."""
        return self._find(tensor) is not None

    def _find(self, tensor: Tensor) -> Recipe | None:
        """The recipe of a tensor that is the output of one, or a view of it: half of a fused projection, say.

        A recipe that held the view itself would keep the storage of the whole.
        """
        entry = self._entries.get(tensor.untyped_storage().data_ptr()) if tensor.layout == torch.strided else None
        if entry is None or entry.version != tensor._version:
            return None
        source = entry.ref()
        if source is None or source.dtype != tensor.dtype:
            return None
        offset = int(tensor.storage_offset()) - entry.offset
        if offset == 0 and source.shape == tensor.shape and source.stride() == tensor.stride():
            return entry.recipe
        return Recipe(_view, (entry.recipe, tensor.size(), tensor.stride(), offset), self._autocast)

    def _pack(self, tensor: Tensor) -> Any:
        if _foreign(tensor):
            return tensor
        entry = self._entries.get(tensor.untyped_storage().data_ptr()) if tensor.layout == torch.strided else None
        if entry is not None and entry.version == tensor._version:
            source = entry.ref()
            if source is not None and source.dtype == tensor.dtype:
                packed = _Packed(entry.recipe, tensor, int(tensor.storage_offset()) - entry.offset)
                if self._counted is not None:
                    for kept in entry.recipe.tensors():
                        self._count(kept)
                return packed
        if self._counted is not None:
            self._count(tensor)
        # The tensor itself, where it is the output of the node that saves it, would be a circle through autograd that no
        # collector sees: every forward pass without a backward would stay in memory for good.
        return tensor.detach()

    def _unpack(self, packed: Any) -> Tensor:
        return packed.unpack() if isinstance(packed, _Packed) else packed

    # -- counting ---------------------------------------------------------------------------------------------------

    def _count(self, tensor: Tensor) -> None:
        assert self._counted is not None
        for part in _storages(tensor):
            if part.data_ptr() not in self._ignored:
                self._counted[part.data_ptr()] = part.nbytes()

    def count(self, run: Callable[[], Any], ignore: Iterable[Tensor]) -> int:
        """Bytes of the distinct storages that `run()` keeps for backward; `ignore`: parameters, buffers and the batch."""
        self._ignored = {s.data_ptr() for t in ignore for s in _storages(t)}
        self._counted = {}
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                result = run()  # kept until the count is done: freed storages could be used twice
            total = sum(self._counted.values())
            del result
        finally:
            self._counted = None
            self._ignored = set()
        return total


class _Recording:
    def __init__(self, saver: Saver, device: torch.device) -> None:
        self._saver, self._device = saver, device.type
        self._hooks: Any = None

    def __enter__(self) -> None:
        saver = self._saver
        if saver.off or not torch.is_grad_enabled() or saver.recording or self._device == "meta" or exact():
            return
        saver._regions = torch.amp.is_autocast_available(self._device)
        if saver._regions:
            enabled, dtype = torch.is_autocast_enabled(self._device), torch.get_autocast_dtype(self._device)
            saver._autocast = (self._device, enabled, dtype)
        global _recording
        _recording = saver
        saver.recording = True
        self._hooks = torch.autograd.graph.saved_tensors_hooks(saver._pack, saver._unpack)
        self._hooks.__enter__()

    def __exit__(self, *exc: Any) -> None:
        if self._hooks is not None:
            self._hooks.__exit__(*exc)
            global _recording
            _recording = None
            self._saver.recording = False
            self._saver._entries.clear()


def _foreign(tensor: Tensor) -> bool:
    """Whether it is a frozen weight that torchao has quantised: several tensors in one, without memory of its own."""
    return type(tensor).__module__.startswith("torchao.") or type(tensor.data).__module__.startswith("torchao.")


def _storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    if _foreign(tensor):
        return []
    if tensor.layout == torch.strided:
        return [tensor.untyped_storage()]
    return [tensor.values().untyped_storage(), tensor.indices().untyped_storage()]


def in_backward() -> bool:
    """Whether what runs now is computed once more for a backward pass (or belongs to one)."""
    return torch._C._current_graph_task_id() != -1


def saved_bytes(run: Callable[[], Any], ignore: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward of any torch code: the sum of distinct storages.

    `run` makes a forward pass and returns its outputs; `ignore` lists what exists anyway (parameters, buffers, inputs).
    The count is deterministic. Code that enters saved-tensor hooks of its own (such as a `zoo.Model`) must be counted
    by its own `saved_bytes`, since only the innermost hooks see a tensor.
    """
    return Saver().count(run, ignore)


def recomputable(fn: Callable[..., Tensor], *inputs: Any, constant: bool = False) -> Tensor:
    """`fn(*inputs)`, whose result is recomputed in backward instead of kept. For the elementwise steps of adapters.

    `fn` must be deterministic, and its tensor inputs must be kept anyway, or be recomputable themselves. `constant=True` is
    for a result that carries no gradient but that an operation with one keeps, such as an attention bias.
    """
    output = fn(*inputs)
    if not torch.compiler.is_compiling() and _recording is not None:
        _recording.note(output, fn, inputs, constant)
    return output


def dropped(x: Tensor, drop: nn.Dropout) -> Tensor:
    """`drop(x)`, for which backward keeps one byte for each value instead of the values and their factors."""
    if drop.p == 0 or not drop.training:
        return x
    keep = torch.rand_like(x, dtype=torch.float32) >= drop.p
    return recomputable(_masked, x, keep, drop.p)


def _masked(x: Tensor, keep: Tensor, p: float) -> Tensor:
    return x * keep / (1 - p)


def state_of(tensors: list[Tensor]) -> Any:
    """Identity, address and version of tensors, and the precision of products; None where these cannot be told."""
    if not tensors:
        return None
    try:
        device = tensors[0].device.type
        precision = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        return (precision, [(id(t), t.data_ptr(), t._version) for t in tensors])
    except RuntimeError:  # made in inference mode, or wrapped by a functional transform
        return None
