"""The processes that train together (`accelerate launch`, `torchrun`), or the only one.

`accelerate` finds out the device and joins the processes. Gradients are summed here rather than by
DistributedDataParallel: what a parameter-efficient method trains is small (a few MB), so there is nothing to gain from
overlapping, and methods may add, drop, freeze or leave unused any parameter at any step, on some processes only.
"""

from __future__ import annotations

import atexit
import hashlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zoo.errors import ConfigError, MismatchError

if TYPE_CHECKING:
    from torch.nn import Parameter

__all__ = ["Processes"]

BUCKET_BYTES = 64 << 20


class Processes:
    """This process (`rank` of `world`) and the device it trains on.

    Args:
        device: where to train; None: where the model is if that is an accelerator, else what accelerate chooses.
        model: the model, for its present device.
    """

    def __init__(self, device: str | torch.device | None = None, model: nn.Module | None = None) -> None:
        from accelerate import PartialState

        wanted = torch.device(device) if device is not None else None
        if wanted is not None and wanted.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                f"device={str(device)!r}, but torch sees no CUDA GPU here. Leave device out, or pass 'cpu'."
            )
        accelerator = torch.accelerator.is_available() if hasattr(torch, "accelerator") else torch.cuda.is_available()
        flag = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "t", "on")
        on_cpu = flag or not accelerator or (wanted is not None and wanted.type == "cpu")
        before = dist.is_available() and dist.is_initialized()
        state = PartialState(cpu=on_cpu)
        # A script that made its own PartialState on a machine without GPU is told of one process though there are more.
        joined = dist.is_available() and dist.is_initialized()
        if joined and not before and dist.get_backend() == "gloo":
            atexit.register(_leave)  # its threads must end before the interpreter does, or it aborts
        self.rank = dist.get_rank() if joined else 0
        self.world = dist.get_world_size() if joined else 1
        self.main = self.rank == 0
        own = next((p.device for p in model.parameters()), None) if model is not None else None
        if wanted is not None and not (self.world > 1 and wanted.type == "cuda" and wanted.index is None):
            self.device = wanted
        elif self.world == 1 and own is not None and own.type not in ("cpu", "meta"):
            self.device = own
        else:
            self.device = torch.device("cpu") if on_cpu else state.device

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def add(self, values: Tensor) -> Tensor:
        """Sum over processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def add_gradients(self, parameters: Sequence[Parameter], totals: Tensor) -> None:
        """Sum the gradients and `totals` (float64) over processes, in place.

        A gradient that no process has stays None; one that only some have counts as zero on the others.
        """
        if self.world == 1:
            return
        there = totals.new_tensor([p.grad is not None for p in parameters])
        message = torch.cat([totals, there])
        dist.all_reduce(message)
        totals.copy_(message[: len(totals)])
        used = [p for p, n in zip(parameters, message[len(totals) :].tolist(), strict=True) if n > 0]
        bucket: list[Parameter] = []
        size = 0
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter)
            size += 4 * parameter.numel()
            if size > BUCKET_BYTES:
                _add_bucket(bucket)
                bucket, size = [], 0
        if bucket:
            _add_bucket(bucket)

    def share_module(self, module: nn.Module) -> None:
        """Give every process the parameters and buffers of process 0.

        Raises:
            MismatchError: the processes built different models.
        """
        if self.world == 1:
            return
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.same(repr([(n, tuple(t.shape), str(t.dtype)) for n, t in tensors.items()]), "models")
        with torch.no_grad():
            for tensor in tensors.values():
                if tensor.is_contiguous():
                    dist.broadcast(tensor.data, 0)
                else:
                    copy = tensor.data.contiguous()
                    dist.broadcast(copy, 0)
                    tensor.data.copy_(copy)

    def same(self, text: str, what: str) -> None:
        """Raise MismatchError on every process unless `text` is equal on all."""
        if self.world == 1:
            return
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "little")
        values = torch.zeros(self.world, dtype=torch.int64, device=self.device)
        values[self.rank] = number
        if len(set(self.add(values).tolist())) > 1:
            raise MismatchError(
                f"The {self.world} processes have different {what}. Each must build the same model, data and settings; "
                "pass seed=... to zoo.load, and let every process see the same files."
            )


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _add_bucket(parameters: Sequence[Parameter]) -> None:
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1).float() for g in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
