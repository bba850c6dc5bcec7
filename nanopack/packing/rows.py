"""Define what a row is made of, and what every packer can do.

numbers and lengths of documents   ->   Packer.next_rows()   ->   Rows: runs (document, offset, length), row by row
          shard.py                  best_fit.py, stream.py, pad.py          slot.py writes them out

Only lengths count here: no tokens, no tensors, no GPU. A document is a number, so that a store of documents is packed
without an object each. A packer asks for documents itself, because when to read is part of each rule; it may be given
more at once than it needs, and takes them one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np

Numbers = Sequence[int] | np.ndarray
Read = Callable[[], "tuple[Numbers, Numbers] | None"]
"""Returns the numbers (from 0, ascending) and the lengths (tokens, from 1) of the next documents; None at the end."""
State = dict[str, Any]
"""Numbers and lists of numbers, by name."""

COUNTERS = ("emitted", "cropped", "packed", "longest_wait")

# A key is a length and, below it, how many numbers may still come: among equal lengths the first document is greatest.
BITS = 36
LAST = (1 << BITS) - 1
# Of a document in a packer with keys, so that a key is an int64.
MAX_LENGTH = (1 << (62 - BITS)) - 1


class Run(NamedTuple):
    """Tokens `offset` to `offset + length` of one document, in adjacent columns of one row."""

    document: int
    offset: int
    length: int


class Rows(NamedTuple):
    """The runs of some rows. All arrays are int64; (P,) unless said otherwise."""

    documents: np.ndarray
    """Their numbers."""
    offsets: np.ndarray
    """Of the first token of each run in its document."""
    lengths: np.ndarray
    bounds: np.ndarray
    """(rows + 1,): the first run of each row; the last entry is P."""

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.bounds) - 1

    def padded_to(self, rows: int) -> Rows:
        """Return the same with empty rows at the end."""
        missing = rows - self.num_rows
        return self._replace(bounds=np.pad(self.bounds, (0, missing), "edge")) if missing else self

    def runs(self) -> list[list[Run]]:
        """Return the runs of each row, to look at.

        >>> Rows(np.array([7, 8]), np.array([0, 0]), np.array([3, 2]), np.array([0, 1, 2])).runs()
        [[Run(document=7, offset=0, length=3)], [Run(document=8, offset=0, length=2)]]
        """
        runs = list(map(Run, self.documents.tolist(), self.offsets.tolist(), self.lengths.tolist()))
        bounds = self.bounds.tolist()
        return [runs[begin:end] for begin, end in pairwise(bounds)]


class Packer(Protocol):
    """Decides which documents fill the next rows, and counts what it does. Made by `Packing.build`."""

    emitted: int
    """Tokens placed so far, each counted once."""
    cropped: int
    """Tokens cut from documents that were placed in part."""
    packed: int
    """Documents with no token still to come."""
    longest_wait: int
    """Most rows that a document has waited before it was placed."""

    def next_rows(self) -> Rows:
        """Return the rows of the next batch; at the end of the data fewer than its rows, then none."""

    def waiting(self) -> list[int]:
        """Return the documents that later rows need, in the order that `restore` takes."""

    def remaining(self) -> list[tuple[int, int]]:
        """Return each document with tokens still to come, and their number."""

    def state(self) -> State:
        """Return the rest of the packer's state, which `waiting()` leaves out, and the counters, by name."""

    def restore(self, state: State, waiting: Sequence[tuple[int, int]]) -> None:
        """Restore a saved state: `state()`, and (document, length) of each document of `waiting()`."""

    @property
    def waiting_documents(self) -> int:
        """Documents taken that have tokens still to come."""

    @property
    def waiting_tokens(self) -> int:
        """Their tokens that are still to come."""


def sums(numbers: np.ndarray, first: int = 0) -> np.ndarray:
    """Return the sums of the first 0, 1, 2, …, n of n numbers, and of `first`: (n + 1,) int64."""
    found = np.empty(len(numbers) + 1, np.int64)
    found[0] = first
    np.add.accumulate(numbers, out=found[1:])
    if first:
        found[1:] += first
    return found


def joined(parts: Sequence[Rows]) -> Rows:
    """Return the rows of all, one below the other; at least one part."""
    if len(parts) == 1:
        return parts[0]
    documents, offsets, lengths, bounds = zip(*parts, strict=True)
    if len({*map(len, bounds)}) == 1:
        together = np.concatenate(bounds).reshape(len(parts), -1)
        counts = (together[:, 1:] - together[:, :-1]).reshape(-1)
    else:
        counts = np.concatenate([own[1:] - own[:-1] for own in bounds])
    return Rows(np.concatenate(documents), np.concatenate(offsets), np.concatenate(lengths), sums(counts))


def counters(packer: Packer) -> State:
    """Return the counters of a packer, by name."""
    return {name: getattr(packer, name) for name in COUNTERS}


def set_counters(packer: Packer, state: State) -> None:
    """Set a packer's counters to those of a state."""
    for name in COUNTERS:
        setattr(packer, name, state[name])


def keys_in_turn(read: Read) -> Iterator[int]:
    """Yield the key of each document, read when it is asked for; ValueError for one that no key can hold."""
    # no generator: one that has raised is over, and would look like the end of the data
    return chain.from_iterable(map(_keys, iter(read, None)))


def _keys(documents: tuple[Numbers, Numbers]) -> list[int]:
    numbers, lengths = documents
    if len(lengths) < 8:
        return [key_of(int(number), int(length)) for number, length in zip(numbers, lengths, strict=True)]
    numbers, lengths = np.asarray(numbers, np.int64), np.asarray(lengths, np.int64)
    key_of(int(numbers[-1]), int(lengths.max()))
    keys: list[int] = ((lengths << BITS) | (LAST - numbers)).tolist()
    return keys


def key_of(number: int, length: int) -> int:
    """Return the key of a document: keys sort by length, and among equals the smallest number is the greatest."""
    if length > MAX_LENGTH or number > LAST:
        raise ValueError(
            f"document {number} has {length} tokens; a packing by rows takes at most {MAX_LENGTH} a document and "
            f"{LAST} documents: pass max_document_tokens, or packing='stream'"
        )
    return length << BITS | LAST - number


def numbers_of(keys: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the numbers of the documents of keys, int64."""
    # as LAST - (keys & LAST)
    return ~np.asarray(keys, np.int64) & LAST


def lengths_of(keys: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the lengths of the documents of keys, int64."""
    return np.asarray(keys, np.int64) >> BITS
