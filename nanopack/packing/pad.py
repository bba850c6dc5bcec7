"""Give every document a row of its own: the baseline.

lengths of what is read   ->   PadPacker.next_rows()   ->   rows of one run each
      shard.py                                                slot.py writes them out
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np

from nanopack.packing.rows import Read, Rows, State, counters, keys_in_turn, lengths_of, numbers_of, set_counters


class PadPacker:
    """One document a row. Nothing waits, so its state is its counters."""

    def __init__(self, read: Read, batch_size: int) -> None:
        self._ahead = keys_in_turn(read)
        self._batch_size = batch_size
        self.waiting_documents = self.waiting_tokens = 0
        self.emitted = self.cropped = self.packed = self.longest_wait = 0

    def waiting(self) -> list[int]:
        """Return an empty list: no document waits."""
        return []

    def remaining(self) -> list[tuple[int, int]]:
        """Return an empty list: no document waits."""
        return []

    def state(self) -> State:
        """Return the counters."""
        return counters(self)

    def restore(self, state: State, waiting: Sequence[tuple[int, int]]) -> None:
        """Restore a saved state."""
        set_counters(self, state)

    def next_rows(self) -> Rows:
        """Return the rows of the next batch; at the end of the data fewer than its rows, then none."""
        keys = np.array(list(islice(self._ahead, self._batch_size)), np.int64)
        lengths = lengths_of(keys)
        self.emitted += int(lengths.sum())
        self.packed += len(keys)
        return Rows(numbers_of(keys), np.zeros(len(keys), np.int64), lengths, np.arange(len(keys) + 1))
