"""The format of a slot: how large it is, and where everything is in it.

A slot holds one batch: its token words, and the tables that say where rows and pieces start and what they weigh. A word
is a token id with the loss bit on top: 16 bits where all ids are below 32,768, else 32. A slot is contiguous and
64-byte aligned, so that one copy brings a batch to the device. All that changes from batch to batch lies in it: every
launch of the kernel is the same. From the front:

    rows      (B + 1, 4) int32   start in units of 16 words, length, first piece, number of pieces; the last entry:
                                 where cu_seqlens begin, their number, 0, 0 (in int32 from the front)
    words     row by row, without padding, each row starting at a multiple of 16 words
    pieces    (P, 2) int32       first column, float32 weight's bits: when weights, positions or doc_ids are asked for
    cu        (n,) int32         when cu_seqlens are asked for; with `real`, all of them, then the sums of real lengths

Where the words of all data are on the device (`resident`), a slot holds only a table of rows and pieces, (n, 4) int32,
in the format of kernels/gather.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Number = TypeVar("Number", int, np.ndarray)


ALIGN_BYTES = 64


ROW_ALIGN = 16  # words


ENTRY_BYTES = 16  # of a table where the words are on the device


# Tables hold positions in a slot as int32, counted in int32.
MAX_SLOT_BYTES = 4 * (2**31 - 1)


@dataclass(frozen=True)
class Layout:
    """Sizes of a slot: the same for every batch of a loader. `Layout.of` makes one."""

    batch_size: int
    seq_len: int
    word_bytes: int
    """2 or 4."""
    pieces: bool
    """Whether the table of pieces is written."""
    max_segments: int | None
    """Capacity of cu_seqlens in segments; None where it is not written."""
    real: bool = False
    """Whether the sums of the segments' real lengths follow the cu_seqlens."""
    align: int = 1
    """Each document takes a multiple of this many words."""
    pad_id: int = 0
    """Id of the words that fill it up."""
    resident: bool = False
    """Whether the words of all data are on the device, and a slot holds only a table."""

    def __post_init__(self) -> None:
        """Raise ValueError for a slot with positions that its tables cannot hold."""
        if self.nbytes > MAX_SLOT_BYTES:
            raise ValueError(
                f"batch_size={self.batch_size} times seq_len={self.seq_len} with the tables for weights and extras "
                f"takes a slot of {self.nbytes} bytes; at most {MAX_SLOT_BYTES} are allowed: make either smaller, or "
                f"leave out weights or extras"
            )

    @classmethod
    def of(
        cls,
        batch_size: int,
        seq_len: int,
        vocab_size: int,
        *,
        pieces: bool,
        max_pieces: int | None,
        real: bool = False,
        align: int = 1,
        pad_id: int = 0,
    ) -> Layout:
        """Return the layout for B rows of T tokens, whose ids are all below `vocab_size`.

        `pieces`: whether the table of pieces is needed; `max_pieces`: capacity of cu_seqlens in segments a row, None
        where it is not needed; the others as in the layout.
        """
        word_bytes = 2 if vocab_size <= 1 << 15 else 4
        most = None if max_pieces is None else batch_size * max_pieces
        return cls(batch_size, seq_len, word_bytes, pieces, most, real, align, pad_id)

    @property
    def word_dtype(self) -> np.dtype[np.unsignedinteger]:
        """Type of a word on the host."""
        return np.dtype(np.uint16 if self.word_bytes == 2 else np.uint32)

    @property
    def loss_bit(self) -> int:
        """The bit of a word that says that the token is in the loss."""
        return 1 << (8 * self.word_bytes - 1)

    @property
    def first_word(self) -> int:
        """Where the first row starts, in words."""
        return round_up(16 * (self.batch_size + 1), ALIGN_BYTES) // self.word_bytes

    @property
    def real_at(self) -> int:
        """Where the real lengths begin in the cu_seqlens, 0 without: the starts before them are filled up to there."""
        return round_up((self.max_segments or 0) + 1, ROW_ALIGN) if self.real else 0

    @property
    def nbytes(self) -> int:
        """Bytes of a slot that holds any batch: full rows, and one piece a token."""
        if self.resident:
            return round_up(ENTRY_BYTES * (1 + self.batch_size * (self.seq_len + 2)), ALIGN_BYTES)
        row_words = round_up(self.seq_len + 1, ROW_ALIGN)
        words = self.first_word * self.word_bytes + self.batch_size * row_words * self.word_bytes
        pieces = 8 * self.batch_size * (self.seq_len + 1) if self.pieces else 0
        cu = 4 * (self.real_at + self.max_segments + 1) if self.max_segments is not None else 0
        return round_up(words, ALIGN_BYTES) + round_up(pieces, ALIGN_BYTES) + round_up(cu, ALIGN_BYTES)


def round_up(n: Number, multiple: int) -> Number:
    """Return the smallest multiple of `multiple` that is at least n; elementwise for an array."""
    return -(-n // multiple) * multiple
