"""Decide which conversation each shard reads next.

    number of conversations, shard, seed   ->   Shard.conversation(read)   ->   producer/reader.py reads it

Integers only: no conversation is touched. The order is the data set's own, or with a seed a permutation that is new in
each pass and the same on all ranks. It is computed index by index, so it needs no memory and can start anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_CHUNK = 1024
_ROUNDS = 8
_GOLDEN, _MIX1, _MIX2 = (np.uint64(k) for k in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class Shard:
    """The conversations that one rank (or row) reads: number, number + count, ... of the order, pass after pass.

    >>> shard = Shard(5, number=1, count=2)
    >>> [shard.conversation(read) for read in range(5)]
    [1, 3, 0, 2, 4]
    """

    n: int
    """Conversations in the data set."""
    number: int
    """Which shard this is, from 0."""
    count: int
    """Shards in all."""
    seed: int | None = None
    """Of the shuffle; None: the data set's own order."""

    def conversation(self, read: int) -> int:
        """Return the index of the conversation that is read as number `read` (from 0) of this shard."""
        return next(self.conversations(read, read + 1))

    def order_index(self, read: int) -> int:
        """Return the index in the order, 0 to n - 1, of read number `read`: the conversation's own unless shuffled."""
        return (self.number + read * self.count) % self.n

    def conversations(self, start: int, stop: int | None = None) -> Iterator[int]:
        """Yield the conversations of the reads `start` to `stop` - 1; without `stop`, of all from `start` on."""
        while stop is None or start < stop:
            end = start + _CHUNK if stop is None else min(stop, start + _CHUNK)
            yield from self.at(np.arange(start, end, dtype=np.int64)).tolist()
            start = end

    def at(self, reads: np.ndarray) -> np.ndarray:
        """Return the conversations of these reads, (k,) int64 each."""
        index = self.number + reads * self.count
        if self.seed is None:
            return index % self.n
        return permute(index % self.n, self.n, self.seed, index // self.n)

    def epoch(self, read: int) -> int:
        """Return the epoch, from 1, once `read` conversations have been read: 1 + wraps so far."""
        # With more shards than conversations every read wraps, however often n fits into the count.
        return 1 + (read if self.count > self.n else (self.number + read * self.count) // self.n)

    def pass_of(self, read: int) -> int:
        """Return which pass over the data, from 0, a read is in."""
        return (self.number + read * self.count) // self.n

    def end_of_pass(self, read: int) -> int:
        """Return the first read that lies in a later pass over the data than this one."""
        return self.num_reads(self.pass_of(read) + 1)

    def start_of_pass(self, read: int) -> int:
        """Return the first read that lies in the same pass over the data as this one."""
        return self.num_reads(self.pass_of(read))

    def num_reads(self, epochs: int) -> int:
        """Return how many reads of this shard lie in `epochs` passes over the data.

        Over all shards together, every conversation is read exactly `epochs` times.
        """
        return max(0, -((self.number - epochs * self.n) // self.count))


def evenly_spaced(n: int, most: int) -> list[int]:
    """Return up to `most` (2 or more) of the indices 0 to n - 1, evenly spaced, the first and the last among them.

    >>> evenly_spaced(9, 3), evenly_spaced(2, 3)
    ([0, 4, 8], [0, 1])
    """
    return sorted({round(k * (n - 1) / (most - 1)) for k in range(most)})


def permute(index: np.ndarray, n: int, seed: int, epoch: np.ndarray) -> np.ndarray:
    """Return the images, (k,) int64, of indices 0 to n - 1 under the permutation of each one's epoch (from 0).

    `index` and `epoch` are (k,) int64.

    A Feistel network (Luby and Rackoff, 1988) over the next power of four, walked along its cycle until it is back
    below n (Black and Rogaway, 2002); its rounds are keyed and mixed by splitmix64 (Steele and others, 2014).

    >>> permute(np.arange(5), 5, seed=2, epoch=np.zeros(5, int)).tolist()
    [2, 0, 4, 3, 1]
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    if len(index) and epoch.min() == epoch.max():
        # one pass, as nearly always: the keys are numbers
        epoch = epoch[:1]
    with np.errstate(over="ignore"):
        base = _mix(np.full(len(epoch), seed, np.uint64))
        base = _mix(base ^ epoch.astype(np.uint64))
        keys = [_mix(base + np.uint64(k) * _GOLDEN) for k in range(_ROUNDS)]
        value = _rounds(index.astype(np.uint64), keys, half)
        walking = np.flatnonzero(value >= n)
        while len(walking):
            own = keys if len(epoch) == 1 else [key[walking] for key in keys]
            value[walking] = walked = _rounds(value[walking], own, half)
            walking = walking[walked >= n]
    return value.astype(np.int64)


def _rounds(value: np.ndarray, keys: list[np.ndarray], half: np.uint64) -> np.ndarray:
    """Return the images of values of twice `half` bits under all rounds."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for key in keys:
        mixed = _mix(right + key)
        mixed &= mask
        mixed ^= left
        left, right = right, mixed
    left <<= half
    left |= right
    return left


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + _GOLDEN
    x ^= x >> np.uint64(30)
    x *= _MIX1
    x ^= x >> np.uint64(27)
    x *= _MIX2
    x ^= x >> np.uint64(31)
    return x
