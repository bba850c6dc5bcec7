"""The slow packer's packing: which words make a row.

    Documents, in the order of reading   ->   pack_stream(), pack_rows()   ->   Rows of each batch, as lists of words
    order.py                                                                    batches.py makes tensors of them

Part of the definition; it shares nothing with the fast path. A row has up to T + 1 words: the one in column T is only a
target.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from nanopack.reference.order import Reader, shuffled


@dataclass(frozen=True, eq=False)
class Document:
    """A rendered conversation, compared by identity: read again, it is another document."""

    conversation: int
    tokens: list[tuple[int, bool]]
    weight: float

    @cached_property
    def num_loss_tokens(self) -> int:
        """Tokens in the loss."""
        return sum(in_loss for _, in_loss in self.tokens)

    def words(self) -> list[Word]:
        """Return its tokens, each with its origin."""
        return [Word(id, in_loss, self, offset) for offset, (id, in_loss) in enumerate(self.tokens)]

    def weigh(self, loss_weights: str | None) -> float:
        """Return the weight of each of its tokens in the loss."""
        if loss_weights is None:
            return 1.0
        return self.weight if loss_weights == "token" else self.weight / self.num_loss_tokens


TAIL = -1
"""Id of the words after a document that fill up what it takes in its row."""


class Word(NamedTuple):
    """A token of a document, or one of the tail after it."""

    id: int
    in_loss: bool
    document: Document
    offset: int


Rows = list[list[Word]]
# In the order of reading, each with the number of the row being built when it was read.
WaitingList = list[tuple[Document, int]]


def pack_stream(reader: Reader[Document], batch_size: int, seq_len: int, overlap: bool) -> Iterator[tuple[Rows, int]]:
    """Yield the rows of each batch, and how many conversations have been read by then."""
    waiting: list[Word] = []
    carried = 0
    while True:
        while len(waiting) < batch_size * seq_len + 1:
            document = reader.next_document()
            if document is None:
                break
            waiting += document.words()
        words = waiting[: batch_size * seq_len + 1]
        if len(words) == carried:
            return
        # Neighbouring rows share a word: the last target of one is the first input of the next.
        yield [words[b * seq_len : b * seq_len + seq_len + 1] for b in range(batch_size)], reader.reads
        # With overlap so do batches; without, a batch's last word is no input, its first no target.
        carried = 1 if overlap else 0
        waiting = waiting[len(words) - carried :]


def pack_rows(
    reader: Reader[Document],
    packing: str,
    batch_size: int,
    seq_len: int,
    window: int,
    refill: int,
    max_age: float,
    align: int,
) -> Iterator[tuple[Rows, int]]:
    """Yield the rows of each batch, and how many conversations have been placed by then."""
    waiting: WaitingList = []
    placed = row_number = 0
    while True:
        rows: Rows = []
        for _ in range(batch_size):
            row: list[Word] = []
            while len(row) < seq_len + 1:
                _refill(reader, waiting, window, refill, row_number)
                taken = [_taken(document, align, seq_len) for document, _ in waiting]
                choice = _choose(taken, seq_len + 1 - len(row), packing)
                # No document starves: one that has waited too long opens a row, whatever its length.
                if not row and waiting and row_number - waiting[0][1] >= max_age:
                    choice = 0
                if choice is None:
                    break
                document, _ = waiting.pop(choice)
                # What does not fit is cut off, which happens only with best_fit_crop.
                document = replace(document, tokens=document.tokens[: seq_len + 1 - len(row)])
                row += document.words()
                while len(row) % align and len(row) < seq_len:
                    row.append(Word(TAIL, False, document, len(row)))
                placed += 1
                if packing == "pad":
                    break
            rows.append(row)
            row_number += 1
        if not any(rows):
            return
        yield rows, placed


def pack_passes(reader: Reader[Document], batch_size: int, seq_len: int) -> Iterator[tuple[Rows, int]]:
    """Yield the rows of each batch, and how many conversations have been placed by then; window="all".

    All documents of a pass wait at once. With a seed its rows come in a random order.
    """
    rows: Rows = []
    placed = barren = 0
    while reader.epochs is None or reader.pass_number < reader.epochs:
        number = reader.pass_number
        waiting: WaitingList = []
        while (document := reader.next_document(within=number)) is not None:
            waiting.append((document, 0))
        barren = 0 if waiting else barren + 1
        if reader.epochs is None and barren > reader.n:
            raise ValueError("conversations: each is bad or has no token in the loss. Check the data and loss=.")
        made: Rows = []
        while waiting:
            row: list[Word] = []
            while (
                choice := _choose([len(d.tokens) for d, _ in waiting], seq_len + 1 - len(row), "best_fit")
            ) is not None:
                row += waiting.pop(choice)[0].words()
            made.append(row)
        rows += made if reader.seed is None else [made[k] for k in shuffled(len(made), reader.seed, number)]
        while len(rows) >= batch_size:
            batch, rows = rows[:batch_size], rows[batch_size:]
            placed += sum(len({word.document for word in row}) for row in batch)
            yield batch, placed
    if rows:
        yield rows + [[]] * (batch_size - len(rows)), placed + sum(len({w.document for w in row}) for row in rows)


def _refill(reader: Reader[Document], waiting: WaitingList, window: int, refill: int, row_number: int) -> None:
    while len(waiting) < window:
        for _ in range(refill):
            document = reader.next_document()
            if document is None:
                return
            waiting.append((document, row_number))


def _taken(document: Document, align: int, seq_len: int) -> int:
    """Return how many words of a row a document takes: with its tail a multiple of `align`, or T + 1 and no tail."""
    length = len(document.tokens)
    return length if align == 1 or length == seq_len + 1 else math.ceil(length / align) * align


def _choose(lengths: list[int], room: int, packing: str) -> int | None:
    """Return the index of the document to place in this room, by what each takes; None: the rest is padding."""
    fitting = [length for length in lengths if length <= room]
    # index finds the first: first come among equals.
    if fitting:
        return lengths.index(max(fitting))
    if lengths and packing == "best_fit_crop":
        return lengths.index(min(lengths))
    return None
