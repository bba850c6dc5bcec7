"""Write one batch from a table of runs: gather their words from all of the data, which lie on the device, in one go.

    ring/ fills a table   ->   gather() on a GPU, gather_torch() anywhere   ->   tensors of a Batch

In: all words of the data, and the table of a batch, (n, 4) int32 as one contiguous buffer, 16-byte aligned.
    words  int16 or int32  tokens of all documents: the sign bit is the loss bit, the rest is the id
    table  int32           entry b, for row b: length, first_piece, n_pieces, first_segment; 0 <= length <= T+1
                           entry B: n_segments, 0, 0, 0
                           entry first_piece + k, for piece k of row b: first column, weight's bits, origin
A piece is a run of words in columns of a row; pieces are in column order, without gaps, and the first begins in column
0. Column c of a piece is words[origin + c]; origin is an int64 in two int32, low first, and may be negative or beyond
2^31. The weight is a float32 >= 0. With `marked`, its sign bit takes the first word of the piece out of the loss, and
all other bits set take all of its words out. A segment is a piece that begins before column T, or the padding of a row;
first_segment counts those of the rows before.
With `counter`, (3,) int64, the table is one of many in the buffer: its entry is in record r = min(counter[1],
counter[2]), the int64 8 * r of the buffer; kernels/advance.py says what else a record holds.
Only the words of pieces are read, only the entries above, and the first columns of no first piece.

Out: contiguous tensors that the caller allocates. Each element is written once, by one program, also in padding.
    inputs      (B,T) int32    id of word col; in padding bos_id
    targets     (B,T) int64    id of word col+1 if it is in the row and in the loss, else ignore_index
    weights     (B,T) float32  weight of the piece that owns word col+1 if the target is in the loss, else 0.0
    positions   (B,T) int32    col - first column of the piece that owns word col; in padding col - length
    doc_ids     (B,T) int32    number of the piece that owns word col, from 0 in each row; in padding -1
    cu_seqlens  (C,)  int32    first columns of all segments in the flattened batch, then B*T; C % CU_ALIGN == 0
The last four are None if not requested. With `all_in_loss` every word is in the loss whatever its bit says, but for
those that are marked.

Bytes, for N words of w bytes in P pieces in B rows that all have some (gather_bytes counts them):
    read     w * N + 12 * B + 4 * (P - B) + 8 * P; for weights or with marked 4 * P; for cu_seqlens 4 * B more
    written  12 * B*T + 4 * B*T for each of weights, positions, doc_ids + 4 * C
Not counted: a word is read twice (the shift by one) and an entry once per column block; all but the first read come
from a cache. Words are read one by one: a run begins anywhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pack import find_piece, launch_of, next_owner


# As in pack.py: no number is specialized, and SEQ_LEN is compiled in.
@triton.jit(do_not_specialize=["batch_size", "cu_groups", "bos_id", "ignore_index"])
def _gather(
    words_ptr, table_ptr, long_ptr, counter_ptr,
    inputs_ptr, targets_ptr, weights_ptr, positions_ptr, doc_ids_ptr, cu_seqlens_ptr,
    batch_size: tl.int32, cu_groups: tl.int32, bos_id: tl.int32, ignore_index: tl.int64,
    ALL_IN_LOSS: tl.constexpr, MARKED: tl.constexpr,
    SEQ_LEN: tl.constexpr, BLOCK: tl.constexpr, CU_ALIGN: tl.constexpr,
):  # fmt: skip
    """A program writes BLOCK columns of a row, or, beyond the last row, BLOCK elements of cu_seqlens.

    `long_ptr` is the table in int64.
    """
    row = tl.program_id(0)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if counter_ptr is not None:
        record = tl.minimum(tl.load(counter_ptr + 1), tl.load(counter_ptr + 2))
        entry = tl.load(long_ptr + record * 8)
        table_ptr += entry * 4
        long_ptr += entry * 2
    if row < batch_size:
        # Usually no block crosses a row's end. None means no mask: a mask makes stores narrow.
        inside = None if SEQ_LEN % BLOCK == 0 else col < SEQ_LEN
        _gather_row(
            words_ptr, table_ptr, long_ptr,
            inputs_ptr, targets_ptr, weights_ptr, positions_ptr, doc_ids_ptr,
            bos_id, ignore_index, row, col, inside,
            ALL_IN_LOSS, MARKED, SEQ_LEN,
        )  # fmt: skip
    elif cu_seqlens_ptr is not None:
        item = (row - batch_size) * tl.num_programs(1) * BLOCK + col
        known = item < tl.load(table_ptr + batch_size * 4)
        # Every row has a segment, and that of row 0 is 0, as if rows were pieces.
        owner, first_segment = find_piece(table_ptr + 3, batch_size, item, 4)
        number = item - first_segment
        piece = number < tl.load(table_ptr + owner * 4 + 2, mask=known, other=0)
        first_piece = tl.load(table_ptr + owner * 4 + 1, mask=piece, other=0)
        start = tl.load(table_ptr + (first_piece + number) * 4, mask=piece & (number > 0), other=0)
        padding = tl.load(table_ptr + owner * 4, mask=known & ~piece, other=0)
        start = tl.where(known, owner * SEQ_LEN + start + padding, batch_size * SEQ_LEN)
        tl.store(cu_seqlens_ptr + item, start, mask=item < cu_groups * CU_ALIGN)


@triton.jit
def _gather_row(
    words_ptr, table_ptr, long_ptr,
    inputs_ptr, targets_ptr, weights_ptr, positions_ptr, doc_ids_ptr,
    bos_id, ignore_index, row, col, inside,
    ALL_IN_LOSS: tl.constexpr, MARKED: tl.constexpr, SEQ_LEN: tl.constexpr,
):  # fmt: skip
    """Columns `col` of row `row`, in every output but cu_seqlens."""
    length = tl.load(table_ptr + row * 4)
    first_piece = tl.load(table_ptr + row * 4 + 1)
    n_pieces = tl.load(table_ptr + row * 4 + 2)
    piece_ptr = table_ptr + first_piece * 4
    origin_ptr = long_ptr + first_piece * 2 + 1
    real = col < length
    follows = col + 1 < length
    piece, begin = find_piece(piece_ptr, n_pieces, col, 4)
    owner = next_owner(piece_ptr, n_pieces, piece, col, 4)
    origin = tl.load(origin_ptr + piece * 2, mask=real, other=0)
    next_origin = tl.load(origin_ptr + owner * 2, mask=follows, other=0)
    word = tl.load(words_ptr + origin + col, mask=real, other=0).to(tl.int32)
    next_word = tl.load(words_ptr + next_origin + col + 1, mask=follows, other=0).to(tl.int32)
    LARGEST: tl.constexpr = 0x7FFF if words_ptr.dtype.element_ty == tl.int16 else 0x7FFFFFFF
    # Beyond the row a word is 0, which is not in the loss.
    in_loss = follows if ALL_IN_LOSS else next_word < 0
    if weights_ptr is not None or MARKED:
        bits = tl.load(piece_ptr + owner * 4 + 1, mask=follows, other=0)
        if MARKED:
            in_loss = in_loss & ((owner == piece) | (bits >= 0)) & ((bits & 0x7FFFFFFF) != 0x7FFFFFFF)
    out = row.to(tl.int64) * SEQ_LEN + col
    tl.store(inputs_ptr + out, tl.where(real, word & LARGEST, bos_id), mask=inside)
    target = tl.where(in_loss, (next_word & LARGEST).to(tl.int64), ignore_index)
    tl.store(targets_ptr + out, target, mask=inside)
    if weights_ptr is not None:
        weight = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
        tl.store(weights_ptr + out, tl.where(in_loss, weight, 0.0), mask=inside)
    if positions_ptr is not None:
        tl.store(positions_ptr + out, col - tl.where(real, begin, length), mask=inside)
    if doc_ids_ptr is not None:
        tl.store(doc_ids_ptr + out, tl.where(real, piece, -1), mask=inside)


def gather(
    words: Tensor,
    table: Tensor,
    inputs: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    positions: Tensor | None,
    doc_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    bos_id: int,
    ignore_index: int,
    all_in_loss: bool,
    marked: bool,
    counter: Tensor | None = None,
) -> None:
    """Fill the outputs from `words` and `table`, by one launch on the current stream.

    Shapes and dtypes: at the top of this file. They are trusted, as a check of values would make the host wait.
    """
    assert words.dtype in (torch.int16, torch.int32) and table.dtype is torch.int32
    grid, cu_groups, constants = launch_of(inputs, cu_seqlens)
    _gather[grid](
        words, table, table.view(torch.int64), counter,
        inputs, targets, weights, positions, doc_ids, cu_seqlens,
        len(inputs), cu_groups, bos_id, ignore_index,
        ALL_IN_LOSS=all_in_loss, MARKED=marked, **constants,
    )  # fmt: skip


def gather_bytes(
    batch_size: int,
    seq_len: int,
    *,
    word_bytes: int,
    n_words: int,
    n_pieces: int,
    weights: bool = False,
    positions: bool = False,
    doc_ids: bool = False,
    cu_size: int = 0,
) -> int:
    """Bytes that one launch reads and writes. `n_words`: of all rows, N; `cu_size` is C, 0 if cu_seqlens is None.

    >>> gather_bytes(1, 128, word_bytes=2, n_words=129, n_pieces=1)
    1814
    """
    read = word_bytes * n_words + 12 * batch_size + 4 * (n_pieces - batch_size) + (12 if weights else 8) * n_pieces
    if cu_size:
        # the first segment of row 0 is not read, their number is
        read += 4 * batch_size
    written = (12 + 4 * (weights + positions + doc_ids)) * batch_size * seq_len + 4 * cu_size
    return read + written
