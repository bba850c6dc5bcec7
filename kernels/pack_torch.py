"""Write one batch from its slot in torch operations: the executor wherever Triton does not run.

    ring/ fills a slot   ->   pack_torch()   ->   tensors of a Batch

The contract is pack.py's, except that an element may be written more than once. It is a file of its own because it
must run without Triton. On an accelerator nothing here makes the host wait: no size depends on a tensor's values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Scratch(NamedTuple):
    """Work space for batches of one shape: on a host, fresh memory costs more than the work itself."""

    columns: Tensor
    """(T+1,): 0 to T, in the words' dtype if that can hold T, else int32."""
    rows: Tensor
    """(B, T+1) of the words' dtype."""
    bits: Tensor
    """(B, T+1) of the columns' dtype."""


def make_scratch(words: Tensor, batch_size: int, seq_len: int) -> Scratch:
    """Return work space for batches of this shape, on the device and in the dtype of `words`."""
    narrow = words.dtype if seq_len < torch.iinfo(words.dtype).max else torch.int32
    columns = torch.arange(seq_len + 1, dtype=narrow, device=words.device)
    rows = words.new_empty(batch_size, seq_len + 1)
    return Scratch(columns, rows, torch.empty_like(rows, dtype=narrow))


def pack_torch(
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
    scratch: Scratch | None = None,
) -> None:
    """Fill the outputs from the slot `words` / `table`, as `pack` does, in about 50 operations (launches on a GPU).

    `scratch` saves allocations; a call uses it until its last operation is done.
    """
    batch_size, seq_len = inputs.shape
    scratch = scratch or make_scratch(words, batch_size, seq_len)
    columns = scratch.columns
    head = table[: 4 * batch_size].view(batch_size, 4)
    length = head[:, 1]
    # All windows that begin at a multiple of 16 words and end in the buffer: a row is number start16.
    torch.index_select(words.unfold(0, seq_len + 1, 16), 0, head[:, 0], out=scratch.rows)
    in_loss = write_tokens(scratch, length, inputs, targets, bos_id=bos_id, ignore_index=ignore_index)
    if weights is not None or positions is not None or doc_ids is not None:
        entries, starts, numbers, owner = list_pieces(table, seq_len, length, head[:, 2], head[:, 3], entry=2)
        if weights is not None:
            bits = table.index_select(0, entries + 1).index_select(0, owner[:, 1:].flatten())
            torch.bitwise_and(bits.view_as(weights), in_loss, out=weights.view(torch.int32))
        if positions is not None:
            begin = starts.index_select(0, owner[:, :-1].flatten())
            torch.sub(columns[:-1], begin.view_as(positions), out=positions)
        if doc_ids is not None:
            torch.index_select(numbers, 0, owner[:, :-1].flatten(), out=doc_ids.view(-1))
    if cu_seqlens is not None:
        _cu_seqlens(table, batch_size, seq_len, cu_seqlens)


def write_tokens(
    scratch: Scratch, length: Tensor, inputs: Tensor, targets: Tensor, *, bos_id: int, ignore_index: int
) -> Tensor:
    """Write `inputs` and `targets` from the words in `scratch.rows`; return (B, T), all bits set if in the loss.

    `length` (B,) int32: words of each row; what follows them is overwritten.
    """
    columns, rows, bits = scratch
    # With a bos outside the loss as padding, the loss bit alone decides from here on.
    torch.sub(columns, length.to(columns.dtype)[:, None], out=bits)
    _keep(rows, _negative(bits, out=bits), bos_id)
    shifted = rows[:, 1:]
    in_loss = _negative(shifted, out=bits[:, 1:] if bits.dtype is rows.dtype else None)
    most = torch.iinfo(rows.dtype).max
    rows.bitwise_and_(most)
    inputs.copy_(rows[:, :-1])
    if -most <= ignore_index <= most:
        # decided in narrow words, so that the result is moved once
        targets.copy_(_keep(shifted, in_loss, ignore_index))
    else:
        _keep(targets.copy_(shifted), in_loss, ignore_index)
    return in_loss


def _negative(number: Tensor, out: Tensor | None = None) -> Tensor:
    """All bits set where `number` is negative, else none. On the CPU torch's booleans are ten times slower."""
    return torch.bitwise_right_shift(number, torch.iinfo(number.dtype).bits - 1, out=out)


def _keep(value: Tensor, bits: Tensor, other: int) -> Tensor:
    """Overwrite `value` with `other`, in place, where no bits are set."""
    return value.bitwise_xor_(other).bitwise_and_(bits.to(value.dtype)).bitwise_xor_(other)


def list_pieces(
    table: Tensor, seq_len: int, length: Tensor, first_piece: Tensor, n_pieces: Tensor, *, entry: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """List the pieces and the padding of all rows, n per row: entries, first columns, numbers, each (B * n,) int32.

    An entry, of `entry` int32, is its index in `table`; padding has number -1. The fourth, (B, T+1), is the index of
    each word's owner.
    """
    count = _most_pieces(n_pieces, seq_len) + 1
    numbers = torch.arange(count, dtype=torch.int32, device=table.device)
    exists = numbers < n_pieces[:, None]
    entries = torch.where(exists, first_piece[:, None] + entry * numbers, 0)
    # Missing pieces start where the padding starts, so only the last of them owns words: the padding.
    starts = torch.where(exists, table.index_select(0, entries.flatten()).view_as(entries), length[:, None])
    ends = torch.cat([starts[:, 1:], starts.new_full((len(starts), 1), seq_len + 1)], dim=1)
    owner = torch.repeat_interleave((ends - starts).flatten(), output_size=len(starts) * (seq_len + 1))
    numbers = torch.where(exists, numbers, -1)
    return entries.flatten(), starts.flatten(), numbers.flatten(), owner.view(len(starts), seq_len + 1)


def _most_pieces(n_pieces: Tensor, seq_len: int) -> int:
    """The most pieces in a row. On an accelerator, where reading it would make the host wait: the most possible."""
    return int(n_pieces.max()) if n_pieces.device.type == "cpu" else seq_len + 1


def _cu_seqlens(table: Tensor, batch_size: int, seq_len: int, cu_seqlens: Tensor) -> None:
    """Copy the slot's `n_cu` starts, and fill the rest with B * T."""
    cu_at, n_cu = table[4 * batch_size], table[4 * batch_size + 1]
    item = torch.arange(cu_seqlens.numel(), dtype=torch.int32, device=table.device)
    known = _negative(item - n_cu)
    torch.index_select(table, 0, (cu_at + item) & known, out=cu_seqlens)
    _keep(cu_seqlens, known, batch_size * seq_len)
