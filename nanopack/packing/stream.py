"""Put documents end to end: nanochat's midtraining loader.

lengths of what is read   ->   StreamPacker.next_rows()   ->   rows of runs, of whole documents and of parts
      shard.py                                                    slot.py writes them out
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nanopack.packing.rows import Read, Rows, State, counters, set_counters

# Batches that are planned together, where enough documents are known: tables of this many fit into the cache.
TOGETHER = 16
_NONE = np.empty(0, np.int64)


class _Planned(NamedTuple):
    rows: Rows
    at: int
    """Where the next token is, once these rows are filled."""
    document: int
    """In which of the known documents."""
    taken: int
    """How many of these must be taken until then."""


class StreamPacker:
    """Documents end to end: a batch is the next B * T + 1 tokens, a row T + 1 of them; neighbouring rows share one.

    With `overlap`, the last token of a batch is also the first of the next one.

    >>> lengths = iter([([0], [6]), ([1], [12])])
    >>> StreamPacker(lambda: next(lengths), batch_size=2, seq_len=4, overlap=False).next_rows().runs()
    [[Run(document=0, offset=0, length=5)], [Run(document=0, offset=4, length=2), Run(document=1, offset=0, length=3)]]
    """

    def __init__(self, read: Read, batch_size: int, seq_len: int, *, overlap: bool) -> None:
        self._read = read
        self._batch_size = batch_size
        self._seq_len = seq_len
        self._overlap = overlap
        # the documents that are known, and where each ends, counted in tokens from the first one's beginning
        self._numbers = self._ends = _NONE
        self._taken = 0
        # the next token, and its document
        self._at = self._next = 0
        self._carries = False
        self._planned: deque[_Planned] = deque()
        self.emitted = self.cropped = self.packed = self.longest_wait = 0

    def waiting(self) -> list[int]:
        """Return the document of the carried token, if there is one, then those with tokens still to come."""
        carried = [int(self._numbers[self._document_of_carried()])] if self._carries else []
        queue: list[int] = self._numbers[self._next : self._taken].tolist()
        return carried + queue

    def remaining(self) -> list[tuple[int, int]]:
        """Return each document with tokens still to come, and their number."""
        waiting = slice(self._next, self._taken)
        left = np.diff(self._ends[waiting], prepend=self._at)
        return list(zip(self._numbers[waiting].tolist(), left.tolist(), strict=True))

    def state(self) -> State:
        """Return the counters, and the offsets of the carried token (-1: none) and of the next token."""
        return {
            "carried": self._at - 1 - self._start(self._document_of_carried()) if self._carries else -1,
            "offset": self._at - self._start(self._next) if self._next < self._taken else 0,
            **counters(self),
        }

    def restore(self, state: State, waiting: Sequence[tuple[int, int]]) -> None:
        """Restore a saved state: `state()`, and (document, length) of each document of `waiting()`."""
        set_counters(self, state)
        self._carries = state["carried"] >= 0
        before = 0
        if self._carries:
            # the carried token is the last of its document, or the one before the next token
            if len(waiting) > 1 and waiting[0] == waiting[1]:
                waiting = waiting[1:]
            else:
                before = waiting[0][1]
        self._numbers = np.array([document for document, _ in waiting], np.int64)
        self._ends = np.cumsum([length for _, length in waiting], dtype=np.int64)
        self._taken, self._at = len(waiting), before + state["offset"]
        self._next = int(self._ends.searchsorted(self._at, "right"))

    @property
    def waiting_documents(self) -> int:
        """Documents taken that have tokens still to come."""
        return self._taken - self._next

    @property
    def waiting_tokens(self) -> int:
        """Their tokens that are still to come."""
        return self._start(self._taken) - self._at

    def next_rows(self) -> Rows:
        """Return the rows of the next batch; at the end of the data fewer than its rows, then none."""
        if not self._planned:
            self._plan()
        rows, at, document, taken = self._planned.popleft()
        if rows.num_rows:
            self.packed += document - self._next
            self.emitted += at - self._at
            self._carries, self._at, self._next = self._overlap, at, document
        self._taken = max(self._taken, taken)
        return rows

    def _document_of_carried(self) -> int:
        """Return the index, among the known documents, of the one with the token before the next."""
        return int(self._ends.searchsorted(self._at - 1, "right"))

    def _start(self, document: int) -> int:
        return int(self._ends[document - 1]) if document else 0

    def _plan(self) -> None:
        """Plan the next batches, as many as are known, one at least; empty rows at the end of the data."""
        self._forget()
        whole, carried = self._batch_size * self._seq_len, int(self._carries)
        wanted = whole + 1 - carried
        while self._known() < wanted and (item := self._read()) is not None:
            numbers, lengths = (np.asarray(one, np.int64) for one in item)
            self._numbers = np.concatenate([self._numbers, numbers])
            self._ends = np.concatenate([self._ends, np.cumsum(lengths) + self._start(len(self._ends))])
        if not self._known():
            nothing = Rows(_NONE, _NONE, _NONE, np.zeros(1, np.int64))
            self._planned.append(_Planned(nothing, self._at, self._next, len(self._ends)))
            return
        step = whole if self._overlap else whole + 1
        batches = min(max(1, 1 + (self._known() - wanted) // step), TOGETHER)
        self._planned.extend(self._batches(self._at - carried + step * np.arange(batches)))

    def _known(self) -> int:
        """Tokens of the known documents that are still to come."""
        return self._start(len(self._ends)) - self._at

    def _forget(self) -> None:
        """Forget the documents whose tokens are all placed, but for that of the carried token."""
        first = self._document_of_carried() if self._carries else self._next
        if first:
            start = self._start(first)
            self._numbers, self._ends = self._numbers[first:], self._ends[first:] - start
            self._taken, self._at, self._next = self._taken - first, self._at - start, self._next - first

    def _batches(self, starts: np.ndarray) -> list[_Planned]:
        """Return the rows of the batches that begin at these tokens, (n,) int64."""
        size, seq_len = self._batch_size, self._seq_len
        end = self._start(len(self._ends))
        begins = (starts[:, None] + seq_len * np.arange(size)).reshape(-1)
        begins = begins[begins < end]
        ends = np.minimum(begins + seq_len + 1, end)
        firsts = self._ends.searchsorted(begins, "right")
        counts = self._ends.searchsorted(ends - 1, "right") + 1 - firsts
        bounds = np.zeros(len(begins) + 1, np.int64)
        np.cumsum(counts, out=bounds[1:])
        index = np.arange(bounds[-1]) + (firsts - bounds[:-1]).repeat(counts)
        document_ends = self._ends[index]
        document_starts = np.where(index > 0, self._ends[index - 1], 0)
        first_tokens = np.maximum(begins.repeat(counts), document_starts)
        lengths = np.minimum(ends.repeat(counts), document_ends) - first_tokens
        documents, offsets = self._numbers[index], first_tokens - document_starts
        at = ends[np.minimum(np.arange(size, len(ends) + size, size), len(ends)) - 1]
        following, taken = self._ends.searchsorted(at, "right").tolist(), (self._ends.searchsorted(at) + 1).tolist()
        planned = []
        for number, row in enumerate(range(0, len(begins), size)):
            own = bounds[row : row + size + 1]
            part = slice(own[0], own[-1])
            rows = Rows(documents[part], offsets[part], lengths[part], own - own[0])
            planned.append(_Planned(rows, int(at[number]), following[number], taken[number]))
        return planned
