"""Hold batches that are packed until it is their turn, in another order than that of packing.

batches of a packer   ->   HoldingPacker.collect()   ->   dealt by balance.py   ->   HoldingPacker.next_rows()
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from nanopack.packing.rows import Packer, Rows, State

_NONE = np.empty(0, np.int64)
NO_ROWS = Rows(_NONE, _NONE, _NONE, np.zeros(1, np.int64))


class HeldRows(NamedTuple):
    """Rows that are packed, and wait for their turn."""

    rows: Rows
    named: tuple[bytes, bytes, bytes]
    """Documents, their lengths, and the documents of each row, int64: made once, as a state is made for every batch."""

    @classmethod
    def of(cls, rows: Rows) -> HeldRows:
        """Hold these rows."""
        counts = rows.bounds[1:] - rows.bounds[:-1]
        return cls(rows, (rows.documents.tobytes(), rows.lengths.tobytes(), counts.tobytes()))


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
        self._dealt: deque[HeldRows] = deque()
        self._collected: list[HeldRows] = []
        self._windows = 0
        self.emitted = self.cropped = self.packed = self.longest_wait = 0

    def collect(self) -> bool:
        """Pack another batch; return False at the end of the data."""
        rows = self._packer.next_rows()
        if not rows.num_rows:
            return False
        self._on_packed(rows)
        self._collected.append(HeldRows.of(rows))
        # how long a row waits for its turn is not counted
        self.cropped, self.longest_wait = self._packer.cropped, self._packer.longest_wait
        return True

    @property
    def collected(self) -> int:
        """Batches that are packed and not dealt."""
        return len(self._collected)

    @property
    def dealt(self) -> int:
        """Steps that are dealt and not delivered."""
        return len(self._dealt)

    @property
    def windows(self) -> int:
        """Windows that were dealt so far."""
        return self._windows

    def collected_rows(self) -> Rows:
        """Return the rows that are not dealt, in the order of packing."""
        return joined([held.rows for held in self._collected])

    def deal(self, steps: Iterable[Rows]) -> None:
        """Deliver these rows next, step by step: those of `collected_rows`, in another order."""
        self._dealt.extend(map(HeldRows.of, steps))
        self._collected.clear()
        self._windows += 1

    def next_rows(self) -> Rows:
        """Return the rows of the next step that is dealt; without one, none."""
        if not self._dealt:
            return NO_ROWS
        rows = self._dealt.popleft().rows
        self.emitted += int(rows.lengths.sum())
        self.packed += len(rows.lengths)
        return rows

    def ahead(self) -> list[HeldRows]:
        """Return what is packed and not delivered: first the steps that are dealt, as many as `state` says."""
        return [*self._dealt, *self._collected]

    def documents_ahead(self) -> np.ndarray:
        """Return the documents of `ahead()`, int64."""
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
        """Take the rows of `ahead()`, to restore them with the rest."""
        self._collected = [HeldRows.of(rows) for rows in ahead]

    def restore(self, state: State, waiting: Sequence[tuple[int, int]]) -> None:
        """Restore a saved state: `state()`, and (document, length) of each document of `waiting()`; `hold` first."""
        rows = self.collected_rows()
        emitted, packed = state["emitted"] + int(rows.lengths.sum()), state["packed"] + len(rows.lengths)
        self._packer.restore({**state, "emitted": emitted, "packed": packed}, waiting)
        self.emitted, self.packed, self._windows = state["emitted"], state["packed"], state["windows"]
        self.cropped, self.longest_wait = self._packer.cropped, self._packer.longest_wait
        self._dealt = deque(self._collected[: state["dealt"]])
        self._collected = self._collected[state["dealt"] :]


def joined(parts: Sequence[Rows]) -> Rows:
    """Return the rows of all, in order."""
    if not parts:
        return NO_ROWS
    documents, offsets, lengths, _ = zip(*parts, strict=True)
    counts = np.concatenate([np.diff(part.bounds) for part in parts])
    bounds = np.concatenate([[0], np.cumsum(counts)])
    return Rows(np.concatenate(documents), np.concatenate(offsets), np.concatenate(lengths), bounds)


def split(rows: Rows, sizes: Iterable[int]) -> list[Rows]:
    """Return parts of these numbers of rows, one after the other."""
    parts, first = [], 0
    for size in sizes:
        bounds = rows.bounds[first : first + size + 1]
        runs = slice(int(bounds[0]), int(bounds[-1]))
        parts.append(Rows(rows.documents[runs], rows.offsets[runs], rows.lengths[runs], bounds - bounds[0]))
        first += size
    return parts


def chosen(rows: Rows, index: np.ndarray) -> Rows:
    """Return the rows of these indices, (k,) int64; one beyond the last is empty."""
    runs, bounds = runs_of(rows.bounds, index)
    return Rows(rows.documents[runs], rows.offsets[runs], rows.lengths[runs], bounds)


def runs_of(bounds: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the runs of the rows of these indices, and their bounds, (k + 1,); a row beyond the last has none.

    `bounds` are those of all rows, as in `Rows`.
    """
    index = np.minimum(index, len(bounds) - 1)
    counts = np.append(np.diff(bounds), 0)[index]
    ends = np.concatenate([[0], np.cumsum(counts)])
    return (bounds[index] - ends[:-1]).repeat(counts) + np.arange(ends[-1]), ends
