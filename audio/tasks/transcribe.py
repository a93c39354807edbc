"""The task "transcribe": what is said in a sound, by a network that writes it word by word (Whisper).

    loss = mean over sounds of the mean over the text's words of -log p(word | words before, sound)

Texts are tokenised as the network's tokenizer does it, with its marks of language and task in front. Evaluation writes the texts
(the best word each time, or by beams), with the decoder's cache, and gives "wer", the share of words that are wrong, and "cer",
that of characters (torchmetrics).

    zoo.fit(model, [(sound, "what is said"), ...], task="transcribe")        # data: see audio.data.transcripts
    texts = Transcribe(language="german").transcribe(model, ["sound.wav"])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from audio.data.transcripts import heard, open_transcripts
from audio.families.whisper import NONE, Whisper
from zoo.data.dataset import ImageDataset
from zoo.errors import ConfigError, DataError, MismatchError
from zoo.registry import register_task
from zoo.tasks.base import Task, call

if TYPE_CHECKING:
    from zoo.host import Host

__all__ = ["Transcribe", "Written"]


class Written(NamedTuple):
    """What the task measures: scores (B, T, V), and in evaluation what was written, with what was said."""

    logits: Tensor
    texts: list[str]
    said: list[str]


@register_task("transcribe")
@dataclass
class Transcribe(Task):
    """Sounds and what is said in them.

    Args:
        language: of the texts, for tokenizers of several languages ("german"); None leaves the tokenizer as it is.
        length: longest text in tokens; None: what the network has places for. A longer one is refused by name.
        beams: in evaluation; 1 takes the best word each time.
        truncate: cut longer texts instead (their words are still heard: better cut the sounds, too).
    """

    language: str | None = None
    length: int | None = None
    beams: int = 1
    truncate: bool = False

    noun, monitor, hub = "sounds", "wer", "automatic-speech-recognition"

    def __post_init__(self) -> None:
        super().__post_init__()
        for what in ("length", "beams"):
            value = getattr(self, what)
            if value is not None and value < 1:
                raise ConfigError(f"{what} is {value!r}; expected a whole number from 1.")

    def open(
        self, model: Host, data: Any, *, train: bool, split: str | None = None, augment: str | None = None
    ) -> ImageDataset:
        """What `open_transcripts` takes; items are ((features (mel, frames), decoder input (T,)), target (2, W)).

        Target: the text's tokens, and its code points, each with -100 behind.
        """
        _check_family(model)
        dataset = open_transcripts(data, split=split)
        if isinstance(dataset.rows, Prepared):
            return dataset
        options = {} if augment is None or not train else {"augment": augment}
        rows = Prepared(self, model, dataset, model.family.preprocess(train, **options))
        return ImageDataset(rows, None, indices=dataset.indices, on_error=dataset.on_error)

    def check(self, model: Host, dataset: ImageDataset, what: str = "data set") -> None:
        """Raise unless the model writes what it hears."""
        _check_family(model)

    def loss(self, model: Host, inputs: Any, targets: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Written]:
        """inputs as `open` gives them, in batches; targets (B, 2, W)."""
        labels = targets[:, 0, : inputs[1].shape[1]]
        logits = call(model, inputs).float()
        words = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=NONE, reduction="none", label_smoothing=label_smoothing
        ).view(labels.shape)
        loss = (words.sum(1) / labels.ne(NONE).sum(1).clamp(min=1)).mean()
        if model.training or torch.is_grad_enabled():
            return loss, Written(logits, [], [])
        return loss, Written(logits, self.write(model, inputs[0]), [_text(row) for row in targets[:, 1].tolist()])

    def prefix(self, family: Any) -> list[int]:
        """The words that every text begins with: the start word, and marks of language and task."""
        tokenizer, start = family.tokenizer, int(family.config.decoder_start_token_id)
        if self.language is not None:
            if not hasattr(tokenizer, "set_prefix_tokens"):
                raise ConfigError(f"the tokenizer of '{family.name}' knows no languages; leave language out.")
            try:
                tokenizer.set_prefix_tokens(language=self.language, task="transcribe")
            except (ValueError, KeyError) as error:
                raise ConfigError(f"language is '{self.language}': {str(error).splitlines()[0][:200]}") from error
        marks = [i for i in tokenizer("")["input_ids"] if i != tokenizer.eos_token_id]
        return marks if marks[:1] == [start] else [start, *marks]

    @torch.no_grad()
    def write(self, model: Host, features: Tensor) -> list[str]:
        """Texts for log-mel features (B, mel, frames), with the active adapters."""
        from transformers.generation import GenerationMixin

        family: Any = model.family
        prefix = self.prefix(family)
        room = int(family.config.max_target_positions) - len(prefix)
        options = {
            "decoder_input_ids": torch.tensor([prefix], device=features.device).expand(len(features), -1),
            "max_new_tokens": max(1, min(room, self.length or room)),
            "num_beams": self.beams,
            "do_sample": False,
        }

        def run() -> Tensor:
            # The library's own `generate` of Whisper looks for marks of time and language in a configuration of its own
            return GenerationMixin.generate(model.backbone, features, **options)  # type: ignore[arg-type, return-value]

        ids = model.passing(run, features)
        return [t.strip() for t in family.tokenizer.batch_decode(ids[:, len(prefix) :], skip_special_tokens=True)]

    def transcribe(self, model: Host, sounds: Sequence[Any]) -> list[str]:
        """What is said in sounds: paths of files, or what `audio.data.sound.as_sound` takes.

        Raises:
            DataError: no list of sounds, or one that cannot be read.
        """
        _check_family(model)
        if isinstance(sounds, (str, bytes)) or not len(sounds):
            raise DataError("expected a list of sounds, such as ['sound.wav'].")
        prepare = model.family.preprocess(False)
        features = torch.stack([prepare(heard(s, f"sound {i}")) for i, s in enumerate(sounds)])
        training = model.training
        model.eval()
        try:
            return self.write(model, features.to(model.device, model.dtype))
        finally:
            model.train(training)

    def metrics(self, model: Host) -> Mapping[str, Any]:
        """Error rates of words and of characters."""
        from torchmetrics.text import CharErrorRate, WordErrorRate

        return {"wer": _Rate(WordErrorRate()), "cer": _Rate(CharErrorRate())}


class _Rate:
    """An error rate of torchmetrics over what was written."""

    higher_is_better = False

    def __init__(self, rate: Any) -> None:
        self.rate = rate

    def update(self, outputs: Written, targets: Tensor) -> None:
        """Add a batch."""
        if outputs.texts:
            self.rate.update(outputs.texts, outputs.said)

    def compute(self) -> Any:
        """The rate so far; on several processes over all of them."""
        return self.rate.compute()

    def reset(self) -> None:
        """Forget all."""
        self.rate.reset()


def _check_family(model: Host) -> None:
    if not isinstance(model.family, Whisper):
        raise MismatchError(
            f"'{model.backbone_name}' is of the family '{model.family.family}'; transcribe trains those that write what "
            "they hear (family 'whisper')."
        )


def _text(codes: Sequence[int]) -> str:
    return "".join(chr(c) for c in codes if c != NONE)


class Prepared:
    """Transcripts as the network's input and target; sounds are read when they are asked for."""

    labels: Any = None

    def __init__(self, task: Transcribe, model: Host, dataset: ImageDataset, prepare: Any) -> None:
        self.rows, self.prepare = dataset.rows, prepare
        self.name, self.blocks, self.window = dataset.rows.name, dataset.rows.blocks, dataset.rows.window
        family: Any = model.family
        config = family.config
        self.start, self.pad = int(config.decoder_start_token_id), int(config.pad_token_id)
        room = int(config.max_target_positions)
        room = room if task.length is None else min(task.length, room)
        prefix, tokenizer = task.prefix(family), family.tokenizer
        self.words: dict[int, list[int]] = {}
        self.broken: dict[int, str] = {}
        texts: list[str] = dataset.rows.texts  # type: ignore[attr-defined]
        for index in map(int, dataset.indices):
            own = list(tokenizer(texts[index], add_special_tokens=False)["input_ids"])
            if task.truncate:
                own = own[: max(room - len(prefix), 0)]
            ids = [*prefix[1:], *own, int(tokenizer.eos_token_id)]
            if len(ids) > room:
                self.broken[index] = (
                    f"{self.where(index)}: the text has {len(ids)} tokens, with its marks, and there is room for {room}. Shorten "
                    "it, cut the sound into parts, or cut such texts: truncate=True (--truncate)."
                )
                if dataset.on_error != "skip":
                    raise DataError(self.broken[index])
                continue
            self.words[index] = ids
        self.texts = texts
        self.length = max((len(ids) for ids in self.words.values()), default=1)
        self.width = max(self.length, *(len(texts[i]) for i in self.words), 1)

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        """The place of the sound."""
        return str(self.rows.where(index))

    def read(self, index: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """((features, decoder input), target); see `Transcribe.open`."""
        if index in self.broken:
            raise DataError(self.broken[index])
        sound, text = self.rows.read(index)
        ids = torch.tensor(self.words[index])
        given = torch.full((self.length,), self.pad)
        given[0] = self.start
        given[1 : len(ids)] = ids[:-1]
        target = torch.full((2, self.width), NONE)
        target[0, : len(ids)] = ids
        target[1, : len(text)] = torch.tensor([ord(c) for c in text])
        return (self.prepare(sound), given), target
