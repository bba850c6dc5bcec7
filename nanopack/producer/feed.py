"""The queue of filled slots, from a producer in the caller's thread or in a process of its own.

producer.py fills a slot of the ring   ->   Feed.get(): facts of the slot, in batch order   ->   upload/prefetcher.py
                                       <-   Feed.release(): a slot that may be filled again
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, Protocol

from nanopack.producer.packed_state import PackedState
from nanopack.producer.producer import Producer
from nanopack.ring.facts import BatchFacts
from nanopack.ring.ring import Ring


class End(NamedTuple):
    """The end of the data, and the producer's state there."""

    state: PackedState


class Feed(Protocol):
    """A queue of filled slots, in batch order."""

    @property
    def pid(self) -> int | None:
        """Of the producer's process; None where it has none."""

    waits: bool
    """Whether `get` has received nothing yet: what interrupts it then loses nothing."""

    def get(self, *, wait: bool) -> BatchFacts | End | None:
        """Return the next filled slot, or the end of the data; without `wait`, None if there is none yet.

        Raises whatever stopped the producer, after all slots filled before it.
        """

    def release(self, slot: int) -> None:
        """Give a slot back to be filled again. Slots come back in the order in which they were filled."""

    def qsize(self) -> int:
        """Return the number of messages that `get` would return without waiting."""

    def close(self) -> None:
        """End the producer. May be called twice."""


class Inline:
    """A producer in the caller's thread: a slot is filled when it is waited for, never before."""

    pid = None
    waits = False

    def __init__(self, producer: Producer, ring: Ring) -> None:
        self._producer = producer
        self._ring = ring
        self._free = deque(range(len(ring.slots)))

    def get(self, *, wait: bool) -> BatchFacts | End | None:
        """Fill a slot and return its facts; without `wait`, None. Raises as `Producer.produce` does."""
        if not wait:
            return None
        facts = self._producer.produce(self._ring.slots[self._free.popleft()])
        return End(self._producer.packed_state()) if facts is None else facts

    def release(self, slot: int) -> None:
        """Give a slot back to be filled again."""
        self._free.append(slot)

    def qsize(self) -> int:
        """Return 0: nothing is filled ahead."""
        return 0

    def close(self) -> None:
        """Do nothing: there is no process to end."""
