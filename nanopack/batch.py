"""The batch that the training loop gets: tensors on the device, facts on the host.

    kernels/pack.py writes the tensors        ->   Batch   ->   the training loop
    producer/producer.py counts the facts

Nothing here computes on a tensor, so nothing here can make the host wait for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch

__all__ = ["Batch", "Flat", "Piece"]


class Piece(NamedTuple):
    """The part of one document in one row."""

    conversation: int
    """Index of the conversation in the data set."""
    start: int
    """First column."""
    length: int
    """Tokens."""
    offset: int
    """Index in the document of the token in the first column."""


class PieceTable(Sequence[tuple[Piece, ...]]):
    """The pieces of each row, as a sequence of tuples: kept as numbers, and turned into pieces when they are read."""

    def __init__(self, table: bytes, counts: bytes) -> None:
        """`table` is (P, 4) int64, the fields of all pieces row by row; `counts` (B,) int64, the pieces of each row.

        Bytes, because they cross between processes faster than arrays do.
        """
        self.table = table
        self.counts = counts

    @cached_property
    def _fields(self) -> np.ndarray:
        return np.frombuffer(self.table, np.int64).reshape(-1, 4)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(np.frombuffer(self.counts, np.int64).tolist(), initial=0))

    def __len__(self) -> int:
        return len(self.counts) // 8

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return tuple(self[i] for i in range(*row.indices(len(self))))
        row = range(len(self))[row]
        fields = self._fields[self._ends[row] : self._ends[row + 1]]
        return tuple(Piece(*values) for values in fields.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __repr__(self) -> str:
        return repr(tuple(self))


class Flat(NamedTuple):
    """A batch as one row of B * T tokens. Its tensors are those of the `Batch`, seen in another shape."""

    inputs: torch.Tensor
    """(B * T,) int32."""
    targets: torch.Tensor
    """(B * T,) int64."""
    weights: torch.Tensor | None
    """(B * T,) float32."""
    positions: torch.Tensor | None
    """(B * T,) int32: they restart at every piece; the padding of a row is one."""
    cu_seqlens: torch.Tensor | None
    """(B * max_pieces + 1,) int32: the piece i is `inputs[cu_seqlens[i] : cu_seqlens[i + 1]]`."""
    max_seqlen: int
    """Length of the longest piece, on the host."""


@dataclass(frozen=True, eq=False)
class Batch:
    """One `(B, T)` batch. Unpacks as `inputs, targets`.

    The tensors are on the loader's device. Everything below `cu_seqlens` is plain Python on the host, known before the
    device has finished, so reading it never synchronises.
    """

    inputs: torch.Tensor
    """(B, T) int32: token ids; the beginning-of-sequence id in padding."""
    targets: torch.Tensor
    """(B, T) int64: the next token where it is in the loss, else `ignore_index`."""
    weights: torch.Tensor | None
    """(B, T) float32: loss weight of each target, 0.0 outside the loss. None without `loss_weights`."""
    positions: torch.Tensor | None
    """(B, T) int32: position in the piece, from 0; padding counts as one piece. None unless asked for."""
    doc_ids: torch.Tensor | None
    """(B, T) int32: number of the piece in its row, from 0; -1 in padding. None unless asked for."""
    cu_seqlens: torch.Tensor | None
    """(B * max_pieces + 1,) int32: starts of the pieces in the flattened batch, padding as one piece at a row's end;
    filled up with B * T, so that the length is the same for every batch. None unless asked for."""
    step: int
    """Number of this batch, from 0."""
    num_loss_tokens: int
    """Targets in the loss."""
    num_tokens: int
    """Tokens in `inputs` that are not padding, tails of `document_align` included in the padding."""
    weight_sum: float
    """Exact sum of `weights`; without weights, `num_loss_tokens`."""
    max_seqlen: int
    """Length of the longest piece in `cu_seqlens`, padding included."""
    epoch: int
    """Pass over the data that the reading has reached, from 1 to `epochs` where they are given."""
    progress: float
    """Share of the data consumed (of all `epochs` where they are given)."""
    last: bool
    """True for the batch that reaches the end of the data (of all `epochs` if given) and for every later one."""
    word_pieces: Sequence[tuple[Piece, ...]]
    """For each row its pieces over the T + 1 words that the row is cut from: the word in column T is only a target."""
    work: float = 0.0
    """Cost of its documents by `balance`, each with its last target; 0.0 without."""
    cu_seqlens_real: torch.Tensor | None = None
    """(B * max_pieces + 1,) int32: sums of the real lengths of the same pieces, without the tails of `document_align`;
    padding at a row's end has none. TransformerEngine's `cu_seqlens`, to whose `cu_seqlens_padded` `cu_seqlens` is
    equal. None unless asked for."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yield `inputs` and `targets`."""
        yield self.inputs
        yield self.targets

    def to(self, *_: object, **__: object) -> Batch:
        """Raise TypeError: trainers that move batches have to be given those of an adapter."""
        raise TypeError(
            f"a batch is on its loader's device, {self.inputs.device}, from the start; choose it by Loader(device=). "
            f"Give a trainer not the loader but Batches, of nanopack.adapters.lightning or nanopack.adapters.hf"
        )

    def flat(self) -> Flat:
        """Return the batch as one row, for models that take all pieces end to end: views, nothing is copied.

        Without `doc_ids`: they number the pieces of a row, and here is only one.
        """
        weights = None if self.weights is None else self.weights.view(-1)
        positions = None if self.positions is None else self.positions.view(-1)
        return Flat(self.inputs.view(-1), self.targets.view(-1), weights, positions, self.cu_seqlens, self.max_seqlen)

    @cached_property
    def pieces(self) -> tuple[tuple[Piece, ...], ...]:
        """For each row the pieces in its T columns of `inputs`: conversation, start, length, offset in the document."""
        columns = self.inputs.shape[1]
        return tuple(
            tuple(p._replace(length=min(p.length, columns - p.start)) for p in row if p.start < columns)
            for row in self.word_pieces
        )
