"""Write one batch into a slot: its token words, and the tables of rows, pieces and cu_seqlens.

    rows of runs, words of documents   ->   Slot.fill()   ->   kernels/pack.py
     packing/       producer/reader.py

layout.py says where everything lies. numpy alone: neither torch nor a GPU.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from nanopack.packing.rows import Piece, Row
from nanopack.ring.layout import ALIGN_BYTES, ROW_ALIGN, Layout, round_up


@dataclass(eq=False)
class Words:
    """A document as it waits: its words, and what the batch tells of it. Equal only to itself."""

    read: int
    """Number of the reading that it came from, in its share."""
    conversation: int
    """Index of the conversation in the data set."""
    words: np.ndarray
    """(n,) uint16 or uint32: ids, with the loss bit on top."""
    weight: float = 1.0
    """Loss weight of each of its trained tokens."""
    own_weight: float = 1.0
    """The conversation's own weight, which that follows from."""
    taken: int = 0
    """Tokens of it that have been placed, where that is counted."""

    @cached_property
    def checksum(self) -> bytes:
        """A checksum of the words."""
        return zlib.crc32(self.words.data).to_bytes(4, "little")


class PieceTable(Sequence[tuple[Piece, ...]]):
    """The pieces of each row, as a sequence of tuples: kept as numbers, and made into pieces when somebody looks."""

    def __init__(self, table: bytes, counts: bytes) -> None:
        """Take as int64 (P, 4), the fields of all pieces row by row, and (B,), the number of each row's.

        Bytes, because they travel between processes faster than arrays do.
        """
        self.table = table
        self.counts = counts

    @cached_property
    def _fields(self) -> np.ndarray:
        return np.frombuffer(self.table, np.int64).reshape(-1, 4)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(np.frombuffer(self.counts, np.int64).tolist(), initial=0))

    def __len__(self) -> int:
        return len(self.counts) // 8

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return tuple(self[i] for i in range(*row.indices(len(self))))
        row = range(len(self))[row]
        fields = self._fields[self._ends[row] : self._ends[row + 1]]
        return tuple(Piece(*values) for values in fields.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __repr__(self) -> str:
        return repr(tuple(self))


class Filled(NamedTuple):
    """What the host knows of a batch once its slot is filled. See `Batch` for the fields of the same name."""

    used_bytes: int
    """Bytes of the slot, from the front, that the device needs."""
    row_trained: list[int]
    """Trained targets in each row."""
    num_tokens: int
    weight_sum: float
    max_seqlen: int
    word_pieces: PieceTable


class Places(NamedTuple):
    """Where a batch lands: arrays of int64, (P,) of its runs, row by row, or (B,) of its rows."""

    lengths: np.ndarray
    """(P,)"""
    columns: np.ndarray
    """(P,): the first column of each run in its row."""
    bounds: np.ndarray
    """(B + 1,): the first run of each row, and behind the last one."""
    row_lengths: np.ndarray
    """(B,)"""
    starts: np.ndarray
    """(B + 1,): where each row starts, in words, and where the last one ends; multiples of ROW_ALIGN."""

    @classmethod
    def of(cls, rows: Sequence[Row], first_word: int) -> Places:
        """Lay rows of runs out, the first row at `first_word`."""
        lengths = np.array([run.length for row in rows for run in row], np.int64)
        bounds, ends = _sums([len(row) for row in rows]), _sums(lengths)
        row_ends = ends[bounds]
        row_lengths = np.diff(row_ends)
        columns = ends[:-1] - np.repeat(row_ends[:-1], np.diff(bounds))
        return cls(lengths, columns, bounds, row_lengths, first_word + _sums(round_up(row_lengths, ROW_ALIGN)))

    def in_rows(self, of_rows: np.ndarray) -> np.ndarray:
        """Return for each run what its row has, (P,)."""
        return np.repeat(of_rows, np.diff(self.bounds))

    def segments(self, seq_len: int) -> np.ndarray:
        """Return where pieces begin in the flattened batch, padding as one piece a row, and where the last ends."""
        at = np.arange(len(self.row_lengths)) * seq_len
        # a piece may have nothing but the last target of a row, and is none of the inputs
        pieces = (self.in_rows(at) + self.columns)[self.columns < seq_len]
        padding = (at + self.row_lengths)[self.row_lengths < seq_len]
        return np.sort(np.concatenate([pieces, padding, [len(at) * seq_len]]))


class Slot:
    """One batch's place in memory: `words` (unsigned) and `table` (int32), two views of the same bytes."""

    def __init__(self, layout: Layout, buffer: np.ndarray) -> None:
        """Use `buffer`, (layout.nbytes,) uint8, 64-byte aligned."""
        self.layout = layout
        self.buffer = buffer
        self.words = buffer.view(layout.word_dtype)
        self.table = buffer.view(np.int32)
        self._nothing = np.zeros(ROW_ALIGN, layout.word_dtype)

    def fill(self, rows: Sequence[Row]) -> Filled:
        """Write a batch of runs of `Words` and return what the host knows of it. Rows without any become padding.

        Raises ValueError where the batch has more pieces than cu_seqlens has room for.
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
        trained = self._count_trained(places)
        pieces = np.empty((len(runs), 4), np.int64)
        pieces[:, 0] = [run.document.conversation for run in runs]
        pieces[:, 1] = places.columns
        pieces[:, 2] = places.lengths
        pieces[:, 3] = [run.offset for run in runs]
        return Filled(
            used_bytes=4 * used,
            row_trained=np.diff(_sums(trained)[places.bounds]).tolist(),
            num_tokens=int(np.minimum(places.row_lengths, layout.seq_len).sum()),
            # the product of a count and a float32 is exact in a float64, and fsum adds exactly
            weight_sum=math.fsum((trained * weights.astype(np.float64)).tolist()),
            max_seqlen=int(np.diff(segments).max()),
            word_pieces=PieceTable(pieces.tobytes(), np.diff(places.bounds).tobytes()),
        )

    def _write_words(self, rows: Sequence[Row], places: Places) -> None:
        """Write the words, and zeros from the end of each row to the start of the next."""
        parts: list[np.ndarray] = []
        for row, length in zip(rows, places.row_lengths.tolist(), strict=True):
            parts += [document.words[offset : offset + run_length] for document, offset, run_length in row]
            parts.append(self._nothing[: -length % ROW_ALIGN])
        np.concatenate(parts, out=self.words[places.starts[0] : places.starts[-1]])

    def _write_tables(self, places: Places, weights: np.ndarray, segments: np.ndarray) -> int:
        """Write rows in front of the words, pieces and cu_seqlens behind; return where the used part ends, in int32."""
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

    def _count_trained(self, places: Places) -> np.ndarray:
        """Return for each run how many of its tokens are trained targets: all with the loss bit but in column 0."""
        first, *_, end = places.starts.tolist()
        trained = self.words[first:end] >= self.layout.loss_bit
        starts = places.starts[:-1] - first
        trained[starts[places.row_lengths > 0]] = False
        # the words between rows are 0, so what lies between one run's beginning and the next's is the run
        return np.add.reduceat(trained.view(np.uint8), places.in_rows(starts) + places.columns, dtype=np.int64)


def _sums(numbers: Any) -> np.ndarray:
    """Return the sums of the first 0, 1, 2, … of n numbers, (n + 1,) int64."""
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
