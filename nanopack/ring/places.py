"""Lay the pieces of batches out in rows, and say what the host knows of them then.

    Pieces   ->   Places: columns, and starts in the slot   ->   slot.py, table.py write them
                  known_of()   ->   BatchFacts

numpy alone: neither torch nor a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from nanopack.packing.rows import sums
from nanopack.ring.layout import ROW_ALIGN, Layout
from nanopack.ring.pieces import Pieces


@dataclass
class Places:
    """Where the P pieces of some rows land, row by row. All arrays are int64."""

    lengths: np.ndarray
    """(P,): tokens, tails included."""
    bounds: np.ndarray
    """(rows + 1,): the first piece of each row; the last entry is P."""
    counts: np.ndarray
    """(rows,): pieces of each row."""
    row_lengths: np.ndarray
    """(rows,)"""
    columns: np.ndarray
    """(P,): the first column of each piece in its row."""
    starts: np.ndarray
    """(rows + 1,): where each row starts in the slot, in words, and where the last one ends; multiples of ROW_ALIGN."""
    is_full: bool
    """Whether there is no row of padding alone."""

    @classmethod
    def of(cls, lengths: np.ndarray, bounds: np.ndarray, first_word: int = 0) -> Places:
        """Lay out pieces of these lengths in rows that begin with these of them; the first row is at `first_word`."""
        counts, ends = bounds[1:] - bounds[:-1], sums(lengths)
        row_ends = ends[bounds]
        row_lengths = row_ends[1:] - row_ends[:-1]
        columns = ends[:-1] - row_ends[:-1].repeat(counts)
        starts = sums(row_lengths + (-row_lengths & (ROW_ALIGN - 1)), first_word)
        return cls(lengths, bounds, counts, row_lengths, columns, starts, int(np.minimum.reduce(row_lengths)) > 0)

    def split(self, batches: int, first_word: int) -> list[Places]:
        """Return the places of as many batches, of equally many rows each; the first row of each is at `first_word`."""
        if batches == 1:
            return [self]
        rows = len(self.counts) // batches
        firsts = self.bounds[::rows].tolist()
        bounds = of_batches(self.bounds, batches)
        starts = of_batches(self.starts, batches) + first_word
        full = (self.row_lengths.reshape(batches, rows).min(axis=1) > 0).tolist()
        found = []
        for batch, (first, end) in enumerate(pairwise(firsts)):
            own, of_rows = slice(first, end), slice(batch * rows, (batch + 1) * rows)
            found.append(
                Places(
                    *(self.lengths[own], bounds[batch], self.counts[of_rows], self.row_lengths[of_rows]),
                    *(self.columns[own], starts[batch], full[batch]),
                )
            )
        return found

    @property
    def gaps(self) -> np.ndarray:
        """Words from the end of each row to the start of the next, (rows,)."""
        return -self.row_lengths & (ROW_ALIGN - 1)

    @property
    def first_pieces(self) -> np.ndarray:
        """The first piece of each row that has one."""
        return self.bounds[:-1] if self.is_full else self.bounds[:-1][self.counts > 0]

    @cached_property
    def words(self) -> np.ndarray:
        """(P,): where each piece starts in the slot, in words."""
        words: np.ndarray = self.starts[:-1].repeat(self.counts) + self.columns
        return words

    def segments(self, seq_len: int) -> np.ndarray:
        """Return the starts of the segments in the flattened batch, then B * T: sorted int64, (segments + 1,).

        A segment is a piece, or the padding at the end of a row.
        """
        at = np.arange(len(self.row_lengths)) * seq_len
        # a piece may hold nothing but the last target of a row; then it is not part of the inputs
        pieces = (at.repeat(self.counts) + self.columns)[self.columns < seq_len]
        padding = (at + self.row_lengths)[self.row_lengths < seq_len]
        return np.sort(np.concatenate([pieces, padding, [len(at) * seq_len]]))

    def count_segments(self, seq_len: int) -> np.ndarray:
        """Return the number of segments of each row, (B,) int64."""
        # only the last piece of a row may begin in column T
        beyond = np.zeros(len(self.counts), np.int64)
        filled = self.counts > 0
        beyond[filled] = self.columns[self.bounds[1:][filled] - 1] == seq_len
        segments: np.ndarray = self.counts - beyond + (self.row_lengths < seq_len)
        return segments


def of_batches(bounds: np.ndarray, batches: int) -> np.ndarray:
    """Return the bounds of rows, (rows + 1,), by batch and from 0 in each: (batches, rows of a batch + 1)."""
    rows = (len(bounds) - 1) // batches
    found = np.empty((batches, rows + 1), np.int64)
    found[:, :-1] = bounds[:-1].reshape(batches, rows)
    found[:, -1] = bounds[rows::rows]
    found -= bounds[:-1:rows, None]
    return found


class Filled(NamedTuple):
    """What is known of a batch once it is in a slot."""

    used_bytes: int
    """Bytes of the slot, from the front, that the device needs."""
    loss_tokens: list[int]
    """Targets in the loss, of each shard's rows."""
    weight_sum: float | None
    """Sum of their weights; None: all weigh 1."""


