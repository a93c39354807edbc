"""Transcription: what is learnt of (sound, text), data in all its forms, texts that are too long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from audio.data.transcripts import open_transcripts
from audio.tasks.transcribe import Transcribe
from zoo.errors import ConfigError, DataError, MismatchError
from zoo.registry import family, list_tasks

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["<pad>", "<end>", "<start>", "<unk>", "one", "two", "three", "four", "five"]
SAID = ["one two", "three", "four five one", "two two"]


def tokenizer() -> Any:
    built = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    built.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    built.post_processor = tokenizers.processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", 1)]
    )
    marks = {"pad_token": "<pad>", "eos_token": "<end>", "bos_token": "<start>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=built, **marks)


def model(adapter: Any = None) -> zoo.Model:
    tiny = family("whisper").tiny
    assert tiny is not None
    made = zoo.load("whisper-b", adapter, pretrained=False, seed=0, **tiny[1])
    made.family.tokenizer = tokenizer()
    return made


def sounds() -> list[tuple[Any, str]]:
    time = torch.arange(6_400) / 16_000
    return [(torch.sin(2 * torch.pi * 300 * 2**i * time) * 0.5, said) for i, said in enumerate(SAID)]


def test_what_is_said_is_learnt_and_written(tmp_path: Path) -> None:
    """The whole network on four tones: evaluation writes them without an error, and so does `transcribe`."""
    made, data = model("full"), sounds()
    before = zoo.evaluate(made, data, batch_size=4)
    report = zoo.fit(made, data * 8, epochs=12, batch_size=4, lr=5e-3, warmup=0, seed=0)
    found = zoo.evaluate(made, data, batch_size=4)
    assert set(found) >= {"loss", "wer", "cer"} and found["wer"] <= 0.25 < before["wer"], (before, found)
    assert found["loss"] < before["loss"] / 3
    assert report is not None
    texts = Transcribe().transcribe(made, [wave for wave, _ in data])
    assert sum(t == s for t, s in zip(texts, SAID, strict=True)) >= 3
    made.save_adapter(tmp_path / "out")
    again = zoo.load(adapter=tmp_path / "out", pretrained=False, seed=0)
    assert again.family.family == "whisper"


def test_adapters_train_and_beams_write() -> None:
    made = model("lora")
    zoo.fit(made, sounds(), epochs=1, batch_size=2, task="transcribe")
    texts = Transcribe(beams=2, length=5).transcribe(made, [sounds()[0][0]])
    assert len(texts) == 1 and isinstance(texts[0], str)


def test_every_form_of_data(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    import pyarrow as pa
    import pyarrow.parquet as pq

    given = sounds()
    for i, (wave, _) in enumerate(given):
        soundfile.write(tmp_path / f"{i}.wav", wave.numpy(), 16_000)
    lines = "".join(f"{i}.wav,{said}\n" for i, (_, said) in enumerate(given))
    (tmp_path / "metadata.csv").write_text("file_name,transcription\n" + lines)
    encoded = [{"bytes": (tmp_path / f"{i}.wav").read_bytes(), "path": None} for i in range(len(given))]
    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.table({"audio": encoded, "sentence": SAID}), tmp_path / "parquet" / "train-0.parquet")
    paths = [(tmp_path / f"{i}.wav", said) for i, said in enumerate(SAID)]
    for source in (tmp_path, tmp_path / "metadata.csv", tmp_path / "parquet", paths, given):
        rows = open_transcripts(source).rows
        assert [rows.read(i)[1] for i in range(len(rows))] == SAID
        torch.testing.assert_close(rows.read(2)[0].wave, given[2][0], rtol=1e-3, atol=1e-4)
    prepared = Transcribe().open(model(), tmp_path, train=False)
    (features, words), target = prepared[2]
    assert features.shape == (16, 40) and words.tolist() == [2, 7, 8, 4]
    assert target[0, :4].tolist() == [7, 8, 4, 1] and (target[0, 4:] == -100).all()


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"item 1: the text has 21 tokens.*room for 16"):
        Transcribe().open(model(), [*sounds()[:1], (torch.zeros(6_400), "one " * 20)], train=True)
    cut = Transcribe(truncate=True).open(model(), [(torch.zeros(6_400), "one " * 20)], train=True)[0]
    assert cut[1][0].ne(-100).sum() == 16 and cut[0][1].shape == (16,)
    with pytest.raises(DataError, match="item 0: the text is ''"):
        open_transcripts([(torch.zeros(6_400), "")])
    with pytest.raises(DataError, match=r"expected a pair \(sound, text\)"):
        open_transcripts([torch.zeros(6_400)])
    with pytest.raises(DataError, match=r"neither metadata.csv nor Parquet"):
        open_transcripts(tmp_path)
    (tmp_path / "metadata.csv").write_text("file,label\na.wav,b\n")
    with pytest.raises(DataError, match=r"no column text or .*columns: file, label"):
        open_transcripts(tmp_path)
    with pytest.raises(ConfigError, match="beams is 0"):
        Transcribe(beams=0)
    with pytest.raises(ConfigError, match="knows no languages"):
        Transcribe(language="german").transcribe(model(), [sounds()[0][0]])
    with pytest.raises(DataError, match="list of sounds"):
        Transcribe().transcribe(model(), "sound.wav")
    tiny = family("whisper-encoder").tiny
    assert tiny is not None
    with pytest.raises(MismatchError, match="'whisper-encoder'; transcribe trains"):
        Transcribe().transcribe(zoo.load(tiny[0], pretrained=False, num_classes=2, **tiny[1]), [sounds()[0][0]])
    assert "transcribe" in list_tasks()
