"""Write one batch into a slot: its token words, and the tables of rows, pieces and cu_seqlens.

    rows of runs, words of documents   ->   Slot.fill()   ->   kernels/pack.py
     packing/       producer/reader.py                          which reads the bytes; BatchFacts

layout.py defines the format. numpy alone: neither torch nor a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from nanopack.packing.rows import Row
from nanopack.ring.facts import BatchFacts
from nanopack.ring.layout import ALIGN_BYTES, ROW_ALIGN, Layout, round_up


class Places(NamedTuple):
    """Where the P runs of a batch land, row by row, and its B rows. All arrays are int64."""

    lengths: np.ndarray
    """(P,)"""
    columns: np.ndarray
    """(P,): the first column of each run in its row."""
    bounds: np.ndarray
    """(B + 1,): the first run of each row; the last entry is P."""
    row_lengths: np.ndarray
    """(B,)"""
    starts: np.ndarray
    """(B + 1,): where each row starts in the slot, in words, and where the last one ends; multiples of ROW_ALIGN."""

    @classmethod
    def of(cls, rows: Sequence[Row], first_word: int) -> Places:
        """Lay out B rows of runs, the first row at `first_word` (in words from the front of the slot)."""
        lengths = np.array([run.length for row in rows for run in row], np.int64)
        bounds, ends = _sums([len(row) for row in rows]), _sums(lengths)
        row_ends = ends[bounds]
        row_lengths = np.diff(row_ends)
        columns = ends[:-1] - np.repeat(row_ends[:-1], np.diff(bounds))
        return cls(lengths, columns, bounds, row_lengths, first_word + _sums(round_up(row_lengths, ROW_ALIGN)))

    def in_rows(self, of_rows: np.ndarray) -> np.ndarray:
        """Repeat a value of each row, (B,), for each of its runs: (P,)."""
        return np.repeat(of_rows, np.diff(self.bounds))

    def segments(self, seq_len: int) -> np.ndarray:
        """Return the starts of the segments in the flattened batch, then B * T: sorted int64, (segments + 1,).

        A segment is a piece, or the padding at the end of a row.
        """
        at = np.arange(len(self.row_lengths)) * seq_len
        # a piece may hold nothing but the last target of a row; then it is not part of the inputs
        pieces = (self.in_rows(at) + self.columns)[self.columns < seq_len]
        padding = (at + self.row_lengths)[self.row_lengths < seq_len]
        return np.sort(np.concatenate([pieces, padding, [len(at) * seq_len]]))


class Slot:
    """The buffer of one batch: `words` (uint16 or uint32) and `table` (int32) are two views of the same bytes."""

    def __init__(self, layout: Layout, buffer: np.ndarray, number: int = 0) -> None:
        """Use `buffer`, (layout.nbytes,) uint8, 64-byte aligned, as slot `number` of its ring."""
        self.layout = layout
        self.number = number
        self.buffer = buffer
        self.words = buffer.view(layout.word_dtype)
        self.table = buffer.view(np.int32)
        self._nothing = np.zeros(ROW_ALIGN, layout.word_dtype)

    def fill(self, rows: Sequence[Row]) -> tuple[BatchFacts, np.ndarray]:
        """Write a batch, and return its facts (without progress and state) and the counts of each row.

        `rows` are B lists of runs, whose documents have `words` ((n,) of the layout's word type), `weight` and
        `conversation`; an empty list becomes a row of padding. The counts are (B, 4) int64: tokens in `inputs`, targets
        in the loss, and the sums of the pieces' lengths and of their squares. Raises ValueError where the batch has
        more segments than cu_seqlens has room for.
        """
        layout = self.layout
        runs = [run for row in rows for run in row]
        places = Places.of(rows, layout.first_word)
        segments = places.segments(layout.seq_len)
        if layout.max_segments is not None and len(segments) - 1 > layout.max_segments:
            raise _too_many_pieces(len(segments) - 1, layout)
        weights = np.array([run.document.weight for run in runs], np.float32)
        self._write_words(rows, places)
        used = self._write_tables(places, weights, segments)
        loss_tokens = self._count_loss_tokens(places)
        pieces = np.empty((len(runs), 4), np.int64)
        pieces[:, 0] = [run.document.conversation for run in runs]
        pieces[:, 1] = places.columns
        pieces[:, 2] = places.lengths
        pieces[:, 3] = [run.offset for run in runs]
        row_tokens = np.minimum(places.row_lengths, layout.seq_len)
        row_loss_tokens = np.diff(_sums(loss_tokens)[places.bounds])
        facts = BatchFacts(
            slot=self.number,
            used_bytes=4 * used,
            num_loss_tokens=int(row_loss_tokens.sum()),
            num_tokens=int(row_tokens.sum()),
            # the product of a count and a float32 is exact in a float64, and fsum adds exactly
            weight_sum=math.fsum((loss_tokens * weights.astype(np.float64)).tolist()),
            max_seqlen=int(np.diff(segments).max()),
            pieces=pieces.tobytes(),
            pieces_per_row=np.diff(places.bounds).tobytes(),
        )
        row_squares = np.diff(_sums(places.lengths**2)[places.bounds])
        return facts, np.stack([row_tokens, row_loss_tokens, places.row_lengths, row_squares], axis=1)

    def _write_words(self, rows: Sequence[Row], places: Places) -> None:
        """Write the words, and zeros from the end of each row to the start of the next."""
        parts: list[np.ndarray] = []
        for row, length in zip(rows, places.row_lengths.tolist(), strict=True):
            parts += [document.words[offset : offset + run_length] for document, offset, run_length in row]
            parts.append(self._nothing[: -length % ROW_ALIGN])
        np.concatenate(parts, out=self.words[places.starts[0] : places.starts[-1]])

    def _write_tables(self, places: Places, weights: np.ndarray, segments: np.ndarray) -> int:
        """Write the rows before the words, pieces and cu_seqlens after them; return the size of the used part in int32.

        `weights` are (P,) float32, `segments` as `Places.segments` returns them.
        """
        layout = self.layout
        at = round_up(int(places.starts[-1]) * layout.word_bytes, ALIGN_BYTES) // 4
        head = self.table[: 4 * (layout.batch_size + 1)].reshape(-1, 4)
        head[:-1, 0] = places.starts[:-1] // ROW_ALIGN
        head[:-1, 1] = places.row_lengths
        head[:-1, 2] = at + 2 * places.bounds[:-1]
        head[:-1, 3] = np.diff(places.bounds)
        head[-1] = 0
        if layout.pieces:
            pieces = self.table[at : at + 2 * len(weights)].reshape(-1, 2)
            pieces[:, 0] = places.columns
            pieces[:, 1] = weights.view(np.int32)
            at += 2 * len(weights)
        if layout.max_segments is not None:
            head[-1, :2] = (at, len(segments))
            self.table[at : at + len(segments)] = segments
            at += len(segments)
        return at

    def _count_loss_tokens(self, places: Places) -> np.ndarray:
        """Count the targets in the loss of each run, (P,) int64: all tokens with the loss bit but in column 0."""
        first, *_, end = places.starts.tolist()
        in_loss = self.words[first:end] >= self.layout.loss_bit
        starts = places.starts[:-1] - first
        in_loss[starts[places.row_lengths > 0]] = False
        # the words between rows are 0, so what lies between one run's beginning and the next's is the run
        return np.add.reduceat(in_loss.view(np.uint8), places.in_rows(starts) + places.columns, dtype=np.int64)


def _sums(numbers: Any) -> np.ndarray:
    """Return the sums of the first 0, 1, 2, …, n of n numbers, (n + 1,) int64."""
    sums = np.zeros(len(numbers) + 1, np.int64)
    np.cumsum(numbers, out=sums[1:])
    return sums


def _too_many_pieces(segments: int, layout: Layout) -> ValueError:
    per_row = (layout.max_segments or 0) // layout.batch_size
    return ValueError(
        f"max_pieces={per_row} is too small: a batch has {segments} pieces with its padding, and cu_seqlens has room "
        f"for {layout.batch_size} * {per_row}; pass max_pieces={-(-segments // layout.batch_size)} or more "
        f"(seq_len={layout.seq_len} is always enough)"
    )
