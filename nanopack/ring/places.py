"""Lay the pieces of a batch out in rows, and say what the host knows of it then.

    Pieces   ->   Places: columns, and starts in the slot   ->   slot.py, table.py write them
                  facts_of()   ->   BatchFacts

numpy alone: neither torch nor a GPU.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from nanopack.packing.rows import sums
from nanopack.ring.facts import BatchFacts
from nanopack.ring.layout import ROW_ALIGN, Layout
from nanopack.ring.pieces import Pieces


class Places:
    """Where the P pieces of a batch land, row by row, and its B rows. All arrays are int64."""

    def __init__(self, lengths: np.ndarray, bounds: np.ndarray, first_word: int) -> None:
        """Lay out pieces of these lengths, (P,), in rows that begin with these of them, (B + 1,).

        The first row is at `first_word` (in words from the front of the slot).
        """
        self.lengths = lengths
        self.bounds = bounds
        self.counts = bounds[1:] - bounds[:-1]
        """(B,): pieces of each row."""
        ends = sums(lengths)
        self.tokens = int(ends[-1])
        row_ends = ends[bounds]
        self.row_lengths = row_ends[1:] - row_ends[:-1]
        """(B,)"""
        self.is_full = bool(self.row_lengths.all())
        """Whether there is no row of padding alone."""
        self.columns = ends[:-1] - row_ends[:-1].repeat(self.counts)
        """(P,): the first column of each piece in its row."""
        self.gaps = -self.row_lengths & (ROW_ALIGN - 1)
        """(B,): words from the end of each row to the start of the next."""
        self.starts = sums(self.row_lengths + self.gaps, first_word)
        """(B + 1,): where each row starts in the slot, in words, and where the last one ends; multiples of ROW_ALIGN"""

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

    def max_seqlen(self, seq_len: int) -> int:
        """Return the length of the longest segment."""
        padding = seq_len - int(self.row_lengths.min())
        return max(padding, int(np.minimum(self.lengths, seq_len - self.columns).max(initial=0)))


def facts_of(
    pieces: Pieces,
    places: Places,
    slot: int,
    used_bytes: int,
    loss_tokens: list[int],
    weight_sum: float | None,
    seq_len: int,
) -> tuple[BatchFacts, list[tuple[int, int]]]:
    """Return facts and counts as `Slot.fill` does: `loss_tokens` are of each shard; weight_sum None: all weigh 1."""
    table = np.empty((len(pieces.lengths), 4), np.int64)
    table[:, 0] = pieces.conversations
    table[:, 1] = places.columns
    table[:, 2] = pieces.lengths
    table[:, 3] = pieces.offsets
    # with tails a row is longer than its pieces
    of_rows = places.row_lengths if places.lengths is pieces.lengths else np.diff(sums(pieces.lengths)[pieces.bounds])
    tokens = np.add.reduce(np.minimum(of_rows, seq_len).reshape(len(loss_tokens), -1), axis=1).tolist()
    facts = BatchFacts(
        slot=slot,
        used_bytes=used_bytes,
        num_loss_tokens=sum(loss_tokens),
        num_tokens=sum(tokens),
        weight_sum=float(sum(loss_tokens)) if weight_sum is None else weight_sum,
        max_seqlen=places.max_seqlen(seq_len),
        pieces=table.tobytes(),
        pieces_per_row=places.counts.tobytes(),
    )
    return facts, list(zip(tokens, loss_tokens, strict=True))


def too_many_pieces(segments: int, layout: Layout) -> ValueError:
    """Return the error for a batch with more segments than cu_seqlens has room for."""
    per_row = (layout.max_segments or 0) // layout.batch_size
    return ValueError(
        f"max_pieces={per_row} is too small: a batch has {segments} pieces with its padding, and cu_seqlens has room "
        f"for {layout.batch_size} * {per_row}; pass max_pieces={-(-segments // layout.batch_size)} or more "
        f"(seq_len={layout.seq_len} is always enough)"
    )
