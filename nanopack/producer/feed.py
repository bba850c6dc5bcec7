"""Run the producer, in the caller's thread or in a process of its own, and bring news of filled slots.

producer.py fills a slot of ring.py   ->   Feed.take(): slot and facts, in batch order   ->   delivery.py
                                      <-   Feed.free(): a slot that may be filled again
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, Protocol

from nanopack.producer.producer import Produced, Producer
from nanopack.ring.ring import Ring


class News(NamedTuple):
    """A slot that is ready, and what the host knows of it."""

    slot: int
    produced: Produced


class End(NamedTuple):
    """The end of the data, and the producer's books as they stand there."""

    books: bytes


class Feed(Protocol):
    """Where filled slots come from, in batch order."""

    def take(self, *, wait: bool) -> News | End | None:
        """Return the next ready slot, or the end of the data; without `wait`, None if there is none yet.

        Raises, in its place in the order, whatever stopped the producer.
        """

    def free(self, slot: int) -> None:
        """Give a slot back to be filled again."""

    @property
    def ready(self) -> int:
        """Messages that are waiting to be taken."""

    def close(self) -> None:
        """End the producer. May be called twice."""


class Inline:
    """The producer in the caller's thread: a slot is filled when it is waited for, never before."""

    ready = 0

    def __init__(self, producer: Producer, ring: Ring) -> None:
        self._producer = producer
        self._ring = ring
        self._free = deque(range(len(ring.slots)))

    def take(self, *, wait: bool) -> News | End | None:
        """Fill a slot and return it; without `wait`, None. Raises as `Producer.produce` does."""
        if not wait:
            return None
        slot = self._free.popleft()
        produced = self._producer.produce(self._ring.slots[slot])
        return End(self._producer.books()) if produced is None else News(slot, produced)

    def free(self, slot: int) -> None:
        """Give a slot back to be filled again."""
        self._free.append(slot)

    def close(self) -> None:
        """Do nothing: there is nothing to end."""
