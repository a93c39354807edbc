"""The first blocks of a transformer of videos as a network of its own, with more channels in front: an encoder beside it.

It is the library's class with fewer blocks and a wider patch embedding, called as the family calls the whole one, and left as
soon as its last block has answered. What stood behind the blocks (norm, modulation, projection) is not there, and what nobody
reads of the last block (the text's own half, where blocks have two) is not trained. Values are copies of the transformer's:

    patch    [noisy | masked | mask] -> d: the weights of the latents twice, and zeros for the mask; the bias
    text     fresh by default, as the class draws it, or copied; tables of positions are those that the class makes
    others   copied
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import AttachError

BLOCKS = ("blocks", "transformer_blocks", "temporal_transformer_blocks")  # lists of blocks, in all classes
BEHIND = ("norm_final", "norm_out", "proj_out", "scale_shift_table")  # what stands behind the blocks, in all classes
HALVES = (torch.float16, torch.bfloat16)


class _Answered(Exception):
    """The last block has answered."""


class Front(nn.Module):
    """[noisy | masked | mask] and the transformer's conditions -> what each of its first blocks makes of the video.

    `names`: the inputs of `forward`, in the order of the transformer's own call; `layout` ("B C F H W" or "B F C H W") and
    `patches` (latent frames, latents along a side) are those of the latents.
    """

    twin: Any
    network: Any

    def __init__(self, network: nn.Module, twin: Any, names: tuple[str, ...], patches: tuple[int, int]) -> None:
        super().__init__()
        self.network = network
        self.__dict__["twin"] = twin  # a description, no module
        self.names, self.patches = names, patches
        self.channels_axis = 3 - twin.frames_axis
        self.width = int(next(p for p in twin.points() if p.kind == "block").dim_out)
        self.count = len(self.blocks)

    @property
    def blocks(self) -> list[nn.Module]:
        """Those of the video's stream."""
        return [block for path in self.twin.stream for block in self.network.get_submodule(path).children()]

    def forward(self, latents: Tensor, masked: Tensor, mask: Tensor, *conditions: Any, **more: Any) -> list[Tensor]:
        """Latents (B, F, C, H, W) or (B, C, F, H, W), masked alike, mask of one channel -> (rows, N, d) of every block."""
        dtype = next(self.network.parameters()).dtype
        half = latents.dtype if latents.dtype in HALVES and dtype == torch.float32 else None
        joined = torch.cat([latents, masked.to(latents), mask.to(latents)], dim=self.channels_axis)
        if half is None:
            return self._run(joined, *conditions, **more)
        given = [c.to(dtype) if isinstance(c, Tensor) and c.is_floating_point() else c for c in conditions]
        with torch.autocast(latents.device.type, half):
            return self._run(joined.to(dtype), *given, **more)

    @torch.compiler.disable  # the call is left by an exception
    def _run(self, *inputs: Any, **more: Any) -> list[Tensor]:
        found: list[Tensor] = []

        def caught(module: nn.Module, args: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)
            if len(found) == self.count:
                raise _Answered

        hooks = [block.register_forward_hook(caught) for block in self.blocks]
        try:
            self.twin.run(self.network, *inputs, **more)
        except _Answered:
            return found
        finally:
            for hook in hooks:
                hook.remove()
        raise AssertionError("the blocks were not called")  # pragma: no cover

    def tokens(self, mask: Tensor) -> Tensor:
        """Mask of latents, one channel -> (B, N), true where a token holds anything of what it marks."""
        frames, side = self.patches
        there = mask.float() if self.channels_axis == 1 else mask.float().transpose(1, 2)
        size = (frames, side, side)
        return (nn.functional.max_pool3d(there, size, size) > 0).flatten(1)


def make_front(family: Any, blocks: int, copy_text: bool = False) -> Front:
    """A `Front` of the first `blocks` blocks of a family's transformer, with its values.

    Raises:
        AttachError: so many blocks there are not, or the transformer's weights are not there to be copied (quantised).
    """
    module, channels = family.module, family.latent_channels
    there = len(list(module.get_submodule(family.stream[0]).children()))
    if not 1 <= blocks <= there:
        raise AttachError(f"an encoder of {blocks} blocks cannot be cut out of '{family.name}', which has {there}.")
    device = next(module.parameters()).device
    with torch.device(device):
        network: Any = _cut(module, blocks, min(blocks + 1, there), 2 * channels + 1).float()
    twin = type(family)(network, family.name)
    twin.configure(**family.shape)
    fresh = () if copy_text else tuple(p.path for p in twin.points() if p.role == "text" and p.block is None)
    _fill(network, module, twin, fresh, channels)
    for name in BEHIND:
        if hasattr(network, name):
            delattr(network, name)
    if hasattr(
        network, "temporal_transformer_blocks"
    ):  # Latte's blocks over time: the last one runs behind the last of all
        network.temporal_transformer_blocks[-1] = nn.Identity()
    read = {path for path, _ in twin.modules_to_train()}
    for path, part in network.named_modules():
        for parameter in part._parameters.values():
            if parameter is not None and path not in read:
                parameter.requires_grad_(False)
        if "pos_embedding" in part._buffers:  # made by the class, and large: not saved
            part._non_persistent_buffers_set.add("pos_embedding")
    return Front(network, twin, family.condition_names, family.patch_sizes)


def _cut(module: Any, blocks: int, built: int, channels: int) -> nn.Module:
    """A fresh network of the module's class. Some classes make their last block another one, so one more is built."""
    takes = inspect.signature(type(module).__init__).parameters
    config = {k: v for k, v in dict(module.config).items() if k in takes}
    config |= {"num_layers": built, "in_channels": channels, "out_channels": channels}
    if "num_single_layers" in takes:
        config["num_single_layers"] = 0
    network: nn.Module = type(module)(**config)
    for name, part in network.named_children():
        if isinstance(part, nn.ModuleList) and len(part) == built and name in BLOCKS:
            setattr(network, name, part[:blocks])
    return network


@torch.no_grad()
def _fill(network: nn.Module, module: nn.Module, twin: Any, fresh: tuple[str, ...], channels: int) -> None:
    source = dict(module.named_parameters())
    patch = next(p.path for p in twin.points() if p.role == "patch")
    for name, parameter in network.named_parameters():
        inside = any(name.startswith(f"{path}.") for path in fresh)
        if inside or name.startswith(BEHIND):
            continue
        if name not in source:
            raise AttachError(
                f"the weight '{name}' of '{twin.name}' is not there to be copied. An encoder is cut out of a transformer whose "
                "weights are its own: load it without quantisation."
            )
        if name != f"{patch}.weight":
            parameter.copy_(source[name])
            continue
        wide = parameter.view(len(parameter), 2 * channels + 1, -1)
        own = source[name].reshape(len(parameter), -1, wide.shape[2])[:, :channels]
        wide[:, :channels], wide[:, channels : 2 * channels], wide[:, 2 * channels :] = own, own, 0
