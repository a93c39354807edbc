"""A fingerprint of a backbone's weights, so that an adapter trained on others is noticed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from zoo.engine.sharded import known_types, whole

SAMPLES = 64
SMALL = (torch.int8, torch.uint8)  # of buffers that are weights of `zoo.quantise`


def fingerprint(module: nn.Module) -> str | None:
    """Hash over name, shape and 64 evenly spaced values of every parameter; None on the meta device.

    It costs about a millisecond instead of reading all weights; a change of fewer values than it samples can stay
    unnoticed, other weights of the same shapes do not. Values are hashed as float16, the precision of the smallest
    published weights, so that loading in another precision up from there gives the same fingerprint.
    """
    digest = hashlib.sha256()
    parts = []
    rounded = _rounded(module)
    for name, parameter in sorted([*module.named_parameters(), *rounded], key=lambda item: item[0]):
        if parameter.device.type == "meta":
            return None
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        parts.append(_sample(parameter).to(torch.float16))
    if parts:
        digest.update(torch.cat([p.cpu() for p in parts]).numpy().tobytes())
    return "v1:" + digest.hexdigest()[:32]


def _rounded(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that are weights: those of `zoo.quantise`, and the packed numbers of GPTQ and AWQ, byte by byte."""
    found = []
    for name, buffer in module.named_buffers():
        if buffer.dtype in SMALL:
            found.append((name, buffer))
        elif name.rpartition(".")[2] == "qweight":
            found.append((name, buffer.contiguous().view(torch.uint8)))
    return found


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
    for i, (name, b) in enumerate(_rounded(module)):
        rest.register_buffer(f"{i:06d}-{name}".replace(".", "/"), b)
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
        self.samples = None if self.text is None else _samples(dict(module.named_parameters()))
        self._rest: tuple[str | None, str | None] = (None, None)  # a fingerprint, and what `rest` gave for it

    def now(self, module: nn.Module, frozen: Mapping[int, nn.Parameter]) -> str | None:
        """The fingerprint of the weights as they are.

        Args:
            frozen: identity of a parameter that stands in for a frozen one -> that one.
        """
        if self.text is None or self.samples is None:
            return self.text
        parameters = {n: frozen.get(id(p), p) for n, p in module.named_parameters()}
        kinds = known_types()
        if any(p.is_inference() or p.device.type == "meta" or type(p.data) not in kinds for p in parameters.values()):
            return self.text  # nobody can write to it, or it is quantised by a library
        # not by torch's count of changes: what is written through `.data` or numpy does not count
        found = _samples(parameters)
        if found[0] != self.samples[0] or not _same(found[1], self.samples[1]):
            plain = nn.Module()
            plain.named_parameters = lambda *_, **__: iter(parameters.items())  # type: ignore[method-assign]
            plain.named_buffers = module.named_buffers  # type: ignore[method-assign]
            self.text, self.own, self.samples = fingerprint(plain), False, found
        return self.text

    def rest(self, module: nn.Module, text: str) -> str | None:
        """`at_any_resolution` of a backbone whose fingerprint is `text`."""
        if self._rest[0] != text:
            self._rest = (text, at_any_resolution(module))
        return self._rest[1]


def _samples(parameters: Mapping[str, Tensor]) -> tuple[list[tuple[str, tuple[int, ...]]], Tensor]:
    """Names and shapes, and evenly spaced values of all parameters as one tensor, in a precision that holds them all."""
    shapes = [(name, tuple(p.shape)) for name, p in parameters.items()]
    parts = [_sample(p) for p in parameters.values()]
    parts = parts if all(p.device.type == "cpu" for p in parts) else [p.cpu() for p in parts]
    return shapes, torch.cat(parts) if parts else torch.empty(0)


def _sample(parameter: Tensor) -> Tensor:
    kind = type(parameter.data)
    if kind not in known_types() and hasattr(kind, "__tensor_flatten__"):  # quantised by a library: what it is made of
        names = kind.__tensor_flatten__(parameter.data)[0]
        return torch.cat([_sample(getattr(parameter.data, name)).float() for name in names])
    parameter = parameter.detach()
    flat = (parameter if type(parameter) is Tensor else whole(parameter)).reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]


def _same(found: Tensor, before: Tensor) -> bool:
    """Whether numbers are those from before: as they were, or rounded once to a coarser precision, whatever they are kept in."""
    wide = torch.promote_types(found.dtype, before.dtype)
    found = found.to(wide)
    if torch.equal(found, before.to(wide)):
        return True
    # some parts of a model may be rounded and others not
    like = [found == before.to(kind).to(wide) for kind in (before.dtype, torch.bfloat16, torch.float16)]
    return bool((like[0] | like[1] | like[2]).all())
