"""Fill each row with the longest waiting documents that fit, at a cost that does not grow with their number.

lengths of what is read   ->   BestFitPacker.next_rows()   ->   rows of whole documents
      shard.py                                                     slot.py writes them out
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Any

from nanopack.packing.rows import Read, Row, Run, State, counters, set_counters


class BestFitPacker:
    """Each row takes the longest waiting document that fits, again and again; among equals the one read first.

    Before each choice the waiting list is refilled until `window` wait. When none fits, the row ends, or with `crop`
    takes the beginning of the shortest (the rest of that document is dropped). nanochat's SFT loader is the plain form,
    its pretraining loader the one with `crop`.

    Args:
        read: returns the next document and its length; see `Packing.build`.
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
        self._read = read
        self._batch_size = batch_size
        self._capacity = capacity
        self._window = window
        self._refill = refill
        self._max_age = max_age
        self._crop = crop
        self._ended = False
        self._row = 0
        # document -> (length, row in which it was read); the first entry has waited longest
        self._waiting: OrderedDict[Any, tuple[int, int]] = OrderedDict()
        self._lengths = _Lengths(capacity)
        self.waiting_tokens = 0
        self.emitted = self.cropped = self.packed = self.longest_wait = 0

    def waiting(self) -> list[Any]:
        """Return the documents that wait, in the order of reading."""
        return list(self._waiting)

    def remaining(self) -> list[tuple[Any, int]]:
        """Return each document with tokens still to come, and their number."""
        return [(document, length) for document, (length, _) in self._waiting.items()]

    def state(self) -> State:
        """Return the counters, the number of the next row, and the row in which each waiting document was read."""
        return {"row": self._row, "since": [row for _, row in self._waiting.values()], **counters(self)}

    def restore(self, state: State, waiting: Sequence[tuple[Any, int]]) -> None:
        """Restore a saved state: `state()`, and (document, length) of each document of `waiting()`."""
        set_counters(self, state)
        self._row = state["row"]
        for (document, length), since in zip(waiting, state["since"], strict=True):
            self._add(document, length, since)

    @property
    def waiting_documents(self) -> int:
        """Documents read that have tokens still to come."""
        return len(self._waiting)

    def next_rows(self) -> list[Row]:
        """Return the rows of the next batch; at the end of the data fewer than its rows, then none."""
        rows: list[Row] = []
        while len(rows) < self._batch_size and (row := self._next_row()):
            rows.append(row)
            self._row += 1
        return rows

    def _next_row(self) -> Row:
        row: Row = []
        room = self._capacity
        while room:
            self._read_more()
            length = self._choose(room, opens=not row)
            if length is None:
                break
            document = self._lengths.pop(length)
            taken = min(length, room)
            self._place(document, taken)
            row.append(Run(document, 0, taken))
            room -= taken
        return row

    def _read_more(self) -> None:
        while len(self._waiting) < self._window and not self._ended:
            for _ in range(self._refill):
                item = self._read()
                if item is None:
                    self._ended = True
                    break
                self._add(*item, self._row)

    def _add(self, document: Any, length: int, row: int) -> None:
        self._waiting[document] = (length, row)
        self._lengths.add(document, length)
        self.waiting_tokens += length

    def _choose(self, room: int, *, opens: bool) -> int | None:
        """Return the length of the document to place next, the first read of that length; None ends the row."""
        if not self._waiting:
            return None
        if opens and self._max_age is not None:
            length, read_in_row = next(iter(self._waiting.values()))
            if self._row - read_in_row >= self._max_age:
                return length
        fitting = self._lengths.longest(room)
        return self._lengths.shortest() if fitting is None and self._crop else fitting

    def _place(self, document: Any, taken: int) -> None:
        length, read_in_row = self._waiting.pop(document)
        self.waiting_tokens -= length
        self.emitted += taken
        self.packed += 1
        self.cropped += length - taken
        self.longest_wait = max(self.longest_wait, self._row - read_in_row)


class _Lengths:
    """Waiting documents by length. The cost of adding and choosing does not grow with their number.

    One queue per length, and one big integer whose bit n says that a document of length n waits: the longest that fits
    is its highest bit up to the room, the shortest its lowest bit. Documents longer than a row never fit; their lengths
    are in a heap, of which only the shortest is ever needed.
    """

    def __init__(self, capacity: int) -> None:
        self._queues: dict[int, deque[Any]] = {}
        self._bits = 0
        self._capacity = capacity
        self._over_long: list[int] = []

    def add(self, document: Any, length: int) -> None:
        queue = self._queues.get(length)
        if queue is None:
            self._queues[length] = deque((document,))
            if length <= self._capacity:
                self._bits |= 1 << length
            else:
                heapq.heappush(self._over_long, length)
        else:
            queue.append(document)

    def longest(self, room: int) -> int | None:
        """Return the greatest waiting length up to `room`, or None."""
        fitting = self._bits & ((2 << room) - 1)
        return fitting.bit_length() - 1 if fitting else None

    def shortest(self) -> int:
        """Return the least waiting length."""
        return (self._bits & -self._bits).bit_length() - 1 if self._bits else self._over_long[0]

    def pop(self, length: int) -> Any:
        """Remove and return the first document of that length; above the capacity, only the shortest may be taken."""
        queue = self._queues[length]
        document = queue.popleft()
        if not queue:
            del self._queues[length]
            if length <= self._capacity:
                self._bits ^= 1 << length
            else:
                heapq.heappop(self._over_long)
        return document
