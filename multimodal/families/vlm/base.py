"""What decoder language models of transformers share, with eyes and without: building, input, words, generation.

    features(input_ids (B, L), attention_mask (B, L), answer (B, T), *what the eyes see) -> scores of all words

Without `answer`: the library's scores (B, L, V) of the word behind each of `input_ids`. With `answer`, which stands behind the
text (-100 where a row has no more words): scores (B, T, V) of each of its words, of those before it. The text then has its
padding in front (`padding_side="left"`), so that all answers begin at the same place. What else the library's forward takes can
be given by name.

Words are counted from the first that is no padding, as when a text is written: the library's own forward counts padding too,
which is the same to rotary positions alone, and not to keys without a place.

The table of words and the output, which is often the same table, are no points: only `full` trains them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from multimodal.data.chats import Writer
from multimodal.families.vlm.language import LANGUAGE, LanguageSite, check_attention
from multimodal.families.vlm.options import TEXT_OPTIONS, merged
from multimodal.families.vlm.words import NONE, SPARE, check_words, places, untold
from zoo.engine.attention import Given, recorder
from zoo.errors import ConfigError, DataError, nearest
from zoo.families.children import mixes
from zoo.families.names import check_names
from zoo.families.precision import stored_dtype, through
from zoo.families.transformers_family import Fields, TransformersBackbone
from zoo.library import library, reaching
from zoo.points import Layout, Point

if TYPE_CHECKING:
    from zoo.points.recorder import Recorder

__all__ = ["LanguageBackbone"]

WEIGHTS = "model.safetensors"  # the library's name of the file


class LanguageBackbone(TransformersBackbone):
    """A decoder of transformers that writes text."""

    saved_options = {**TEXT_OPTIONS, "attn_implementation": ("eager", "sdpa")}
    task = "generate"
    beams = True
    pools = False
    gives = ()
    tiny_classes = None
    bare_sublayers = False
    loads_in_dtype = True
    head_parts = ()
    weights_folder = Path(__file__).parents[2] / "weights"

    visual: ClassVar[tuple[str, ...]] = ()  # the library's names of what stands behind the answer

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, name)
        self._tokenizer: Any = None

    def again(self, module: nn.Module, name: str) -> LanguageBackbone:
        """With the same words, where they were set."""
        made: Any = super().again(module, name)
        for part in ("_tokenizer", "_processor"):
            if hasattr(self, part):
                setattr(made, part, getattr(self, part))
        return made  # type: ignore[no-any-return]

    # -- building ---------------------------------------------------------------------------------------------------

    @classmethod
    def describes(cls, module: nn.Module) -> bool:
        """The library's own class of one of the family's types."""
        kind = type(module)
        ours = kind.__module__.startswith("transformers.models.")
        return ours and kind.__name__ in {model for _, model in cls.library_classes.values()}

    @classmethod
    def check_options(cls, model_type: str, options: Fields) -> None:
        """Raise ConfigError for an option that is no field of the configuration, or of that of a part."""
        super().check_options(model_type, options)
        config = getattr(library("transformers", cls.extra), cls.library_classes[model_type][0])()
        for name, value in options.items():
            part: Any = getattr(config, name, None)
            if not isinstance(value, dict) or not hasattr(part, "to_dict"):
                continue
            if "model_type" in value:  # a part of another kind than the usual one
                part = cls._config_of(str(value["model_type"]), name)
            known = sorted([*part.to_dict(), "head_dim"])
            if wrong := [key for key in value if key not in known]:
                raise ConfigError(f"'{name}' has no option '{wrong[0]}'. {nearest(wrong[0], known)}")

    @classmethod
    def _config_of(cls, kind: str, name: str) -> Any:
        found = library("transformers", cls.extra).CONFIG_MAPPING
        if kind not in found:
            raise ConfigError(f"'{name}' is of the model_type '{kind}', which transformers does not know.")
        return found[kind]()

    @classmethod
    def build(cls, name: str, *, pretrained: bool, **kwargs: Any) -> nn.Module:
        """As the families of transformers; a checkpoint is read in `dtype`, where that is exact (`zoo.families.precision`)."""
        dtype = kwargs.pop("dtype", None)
        options = {k: v for k, v in kwargs.items() if v is not None}
        device, attention = options.pop("device", None), options.pop("attn_implementation", None)
        source = name.removeprefix("transformers:")
        model_type, fields = cls.described(source)
        cls.check_options(model_type, options)
        if "text_config" in options and "text_config" not in fields:  # files of the Hub have its fields outside
            options = {**options.pop("text_config"), **options}
        if pretrained:
            module = cls.read(source, model_type, merged(fields, options) if options else None, attention, dtype)
        else:
            module = cls.random(model_type, merged(fields, options), attention)
        cls.check_layout(module)
        return module if device is None else module.to(device)  # type: ignore[no-any-return]

    @classmethod
    def read(cls, source: str, model_type: str, fields: Fields | None, attention: str | None, dtype: Any) -> Any:
        """A model with the weights of a repository or folder; `fields`: of a configuration with options.

        Raises:
            ConfigError: the weights cannot be had, or are not all there. WeightsError: they are of another body.
        """
        options: Fields = {"dtype": torch.float32}
        if dtype is not None:
            options["dtype"] = through(stored_dtype(source, "", WEIGHTS, cls.left_out), dtype) or dtype
        if fields is not None:
            config = getattr(library("transformers", cls.extra), cls.library_classes[model_type][0])
            options["config"] = config.from_dict({k: v for k, v in fields.items() if k != "model_type"})
        return cls.load(source, options, attention)

    # -- parts ------------------------------------------------------------------------------------------------------

    @property
    def model_type(self) -> str:
        """The library's word for the kind of network, by the class that was built."""
        return next(k for k, (_, model) in self.library_classes.items() if model == type(self.module).__name__)

    @property
    def language_path(self) -> str:
        """Path of the language network without its output."""
        return "model"

    @property
    def language(self) -> Any:
        """The language network without its output."""
        return self.module.get_submodule(self.language_path)

    @property
    def text_config(self) -> Any:
        """The configuration of the language network."""
        return self.config

    @property
    def feature_dim(self) -> int:
        """V, the size of the vocabulary."""
        return int(self.text_config.vocab_size)

    @property
    def context(self) -> int | None:
        """Places of words that the network was made for, stretched if its configuration says so; None: it does not say."""
        config = self.text_config
        count, rope = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None)
        factor = rope.get("factor") if isinstance(rope, dict) else None
        return None if count is None else int(count * max(1.0, factor or 1.0))

    # -- points -----------------------------------------------------------------------------------------------------

    def language_points(self, prefix: str, **place: Any) -> list[Point]:
        """Points of the language blocks, and of the norm behind them."""
        config, found = self.text_config, []
        for i, block in enumerate(self.language.layers):
            attention, few = block.self_attn, 1
            heads: Fields = {"causal": True}
            if mixes(attention):
                width = int(attention.head_dim)
                heads |= {"head_dim": width, "query_heads": attention.q_proj.out_features // width}
                few = attention.k_proj.out_features // width
            found += self.points_of_block(
                block,
                f"{prefix}blocks.{i}",
                f"{self.language_path}.layers.{i}",
                config.hidden_size,
                few,
                block=i,
                table=LANGUAGE,
                layout=Layout(causal=True),
                attention=heads,
                **place,
            )
        return found + self.norm_at(f"{prefix}norm", f"{self.language_path}.norm", **place)

    def packs(self, module: nn.Module) -> bool:
        """Also of an attention that is one projection."""
        return super().packs(module) or bool(getattr(module, "packed", False))

    @classmethod
    def children(cls) -> Any:
        """Shared keys and values, fewer neurons, one projection, nothing."""
        from multimodal.families.vlm.children import LanguageChildren

        return LanguageChildren()

    def record(self, session: Recorder, point: Point, verb: str, module: nn.Module, **options: Any) -> None:
        """More keys for the language blocks."""
        if verb not in ("extend", "gate"):
            super().record(session, point, verb, module, **options)
        check_attention(point.module, point.name)
        recorder(session, point, verb, module)(point.module, LanguageSite, "forward", Given(module))

    # -- running ----------------------------------------------------------------------------------------------------

    def features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        answer: Tensor | None = None,
        *seen: Any,
        **more: Any,
    ) -> Tensor:
        """Scores; see the top of this file.

        Raises:
            ConfigError: padding behind the text and an answer, or a name that is no input. DataError: images that are missing or
                do not fit the text.
        """
        check_names(self.name, self.module, more, SPARE)
        return self._run(self.module, input_ids, attention_mask, answer, seen, more)

    def run(self, module: nn.Module, *inputs: Any) -> Tensor:
        """As `features`, of a plain module."""
        ids, mask, answer = [*inputs[:3], None, None, None][:3]
        return self._run(module, ids, mask, answer, inputs[3:], {})

    def _run(
        self, module: Any, ids: Tensor, mask: Tensor | None, answer: Tensor | None, seen: Sequence[Any], more: Fields
    ) -> Tensor:
        check_words(self.name, ids, mask, answer)
        keep: Fields = {}
        if answer is not None:
            ids, mask = self.joined(ids, mask, answer)
            keep = {"logits_to_keep": answer.shape[1]}
        given = self.inputs(ids, mask, seen, more)
        # A cache would be filled twice by blocks that are run again for their gradients
        return self.called(module, {"use_cache": False, **given, **keep}).logits  # type: ignore[no-any-return]

    def joined(self, ids: Tensor, mask: Tensor | None, answer: Tensor) -> tuple[Tensor, Tensor]:
        """Text (B, L) with all but the last word of an answer (B, T) behind it, and its mask, both (B, L + T - 1)."""
        if mask is None:
            mask = torch.ones_like(ids)
        if not untold(mask) and not bool(mask[:, -1].all()):
            raise ConfigError(
                "A text with an answer has its padding in front (tokenizer.padding_side = 'left'): in some rows of this batch "
                "the last place is padding, behind which no answer can be scored."
            )
        there = answer.ne(NONE)
        words = answer.masked_fill(~there, self.padding)[:, :-1]
        return torch.cat([ids, words], dim=1), torch.cat([mask, there[:, :-1].to(mask.dtype)], dim=1)

    @property
    def padding(self) -> int:
        """The word that stands at places that are masked."""
        given = getattr(self.text_config, "pad_token_id", None)
        return 0 if given is None else int(given)

    def inputs(self, ids: Tensor, mask: Tensor | None, seen: Sequence[Any], more: Fields) -> Fields:
        """The library's inputs by name.

        Raises:
            ConfigError: more inputs than there are names.
        """
        if len(seen) > len(self.visual):
            names = ", ".join(("input_ids", "attention_mask", "answer", *self.visual))
            raise ConfigError(f"{3 + len(seen)} inputs; '{self.name}' takes {names}.")
        named = {**dict(zip(self.visual, seen, strict=False)), **more}
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": places(mask), **named}
        return {name: value for name, value in given.items() if value is not None}

    def called(self, module: Any, given: Fields) -> Any:
        """The library's output.

        Raises:
            DataError: images and text that do not fit each other.
        """
        try:
            return module(**given)
        except IndexError as error:
            ids, count = given["input_ids"], self.feature_dim
            if untold(ids) or (int(ids.max()) < count and int(ids.min()) >= 0):
                raise
            raise DataError(
                f"The text has words from {int(ids.min())} to {int(ids.max())}, and '{self.name}' knows {count}, counted from "
                "0. Make them with its own tokenizer (model.family.tokenizer)."
            ) from error
        except ValueError as error:
            if "do not match" not in str(error):
                raise
            raise DataError(
                f"{str(error).splitlines()[0]}: the text has more or fewer places for images than the images fill. Make both "
                "with the same processor, and cut no text in the middle of an image."
            ) from error

    def loss(self, scores: Tensor, answer: Tensor) -> Tensor:
        """Mean over all words of an answer (B, T) of -log p: scores (B, T, V) of `model(ids, mask, answer)`."""
        return nn.functional.cross_entropy(scores.float().flatten(0, 1), answer.flatten(), ignore_index=NONE)

    # -- words ------------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the weights; another one can be set.

        Raises:
            ConfigError: it cannot be had.
        """
        if self._tokenizer is None:
            self._tokenizer = self.pretrained_part("AutoTokenizer", "tokenizer")
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        self._tokenizer = value

    @property
    def processor(self) -> Any:
        """What makes inputs of texts: the tokenizer."""
        return self.tokenizer

    def writer(self) -> Writer:
        """Tokenizer and chat template as data and tasks use them."""
        return Writer(self.processor, self.tokenizer, (), False, self.name, self.context)

    def written(self, ids: Tensor, mask: Tensor, seen: Sequence[Any], **options: Any) -> Tensor:
        """Words (B, T) that the network writes behind texts (B, L); `options` of the library's `generate`.

        To be called within `model.passing`, so that trained parts of the network stand in.
        """
        given = self.inputs(ids, mask, seen, {})
        given.pop("position_ids", None)  # the library counts by itself as it goes on
        network: Any = self.module
        ends = network.generation_config.eos_token_id
        own = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        end = self.tokenizer.eos_token_id
        marks = {"eos_token_id": list(dict.fromkeys([*own, end])), "pad_token_id": self.writer().pad}
        # a model's own settings for talking (temperature and the like) have no place where the best words are taken
        quiet = {} if options.get("do_sample") else {"temperature": None, "top_p": None, "top_k": None}
        return network.generate(**given, **{**marks, **quiet, **options})[:, ids.shape[1] :]  # type: ignore[no-any-return]

    def pretrained_part(self, kind: str, what: str) -> Any:
        """A tokenizer or processor of the weights' source."""
        try:
            made: Any = getattr(library("transformers", self.extra), kind)
            with reaching():
                return made.from_pretrained(self.source, trust_remote_code=False)
        except Exception as error:  # a class of its own for each way in which network and files can fail
            raise ConfigError(
                f"The {what} of '{self.name}' could not be loaded: {type(error).__name__}: {str(error).splitlines()[0][:250]}. "
                f"Check the network, or set it yourself: model.family.{what} = ... (transformers' {kind})."
            ) from error

    def hub_task(self, num_classes: int) -> str | None:
        """The Hub's word for it."""
        return "text-generation"

    def usage(self, num_classes: int) -> tuple[list[str], list[str]]:
        """As `Backbone.usage`: what is answered to a question."""
        return (
            ["from multimodal.tasks.generate import Generate"],
            ['answers = Generate().answer(model, [None], ["What is the capital of France?"])'],
        )

    # -- examples ---------------------------------------------------------------------------------------------------

    def example_text(self, size: int, length: int, words: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random words (size, length) with padding in front of the second row, and answers (size, words)."""
        ids = torch.randint(5, self.feature_dim, (size, length))
        mask = torch.ones_like(ids)
        mask[1:2, :2] = 0
        return ids, mask, torch.randint(5, self.feature_dim, (size, words))

    def tiny_batch(self) -> tuple[Tensor, ...]:
        """Two short texts and their answers."""
        return self.example_text(2, 7, 4)

    def example_batch(self, size: int = 2, classify: bool = False) -> tuple[Tensor, ...]:
        """Texts of 64 words, answers of ten."""
        return self.example_text(size, 64, 10)
