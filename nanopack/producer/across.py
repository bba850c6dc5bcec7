"""Deal the rows of all ranks together, where every rank packs all shards: with a store, whose lengths are known.

    HoldingPacker of every shard   ->   AcrossRanks.advance()    ->   each shard's rows of the next step
    Pieces of a step, all ranks'   ->   AcrossRanks.own_rows()   ->   those of this rank

All ranks come to the same by themselves. Which rows a step has does not depend on the number of ranks; which of them a
rank gets does. No torch, no GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nanopack.config import LoaderConfig
from nanopack.packing.balance import costs_of, deal, order_of_steps, slices
from nanopack.packing.holding import HoldingPacker, chosen
from nanopack.ring.pieces import Pieces, stack


class AcrossRanks:
    """Deals what the packers of all shards hold."""

    def __init__(self, config: LoaderConfig, packers: Sequence[HoldingPacker]) -> None:
        self._config = config
        self._packers = packers

    def advance(self) -> bool:
        """Pack one batch of each shard, and deal a window where the last is over; return False at the end."""
        window = self._config.balance_window or 1
        while self._packers[0].dealt + self._collected() < window:
            # every shard, not only up to the first that has one
            if not any([packer.collect() for packer in self._packers]):
                break
        if not self._packers[0].dealt and self._collected():
            self._deal()
        return self._packers[0].dealt > 0

    def _collected(self) -> int:
        return max(packer.collected for packer in self._packers)

    def _deal(self) -> None:
        config, steps = self._config, self._collected()
        assert config.balance is not None
        rows = [packer.collected_rows() for packer in self._packers]
        costs = np.zeros(steps * config.global_rows)
        of_rows = np.concatenate([costs_of(own.lengths, own.bounds, config.balance) for own in rows])
        costs[: len(of_rows)] = of_rows
        order = order_of_steps(config.seed, self._packers[0].windows, steps)
        dealt = slices(costs, steps)[order]
        firsts = np.cumsum([0, *(own.num_rows for own in rows)])
        for packer, own, first, end in zip(self._packers, rows, firsts[:-1], firsts[1:], strict=True):
            mine = (dealt >= first) & (dealt < end)
            packer.deal(chosen(own, dealt[mine] - first), mine.sum(axis=1).tolist())

    def own_rows(self, parts: Sequence[Pieces], counts: np.ndarray) -> Pieces:
        """Return the B rows of this rank in each of some steps, one step below the other.

        `parts` are the rows of these steps by shard, `counts` how many each step has of each shard: (steps, shards).
        """
        config = self._config
        assert config.balance is not None
        pieces = stack(parts)
        costs = np.append(costs_of(pieces.lengths, pieces.bounds, config.balance), 0.0)
        # by shard, and by step in each
        step_of_rows = np.tile(np.arange(len(counts)), len(parts)).repeat(counts.T.ravel())
        by_step, ends = step_of_rows.argsort(kind="stable"), np.cumsum(counts.sum(axis=1))
        own = []
        for rows in np.split(by_step, ends[:-1]):
            # the row after the last is empty
            step = np.append(rows, np.full(config.global_rows - len(rows), pieces.num_rows))
            own.append(step[deal(costs[step], config.world_size)[config.rank]])
        return pieces.padded_to(pieces.num_rows + 1).chosen(np.concatenate(own))
