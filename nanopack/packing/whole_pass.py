"""Best fit over all documents of a pass at once: hardly any padding, planned from lengths alone.

lengths of a whole pass   ->   patterns of lengths, and how often each   ->   WholePassPacker.next_rows()   ->   rows
     shard.py                        _patterns()                                                            slot.py

With everything waiting, a row depends only on how many documents there are of each length: it takes the longest that
fits, again and again. So rows come in runs that are alike, and a run is planned at once: a pass of ten million has some
thousand patterns. Of equal lengths a row gets the first in the order that the pass is given in, or in a random order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from nanopack.packing.rows import Read, Rows, State, counters, set_counters, sums

Shuffle = Callable[[np.ndarray, "int | np.ndarray", int], np.ndarray]
"""shuffle(places, n, first): which of n things come at these places, (k,) int64 each; n is one number or (k,) int64.
`first` is the number of the first document of the pass: each pass has an order of its own."""
# Batches whose documents are looked up together.
TOGETHER = 64


_NONE = np.empty(0, np.int64)
_Pieces = tuple[np.ndarray, np.ndarray, np.ndarray]
_NOTHING: tuple[int, _Pieces, np.ndarray] = (0, (_NONE, _NONE, _NONE), np.zeros(1, np.int64))


class _Plan(NamedTuple):
    """The rows of a pass. Arrays are int64."""

    documents: np.ndarray
    """(n,): numbers, by length, longest first; among equals in the order given."""
    counts: np.ndarray
    """(T + 2,): documents of each length."""
    begins: np.ndarray
    """(T + 2,): index of the first of each length in `documents`."""
    first_rows: np.ndarray
    """(patterns + 1,): the first row of each pattern; the last entry is the number of rows."""
    bounds: np.ndarray
    """(patterns + 1,): the first piece of each pattern."""
    firsts: np.ndarray
    """(pieces,): of each pattern's first row, the document, as an index of `documents`; in the order of the row."""
    steps: np.ndarray
    """(pieces,): how much further it is in each following row of the pattern."""
    lengths: np.ndarray
    """(pieces,)"""


class WholePassPacker:
    """Rows of whole documents, each of the longest that are left of its pass; a pass ends with its own rows.

    Args:
        read: returns all documents of the next pass at once; see `Packing.build`.
        batch_size: rows of a batch. One may have rows of two passes.
        capacity: tokens of a row, T + 1.
        shuffle: puts a pass's rows, and its documents of one length, in a random order; None: rows are delivered as
            they are planned, fullest first, and of equal lengths the first given comes first.
    """

    cropped = longest_wait = 0

    def __init__(self, read: Read, batch_size: int, capacity: int, shuffle: Shuffle | None) -> None:
        self._read = read
        self._batch_size = batch_size
        self._capacity = capacity
        self._shuffle = shuffle
        self._plan: _Plan | None = None
        # the next row of this pass, and its first document
        self._row, self._first = 0, -1
        # the first row of some that are looked up, their pieces, and the first piece of each
        self._ahead = _NOTHING
        self.waiting_documents = self.waiting_tokens = 0
        self.emitted = self.packed = 0

    def waiting(self) -> list[int]:
        """Return an empty list: what waits follows from the pass and the row."""
        return []

    def remaining(self) -> list[tuple[int, int]]:
        """Return an empty list, as `waiting`."""
        return []

    def state(self) -> State:
        """Return the counters, the first document of the pass (-1: there is none), and the next row in it."""
        return {"first": self._first, "row": self._row, **counters(self)}

    def restore(self, state: State, waiting: Sequence[tuple[int, int]]) -> None:
        """Restore a saved state; `read` returns the pass that it is in."""
        set_counters(self, {**state, "cropped": 0, "longest_wait": 0})
        if state["first"] >= 0:
            if not self._next_pass() or self._first != state["first"] or state["row"] > self._left():
                raise ValueError("the pass has other documents than when the state was saved: the data have changed")
            self._row = state["row"]
            self._uncount(self._row)

    def next_rows(self) -> Rows:
        """Return the rows of the next batch; at the end of the data fewer than its rows, then none."""
        parts: list[_Pieces] = []
        missing = self._batch_size
        while missing and (self._left() or self._next_pass()):
            count = min(missing, self._left())
            parts.append(self._next_pieces(count))
            self.emitted += self._count(parts[-1])
            self.packed += len(parts[-1][0])
            self._row += count
            missing -= count
        documents, lengths, counts = map(np.concatenate, zip((_NONE, _NONE, _NONE), *parts, strict=True))
        bounds = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=bounds[1:])
        return Rows(documents, np.zeros(len(documents), np.int64), lengths, bounds)

    def _uncount(self, rows: int) -> None:
        """Count the documents of the first rows as no longer waiting."""
        plan = self._plan
        assert plan is not None
        places = np.arange(rows)
        if self._shuffle is not None:
            places = self._shuffle(places, int(plan.first_rows[-1]), self._first)
        of_patterns = np.bincount(plan.first_rows.searchsorted(places, "right") - 1, minlength=len(plan.bounds) - 1)
        tokens = np.add.reduceat(plan.lengths, plan.bounds[:-1])
        self.waiting_documents -= int(of_patterns @ (plan.bounds[1:] - plan.bounds[:-1]))
        self.waiting_tokens -= int(of_patterns @ tokens)

    def _left(self) -> int:
        """Rows that are left of the pass."""
        return 0 if self._plan is None else int(self._plan.first_rows[-1]) - self._row

    def _next_pass(self) -> bool:
        """Plan the next pass; return whether there is one."""
        if (item := self._read()) is None:
            return False
        numbers, lengths = (np.asarray(one) for one in item)
        self._plan = _plan(numbers, lengths, self._capacity)
        self._row, self._first = 0, int(numbers[0])
        self._ahead = _NOTHING
        self.waiting_documents, self.waiting_tokens = len(lengths), int(lengths.sum(dtype=np.int64))
        return True

    def _next_pieces(self, count: int) -> _Pieces:
        """Return the pieces of the next rows of the pass, `count` of them."""
        begin, ahead, bounds = self._ahead
        if not begin <= self._row <= self._row + count <= begin + len(ahead[2]):
            stop = min(self._row + TOGETHER * count, self._row + self._left())
            begin, ahead = self._row, self._pieces(np.arange(self._row, stop))
            bounds = np.cumsum([0, *ahead[2].tolist()])
            self._ahead = begin, ahead, bounds
        at = self._row - begin
        part = slice(int(bounds[at]), int(bounds[at + count]))
        return ahead[0][part], ahead[1][part], ahead[2][at : at + count]

    def _pieces(self, places: np.ndarray) -> _Pieces:
        """Return documents and lengths of the rows at these places of the pass, and how many each row has."""
        plan = self._plan
        assert plan is not None
        rows = places
        if self._shuffle is not None:
            rows = self._shuffle(places, int(plan.first_rows[-1]), self._first)
        patterns = plan.first_rows.searchsorted(rows, "right") - 1
        counts = plan.bounds[patterns + 1] - plan.bounds[patterns]
        before = np.cumsum(counts) - counts
        pieces = np.arange(int(counts.sum())) + (plan.bounds[patterns] - before).repeat(counts)
        further = (rows - plan.first_rows[patterns]).repeat(counts)
        index, lengths = plan.firsts[pieces] + further * plan.steps[pieces], plan.lengths[pieces]
        if self._shuffle is not None:
            begins = plan.begins[lengths]
            index = begins + self._shuffle(index - begins, plan.counts[lengths], self._first)
        return plan.documents[index], lengths, counts

    def _count(self, pieces: _Pieces) -> int:
        """Count pieces as no longer waiting, and return their tokens."""
        tokens = int(pieces[1].sum())
        self.waiting_documents -= len(pieces[1])
        self.waiting_tokens -= tokens
        return tokens


