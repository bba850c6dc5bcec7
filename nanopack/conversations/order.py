"""Say which conversation is read when, by whom.

    number of conversations, rank, world size, seed   ->   Share.conversation(read)   ->   reading.py reads it

Only integers: no conversation is touched. The order is the data set's own, or with a seed a permutation that is new in
each pass and the same on all ranks. It is computed place by place, so it needs no memory and begins anywhere at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_CHUNK = 1024
_ROUNDS = 8
_GOLDEN, _MIX1, _MIX2 = (np.uint64(k) for k in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class Share:
    """Which conversations one rank (or row) reads: rank, rank + world_size, ... of the order, pass after pass.

    >>> share = Share(5, rank=1, world_size=2)
    >>> [share.conversation(read) for read in range(5)]
    [1, 3, 0, 2, 4]
    """

    n: int
    rank: int
    world_size: int
    seed: int | None = None

    def conversation(self, read: int) -> int:
        """Return the conversation that reading number `read` (from 0) takes."""
        return next(self.conversations(read, read + 1))

    def place(self, read: int) -> int:
        """Return the place in the order that reading number `read` takes: the conversation itself, unless shuffled."""
        return (self.rank + read * self.world_size) % self.n

    def conversations(self, start: int, stop: int | None = None) -> Iterator[int]:
        """Yield the conversations of the readings from `start` on, up to but without `stop`."""
        while stop is None or start < stop:
            end = start + _CHUNK if stop is None else min(stop, start + _CHUNK)
            yield from self.at(np.arange(start, end, dtype=np.int64))
            start = end

    def at(self, reads: np.ndarray) -> list[int]:
        """Return the conversations that these readings take, (k,) int64."""
        place = self.rank + reads * self.world_size
        if self.seed is None:
            found: list[int] = (place % self.n).tolist()
        else:
            found = permute(place % self.n, self.n, self.seed, place // self.n).tolist()
        return found

    def epoch(self, read: int) -> int:
        """Return the epoch, from 1, in force once `read` conversations have been read: 1 + wraps so far."""
        # With more ranks than conversations every reading wraps, however often n fits into world_size.
        return 1 + (read if self.world_size > self.n else (self.rank + read * self.world_size) // self.n)

    def reads(self, epochs: int) -> int:
        """Return how many readings of this rank lie in `epochs` passes over the data.

        Over all ranks together, every conversation is read exactly `epochs` times.
        """
        return max(0, -((self.rank - epochs * self.n) // self.world_size))


def permute(place: np.ndarray, n: int, seed: int, number: np.ndarray) -> np.ndarray:
    """Return where the places of an order of n land in the permutation of that number, both (k,) int64.

    A Feistel network (Luby and Rackoff, 1988) over the next power of four, walked along its cycle until it is back
    below n (Black and Rogaway, 2002); its rounds are keyed and mixed by splitmix64 (Steele and others, 2014).

    >>> permute(np.arange(5), 5, seed=2, number=np.zeros(5, int)).tolist()
    [2, 0, 4, 3, 1]
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    with np.errstate(over="ignore"):
        base = _mix(_mix(np.full(len(place), seed, np.uint64)) ^ number.astype(np.uint64))
        keys = [_mix(base + np.uint64(k) * _GOLDEN) for k in range(_ROUNDS)]
        value = place.astype(np.uint64)
        walking = np.arange(len(place))
        while len(walking):
            left, right = value[walking] >> half, value[walking] & mask
            for key in keys:
                left, right = right, left ^ (_mix(right + key[walking]) & mask)
            value[walking] = left << half | right
            walking = walking[value[walking] >= n]
    return value.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX1
    x = (x ^ (x >> np.uint64(27))) * _MIX2
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed
