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
from typing import NamedTuple

import numpy as np

from nanopack.packing.cost import Cost
from nanopack.packing.rows import Packer, Rows, State

_BITS64 = 2**64 - 1


def costs_of(rows: Rows, cost: Cost) -> np.ndarray:
    """Return the cost of each row's documents, (rows,) float64; padding costs nothing."""
    found: np.ndarray = cost.of(_sums_in(rows.lengths, rows), _sums_in(rows.lengths**2, rows))
    return found


def _sums_in(values: np.ndarray, rows: Rows) -> np.ndarray:
    sums = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=sums[1:])
    return np.diff(sums[rows.bounds])


def deal(costs: np.ndarray, heaps: int) -> np.ndarray:
    """Return the rows of each heap, (heaps, n) int64, by index in ascending order: n each, of nearly the same cost.

    `costs` are (heaps * n,). From the dearest to the cheapest, the first among equals first, rows are dealt to the
    heaps 0, 1, ..., last, last, ..., 1, 0, 0, 1, ...: the k-th heap has the k-th dearest, or those close to it.

    >>> deal(np.array([1.0, 5.0, 2.0, 9.0, 4.0, 3.0]), heaps=3).tolist()
    [[0, 3], [1, 2], [4, 5]]
    """
    turns = np.argsort(-costs, kind="stable").reshape(-1, heaps)
    turns[1::2] = turns[1::2, ::-1]
    return np.sort(turns.T, axis=1)


def deal_across(costs: np.ndarray, steps: int, ranks: int) -> np.ndarray:
    """Return the rows of each rank in each step, (steps, ranks, n), where the costs of all ranks' rows are known.

    A step gets rows of like cost, from the dearest down, so that it has the same rows on any number of ranks; they are
    dealt to the ranks as `deal` does. `costs` are (steps * ranks * n,).

    >>> deal_across(np.array([1.0, 5.0, 2.0, 9.0, 4.0, 3.0, 6.0, 8.0]), steps=2, ranks=2).tolist()
    [[[1, 3], [6, 7]], [[0, 4], [2, 5]]]
    """
    slices = np.sort(np.argsort(-costs, kind="stable").reshape(steps, -1), axis=1)
    return np.stack([own[deal(costs[own], ranks)] for own in slices])


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


