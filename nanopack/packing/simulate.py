"""Pack lengths only, and count what comes of it: rows, padding, cuts and waits without a token.

lengths of documents   ->   simulate()   ->   Packed   ->   len(loader), nanopack inspect, nanopack bench
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from nanopack.packing.align import build
from nanopack.packing.packings import Packing


@dataclass(frozen=True)
class Packed:
    """What became of the documents."""

    batches: int
    rows: int
    tokens: int
    """In the T input columns of the rows, padding not counted."""
    emitted: int
    """Tokens placed, each counted once."""
    cut: int
    """Tokens cut off: beyond a row, or cropped to fill one."""
    longest_wait_rows: int
    """Most rows that a document has waited, those that still wait included."""
    seq_len: int

    @property
    def padding(self) -> float:
        """Fraction (0 to 1) of the positions that is padding; 0.0 without rows."""
        return 1 - self.tokens / (self.rows * self.seq_len) if self.rows else 0.0

    @property
    def cut_fraction(self) -> float:
        """Fraction (0 to 1) of the tokens that is cut off; 0.0 without any."""
        return self.cut / (self.cut + self.emitted) if self.emitted else 0.0


def simulate(
    packing: Packing,
    lengths: Iterable[int],
    seq_len: int,
    *,
    batch_size: int = 1,
    align: int = 1,
    to_end: bool = True,
) -> Packed:
    """Pack documents of these lengths (tokens, from 1) in one pass, and return the counts.

    Each takes a multiple of `align` tokens. With `to_end=False` packing stops when the data end, as if more would
    follow: rows that only the end leaves half empty, and documents still waiting then, do not count.

    >>> from nanopack.packing.packings import BestFit
    >>> simulate(BestFit(), [3, 9, 2], seq_len=4)
    Packed(batches=2, rows=2, tokens=8, emitted=10, cut=4, longest_wait_rows=1, seq_len=4)
    """
    steps = simulating(
        packing, [np.fromiter(lengths, np.int64)], seq_len, batch_size=batch_size, align=align, to_end=to_end
    )
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found: Packed = end.value
            return found


def simulating(
    packing: Packing, parts: Sequence[np.ndarray], seq_len: int, *, batch_size: int, align: int = 1, to_end: bool = True
) -> Generator[None, None, Packed]:
    """Simulate as `simulate`, step by step: yield after each batch. `parts` are the lengths of one pass or more."""
    known = np.concatenate([np.empty(0, np.int64), *parts])
    kept = np.minimum(known, seq_len + 1) if packing.cuts_to_row else known
    bounds = np.cumsum([0, *map(len, parts)])
    passes = ((np.arange(begin, end), kept[begin:end]) for begin, end in pairwise(bounds.tolist()) if end > begin)
    asked = 0

    def read() -> tuple[np.ndarray, np.ndarray] | None:
        nonlocal asked
        asked += 1
        if packing.whole_passes:
            return next(passes, None)
        return (np.arange(len(kept)), kept) if asked == 1 and len(kept) else None

    packer = build(packing, read, batch_size=batch_size, seq_len=seq_len, align=align)
    batches = rows = tokens = 0
    while (batch := packer.next_rows()).num_rows and (to_end or asked == 1):
        yield
        batches += 1
        rows += batch.num_rows
        tokens += int(np.minimum(np.add.reduceat(batch.lengths, batch.bounds[:-1]), seq_len).sum())
    # without max_age a document may starve, and would never be counted as placed
    state = packer.state()
    still_waiting = [state["row"] - since for since in state.get("since", ())]
    longest_wait = max([packer.longest_wait, *still_waiting])
    cut = int((known - kept).sum()) + packer.cropped
    return Packed(batches, rows, tokens, packer.emitted, cut, longest_wait, seq_len)
