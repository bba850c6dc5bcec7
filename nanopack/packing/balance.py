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
from collections.abc import Callable, Sequence
from itertools import chain
from operator import mul
from typing import Any, NamedTuple

from nanopack.packing.cost import Cost
from nanopack.packing.rows import Packer, Row, State

_BITS64 = 2**64 - 1


class HeldRow(NamedTuple):
    """A row that is packed, and waits for its turn."""

    row: Row
    """Empty: a row of padding."""
    cost: float
    tokens: int
    named: bytes
    """The row as a state names it, made once: a state is made for every batch."""


Held = list[HeldRow]
NO_ROW = HeldRow([], 0.0, 0, b"")


def cost_of_row(row: Row, cost: Cost) -> float:
    """Return the cost of a row's documents; padding costs nothing."""
    lengths = [run[2] for run in row]
    return cost.of(sum(lengths), sum(map(mul, lengths, lengths)))


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


def deal_across(costs: Sequence[float], steps: int, ranks: int) -> list[list[list[int]]]:
    """Return the rows of each rank in each step of a window, by index, where the costs of all ranks' rows are known.

    A step gets rows of like cost, from the dearest down, so that it has the same rows on any number of ranks; they are
    dealt to the ranks as `deal` does. The number of rows is a multiple of steps * ranks.

    >>> deal_across([1.0, 5.0, 2.0, 9.0, 4.0, 3.0, 6.0, 8.0], steps=2, ranks=2)
    [[[1, 3], [6, 7]], [[0, 4], [2, 5]]]
    """
    order = sorted(range(len(costs)), key=costs.__getitem__, reverse=True)
    size = len(order) // steps
    slices = [sorted(order[start : start + size]) for start in range(0, len(order), size)]
    return [[[own[i] for i in heap] for heap in deal([costs[i] for i in own], ranks)] for own in slices]


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
    delivered count as waiting, but are not in `waiting()`: they are in `ahead()`. What is cropped to fill a row counts
    as cropped once the row is packed.

    Args:
        packer: packs the rows; nobody else takes rows of it.
        batch_size: rows of a batch.
        cost: of a document.
        window: batches that are dealt together, K.
        seed: of the order of the steps in a window.
        name: is called with each row as it is packed, and returns it as a state names it.
    """

    def __init__(
        self,
        packer: Packer,
        batch_size: int,
        *,
        cost: Cost,
        window: int,
        seed: int | None,
        name: Callable[[Row], bytes] = lambda row: b"",
    ) -> None:
        self._packer = packer
        self._batch_size, self._cost, self._window, self._seed = batch_size, cost, window, seed
        self._name = name
        self._dealt: deque[Held] = deque()
        self._collected: list[Held] = []
        self._windows = 0
        self.emitted = self.packed = 0

    @property
    def cropped(self) -> int:
        """Tokens cut from documents that were placed in part."""
        return self._packer.cropped

    @property
    def longest_wait(self) -> int:
        """Most rows that a document has waited for its row; how long the row waited for its turn is not counted."""
        return self._packer.longest_wait

    def next_rows(self) -> list[Row]:
        """Return the rows of the next batch; at the end of the data some may be empty, then none."""
        while len(self._dealt) + len(self._collected) < self._window and (rows := self._packer.next_rows()):
            self._collected.append([self._held(row) for row in rows])
        if not self._dealt:
            self._deal()
        if not self._dealt:
            return []
        batch = self._dealt.popleft()
        self.emitted += sum([held.tokens for held in batch])
        self.packed += sum([len(held.row) for held in batch])
        return [held.row for held in batch]

    def _held(self, row: Row) -> HeldRow:
        if not row:
            return NO_ROW
        lengths = [run[2] for run in row]
        tokens = sum(lengths)
        return HeldRow(row, self._cost.of(tokens, sum(map(mul, lengths, lengths))), tokens, self._name(row))

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
        rows = (held.row for held in chain.from_iterable(self.ahead()))
        return [*self._packer.remaining(), *((run.document, run.length) for row in rows for run in row)]

    @property
    def waiting_documents(self) -> int:
        """Documents read that have tokens still to come."""
        return self._packer.waiting_documents + sum([len(held.row) for held in chain.from_iterable(self.ahead())])

    @property
    def waiting_tokens(self) -> int:
        """Their tokens that are still to come."""
        return self._packer.waiting_tokens + sum([held.tokens for held in chain.from_iterable(self.ahead())])

    def state(self) -> State:
        """Return the packer's own state with the counters of what is delivered, and the place in the window."""
        delivered = {"emitted": self.emitted, "packed": self.packed}
        return {**self._packer.state(), **delivered, "windows": self._windows, "dealt": len(self._dealt)}

    def hold(self, ahead: Sequence[Sequence[Row]]) -> None:
        """Take the rows of `ahead()`, to restore them with the rest."""
        self._collected = [[self._held(row) for row in rows] for rows in ahead]

    def restore(self, state: State, waiting: Sequence[tuple[Any, int]]) -> None:
        """Restore a saved state: `state()`, and (document, length) of each document of `waiting()`; `hold` first."""
        rows = list(chain.from_iterable(self._collected))
        emitted = state["emitted"] + sum(held.tokens for held in rows)
        packed = state["packed"] + sum(len(held.row) for held in rows)
        self._packer.restore({**state, "emitted": emitted, "packed": packed}, waiting)
        self.emitted, self.packed, self._windows = state["emitted"], state["packed"], state["windows"]
        self._dealt = deque(self._collected[: state["dealt"]])
        self._collected = self._collected[state["dealt"] :]
