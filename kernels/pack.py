"""Write one batch from its slot: gather rows, shift, reshape, widen, ignore and weigh, in one launch.

    ring/ fills a slot   ->   pack() on a GPU, pack_torch() anywhere   ->   tensors of a Batch

In: the slot, one contiguous buffer, 64-byte aligned. `words` and `table` are two views of all of it.
    words  int16 or int32  tokens: the sign bit is the loss bit (w < 0: in the loss), the rest is the id
    table  int32           4 for row b: start16, length, first_piece, n_pieces; then once cu_at, n_cu, 0, 0
Row b is words[start16 * 16 :][:length], 0 <= length <= T+1. Its pieces are n_pieces entries of 2 int32 from
table[first_piece] on: first column, and a float32 weight's bits; in column order, without gaps. cu_seqlens
begins with the n_cu int32 from table[cu_at] on. Pieces are read only for weights, positions or doc_ids, cu
only for cu_seqlens. From every row start T+1 words are read, whatever `length` is, so these must be in the
buffer; nothing outside it is read, and words beyond `length` never show.

Out: contiguous tensors that the caller allocates. Each element is written once, by one program, also in
padding (the columns from `length` on).
    inputs      (B,T) int32    id of word col; in padding bos_id
    targets     (B,T) int64    id of word col+1 if it is in the row and in the loss, else ignore_index
    weights     (B,T) float32  weight of the piece that owns word col+1 if the target is in the loss, else 0.0
    positions   (B,T) int32    col - first column of the piece that owns word col; in padding col - length
    doc_ids     (B,T) int32    number of the piece that owns word col, from 0 in each row; in padding -1
    cu_seqlens  (C,)  int32    the slot's n_cu elements, then B*T; C is a multiple of CU_ALIGN
The last four are None if not requested.

Bytes, for words of w bytes and P pieces in B rows that all have some (pack_bytes counts them):
    read     w * B*(T+1) + 8 * B; for weights, positions or doc_ids 8 * B + 4 * (P - B), for weights 4 * P more;
             for cu_seqlens 8 + 4 * n_cu
    written  12 * B*T + 4 * B*T for each of weights, positions, doc_ids + 4 * C
Not counted: a word is read twice (the shift by one) and a table entry once per column block; all but the first
read come from a cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import CU_ALIGN

_COLUMNS = 4
"""Columns per thread: 4 int32 are the 128 bits that one store can write."""
_WARP = 64 if torch.version.hip else 32
"""Threads per warp."""


# Plain numbers are never specialized, so one compilation serves every batch. SEQ_LEN is compiled in: stores
# are wide only where the compiler sees that a row's offset divides by 16.
@triton.jit(do_not_specialize=["batch_size", "cu_groups", "bos_id", "ignore_index"])
def _pack(
    words_ptr, table_ptr,
    inputs_ptr, targets_ptr, weights_ptr, positions_ptr, doc_ids_ptr, cu_seqlens_ptr,
    batch_size: tl.int32, cu_groups: tl.int32, bos_id: tl.int32, ignore_index: tl.int64,
    SEQ_LEN: tl.constexpr, BLOCK: tl.constexpr, CU_ALIGN: tl.constexpr,
):  # fmt: skip
    """A program writes BLOCK columns of a row, or, beyond the last row, BLOCK elements of cu_seqlens."""
    row = tl.program_id(0)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if row < batch_size:
        # Usually no block crosses a row's end. None means no mask: a mask makes loads narrow.
        inside = None if SEQ_LEN % BLOCK == 0 else col < SEQ_LEN
        _pack_row(
            words_ptr, table_ptr,
            inputs_ptr, targets_ptr, weights_ptr, positions_ptr, doc_ids_ptr,
            bos_id, ignore_index, row, col, inside,
            SEQ_LEN, BLOCK,
        )  # fmt: skip
    elif cu_seqlens_ptr is not None:
        cu_at = tl.load(table_ptr + batch_size * 4)
        n_cu = tl.load(table_ptr + batch_size * 4 + 1)
        item = (row - batch_size) * tl.num_programs(1) * BLOCK + col
        start = tl.load(table_ptr + cu_at + item, mask=item < n_cu, other=batch_size * SEQ_LEN)
        tl.store(cu_seqlens_ptr + item, start, mask=item < cu_groups * CU_ALIGN)


@triton.jit
def _pack_row(
    words_ptr, table_ptr,
    inputs_ptr, targets_ptr, weights_ptr, positions_ptr, doc_ids_ptr,
    bos_id, ignore_index, row, col, inside,
    SEQ_LEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Columns `col` of row `row`, in every output but cu_seqlens."""
    start16 = tl.load(table_ptr + row * 4)
    length = tl.load(table_ptr + row * 4 + 1)
    # Times 16, so that the compiler knows the words to be aligned.
    word_ptr = words_ptr + start16.to(tl.int64) * 16
    word = tl.load(word_ptr + col, mask=inside).to(tl.int32)
    next_word = tl.load(word_ptr + col + 1, mask=inside).to(tl.int32)
    LARGEST: tl.constexpr = 0x7FFF if words_ptr.dtype.element_ty == tl.int16 else 0x7FFFFFFF
    real = col < length
    in_loss = (next_word < 0) & (col + 1 < length)
    out = row.to(tl.int64) * SEQ_LEN + col
    tl.store(inputs_ptr + out, tl.where(real, word & LARGEST, bos_id), mask=inside)
    target = tl.where(in_loss, (next_word & LARGEST).to(tl.int64), ignore_index)
    tl.store(targets_ptr + out, target, mask=inside)
    if weights_ptr is not None or positions_ptr is not None or doc_ids_ptr is not None:
        piece_ptr = table_ptr + tl.load(table_ptr + row * 4 + 2)
        n_pieces = tl.load(table_ptr + row * 4 + 3)
        piece, begin = find_piece(piece_ptr, n_pieces, col, 2)
        if weights_ptr is not None:
            owner = next_owner(piece_ptr, n_pieces, piece, col, 2)
            weight = tl.load(piece_ptr + owner * 2 + 1, mask=in_loss, other=0).to(tl.float32, bitcast=True)
            tl.store(weights_ptr + out, weight, mask=inside)
        if positions_ptr is not None:
            tl.store(positions_ptr + out, col - tl.where(real, begin, length), mask=inside)
        if doc_ids_ptr is not None:
            tl.store(doc_ids_ptr + out, tl.where(real, piece, -1), mask=inside)


