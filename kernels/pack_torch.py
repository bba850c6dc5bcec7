"""Write one batch from its slot in torch operations: the executor where Triton cannot run.

    ring.py fills a slot   ->   pack_torch()   ->   tensors of a Batch

The contract is pack.py's. This file stands alone because whoever runs it must neither have nor import Triton.
On an accelerator nothing here makes the host wait: no size depends on what a tensor holds.
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
    # The windows that begin at a multiple of 16 words and lie inside the buffer, so window start16 is the row.
    rows = words.unfold(0, seq_len + 1, 16).index_select(0, start16)
    # With an untrained bos as padding, the loss bit alone decides: padding needs no further thought.
    _keep(rows, _negative(columns - length[:, None]).to(rows.dtype), bos_id)
    ids = rows & torch.iinfo(words.dtype).max
    trained = _negative(rows[:, 1:])
    inputs.copy_(ids[:, :-1])
    _keep(targets.copy_(ids[:, 1:]), trained, ignore_index)
    if weights is not None or positions is not None or doc_ids is not None:
        entries, starts, numbers, owner = _pieces(table, seq_len, length, first_piece, n_pieces)
        if weights is not None:
            bits = table.index_select(0, entries + 1).index_select(0, owner[:, 1:].flatten())
            torch.bitwise_and(bits.view_as(weights), trained, out=weights.view(torch.int32))
        if positions is not None:
            begin = starts.index_select(0, owner[:, :-1].flatten()).view_as(positions)
            torch.sub(columns[:-1], begin, out=positions)
        if doc_ids is not None:
            torch.index_select(numbers, 0, owner[:, :-1].flatten(), out=doc_ids.view(-1))
    if cu_seqlens is not None:
        _cu_seqlens(table, batch_size, seq_len, cu_seqlens)


def _negative(number: Tensor) -> Tensor:
    """All bits one where `number` is negative, else 0. torch's booleans take the CPU ten times as long."""
    return number >> (torch.iinfo(number.dtype).bits - 1)


def _keep(value: Tensor, bits: Tensor, other: int) -> None:
    """Write `other` into `value` where `bits` are 0."""
    value.bitwise_xor_(other).bitwise_and_(bits).bitwise_xor_(other)


def _pieces(
    table: Tensor, seq_len: int, length: Tensor, first_piece: Tensor, n_pieces: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each row as many pieces as the fullest row has, then its padding: table indices of the entries, first columns,
    numbers (padding -1), all flat; and (B, T+1) the index, in these, of the piece that owns each word.
    """
    # On the CPU reading a number waits for nothing. Elsewhere it would: there every row gets the most it could have.
    most = int(n_pieces.max()) if table.device.type == "cpu" else seq_len + 1
    numbers = torch.arange(most + 1, dtype=torch.int32, device=table.device)
    exists = numbers < n_pieces[:, None]
    entries = torch.where(exists, first_piece[:, None] + 2 * numbers, 0)
    # What does not exist begins where the padding begins, so that it owns nothing.
    starts = torch.where(exists, table.index_select(0, entries.flatten()).view_as(entries), length[:, None])
    ends = torch.cat([starts[:, 1:], starts.new_full((len(starts), 1), seq_len + 1)], dim=1)
    owner = torch.repeat_interleave((ends - starts).flatten(), output_size=len(starts) * (seq_len + 1))
    numbers = torch.where(exists, numbers, -1)
    return entries.flatten(), starts.flatten(), numbers.flatten(), owner.view(len(starts), seq_len + 1)


def _cu_seqlens(table: Tensor, batch_size: int, seq_len: int, cu_seqlens: Tensor) -> None:
    """Copy the slot's `n_cu` starts; the rest is B * T."""
    cu_at, n_cu = table[4 * batch_size], table[4 * batch_size + 1]
    item = torch.arange(cu_seqlens.numel(), dtype=torch.int32, device=table.device)
    known = _negative(item - n_cu)
    torch.index_select(table, 0, (cu_at + item) & known, out=cu_seqlens)
    _keep(cu_seqlens, known, batch_size * seq_len)
