"""What the host knows of a batch, without a look at the device.

places.py and producer/producer.py count   ->   BatchFacts, a pipe carries it as tuple(facts)   ->   batch.py, stats.py
"""

from __future__ import annotations

from typing import NamedTuple


class BatchFacts(NamedTuple):
    """What the host knows of a filled slot; see `Batch` for fields of the same name.

    Only ints, floats and bytes: to unpickle anything else would cost the trainer several times as long.
    """

    slot: int
    """Number of the slot in its ring."""
    used_bytes: int
    """Bytes of the slot, from the front, that the device needs."""
    num_loss_tokens: int
    num_tokens: int
    weight_sum: float
    max_seqlen: int
    pieces: bytes
    """(P, 4) int64: conversation, start, length, offset of each piece, row by row."""
    pieces_per_row: bytes
    """(B,) int64."""
    epoch: int = 0
    progress: float = 0.0
    last: bool = False
    longest_wait_rows: int = 0
    """Most rows that a document has waited so far."""
    work: float = 0.0
    state: bytes = b""
    """The producer's state once this batch is delivered: what `states` leaves out."""
    states: bytes = b""
    """The rest of it, for all batches that were planned together; see `producer.packed_state.state_of`."""
