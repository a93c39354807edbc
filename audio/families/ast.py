"""AST, the audio spectrogram transformer, as transformers builds it (`ASTForAudioClassification`).

A log-mel spectrogram (B, T, mel) is cut into overlapping square patches (16 bands x 16 frames, every 10 of each), f along the
frequency and t along the time. Tokens (B, 2 + f t, d) are [CLS, DIST | patches, frequency-major]; blocks are those of a pre-norm
ViT; pooled is the mean of CLS and DIST behind the final norm. The classifier, a layer norm and a linear map, is the head.

Other lengths and strides (`max_length=`, `time_stride=`, `frequency_stride=`, `num_mel_bins=`): the pretrained table of
positions is fitted as in the authors' code (`audio.families.parts.positions`).

Source: Gong, Chung and Glass, "AST: Audio Spectrogram Transformer", Interspeech 2021 (YuanGongND/ast).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from audio.families.parts.positions import BODY, GEOMETRY, grid, refit
from audio.families.parts.transformers_family import Fields, TransformersAudio
from zoo.errors import ConfigError, DataError, MissingPackageError
from zoo.families.names import check_names
from zoo.heads.base import not_held
from zoo.library import library
from zoo.points import Layout, NormPoint, Point
from zoo.points.rows import Row, make_linear
from zoo.registry import register_backbone

if TYPE_CHECKING:
    from zoo.points.recorder import Recorder

WEIGHTS = Path(__file__).parents[1] / "weights"
MODEL_TYPE = "audio-spectrogram-transformer"
AUDIOSET = "MIT/ast-finetuned-audioset-"
SPEECH = "MIT/ast-finetuned-speech-commands-v2"
# Fields of the configuration in which a published checkpoint differs from the library's defaults
CONFIGS: dict[str, Fields] = {
    "zoo:ast-micro": {
        "hidden_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "intermediate_size": 768,
        "max_length": 100,
        "frequency_stride": 16,
        "time_stride": 10,
        "num_labels": 10,
    },
    f"{AUDIOSET}10-10-0.4593": {"num_labels": 527},
    f"{AUDIOSET}12-12-0.447": {"num_labels": 527, "frequency_stride": 12, "time_stride": 12},
    f"{AUDIOSET}14-14-0.443": {"num_labels": 527, "frequency_stride": 14, "time_stride": 14},
    f"{AUDIOSET}16-16-0.442": {"num_labels": 527, "frequency_stride": 16, "time_stride": 16},
    SPEECH: {"num_labels": 35, "max_length": 128},
}
FEATURES = {SPEECH: {"mean": -6.845978, "std": 5.5654526}}  # where they are not those of AudioSet


class NormedHead(nn.Module):
    """Layer norm and linear map, (B, d) -> (B, num_classes); the keys are those of the library's classifier."""

    def __init__(self, in_features: int, out_features: int, eps: float, **factory: Any) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(in_features, eps=eps, **factory)
        self.dense = nn.Linear(in_features, out_features, **factory)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, d) -> (B, num_classes)."""
        return self.dense(self.layernorm(pooled))


@register_backbone
class AST(TransformersAudio):
    """`ast`, `ast-speech-commands`, `ast-micro`, or `transformers:<repository or folder>` of this model type."""

    family = "ast"
    gives = ("pooled", "tokens")
    weights_folder = WEIGHTS
    library_classes = {MODEL_TYPE: ("ASTConfig", "ASTForAudioClassification")}
    configs = {source: (MODEL_TYPE, fields) for source, fields in CONFIGS.items()}
    aliases = {
        "ast-micro": "zoo:ast-micro",
        "ast": f"transformers:{AUDIOSET}10-10-0.4593",
        "ast-12-12": f"transformers:{AUDIOSET}12-12-0.447",
        "ast-14-14": f"transformers:{AUDIOSET}14-14-0.443",
        "ast-16-16": f"transformers:{AUDIOSET}16-16-0.442",
        "ast-speech-commands": f"transformers:{SPEECH}",
    }
    block_table = (
        Row("tokens", "tokens", "tokens", ""),
        Row("norm", "norm", "norm1", "layernorm_before"),
        Row("linear", "q", "attn.q", "attention.q_proj"),
        Row("linear", "k", "attn.k", "attention.k_proj"),
        Row("linear", "v", "attn.v", "attention.v_proj"),
        Row("attention", "attn", "attn.product", "attention"),
        Row("linear", "o", "attn.o", "attention.o_proj"),
        Row("sublayer", "attn", "attn", "attention", entry="layernorm_before", exit="attention:output"),
        Row("norm", "norm", "norm2", "layernorm_after"),
        Row("linear", "up", "mlp.up", "mlp.fc1"),
        Row("linear", "down", "mlp.down", "mlp.fc2"),
        Row("sublayer", "mlp", "mlp", "mlp", entry="layernorm_after", exit="mlp:output"),
        Row("block", "block", "", ""),
    )
    elementwise = ("mlp.activation_fn",)
    plain_blocks = True
    tiny = (
        "ast-micro",
        {
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "intermediate_size": 96,
            "max_length": 40,
            "num_mel_bins": 32,
        },
    )

    @classmethod
    def half(cls, block: Any, role: str, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """`x + attention(LN x)`, or `x + MLP(LN x)`."""
        if role == "attn":
            return block.dropout(block.attention(block.layernorm_before(x), attention_mask, **kwargs)[0]) + x
        return block.dropout(block.mlp(block.layernorm_after(x))) + x

    # -- building ---------------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, name: str, *, pretrained: bool, **kwargs: Any) -> nn.Module:
        """An `ASTForAudioClassification`; `kwargs` are fields of its configuration, and `attn_implementation`.

        Raises:
            ConfigError: an unknown field, a length of less than one patch, or weights that cannot be had.
            MissingPackageError: no transformers, or one from before its AST was laid out as here.
        """
        transformers = library("transformers", "audio")
        options = {k: v for k, v in kwargs.items() if v is not None}
        device, attention = options.pop("device", None), options.pop("attn_implementation", None)
        cls.check_options(MODEL_TYPE, options)
        source = name.removeprefix("transformers:")
        if not pretrained:
            module = cls.random(MODEL_TYPE, {**cls.described(source)[1], **options}, attention)
            grid(module.config)
        else:
            geometry = {k: options.pop(k) for k in GEOMETRY if k in options}
            micro = name == "zoo:ast-micro"
            module = cls._micro(options, attention) if micro else cls.load(source, options, attention)
            refit(module, **geometry)
        if not hasattr(module.get_submodule(BODY), "layers"):
            raise MissingPackageError(
                f"transformers {transformers.__version__} lays its AST out in another way than described here. Install a newer "
                "one with: pip install 'adapter-zoo[audio]'"
            )
        return module if device is None else module.to(device)  # type: ignore[no-any-return]

    @classmethod
    def _micro(cls, options: Fields, attention: str | None) -> Any:
        file = WEIGHTS / "ast-micro.safetensors"
        if not file.is_file():
            raise ConfigError(
                "The weights of 'ast-micro' are not part of this installation. Make them with scripts/pretrain_ast_micro.py and "
                f"put {file.name} into the folder audio/weights, or pass pretrained=False for random weights."
            )
        module = cls.random(MODEL_TYPE, {**CONFIGS["zoo:ast-micro"], **options}, attention)
        weights = {k: v.float() for k, v in load_file(file).items()}
        own = {k: v for k, v in module.state_dict().items() if k.startswith("classifier.")}
        if own["classifier.dense.bias"].shape != weights["classifier.dense.bias"].shape:
            weights |= own  # another number of classes: their classifier is of no use
        try:
            module.load_state_dict(weights)
        except RuntimeError as error:
            raise ConfigError(f"the weights of 'ast-micro' do not fit these options: {error}") from error
        return module

    # -- what the model asks ----------------------------------------------------------------------------------------

    @property
    def body(self) -> Any:
        """The `ASTModel`."""
        return self.module.get_submodule(BODY)

    def points(self) -> list[Point]:
        """Points of the patch embedding, of every block, and of the final norm."""
        body, dim = self.body, self.feature_dim
        path = f"{BODY}.embeddings.patch_embeddings.projection"
        projection = body.embeddings.patch_embeddings.projection
        common = {"name": "patch_embed", "role": "patch", "path": path, "module": projection}
        patch = make_linear(projection, None, "", 0, common)
        found: list[Point] = [] if patch is None else [patch]
        token = f"{BODY}.embeddings.cls_token"
        for i, layer in enumerate(body.layers):
            found += self.points_of_block(
                layer,
                f"blocks.{i}",
                f"{BODY}.layers.{i}",
                dim,
                layer.attention.num_attention_heads,
                block=i,
                layout=Layout(2, grid(body.config)),
                attention={"head_dim": layer.attention.head_dim},
                tokens={"num_prefix": 2, "first": i == 0, "parameter": token if i == 0 else ""},
            )
        norm = body.layernorm
        return [
            *found,
            NormPoint(name="norm", role="norm", path=f"{BODY}.layernorm", module=norm, dim_in=dim, dim_out=dim),
        ]

    def features(self, *inputs: Tensor, **kwargs: Any) -> Tensor:
        """Spectrograms (B, max_length, num_mel_bins) -> (B, d), the mean of CLS and DIST behind the final norm.

        Raises:
            DataError: spectrograms of another size.
        """
        return self._body(*inputs, **kwargs).pooler_output  # type: ignore[no-any-return]

    def outputs(self, *inputs: Tensor, want: Sequence[str] = ("pooled",), **kwargs: Any) -> dict[str, Any]:
        """Tokens behind the final norm: CLS, DIST, then the patches, row by row of frequencies."""
        self.check_wanted(want)
        found = self._body(*inputs, **kwargs)
        everything = {"pooled": found.pooler_output, "tokens": found.last_hidden_state}
        return {name: everything[name] for name in want}

    @property
    def num_prefix(self) -> int:
        """CLS and DIST."""
        return 2

    def _body(self, *inputs: Tensor, **kwargs: Any) -> Any:
        (spectrograms,) = inputs
        config = self.body.config
        if spectrograms.ndim != 3 or spectrograms.shape[1:] != (config.max_length, config.num_mel_bins):
            raise DataError(
                f"spectrograms of shape {tuple(spectrograms.shape)}; expected (B, {config.max_length}, {config.num_mel_bins}). "
                "model.preprocess() makes one out of a waveform; zoo.load(..., max_length=...) takes another length."
            )
        check_names(self.name, self.body, kwargs)
        return self.body(spectrograms, **kwargs)

    @property
    def feature_dim(self) -> int:
        """Width of the pooled features."""
        return int(self.body.config.hidden_size)

    def new_head(self, num_classes: int, **factory: Any) -> nn.Module:
        """Layer norm and linear map, as the library's classifier."""
        return NormedHead(self.feature_dim, num_classes, self.body.config.layer_norm_eps, **factory)

    def take_head(self) -> nn.Module | None:
        """Take the classifier off; without one the library's module answers with the pooled features."""
        own: Any = self.module.classifier
        self.module.classifier = nn.Identity()
        if not isinstance(getattr(own, "dense", None), nn.Linear):
            return None
        with torch.device(own.dense.weight.device):
            head = self.new_head(own.dense.out_features, dtype=own.dense.weight.dtype)
        head.load_state_dict(own.state_dict())
        return head

    def put_head(self, module: nn.Module, head: nn.Module) -> None:
        """Make `head` the classifier of a merged module."""
        if not isinstance(head, NormedHead) or head.in_features != self.feature_dim:
            raise not_held()
        merged: Any = module
        merged.num_labels = merged.config.num_labels = head.out_features
        parts = library(
            "transformers.models.audio_spectrogram_transformer.modeling_audio_spectrogram_transformer", "audio"
        )
        merged.classifier = parts.ASTMLPHead(merged.config).to(head.dense.weight.device, head.dense.weight.dtype)
        merged.classifier.load_state_dict(head.state_dict())

    def head_path(self) -> str | None:
        """Where the library keeps the classifier."""
        return "classifier"

    def record(self, session: Recorder, point: Point, verb: str, module: nn.Module, **options: Any) -> None:
        """Verbs of attention and tokens points: more keys, prompts, and queries."""
        from zoo.families import split_queries
        from zoo.families.split_attention import record

        path = point.path if point.kind == "tokens" else point.path.rpartition(".")[0]
        block: Any = self.module.get_submodule(path)
        body, norm = self.body, block.layernorm_before
        if verb == "query":
            split_queries.record(self, session, point, module, block=block, attention=block.attention, norm=norm)
            return
        record(
            session,
            point,
            verb,
            module,
            block=block,
            attention=block.attention,
            norm=norm,
            leave=(body.layernorm, "input"),
            options=options,
        )

    # -- data -------------------------------------------------------------------------------------------------------

    def data_config(self) -> dict[str, Any]:
        """`sampling_rate` (Hz), `max_length` (frames), `num_mel_bins`, and `mean` and `std` of the log-mel features."""
        config = self.body.config
        found = {"sampling_rate": 16_000, "max_length": config.max_length, "num_mel_bins": config.num_mel_bins}
        return {**found, **self._statistics()}

    def _statistics(self) -> dict[str, float]:
        from audio.data.features import MEAN, STD

        stated = FEATURES.get(self.source) or self.preprocessor()
        return {"mean": float(stated.get("mean", MEAN)), "std": float(stated.get("std", STD))}

    def preprocess(self, train: bool, **options: Any) -> Callable[[Any], Tensor]:
        """`audio.data.features.AudioTransform`: sound -> (max_length, num_mel_bins)."""
        from audio.data.features import AudioTransform

        return AudioTransform(self.data_config(), train, **options)

    def licence(self) -> str | None:
        """Licence of the weights; None for random ones, or where none is known."""
        stated = {"zoo": "apache-2.0", "MIT": "bsd-3-clause"}
        return stated.get(self.source.split(":")[0].split("/")[0]) if self.pretrained else None

    def tiny_batch(self) -> tuple[Tensor, ...]:
        """Two random spectrograms."""
        config = self.body.config
        return (torch.randn(2, config.max_length, config.num_mel_bins),)
