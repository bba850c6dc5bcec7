"""Put documents end to end: nanochat's midtraining loader.

lengths of what is read   ->   StreamPacker.next_rows()   ->   rows of runs, of whole documents and of parts
      shard.py                                                    slot.py writes them out
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from nanopack.packing.rows import Read, Row, Run, State, counters, set_counters


class StreamPacker:
    """Documents end to end: a batch is the next B * T + 1 tokens, a row T + 1 of them; neighbouring rows share one.

    With `overlap`, the last token of a batch is also the first of the next one.

    >>> lengths = iter([(0, 6), (1, 12)])
    >>> StreamPacker(lambda: next(lengths), batch_size=2, seq_len=4, overlap=False).next_rows()
    [[Run(document=0, offset=0, length=5)], [Run(document=0, offset=4, length=2), Run(document=1, offset=0, length=3)]]
    """

    def __init__(self, read: Read, batch_size: int, seq_len: int, *, overlap: bool) -> None:
        self._read = read
        self._batch_size = batch_size
        self._seq_len = seq_len
        self._overlap = overlap
        self._carried: Run | None = None
        # the documents with tokens still to come, in order; the first `_offset` tokens of the first one are placed
        self._queue: deque[tuple[Any, int]] = deque()
        self._offset = 0
        self.waiting_tokens = 0
        self.emitted = self.cropped = self.packed = self.longest_wait = 0

    def waiting(self) -> list[Any]:
        """Return the document of the carried token, if there is one, then those in the queue."""
        return [item[0] for item in (*filter(None, [self._carried]), *self._queue)]

    def remaining(self) -> list[tuple[Any, int]]:
        """Return each document with tokens still to come, and their number."""
        return [(item[0], item[1] - (self._offset if n == 0 else 0)) for n, item in enumerate(self._queue)]

    def state(self) -> State:
        """Return the counters, and the offsets of the carried token (-1: none) and of the queue's first token."""
        carried = -1 if self._carried is None else self._carried.offset
        return {"carried": carried, "offset": self._offset, **counters(self)}

    def restore(self, state: State, waiting: Sequence[tuple[Any, int]]) -> None:
        """Restore a saved state: `state()`, and (document, length) of each document of `waiting()`."""
        set_counters(self, state)
        self._offset = state["offset"]
        if state["carried"] >= 0:
            (document, _), *waiting = waiting
            self._carried = Run(document, state["carried"], 1)
        self._queue = deque(waiting)
        self.waiting_tokens = sum(length for _, length in waiting) - self._offset

    @property
    def waiting_documents(self) -> int:
        """Documents read that have tokens still to come."""
        return len(self._queue)

    def next_rows(self) -> list[Row]:
        """Return the rows of the next batch; at the end of the data fewer than its rows, then none."""
        runs = [self._carried] if self._carried else []
        wanted = self._batch_size * self._seq_len + 1 - len(runs)
        while self.waiting_tokens < wanted and (item := self._read()) is not None:
            self._queue.append(item)
            self.waiting_tokens += item[1]
        if not self.waiting_tokens:
            return []
        self._take(min(wanted, self.waiting_tokens), runs)
        if self._overlap:
            document, offset, length = runs[-1]
            self._carried = Run(document, offset + length - 1, 1)
        return _split_in_rows(runs, self._batch_size, self._seq_len)

    def _take(self, tokens: int, runs: list[Run]) -> None:
        """Move the next tokens from the queue to the runs."""
        self.waiting_tokens -= tokens
        self.emitted += tokens
        while tokens:
            document, length = self._queue[0]
            taken = min(tokens, length - self._offset)
            _extend(runs, document, self._offset, taken)
            tokens -= taken
            self._offset += taken
            if self._offset == length:
                self._queue.popleft()
                self._offset = 0
                self.packed += 1


def _split_in_rows(runs: list[Run], batch_size: int, seq_len: int) -> list[Row]:
    """Cut up to B * T + 1 tokens into B rows of T; each row also gets the next token, its last target."""
    rows: list[Row] = [[]]
    room = seq_len
    for document, offset, length in runs:
        while length:
            if not room:
                _extend(rows[-1], document, offset, 1)
                if len(rows) == batch_size:
                    break
                rows.append([])
                room = seq_len
            part = min(length, room)
            # never the same document as the run before it in the row: neighbouring runs differ
            rows[-1].append(Run(document, offset, part))
            offset, length, room = offset + part, length - part, room - part
    return rows


def _extend(runs: list[Run], document: Any, offset: int, length: int) -> None:
    """Append the next tokens of a document to the runs, extending the last run where it is of the same document."""
    if runs and (last := runs[-1]).document == document:
        runs[-1] = Run(document, last.offset, last.length + length)
    else:
        runs.append(Run(document, offset, length))