class Known(NamedTuple):
    """What the host knows of a batch once it is laid out; see `BatchFacts` for fields of the same name."""

    tokens: list[int]
    """In `inputs`, of each shard's rows."""
    max_seqlen: int
    pieces: bytes
    pieces_per_row: bytes


def known_of(pieces: Pieces, places: Places, batches: int, shards: int, seq_len: int) -> list[Known]:
    """Return the facts of as many batches, whose rows are those of `shards` shards, equally many each."""
    table = np.empty((len(pieces.lengths), 4), np.int64)
    table[:, 0] = pieces.conversations
    table[:, 1] = places.columns
    table[:, 2] = pieces.lengths
    table[:, 3] = pieces.offsets
    # with tails a row is longer than its pieces
    of_rows = places.row_lengths if places.lengths is pieces.lengths else np.diff(sums(pieces.lengths)[pieces.bounds])
    tokens = np.add.reduce(np.minimum(of_rows, seq_len).reshape(batches, shards, -1), axis=2).tolist()
    firsts = places.bounds[:: len(places.counts) // batches]
    counts, longest = places.counts.reshape(batches, -1), _longest_segments(places, firsts, batches, seq_len)
    return [
        Known(of_shards, longest_segment, table[begin:end].tobytes(), of_rows.tobytes())
        for of_shards, longest_segment, (begin, end), of_rows in zip(
            tokens, longest, pairwise(firsts.tolist()), counts, strict=True
        )
    ]


def _longest_segments(places: Places, firsts: np.ndarray, batches: int, seq_len: int) -> list[int]:
    """Return the length of the longest segment of each batch, whose first pieces are `firsts`, (batches + 1,)."""
    segments = np.minimum(places.lengths, seq_len - places.columns)
    # a batch of padding has no piece
    longest = np.maximum.reduceat(np.append(segments, 0), firsts[:-1])
    longest[firsts[1:] == firsts[:-1]] = 0
    padding = seq_len - np.minimum.reduce(places.row_lengths.reshape(batches, -1), axis=1)
    found: list[int] = np.maximum(longest, padding).tolist()
    return found


def too_many_pieces(segments: int, layout: Layout) -> ValueError:
    """Return the error for a batch with more segments than cu_seqlens has room for."""
    per_row = (layout.max_segments or 0) // layout.batch_size
    return ValueError(
        f"max_pieces={per_row} is too small: a batch has {segments} pieces with its padding, and cu_seqlens has room "
        f"for {layout.batch_size} * {per_row}; pass max_pieces={-(-segments // layout.batch_size)} or more "
        f"(seq_len={layout.seq_len} is always enough)"
    )
