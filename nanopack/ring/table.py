"""Write one batch into a slot as a table of runs, where its words are on the device already.

    Pieces: rows of runs, and where their words are   ->   TableSlot.fill()   ->   kernels/gather.py
     producer/shard.py                                                             which reads the table; BatchFacts

kernels/gather.py defines the format. No word is copied; few are looked at: the first of each row, and those of pieces
that are not whole documents, whose tokens in the loss nobody has counted. numpy alone: neither torch nor a GPU.
"""

from __future__ import annotations

import math

import numpy as np

from nanopack.packing.rows import sums
from nanopack.ring.facts import BatchFacts
from nanopack.ring.layout import ENTRY_BYTES, Layout
from nanopack.ring.pieces import Pieces
from nanopack.ring.places import Places, facts_of, too_many_pieces

# Marks of a piece in the bits of its weight: its first word is not in the loss, and none is.
FIRST, NONE = np.int32(-(2**31)), np.int32(2**31 - 1)


class TableSlot:
    """The buffer of one table, (n, 4) int32."""

    def __init__(self, layout: Layout, buffer: np.ndarray, number: int = 0) -> None:
        """Use `buffer`, (layout.nbytes,) uint8, 64-byte aligned, as slot `number` of its ring."""
        self.layout = layout
        self.number = number
        self.buffer = buffer
        self._entries = buffer[: len(buffer) // ENTRY_BYTES * ENTRY_BYTES].view(np.int32).reshape(-1, 4)
        self._loss_bit = layout.word_dtype.type(layout.loss_bit)

    def fill(self, pieces: Pieces, shards: int = 1) -> tuple[BatchFacts, list[tuple[int, int]]]:
        """As `Slot.fill`; of `pieces`, `loss_tokens` are known, and the device holds all its arrays end to end."""
        layout = self.layout
        places = Places(pieces.lengths, pieces.bounds, 0)
        segments = places.count_segments(layout.seq_len)
        num_segments = int(segments.sum())
        if layout.max_segments is not None and num_segments > layout.max_segments:
            raise too_many_pieces(num_segments, layout)
        used = self._write(pieces, places, segments)
        of_pieces = self._count_loss_tokens(pieces, places)
        weight_sum = None
        if pieces.weights is not None:
            # the product of a count and a float32 is exact in a float64, and fsum adds exactly
            weight_sum = math.fsum((of_pieces * pieces.weights.astype(np.float64)).tolist())
        of_shards = np.diff(sums(of_pieces)[pieces.bounds[:: layout.batch_size // shards]]).tolist()
        return facts_of(pieces, places, self.number, used, of_shards, weight_sum, layout.seq_len)

    def _write(self, pieces: Pieces, places: Places, segments: np.ndarray) -> int:
        """Write the table; return its bytes."""
        batch_size, num = self.layout.batch_size, len(pieces.lengths)
        first = batch_size + 1
        head, entries = self._entries[:first], self._entries[first : first + num]
        head[:-1, 0] = places.row_lengths
        head[:-1, 1] = first + places.bounds[:-1]
        head[:-1, 2] = places.counts
        ends = sums(segments)
        head[:-1, 3] = ends[:-1]
        head[-1] = ends[-1], 0, 0, 0
        entries[:, 0] = places.columns
        entries[:, 1] = self._weights(pieces)
        origins = pieces.starts - places.columns
        if pieces.array is not None:
            origins += sums(np.array([len(array) for array in pieces.arrays]))[pieces.array]
        entries.view(np.int64)[:, 1] = origins
        return (first + num) * ENTRY_BYTES

    def _weights(self, pieces: Pieces) -> np.ndarray:
        """Return the bits of the weights, marked, (P,) int32."""
        weights = np.ones(len(pieces.lengths), np.float32) if pieces.weights is None else pieces.weights
        # without the sign of a zero
        bits: np.ndarray = np.abs(weights).view(np.int32)
        if pieces.marks is not None and pieces.marks.first:
            bits[pieces.offsets == 0] |= FIRST
        if pieces.marks is not None and pieces.marks.without is not None:
            bits[pieces.marks.without] = NONE
        return bits

    def _count_loss_tokens(self, pieces: Pieces, places: Places) -> np.ndarray:
        """Count the targets in the loss of each piece, (P,) int64: all tokens in the loss but in column 0."""
        assert pieces.loss_tokens is not None
        counts: np.ndarray = pieces.loss_tokens.copy()
        for piece in np.flatnonzero(counts < 0).tolist():
            counts[piece] = self._in_loss(pieces, piece)
        firsts = pieces.bounds[:-1] if places.is_full else pieces.bounds[:-1][places.counts > 0]
        counts[firsts] -= self._firsts_in_loss(pieces, firsts)
        return counts

    def _in_loss(self, pieces: Pieces, piece: int) -> int:
        """Count the tokens in the loss of a piece."""
        marks, start, length = pieces.marks, int(pieces.starts[piece]), int(pieces.lengths[piece])
        if marks is not None and marks.without is not None and marks.without[piece]:
            return 0
        array = pieces.arrays[0 if pieces.array is None else int(pieces.array[piece])]
        every = marks is not None and marks.all
        count = length if every else int(np.count_nonzero(array[start : start + length] >= self._loss_bit))
        is_first = marks is not None and marks.first and pieces.offsets[piece] == 0
        return count - bool(is_first and (every or array[start] >= self._loss_bit))

    def _firsts_in_loss(self, pieces: Pieces, at: np.ndarray) -> np.ndarray:
        """Return whether the first token of each of these pieces, (k,) int64, is in the loss, (k,) bool."""
        marks, starts = pieces.marks, pieces.starts[at]
        # a batch of padding names no arrays
        if not len(at) or (marks is not None and marks.all):
            found = np.ones(len(at), bool)
        elif pieces.array is None:
            found = pieces.arrays[0][starts] >= self._loss_bit
        else:
            places = zip(pieces.array[at].tolist(), starts.tolist(), strict=True)
            found = np.array([pieces.arrays[array][start] for array, start in places]) >= self._loss_bit
        if marks is not None and marks.first:
            found &= pieces.offsets[at] != 0
        if marks is not None and marks.without is not None:
            found &= ~marks.without[at]
        return found
