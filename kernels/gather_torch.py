"""Write one batch from a table of runs in torch operations: the executor wherever Triton does not run.

    ring/ fills a table   ->   gather_torch()   ->   tensors of a Batch

The contracts are gather.py's and advance.py's, except that an element may be written more than once. It is a file of
its own because it must run without Triton. On an accelerator nothing here makes the host wait: no size depends on a
tensor's values. On the host `words` may be mapped from a file, of which only the pages of the batch are read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pack_torch import Scratch, list_pieces, make_scratch, write_tokens


def gather_torch(
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
    scratch: Scratch | None = None,
) -> None:
    """Fill the outputs from `words` and `table`, as `gather` does, in about 60 operations (launches on a GPU).

    `scratch`, of pack_torch, saves allocations; a call uses it until its last operation is done.
    """
    batch_size, seq_len = inputs.shape
    scratch = scratch or make_scratch(words, batch_size, seq_len)
    columns, rows, _ = scratch
    if counter is not None:
        table = _current_table(table, counter, 4 * (batch_size * (seq_len + 2) + 1))
    head = table[: 4 * batch_size].view(batch_size, 4)
    length, n_pieces = head[:, 0], head[:, 2]
    entries, starts, numbers, owner = list_pieces(table, seq_len, length, 4 * head[:, 1], n_pieces, entry=4)
    origin = table.view(torch.int64).index_select(0, entries // 2 + 1).index_select(0, owner.flatten())
    # of padding some word that exists
    at = (origin.view_as(owner) + columns) * (columns < length[:, None])
    torch.index_select(words, 0, at.flatten(), out=rows.view(-1))
    bits = table.index_select(0, entries + 1)
    if all_in_loss:
        rows.bitwise_or_(torch.iinfo(rows.dtype).min)
    if marked:
        # A piece begins where the owner changes; column 0 is no target.
        of_next = bits.index_select(0, owner[:, 1:].flatten()).view_as(targets)
        out = ((owner[:, 1:] != owner[:, :-1]) & (of_next < 0)) | ((of_next & 0x7FFFFFFF) == 0x7FFFFFFF)
        rows[:, 1:].bitwise_and_(torch.where(out, torch.iinfo(rows.dtype).max, -1))
    in_loss = write_tokens(scratch, length, inputs, targets, bos_id=bos_id, ignore_index=ignore_index)
    if weights is not None:
        own = (bits & 0x7FFFFFFF).index_select(0, owner[:, 1:].flatten())
        torch.bitwise_and(own.view_as(weights), in_loss, out=weights.view(torch.int32))
    if positions is not None:
        begin = starts.index_select(0, owner[:, :-1].flatten())
        torch.sub(columns[:-1], begin.view_as(positions), out=positions)
    if doc_ids is not None:
        torch.index_select(numbers, 0, owner[:, :-1].flatten(), out=doc_ids.view(-1))
    if cu_seqlens is not None:
        _cu_seqlens(starts.view(batch_size, -1), n_pieces, head[:, 3], seq_len, cu_seqlens)


def _current_table(table: Tensor, counter: Tensor, most: int) -> Tensor:
    """Return the table, of at most `most` int32, of the batch that the counter names."""
    begin = 4 * _current_record(table.view(torch.int64), counter)[0]
    if table.device.type == "cpu":
        return table[int(begin) :]
    return table.index_select(0, (begin + torch.arange(most, device=table.device)).clamp_(max=len(table) - 1))


def _current_record(records: Tensor, counter: Tensor) -> Tensor:
    """Return the record, (8,) int64, of the batch that the counter names."""
    return records.view(-1, 8).index_select(0, torch.minimum(counter[1], counter[2]).view(1))[0]


def _cu_seqlens(starts: Tensor, n_pieces: Tensor, first_segment: Tensor, seq_len: int, cu_seqlens: Tensor) -> None:
    """Write the starts of all segments, and B * T after them.

    `starts` (B, n): first columns of a row's pieces, then of its padding, as often as there is room.
    """
    size, end = cu_seqlens.numel(), len(starts) * seq_len
    numbers = torch.arange(starts.shape[1], dtype=torch.int32, device=starts.device)
    is_segment = (numbers <= n_pieces[:, None]) & (starts < seq_len)
    # What is no segment goes to an element more, which is dropped.
    at = torch.where(is_segment, first_segment[:, None] + numbers, size)
    rows = torch.arange(0, end, seq_len, dtype=torch.int32, device=starts.device)
    all_starts = torch.full((size + 1,), end, dtype=torch.int32, device=starts.device)
    all_starts.scatter_(0, at.flatten().long(), (rows[:, None] + starts).flatten())
    cu_seqlens.copy_(all_starts[:size])


def advance_torch(records: Tensor, counter: Tensor, facts: Tensor) -> None:
    """Copy the facts of the current batch and advance the counter, as `advance` does."""
    facts.copy_(_current_record(records, counter)[1:5])
    counter[:2] += 1
