"""Documents as columns: those read together, and those of a shard that are still needed.

    reader.py, stored.py read   ->   Chunk   ->   Live: columns by number of the read   ->   shard.py makes Pieces
                                     arrivals.py counts it

A document is a row of arrays, never an object of its own, so that what it costs in Python does not depend on how many
there are. Its words are somewhere in one of several arrays: those of a chunk, or the mapped files of a token store.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from nanopack.config import LoaderConfig

_NONE = np.empty(0, np.int64)


class Trouble(NamedTuple):
    """What is to be said of a conversation besides its tokens."""

    error: BaseException | None = None
    """What is wrong with it."""
    ignored_keys: tuple[str, ...] = ()
    """Keys of its record that nothing reads."""
    special_token: str = ""
    """A special token of the tokenizer that its plain text spells."""


class Chunk(NamedTuple):
    """Documents that were read together. Arrays are (n,) int64 unless said otherwise."""

    conversations: np.ndarray
    """Index of each in the data set."""
    num_tokens: np.ndarray
    """Before anything was cut; 0 where there is an error."""
    lengths: np.ndarray
    """Afterwards: the words that are packed."""
    loss_tokens: np.ndarray
    """Of these in the loss."""
    own_weights: np.ndarray | None
    """(n,) float64: the conversation's own weight; None: all are 1."""
    arrays: Sequence[np.ndarray]
    """Words: token ids with the loss bit on top, see ring/layout.py."""
    array: np.ndarray
    """In which of the arrays each one's words are."""
    starts: np.ndarray
    """And from where on."""
    troubles: Mapping[int, Trouble] = {}
    """What is to be said of some, by position."""

    def words(self, position: int) -> np.ndarray:
        """Return the words of a document, as they are in its array."""
        start = int(self.starts[position])
        return self.arrays[int(self.array[position])][start : start + int(self.lengths[position])]

    def dropped(self, config: LoaderConfig) -> np.ndarray:
        """Return which documents are dropped because nothing in them is in the loss, (n,) bool."""
        found = self.loss_tokens == 0 if config.drops_untrained else np.zeros(len(self.lengths), bool)
        for position, trouble in self.troubles.items():
            if trouble.error is not None:
                found[position] = False
        return found


def weigh(config: LoaderConfig, own_weights: np.ndarray | None, loss_tokens: np.ndarray) -> np.ndarray | None:
    """Return the loss weight of each token in the loss of some documents, (n,) float32; None where all are 1."""
    if config.loss_weights is None:
        return None
    own = np.ones(len(loss_tokens)) if own_weights is None else own_weights
    if config.loss_weights == "conversation":
        own = np.divide(own, loss_tokens, out=np.zeros(len(own)), where=loss_tokens > 0)
    return own.astype(np.float32)


