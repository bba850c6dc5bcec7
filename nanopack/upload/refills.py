"""Fill the halves with the tables of the next batches, and count which of them were loaded.

    take(): a table and its facts, from the ring   ->   Refills.refill()   ->   facts of the batches that are ready, one
                                                         halves.py              for each load

A half, in units of 64 bytes, with all numbers from the front of both halves:

    3 int64          for the counter: loads so far, record of the first batch, record of the padding after the last one
    records          of each batch, then of a batch of padding: 8 int64, as kernels/advance.py has them
    tables           of the padding, then of the batches, end to end, as kernels/gather.py has them
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nanopack.ring.facts import BatchFacts
from nanopack.upload.halves import Halves

RECORD_BYTES, ENTRY_BYTES = 64, 16

Take = Callable[[], tuple[np.ndarray, BatchFacts]]
"""Returns the table, (n,) uint8, and the facts of the next batch; raises StopIteration at the end, or an error."""


def padding_table(batch_size: int) -> np.ndarray:
    """Return the table of a batch of padding, (B + 1, 4) int32."""
    table = np.zeros((batch_size + 1, 4), np.int32)
    table[:-1, 3] = np.arange(batch_size)
    table[-1, 0] = batch_size
    return table


def half_bytes(batches: int, batch_size: int, table_bytes: int) -> int:
    """Return the bytes of a half with room for that many batches, whose tables take `table_bytes` in all."""
    padding = ENTRY_BYTES * (batch_size + 1)
    return -(-((batches + 2) * RECORD_BYTES + padding + table_bytes) // RECORD_BYTES) * RECORD_BYTES


class HostTables:
    """What stands in place of an `Upload` for a prefetcher: it copies tables out of the ring, one at a time."""

    def __init__(self, slots: Sequence[np.ndarray]) -> None:
        """`slots`: (slot_bytes,) uint8 each."""
        self._slots = slots
        self._tables: list[np.ndarray] = []
        self._copied: list[int] = []

    all_in_use = False

    @property
    def can_submit(self) -> bool:
        """Whether there is no table that was not delivered."""
        return not self._tables

    @property
    def can_deliver(self) -> bool:
        """Whether there is one."""
        return bool(self._tables)

    def submit(self, slot: int, used_bytes: int) -> None:
        """Copy the table in a slot."""
        self._tables.append(self._slots[slot][:used_bytes].copy())
        self._copied.append(slot)

    def deliver(self) -> np.ndarray:
        """Return the table, (used_bytes,) uint8."""
        return self._tables.pop()

    def reclaim(self, *, wait: bool = False) -> list[int]:
        """Return the slots that were copied since."""
        copied, self._copied = self._copied, []
        return copied


class Refills:
    """The batches of both halves. `ready` are those that may be loaded, in order."""

    def __init__(
        self, halves: Halves, staged: list[np.ndarray], take: Take, *, batches: int, batch_size: int, seq_len: int
    ) -> None:
        """`staged`: the host memory of the halves, (half_bytes,) uint8; `batches`: the most of a half."""
        self._halves = halves
        self._staged = staged
        self._take = take
        self._batches = batches
        self._padding = padding_table(batch_size)
        self._padding_facts = (0, 0, 0, seq_len)
        self.ready: list[BatchFacts] = []
        self._loads = 0
        self._expected: list[int | None] = [None, None]
        self._is_left = True
        self._held: tuple[np.ndarray, BatchFacts] | None = None
        self._begin_filling()

    def count(self, loaded: int) -> list[BatchFacts]:
        """Count loads since the last call; return the facts of the batches that they were of.

        ValueError for more loads than there were batches ready.
        """
        if not 0 <= loaded <= len(self.ready):
            raise ValueError(
                f"loaded={loaded} is not allowed: {len(self.ready)} batches were ready, and each is loaded once; a "
                f"load too many gives a batch of padding"
            )
        self._halves.follow()
        done, self.ready = self.ready[:loaded], self.ready[loaded:]
        self._loads += loaded
        return done

    def refill(self) -> list[BatchFacts]:
        """Return the facts of the batches that are ready, of the next ones where none are left; none at the end.

        RuntimeError where the device counted other loads.
        """
        if not self.ready:
            self._next_half()
        return self.ready

    def begin(self) -> None:
        """Begin again with other batches; those that are ready are forgotten."""
        self._halves.follow()
        self._leave(None)
        self._held = None
        self.ready = []
        self._begin_filling()

    def _leave(self, expected: int | None) -> None:
        """Leave the current half, with what the counter must say, once."""
        if not self._is_left:
            self._is_left = True
            self._expected[self._halves.current] = expected
            self._halves.leave()

    def _next_half(self) -> None:
        self._leave(self._loads)
        other = self._halves.other
        self._check(other)
        self._fill(other)
        if not self._filled:
            # nothing follows, so that waiting costs nothing
            self._check(self._halves.current)
            return
        self._halves.point(self._finish(other))
        self._is_left = False
        self.ready = self._filled
        self._begin_filling()

    def _check(self, half: int) -> None:
        """Wait for the loads of a half that was left. RuntimeError where the device counted others than the host."""
        seen, expected = self._halves.wait(half), self._expected[half]
        self._expected[half] = None
        if expected is not None and seen != expected:
            raise RuntimeError(
                f"refill was given {expected} loads in all, and the device counted {seen}: pass the number of times "
                f"that load ran since the last refill, replays and warm-up together"
            )

    def _begin_filling(self) -> None:
        self._filled: list[BatchFacts] = []
        self._at = (self._batches + 2) * RECORD_BYTES // ENTRY_BYTES + len(self._padding)

    def _fill(self, half: int) -> None:
        """Write tables and records until there is no room. What an interrupt leaves half done is continued later."""
        entries = self._staged[half].view(np.int32).reshape(-1, 4)
        while len(self._filled) < self._batches:
            try:
                table, facts = self._held or self._take()
            except Exception as end:
                # at the end of the data, or before an error, those that are there come first
                if self._filled or isinstance(end, StopIteration):
                    return
                raise
            self._held = table, facts
            new = table.view(np.int32).reshape(-1, 4)
            if self._at + len(new) > len(entries):
                return
            entries[self._at : self._at + len(new)] = new
            weight_sum = int(np.float64(facts.weight_sum).view(np.int64))
            counts = (facts.num_loss_tokens, facts.num_tokens, weight_sum, facts.max_seqlen)
            self._write_record(half, 1 + len(self._filled), self._at, counts)
            self._held = None
            self._at += len(new)
            self._filled.append(facts)

    def _finish(self, half: int) -> int:
        """Write what follows from the number of batches; return the bytes of the half that are used."""
        records = self._staged[half].view(np.int64).reshape(-1, 8)
        first, count = half * len(records) + 1, len(self._filled)
        records[0, :3] = self._loads, first, first + count
        begin = (self._batches + 2) * RECORD_BYTES // ENTRY_BYTES
        self._staged[half].view(np.int32).reshape(-1, 4)[begin : begin + len(self._padding)] = self._padding
        self._write_record(half, 1 + count, begin, self._padding_facts)
        return self._at * ENTRY_BYTES

    def _write_record(self, half: int, number: int, at: int, facts: Any) -> None:
        records = self._staged[half].view(np.int64).reshape(-1, 8)
        records[number] = half * (len(self._staged[half]) // ENTRY_BYTES) + at, *facts, 0, 0, 0
