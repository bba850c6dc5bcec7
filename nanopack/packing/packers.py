"""Decide which waiting documents fill the next rows, and where each one lands.

    lengths of what is read   ->   packer.next_rows()   ->   rows of runs (document, offset, length)
            lane.py                                               ring.py writes them out

Only lengths count here: no tokens, no tensors, no GPU. A packer asks for documents itself, by calling `read()`, because
when to read is part of each rule: it returns (document, length), or None at the end of the data. What a document is
does not matter, as long as it can be a key and equals only itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nanopack.packing.best_fit import BestFit
from nanopack.packing.rows import Packer, Read, Row, Run, State, counters, set_counters
from nanopack.packing.stream import Stream

PACKINGS = ("best_fit", "stream", "best_fit_pad", "best_fit_crop", "pad")
WINDOWS = {"best_fit": 64, "best_fit_pad": 100, "best_fit_crop": 1000}
MAX_AGE = 128


def make_packer(
    packing: str,
    read: Read,
    *,
    batch_size: int,
    seq_len: int,
    window: int | None = None,
    max_age: int | None = None,
    refill: int = 1,
    overlap: bool = False,
) -> Packer:
    """Return the packer of that name for rows of `seq_len + 1` tokens."""
    if packing == "stream":
        return Stream(read, batch_size, seq_len, overlap=overlap)
    if packing == "pad":
        return OneEach(read, batch_size)
    return BestFit(
        read,
        batch_size,
        seq_len + 1,
        window=window or WINDOWS[packing],
        refill=refill,
        max_age=(max_age or MAX_AGE) if packing == "best_fit" else None,
        crop=packing == "best_fit_crop",
    )


class OneEach:
    """One document a row: the baseline."""

    def __init__(self, read: Read, batch_size: int) -> None:
        self._read = read
        self._batch_size = batch_size
        self.waiting_documents = self.waiting_tokens = 0
        self.emitted = self.cropped = self.packed = self.longest_wait = 0

    def held(self) -> list[Any]:
        """Return nothing: no document waits."""
        return []

    def left(self) -> list[tuple[Any, int]]:
        """Return nothing: no document waits."""
        return []

    def state(self) -> State:
        """Return the counters."""
        return counters(self)

    def restore(self, state: State, held: Sequence[tuple[Any, int]]) -> None:
        """Stand where a packer stood: its counters."""
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
