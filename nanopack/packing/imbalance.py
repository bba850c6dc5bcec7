"""Measure how far the slowest rank's work is above the mean, and what dealing rows by cost would make of it.

    lengths of documents, a Cost   ->   row_costs()   ->   imbalance()   ->   nanopack inspect, nanopack bench

All ranks wait for the slowest in every step, so a mean of 1.20 here is a sixth of the time lost. Integers and floats
only: no token is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from nanopack.packing.align import build
from nanopack.packing.balance import costs_of, deal, deal_across
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


def row_costs(packing: Packing, lengths: Iterable[int], seq_len: int, cost: Cost, *, align: int = 1) -> np.ndarray:
    """Return the cost of each row that documents of these lengths are packed into, in order: (rows,) float64."""
    known = np.fromiter(lengths, np.int64)
    cut = np.minimum(known, seq_len + 1) if packing.cuts_to_row else known
    documents = iter([(np.arange(len(known)), cut)] if len(known) else [])
    packer = build(packing, lambda: next(documents, None), batch_size=64, seq_len=seq_len, align=align)
    found = [np.empty(0)]
    while (rows := packer.next_rows()).num_rows:
        found.append(costs_of(rows.lengths, rows.bounds, cost))
    return np.concatenate(found)


def drawn(costs: np.ndarray, *, ranks: int, batch_size: int, window: int, windows: int) -> Imbalance | None:
    """Return the imbalance of a number of windows of rows drawn from these, at random and with repetition."""
    if not len(costs):
        return None
    rows = np.random.default_rng(0).choice(costs, windows * ranks * batch_size * window)
    return imbalance(rows, ranks=ranks, batch_size=batch_size, window=window)


def imbalance(costs: np.ndarray, *, ranks: int, batch_size: int, window: int) -> Imbalance | None:
    """Return the imbalance of rows that ranks take in turns, `batch_size` a step; None for too few for a window.

    Rows that do not fill a window of this many steps are left out.
    """
    size = ranks * batch_size * window
    whole = costs[: len(costs) // size * size].reshape(-1, size)
    found = [_of_window(rows, ranks, batch_size, window) for rows in whole]
    return Imbalance(*np.mean(found, axis=0).tolist()) if found else None


def _of_window(rows: np.ndarray, ranks: int, batch_size: int, window: int) -> tuple[float, float, float]:
    of_ranks = rows.reshape(-1, ranks).T
    packed = of_ranks.reshape(ranks, window, batch_size).transpose(1, 0, 2)
    balanced = np.stack([own[deal(own, window)] for own in of_ranks], axis=1)
    across = rows[deal_across(rows, window, ranks)]
    return _slowest(packed), _slowest(balanced), _slowest(across)


def _slowest(costs: np.ndarray) -> float:
    """Return the work of the slowest rank over the mean, on average, from the costs (steps, ranks, rows)."""
    work = costs.sum(axis=2)
    mean = work.mean(axis=1)
    return float(np.where(mean > 0, work.max(axis=1) / np.where(mean > 0, mean, 1), 1.0).mean())
