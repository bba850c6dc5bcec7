"""Fill each row with the longest waiting documents that fit, at a cost that hardly grows with their number.

lengths of what is read   ->   BestFitPacker.next_rows()   ->   rows of whole documents
      shard.py                                                     slot.py writes them out
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from itertools import islice

import numpy as np

from nanopack.packing.rows import (
    BITS,
    LAST,
    Read,
    Rows,
    State,
    counters,
    key_of,
    keys_in_turn,
    lengths_of,
    numbers_of,
    set_counters,
)

# The length of a key, where it stands in it.
_LENGTH = ((1 << 62) - 1) ^ LAST
# A token, as a part of a key.
_TOKEN = 1 << BITS
_NEVER = 1 << 62


class BestFitPacker:
    """Each row takes the longest waiting document that fits, again and again; among equals the one read first.

    Before each choice the waiting list is refilled until `window` wait. When none fits, the row ends, or with `crop`
    takes the beginning of the shortest (the rest of that document is dropped). nanochat's SFT loader is the plain form,
    its pretraining loader the one with `crop`.

    Documents wait in a sorted list of keys (rows.py), one integer each: a binary search finds the longest that fits,
    and the first of its length.

    Args:
        read: returns the next documents; see `Packing.build`.
        batch_size: rows of a batch.
        capacity: tokens of a row, T + 1.
        window: documents to choose from.
        refill: documents to read at a time when fewer wait.
        max_age: a document that has waited this many rows opens the next one; None: it may wait forever.
        crop: fill a row's rest with the beginning of the shortest document.
    """

    def __init__(
        self,
        read: Read,
        batch_size: int,
        capacity: int,
        *,
        window: int,
        refill: int = 1,
        max_age: int | None = None,
        crop: bool = False,
    ) -> None:
        self._ahead = keys_in_turn(read)
        self._batch_size = batch_size
        self._capacity = capacity
        self._window = window
        self._refill = refill
        self._crop = crop
        self._row = 0
        self._keys: list[int] = []
        # of the keys, ascending, where that is known
        self._numbers: np.ndarray | None = None
        self._ages = _Ages(max_age)
        # whether the last document of some row of this batch is too long for it
        self._is_over = False
        self.emitted = self.cropped = self.packed = self.longest_wait = 0

    def waiting(self) -> list[int]:
        """Return the documents that wait, in the order of reading."""
        numbers: list[int] = self._waiting_numbers().tolist()
        return numbers

    def _waiting_numbers(self) -> np.ndarray:
        if self._numbers is None:
            self._numbers = numbers_of(self._keys)
            self._numbers.sort()
        return self._numbers

    def remaining(self) -> list[tuple[int, int]]:
        """Return each document with tokens still to come, and their number, in the order of reading."""
        return sorted(zip(numbers_of(self._keys).tolist(), lengths_of(self._keys).tolist(), strict=True))

    def state(self) -> State:
        """Return the counters, the number of the next row, and the row in which each waiting document was read."""
        since = self._ages.read_in(self._waiting_numbers()).tolist()
        return {"row": self._row, "since": since, **counters(self)}

    def restore(self, state: State, waiting: Sequence[tuple[int, int]]) -> None:
        """Restore a saved state: `state()`, and (document, length) of each document of `waiting()`."""
        set_counters(self, state)
        self._row = state["row"]
        self._keys = sorted(key_of(document, length) for document, length in waiting)
        self._numbers = None
        self._ages.restore(np.array([document for document, _ in waiting], np.int64), state["since"])

    @property
    def waiting_documents(self) -> int:
        """Documents taken that have tokens still to come."""
        return len(self._keys)

    @property
    def waiting_tokens(self) -> int:
        """Their tokens that are still to come."""
        return int(lengths_of(self._keys).sum())

    def next_rows(self) -> Rows:
        """Return the rows of the next batch; at the end of the data fewer than its rows, then none."""
        self._numbers = None
        placed: list[int] = []
        bounds = [0]
        first = self._row
        while self._row < first + self._batch_size:
            self._fill_row(placed)
            if len(placed) == bounds[-1]:
                break
            bounds.append(len(placed))
            self._row += 1
        return self._rows_of(np.array(placed, np.int64), np.array(bounds, np.int64), first)

    def _fill_row(self, placed: list[int]) -> None:
        """Append the keys of the next row's documents, in the order in which they are chosen."""
        keys, ahead, window, more, place = self._keys, self._ahead, self._window, self._refill - 1, placed.append
        opens = self._row >= self._ages.due
        last = 0
        # the least key that does not fit: the room, plus one token
        limit = (self._capacity + 1) << BITS
        while limit > _TOKEN:
            while len(keys) < window and (key := next(ahead, None)) is not None:
                insort(keys, last := key)
                if more:
                    for last in islice(ahead, more):
                        insort(keys, last)
            at = bisect_left(keys, limit) - 1
            if opens:
                opens = False
                if last:
                    self._ages.mark(last, self._row)
                at = self._ages.oldest(keys, self._row, at)
            if at < 0:
                if not (self._crop and keys):
                    break
                # the first of the shortest
                at = bisect_left(keys, (keys[0] | LAST) + 1) - 1
            key = keys.pop(at)
            place(key)
            limit -= key & _LENGTH
        if last:
            self._ages.mark(last, self._row)
        self._is_over |= limit <= 0

    def _rows_of(self, keys: np.ndarray, bounds: np.ndarray, first: int) -> Rows:
        """Return the rows of these keys, the first of number `first`, and count them."""
        documents, lengths = numbers_of(keys), lengths_of(keys)
        if len(keys):
            # no document has waited longer than the one read first would have until the last of these rows
            if self._row - 1 - self._ages.read_in_one(int(np.minimum.reduce(documents))) > self.longest_wait:
                rows = np.arange(first, first + len(bounds) - 1).repeat(bounds[1:] - bounds[:-1])
                self.longest_wait = max(self.longest_wait, int((rows - self._ages.read_in(documents)).max()))
            self.emitted += int(np.add.reduce(lengths))
            if self._is_over:
                self._cut(lengths, bounds)
        self.packed += len(keys)
        self._ages.forget(self._keys)
        return Rows(documents, np.zeros(len(keys), np.int64), lengths, bounds)

    def _cut(self, lengths: np.ndarray, bounds: np.ndarray) -> None:
        """Cut the last document of each row that is too long, and count that."""
        cut = np.maximum(np.add.reduceat(lengths, bounds[:-1]) - self._capacity, 0)
        lengths[bounds[1:] - 1] -= cut
        tokens = int(cut.sum())
        self.cropped += tokens
        self.emitted -= tokens
        self._is_over = False


