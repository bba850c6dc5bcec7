"""What a batch is made of, as arrays: which words of which documents stand where.

    rows of runs, documents by number   ->   Pieces   ->   slot.py writes them out
      packing/, producer/shard.py

A piece is a run of one document in a row. numpy alone: neither torch nor a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nanopack.packing.holding import runs_of


class Pieces(NamedTuple):
    """The P pieces of a batch, row by row. Arrays are (P,) int64 unless said otherwise."""

    lengths: np.ndarray
    """Tokens."""
    offsets: np.ndarray
    """Of the first token in its document."""
    bounds: np.ndarray
    """(rows + 1,): the first piece of each row; the last entry is P."""
    conversations: np.ndarray
    """Index of each one's conversation in the data set."""
    weights: np.ndarray | None
    """(P,) float32: loss weight of each of its tokens in the loss; None: 1."""
    arrays: Sequence[np.ndarray]
    """Words, each (n,) of the layout's type: of what is packed, and possibly much more."""
    array: np.ndarray | None
    """In which of the arrays its words are; None: there is one."""
    starts: np.ndarray
    """And from where on."""
    marks: Marks | None = None
    """How the loss bits of the words are to be changed; None: they are as they must be."""
    loss_tokens: np.ndarray | None = None
    """Of each, its tokens in the loss after that; -1 where nobody has counted them. None: of none."""

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.bounds) - 1

    def padded_to(self, rows: int) -> Pieces:
        """Return the same with rows of padding at the end."""
        if rows == self.num_rows:
            return self
        return self._replace(bounds=np.concatenate([self.bounds, np.full(rows - self.num_rows, self.bounds[-1])]))

    def part(self, begin: int, end: int) -> Pieces:
        """Return the rows `begin` to `end` - 1, views of these."""
        first, last = self.bounds[[begin, end]].tolist()
        own, marks = slice(first, last), self.marks
        if marks is not None and marks.without is not None:
            marks = marks._replace(without=marks.without[own])
        return Pieces(
            lengths=self.lengths[own],
            offsets=self.offsets[own],
            bounds=self.bounds[begin : end + 1] - first,
            conversations=self.conversations[own],
            weights=None if self.weights is None else self.weights[own],
            arrays=self.arrays,
            array=None if self.array is None else self.array[own],
            starts=self.starts[own],
            marks=marks,
            loss_tokens=None if self.loss_tokens is None else self.loss_tokens[own],
        )

    def chosen(self, index: np.ndarray) -> Pieces:
        """Return the rows of these indices, (k,) int64."""
        runs, bounds = runs_of(self.bounds, index)
        columns = ("lengths", "offsets", "conversations", "starts", *(["array"] if self.array is not None else []))
        marks = self.marks
        if marks is not None and marks.without is not None:
            marks = marks._replace(without=marks.without[runs])
        return self._replace(
            **{name: getattr(self, name)[runs] for name in columns},
            bounds=bounds,
            weights=None if self.weights is None else self.weights[runs],
            loss_tokens=None if self.loss_tokens is None else self.loss_tokens[runs],
            marks=marks,
        )


class Marks(NamedTuple):
    """Changes to loss bits, made in the slot: a store has the bits as they were rendered."""

    all: bool
    """Set them all; before any is cleared."""
    bare: int | None
    """The words are bare ids, which must be below this; None: they have loss bits."""
    first: bool
    """Clear that of the first token of a document."""
    without: np.ndarray | None
    """(P,) bool: clear all those of these pieces; None: of none."""


def stack(parts: Sequence[Pieces]) -> Pieces:
    """Return the rows of all, one below the other."""
    if len(parts) == 1:
        return parts[0]
    arrays: list[np.ndarray] = []
    numbers: dict[int, int] = {}
    array = []
    for part in parts:
        for words in part.arrays:
            if numbers.setdefault(id(words), len(arrays)) == len(arrays):
                arrays.append(words)
        known = np.array([numbers[id(words)] for words in part.arrays], np.int64)
        array.append(known.repeat(len(part.lengths)) if part.array is None else known[part.array])
    begins = np.cumsum([0, *(len(part.lengths) for part in parts)])
    bounds = [part.bounds[:-1] + begin for part, begin in zip(parts, begins.tolist(), strict=False)]
    marks = [part.marks for part in parts if part.marks is not None]
    without = None
    if any(one.without is not None for one in marks):
        without = np.concatenate(
            [
                np.zeros(len(part.lengths), bool) if part.marks is None or part.marks.without is None
                else part.marks.without
                for part in parts
            ]
        )  # fmt: skip
    return Pieces(
        lengths=np.concatenate([part.lengths for part in parts]),
        offsets=np.concatenate([part.offsets for part in parts]),
        bounds=np.concatenate([*bounds, begins[-1:]]),
        conversations=np.concatenate([part.conversations for part in parts]),
        weights=None if parts[0].weights is None else np.concatenate([part.weights for part in parts]),
        arrays=arrays,
        array=np.concatenate(array),
        starts=np.concatenate([part.starts for part in parts]),
        marks=marks[0]._replace(without=without) if marks else None,
        loss_tokens=None if parts[0].loss_tokens is None else np.concatenate([part.loss_tokens for part in parts]),
    )
