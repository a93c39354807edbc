"""ONNX files: the model as a graph for runtimes that know nothing of torch, compared with the model before it is kept."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.arguments import FLAG, MODEL, NOTHING, PATH, typed, whole
from zoo.errors import ConfigError, ContextError, MergeError, SaveError
from zoo.library import library

if TYPE_CHECKING:
    from zoo.model import Model

__all__ = ["to_onnx"]

TOLERANCE = 1e-3  # of the largest output; float32 kernels of two libraries differ by 1e-6 of it
EXTRA = "export"
ONE_FILE = 1.8e9  # bytes; a graph can hold less than 2 GiB, and larger weights lie beside it


class _Graph(nn.Module):
    """A module whose inputs are those of the model's batch, whatever the library calls them."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(*inputs)


@typed(model=MODEL, path=PATH, merged=FLAG | NOTHING, batch_size=whole(1) | NOTHING)
def to_onnx(
    model: Model, path: str | Path, *, merged: bool | None = None, batch_size: int | None = None
) -> dict[str, Any]:
    """Write the model with its active adapters and head as an ONNX file, and run that in ONNX Runtime beside the model.

    Names of the classes and of the backbone are in the file's metadata. The inputs are those of `model.example_batch()`,
    already preprocessed; sizes other than the batch's are fixed.

    Args:
        path: ends in .onnx. Weights of 1.8 GB and more lie beside it, in `<path>.data`.
        merged: the adapters folded into the weights, or the live model; by default folded where the methods can be.
        batch_size: of a graph for batches of this size only; by default they may be of any size.

    Returns:
        "out", "bytes", "merged", "batch_size" (None: any), "inputs" (name -> shape), "largest_difference" of the outputs, and
        "largest_output".

    Raises:
        MissingPackageError: onnx, onnxscript or onnxruntime are not there. MergeError: `merged=True` of a method that cannot be.
        ConfigError: the network has something that ONNX has no word for. SaveError: the file computes something else than the
        model, or cannot be written. In each case no file is there.
    """
    target = Path(path).expanduser()
    if target.suffix != ".onnx":
        raise ConfigError(f"path is '{target}'; expected a file that ends in .onnx.")
    if target.is_dir() or (target.parent.exists() and not target.parent.is_dir()):
        raise SaveError(f"'{target}' is no place for a file; name another one.")
    library("onnx", EXTRA)
    library("onnxscript", EXTRA)
    runtime = library("onnxruntime", EXTRA)
    if model.device.type == "meta":
        raise ConfigError("The model has no weights (device='meta'); load it with them.")
    if model.family.no_graph:
        raise ConfigError(f"'{model.backbone_name}' cannot be written as an ONNX graph: {model.family.no_graph}.")
    training = model.training
    model.eval()
    try:
        module, call, folded = _network(model, merged)
        program = _exported(_Graph(module, call).eval(), model, batch_size)
        program.model.metadata_props.update(
            backbone=model.backbone_name, classes=json.dumps(model.classes), adapters=json.dumps(model.active)
        )
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".onnx-") as folder:
                built = Path(folder) / target.name
                large = sum(t.nbytes for t in (*module.parameters(), *module.buffers())) > ONE_FILE
                program.save(str(built), external_data=large)
                facts = _compared(runtime, built, model, batch_size)
                written = sorted(Path(folder).iterdir(), key=lambda file: file.suffix == ".onnx")  # weights first
                facts["bytes"] = sum(file.stat().st_size for file in written)
                for file in written:
                    file.replace(target.parent / file.name)
        except OSError as error:
            if isinstance(error, SaveError):
                raise
            raise SaveError(f"Could not write '{target}': {error.strerror or error}. Nothing was written.") from error
    finally:
        model.train(training)
    return {"out": target, "merged": folded, "batch_size": batch_size, **facts}


def _network(model: Model, merged: bool | None) -> tuple[nn.Module, Callable[..., Any], bool]:
    """(module, its call, whether the adapters are folded into it)."""
    if merged is not False:
        try:
            plain = model.merge().eval()
            return plain, lambda *inputs: model.family.run(plain, *inputs), True
        except MergeError:
            if merged:
                raise
    return model, model, False


