"""Write batches into slots: their token words, and the tables of rows, pieces and cu_seqlens.

    Pieces: rows of runs, and where their words are   ->   Slot.lay_out(), fill()   ->   kernels/pack.py
     producer/shard.py                                                                   which reads the bytes

layout.py defines the format. numpy alone: neither torch nor a GPU.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np

from nanopack.packing.rows import sums
from nanopack.ring.layout import ALIGN_BYTES, ROW_ALIGN, Layout, round_up
from nanopack.ring.pieces import Pieces
from nanopack.ring.places import Filled, Known, Places, known_of, too_many_pieces

# Mean words of a piece from which on copying each by itself is faster than one gather of all words.
LONG_PIECES = 350


class LaidWords(NamedTuple):
    """A batch whose words are still to be written into a slot."""

    known: Known
    pieces: Pieces
    places: Places


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
        self._loss_bit = layout.word_dtype.type(layout.loss_bit)

    def lay_out(self, pieces: Pieces, batches: int, shards: int = 1) -> list[LaidWords]:
        """Return as many batches of B rows, to be written into slots like this one.

        A row without pieces becomes padding. The rows of a batch are those of `shards` shards, equally many each.
        """
        layout = self.layout
        places = Places.of(self._taken(pieces.lengths), pieces.bounds, layout.first_word)
        known = known_of(pieces, places, batches, shards, layout.seq_len)
        rows = range(0, pieces.num_rows, layout.batch_size)
        parts = [pieces] if batches == 1 else [pieces.part(row, row + layout.batch_size) for row in rows]
        return list(map(LaidWords, known, parts, places.split(batches, layout.first_word)))

    def fill(self, laid: LaidWords) -> Filled:
        """Write a batch.

        Raises ValueError where it has more segments than cu_seqlens has room for.
        """
        layout, (known, pieces, places) = self.layout, laid
        segments = None
        if layout.max_segments is not None:
            segments = places.segments(layout.seq_len)
            if len(segments) - 1 > layout.max_segments:
                raise too_many_pieces(len(segments) - 1, layout)
            if layout.real:
                segments = self._with_real_lengths(segments, pieces, places)
        self._write_words(pieces, places)
        used = self._write_tables(places, pieces.weights, segments)
        return Filled(4 * used, *self._count_loss_tokens(places, pieces.weights, len(known.tokens)))

    def _taken(self, lengths: np.ndarray) -> np.ndarray:
        """Return how many words of a row documents of these lengths take, tails included."""
        layout = self.layout
        # one of T + 1 words has no tail: its last is only a target
        return lengths if layout.align == 1 else np.minimum(round_up(lengths, layout.align), layout.seq_len + 1)

    def _with_real_lengths(self, segments: np.ndarray, pieces: Pieces, places: Places) -> np.ndarray:
        """Return the starts of segments, filled up to `real_at`, then the sums of their real lengths, as many."""
        layout = self.layout
        at = (np.arange(layout.batch_size) * layout.seq_len).repeat(places.counts) + places.columns
        real = np.zeros(layout.max_segments or 0, np.int64)
        inside = places.columns < layout.seq_len
        lengths = np.minimum(pieces.lengths, layout.seq_len - places.columns)[inside]
        real[np.searchsorted(segments, at[inside])] = lengths
        filling = np.full(layout.real_at - len(segments), layout.batch_size * layout.seq_len)
        return np.concatenate([segments, filling, sums(real)])

    def _write_words(self, pieces: Pieces, places: Places) -> None:
        """Write the words, and zeros from the end of each row to the start of the next."""
        num, out = len(pieces.lengths), self.words[places.starts[0] : places.starts[-1]]
        if self.layout.align > 1:
            self._place_words(pieces, places, out)
        elif num > 1 and pieces.array is None and int(pieces.starts[1]) - int(pieces.starts[0]) in _next_to(pieces):
            begins = _begins(pieces, places)
            if not self._copy_rows(pieces, begins, places, out):
                self._copy_words(*_joined(pieces, begins), places, out)
        elif num and pieces.array is None and len(out) < LONG_PIECES * num:
            self._gather_words(pieces, places, out)
        elif num:
            self._copy_words(pieces, pieces.bounds, places, out)
        if pieces.marks is not None:
            self._mark(pieces, places)
        if self.layout.align > 1:
            self._write_tails(pieces, places)

    def _place_words(self, pieces: Pieces, places: Places, out: np.ndarray) -> None:
        """Write each piece by itself, and zeros between them."""
        out.fill(0)
        array = np.zeros(len(pieces.lengths), np.int64) if pieces.array is None else pieces.array
        columns = (array, pieces.starts, pieces.lengths, places.words)
        for number, start, length, word in zip(*(column.tolist() for column in columns), strict=True):
            self.words[word : word + length] = pieces.arrays[number][start : start + length]

    def _write_tails(self, pieces: Pieces, places: Places) -> None:
        """Fill up the documents that take more words than they have; what follows such a tail is not in the loss."""
        ends = places.words + pieces.lengths
        tails = np.flatnonzero(places.lengths > pieces.lengths)
        for begin, end in zip(ends[tails].tolist(), (places.words + places.lengths)[tails].tolist(), strict=True):
            self.words[begin:end] = self.layout.pad_id
        following = tails[~np.isin(tails + 1, places.bounds)] + 1
        self.words[places.words[following]] &= ~self._loss_bit

    def _copy_rows(self, pieces: Pieces, begins: np.ndarray, places: Places, out: np.ndarray) -> bool:
        """Copy all rows at once where these are full and evenly spaced in the array; return whether they are.

        `begins` as `_begins` returns it. So a batch of the stream is copied where documents come in their own order.
        """
        rows, length = len(places.row_lengths), self.layout.seq_len + 1
        if int(places.row_lengths.min()) < length or rows == 1 or np.count_nonzero(begins) > rows:
            return False
        starts = pieces.starts[places.bounds[:-1]]
        steps = starts[1:] - starts[:-1]
        step, words = int(steps[0]), pieces.arrays[0][int(starts[0]) :]
        if step < 1 or np.count_nonzero(steps != step):
            return False
        table, size = out.reshape(rows, -1), words.itemsize
        # np.lib.stride_tricks.as_strided takes half as long as the copy
        table[:, :length] = np.ndarray((rows, length), words.dtype, words, strides=(step * size, size))
        table[:, length:] = 0
        return True

    def _gather_words(self, pieces: Pieces, places: Places, out: np.ndarray) -> None:
        full = slice(None) if places.is_full else places.counts > 0
        lengths = pieces.lengths.copy()
        lengths[places.bounds[1:][full] - 1] += places.gaps[full]
        index = (pieces.starts - (places.words - places.starts[0])).repeat(lengths)
        index += np.arange(len(out))
        # beyond the end of the array nothing but a gap is wanted
        pieces.arrays[0].take(index, out=out, mode="clip")
        ends = places.starts[:-1] + places.row_lengths
        for end, gap in zip(ends.tolist(), places.gaps.tolist(), strict=True):
            self.words[end : end + gap] = 0

    def _copy_words(self, pieces: Pieces, bounds: np.ndarray, places: Places, out: np.ndarray) -> None:
        starts, ends = pieces.starts, pieces.starts + pieces.lengths
        if pieces.array is None:
            parts = list(map(pieces.arrays[0].__getitem__, map(slice, starts.tolist(), ends.tolist())))
        else:
            arrays = map(pieces.arrays.__getitem__, pieces.array.tolist())
            runs = zip(arrays, starts.tolist(), ends.tolist(), strict=True)
            parts = [words[begin:end] for words, begin, end in runs]
        ends_of_rows = zip(bounds[1:].tolist(), places.gaps.tolist(), strict=True)
        for end, gap in reversed(list(ends_of_rows)):
            if gap:
                parts.insert(end, self._nothing[:gap])
        np.concatenate(parts, out=out)

    def _mark(self, pieces: Pieces, places: Places) -> None:
        """Change the loss bits of the words that were written."""
        marks = pieces.marks
        assert marks is not None
        if marks.all:
            begin, end = int(places.starts[0]), int(places.starts[-1])
            if marks.bare is not None and int(self.words[begin:end].max(initial=0)) >= marks.bare:
                raise _unknown_id(pieces, places, self.words, marks.bare)
            self.words[begin:end] |= self._loss_bit
            ends = places.starts[:-1] + places.row_lengths
            for end, gap in zip(ends.tolist(), places.gaps.tolist(), strict=True):
                self.words[end : end + gap] = 0
        if marks.first:
            self.words[places.words[pieces.offsets == 0]] &= ~self._loss_bit
        for piece in () if marks.without is None else np.flatnonzero(marks.without):
            start = int(places.words[piece])
            self.words[start : start + int(pieces.lengths[piece])] &= ~self._loss_bit

    def _write_tables(self, places: Places, weights: np.ndarray | None, segments: np.ndarray | None) -> int:
        """Write the rows before the words, pieces and cu_seqlens after them; return the size of the used part in int32.

        `weights` are (P,) float32, `segments` as `Places.segments` returns them; None where they are not written.
        """
        layout, num = self.layout, len(places.lengths)
        at = round_up(int(places.starts[-1]) * layout.word_bytes, ALIGN_BYTES) // 4
        head = self.table[: 4 * (layout.batch_size + 1)].reshape(-1, 4)
        head[:-1, 0] = places.starts[:-1] // ROW_ALIGN
        head[:-1, 1] = places.row_lengths
        head[:-1, 2] = at + 2 * places.bounds[:-1]
        head[:-1, 3] = places.counts
        head[-1] = 0
        if layout.pieces:
            pieces = self.table[at : at + 2 * num].reshape(-1, 2)
            pieces[:, 0] = places.columns
            pieces[:, 1] = np.ones(num, np.float32).view(np.int32) if weights is None else weights.view(np.int32)
            at += 2 * num
        if segments is not None:
            head[-1, :2] = (at, len(segments))
            self.table[at : at + len(segments)] = segments
            at += len(segments)
        return at

    def _count_loss_tokens(
        self, places: Places, weights: np.ndarray | None, shards: int
    ) -> tuple[list[int], float | None]:
        """Count the targets in the loss of each shard's rows: all tokens with the loss bit but in column 0.

        Also the sum of their weights; None where all are 1.
        """
        bounds = places.starts.tolist()
        in_loss = self.words[bounds[0] : bounds[-1]] >= self._loss_bit
        starts = places.starts[:-1] - bounds[0]
        in_loss[starts if places.is_full else starts[places.row_lengths > 0]] = False
        if weights is None:
            of_shards = [bound - bounds[0] for bound in bounds[:: len(starts) // shards]]
            return [int(np.count_nonzero(in_loss[a:b])) for a, b in itertools.pairwise(of_shards)], None
        # the words between rows are 0, so what lies between one piece's beginning and the next's is the piece
        of_pieces = np.add.reduceat(in_loss.view(np.uint8), places.words - bounds[0], dtype=np.int64)
        # the product of a count and a float32 is exact in a float64, and fsum adds exactly
        weight_sum = math.fsum((of_pieces * weights.astype(np.float64)).tolist())
        return np.diff(sums(of_pieces)[places.bounds[:: len(starts) // shards]]).tolist(), weight_sum


def _next_to(pieces: Pieces) -> tuple[int, int]:
    """Return how far the second piece's words are from the first one's where the two stand in the order of the array.

    In a row they are adjacent; neighbouring rows of the stream share a word.
    """
    length = int(pieces.lengths[0])
    return length, length - 1


def _begins(pieces: Pieces, places: Places) -> np.ndarray:
    """Return which pieces are not adjacent, in the array, to the one before them in their row: (P,) bool."""
    begins = np.empty(len(pieces.lengths), bool)
    np.not_equal(pieces.starts[1:], (pieces.starts + pieces.lengths)[:-1], out=begins[1:])
    begins[places.first_pieces] = True
    return begins


def _joined(pieces: Pieces, begins: np.ndarray) -> tuple[Pieces, np.ndarray]:
    """Return the pieces, joined where they are adjacent in a row and in the array, and the new bounds of the rows."""
    firsts = np.flatnonzero(begins)
    starts = pieces.starts[firsts]
    lasts = np.append(firsts[1:], len(begins)) - 1
    lengths = pieces.starts[lasts] + pieces.lengths[lasts] - starts
    return pieces._replace(starts=starts, lengths=lengths), firsts.searchsorted(pieces.bounds)


def _unknown_id(pieces: Pieces, places: Places, words: np.ndarray, vocab_size: int) -> ValueError:
    begin = int(places.starts[0])
    at = begin + int(np.argmax(words[begin : int(places.starts[-1])] >= vocab_size))
    piece = int(places.words.searchsorted(at, "right")) - 1
    return ValueError(
        f"document {int(pieces.conversations[piece])} has the id {int(words[at])}; ids are from 0 to {vocab_size - 1}: "
        f"give the tokenizer, or the vocab_size, that the tokens were made with"
    )