class HeldRows(NamedTuple):
    """A batch that is packed, and waits for its turn."""

    rows: Rows
    named: tuple[bytes, bytes, bytes]
    """Documents, their lengths, and the documents of each row, int64: made once, as a state is made for every batch."""

    @classmethod
    def of(cls, rows: Rows) -> HeldRows:
        """Hold these rows."""
        return cls(
            rows, (rows.documents.tobytes(), rows.lengths.tobytes(), (rows.bounds[1:] - rows.bounds[:-1]).tobytes())
        )


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
        on_packed: is called with the rows of each batch as they are packed.
    """

    def __init__(
        self,
        packer: Packer,
        batch_size: int,
        *,
        cost: Cost,
        window: int,
        seed: int | None,
        on_packed: Callable[[Rows], object] = lambda rows: None,
    ) -> None:
        self._packer = packer
        self._batch_size, self._cost, self._window, self._seed = batch_size, cost, window, seed
        self._on_packed = on_packed
        self._dealt: deque[HeldRows] = deque()
        self._collected: list[HeldRows] = []
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

    def next_rows(self) -> Rows:
        """Return the rows of the next batch; at the end of the data some may be empty, then none."""
        while len(self._dealt) + len(self._collected) < self._window and (rows := self._packer.next_rows()).num_rows:
            self._on_packed(rows)
            self._collected.append(HeldRows.of(rows))
        if not self._dealt:
            self._deal()
        if not self._dealt:
            return NO_ROWS
        rows = self._dealt.popleft().rows
        self.emitted += int(rows.lengths.sum())
        self.packed += len(rows.lengths)
        return rows

    def _deal(self) -> None:
        """Deal the batches that are collected: a window, at the end of the data fewer."""
        if not (steps := len(self._collected)):
            return
        rows = joined([held.rows for held in self._collected])
        costs = np.zeros(steps * self._batch_size)
        costs[: rows.num_rows] = costs_of(rows, self._cost)
        heaps = deal(costs, steps)
        order = order_of_steps(self._seed, self._windows, steps)
        self._dealt.extend(map(HeldRows.of, split(chosen(rows, heaps[order].ravel()), self._batch_size)))
        self._collected.clear()
        self._windows += 1

    def ahead(self) -> list[HeldRows]:
        """Return the batches that are packed and not delivered: first those that are dealt, as many as `state` says."""
        return [*self._dealt, *self._collected]

    def documents_ahead(self) -> np.ndarray:
        """Return the documents of these batches, int64."""
        return joined([held.rows for held in self.ahead()]).documents

    def waiting(self) -> list[int]:
        """Return the documents that wait for a row, in the order that `restore` takes."""
        return self._packer.waiting()

    def remaining(self) -> list[tuple[int, int]]:
        """Return each document with tokens still to come, and their number."""
        rows = joined([held.rows for held in self.ahead()])
        return [*self._packer.remaining(), *zip(rows.documents.tolist(), rows.lengths.tolist(), strict=True)]

    @property
    def waiting_documents(self) -> int:
        """Documents taken that have tokens still to come."""
        return self._packer.waiting_documents + sum(len(held.rows.lengths) for held in self.ahead())

    @property
    def waiting_tokens(self) -> int:
        """Their tokens that are still to come."""
        return self._packer.waiting_tokens + sum(int(held.rows.lengths.sum()) for held in self.ahead())

    def state(self) -> State:
        """Return the packer's own state with the counters of what is delivered, and the place in the window."""
        delivered = {"emitted": self.emitted, "packed": self.packed}
        return {**self._packer.state(), **delivered, "windows": self._windows, "dealt": len(self._dealt)}

    def hold(self, ahead: Sequence[Rows]) -> None:
        """Take the batches of `ahead()`, to restore them with the rest."""
        self._collected = [HeldRows.of(rows) for rows in ahead]

    def restore(self, state: State, waiting: Sequence[tuple[int, int]]) -> None:
        """Restore a saved state: `state()`, and (document, length) of each document of `waiting()`; `hold` first."""
        rows = joined([held.rows for held in self._collected])
        emitted, packed = state["emitted"] + int(rows.lengths.sum()), state["packed"] + len(rows.lengths)
        self._packer.restore({**state, "emitted": emitted, "packed": packed}, waiting)
        self.emitted, self.packed, self._windows = state["emitted"], state["packed"], state["windows"]
        self._dealt = deque(self._collected[: state["dealt"]])
        self._collected = self._collected[state["dealt"] :]


_NONE = np.empty(0, np.int64)
NO_ROWS = Rows(_NONE, _NONE, _NONE, np.zeros(1, np.int64))


def joined(parts: Sequence[Rows]) -> Rows:
    """Return the rows of all, in order."""
    if not parts:
        return NO_ROWS
    documents, offsets, lengths, _ = zip(*parts, strict=True)
    counts = np.concatenate([np.diff(part.bounds) for part in parts])
    bounds = np.concatenate([[0], np.cumsum(counts)])
    return Rows(np.concatenate(documents), np.concatenate(offsets), np.concatenate(lengths), bounds)


def split(rows: Rows, size: int) -> list[Rows]:
    """Return parts of this many rows each."""
    parts = []
    for first in range(0, rows.num_rows, size):
        bounds = rows.bounds[first : first + size + 1]
        runs = slice(int(bounds[0]), int(bounds[-1]))
        parts.append(Rows(rows.documents[runs], rows.offsets[runs], rows.lengths[runs], bounds - bounds[0]))
    return parts


def chosen(rows: Rows, index: np.ndarray) -> Rows:
    """Return the rows of these indices, (k,) int64; one beyond the last is empty."""
    index = np.minimum(index, rows.num_rows)
    counts = np.append(np.diff(rows.bounds), 0)[index]
    bounds = np.concatenate([[0], np.cumsum(counts)])
    runs = (rows.bounds[index] - bounds[:-1]).repeat(counts) + np.arange(bounds[-1])
    return Rows(rows.documents[runs], rows.offsets[runs], rows.lengths[runs], bounds)
