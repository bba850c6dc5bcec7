"""Count where time and memory went, as seen by the caller of `next`.

Loader.__next__ counts   ->   Stats.report()   ->   loader.stats()
"""

from __future__ import annotations

import time
from typing import Any

from nanopack.batch import Batch
from nanopack.ring.facts import BatchFacts


class Stats:
    """Running totals of one loader since it was made, or since it resumed from a state."""

    def __init__(self, ring_bytes: int) -> None:
        self._ring_bytes = ring_bytes
        self._began = time.perf_counter()
        self.queued = 0
        self._in_next = 0.0
        self._progress = 0.0
        self._batches = self._tokens = self._positions = self._bytes = self._longest_wait = 0

    def count(self, batch: Batch, facts: BatchFacts, seconds: float) -> None:
        """Add a delivered batch, and the seconds that `next` took."""
        self._batches += 1
        self._tokens += batch.num_tokens
        self._positions += batch.inputs.numel()
        self._bytes += facts.used_bytes
        self._longest_wait = facts.longest_wait_rows
        self._in_next += seconds
        self._progress = batch.progress

    def report(self, waited_s: float, tokens_so_far: int | None) -> dict[str, Any]:
        """Return the totals.

        `waited_s`: seconds in which no slot was ready; `tokens_so_far`: of the whole run, None where it is endless.

        batches, tokens (without padding), tokens_per_s (of wall time, the caller's own work included), padding
        (fraction of the positions), next_s (seconds in `next`), waited_for_producer_s (the part of them with nothing
        ready), bytes_copied, longest_wait_rows (the most rows that a document waited for its row), queue_depth (batches
        ready when `next` last returned), ring_bytes (shared memory of the slots), tokens_total_estimated (of the whole
        run: tokens so far divided by progress; `Loader.tokens_total` is exact. None without `epochs`, or before the
        first batch).
        """
        elapsed = time.perf_counter() - self._began
        return {
            "batches": self._batches,
            "tokens": self._tokens,
            "tokens_per_s": self._tokens / elapsed,
            "padding": 1 - self._tokens / self._positions if self._positions else 0.0,
            "next_s": self._in_next,
            "waited_for_producer_s": waited_s,
            "bytes_copied": self._bytes,
            "longest_wait_rows": self._longest_wait,
            "queue_depth": self.queued,
            "ring_bytes": self._ring_bytes,
            "tokens_total_estimated": round(tokens_so_far / self._progress)
            if tokens_so_far is not None and self._progress
            else None,
        }
