"""GroupMamba: four scan directions, each for a quarter of the channels, in a pyramid of stages. Plain torch, maps (B, H, W, d).

    block   x + DP(layer(x)), then x + DP(ffn(LN x))            ffn = fc1 -> depthwise 3x3 -> GELU -> fc2
    layer   h = LN(x);  g = sigmoid(W2 relu(W1 mean_tokens(h)));  y_i = VSSS_i(h_i), i = 1..4, on a quarter of the channels each
            proj(LN(concat(y) * s * h * g))                     the same LN both times; s one learned number, started at 1
    VSSS    a, z = in_proj(h_i);  a = SiLU(depthwise 3x3(a));  out_proj(LN(scan(a)) * SiLU(z))
    scan    the selective scan with step, input and output maps made from a, over the tokens row by row (1), column by column
            (2), and both backwards (3, 4)
    network stem (stride 4), stages with a stride-2 convolution between them, LN behind each; then the mean of the tokens goes,
            as a class token, through one block of its own (x + LN(layer(x)), x + mlp(LN x)), LN, and two linear heads

Two heads: `head` learns from the labels and `dist_head` from a teacher (`vision.tasks.distill`); in evaluation their
mean is taken.
Parameters carry the names of the released checkpoints.

Source: Shaker, Wasim, Khan, Gall, Khan, "GroupMamba", 2024 (Amshaker/GroupMamba).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from vision.families.groupmamba.selective_scan import selective_scan
from zoo.engine.memory import recomputable
from zoo.errors import ConfigError


def along(x: Tensor, direction: int) -> Tensor:
    """A map (B, c, H, W) as the sequence (B, H W, c) that direction 0 to 3 reads: rows, columns, and both backwards."""
    sequence = x.permute(0, 3, 2, 1) if direction % 2 else x.permute(0, 2, 3, 1)
    return sequence.flatten(1, 2).flip(1) if direction > 1 else sequence.flatten(1, 2)


def back(y: Tensor, direction: int, height: int, width: int) -> Tensor:
    """The inverse of `along`, as a map (B, H, W, c)."""
    y = y.flip(1) if direction > 1 else y
    return y.unflatten(1, (width, height)).transpose(1, 2) if direction % 2 else y.unflatten(1, (height, width))


def _sequences(*maps: Tensor) -> Tensor:
    """SiLU of four maps (B, c, H, W) -> (B, H W, 4 c), each in its own order of tokens."""
    return torch.cat([along(F.silu(x), i) for i, x in enumerate(maps)], dim=2)


def _steps(low: Tensor, *weights: Tensor) -> Tensor:
    """(B, L, groups, r) and a (1, c, r) for each group -> (B, L, groups c)."""
    return torch.einsum("blgr,gcr->blgc", low, torch.cat(weights)).flatten(2)


class DepthwiseConv(nn.Module):
    """3 x 3 depthwise convolution of a map (B, H, W, d)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, d) -> the same shape."""
        return self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class FeedForward(nn.Module):
    """fc1, a depthwise convolution (`conv=False`: without), GELU, fc2."""

    def __init__(self, dim: int, hidden: int, conv: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DepthwiseConv(hidden) if conv else nn.Identity()
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, d) -> the same shape."""
        return self.fc2(self.act(self.dwconv(self.fc1(x))))


class VSSS(nn.Module):
    """One direction, on c channels. The layer runs the scans of all four at once, so this comes in two parts: `open`, `close`."""

    def __init__(self, dim: int, d_state: int = 1) -> None:
        super().__init__()
        rank = math.ceil(dim / 16)
        self.rank, self.d_state = rank, d_state
        self.in_proj = nn.Linear(dim, 2 * dim, bias=False)
        self.conv2d = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.act = nn.SiLU()
        self.x_proj_weight = nn.Parameter(torch.empty(1, rank + 2 * d_state, dim).uniform_(-(dim**-0.5), dim**-0.5))
        self.dt_projs_weight = nn.Parameter(torch.empty(1, dim, rank).uniform_(-(rank**-0.5), rank**-0.5))
        # softplus of the bias is a step, log-uniform in [0.001, 0.1]
        steps = torch.exp(torch.empty(1, dim).uniform_(math.log(1e-3), math.log(0.1)))
        self.dt_projs_bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))
        self.A_logs = nn.Parameter(torch.log(torch.arange(1.0, d_state + 1)).repeat(dim, 1))
        self.Ds = nn.Parameter(torch.ones(dim))
        self.out_norm = nn.LayerNorm(dim)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def open(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W, c) -> what will be scanned, (B, c, H, W), in front of its SiLU; and the gate, (B, H, W, c)."""
        inner, gate = self.in_proj(x).chunk(2, dim=-1)
        return self.conv2d(inner.permute(0, 3, 1, 2)), self.act(gate)

    def close(self, y: Tensor, gate: Tensor) -> Tensor:
        """The scan's output in float32 and the gate, (B, H, W, c) -> (B, H, W, c)."""
        normed = self.out_norm(y.to(self.out_norm.weight.dtype))
        return self.out_proj(normed.to(gate.dtype) * gate)


