"""`model(ids, mask, labels=labels)` as users of transformers call T5 and BART.

Seen before: the third of the example batch was said to be target ids; it is `decoder_input_ids`, and labels were not taken.
"""

from __future__ import annotations

import pytest
import torch
from seq2seq_models import FAMILIES, twin

import zoo
from zoo.errors import ConfigError
from zoo.table import tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_the_answer_itself(family: str) -> None:
    model, (ids, mask, labels, *_) = tiny_model(family)
    model.eval()
    labels = labels.clone()
    labels[1, 3:] = -100
    scores = model(ids, mask, labels=labels)
    assert torch.equal(scores, model(ids, mask, model.family.shift(labels)))
    loss = twin(model)(input_ids=ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(model.family.loss(scores, labels), loss)
    assert torch.equal(model(ids, mask, decoder_input_ids=labels.clamp(min=0)), model(ids, mask, labels.clamp(min=0)))
    with pytest.raises(ConfigError, match="either decoder_input_ids or labels"):
        model(ids, mask, labels, labels=labels)
    with pytest.raises(ConfigError, match=r"decoder_input_ids are missing.*labels="):
        model(ids, mask)


def test_the_docs_name_the_inputs() -> None:
    from pathlib import Path

    text = (Path(zoo.__file__).parents[1] / "docs" / "backbones.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| `vl-t5`"))
    assert "`decoder_input_ids`" in row and "`labels=`" in row and "target ids" not in row