class Live:
    """Columns of the documents of a shard that wait or are still to come, in the order of reading."""

    def __init__(self) -> None:
        self.numbers = self.conversations = self.lengths = self.loss_tokens = self.array = self.starts = _NONE
        """(n,) int64 each: the number of the read, then as in `Chunk`."""
        self.own_weights: np.ndarray | None = None
        self.arrays: Sequence[np.ndarray] = ()
        self._joined = self._has_no_gap = False
        self._first = 0
        self._new: list[tuple[np.ndarray, np.ndarray | slice, Chunk]] = []
        self._checksums: dict[int, bytes] = {}

    def add(self, first: int, chunk: Chunk, kept: np.ndarray) -> None:
        """Add the documents of a chunk, whose first read has the number `first`; `kept`, (n,) bool, says which."""
        if kept.all():
            self.put(np.arange(first, first + len(kept)), chunk)
        else:
            positions = np.flatnonzero(kept)
            self._new.append((positions + first, positions, chunk))

    def put(self, numbers: np.ndarray, chunk: Chunk) -> None:
        """Add all documents of a chunk, with these numbers, (n,) int64, ascending."""
        self._new.append((numbers, slice(None), chunk))

    def find(self, numbers: np.ndarray) -> np.ndarray:
        """Return the index of documents, given by number, in the columns: (k,) int64."""
        if self._new:
            self._take_in()
        # without a gap, as the stream's are, the numbers say where they stand
        return numbers - self._first if self._has_no_gap else self.numbers.searchsorted(numbers)

    def _look_for_gaps(self) -> None:
        self._first = int(self.numbers[0]) if len(self.numbers) else 0
        self._has_no_gap = len(self.numbers) > 0 and int(self.numbers[-1]) - self._first == len(self.numbers) - 1

    def _take_in(self) -> None:
        new, self._new = self._new, []
        numbers, positions, chunks = zip(*new, strict=True)
        pairs = list(zip(positions, chunks, strict=True))

        def joined(before: np.ndarray, *more: np.ndarray) -> np.ndarray:
            return np.concatenate([before, *more]) if len(before) or len(more) > 1 else more[0]

        weighted = self.own_weights is not None or any(chunk.own_weights is not None for chunk in chunks)
        if weighted:
            own = np.ones(len(self.numbers)) if self.own_weights is None else self.own_weights
            weights = [np.ones(len(c.lengths)) if c.own_weights is None else c.own_weights for c in chunks]
            self.own_weights = joined(own, *(one[at] for one, at in zip(weights, positions, strict=True)))
        self.array = joined(self.array, *self._numbers_of_arrays(pairs))
        for name in ("conversations", "lengths", "loss_tokens", "starts"):
            setattr(self, name, joined(getattr(self, name), *(getattr(chunk, name)[at] for at, chunk in pairs)))
        self.numbers = joined(self.numbers, *numbers)
        self._look_for_gaps()

    def _numbers_of_arrays(self, pairs: Sequence[tuple[np.ndarray | slice, Chunk]]) -> Iterator[np.ndarray]:
        """Yield for each chunk in which of the arrays its documents are, and add the arrays that are new."""
        for at, chunk in pairs:
            # a store's are always the same
            if chunk.arrays is self.arrays or not self.arrays:
                self.arrays = chunk.arrays
                yield chunk.array[at]
            else:
                yield chunk.array[at] + len(self.arrays)
                self.arrays, self._joined = [*self.arrays, *chunk.arrays], True

    def keep(self, wanted: Sequence[int], since: int) -> None:
        """Forget all documents but those of the numbers `wanted`, ascending, and those from number `since` on."""
        self.find(_NONE)
        keep = self.numbers >= since
        keep[self.numbers.searchsorted(np.asarray(wanted, np.int64))] = True
        for name in ("numbers", "conversations", "lengths", "loss_tokens", "array", "starts"):
            setattr(self, name, getattr(self, name)[keep])
        self._look_for_gaps()
        if self.own_weights is not None:
            self.own_weights = self.own_weights[keep]
        if self._joined:
            # the arrays that hold words of no document any more
            used, self.array = np.unique(self.array, return_inverse=True)
            self.arrays = [self.arrays[number] for number in used.tolist()]
        if self._checksums:
            self._checksums = {number: self._checksums[number] for number in wanted if number in self._checksums}

    def chunk_of(self, index: np.ndarray, lengths: np.ndarray) -> Chunk:
        """Return the documents of these indices in the columns, (k,) int64, cut to these lengths."""
        own = None if self.own_weights is None else self.own_weights[index]
        columns = self.conversations[index], self.lengths[index], lengths, self.loss_tokens[index], own
        return Chunk(*columns, self.arrays, self.array[index], self.starts[index])

    def note_words(self, number: int, words: np.ndarray) -> None:
        """Note the words of a document, for its checksum."""
        self._checksums[number] = checksum(words)

    def digest(self, numbers: Sequence[int]) -> int:
        """Return a checksum of documents, given by number: CRC32 of the CRC32 of each one's words."""
        known, missing = self._checksums, [number for number in set(numbers) if number not in self._checksums]
        at = self.find(np.array(missing, np.int64))
        chunk = self.chunk_of(at, self.lengths[at])
        for position, number in enumerate(missing):
            known[number] = checksum(chunk.words(position))
        return digest_of(known[number] for number in numbers)


def checksum(words: np.ndarray) -> bytes:
    """Return the CRC32 of words, 4 bytes."""
    return zlib.crc32(np.ascontiguousarray(words).data).to_bytes(4, "little")


def digest_of(checksums: Iterable[bytes]) -> int:
    """Return a checksum of documents of these checksums, in this order."""
    return zlib.crc32(b"".join(checksums))
