"""The slow packer's order: which conversation is read when, one after the other.

    number of conversations, shard, seed   ->   Reader.next_document()   ->   packing.py packs the documents

Part of the definition; it shares nothing with the fast path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from nanopack.errors import ConversationError

Document = TypeVar("Document")
BITS64 = 2**64 - 1


@dataclass
class Reader(Generic[Document]):
    """The walk of one rank, or of one row, through N conversations, document by document."""

    n: int
    read: Callable[[int], Document | Literal["skipped"] | None]
    rank: int
    world_size: int
    epochs: int | None
    seed: int | None
    reads: int = 0
    left_out: int = 0
    """Readings without a document: dropped or skipped conversations."""
    epoch: int = 1
    skipped: int = 0
    skipped_in_a_row: int = 0

    def __post_init__(self) -> None:
        if self.n == 0:
            raise ValueError("conversations is empty. Pass at least one conversation.")
        # A rank is beyond the end only where W exceeds N.
        self.cursor = self.rank % self.n
        self.orders: dict[int, list[int]] = {}

    @property
    def pass_number(self) -> int:
        """Which pass over the data, from 0, the next reading is in."""
        return (self.rank + self.world_size * self.reads) // self.n

    def next_document(self, within: int | None = None) -> Document | None:
        """Return the next document, or None at the end of the last epoch; `within`: or of that pass, from 0."""
        in_vain = 0
        useless: set[int] = set()
        while (self.epochs is None or self.pass_number < self.epochs) and within in (None, self.pass_number):
            index = self.advance()
            document = self.read(index)
            if document == "skipped":
                self.skipped += 1
                self.skipped_in_a_row += 1
                if self.skipped_in_a_row == 100 or (self.reads >= 1000 and self.skipped > self.reads / 2):
                    raise ConversationError(f"{self.skipped} of {self.reads} conversations are bad. Repair the data.")
            else:
                self.skipped_in_a_row = 0
                if document is not None:
                    return document
            self.left_out += 1
            in_vain += 1
            useless.add(index)
            # Whatever W is, N readings have visited every conversation that this rank will ever read, unless each pass
            # has its own order.
            seen_all = len(useless) == self.n or (in_vain == self.n and self.seed is None)
            if self.epochs is None and seen_all:
                raise ValueError("conversations: each is bad or has no token in the loss. Check the data and loss=.")
        return None

    def advance(self) -> int:
        """Return the conversation under the cursor, and advance by W."""
        index, number = self.cursor, (self.rank + self.world_size * self.reads) // self.n
        self.reads += 1
        self.cursor += self.world_size
        if self.cursor >= self.n:
            # By subtraction: a later epoch starts where the wrap lands, not at the rank.
            self.cursor -= self.n
            self.epoch += 1
        # Once is enough, except for W > N.
        self.cursor %= self.n
        if self.seed is None:
            return index
        if number not in self.orders:
            self.orders = {number: shuffled(self.n, self.seed, number)}
        return self.orders[number][index]

    @property
    def epoch_reached(self) -> int:
        """The epoch; the end of the last one does not begin another."""
        return self.epoch if self.epochs is None else min(self.epoch, self.epochs)

    def progress(self, streams: bool, done: int) -> tuple[float, bool]:
        """Return the fraction of the data consumed with `done` conversations, and whether that is all of it."""
        position = self.rank + self.world_size * done
        if self.epochs is not None:
            end = self.epochs * self.n
            return min(1.0, position / end), position >= end
        # As in nanochat: the cursor of the midtraining stream wraps, the count by rows continues.
        return (self.cursor if streams else position) / self.n, position >= self.n


def shuffled(n: int, seed: int, number: int) -> list[int]:
    """Return the order of pass `number` (from 0): a list of 0 to n - 1.

    Eight rounds of a Feistel network permute the smallest square table of 2^h by 2^h places that has at least n. A
    place that maps to n or beyond is mapped again until it does not (cycle walking).
    """
    h = 1
    while 4**h < n:
        h += 1
    base = _mix(_mix(seed) ^ number)
    order = []
    for index in range(n):
        while True:
            left, right = divmod(index, 2**h)
            for round_number in range(8):
                key = _mix((base + round_number * 0x9E3779B97F4A7C15) & BITS64)
                left, right = right, left ^ _mix((right + key) & BITS64) % 2**h
            index = left * 2**h + right
            if index < n:
                break
        order.append(index)
    return order


def _mix(x: int) -> int:
    """Return the number that follows x in splitmix64."""
    x = (x + 0x9E3779B97F4A7C15) & BITS64
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & BITS64
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & BITS64
    return x ^ x >> 31
