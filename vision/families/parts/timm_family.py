"""What the timm families share: names, building, the classifier, preprocessing, licences."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import timm
from safetensors.torch import load_file
from torch import Tensor, nn

from zoo.backbone import Backbone
from zoo.errors import ConfigError, MismatchError, UndescribedError
from zoo.families.timm_names import architecture, image_config, resampled
from zoo.heads.base import not_held
from zoo.points import Point

if TYPE_CHECKING:
    from zoo.points.recorder import Recorder

WEIGHTS = Path(__file__).parents[2] / "weights"
MEMBER_DATA = {  # of the members that come with the package: all of them were trained on CIFAR-100
    "mean": (0.5071, 0.4866, 0.4409),
    "std": (0.2673, 0.2564, 0.2762),
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "license": "apache-2.0",
}


_RATE = dict.fromkeys(
    ("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"), float
)
_YES_NO = (
    *("qkv_bias", "qk_norm", "class_token", "no_embed_class", "pre_norm", "final_norm", "fc_norm"),
    # of EVA and BEiT
    *("qkv_fused", "swiglu_mlp", "scale_mlp", "scale_attn_inner", "attn_only_layer_scale"),
    *("use_abs_pos_emb", "use_rot_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias", "rope_rotate_half"),
    *("use_post_norm", "use_pre_transformer_norm", "use_post_transformer_norm", "use_fc_norm"),
)
# What a saved adapter may say of its backbone: sizes and forms of timm's classes, nothing that `timm.create_model` itself takes
OPTIONS: dict[str, Any] = {
    "img_size": range(1, 8193),
    "patch_size": range(1, 513),
    "window_size": range(1, 513),
    "in_chans": range(1, 1025),
    "embed_dim": range(1, 16385),
    "depth": range(1, 257),
    "depths": range(1, 257),
    "num_heads": range(1, 257),
    "mlp_ratio": float,
    "init_values": float,
    **_RATE,
    **dict.fromkeys(_YES_NO, bool),
    "reg_tokens": range(1025),
    "global_pool": ("", "avg", "avgmax", "max", "token", "map"),
    "pos_embed": ("", "none", "learn"),
    "attn_type": ("eva", "rope"),
    "num_kv_heads": range(1, 257),
    "swiglu_align_to": range(1025),
    "num_reg_tokens": range(1025),
    "rope_type": ("cat", "mixed", "dinov3", "mrope"),
    "rope_grid_indexing": ("ij", "xy"),
    "ref_feat_shape": range(1, 1025),
    "pretrained_window_sizes": range(513),
    **dict.fromkeys(("rope_grid_offset", "rope_temperature", "attn_pool_mlp_ratio"), float),
    "attn_pool_num_heads": range(1, 257),
    **dict.fromkeys(("dynamic_img_size", "dynamic_img_pad", "strict_img_size", "always_partition", "patch_norm"), bool),
}


def _below(cls: type[TimmBackbone]) -> list[type[TimmBackbone]]:
    """All classes that are derived from one."""
    return [each for sub in cls.__subclasses__() for each in (sub, *_below(sub))]


def at_size(module: Any, size: Any) -> nn.Module:
    """A network that takes images of any size, with this one as that of its preprocessing."""
    height, width = (size, size) if isinstance(size, int) else size
    config = dict(module.pretrained_cfg)
    module.pretrained_cfg = {**config, "input_size": (config.get("input_size", (3,))[0], height, width)}
    return module  # type: ignore[no-any-return]


class TimmBackbone(Backbone):
    """A backbone built by `timm.create_model`; `timm:<name>` is any timm model of the family's class."""

    timm_class: ClassVar[type[nn.Module]]
    weights_folder = WEIGHTS
    saved_options = OPTIONS
    members: ClassVar[dict[str, dict[str, Any]]] = {}  # what comes with the package: name -> options of timm's class
    # Of members, where it is another one: the class of the network, and how its images are prepared
    networks: ClassVar[dict[str, tuple[type[Any], dict[str, Any]]]] = {}

    @classmethod
    def accepts(cls, name: str) -> bool | str:
        """True for `timm:<model>[.tag]` whose architecture is built by this family's class."""
        if not name.startswith("timm:"):
            return False
        model, why = architecture(name)
        if not model:
            return why
        module = timm.model_entrypoint(model).__module__.rsplit(".", 1)[-1]
        known = {m for c in _below(TimmBackbone) for m in c.timm_modules}
        if module not in known:
            return f"timm builds it in its file {module}.py, which no family here describes."
        return module in cls.timm_modules

    timm_modules: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def known(cls, name: str) -> bool:
        """Also a plain `timm:<model>[.tag]`: one of timm's own registry. Its `hf-hub:` and `local-dir:` are somebody's."""
        return super().known(name) or re.fullmatch(r"timm:[\w.]+", name) is not None

    @classmethod
    def build(cls, name: str, *, pretrained: bool, **kwargs: Any) -> nn.Module:
        """`timm.create_model`; `num_classes=None` keeps the checkpoint's own classifier.

        Raises:
            UndescribedError: timm built a class that this family does not describe.
            ConfigError: the pretrained weights cannot be had.
        """
        options = {k: v for k, v in kwargs.items() if v is not None}
        member = name.removeprefix("zoo:")
        if member in cls.members:
            return cls._member(member, pretrained, options)
        try:
            module = timm.create_model(name.removeprefix("timm:"), pretrained=pretrained, **options)
        except TypeError as error:
            raise ConfigError(f"timm does not take these options for '{name}': {error}") from error
        except Exception as error:
            if not pretrained:
                raise
            raise ConfigError(
                f"The pretrained weights of '{name}' could not be loaded: {type(error).__name__}: {error}. Check the network "
                "and the name (timm.list_pretrained()), or pass pretrained=False for random weights."
            ) from error
        if not isinstance(module, cls.timm_class):
            raise UndescribedError(
                f"timm builds '{name}' as {type(module).__name__}; the family '{cls.family}' describes {cls.timm_class.__name__}."
            )
        if (odd := cls.odd(module)) is not None:
            described = ", ".join(kind.__name__ for kind in cls.timm_blocks)
            raise UndescribedError(f"'{name}' is built of {odd}; the family '{cls.family}' describes {described}.")
        return module

    timm_blocks: ClassVar[
        tuple[type[nn.Module], ...]
    ] = ()  # of which `blocks` must be, where the family reads them; (): any

    @classmethod
    def odd(cls, module: nn.Module) -> str | None:
        """The class of a block that is not described; None: all are."""
        blocks: Any = getattr(module, "blocks", ()) if cls.timm_blocks else ()
        return next((type(b).__name__ for b in blocks if not isinstance(b, cls.timm_blocks)), None)

    @classmethod
    def describes(cls, module: nn.Module) -> bool:
        """A network of timm's own class whose blocks are all described."""
        own = cls.timm_class if isinstance(cls.timm_class, tuple) else (cls.timm_class,)
        return type(module) in own and cls.odd(module) is None

    @classmethod
    def _member(cls, name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
        """A member that comes with the package; another number of classes gets a head of its own."""
        device = options.pop("device", None)
        network, data = cls.networks.get(name, (cls.timm_class, {}))
        file = WEIGHTS / f"{name}.safetensors"
        if pretrained and not file.is_file():  # told before hundreds of megabytes are made
            raise ConfigError(
                f"The weights of '{name}' are not part of this installation ('{file.name}' is not in {WEIGHTS}). Pass "
                "pretrained=False for random ones, or checkpoint='<file>' for weights of your own."
            )
        try:
            module = network(**{**cls.members[name], **options})
        except TypeError as error:
            raise ConfigError(f"timm does not take these options for '{name}': {error}") from error
        module.pretrained_cfg = module.default_cfg = {  # type: ignore[assignment]
            **MEMBER_DATA,
            **data,
            "input_size": (3, cls.members[name]["img_size"], cls.members[name]["img_size"]),
            "num_classes": cls.members[name]["num_classes"],
        }
        if pretrained:
            weights, own = resampled({k: v.float() for k, v in load_file(file).items()}, module), module.state_dict()
            for key in [k for k in weights if k.startswith("head.")]:
                if key not in own:
                    del weights[key]
                elif own[key].shape != weights[key].shape:
                    weights[key] = own[key]
            try:
                module.load_state_dict(weights)
            except RuntimeError as error:
                raise ConfigError(f"the weights of '{name}' do not fit these options: {error}") from error
        return module.to(device) if device is not None else module

    def record(self, session: Recorder, point: Point, verb: str, module: nn.Module, **options: Any) -> None:
        """Verbs of attention and tokens points: more keys and prompts, and queries (`zoo.families.fused_queries`)."""
        if verb == "query":
            from zoo.families import fused_queries

            block = self.module.get_submodule(point.path.rpartition(".")[0])
            fused_queries.record(session, point, module, block)
            return
        from vision.families.parts.attention import record

        record(self, session, point, verb, module, **options)

    def features(self, *inputs: Tensor, **kwargs: Any) -> Tensor:
        """Images (B, 3, H, W) -> pooled features (B, d) in front of the classifier.

        Raises:
            MismatchError: images of another size than the network was built for, if it takes no other.
        """
        self.check_size(*inputs)
        tokens = self.module.forward_features(*inputs, **kwargs)  # type: ignore[operator]
        pooled = self.module.forward_head(tokens, pre_logits=True)  # type: ignore[operator]
        return pooled.contiguous()  # a class token is a view, for which backward would keep the tokens of the last norm

    def check_size(self, images: Any = None, *_: Any) -> None:
        """Raise MismatchError for images (B, 3, H, W) of a size that timm would refuse by an assertion."""
        stem: Any = getattr(self.module, "patch_embed", None)
        size = getattr(stem, "img_size", None) if getattr(stem, "strict_img_size", False) else None
        if size is not None and isinstance(images, Tensor) and images.ndim == 4 and images.shape[-2:] != tuple(size):
            height, width = images.shape[-2:]
            raise MismatchError(
                f"The images are {height} x {width} pixels; '{self.name}' is built for {size[0]} x {size[1]}. model.preprocess() "
                f"makes images of that size, and zoo.load(..., img_size={height if height == width else (height, width)}) a "
                "network for these."
            )

    @property
    def pools(self) -> bool:  # type: ignore[override]
        """False with `global_pool=""`: all tokens (or a map) come out, and no classifier stands on these."""
        own = getattr(self.module, "global_pool", None)
        if not isinstance(own, str):
            own = getattr(getattr(getattr(self.module, "head", None), "global_pool", None), "pool_type", None)
        return own != ""

    @property
    def feature_dim(self) -> int:
        """Width of the pooled features."""
        return int(self.module.head_hidden_size)  # type: ignore[arg-type]

    def take_head(self) -> nn.Module | None:
        """Take timm's classifier off; pooling, final norm and dropout in front of it stay."""
        head = self.module.get_classifier()  # type: ignore[operator]
        self.module.reset_classifier(0)  # type: ignore[operator]
        # A distilled model has two classifiers, one for each token; no single head on the mean of the tokens equals both.
        return head if isinstance(head, nn.Linear) and self.pools else None

    def put_head(self, module: nn.Module, head: nn.Module) -> None:
        """Make `head` (an nn.Linear on the pooled features) the classifier of a merged timm module."""
        if not isinstance(head, nn.Linear) or head.in_features != self.feature_dim:
            raise not_held("timm")
        module.reset_classifier(head.out_features)  # type: ignore[operator]
        own = module.get_classifier()  # type: ignore[operator]
        # Distilled models average two classifiers of two tokens: twice the same one is one on the mean of the tokens.
        for classifier in own if isinstance(own, tuple) else (own,):
            classifier.load_state_dict(head.state_dict())
            classifier.to(device=head.weight.device, dtype=head.weight.dtype)

    def name_classes(self, module: nn.Module, classes: Sequence[str]) -> None:
        """Write the names of the classes where timm's `save_for_hf` and `push_to_hf_hub` look for them."""
        named = {"num_classes": len(classes), "label_names": list(classes)}
        module.pretrained_cfg = {**(getattr(module, "pretrained_cfg", None) or {}), **named}  # type: ignore[assignment]

    def head_path(self) -> str | None:
        """Where timm keeps the classifier: `head`, or `head.fc`."""
        own = self.module.get_classifier()  # type: ignore[operator]
        return next((path for path, module in self.module.named_modules() if module is own), None)

    def data_config(self) -> dict[str, Any]:
        """timm's data configuration of the checkpoint, at the image size and channels that the module was built for."""
        return image_config(self.module)

    def licence(self) -> str | None:
        """Licence of the checkpoint as timm's pretrained configuration states it; None for random weights."""
        return self._source().get("license")

    def hub_id(self) -> str | None:
        """Hub repository of the checkpoint; None for random weights."""
        return self._source().get("hf_hub_id")

    def _source(self) -> dict[str, Any]:
        config = (getattr(self.module, "pretrained_cfg", None) or {}) if self.pretrained else {}
        return {**config, "hf_hub_id": None} if self.name.startswith("timm:local-dir:") else config
