"""What of a record is in the loss, as the loader packs it and the reference agrees: text with [[ ]] around it."""

from __future__ import annotations

from typing import Any

import pytest
from data_sets import SMALL as ENCODING

import nanopack
from nanopack import ConversationError
from nanopack.tokenizers.tokenizer import load_tokenizer

SMALL = load_tokenizer(ENCODING)
U = {"role": "user", "content": "Q"}
A = {"role": "assistant", "content": "A"}
BAD = {"role": "assistant", "content": "BAD"}
ROW: dict[str, Any] = dict(batch_size=1, seq_len=256, epochs=1, num_workers=0, packing="pad")


def shown(record: object, template: str = "chatml", **arguments: Any) -> str:
    """The document of a record as the loader packs it, [[ ]] around what is in the loss; the reference agrees."""
    arguments = {**ROW, "template": template, **arguments}
    assert nanopack.verify([record], SMALL, **arguments)
    with nanopack.Loader([record], SMALL, **arguments) as loader:
        [batch] = loader
    size = batch.num_tokens
    ids, targets = batch.inputs[0, :size].tolist(), batch.targets[0, : size - 1].tolist()
    marks = [False, *(target != -100 for target in targets), False]
    text = ""
    for place, token in enumerate(ids):
        text += "[[" if marks[place] and not (place and marks[place - 1]) else ""
        text += SMALL.decode([token])
        text += "]]" if marks[place] and not marks[place + 1] else ""
    return text


def chatml(*turns: str) -> str:
    """A chatml document: 'user Q', 'assistant A', or '!assistant BAD', which is not in the loss."""
    text = "<|bos|>"
    for turn in turns:
        role, said = turn.lstrip("!").split(" ", 1)
        said = f"{said}<|im_end|>"
        text += f"<|im_start|>{role}\n" + (f"[[{said}]]" if turn.startswith("assistant") else said) + "\n"
    return text


def refused(record: object, template: str = "chatml", **arguments: Any) -> str:
    """What both packers say against a record."""
    with pytest.raises(ConversationError) as ours, nanopack.Loader([record], SMALL, template=template, **ROW) as loader:
        next(loader)
    with pytest.raises(ConversationError):
        next(nanopack.reference.batches([record], SMALL, template=template, batch_size=1, seq_len=256, epochs=1))
    return str(ours.value)
