"""Deal rows so that step k costs every rank about the same, with no communication.

    batches of a packer   ->   BalancedPacker.next_rows()   ->   the same rows in another order: windows of K batches
                               deal() by Cost of each row

Ranks draw their rows from one distribution. Of a window of K batches each rank orders its rows by cost and deals them
out in turns, there and back, so its k-th heap costs about what the k-th heap of any other rank costs. The order of the
heaps is drawn from the seed, equal on all ranks, so that the cost does not rise within a window. A window holds the
rows that its K batches held before: with K accumulated batches a step of the optimizer has exactly the same content.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

from nanopack.packing.cost import Cost
from nanopack.packing.rows import COUNTERS, Packer, Read, Row, State

_BITS64 = 2**64 - 1


class HeldRow(NamedTuple):
    """A row that is packed, and waits for its turn."""

    row: Row
    """Empty: a row of padding."""
    lengths: list[int]
    """Tokens of each run's document, whole: more than the run's where the document is cropped."""
    cost: float
    named: bytes
    """The row as a state names it, made once: a state is made for every batch."""


Held = list[HeldRow]
NO_ROW = HeldRow([], [], 0.0, b"")


def cost_of_row(row: Row, cost: Cost) -> float:
    """Return the cost of a row's documents; padding costs nothing."""
    lengths = [run[2] for run in row]
    return cost.of(sum(lengths), sum([length * length for length in lengths]))


def deal(costs: Sequence[float], heaps: int) -> list[list[int]]:
    """Return the rows of each heap, by index in ascending order: equally many, of nearly the same cost in all.

    The number of rows is a multiple of `heaps`. From the dearest to the cheapest, the first among equals first, they
    are dealt to the heaps 0, 1, ..., n - 1, n - 1, ..., 1, 0, 0, 1, ...: the k-th is the k-th dearest, or close to it.

    >>> deal([1.0, 5.0, 2.0, 9.0, 4.0, 3.0], heaps=3)
    [[0, 3], [1, 2], [4, 5]]
    """
    order = sorted(range(len(costs)), key=costs.__getitem__, reverse=True)
    dealt: list[list[int]] = [[] for _ in range(heaps)]
    for start in range(0, len(order), heaps):
        turn = dealt if start // heaps % 2 == 0 else dealt[::-1]
        for heap, row in zip(turn, order[start : start + heaps], strict=True):
            heap.append(row)
    return [sorted(heap) for heap in dealt]


def order_of_steps(seed: int | None, window: int, steps: int) -> list[int]:
    """Return the order in which the heaps of a window (from 0) are delivered: a permutation drawn from the seed.

    The order of fewer steps is that of more with the missing ones left out.
    """
    base = _mix(_mix(seed or 0) ^ window)
    return sorted(range(steps), key=lambda step: _mix(base ^ step))


