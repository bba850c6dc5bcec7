"""The slow packer's answers: each with what was said before it, as turns="each" asks for.

    a conversation's record   ->   each_answer()   ->   as many records as it has answers in the loss

A part of the definition. It shares nothing with the fast path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from nanopack.reference.records import Record

Readable = tuple[str, Callable[[], Record]]
"""A location, and a function that reads what is there."""


def each_answer(records: list[Readable]) -> list[Readable]:
    """The records up to each answer, in order; one without an answer in the loss, and a bad one, as it is."""
    found: list[Readable] = []
    for where, read in records:
        try:
            ends = _ends(read())
        except (MemoryError, OSError, EOFError):
            raise
        except Exception:
            # It fails when its turn comes.
            ends = []
        if len(ends) == 0:
            found.append((where, read))
        for number, end in enumerate(ends):
            found.append((where if len(ends) == 1 else f"{where}, answer {number}", partial(_cut, read, end)))
    return found


def _ends(said: Record) -> list[int]:
    """Where the messages end of which the last is an answer in the loss."""
    trained = [m.role == "assistant" and m.train and said.weight > 0 for m in said.messages]
    return [index + 1 for index, wanted in enumerate(trained) if wanted]


def _cut(read: Callable[[], Record], end: int) -> Record:
    said = read()
    before = [message._replace(train=False) for message in said.messages[: end - 1]]
    return replace(said, messages=before + said.messages[end - 1 : end])
