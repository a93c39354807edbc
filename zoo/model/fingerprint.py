"""A fingerprint of a backbone's weights, so that an adapter trained on others is noticed."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

SAMPLES = 64


def fingerprint(module: nn.Module) -> str | None:
    """Hash over name, shape and 64 evenly spaced values of every parameter; None on the meta device.

    It costs about a millisecond instead of reading all weights; a change of fewer values than it samples can stay
    unnoticed, other weights of the same shapes do not. Values are hashed as float16, the precision of the smallest
    published weights, so that loading in another precision up from there gives the same fingerprint.
    """
    digest = hashlib.sha256()
    parts = []
    rounded = [(name, b) for name, b in module.named_buffers() if b.dtype == torch.int8]  # weights of `zoo.quantise`
    for name, parameter in sorted([*module.named_parameters(), *rounded], key=lambda item: item[0]):
        if parameter.device.type == "meta":
            return None
        flat = parameter.detach().reshape(-1)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        parts.append(flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].to(torch.float16))
    if parts:
        digest.update(torch.cat([p.cpu() for p in parts]).numpy().tobytes())
    return "v1:" + digest.hexdigest()[:32]