def _plan(numbers: np.ndarray, lengths: np.ndarray, capacity: int) -> _Plan:
    """Plan the rows of documents with these numbers and lengths, (n,) integers, in the order of reading."""
    # the longest first; a small type sorts by radix
    kind = np.uint16 if capacity < 1 << 16 else np.uint32
    order = np.argsort((capacity - lengths).astype(kind), kind="stable")
    documents = numbers[order]
    counts = np.bincount(lengths, minlength=capacity + 1)
    # the index of the first document of each length
    begins = len(lengths) - np.cumsum(counts)
    patterns = _patterns(counts.tolist(), begins.tolist())
    repeats, sizes, firsts, steps, lengths_of_pieces = (np.array(column, np.int64) for column in patterns)
    return _Plan(documents, counts, begins, sums(repeats), sums(sizes), firsts, steps, lengths_of_pieces)


def _patterns(left: list[int], at: list[int]) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    """Return of each pattern how many rows have it, and its pieces; of each piece first document, step and length.

    `left` are the documents of each length, (capacity + 1,), `at` the index of the first of each; both are used up.
    """
    lengths = [length for length, count in enumerate(left) if count]
    repeats, sizes, firsts, steps, of_pieces = list[int](), list[int](), list[int](), list[int](), list[int]()
    while lengths:
        room, start, repeat, row = len(left) - 1, len(lengths), left[lengths[-1]], list[tuple[int, int]]()
        while room and (start := bisect_right(lengths, room, 0, start)):
            start -= 1
            length = lengths[start]
            use, count = room // length, left[length]
            # min() takes twice as long
            use = use if use < count else count
            room -= use * length
            repeat = repeat if repeat * use <= count else count // use
            row.append((length, use))
        size = 0
        for length, use in row:
            first = at[length]
            firsts += range(first, first + use)
            steps += [use] * use
            of_pieces += [length] * use
            at[length] = first + repeat * use
            left[length] -= repeat * use
            if not left[length]:
                del lengths[bisect_right(lengths, length) - 1]
            size += use
        repeats.append(repeat)
        sizes.append(size)
    return repeats, sizes, firsts, steps, of_pieces