def _mix(x: int) -> int:
    """Return the number that follows x in splitmix64 (Steele, Lea and Flood, 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _BITS64
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _BITS64
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _BITS64
    return x ^ x >> 31


class BalancedPacker:
    """A packer of whole documents whose rows are dealt by cost, window by window.

    The packing itself is untouched. It is K batches ahead: once they are packed they are dealt, and as each of them is
    delivered one of the next window is packed, so that the work is spread evenly. Documents in rows that are not yet
    delivered count as waiting, but are not in `waiting()`: they are in `ahead()`.

    Args:
        build: makes the packer that reads with a function; see `Packing.build`.
        read: returns the next document and its length.
        batch_size: rows of a batch.
        cost: of a document.
        window: batches that are dealt together, K.
        seed: of the order of the steps in a window.
        name: returns a row as a state names it.
    """

    def __init__(
        self,
        build: Callable[[Read], Packer],
        read: Read,
        batch_size: int,
        *,
        cost: Cost,
        window: int,
        seed: int | None,
        name: Callable[[Row], bytes] = lambda row: b"",
    ) -> None:
        self._packer = build(self._read)
        self._read_next = read
        self._batch_size, self._cost, self._window, self._seed = batch_size, cost, window, seed
        self._name = name
        # of documents that are read, and in no batch yet
        self._lengths: dict[Any, int] = {}
        self._dealt: deque[Held] = deque()
        self._collected: list[Held] = []
        self._windows = 0
        self.emitted = self.cropped = self.packed = 0

    def _read(self) -> tuple[Any, int] | None:
        item = self._read_next()
        if item is not None:
            self._lengths[item[0]] = item[1]
        return item

    @property
    def longest_wait(self) -> int:
        """Most rows that a document has waited for its row; how long the row waited for its turn is not counted."""
        return self._packer.longest_wait

    def next_rows(self) -> list[Row]:
        """Return the rows of the next batch; at the end of the data some may be empty, then none."""
        while len(self._dealt) + len(self._collected) < self._window and (rows := self._packer.next_rows()):
            self._collected.append(
                [self._as_held(row, [self._lengths.pop(run.document) for run in row]) for row in rows]
            )
        if not self._dealt:
            self._deal()
        if not self._dealt:
            return []
        batch = self._dealt.popleft()
        for name, count in _counts(batch).items():
            setattr(self, name, getattr(self, name) + count)
        return [held.row for held in batch]

    def _as_held(self, row: Row, lengths: list[int]) -> HeldRow:
        return HeldRow(row, lengths, cost_of_row(row, self._cost), self._name(row)) if row else NO_ROW

    def _deal(self) -> None:
        """Deal the batches that are collected: a window, at the end of the data fewer."""
        if not (steps := len(self._collected)):
            return
        rows = list(chain.from_iterable(self._collected))
        rows += [NO_ROW] * (steps * self._batch_size - len(rows))
        heaps = deal([held.cost for held in rows], steps)
        self._dealt.extend([rows[i] for i in heaps[step]] for step in order_of_steps(self._seed, self._windows, steps))
        self._collected.clear()
        self._windows += 1

    def ahead(self) -> list[Held]:
        """Return the batches that are packed and not delivered: first those that are dealt, as many as `state` says."""
        return [*self._dealt, *self._collected]

    def waiting(self) -> list[Any]:
        """Return the documents that wait for a row, in the order that `restore` takes."""
        return self._packer.waiting()

    def remaining(self) -> list[tuple[Any, int]]:
        """Return each document with tokens still to come, and their number."""
        ahead = chain.from_iterable(self.ahead())
        in_rows = ((run.document, length) for held in ahead for run, length in zip(held.row, held.lengths, strict=True))
        return [*self._packer.remaining(), *in_rows]

    @property
    def waiting_documents(self) -> int:
        """Documents read that have tokens still to come."""
        return self._packer.waiting_documents + sum(len(held.row) for held in chain.from_iterable(self.ahead()))

    @property
    def waiting_tokens(self) -> int:
        """Their tokens that are still to come."""
        return self._packer.waiting_tokens + sum(sum(held.lengths) for held in chain.from_iterable(self.ahead()))

    def state(self) -> State:
        """Return the packer's own state with the counters of what is delivered, and the place in the window."""
        own = {name: getattr(self, name) for name in COUNTERS}
        return {**self._packer.state(), **own, "windows": self._windows, "dealt": len(self._dealt)}

    def hold(self, ahead: Sequence[Sequence[Row]], length_of: Callable[[Any], int]) -> None:
        """Take the batches of `ahead()`, before `restore`; `length_of` returns how long a document is."""
        self._collected = [
            [self._as_held(row, [length_of(run.document) for run in row]) for row in rows] for rows in ahead
        ]

    def restore(self, state: State, waiting: Sequence[tuple[Any, int]]) -> None:
        """Restore a saved state: `state()`, and (document, length) of each document of `waiting()`."""
        self._lengths = dict(waiting)
        placed = _counts(chain.from_iterable(self._collected))
        for name in placed:
            setattr(self, name, state[name])
        self._packer.restore({**state, **{name: state[name] + count for name, count in placed.items()}}, waiting)
        self._windows = state["windows"]
        self._dealt = deque(self._collected[: state["dealt"]])
        self._collected = self._collected[state["dealt"] :]


def _counts(rows: Iterable[HeldRow]) -> dict[str, int]:
    """Return the amounts that rows add to the counters of a packer."""
    rows = list(rows)
    emitted = sum(run.length for held in rows for run in held.row)
    whole = sum(sum(held.lengths) for held in rows)
    return {"emitted": emitted, "cropped": whole - emitted, "packed": sum(len(held.row) for held in rows)}
