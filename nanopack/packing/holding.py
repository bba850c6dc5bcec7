"""Hold batches that are packed until it is their turn, in another order than that of packing.

batches of a packer   ->   HoldingPacker.collect()   ->   dealt by balance.py   ->   HoldingPacker.next_rows()
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate, chain, pairwise

import numpy as np

from nanopack.packing.rows import Packer, Rows, State, joined, sums

_NONE = np.empty(0, np.int64)
NO_ROWS = Rows(_NONE, _NONE, _NONE, np.zeros(1, np.int64))


class HoldingPacker:
    """A packer of whole documents that is ahead of what it delivers; somebody else deals what it holds.

    The packing itself is untouched. Documents in rows that are not yet delivered count as waiting, but are not in
    `waiting()`: they are in `ahead()`. What is cropped to fill a row counts as cropped once the row is packed.

    Args:
        packer: packs the rows; nobody else takes rows of it.
        on_packed: is called with the rows of each batch as they are packed.
    """

    def __init__(self, packer: Packer, *, on_packed: Callable[[Rows], object] = lambda rows: None) -> None:
        self._packer = packer
        self._on_packed = on_packed
        self._collected: list[Rows] = []
        self._dealt: deque[Rows] = deque()
        self.windows = 0
        """Windows that were dealt so far."""
        self.emitted = self.packed = 0

    def collect(self) -> bool:
        """Pack another batch; return False at the end of the data."""
        rows = self._packer.next_rows()
        if not rows.num_rows:
            return False
        self._on_packed(rows)
        self._collected.append(rows)
        return True

    @property
    def collected(self) -> int:
        """Batches that are packed and not dealt."""
        return len(self._collected)

    @property
    def dealt(self) -> int:
        """Steps that are dealt and not delivered."""
        return len(self._dealt)

    def collected_rows(self) -> Rows:
        """Return the rows that are not dealt, in the order of packing."""
        return joined(self._collected or [NO_ROWS])

    def deal(self, rows: Rows, steps: Sequence[int]) -> None:
        """Deliver these rows next, this number of them in each step: those of `collected_rows`, in another order."""
        documents, offsets, lengths, bounds = rows
        firsts = [0, *accumulate(steps)]
        begins = bounds[firsts].tolist()
        for (first, end), (begin, stop) in zip(pairwise(firsts), pairwise(begins), strict=True):
            own = bounds[first : end + 1] - begin
            self._dealt.append(Rows(documents[begin:stop], offsets[begin:stop], lengths[begin:stop], own))
        self._collected.clear()
        self.windows += 1

    def next_rows(self) -> Rows:
        """Return the rows of the next step that is dealt; without one, none."""
        if not self._dealt:
            return NO_ROWS
        rows = self._dealt.popleft()
        self.emitted += int(np.add.reduce(rows.lengths))
        self.packed += len(rows.lengths)
        return rows

    def ahead(self) -> list[Rows]:
        """Return the rows packed and not delivered: first the steps that are dealt, as many as `state` says."""
        return [*self._dealt, *self._collected]

    def documents_ahead(self) -> np.ndarray:
        """Return the documents of `ahead()`, int64."""
        return np.concatenate([_NONE, *(rows.documents for rows in self.ahead())])

    def waiting(self) -> list[int]:
        """Return the documents that wait for a row, in the order that `restore` takes."""
        return self._packer.waiting()

    def remaining(self) -> list[tuple[int, int]]:
        """Return each document with tokens still to come, and their number."""
        ahead = (zip(rows.documents.tolist(), rows.lengths.tolist(), strict=True) for rows in self.ahead())
        return [*self._packer.remaining(), *chain.from_iterable(ahead)]

    @property
    def cropped(self) -> int:
        """Tokens cut from documents that were placed in part."""
        return self._packer.cropped

    @property
    def longest_wait(self) -> int:
        """Most rows that a document has waited; how long a row waits for its turn is not counted."""
        return self._packer.longest_wait

    @property
    def waiting_documents(self) -> int:
        """Documents taken that have tokens still to come."""
        return self._packer.waiting_documents + self._packer.packed - self.packed

    @property
    def waiting_tokens(self) -> int:
        """Their tokens that are still to come."""
        return self._packer.waiting_tokens + self._packer.emitted - self.emitted

    def state(self) -> State:
        """Return the packer's own state with the counters of what is delivered, and the place in the window."""
        delivered = {"emitted": self.emitted, "packed": self.packed}
        return {**self._packer.state(), **delivered, "windows": self.windows, "dealt": len(self._dealt)}

    def hold(self, ahead: Sequence[Rows]) -> None:
        """Take the rows of `ahead()`, to restore them with the rest."""
        self._collected = list(ahead)

    def restore(self, state: State, waiting: Sequence[tuple[int, int]]) -> None:
        """Restore a saved state: `state()`, and (document, length) of each document of `waiting()`; `hold` first."""
        emitted = state["emitted"] + sum(int(rows.lengths.sum()) for rows in self._collected)
        packed = state["packed"] + sum(len(rows.lengths) for rows in self._collected)
        self._packer.restore({**state, "emitted": emitted, "packed": packed}, waiting)
        self.emitted, self.packed, self.windows = state["emitted"], state["packed"], state["windows"]
        self._dealt = deque(self._collected[: state["dealt"]])
        del self._collected[: state["dealt"]]


def chosen(rows: Rows, index: np.ndarray) -> Rows:
    """Return the rows of these indices, (k,) int64, of whole documents, or of their beginnings: offsets are 0."""
    runs, bounds = runs_of(rows.bounds, index)
    return Rows(rows.documents.take(runs), rows.offsets[: len(runs)], rows.lengths.take(runs), bounds)


def runs_of(bounds: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the runs of the rows of these indices, and their bounds, (k + 1,); `bounds` are those of all rows."""
    firsts = bounds.take(index)
    counts = bounds.take(index + 1) - firsts
    ends = sums(counts)
    return (firsts - ends[:-1]).repeat(counts) + np.arange(ends[-1]), ends
