"""A fingerprint of a backbone's weights, so that an adapter trained on others is noticed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from zoo.engine.sharded import known_types, whole

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
        flat = whole(parameter.detach()).reshape(-1)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        parts.append(flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].to(torch.float16))
    if parts:
        digest.update(torch.cat([p.cpu() for p in parts]).numpy().tobytes())
    return "v1:" + digest.hexdigest()[:32]


# Tables of positions belong to a resolution: libraries resample them for another one
POSITIONS = re.compile(
    r"(^|[._])(abs_)?(pos(ition(al|s)?)?_?(embed(ding)?s?|enc(oding)?|table|bias(es)?)|relative_position_bias_table|rel_pos\w*)($|[._])"
)


def at_any_resolution(module: nn.Module) -> str | None:
    """Hash of the weights without their tables of positions, and of these tables' shapes; None on the meta device.

    Two networks of one hash and other shapes are the same weights at two resolutions.
    """
    tables = {n: p for n, p in module.named_parameters() if POSITIONS.search(n)}
    rest = nn.Module()
    for i, (name, parameter) in enumerate((n, p) for n, p in module.named_parameters() if n not in tables):
        rest.register_parameter(f"{i:06d}-{name}".replace(".", "/"), parameter)
    printed = fingerprint(rest)
    if printed is None:
        return None
    shapes = hashlib.sha256(repr([(n, tuple(p.shape)) for n, p in sorted(tables.items())]).encode()).hexdigest()
    return f"r1:{printed.removeprefix('v1:')[:24]}.{shapes[:8]}"


class Watched:
    """The fingerprint of a backbone, taken again when its weights have changed since (`backbone.load_state_dict`).

    Numbers that were only cast to another precision, or loaded once more, are the same ones.
    """

    def __init__(self, module: nn.Module) -> None:
        self.text = fingerprint(module)
        self.own = True  # nobody has changed the weights since
        self.samples = {} if self.text is None else {n: _sample(p) for n, p in module.named_parameters()}

    def now(self, module: nn.Module, frozen: Mapping[int, nn.Parameter]) -> str | None:
        """The fingerprint of the weights as they are.

        Args:
            frozen: identity of a parameter that stands in for a frozen one -> that one.
        """
        parameters = {n: frozen.get(id(p), p) for n, p in module.named_parameters()}
        if self.text is None or any(p.is_inference() for p in parameters.values()):
            return self.text
        if any(type(p.data) not in known_types() or p.device.type == "meta" for p in parameters.values()):
            return self.text  # quantised by a library
        same = parameters.keys() == self.samples.keys() and all(
            _same(_sample(p), self.samples[n]) for n, p in parameters.items()
        )
        if not same:
            plain = nn.Module()
            plain.named_parameters = lambda *_, **__: iter(parameters.items())  # type: ignore[method-assign]
            plain.named_buffers = module.named_buffers  # type: ignore[method-assign]
            self.text, self.own = fingerprint(plain), False
            self.samples = {n: _sample(p) for n, p in parameters.items()}
        return self.text


def _sample(parameter: Tensor) -> Tensor:
    flat = whole(parameter.detach()).reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].cpu().clone()


def _same(found: Tensor, before: Tensor) -> bool:
    """Whether numbers are those from before: as they were, or rounded once to a coarser precision, whatever they are kept in."""
    # not by torch's count of changes: what is written through `.data` or numpy does not count
    return any(torch.equal(found, before.to(t).to(found.dtype)) for t in (found.dtype, torch.bfloat16, torch.float16))
