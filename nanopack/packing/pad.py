"""Give every document a row of its own: the baseline.

lengths of what is read   ->   PadPacker.next_rows()   ->   rows of one run each
      shard.py                                                slot.py writes them out
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nanopack.packing.rows import Read, Row, Run, State, counters, set_counters


class PadPacker:
    """One document a row. Nothing waits, so its state is its counters."""

    def __init__(self, read: Read, batch_size: int) -> None:
        self._read = read
        self._batch_size = batch_size
        self.waiting_documents = self.waiting_tokens = 0
        self.emitted = self.cropped = self.packed = self.longest_wait = 0

    def waiting(self) -> list[Any]:
        """Return an empty list: no document waits."""
        return []

    def remaining(self) -> list[tuple[Any, int]]:
        """Return an empty list: no document waits."""
        return []

    def state(self) -> State:
        """Return the counters."""
        return counters(self)

    def restore(self, state: State, waiting: Sequence[tuple[Any, int]]) -> None:
        """Restore a saved state."""
        set_counters(self, state)

    def next_rows(self) -> list[Row]:
        """Return the rows of the next batch; at the end of the data fewer than its rows, then none."""
        rows: list[Row] = []
        while len(rows) < self._batch_size and (item := self._read()) is not None:
            document, length = item
            rows.append([Run(document, 0, length)])
            self.emitted += length
            self.packed += 1
        return rows
