"""Measure how far the slowest rank's work is above the mean, and what dealing rows by cost would make of it.

    lengths of documents, a Cost   ->   row_costs()   ->   imbalance()   ->   nanopack inspect, nanopack bench

All ranks wait for the slowest in every step, so a mean of 1.20 here is a sixth of the time lost. Integers and floats
only: no token is read.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from statistics import mean
from typing import NamedTuple

from nanopack.packing.balance import cost_of_row, deal, deal_across
from nanopack.packing.cost import Cost
from nanopack.packing.packings import Packing

LLAMA_3_8B = Cost(45027950592.0, 786432.0)
"""FLOPs of a training step of Llama-3-8B: where no cost is given, that of a model many know."""


class Imbalance(NamedTuple):
    """The slowest rank's work in a step over the mean of all ranks: means over the steps, 1.0 where all are equal."""

    as_packed: float
    balanced: float
    """With `balance`: each rank deals its own rows."""
    across_ranks: float
    """If the rows of all ranks were dealt together."""


def row_costs(packing: Packing, lengths: Iterable[int], seq_len: int, cost: Cost) -> list[float]:
    """Return the cost of each row that documents of these lengths are packed into, in order."""
    documents = enumerate(lengths)

    def read() -> tuple[int, int] | None:
        item = next(documents, None)
        return None if item is None else (item[0], min(item[1], seq_len + 1) if packing.cuts_to_row else item[1])

    packer = packing.build(read, batch_size=1, seq_len=seq_len)
    found = []
    while rows := packer.next_rows():
        found += [cost_of_row(row, cost) for row in rows]
    return found


def drawn(costs: Sequence[float], *, ranks: int, batch_size: int, window: int, windows: int) -> Imbalance | None:
    """Return the imbalance of a number of windows of rows drawn from these, at random and with repetition."""
    if not costs:
        return None
    count = windows * ranks * batch_size * window
    rows = random.Random(0).choices(costs, k=count)
    return imbalance(rows, ranks=ranks, batch_size=batch_size, window=window)


def imbalance(costs: Sequence[float], *, ranks: int, batch_size: int, window: int) -> Imbalance | None:
    """Return the imbalance of rows that ranks take in turns, `batch_size` a step; None for too few for a window.

    Rows that do not fill a window of this many steps are left out.
    """
    size = ranks * batch_size * window
    windows = [costs[start : start + size] for start in range(0, len(costs) - size + 1, size)]
    steps: list[tuple[float, float, float]] = []
    for rows in windows:
        of_ranks = [rows[rank::ranks] for rank in range(ranks)]
        packed = [[own[step * batch_size :][:batch_size] for own in of_ranks] for step in range(window)]
        dealt = [[[own[i] for i in heap] for heap in deal(own, window)] for own in of_ranks]
        balanced = zip(*dealt, strict=True)
        across = [[[rows[i] for i in heap] for heap in heaps] for heaps in deal_across(rows, window, ranks)]
        steps += zip(*(map(_slowest, way) for way in (packed, balanced, across)), strict=True)
    return Imbalance(*map(mean, zip(*steps, strict=True))) if steps else None


def _slowest(heaps: Iterable[Sequence[float]]) -> float:
    """Return the work of the slowest rank over the mean, from the costs of each rank's rows."""
    work = [sum(heap) for heap in heaps]
    return max(work) / mean(work) if any(work) else 1.0
