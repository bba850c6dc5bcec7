"""Write batches into slots as tables of runs, where its words are on the device already.

    Pieces: rows of runs, and where their words are   ->   TableSlot.lay_out(), fill()   ->   kernels/gather.py
     producer/shard.py                                                                        which reads the table

kernels/gather.py defines the format. No word is copied; few are looked at: the first of each row, and those of pieces
that are not whole documents, whose tokens in the loss nobody has counted. numpy alone: neither torch nor a GPU.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np

from nanopack.packing.rows import sums
from nanopack.ring.layout import ENTRY_BYTES, Layout
from nanopack.ring.pieces import Pieces
from nanopack.ring.places import Filled, Known, Places, known_of, of_batches, too_many_pieces

# Marks of a piece in the bits of its weight: its first word is not in the loss, and none is.
FIRST, NONE = np.int32(-(2**31)), np.int32(2**31 - 1)


class LaidTable(NamedTuple):
    """A table that is still to be written into a slot."""

    known: Known
    head: np.ndarray
    """(B + 1, 4) int32: the rows."""
    entries: np.ndarray
    """(P, 4) int32: the pieces."""
    segments: int
    loss_tokens: list[int]
    """Targets in the loss, of each shard's rows."""
    weight_sum: float | None


class TableSlot:
    """The buffer of one table, (n, 4) int32."""

    def __init__(self, layout: Layout, buffer: np.ndarray, number: int = 0) -> None:
        """Use `buffer`, (layout.nbytes,) uint8, 64-byte aligned, as slot `number` of its ring."""
        self.layout = layout
        self.number = number
        self.buffer = buffer
        self._entries = buffer[: len(buffer) // ENTRY_BYTES * ENTRY_BYTES].view(np.int32).reshape(-1, 4)
        self._loss_bit = layout.word_dtype.type(layout.loss_bit)

    def lay_out(self, pieces: Pieces, batches: int, shards: int = 1) -> list[LaidTable]:
        """As `Slot.lay_out`; of `pieces`, `loss_tokens` are known, and the device holds all its arrays end to end."""
        layout = self.layout
        places = Places.of(pieces.lengths, pieces.bounds)
        segments = places.count_segments(layout.seq_len).reshape(batches, -1)
        of_pieces = self._count_loss_tokens(pieces, places)
        firsts, entries = pieces.bounds[:: layout.batch_size].tolist(), self._entries_of(pieces, places)
        of_shards = np.diff(sums(of_pieces)[pieces.bounds[:: layout.batch_size // shards]]).reshape(batches, shards)
        weight_sums: list[float | None] = [None] * batches
        if pieces.weights is not None:
            # the product of a count and a float32 is exact in a float64, and fsum adds exactly
            weighted = (of_pieces * pieces.weights.astype(np.float64)).tolist()
            weight_sums = [math.fsum(weighted[begin:end]) for begin, end in itertools.pairwise(firsts)]
        return [
            LaidTable(*batch)
            for batch in zip(
                known_of(pieces, places, batches, shards, layout.seq_len),
                self._heads(places, segments),
                [entries[begin:end] for begin, end in itertools.pairwise(firsts)],
                segments.sum(axis=1).tolist(),
                of_shards.tolist(),
                weight_sums,
                strict=True,
            )
        ]

    def fill(self, laid: LaidTable) -> Filled:
        """As `Slot.fill`."""
        layout, first, num = self.layout, self.layout.batch_size + 1, len(laid.entries)
        if layout.max_segments is not None and laid.segments > layout.max_segments:
            raise too_many_pieces(laid.segments, layout)
        self._entries[:first] = laid.head
        self._entries[first : first + num] = laid.entries
        return Filled((first + num) * ENTRY_BYTES, laid.loss_tokens, laid.weight_sum)

    def _heads(self, places: Places, segments: np.ndarray) -> np.ndarray:
        """Return the entries of the rows of each batch, (batches, B + 1, 4) int32; `segments` are (batches, B)."""
        batches, rows = segments.shape
        heads = np.zeros((batches, rows + 1, 4), np.int32)
        heads[:, :-1, 0] = places.row_lengths.reshape(batches, rows)
        heads[:, :-1, 1] = of_batches(places.bounds, batches)[:, :-1] + rows + 1
        heads[:, :-1, 2] = places.counts.reshape(batches, rows)
        ends = np.add.accumulate(segments, axis=1)
        heads[:, 1:-1, 3] = ends[:, :-1]
        heads[:, -1, 0] = ends[:, -1]
        return heads

    def _entries_of(self, pieces: Pieces, places: Places) -> np.ndarray:
        """Return the entries of the pieces, (P, 4) int32."""
        entries = np.empty((len(pieces.lengths), 4), np.int32)
        entries[:, 0] = places.columns
        entries[:, 1] = self._weights(pieces)
        origins = pieces.starts - places.columns
        if pieces.array is not None:
            origins += sums(np.array([len(array) for array in pieces.arrays]))[pieces.array]
        entries.view(np.int64)[:, 1] = origins
        return entries

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
        firsts = places.first_pieces
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
