"""GroupMamba: state-space mixers in a pyramid of stages, tiny, small and base, and a small member for images of 32 px.

The network is ours (`vision.families.groupmamba.network`), with the parameter names of the released checkpoints. Maps
are (B, H, W, d); each
stage has its own width. There is no attention and no sequence that could be extended, so there are no `attention` and no
`tokens` points. What a block has, in forward order:

| point                        | kind, role           | module                                                      |
| ---------------------------- | -------------------- | ----------------------------------------------------------- |
| `mixer.norm`                 | norm                 | at both its places in the layer: in front, and before `o`   |
| `mixer.gate.{down,up}`       | linear `gate`        | channel modulation, on the mean of the tokens (B, d)        |
| `mixer.g{1..4}.{in,conv,out}`| linear `in`, `conv`, `out` | the four directions, on a quarter of the channels each |
| `mixer.o`, `mixer`           | linear `o`, sublayer `mixer` | the layer's projection, and the layer               |
| `mlp.{up,conv,down}`, `mlp`  | linear, sublayer     | the feed-forward with its depthwise convolution             |

`in` makes of the tokens what is scanned and its gate, so it is what q, k and v are elsewhere: the defaults of LoRA and IA3
mean it here. The block of the class token is `class_block`. Step sizes and rates of the scans are bare tensors of the
checkpoint's layout, and the stem's normalisations are over batches: only full tuning reaches these.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vision.families.groupmamba.network import GroupMamba
from zoo.backbone import Backbone
from zoo.errors import ConfigError, MismatchError, WeightsError
from zoo.families.timm_names import channels_of, other_channels, per_channel
from zoo.heads import TwoHeads
from zoo.points import NormPoint, Point
from zoo.points.rows import Row, find, make_linear
from zoo.registry import register_backbone

WEIGHTS = Path(__file__).parents[2] / "weights"
MODELS: dict[str, dict[str, Any]] = {
    "groupmamba-t": {
        "embed_dims": (64, 128, 348, 448),
        "depths": (3, 4, 9, 3),
        "mlp_ratios": (8, 8, 4, 4),
        "stem_hidden_dim": 32,
    },
    "groupmamba-s": {"embed_dims": (64, 128, 348, 512), "depths": (3, 4, 16, 3), "mlp_ratios": (8, 8, 4, 4)},
    "groupmamba-b": {"embed_dims": (96, 192, 424, 512), "depths": (3, 6, 21, 3), "mlp_ratios": (8, 8, 4, 4)},
    "groupmamba-micro": {
        "embed_dims": (48, 96, 192),
        "depths": (2, 3, 3),
        "mlp_ratios": (4, 4, 4),
        "stem_hidden_dim": 24,
        "stem_kernel": 3,
        "stem_stride": 1,
        "num_classes": 100,
        "img_size": 32,
    },
}
RELEASED = {
    "groupmamba-t": "Abdelrahman-shaker/GroupMamba-Tiny",
    "groupmamba-s": "Abdelrahman-shaker/GroupMamba-Small",
    "groupmamba-b": "Abdelrahman-shaker/GroupMamba-Base",
}
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".tar")
CONVERT = (
    "The authors' checkpoints are pickles, which run whatever code is in them when they are read, so they are not opened here. "
    "Convert one where you trust it: import torch; from safetensors.torch import save_file; state = torch.load('file.pth', "
    "map_location='cpu', weights_only=True); state = state.get('model', state); save_file({k: v.clone().contiguous() for k, v "
    "in state.items()}, 'file.safetensors'). Then pass weights='file.safetensors', or pretrained=False for random weights."
)
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop_pct": 0.875, "interpolation": "bicubic"}
_MICRO = {
    "mean": (0.5071, 0.4866, 0.4409),
    "std": (0.2673, 0.2564, 0.2762),
    "crop_pct": 1.0,
    "interpolation": "bicubic",
}


def load_released(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint in the released key layout, from a safetensors file or a folder with one.

    A prefix that all keys share (`module.`, `model.`) is taken off.

    Raises:
        ConfigError: there is no such file, or it is a pickle; with how to convert it. WeightsError: it is damaged, or holds
        NaN or Inf.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        files = sorted(file.glob("*.safetensors"))
        if len(files) != 1:
            pickles = any(p.suffix in PICKLES for p in file.iterdir())
            raise ConfigError(
                f"'{file}' holds {len(files)} safetensors files; expected one. {CONVERT if pickles else ''}"
            )
        file = files[0]
    if file.suffix in PICKLES:
        raise ConfigError(f"'{file}' cannot be read. {CONVERT}")
    if not file.is_file():
        raise ConfigError(f"There is no weights file '{file}'.")
    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"'{file}' is not a whole safetensors file ({error}). Copy or download it again.") from error
    for prefix in ("module.", "model."):
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    bad = next((k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()), None)
    if bad is not None:
        raise WeightsError(f"'{bad}' in '{file}' holds NaN or Inf.")
    return state


@register_backbone
class GroupMambaFamily(Backbone):
    """GroupMamba by its short names. `weights=<file or folder>` reads a released checkpoint converted to safetensors."""

    family = "groupmamba"
    gives = ("pooled", "maps")
    aliases = {name: f"zoo:{name}" for name in MODELS}
    weights_folder = WEIGHTS
    block_table = (
        Row("norm", "norm", "mixer.norm", "attn.norm"),
        Row("linear", "gate", "mixer.gate.down", "attn.fc1"),
        Row("linear", "gate", "mixer.gate.up", "attn.fc2"),
        *(
            row
            for g in range(1, 5)
            for row in (
                Row("linear", "in", f"mixer.g{g}.in", f"attn.mamba_g{g}.in_proj"),
                Row("linear", "conv", f"mixer.g{g}.conv", f"attn.mamba_g{g}.conv2d"),
                Row("norm", "norm", f"mixer.g{g}.norm", f"attn.mamba_g{g}.out_norm"),
                Row("linear", "out", f"mixer.g{g}.out", f"attn.mamba_g{g}.out_proj"),
            )
        ),
        Row("linear", "o", "mixer.o", "attn.proj"),
        Row("norm", "norm", "norm1", "norm1"),  # of the class token's block only
        Row("sublayer", "mixer", "mixer", "attn", entry="attn.entry", exit="drop_path1"),
        Row("norm", "norm", "norm2", "norm2"),
        Row("linear", "up", "mlp.up", "mlp.fc1"),
        Row("linear", "conv", "mlp.conv", "mlp.dwconv.dwconv"),
        Row("linear", "down", "mlp.down", "mlp.fc2"),
        Row("sublayer", "mlp", "mlp", "mlp", entry="norm2", exit="drop_path2"),
        Row("block", "block", "", ""),
    )
    saved_options = {
        "embed_dims": range(1, 16385),
        "depths": range(1, 257),
        "mlp_ratios": float,
        "stem_hidden_dim": range(1, 4097),
        "stem_kernel": range(1, 65),
        "stem_stride": range(1, 65),
        "in_chans": range(1, 1025),
        "distillation": bool,
        "d_state": range(1, 1025),
        "drop_path_rate": float,
        "img_size": range(1, 8193),
    }
    elementwise = ("mlp.act", *(f"attn.mamba_g{g}.act" for g in range(1, 5)))
    tiny = (
        "groupmamba-micro",
        {"stem_hidden_dim": 8, "embed_dims": [16, 32], "depths": [1, 1], "mlp_ratios": [2, 2], "img_size": 16},
    )

    module: GroupMamba

    @classmethod
    def accepts(cls, name: str) -> bool | str:
        """`zoo:groupmamba-t` and so on."""
        return name in cls.aliases.values()

    @classmethod
    def build(cls, name: str, *, pretrained: bool, **kwargs: Any) -> nn.Module:
        """The network; `weights` names a safetensors file or folder, other options are those of `GroupMamba`.

        Raises:
            ConfigError: an unknown option, or the pretrained weights cannot be had. WeightsError: they are damaged.
            MismatchError: they are those of another network.
        """
        short = name.removeprefix("zoo:")
        options = {k: v for k, v in kwargs.items() if v is not None}
        weights, device = options.pop("weights", None), options.pop("device", None)
        state = cls._weights(short, weights) if pretrained else None
        try:
            module = GroupMamba(**{**MODELS[short], **options})
        except TypeError as error:
            raise ConfigError(f"GroupMamba does not take these options for '{short}': {error}") from error
        if state is not None:
            state = other_channels(state, module)
            _fill(module, state, short, own_heads="num_classes" not in options and "distillation" not in options)
        module.source = RELEASED.get(short) if weights is None else None
        module.data = _MICRO if short == "groupmamba-micro" else _IMAGENET
        return module.to(device) if device is not None else module

    @classmethod
    def _weights(cls, short: str, weights: str | Path | None) -> dict[str, Tensor]:
        if weights is not None:
            return load_released(weights)
        if short not in RELEASED:
            file = WEIGHTS / f"{short}.safetensors"
            if not file.is_file():
                raise ConfigError(
                    f"This version comes without weights of '{short}' ('{file.name}' is not in {WEIGHTS}). Pass "
                    "pretrained=False for random ones, or weights=<a safetensors file>."
                )
            return load_released(file)
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(RELEASED[short], "model.safetensors"))
        except Exception as error:  # the Hub's client has a class of its own for each way of failing
            raise ConfigError(
                f"'{RELEASED[short]}' gave no 'model.safetensors' ({type(error).__name__}: {str(error).splitlines()[0][:200]}). "
                f"{CONVERT}"
            ) from error
        return load_released(file)

    # -- what the model asks ----------------------------------------------------------------------------------------

    def points(self) -> list[Point]:
        """Points of every stage's embedding, blocks and norm, and of the class token's block."""
        found: list[Point] = []
        last = self.module.num_stages - 1
        for s in range(self.module.num_stages):
            embed, blocks, norm = self.module.stage(s)
            dim = len(norm.weight)
            place: dict[str, Any] = {} if s == 0 else {"stage": s}
            start, role = ("patch_embed", "patch") if s == 0 else (f"stages.{s}.merge", "merge")
            common = {"name": start, "role": role, "path": f"patch_embed{s + 1}.proj", "module": embed.proj, **place}
            point = make_linear(embed.proj, None, "", 0, common)
            found += [] if point is None else [point]
            found.append(self._norm(f"{start}.norm", f"patch_embed{s + 1}.norm", **place))
            for i, block in enumerate(blocks):
                name, path = f"stages.{s}.blocks.{i}", f"block{s + 1}.{i}"
                found += self.points_of_block(block, name, path, dim, 0, block=i, stage=s)
            if s < last:
                found.append(self._norm(f"stages.{s}.norm", f"norm{s + 1}", stage=s))
            else:
                block = self.module.post_network[0]
                found += self.points_of_block(
                    block, "class_block", "post_network.0", dim, 0, block=len(blocks), stage=s
                )
        return [*found, self._norm("norm", f"norm{last + 1}")]

    def _norm(self, name: str, path: str, **place: Any) -> NormPoint:
        module: Any = find(self.module, path)
        dim = len(module.weight)
        return NormPoint(name=name, role="norm", path=path, module=module, dim_in=dim, dim_out=dim, **place)

    def features(self, *inputs: Any, **kwargs: Any) -> Tensor:
        """Images (B, 3, H, W) -> the class token behind the last norm, (B, d)."""
        return self.module.forward_features(*inputs, **kwargs)

    def outputs(self, *inputs: Tensor, want: Sequence[str] = ("pooled",), **kwargs: Any) -> dict[str, Any]:
        """A map of every stage (behind its norm, but the last); the pooled class token is made of the last one."""
        self.check_wanted(want)
        maps: list[Tensor] = []
        (images,) = inputs
        pooled = self.module.forward_features(images, maps=maps, **kwargs)
        everything = {"pooled": pooled, "maps": [m.permute(0, 3, 1, 2) for m in maps]}
        return {name: everything[name] for name in want}

    @property
    def feature_dim(self) -> int:
        """Width of the last stage."""
        return self.module.num_features

    def take_head(self) -> nn.Module | None:
        """The classifier; both of them, as their mean, if there are two."""
        head, second = self.module.head, self.module.dist_head
        self.module.reset_classifier(0)
        if not isinstance(head, nn.Linear):
            return None
        if not isinstance(second, nn.Linear):
            return head
        both = TwoHeads(head.in_features, head.out_features, device=head.weight.device, dtype=head.weight.dtype)
        both.head, both.dist_head = head, second
        return both

    def put_head(self, module: nn.Module, head: nn.Module) -> None:
        """Make `head` (a linear one, or two of them) the classifier of a merged module."""
        assert isinstance(module, GroupMamba)
        if getattr(head, "in_features", None) != self.feature_dim or type(head) not in (nn.Linear, TwoHeads):
            raise MismatchError(
                "the head is no plain one on the backbone's own features, so GroupMamba's classifier cannot hold it."
            )
        if isinstance(head, TwoHeads):
            module.head, module.dist_head = head.head, head.dist_head
        else:
            module.head, module.dist_head = head, None

    def head_path(self) -> str | None:
        """Where one linear classifier is put."""
        return "head"

    def data_config(self) -> dict[str, Any]:
        """As the authors evaluate (resize to 8/7, centre crop, bicubic), at the size that the network was built for."""
        channels = channels_of(self.module) or 3
        config = {"input_size": (channels, self.module.img_size, self.module.img_size), **self.module.data}
        return {**config, **{k: per_channel(config[k], channels) for k in ("mean", "std")}}

    def licence(self) -> str | None:
        """Licence of the pretrained weights."""
        if not self.pretrained:
            return None
        return "mit" if self.module.source else "apache-2.0" if self.name.endswith("-micro") else None

    def hub_id(self) -> str | None:
        """Hub repository of the released checkpoints."""
        return self.module.source if self.pretrained else None


def _fill(module: GroupMamba, state: dict[str, Tensor], name: str, own_heads: bool) -> None:
    """Load a checkpoint: every key of it, and every key of the network; heads of another shape stay as they are made."""
    own = module.state_dict()
    state = {k: v.to(own[k].dtype) if k in own else v for k, v in state.items()}
    if not own_heads:
        for key in [k for k in (*state, *own) if k.startswith(("head.", "dist_head."))]:
            if key not in own:
                state.pop(key, None)
            elif key not in state or state[key].shape != own[key].shape:
                state[key] = own[key]
    missing, left = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    other = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    if missing or left or other:
        words = [f"{len(k)} {what} (first '{k[0]}')" for k, what in ((missing, "missing"), (left, "unknown")) if k]
        words += (
            [f"{len(other)} of another shape (first '{other[0]}': {tuple(state[other[0]].shape)})"] if other else []
        )
        raise MismatchError(f"the weights are not those of '{name}': {', '.join(words)} of {len(own)} keys.")
    module.load_state_dict(state)