class _Ages:
    """In which row each waiting document was read, and when the oldest must be placed.

    Numbers ascend as they are read, so one mark for each row that reads is enough: the last number read in it.
    """

    MOST_MARKS = 1024

    def __init__(self, max_age: int | None) -> None:
        self._max_age = max_age
        self.due = _NEVER if max_age is None else 0
        """The next row in which a document may have waited too long."""
        self._numbers, self._rows = array("q"), array("q")
        # keys in the order of reading, of all documents read before any other that waits
        self._order: deque[int] = deque()

    def mark(self, key: int, row: int) -> None:
        """Note the last document read in this row; may be called again, with a later one, for the same row."""
        if self._rows and self._rows[-1] == row:
            self._numbers[-1] = LAST - (key & LAST)
        else:
            self._numbers.append(LAST - (key & LAST))
            self._rows.append(row)

    def read_in(self, numbers: np.ndarray) -> np.ndarray:
        """Return the row in which each of these documents was read, int64."""
        # views that last no longer than this call: an array in use cannot grow
        marks = np.frombuffer(self._numbers, np.int64).searchsorted(numbers)
        rows: np.ndarray = np.frombuffer(self._rows, np.int64).take(marks)
        return rows

    def read_in_one(self, number: int) -> int:
        """Return the row in which a document was read."""
        return self._rows[bisect_left(self._numbers, number)]

    def oldest(self, keys: list[int], row: int, otherwise: int) -> int:
        """Return the index of the document that has waited too long in this row, else `otherwise`."""
        if not keys:
            return otherwise
        order = self._order
        while order and (keys[at] if (at := bisect_left(keys, order[0])) < len(keys) else 0) != order[0]:
            order.popleft()
        if not order:
            order.extend(sorted(keys, key=LAST.__and__, reverse=True))
        assert self._max_age is not None
        number = LAST - (order[0] & LAST)
        self.due = self.read_in_one(number) + self._max_age
        return bisect_left(keys, order[0]) if self.due <= row else otherwise

    def forget(self, keys: Sequence[int]) -> None:
        """Forget what is known of documents that do not wait any more, from time to time."""
        if len(self._rows) > self.MOST_MARKS + len(keys):
            numbers = np.sort(numbers_of(keys))
            self.restore(numbers, self.read_in(numbers).tolist())

    def restore(self, numbers: np.ndarray, rows: Sequence[int]) -> None:
        """Know only these documents, in the order of reading, and the row in which each was read."""
        self._numbers, self._rows = array("q", numbers.tolist()), array("q", rows)
