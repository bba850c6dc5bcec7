"""Batches of the reference in a tokenizer whose ids can be read, and short ways to look at them."""

from __future__ import annotations

from itertools import islice
from typing import Any

from data_sets import byte_tokenizer

from nanopack.batch import Batch
from nanopack.reference.batches import batches

NAMES = ["bos", "user_start", "user_end", "assistant_start", "assistant_end"]
NAMES += ["python_start", "python_end", "output_start", "output_end", "im_start", "im_end"]
NAMES += ["start_header_id", "end_header_id", "eot_id", "begin_of_text"]
# Every byte is a token, so that ids can be read: a is 97.
TOY = byte_tokenizer(specials=[f"<|{name}|>" for name in NAMES])
BOS, USER, USER_END, ASSISTANT, ASSISTANT_END = range(256, 261)
PYTHON, PYTHON_END, OUTPUT, OUTPUT_END, START, END = range(261, 267)
HEADER, HEADER_END, EOT = range(267, 270)
a, b, c, d, e, f, g, h = range(97, 105)
NL, o, p, q, s, t, u = 10, 111, 112, 113, 115, 116, 117
NO = -100


def user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


def assistant(content: object) -> dict[str, object]:
    return {"role": "assistant", "content": content}


TALK = {"messages": [user("u"), assistant("a")]}
QUESTION = {"messages": [user("u")]}
# of a stream, a batch is one token and its target
ONE = {"packing": "stream", "batch_size": 1, "seq_len": 1}


def texts(*strings: str) -> list[dict[str, Any]]:
    return [{"text": string} for string in strings]


def take(count: int | None, conversations: Any, **arguments: Any) -> list[Batch]:
    return list(islice(batches(conversations, TOY, **arguments), count))


def only(conversations: Any, **arguments: Any) -> Batch:
    (batch,) = take(1, conversations, **arguments)
    return batch


def inputs(found: list[Batch]) -> list[Any]:
    return [batch.inputs.tolist() for batch in found]


def targets(found: list[Batch]) -> list[Any]:
    return [batch.targets.tolist() for batch in found]


def facts(found: list[Batch], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(getattr(batch, name) for name in names) for batch in found]


def read(found: list[Batch]) -> list[list[int]]:
    """For each batch the conversations of its words."""
    return [[piece.conversation for row in batch.word_pieces for piece in row] for batch in found]
