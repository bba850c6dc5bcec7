"""Write one batch from its slot in torch operations: the executor where Triton cannot run.

    ring.py fills a slot   ->   pack_torch()   ->   tensors of a Batch

The contract is pack.py's, but that an element may be written more than once. This file stands alone because
who runs it must neither have nor import Triton. On an accelerator nothing here makes the host wait: no size
depends on what a tensor holds.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
) -> None:
    """Fill the outputs from the slot `words` / `table`, as `pack` does."""
    batch_size, seq_len = inputs.shape
    start16, length, first_piece, n_pieces = table[: 4 * batch_size].view(batch_size, 4).T
    columns = torch.arange(seq_len + 1, dtype=torch.int32, device=table.device)
    # All windows that begin at a multiple of 16 words and end in the buffer: a row is number start16.
    rows = words.unfold(0, seq_len + 1, 16).index_select(0, start16)
    # With an untrained bos as padding, the loss bit alone decides from here on.
    _keep(rows, _negative(columns - length[:, None]), bos_id)
    trained = _negative(rows[:, 1:])
    rows &= torch.iinfo(rows.dtype).max
    inputs.copy_(rows[:, :-1])
    _keep(targets.copy_(rows[:, 1:]), trained, ignore_index)
    if weights is not None or positions is not None or doc_ids is not None:
        entries, starts, numbers, owner = _pieces(table, seq_len, length, first_piece, n_pieces)
        if weights is not None:
            bits = table.index_select(0, entries + 1).index_select(0, owner[:, 1:].flatten())
            torch.bitwise_and(bits.view_as(weights), trained, out=weights.view(torch.int32))
        if positions is not None:
            begin = starts.index_select(0, owner[:, :-1].flatten())
            torch.sub(columns[:-1], begin.view_as(positions), out=positions)
        if doc_ids is not None:
            torch.index_select(numbers, 0, owner[:, :-1].flatten(), out=doc_ids.view(-1))
    if cu_seqlens is not None:
        _cu_seqlens(table, batch_size, seq_len, cu_seqlens)


def _negative(number: Tensor) -> Tensor:
    """All bits where `number` is negative, else none. On the CPU, torch's booleans are ten times as slow."""
    return number >> (torch.iinfo(number.dtype).bits - 1)


def _keep(value: Tensor, bits: Tensor, other: int) -> None:
    """Write `other` into `value` where `bits` are none."""
    value.bitwise_xor_(other).bitwise_and_(bits.to(value.dtype)).bitwise_xor_(other)


def _pieces(
    table: Tensor, seq_len: int, length: Tensor, first_piece: Tensor, n_pieces: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of every row's pieces and padding, equally many a row, flat: entries, first columns, numbers.

    An entry is its index in `table`; padding is number -1. The fourth, (B, T+1), tells which owns each word.
    """
    count = _most_pieces(n_pieces, seq_len) + 1
    numbers = torch.arange(count, dtype=torch.int32, device=table.device)
    exists = numbers < n_pieces[:, None]
    entries = torch.where(exists, first_piece[:, None] + 2 * numbers, 0)
    # What does not exist begins where the padding begins, so only the last of it owns words: the padding.
    starts = torch.where(exists, table.index_select(0, entries.flatten()).view_as(entries), length[:, None])
    ends = torch.cat([starts[:, 1:], starts.new_full((len(starts), 1), seq_len + 1)], dim=1)
    owner = torch.repeat_interleave((ends - starts).flatten(), output_size=len(starts) * (seq_len + 1))
    numbers = torch.where(exists, numbers, -1)
    return entries.flatten(), starts.flatten(), numbers.flatten(), owner.view(len(starts), seq_len + 1)


def _most_pieces(n_pieces: Tensor, seq_len: int) -> int:
    """Pieces of the row that has most. On an accelerator that would be a wait: there, the most possible."""
    return int(n_pieces.max()) if n_pieces.device.type == "cpu" else seq_len + 1


def _cu_seqlens(table: Tensor, batch_size: int, seq_len: int, cu_seqlens: Tensor) -> None:
    """Copy the slot's `n_cu` starts; the rest is B * T."""
    cu_at, n_cu = table[4 * batch_size], table[4 * batch_size + 1]
    item = torch.arange(cu_seqlens.numel(), dtype=torch.int32, device=table.device)
    known = _negative(item - n_cu)
    torch.index_select(table, 0, (cu_at + item) & known, out=cu_seqlens)
    _keep(cu_seqlens, known, batch_size * seq_len)
