"""Read documents whose tokens are stored: by number, without an object each, and without a look at the words.

    indices of documents   ->   StoreReader.read()   ->   a Chunk whose words stay in the mapped files
    store/                                                arrivals.py, shard.py, as for chunks that reader.py made

It gives what `Reader` gives for the same documents as records. Only of documents that are cut the words are counted.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from nanopack.config import LoaderConfig
from nanopack.conversations.order import Shard
from nanopack.conversations.source import Source
from nanopack.producer.chunk import Chunk, Trouble
from nanopack.producer.reader import UNUSED_WEIGHT, Reader
from nanopack.ring.pieces import Marks
from nanopack.store.store import Documents
from nanopack.tokenizers.tokenizer import AnyTokenizer

# Documents that are looked up together, by all shards.
TOGETHER = 4096


def reader_of(source: Source, tokenizer: AnyTokenizer, config: LoaderConfig, *, resident: bool = False) -> Reader:
    """Return a reader of these data: of documents by number where all are stored in the words of the ring.

    `resident`: the words will be on the device; ValueError where the documents are not so stored, or take words that
    are not in the store.
    """
    if resident and (config.document_align > 1 or "cu_seqlens_real" in config.extras):
        raise ValueError(
            f"resident has no place for the tails of document_align={config.document_align} and for cu_seqlens_real: a "
            f"batch is runs of the store's words; leave out one or the other"
        )
    if all(isinstance(part, Documents) for part in source.parts):
        reader = StoreReader(source, tokenizer, config, resident=resident)
        if reader.fits:
            return reader
    if resident:
        raise ValueError(
            "resident needs documents that are tokens already, all with loss bits or all without: make a store of the "
            "conversations (nanopack tokenize; docs/store.md), or leave it out"
        )
    if config.balance_across and config.world_size > 1:
        raise ValueError(
            "balance_across=True needs the lengths of all ranks' documents, and only a token store knows them without "
            "reading: make one with `nanopack tokenize`, or leave balance_across out, and each shard deals its own rows"
        )
    if config.packing.whole_passes:
        raise ValueError(
            "BestFit(window='all') needs the lengths of all documents beforehand: make a token store of the "
            "conversations with `nanopack tokenize`, and pass its folder; or leave window out"
        )
    return Reader(source, tokenizer, config)


class StoreReader(Reader):
    """Reads documents of stores."""

    def __init__(
        self, source: Source, tokenizer: AnyTokenizer, config: LoaderConfig, *, resident: bool = False
    ) -> None:
        """Raise as `Reader` does."""
        super().__init__(source, tokenizer, config)
        self.layout = dataclasses.replace(self.layout, resident=resident)
        self._stores: list[Any] = list(source.parts)
        self._arrays = [_unsigned(shard) for store in self._stores for shard in store.shards]
        firsts = np.cumsum([0, *(len(store.shards) for store in self._stores)])
        self._first_arrays = firsts.tolist()
        weighted = any(store.weights is not None for store in self._stores)
        self._weighted = weighted
        # who else asks for the tokens in the loss?
        self._counts = resident or config.drops_untrained or config.loss_weights == "conversation"
        # all bits are set already where the store says so, but for documents of weight 0
        has_all = all(store.settings.loss == "all" and not store.all_in_loss for store in self._stores)
        self._mark_all = config.loss == "all" and (weighted or not has_all)
        bare = any(store.all_in_loss for store in self._stores)
        self._mark_all |= bare
        self._bare = tokenizer.vocab_size if bare and all(store.all_in_loss for store in self._stores) else None

    @property
    def arrays(self) -> list[np.ndarray]:
        """The words of all documents, each (n,) of unsigned integers, as `Pieces.arrays` are."""
        return self._arrays

    @property
    def all_in_loss(self) -> bool:
        """Whether every token is in the loss, but for those that are marked."""
        return self._mark_all

    @property
    def bare(self) -> int | None:
        """The size of the vocabulary where the words are bare ids, which nobody has compared with it; else None."""
        return self._bare

    @property
    def mean_length(self) -> float:
        """Mean length of the documents, cut to a row."""
        most = self.config.seq_len + 1
        total = sum(int(np.minimum(store.lengths, most).sum(dtype=np.int64)) for store in self._stores)
        return total / sum(len(store.lengths) for store in self._stores)

    @property
    def marked(self) -> bool:
        """Whether tokens of some documents are taken out of the loss."""
        return not self.config.boundary_loss or (self._weighted and self.config.loss != "all")

    @property
    def fits(self) -> bool:
        """Whether the words can be copied as they are, or with changes to their loss bits that are the same for all."""
        bare = {store.all_in_loss for store in self._stores}
        if len(bare) > 1 and self.config.loss != "all":
            return False
        size = self.layout.word_dtype.itemsize
        return all(
            array.dtype.itemsize == size or (store.all_in_loss and array.dtype.itemsize < size)
            for store in self._stores
            for array in store.shards
        )

    def __reduce__(self) -> tuple[Any, ...]:
        make = functools.partial(StoreReader, resident=self.layout.resident)
        return make, (self.source, self.tokenizer, self.config)

    def check_template(self) -> None:
        """Do nothing: stored documents need no template."""

    def chunks(self, shard: Shard, start: int, stop: int | None, together: int) -> Iterator[Chunk]:
        """Yield the documents of the reads `start` to `stop` - 1 of a shard, `together` at a time; None: endless."""
        while stop is None or start < stop:
            end = start + together if stop is None else min(stop, start + together)
            yield self.read(shard.at(np.arange(start, end, dtype=np.int64)))
            start = end

    def passes(self, shard: Shard, start: int, stop: int | None) -> Iterator[Chunk]:
        """Yield all documents of each pass of a shard, in the data's order, from that of read `start` on."""
        while stop is None or start < stop:
            end = shard.end_of_pass(start)
            if shard.count == 1:
                indices = np.arange(shard.n)
            else:
                reads = range(start, end, TOGETHER)
                parts = [shard.at(np.arange(at, min(end, at + TOGETHER), dtype=np.int64)) for at in reads]
                indices = np.sort(np.concatenate(parts))
            yield self.read(indices)
            start = end

    def read(self, indices: Iterable[int]) -> Chunk:
        """Return the documents of these indices, in this order."""
        found = indices if isinstance(indices, np.ndarray) else np.fromiter(indices, np.int64)
        parts, inner = self.source.find(found)
        num_tokens, starts = np.empty((2, len(found)), np.int64)
        # where nobody asks for them, they cost no memory
        loss_tokens, array = np.broadcast_to(np.int64(0), (2, len(found)))
        if self._counts:
            loss_tokens = np.empty(len(found), np.int64)
        if len(self._arrays) > 1:
            array = np.empty(len(found), np.int64)
        first = np.empty(len(found) if self._counts and not self.config.boundary_loss else 0, bool)
        own = np.ones(len(found)) if self._weighted else None
        for number, store in enumerate(self._stores):
            at: Any = slice(None) if len(self._stores) == 1 else np.flatnonzero(parts == number)
            documents = inner[at]
            num_tokens[at] = store.lengths[documents]
            if self._counts:
                loss_tokens[at] = store.loss_tokens[documents]
            if len(first):
                first[at] = store.first_in_loss[documents]
            shards, starts[at] = store.locate(documents)
            if len(self._arrays) > 1:
                array[at] = shards + self._first_arrays[number]
            if own is not None and store.weights is not None:
                own[at] = store.weights[documents]
        lengths = num_tokens
        if self.config.limits and int(num_tokens.max(initial=0)) > (limit := min(n for _, n in self.config.limits)):
            lengths = np.minimum(num_tokens, limit)
        chunk = Chunk(found, num_tokens, lengths, loss_tokens, own, self._arrays, array, starts, self._troubles(own))
        if self._counts:
            self._count_loss_tokens(chunk, first)
        return chunk

    def _troubles(self, own: np.ndarray | None) -> dict[int, Trouble]:
        if own is None or self.config.loss_weights is not None:
            return {}
        unused = Trouble(ignored_keys=(UNUSED_WEIGHT,))
        return dict.fromkeys(np.flatnonzero((own != 0) & (own != 1)).tolist(), unused)

    def _count_loss_tokens(self, chunk: Chunk, first: np.ndarray) -> None:
        """Make the counts of whole documents those of what is packed of them."""
        config, counts = self.config, chunk.loss_tokens
        if self._mark_all:
            counts[:] = chunk.lengths
            first[:] = True
        elif chunk.lengths is not chunk.num_tokens:
            bit = self.layout.word_dtype.type(self.layout.loss_bit)
            for position in np.flatnonzero((chunk.lengths < chunk.num_tokens) & (counts > 0)).tolist():
                counts[position] = np.count_nonzero(chunk.words(position) >= bit)
        if not config.boundary_loss:
            counts -= first & (counts > 0)
        if chunk.own_weights is not None and config.loss != "all":
            counts[chunk.own_weights == 0] = 0

    def marks(self, own_weights: np.ndarray | None) -> Marks | None:
        """Return the changes to the loss bits of pieces of documents with these weights."""
        without = None
        if own_weights is not None and self.config.loss != "all" and not own_weights.all():
            without = own_weights == 0
        if not self._mark_all and self.config.boundary_loss and without is None:
            return None
        return Marks(self._mark_all, self._bare, first=not self.config.boundary_loss, without=without)

    def words(self, chunk: Chunk, position: int) -> np.ndarray:
        """Return the words of a document as a slot has them."""
        words = chunk.words(position).astype(self.layout.word_dtype)
        own = chunk.own_weights
        if (marks := self.marks(None if own is None else own[position : position + 1])) is None:
            return words
        bit = words.dtype.type(self.layout.loss_bit)
        if marks.all:
            words |= bit
        words[: marks.first] &= ~bit
        return words if marks.without is None else words & ~bit


def _unsigned(words: np.ndarray) -> np.ndarray:
    """Return mapped words as a plain array, whose slices cost less, of unsigned integers."""
    plain = words.view(np.ndarray)
    return plain.view(f"u{plain.dtype.itemsize}") if plain.dtype.kind == "i" else plain