def _exported(graph: nn.Module, model: Model, batch_size: int | None) -> Any:
    batch = _batch(model, batch_size or 2, seed=0)
    dynamic = {"inputs": tuple({0: torch.export.Dim("batch")} for _ in batch)} if batch_size is None else None
    try:
        # What the exporter prints when it fails is the whole network, line by line; its error says why
        quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
        with quiet[0], quiet[1], warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of libraries, about their own insides
            return torch.onnx.export(
                graph,
                batch,
                dynamo=True,
                dynamic_shapes=dynamic,
                input_names=[f"input{i}" if i else "input" for i in range(len(batch))],
                verbose=False,
            )
    except Exception as error:  # the exporter has a class of its own for each of its steps
        why: BaseException = error
        while (deeper := why.__cause__ or why.__context__) is not None:
            why = deeper
        if isinstance(why, ContextError):
            raise _one_for_all(why) from error
        reason = next((line.strip() for line in str(why).splitlines() if line.strip()), "")[:300]
        hint = "" if batch_size else " A graph for batches of one size may do: batch_size=1 (--batch-size 1)."
        raise ConfigError(
            f"'{model.backbone_name}' cannot be written as an ONNX graph ({type(why).__name__}: {reason}).{hint}"
        ) from error


def _one_for_all(error: ContextError) -> ContextError:
    return ContextError(
        f"{error} A graph has one value for all its inputs: `with model.context(...): zoo.to_onnx(model, path)`; one for each "
        "sample goes with batches of their number only (batch_size=)."
    )


def _compared(runtime: Any, file: Path, model: Model, batch_size: int | None) -> dict[str, Any]:
    """The graph beside the model, on batches of several sizes."""
    wanted: list[tuple[tuple[Tensor, ...], list[Tensor]]] = []
    for size in (batch_size,) if batch_size else (1, 2, 3):
        batch = _batch(model, size, seed=size)
        try:
            with torch.no_grad():
                wanted.append((batch, _tensors(model(*batch))))
        except ContextError as error:
            raise _one_for_all(error) from error
    try:
        session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        inputs = session.get_inputs()
        if batch_size is None and (fixed := [i for i in inputs if i.shape and isinstance(i.shape[0], int)]):
            raise ConfigError(
                f"The graph of '{model.backbone_name}' takes batches of {fixed[0].shape[0]} only: something in it (of the "
                f"adapters {', '.join(model.active) or 'none'}, or of the network) reads how many samples there are while it is "
                "written. Ask for a graph of one size: batch_size=1 (--batch-size 1). Nothing was written."
            )
        largest, scale = 0.0, 0.0
        for batch, outputs in wanted:
            given = {i.name: x.detach().cpu().numpy() for i, x in zip(inputs, batch, strict=True)}
            for found, want in zip(session.run(None, given), outputs, strict=True):
                expected = want.detach().cpu().double()
                difference = (torch.from_numpy(found).double() - expected).abs().max()
                largest = max(largest, float(difference.nan_to_num(float("inf"))))
                scale = max(scale, float(expected.abs().max()))
    except ConfigError:
        raise
    except Exception as error:  # the runtime's errors are of its own
        reason = next(iter(str(error).splitlines()), "")[:300]
        raise ConfigError(
            f"ONNX Runtime cannot run the graph of '{model.backbone_name}' ({type(error).__name__}: {reason}). "
            "Nothing was written."
        ) from error
    if largest > TOLERANCE * max(scale, 1e-6):
        raise SaveError(
            f"The graph computes something else than the model: outputs up to {scale:.3g} differ by up to {largest:.1e}. "
            "Nothing was written."
        )
    shapes = {i.name: i.shape for i in inputs}
    return {"inputs": shapes, "largest_difference": largest, "largest_output": scale}


def _batch(model: Model, size: int, seed: int) -> tuple[Tensor, ...]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return tuple(model.example_batch(size))


def _tensors(outputs: Any) -> list[Tensor]:
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
