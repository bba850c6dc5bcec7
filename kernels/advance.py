"""Give the facts of the batch that gather() has just written, and point the counter at the next one.

    gather(counter=)   ->   advance() on a GPU, advance_torch() anywhere   ->   gather() of the next batch

A launch of its own, because programs of gather() still read the counter while others have ended; on one stream with it.

In and out:
    records  (8 n,) int64   for each batch the entry (16 bytes, of the same buffer) where its table begins, its facts
                            num_loss_tokens, num_tokens, a float64's bits of weight_sum, max_seqlen; 0, 0, 0
    counter  (3,) int64     batches loaded so far, record of the next batch, record of the padding after the last one
Out:
    facts    (4,) int64     the facts of record min(counter[1], counter[2])
counter[0] and counter[1] grow by 1, so a batch too many gives padding and is counted.

Bytes: read 8 * 3 + 8 * 4, written 8 * 2 + 8 * 4 (advance_bytes counts them).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _advance(records_ptr, counter_ptr, facts_ptr):
    """One program of one warp does everything."""
    loaded = tl.load(counter_ptr)
    record = tl.load(counter_ptr + 1)
    at = tl.minimum(record, tl.load(counter_ptr + 2))
    fact = tl.arange(0, 4)
    tl.store(facts_ptr + fact, tl.load(records_ptr + at * 8 + 1 + fact))
    tl.store(counter_ptr, loaded + 1)
    tl.store(counter_ptr + 1, record + 1)


def advance(records: Tensor, counter: Tensor, facts: Tensor) -> None:
    """Copy the facts of the current batch and advance the counter, by one launch on the current stream."""
    _advance[(1,)](records, counter, facts, num_warps=1)


def advance_bytes() -> int:
    """Bytes that one launch reads and writes.

    >>> advance_bytes()
    104
    """
    return 8 * 3 + 8 * 4 + 8 * 2 + 8 * 4