@triton.jit
def find_piece(piece_ptr, n_pieces, col, ENTRY: tl.constexpr):
    """For each column the number and the first column of the last piece that starts at or before it.

    ceil(log2(n_pieces)) dependent loads, whatever the column. An entry is ENTRY int32, the first column in front. The
    first piece starts in column 0: that is not read.
    """
    piece = tl.zeros_like(col)
    begin = tl.zeros_like(col)
    left = n_pieces
    # Of the `left` pieces from `piece` on one is the owner.
    while left > 1:
        half = left // 2
        start = tl.load(piece_ptr + (piece + half) * ENTRY)
        piece = tl.where(start <= col, piece + half, piece)
        begin = tl.where(start <= col, start, begin)
        left -= half
    return piece, begin


@triton.jit
def next_owner(piece_ptr, n_pieces, piece, col, ENTRY: tl.constexpr):
    """For each column, which `piece` owns, the number of the piece that owns the next one: no piece is empty."""
    start = tl.load(piece_ptr + (piece + 1) * ENTRY, mask=piece + 1 < n_pieces, other=0x7FFFFFFF)
    return tl.where(start <= col + 1, piece + 1, piece)


def pack(
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
) -> None:
    """Fill the outputs from the slot `words` / `table`, by one launch on the current stream.

    Shapes and dtypes: at the top of this file. They are trusted, as a check of values would make the host wait.
    """
    assert words.dtype in (torch.int16, torch.int32) and table.dtype is torch.int32
    grid, cu_groups, constants = launch_of(inputs, cu_seqlens)
    _pack[grid](
        words, table,
        inputs, targets, weights, positions, doc_ids, cu_seqlens,
        len(inputs), cu_groups, bos_id, ignore_index, **constants,
    )  # fmt: skip


def launch_of(inputs: Tensor, cu_seqlens: Tensor | None) -> tuple[tuple[int, int], int, dict[str, int]]:
    """Return the grid for `inputs` (B, T) and `cu_seqlens` (C,) or None, the number C / CU_ALIGN, and all constants."""
    batch_size, seq_len = inputs.shape
    cu_size = 0 if cu_seqlens is None else cu_seqlens.numel()
    assert cu_size % CU_ALIGN == 0
    block = block_of(seq_len)
    blocks = triton.cdiv(seq_len, block)
    constants = {"SEQ_LEN": seq_len, "BLOCK": block, "CU_ALIGN": CU_ALIGN, "num_warps": warps_of(block)}
    return (batch_size + triton.cdiv(cu_size, block * blocks), blocks), cu_size // CU_ALIGN, constants


def block_of(seq_len: int) -> int:
    """Columns per program: of 128, 256, 512 the largest that divides T, else the smallest that covers T, or 512."""
    if seq_len % 128 == 0:
        return min(512, seq_len & -seq_len)
    return max(128, min(512, triton.next_power_of_2(seq_len)))


def warps_of(block: int) -> int:
    """Warps of a program that writes `block` columns."""
    return max(1, block // (_COLUMNS * _WARP))


def pack_bytes(
    batch_size: int,
    seq_len: int,
    *,
    word_bytes: int,
    n_pieces: int = 0,
    weights: bool = False,
    positions: bool = False,
    doc_ids: bool = False,
    n_cu: int = 0,
    cu_size: int = 0,
) -> int:
    """Bytes that one launch reads and writes. `cu_size` is C, 0 if cu_seqlens is None.

    >>> pack_bytes(1, 128, word_bytes=2)
    1802
    """
    read = word_bytes * batch_size * (seq_len + 1) + 8 * batch_size
    if weights or positions or doc_ids:
        read += 4 * batch_size + (8 if weights else 4) * n_pieces
    if cu_size:
        read += 8 + 4 * n_cu
    written = (12 + 4 * (weights + positions + doc_ids)) * batch_size * seq_len + 4 * cu_size
    return read + written