class Entry(nn.Module):
    """The norm in front of the layer. The norm has two places there; this module is the first, at which adapters can read."""

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        """`norm(x)`."""
        return norm(x)  # type: ignore[no-any-return]


class GroupMambaLayer(nn.Module):
    """Modulated group Mamba layer, (B, H, W, d) -> the same shape."""

    def __init__(self, dim: int, d_state: int = 1, reduction: int = 16) -> None:
        super().__init__()
        if dim % 4:
            raise ConfigError(f"GroupMamba splits its channels in four groups; a width of {dim} cannot be.")
        self.entry = Entry()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, max(1, dim // reduction))
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(max(1, dim // reduction), dim)
        self.sigmoid = nn.Sigmoid()
        self.mamba_g1 = VSSS(dim // 4, d_state)
        self.mamba_g2 = VSSS(dim // 4, d_state)
        self.mamba_g3 = VSSS(dim // 4, d_state)
        self.mamba_g4 = VSSS(dim // 4, d_state)
        self.proj = nn.Linear(dim, dim)
        self.skip_scale = nn.Parameter(torch.ones(1))

    @property
    def groups(self) -> list[VSSS]:
        """The four directions."""
        return [self.mamba_g1, self.mamba_g2, self.mamba_g3, self.mamba_g4]

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, d) -> the same shape."""
        h = self.entry(x, self.norm)
        gate = self.sigmoid(self.fc2(self.relu(self.fc1(h.mean(dim=(1, 2))))))  # (B, d)
        opened = [group.open(part) for group, part in zip(self.groups, h.chunk(4, dim=-1))]
        scanned = self.scan([inner for inner, _ in opened])
        y = torch.cat([g.close(part, z) for g, part, (_, z) in zip(self.groups, scanned, opened)], dim=-1)
        y = recomputable(torch.mul, recomputable(torch.mul, y * self.skip_scale, h), gate[:, None, None])
        return self.proj(self.norm(y))

    def scan(self, maps: list[Tensor]) -> list[Tensor]:
        """The scans of the four directions as one, (B, c, H, W) each -> (B, H, W, c) each, in float32 at least."""
        groups, (height, width) = self.groups, maps[0].shape[2:]
        n, rank = groups[0].d_state, groups[0].rank
        u = recomputable(_sequences, *maps)  # (B, L, 4 c)
        weight = torch.cat([g.x_proj_weight for g in groups])
        rates = torch.cat([g.A_logs for g in groups])
        low, b, c = torch.einsum("blgc,gkc->blgk", u.unflatten(2, (4, -1)), weight).split([rank, n, n], dim=3)
        delta = recomputable(_steps, low, *(g.dt_projs_weight for g in groups))
        y = selective_scan(
            u,
            delta,
            -torch.exp(rates.to(torch.promote_types(rates.dtype, torch.float32))),
            b,
            c,
            torch.cat([g.Ds for g in groups]),
            torch.cat([g.dt_projs_bias for g in groups], dim=1)[0],
        )
        return [back(part, i, height, width) for i, part in enumerate(y.chunk(4, dim=2))]


class Block(nn.Module):
    """Layer and feed-forward, each added to the map."""

    def __init__(self, dim: int, mlp_ratio: float, d_state: int = 1, drop_path: float = 0.0) -> None:
        super().__init__()
        self.attn = GroupMambaLayer(dim, d_state)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio))
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, d) -> the same shape."""
        x = x + self.drop_path1(self.attn(x))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class ClassBlock(nn.Module):
    """The block of the class token, (B, 1, 1, d): a norm behind the layer too, and no convolution in the feed-forward."""

    def __init__(self, dim: int, mlp_ratio: float, d_state: int = 1) -> None:
        super().__init__()
        self.attn = GroupMambaLayer(dim, d_state)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.drop_path1 = nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio), conv=False)
        self.drop_path2 = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, 1, d) -> the same shape."""
        x = x + self.drop_path1(self.norm1(self.attn(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Stem(nn.Module):
    """Images (B, 3, H, W) -> (B, H', W', d), by `stride` and once more by 2."""

    def __init__(self, in_chans: int, hidden: int, dim: int, kernel: int = 7, stride: int = 2) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(3):
            size, step, width = (kernel, stride, in_chans) if i == 0 else (3, 1, hidden)
            conv = nn.Conv2d(width, hidden, size, stride=step, padding=size // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(hidden), nn.ReLU(inplace=True)]
        self.conv = nn.Sequential(*layers)
        self.proj = nn.Conv2d(hidden, dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, H', W', d)."""
        return self.norm(self.proj(self.conv(x)).permute(0, 2, 3, 1))


class DownSample(nn.Module):
    """Half the height and width, (B, H, W, d) -> (B, H / 2, W / 2, d')."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim_out, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, d) -> (B, H / 2, W / 2, d'), rounded up."""
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class GroupMamba(nn.Module):
    """The network.

    Args:
        embed_dims, depths, mlp_ratios: width, number of blocks and width of the feed-forward (in widths) of each stage.
        stem_hidden_dim: width of the stem. stem_kernel, stem_stride: its first convolution; (3, 1) suits images of 32 px.
        num_classes: 0 leaves the heads out. distillation: whether there is a second head.
        d_state: states of the scans. drop_path_rate: of the last block, rising from 0.
        img_size: for which preprocessing makes images; the network itself takes any size.

    Raises:
        ConfigError: lists of different lengths, or a width that is not a multiple of four.
    """

    def __init__(
        self,
        embed_dims: Sequence[int],
        depths: Sequence[int],
        mlp_ratios: Sequence[float],
        stem_hidden_dim: int = 64,
        stem_kernel: int = 7,
        stem_stride: int = 2,
        in_chans: int = 3,
        num_classes: int = 1000,
        distillation: bool = True,
        d_state: int = 1,
        drop_path_rate: float = 0.0,
        img_size: int = 224,
    ) -> None:
        super().__init__()
        if not 0 < len(embed_dims) == len(depths) == len(mlp_ratios):
            raise ConfigError(
                f"GroupMamba got {len(embed_dims)} widths, {len(depths)} depths and {len(mlp_ratios)} ratios; give one of each "
                "for each stage."
            )
        self.num_stages, self.num_features, self.img_size = len(depths), int(embed_dims[-1]), int(img_size)
        total, done = sum(depths), 0
        for s, (dim, depth, ratio) in enumerate(zip(embed_dims, depths, mlp_ratios), 1):
            stem = Stem(in_chans, stem_hidden_dim, dim, stem_kernel, stem_stride)
            embed = stem if s == 1 else DownSample(embed_dims[s - 2], dim)
            rates = [drop_path_rate * (done + i) / max(1, total - 1) for i in range(depth)]
            self.add_module(f"patch_embed{s}", embed)
            self.add_module(f"block{s}", nn.ModuleList(Block(dim, ratio, d_state, rate) for rate in rates))
            self.add_module(f"norm{s}", nn.LayerNorm(dim, eps=1e-6))
            done += depth
        self.post_network = nn.ModuleList([ClassBlock(self.num_features, mlp_ratios[-1], d_state)])
        self.head: nn.Module = nn.Identity()
        self.dist_head: nn.Module | None = None
        self.source: str | None = None  # the Hub repository of the weights
        self.data: dict[str, Any] = {}  # mean, std, crop_pct and interpolation of the images that it was trained on
        self.apply(_init)
        self.reset_classifier(num_classes, distillation)

    def reset_classifier(self, num_classes: int, distillation: bool = False) -> None:
        """New heads; 0 classes: none, and features come out."""
        self.head, self.dist_head = nn.Identity(), None
        if num_classes:
            self.head = nn.Linear(self.num_features, num_classes)
            self.dist_head = nn.Linear(self.num_features, num_classes) if distillation else None
            self.head.apply(_init)
            if self.dist_head is not None:
                self.dist_head.apply(_init)

    def stage(self, index: int) -> tuple[Any, Any, Any]:
        """The embedding, the blocks and the norm of a stage, counted from 0."""
        return tuple(getattr(self, f"{part}{index + 1}") for part in ("patch_embed", "block", "norm"))  # type: ignore[return-value]

    def forward_features(self, x: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """Images (B, 3, H, W) -> the class token behind the last norm, (B, d).

        `maps` gets what each stage gives, (B, H', W', d').
        """
        for s in range(self.num_stages):
            embed, blocks, norm = self.stage(s)
            x = embed(x)
            for block in blocks:
                x = block(x)
            if s < self.num_stages - 1:
                x = norm(x)
            if maps is not None:
                maps.append(x)
        token = x.mean(dim=(1, 2), keepdim=True)
        for block in self.post_network:
            token = block(token)
        return norm(token)[:, 0, 0]  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) -> logits (B, classes); in training with two heads both logits (`distill`)."""
        features = self.forward_features(x)
        if self.dist_head is None:
            return self.head(features)
        both = self.head(features), self.dist_head(features)
        return both if self.training else (both[0] + both[1]) / 2


def _init(module: nn.Module) -> None:
    if any(p.is_meta for p in module.parameters(recurse=False)):
        return
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
