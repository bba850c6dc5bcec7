"""Give every document room in its row up to a multiple of n tokens.

    read, a packing   ->   build()   ->   a Packer whose rows have that room; AlignedPacker where n is more than 1

The packer inside sees documents that are longer by their tails. How long the tail is stands in the document's number,
so that nothing has to be remembered: document d with a tail of t tokens is number d * n + t there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nanopack.packing.packings import Packing
from nanopack.packing.rows import Packer, Read, Rows, State, set_counters
from nanopack.packing.whole_pass import RowOrder


def build(
    packing: Packing,
    read: Read,
    *,
    batch_size: int,
    seq_len: int,
    align: int = 1,
    row_order: RowOrder | None = None,
) -> Packer:
    """Return a packer that fills rows of seq_len + 1 tokens, of which each document takes a multiple of `align`.

    As `Packing.build`, for packings that neither split nor crop documents if `align` is more than 1; it divides
    `seq_len`. A document of seq_len + 1 tokens fits: its last is only a target.
    """
    if align == 1:
        return packing.build(read, batch_size=batch_size, seq_len=seq_len, row_order=row_order)
    return AlignedPacker(packing, read, batch_size=batch_size, seq_len=seq_len, align=align)


class AlignedPacker:
    """A packer of whole documents, each with a tail of up to `align` - 1 tokens after it in its row."""

    def __init__(self, packing: Packing, read: Read, *, batch_size: int, seq_len: int, align: int) -> None:
        self._read_next, self._capacity, self._align = read, seq_len + 1, align
        self._packer = packing.build(self._read, batch_size=batch_size, seq_len=seq_len)
        self.emitted = self.cropped = self.packed = self.longest_wait = 0

    def _read(self) -> tuple[np.ndarray, np.ndarray] | None:
        if (found := self._read_next()) is None:
            return None
        numbers, lengths = (np.asarray(column, np.int64) for column in found)
        aligned = aligned_lengths(lengths, self._align, self._capacity)
        return numbers * self._align + aligned - lengths, aligned

    def next_rows(self) -> Rows:
        """Return the rows of the next batch, tails left out; at the end of the data fewer than its rows, then none."""
        rows = self._packer.next_rows()
        documents, tails = np.divmod(rows.documents, self._align)
        lengths = rows.lengths - tails
        self.emitted += int(lengths.sum())
        self.packed, self.longest_wait = self._packer.packed, self._packer.longest_wait
        return rows._replace(documents=documents, lengths=lengths)

    def waiting(self) -> list[int]:
        """Return the documents that later rows need, in the order that `restore` takes."""
        return [number // self._align for number in self._packer.waiting()]

    def remaining(self) -> list[tuple[int, int]]:
        """Return each document with tokens still to come, and their number."""
        return [(number // self._align, length - number % self._align) for number, length in self._packer.remaining()]

    @property
    def waiting_documents(self) -> int:
        """Documents taken that have tokens still to come."""
        return self._packer.waiting_documents

    @property
    def waiting_tokens(self) -> int:
        """Their tokens that are still to come."""
        return sum(length for _, length in self.remaining())

    def state(self) -> State:
        """Return the packer's state, with the counters of tokens without tails."""
        return {**self._packer.state(), "emitted": self.emitted}

    def restore(self, state: State, waiting: Sequence[tuple[int, int]]) -> None:
        """Restore a saved state: `state()`, and (document, length) of each document of `waiting()`."""
        set_counters(self, state)
        lengths = np.array([length for _, length in waiting], np.int64)
        aligned = aligned_lengths(lengths, self._align, self._capacity).tolist()
        tailed = zip(waiting, aligned, strict=True)
        self._packer.restore(state, [(d * self._align + whole - length, whole) for (d, length), whole in tailed])


def aligned_lengths(lengths: np.ndarray, align: int, capacity: int) -> np.ndarray:
    """Return lengths rounded up to multiples of `align`, int64; at most the capacity of a row, a multiple plus one."""
    aligned: np.ndarray = np.minimum(-(-lengths // align) * align, capacity)
    return aligned
