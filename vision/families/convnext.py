"""Every timm `ConvNeXt`: ConvNeXt, ConvNeXt V2, the ConvNeXts of CLIP and DINOv3. Maps are (B, C, H, W).

A block has one sublayer behind a depthwise convolution, with the residual sum around both:

    y = x + DP(gamma MLP(LN(DW(x))))        MLP = fc2 act fc1, in V2 with a global response norm in front of fc2

`mlp`: its input is behind the norm, its output behind gamma. There is no attention and no sequence of tokens, so there are no
`attention` and no `tokens` points: prefixes and prompts are refused. Adapters see maps with their channels last, (B, H, W, C),
wherever timm has them (`parts.channels`). In the small members (`conv_mlp`) fc1 and fc2 are 1 x 1 convolutions.

LoRA takes fc1 and fc2 by default, IA3 the input of fc2. The global response norm adds to its input, so a scale of its output has
no place in its weights: it is trained, and rescaled live, but SSF on it does not merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from vision.families.parts.channels import channels_last
from vision.families.parts.timm_family import OPTIONS, TimmBackbone, at_size
from zoo.engine.sites import BlockSite, LinearSite, Site
from zoo.points import LinearPoint, NormPoint, Point
from zoo.points.rows import Row, make_linear, norm_dim
from zoo.registry import register_backbone

GRN = "a global response norm adds its scaled input to that input"


@register_backbone
class ConvNeXtFamily(TimmBackbone):
    """timm's ConvNeXt, versions 1 and 2."""

    family = "convnext"
    timm_class = ConvNeXt
    timm_modules = ("convnext",)
    aliases = {
        "convnext-t": "timm:convnext_tiny.fb_in22k_ft_in1k",
        "convnext-s": "timm:convnext_small.fb_in22k_ft_in1k",
        "convnext-b": "timm:convnext_base.fb_in22k_ft_in1k",
        "convnext-l": "timm:convnext_large.fb_in22k_ft_in1k",
        "convnext-b-in22k": "timm:convnext_base.fb_in22k",
        "convnextv2-n": "timm:convnextv2_nano.fcmae_ft_in22k_in1k",
        "convnextv2-t": "timm:convnextv2_tiny.fcmae_ft_in22k_in1k",
        "convnextv2-b": "timm:convnextv2_base.fcmae_ft_in22k_in1k",
        "dinov3-convnext-t": "timm:convnext_tiny.dinov3_lvd1689m",
        "dinov3-convnext-b": "timm:convnext_base.dinov3_lvd1689m",
    }
    saved_options = {
        **OPTIONS,
        "dims": range(1, 16385),
        "kernel_sizes": range(1, 65),
        "output_stride": range(8, 33),
        "stem_type": ("patch", "overlap", "overlap_tiered", "overlap_act"),
        "ls_init_value": float,
        "head_hidden_size": range(1, 16385),
        **dict.fromkeys(("conv_mlp", "conv_bias", "use_grn", "head_norm_first"), bool),
    }
    block_table = (
        Row("linear", "conv", "conv", "conv_dw"),
        Row("norm", "norm", "norm", "norm"),
        Row("linear", "up", "mlp.up", "mlp.fc1"),
        Row("norm", "norm", "mlp.grn", "mlp.grn"),
        Row("linear", "down", "mlp.down", "mlp.fc2"),
        Row("sublayer", "mlp", "mlp", "mlp", entry="norm", exit="drop_path", stream="conv_dw"),
        Row("block", "block", "", ""),
    )
    elementwise = ("mlp.act",)
    gives = ("pooled", "maps")
    tiny = ("convnext-t", {"img_size": 32, "depths": (1, 2, 1, 1), "dims": (8, 12, 16, 24)})

    @classmethod
    def build(cls, name: str, *, pretrained: bool, **kwargs: Any) -> nn.Module:
        """As timm; `img_size`, which timm's class does not take, is what the preprocessing makes of images."""
        size = kwargs.pop("img_size", None)
        module = super().build(name, pretrained=pretrained, **kwargs)
        return module if size is None else at_size(module, size)

    _held: tuple[nn.Module, dict[nn.Module, tuple[type[Site], tuple[bool, bool]]]] | None = None

    def outputs(self, *inputs: Tensor, want: Sequence[str] = ("pooled",), **kwargs: Any) -> dict[str, Any]:
        """A map of every stage."""
        self.check_wanted(want)
        module: Any = self.module
        x = module.stem(*inputs, **kwargs)
        maps = []
        for stage in module.stages:
            x = stage(x)
            maps.append(x)
        maps[-1] = x = module.norm_pre(x)
        found = {"maps": maps, **({"pooled": module.forward_head(x, pre_logits=True)} if "pooled" in want else {})}
        return {name: found[name] for name in want}

    def site_kind(self, module: nn.Module, kind: type[Site]) -> type[Site]:
        """Sites at modules that take or give maps show these with their channels last."""
        where = self._maps().get(module)
        if where is None:
            return kind
        base, sides = where
        return channels_last(base if issubclass(base, kind) else kind, sides)  # type: ignore[arg-type]

    def _maps(self) -> dict[nn.Module, tuple[type[Site], tuple[bool, bool]]]:
        """Modules at which ops see maps: the least kind of a site there, and at which of its sides."""
        if self._held is None or self._held[0] is not self.module:
            both = (True, True)
            found: dict[nn.Module, tuple[type[Site], tuple[bool, bool]]] = {}
            for point in self.points():
                if point.kind == "norm" and type(point.module).__name__.endswith("2d"):
                    found[point.module] = (Site, both)
                elif point.kind == "block":
                    block: Any = point.module
                    found[block] = (BlockSite, both)
                    # the stream in front of the branch; what is done to the convolution's own output is turned by its op
                    found[block.conv_dw] = (LinearSite, (True, False))
                    found[block.drop_path] = (Site, both)
                    if block.use_conv_mlp:
                        found[block.mlp] = (Site, both)
                        if hasattr(block.mlp, "grn"):
                            found[block.mlp.grn] = (Site, both)
            self._held = (self.module, found)
        return self._held[1]

    def points(self) -> list[Point]:
        """Points of the stem, of every stage's downsampling and blocks, and of the head's norm."""
        module: Any = self.module
        found: list[Point] = []
        for i, part in enumerate(module.stem):
            kind = "norm" if i == len(module.stem) - 1 else "linear"
            self._add(found, part, kind, "stem.norm" if kind == "norm" else f"stem.{i}", "patch", f"stem.{i}")
        for s, stage in enumerate(module.stages):
            if not isinstance(stage.downsample, nn.Identity):
                norm, conv = stage.downsample
                path = f"stages.{s}.downsample"
                self._add(found, norm, "norm", f"stages.{s}.merge.norm", "", f"{path}.0", stage=s)
                self._add(found, conv, "linear", f"stages.{s}.merge", "merge", f"{path}.1", stage=s)
            for i, block in enumerate(stage.blocks):
                name = f"stages.{s}.blocks.{i}"
                dim = block.conv_dw.out_channels
                points = self.points_of_block(block, name, name, dim, 0, block=i, stage=s)
                for point in points:
                    if point.name.endswith(".grn"):
                        point.unmergeable = GRN
                found += points
        self._add(found, module.norm_pre, "norm", "norm", "", "norm_pre")
        head = module.head
        self._add(found, getattr(head, "norm", None), "norm", "norm", "", "head.norm")
        hidden = getattr(getattr(head, "pre_logits", None), "fc", None)
        self._add(found, hidden, "linear", "pre_logits", "proj", "head.pre_logits.fc")
        return found

    def _add(self, found: list[Point], module: Any, kind: str, name: str, role: str, path: str, **place: Any) -> None:
        if module is None or isinstance(module, nn.Identity):
            return
        common: dict[str, Any] = {"name": name, "role": role or "norm", "path": path, "module": module, **place}
        if kind == "norm":
            dim = norm_dim(module)
            found.append(NormPoint(**{**common, "role": "norm"}, dim_in=dim, dim_out=dim))
            return
        point: LinearPoint | None = make_linear(module, None, "", 0, common)
        found += [] if point is None else [point]
