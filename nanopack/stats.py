"""Count where time and memory went, as seen by the caller of `next`.

Loader.__next__ counts   ->   Stats.report()   ->   loader.stats()
"""

from __future__ import annotations

import time
from typing import TypedDict

from nanopack.batch import Batch
from nanopack.ring.facts import BatchFacts


class StatsReport(TypedDict):
    """What `Loader.stats` returns: totals since the loader was constructed or loaded a state."""

    batches: int
    tokens: int  # without padding
    tokens_per_s: float  # of wall time, the caller's own work included
    padding: float  # fraction (0 to 1) of the positions
    next_s: float  # seconds in `next`
    waited_for_producer_s: float  # of these, with no batch ready
    bytes_copied: int
    work: float  # what the documents cost by `balance`, FLOPs where that is a model; 0.0 without
    work_per_s: float  # of wall time
    longest_wait_rows: int  # of a document, for its row
    queue_depth: int  # batches ready when `next` last returned
    ring_bytes: int  # shared memory of the slots
    encoder: str
    """What encodes texts: "tiktoken", "splintr-rs", or "tokenizers: " and why tiktoken does not."""
    tokens_total_estimated: int | None
    """Of the whole run: the tokens so far by the progress (`Loader.tokens_total` is exact). None without `epochs`, or
    before the first batch."""


class Stats:
    """Running totals of one loader since it was made, or since it resumed from a state."""

    def __init__(self, ring_bytes: int, encoder: str) -> None:
        self._ring_bytes, self._encoder = ring_bytes, encoder
        self._began = time.perf_counter()
        self.queued = 0
        self._in_next = 0.0
        self._progress = 0.0
        self._work = 0.0
        self._batches = self._tokens = self._positions = self._bytes = self._longest_wait = 0

    def count(self, batch: Batch, facts: BatchFacts) -> None:
        """Add a delivered batch."""
        self._batches += 1
        self._tokens += batch.num_tokens
        self._work += batch.work
        self._positions += batch.inputs.numel()
        self._bytes += facts.used_bytes
        self._longest_wait = facts.longest_wait_rows
        self._progress = batch.progress

    def spend(self, seconds: float) -> None:
        """Add seconds in `next`, or in `GraphBatches.refill`."""
        self._in_next += seconds

    def report(self, waited_s: float, tokens_so_far: int | None) -> StatsReport:
        """Return the totals.

        `waited_s` is the time spent with no batch ready; `tokens_so_far` the tokens since the first step of the whole
        run, None where it has no end.
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
            "work": self._work,
            "work_per_s": self._work / elapsed,
            "longest_wait_rows": self._longest_wait,
            "queue_depth": self.queued,
            "ring_bytes": self._ring_bytes,
            "encoder": self._encoder,
            "tokens_total_estimated": round(tokens_so_far / self._progress)
            if tokens_so_far is not None and self._progress
            else None,
        }
