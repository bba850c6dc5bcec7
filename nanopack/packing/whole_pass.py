"""Best fit over all documents of a pass at once: hardly any padding, planned from lengths alone.

lengths of a whole pass   ->   patterns of lengths, and how often each   ->   WholePassPacker.next_rows()   ->   rows
     shard.py                        _patterns()                                                            slot.py

With everything waiting, a row depends only on how many documents there are of each length: it takes the longest that
fits, again and again. So rows come in runs that are alike, and a run is planned at once: a pass of ten million has some
thousand patterns. Of equal lengths a row gets the documents read first.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from nanopack.packing.rows import Read, Rows, State, counters, set_counters

RowOrder = Callable[[np.ndarray, int, int], np.ndarray]
"""row_order(places, n, first): which rows of a pass come at these places, (k,) int64 each, of n rows in all; `first` is
the number of the first document of the pass."""


class _Plan(NamedTuple):
    """The rows of a pass. Arrays are int64."""

    documents: np.ndarray
    """(n,): numbers, by length, longest first; among equals in the order of reading."""
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
        row_order: the order in which a pass's rows are delivered; None: as they are planned, fullest first.
    """

    cropped = longest_wait = 0

    def __init__(self, read: Read, batch_size: int, capacity: int, row_order: RowOrder | None) -> None:
        self._read = read
        self._batch_size = batch_size
        self._capacity = capacity
        self._row_order = row_order
        self._plan: _Plan | None = None
        # the next row of this pass, and its first document
        self._row, self._first = 0, -1
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
            self._count(self._pieces(np.arange(state["row"])))
            self._row = state["row"]

    def next_rows(self) -> Rows:
        """Return the rows of the next batch; at the end of the data fewer than its rows, then none."""
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        missing = self._batch_size
        while missing and (self._left() or self._next_pass()):
            count = min(missing, self._left())
            parts.append(self._pieces(np.arange(self._row, self._row + count)))
            self.emitted += self._count(parts[-1])
            self.packed += len(parts[-1][0])
            self._row += count
            missing -= count
        nothing = np.empty(0, np.int64)
        documents, lengths, counts = map(np.concatenate, zip((nothing, nothing, nothing), *parts, strict=True))
        bounds = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=bounds[1:])
        return Rows(documents, np.zeros(len(documents), np.int64), lengths, bounds)

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
        self.waiting_documents, self.waiting_tokens = len(lengths), int(lengths.sum(dtype=np.int64))
        return True

    def _pieces(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return documents and lengths of the rows at these places of the pass, and how many each row has."""
        plan = self._plan
        assert plan is not None
        rows = places
        if self._row_order is not None:
            rows = self._row_order(places, int(plan.first_rows[-1]), self._first)
        patterns = plan.first_rows.searchsorted(rows, "right") - 1
        counts = plan.bounds[patterns + 1] - plan.bounds[patterns]
        before = np.cumsum(counts) - counts
        pieces = np.arange(int(counts.sum())) + (plan.bounds[patterns] - before).repeat(counts)
        further = (rows - plan.first_rows[patterns]).repeat(counts)
        documents = plan.documents[plan.firsts[pieces] + further * plan.steps[pieces]]
        return documents, plan.lengths[pieces], counts

    def _count(self, pieces: tuple[np.ndarray, np.ndarray, np.ndarray]) -> int:
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
    patterns = _patterns(counts, begins)
    repeats = [rows for rows, _ in patterns]
    sizes = [len(pieces) for _, pieces in patterns]
    table = np.array([piece for _, pieces in patterns for piece in pieces], np.int64).reshape(-1, 3)
    first_rows, bounds = (np.cumsum([0, *column], dtype=np.int64) for column in (repeats, sizes))
    return _Plan(documents, first_rows, bounds, *(np.ascontiguousarray(column) for column in table.T))


def _patterns(counts: np.ndarray, begins: np.ndarray) -> list[tuple[int, list[tuple[int, int, int]]]]:
    """Return each pattern of a row: how many rows have it, and (first document, step, length) of its pieces.

    `counts` are the documents of each length, (capacity + 1,), `begins` the index of the first of each.
    """
    lengths: list[int] = np.flatnonzero(counts).tolist()
    left: dict[int, int] = {length: int(counts[length]) for length in lengths}
    at: dict[int, int] = {length: int(begins[length]) for length in lengths}
    patterns = []
    while lengths:
        room, uses, start = len(counts) - 1, dict[int, int](), len(lengths)
        while room and (start := bisect_right(lengths, room, 0, start)):
            length = lengths[start - 1]
            uses[length] = use = min(room // length, left[length])
            room -= use * length
            start -= 1
        repeat = min(left[length] // use for length, use in uses.items())
        pieces: list[tuple[int, int, int]] = []
        for length, use in uses.items():
            pieces += [(at[length] + number, use, length) for number in range(use)]
            at[length] += repeat * use
            left[length] -= repeat * use
            if not left[length]:
                del lengths[bisect_right(lengths, length) - 1]
        patterns.append((repeat, pieces))
    return patterns
