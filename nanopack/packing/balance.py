"""Deal rows so that step k costs every rank about the same, with no communication.

    batches of a packer   ->   BalancedPacker.next_rows()   ->   the same rows in another order: windows of K batches
                               deal() by Cost of each row

Ranks draw their rows from one distribution. Of a window of K batches each rank orders its rows by cost and deals them
to K groups in turns, back and forth, so its k-th group costs about what the k-th group of any other rank costs. The
order of the groups is drawn from the seed, equal on all ranks, so that the cost does not rise within a window. A window
holds the rows that its K batches held before: with K accumulated batches a step of the optimizer has exactly the same
content.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nanopack.packing.cost import Cost
from nanopack.packing.holding import HoldingPacker, chosen
from nanopack.packing.rows import Packer, Rows, sums

_BITS64 = 2**64 - 1


def costs_of(lengths: np.ndarray, bounds: np.ndarray, cost: Cost) -> np.ndarray:
    """Return the cost of each row's documents, (rows,) float64; padding costs nothing.

    `lengths` are those of all runs, `bounds` the first of each row, as in `Rows`.
    """
    tokens, squares = sums(lengths)[bounds], sums(lengths * lengths)[bounds]
    found: np.ndarray = cost.of(tokens[1:] - tokens[:-1], squares[1:] - squares[:-1])
    return found


def deal(costs: np.ndarray, groups: int) -> np.ndarray:
    """Return the rows of each group, (groups, n) int64, by index in ascending order: n each, of nearly the same cost.

    `costs` are (groups * n,). From the costliest down, the first among equals first, rows are dealt to the groups
    0, 1, ..., last, last, ..., 1, 0, 0, 1, ...: the k-th group has the k-th costliest, or those close to it.

    >>> deal(np.array([1.0, 5.0, 2.0, 9.0, 4.0, 3.0]), groups=3).tolist()
    [[0, 3], [1, 2], [4, 5]]
    """
    turns = (-costs).argsort(kind="stable").reshape(-1, groups)
    turns[1::2] = turns[1::2, ::-1]
    return np.sort(turns.T, axis=1)


def deal_across(costs: np.ndarray, steps: int, ranks: int) -> np.ndarray:
    """Return the rows of each rank in each step, (steps, ranks, n), where the costs of all ranks' rows are known.

    A step gets rows of like cost, from the costliest down, so that it has the same rows on any number of ranks; they
    are dealt to the ranks as `deal` does. `costs` are (steps * ranks * n,).

    >>> deal_across(np.array([1.0, 5.0, 2.0, 9.0, 4.0, 3.0, 6.0, 8.0]), steps=2, ranks=2).tolist()
    [[[1, 3], [6, 7]], [[0, 4], [2, 5]]]
    """
    return np.stack([own[deal(costs[own], ranks)] for own in slices(costs, steps)])


def slices(costs: np.ndarray, steps: int) -> np.ndarray:
    """Return rows of like cost for each step, (steps, n) int64, by index in ascending order: the costliest first."""
    return np.sort(np.argsort(-costs, kind="stable").reshape(steps, -1), axis=1)


def order_of_steps(seed: int | None, window: int, steps: int) -> list[int]:
    """Return the order in which the groups of a window (from 0) are delivered: a permutation drawn from the seed.

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


class BalancedPacker(HoldingPacker):
    """A packer of whole documents whose rows are dealt by cost, window by window.

    It is K batches ahead: once they are packed they are dealt, and as each of them is delivered one of the next window
    is packed, so that the work is spread evenly.

    Args:
        packer, on_packed: as of `HoldingPacker`.
        batch_size: rows of a batch.
        cost: of a document.
        window: batches that are dealt together, K.
        seed: of the order of the steps in a window.
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
        super().__init__(packer, on_packed=on_packed)
        self._batch_size, self._cost, self._window, self._seed = batch_size, cost, window, seed

    def next_rows(self) -> Rows:
        """Return the rows of the next batch; at the end of the data some may be empty, then none."""
        while len(self._dealt) + len(self._collected) < self._window and self.collect():
            pass
        if not self._dealt and self._collected:
            self._deal()
        return super().next_rows()

    def _deal(self) -> None:
        """Deal the batches that are collected: a window, at the end of the data fewer."""
        steps, size = self.collected, self._batch_size
        rows = self.collected_rows().padded_to(steps * size)
        groups = deal(costs_of(rows.lengths, rows.bounds, self._cost), steps)
        order = order_of_steps(self._seed, self.windows, steps)
        self.deal(chosen(rows, groups[order].ravel()), [size] * steps)
