"""What the two text-generating families, VL-T5 and VL-BART, share: names, building, input, points, tokenizer, generation.

    features(input_ids (B, L), attention_mask (B, L), decoder_input_ids (B, T),
             visual_features (B, N, feat_dim), boxes (B, N, 4), image_ids (B, N), object_ids (B, N), visual_mask (B, N))
        -> scores of all words (B, T, V)

All from `visual_features` on may be left out: then it is the library's text network. `decoder_input_ids` are the answer, one
place to the right (`shift`); `labels=` in their place is the answer itself. Names: the aliases, which have a visual embedding and
the released files' vocabulary, or `transformers:<repository or folder>`, which has them if its configuration says so or
`feat_dim=` is given.

Tables of embeddings are no points: words, positions, the order of images (`visual_embedding.img_order_embedding`). They are
neither projections nor norms, so only `full` trains them; the visual embedding as a whole is the condition `encoder.visual`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from multimodal.families.seq2seq import build as seq2seq_build
from multimodal.families.seq2seq import words
from multimodal.families.seq2seq.options import OPTIONS
from multimodal.families.seq2seq.visual_embedding import visual_points
from zoo.backbone import Backbone
from zoo.errors import ConfigError
from zoo.library import pretrained_config
from zoo.points import NormPoint, Point
from zoo.points.rows import Row, find

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from multimodal.families.seq2seq.attention import EncoderSite, LibraryAttention, SplitKeys
    from zoo.data.dataset import ImageDataset
    from zoo.points.recorder import Recorder

VISUAL = ("visual_features", "boxes", "image_ids", "object_ids", "visual_mask")  # inputs behind the texts, in order
PREFIXES = {  # what a question is preceded by in fine-tuning
    "vqa": "vqa: ",
    "gqa": "gqa: ",
    "nlvr": "nlvr: ",
    "caption": "caption:",
    "refer": "visual grounding: ",
    "translate": "translate English to German: ",
}


def visual_inputs(given: Sequence[Any]) -> dict[str, Any]:
    """The inputs behind the texts by name, in the order of `features`; those that are not given are None.

    Raises:
        ConfigError: there are more.
    """
    if len(given) > len(VISUAL):
        raise ConfigError(f"{len(given)} inputs behind the texts; expected at most {len(VISUAL)}: {', '.join(VISUAL)}.")
    return dict.fromkeys(VISUAL) | dict(zip(VISUAL, given, strict=False))


class Seq2Seq(Backbone):
    """A transformers encoder-decoder, with or without visual input."""

    modality = "image-text"
    saved_options = OPTIONS
    pools = False
    bare_sublayers = False
    task = "generate"
    beams = True
    tiny_classes = None
    weights_folder = Path(__file__).parents[2] / "weights"

    model_type: ClassVar[str]
    config_class: ClassVar[str]
    classes: ClassVar[
        tuple[str, str]
    ]  # without visual input (the library's), with it (`multimodal.families.seq2seq.vl_models`)
    # alias target -> (repository of the weights, configuration)
    members: ClassVar[dict[str, tuple[str | None, dict[str, Any]]]]
    # alias -> the image backbone that it was trained with, and how `GridFeatures` took its tokens
    front_ends: ClassVar[dict[str, tuple[str, dict[str, Any]]]] = {}
    vocabularies: ClassVar[dict[int, int]]  # size without visual words -> size with them
    encoder_path: ClassVar[str]
    decoder_path: ClassVar[str]
    word_key: ClassVar[str]
    encoder_table: ClassVar[tuple[Row, ...]]
    decoder_table: ClassVar[tuple[Row, ...]]
    blocks_path: ClassVar[str]
    stack_norms: ClassVar[tuple[tuple[str, str], ...]]  # (name, path) of the norms of a stack, first and last

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, name)
        self._words: list[str] | None = None
        self._tokenizer: Any = None
        self._foreign = False

    # -- building ---------------------------------------------------------------------------------------------------

    @classmethod
    def accepts(cls, name: str) -> bool | str:
        """True for `transformers:<repository or folder>` whose configuration is of this family's type."""
        if not name.startswith("transformers:"):
            return False
        found = pretrained_config(name.partition(":")[2])
        return found if isinstance(found, str) else found.get("model_type") == cls.model_type

    @classmethod
    def known(cls, name: str) -> bool:
        """Also the names of `members`."""
        return super().known(name) or name in cls.members

    @classmethod
    def build(cls, name: str, *, pretrained: bool, **kwargs: Any) -> nn.Module:
        """The library's network, or ours with a visual embedding (`multimodal.families.seq2seq.build`)."""
        return seq2seq_build.build(cls, name, pretrained, **kwargs)

    def configure(self, words: Sequence[str] | None = None, checkpoint: str | None = None, **options: Any) -> None:
        """Remember the vocabulary that the tokenizer is made of, and whether the weights are somebody else's."""
        self._words = None if words is None else list(words)
        self._foreign = checkpoint is not None

    # -- parts ------------------------------------------------------------------------------------------------------

    attention_site: type[LibraryAttention]
    encoder_site: type[EncoderSite]

    @property
    def encoder(self) -> Any:
        """The library's encoder stack."""
        return self.module.get_submodule(self.encoder_path)

    @property
    def decoder(self) -> Any:
        """The library's decoder stack."""
        return self.module.get_submodule(self.decoder_path)

    @property
    def config(self) -> Any:
        """The library's configuration."""
        return self.module.config

    @property
    def feature_dim(self) -> int:
        """V, the size of the vocabulary."""
        return int(self.config.vocab_size)

    @property
    def feat_dim(self) -> int | None:
        """Width of the visual features; None for a text network."""
        return getattr(self.config, "feat_dim", None)

    def heads(self, stack: Any) -> tuple[int, int]:
        """(number of heads, width of one) in a stack."""
        raise NotImplementedError

    def self_attention(self, block: nn.Module) -> nn.Module:
        """The self-attention of an encoder block."""
        raise NotImplementedError

    def prompt_keys(self, block: nn.Module) -> SplitKeys:
        """How tokens that enter an encoder block become keys and values."""
        raise NotImplementedError

    # -- points -----------------------------------------------------------------------------------------------------

    def points(self) -> list[Point]:
        """The visual embedding, then encoder and decoder in forward order."""
        found = visual_points(self.encoder, self.encoder_path, self.config)
        for tower, stack, path in (
            ("encoder", self.encoder, self.encoder_path),
            ("decoder", self.decoder, self.decoder_path),
        ):
            first, last = self.stack_norms
            found += self._norm(tower, stack, path, *first)
            count, width = self.heads(stack)
            table = self.encoder_table if tower == "encoder" else self.decoder_table
            for i, block in enumerate(stack.get_submodule(self.blocks_path)):
                found += self.points_of_block(
                    block,
                    f"{tower}.blocks.{i}",
                    f"{path}.{self.blocks_path}.{i}",
                    self.config.d_model,
                    count,
                    block=i,
                    tower=tower,
                    table=table,
                    attention={"head_dim": width, "causal": tower == "decoder"},
                    tokens={"first": i == 0},
                )
            found += self._norm(tower, stack, path, *last)
        for point in found:
            if point.kind == "attention" and point.role == "cross":
                point.causal = False  # type: ignore[attr-defined]
        return found

    def _norm(self, tower: str, stack: nn.Module, path: str, name: str, inner: str) -> list[Point]:
        module = find(stack, inner) if inner else None
        if module is None:
            return []
        dim = self.config.d_model
        where = f"{path}.{inner}"
        return [
            NormPoint(
                name=f"{tower}.{name}", role="norm", path=where, module=module, dim_in=dim, dim_out=dim, tower=tower
            )
        ]

    def record(self, session: Recorder, point: Point, verb: str, module: nn.Module, **options: Any) -> None:
        """Extra keys and prompts (`multimodal.families.seq2seq.attention`)."""
        if verb not in ("extend", "gate", "prompt"):
            super().record(session, point, verb, module, **options)
        from multimodal.families.seq2seq.attention import record

        record(self, session, point, verb, module, **options)

    # -- running ----------------------------------------------------------------------------------------------------

    def features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        visual_features: Tensor | None = None,
        boxes: Tensor | None = None,
        image_ids: Tensor | None = None,
        object_ids: Tensor | None = None,
        visual_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Scores (B, T, V) of the word behind each of `decoder_input_ids`, or at each of `labels`; see the top of this file.

        `labels` (B, T), -100 where there is none, are the answer itself, and are shifted here, as the library does it.

        Raises:
            ConfigError: neither decoder input nor labels, or both; visual input to a text network or of another width.
        """
        if labels is not None:
            if decoder_input_ids is not None:
                raise ConfigError("Give either decoder_input_ids or labels=..., which are shifted here.")
            decoder_input_ids = self.shift(labels)
        visual = visual_inputs((visual_features, boxes, image_ids, object_ids, visual_mask))
        return self._run(self.module, input_ids, attention_mask, decoder_input_ids, visual)

    def run(self, module: nn.Module, *inputs: Any) -> Tensor:
        """As `features`, of a plain module."""
        ids, mask, answer = [*inputs[:3], None, None, None][:3]
        return self._run(module, ids, mask, answer, visual_inputs(inputs[3:]))

    def _run(self, module: Any, ids: Any, mask: Tensor | None, answer: Tensor | None, visual: dict[str, Any]) -> Tensor:
        if answer is None:
            raise ConfigError(
                "decoder_input_ids are missing: give the answer's tokens shifted to the right (model.family.shift(labels)), the "
                "tokens themselves as labels=..., or generate an answer with multimodal.tasks.generate."
            )
        self.check_visual(visual["visual_features"])
        given = {k: v for k, v in visual.items() if v is not None}
        # A cache would be filled twice by blocks that are run again for their gradients
        return module(ids, mask, answer, use_cache=False, **given).logits  # type: ignore[no-any-return]

    @property
    def front_end(self) -> tuple[str, dict[str, Any]] | None:
        """The image backbone whose grid features the network was trained with, if it is one of the zoo."""
        return self.front_ends.get(self.name)

    def check_visual(self, features: Tensor | None) -> None:
        """Raise ConfigError unless the network reads features of this width."""
        if features is None:
            return
        if self.feat_dim is None:
            raise ConfigError(
                f"'{self.name}' reads text alone. Load it with feat_dim={features.shape[-1]} to give it images."
            )
        if features.shape[-1] != self.feat_dim:
            raise ConfigError(
                f"The features are {features.shape[-1]} wide, and '{self.name}' reads {self.feat_dim}. Load it with "
                f"feat_dim={features.shape[-1]}, or take the features of another network."
            )

    def check_routed(self, *inputs: Any) -> None:
        """Raise ConfigError for ids (N,) that all samples share: with an adapter for each sample, give them as (B, N)."""
        if any(isinstance(x, Tensor) and len(x) != len(inputs[0]) for x in inputs):
            raise ConfigError(
                "With adapters= every input needs a row for each sample: image_ids and object_ids (B, N)."
            )

    def shift(self, labels: Tensor) -> Tensor:
        """Labels (B, T), -100 where there is none -> decoder input (B, T): the start word, then all but the last."""
        return self.module.prepare_decoder_input_ids_from_labels(labels)  # type: ignore[operator, no-any-return]

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Mean over all labels of -log p, as the library's `loss`: scores (B, T, V) of `model(..., labels=labels)`."""
        return nn.functional.cross_entropy(scores.float().flatten(0, 1), labels.flatten(), ignore_index=-100)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the pretrained weights with the words that name visual tokens; another one can be set.

        Raises:
            ConfigError: it cannot be had.
        """
        if self._tokenizer is None:
            self._tokenizer = seq2seq_build.tokenizer(self, self._words)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        self._tokenizer = value

    def visual_words(self) -> list[str]:
        """The words that the released vocabulary has behind the library's, in the order of their ids."""
        return [f"<vis_extra_id_{i}>" for i in reversed(range(words.VISUAL))]

    @classmethod
    def open_dataset(cls, data: Any, split: str | None = None, **options: Any) -> ImageDataset:
        """Questions, or images with captions (`multimodal.data.questions.open_questions`)."""
        from multimodal.data.questions import open_questions

        return open_questions(data, split=split, **options)

    def preprocess(self, train: bool, **options: Any) -> Callable[[Any], Any]:
        """Never: this family reads features.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"'{self.name}' reads words and visual features, no pictures: make features with multimodal.data.visual_features, or "
            "train with task='generate', which does."
        )

    def hub_id(self) -> str | None:
        """The repository that the weights came from."""
        name = self.aliases.get(self.name, self.name)
        if not self.pretrained or self._foreign:
            return None
        if name in self.members:
            return self.members[name][0]
        source = name.partition(":")[2]
        return None if Path(source).expanduser().is_dir() else source

    def licence(self) -> str | None:
        """Licence of the weights of the aliases: those of T5 and BART, and our own; None for others."""
        return "apache-2.0" if self.pretrained and not self._foreign and self.name in self.aliases else None

    def hub_task(self, num_classes: int) -> str | None:
        """Questions about images, or text alone."""
        return "text-generation" if self.feat_dim is None else "visual-question-answering"

    def usage(self, num_classes: int) -> tuple[list[str], list[str]]:
        """As `Backbone.usage`: what is answered to a question."""
        imports, lines = ["from multimodal.tasks.generate import Generate"], []
        question, seen = "what is in the picture?", "None"
        if self.feat_dim is None:
            question = "translate English to German: The house is small."
        elif self.front_end is not None:
            imports, seen = ["from PIL import Image", *imports], 'Image.open("photo.jpg")'
        else:
            imports, seen = ["import torch", *imports], "(features, boxes)"
            lines = [
                f"features, boxes = torch.randn(36, {self.feat_dim}), torch.rand(36, 4)  # in place of a detector's"
            ]
        prefix = "" if self.feat_dim else 'prefix=""'
        return imports, [*lines, f'answers = Generate({prefix}).answer(model, [{seen}], ["{question}"])']

    def tiny_batch(self) -> tuple[Tensor, ...]:
        """A question with padding, an answer, features and boxes, for two."""
        ids = torch.randint(3, self.feature_dim, (2, 7))
        mask = torch.ones_like(ids)
        mask[1, 5:] = 0
        answer = torch.randint(3, self.feature_dim, (2, 4))
        if self.feat_dim is None:
            return ids, mask, answer
        return ids, mask, answer, torch.randn(2, 5, self.feat_dim), torch.rand(2, 5, 4)

    def example_batch(self, size: int = 2, classify: bool = False) -> tuple[Tensor, ...]:
        """A question of 20 tokens, an answer of 10, and the 36 regions of an image that the authors' features have."""
        question, answer = (torch.randint(3, self.feature_dim, (size, length)) for length in (20, 10))
        seen = () if self.feat_dim is None else (torch.randn(size, 36, self.feat_dim), torch.rand(size, 36, 4))
        return question, torch.ones_like(question), answer, *seen
