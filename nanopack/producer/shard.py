"""Walk through one share of the conversations, from document to document, and pack them into rows.

    documents, in order   ->   Lane.next_rows()   ->   rows of runs of words
         reading.py          packing.py says when to read      producer.py brings the lanes together in a slot
                               and what goes where

A rank has one lane, or with shard="row" one for each of its rows. Everything that is read is counted here, and a lane
can tell where it stands and stand there again. No torch, no GPU.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from nanopack.config import LoaderConfig
from nanopack.conversations.order import Share
from nanopack.conversations.records import Source
from nanopack.errors import ConversationError, EncoderError, ProducerError, TemplateError
from nanopack.ledger import Ledger
from nanopack.mixture import Mixture
from nanopack.packing.packers import make_packer
from nanopack.packing.rows import Packer, Row
from nanopack.producer.reader import Read, weigh
from nanopack.ring.layout import Layout
from nanopack.ring.slot import Words

log = logging.getLogger("nanopack")

ReadAll = Callable[[Iterable[int]], Iterator[Read]]


def refuse(read: Read, source: Source, config: LoaderConfig) -> str:
    """Raise what is wrong with a conversation and where it stands, or return that where it is to be skipped."""
    error = read.error
    if not isinstance(error, Exception) or isinstance(error, (MemoryError, TemplateError, EncoderError, ProducerError)):
        raise error or AssertionError("a conversation without document and error")
    what = str(error) if isinstance(error, ConversationError) else f"{type(error).__name__}: {error}"
    what = f"{source.where(read.index)}, {what}"
    if config.on_error == "raise":
        raise ConversationError(f'{what}. Fix it or pass on_error="skip".') from error
    return what


def packer_of(config: LoaderConfig, read: Callable[[], tuple[Any, int] | None]) -> Packer:
    """Return the packer of one lane, which asks for documents by `read`."""
    return make_packer(
        config.packing,
        read,
        batch_size=config.lane_rows,
        seq_len=config.seq_len,
        window=config.window,
        max_age=config.max_age,
        refill=config.refill,
        overlap=config.overlap,
    )


class Lane:
    """One share of the conversations and the packing of it."""

    def __init__(self, number: int, source: Source, config: LoaderConfig, layout: Layout, read_all: ReadAll) -> None:
        """Be lane `number` of all ranks' lanes. `read_all` reads the conversations of these numbers, in order."""
        self.number = number
        self.share = Share(len(source), number, len(config.all_lanes), config.seed)
        self.ledger = Ledger()
        self._source = source
        self._config = config
        self._layout = layout
        self._loss_bit = layout.word_dtype.type(layout.loss_bit)
        self._read_all = read_all
        # a mixture's sources are counted each by itself too
        self._mixture = source if isinstance(source, Mixture) else None
        self.sources = [Ledger() for _ in self._mixture.names] if self._mixture else []
        # conversations that gave no document since the last one that did, and how many readings that took
        self._fruitless: set[int] = set()
        self._in_vain = 0
        self._packer = packer_of(config, self._read)
        self._reading = self._read_from(0)

    def next_rows(self) -> list[Row]:
        """Return the rows of the next batch; at the end of the data fewer than there should be, then none.

        Raises ConversationError for a bad conversation (with on_error="raise"), ValueError where nothing can be packed.
        """
        rows = self._packer.next_rows()
        if self._config.packing == "best_fit_crop":
            self._weigh_what_was_cropped(rows)
        self._count_packer()
        if self._mixture is not None:
            self._count_sources(rows)
        return rows

    def count_slots(self, tokens: int, trained: int) -> None:
        """Count a batch's slots that are this lane's: those with tokens, and the trained targets."""
        slots = self._config.lane_rows * self._config.seq_len
        self.ledger.slots += slots
        self.ledger.slots_tokens += tokens
        self.ledger.slots_padding += slots - tokens
        self.ledger.targets_trained += trained

    @property
    def longest_wait(self) -> int:
        """Most rows that a document has waited so far."""
        return self._packer.longest_wait

    @property
    def epoch(self) -> int:
        """Pass over the data that the reading has reached, from 1."""
        epoch = self.share.epoch(self.ledger.conversations_read)
        # the end of the last pass begins no other
        return min(epoch, self._config.epochs or epoch)

    def progress(self) -> tuple[float, bool]:
        """Return the share of the data consumed, and whether that is all of it."""
        ledger, share, passes = self.ledger, self.share, self._config.epochs or 1
        stream = self._config.packing == "stream"
        done = ledger.conversations_read
        if not stream:
            done = ledger.conversations_packed + ledger.conversations_dropped.total() + ledger.conversations_skipped
        consumed = share.rank + share.world_size * done
        last = consumed >= passes * share.n
        if self._config.epochs is not None:
            return min(1.0, consumed / (passes * share.n)), last
        # nanochat's: the stream tells where it reads, the rows how much they have consumed, past 1 in a second pass
        return (share.place(done) if stream else consumed) / share.n, last

    def state(self) -> dict[str, Any]:
        """Return where the lane stands, as plain data (JSON-able): what waits is told by its reading numbers."""
        return {
            "waiting": [words.read for words in self._packer.held()],
            "digest": self._digest(),
            "packer": self._packer.state(),
            "ledger": self.ledger.state(),
            "sources": [ledger.state() for ledger in self.sources],
        }

    def _digest(self) -> int:
        """Return a checksum of the documents that wait."""
        return zlib.crc32(b"".join(words.checksum for words in self._packer.held()))

    def restore(self, state: dict[str, Any]) -> None:
        """Stand where a lane stood. Only the documents that waited there are read again.

        Raises ValueError where they are not what they were, or the state is none of such a lane.
        """
        self.ledger = Ledger.of(state["ledger"])
        self.sources = [Ledger.of(ledger) for ledger in state["sources"]]
        if state["packer"].keys() != self._packer.state().keys():
            raise ValueError("the state is one of another packing; resume with the packing that the run began with")
        waiting = sorted(set(state["waiting"]))
        reads = self._read_all(self.share.at(np.array(waiting, np.int64)))
        words = {number: self._words_again(number, read) for number, read in zip(waiting, reads, strict=True)}
        held = [(words[number], len(words[number].words)) for number in state["waiting"]]
        self._packer.restore(state["packer"], held)
        # of what is held but not left, the stream has only its last token to give again
        left = dict(self._packer.left())
        for document, length in held:
            document.taken = length - left.get(document, 0)
        if (self._packer.waiting_tokens, self._digest()) != (self.ledger.tokens_waiting, state["digest"]):
            raise ValueError(
                f"the documents that waited had {self.ledger.tokens_waiting} tokens when the state was saved, and have "
                f"{self._packer.waiting_tokens} now, or others: the data or the tokenizer have changed; resume with "
                f"what was used"
            )
        self._reading = self._read_from(self.ledger.conversations_read)

    def _words_again(self, number: int, read: Read) -> Words:
        if read.error is not None:
            raise ConversationError(f"{refuse(read, self._source, self._config)}. It could be read before.")
        if read.words is None:
            raise ValueError(f"{self._source.where(read.index)} has changed: nothing in it is trained any more")
        return Words(number, read.index, read.words, read.weight, read.own_weight)

    def _read_from(self, start: int) -> Iterator[Read]:
        epochs = self._config.epochs
        stop = None if epochs is None else self.share.reads(epochs)
        return self._read_all(self.share.conversations(start, stop))

    def _read(self) -> tuple[Words, int] | None:
        """Read on until a document is good for packing; return it and its length, None at the end of the data."""
        for read in self._reading:
            if (words := self._words_of(self.ledger.conversations_read, read)) is not None:
                self._fruitless.clear()
                self._in_vain = 0
                return words, len(words.words)
            self._give_up_on_nothing(read.index)
        return None

    def _give_up_on_nothing(self, conversation: int) -> None:
        """Raise ValueError where reading on can give no document any more."""
        if self._config.epochs is not None:
            return
        n = self.share.n
        self._in_vain += 1
        self._fruitless.add(conversation)
        # without a shuffle, n readings have been at every conversation that the lane will ever read
        if len(self._fruitless) == n or (self.share.seed is None and self._in_vain >= n):
            raise ValueError(
                f"nothing to pack: in a whole pass over the data ({n} conversations) each one was dropped because "
                f"nothing in it is trained, or skipped as bad; look at the first, or use loss='all'"
            )

    def _words_of(self, number: int, read: Read) -> Words | None:
        """Return what the packing gets of one conversation, None if it is skipped or dropped; count what is lost."""
        ledgers = [self.ledger] if self._mixture is None else [self.ledger, *self._ledger_of(read.index)]
        for ledger in ledgers:
            ledger.conversations_read += 1
        if read.error is not None:
            log.warning("skipped %s", refuse(read, self._source, self._config))
            for ledger in ledgers:
                ledger.conversations_skipped += 1
            return None
        for ledger in ledgers:
            ledger.tokens_read += read.tokens
            if read.cut:
                ledger.tokens_cut.update(read.cut)
            if read.words is None:
                ledger.conversations_dropped["untrained"] += 1
                ledger.tokens_dropped += read.tokens - sum(read.cut.values())
        return None if read.words is None else Words(number, read.index, read.words, read.weight, read.own_weight)

    def _weigh_what_was_cropped(self, rows: list[Row]) -> None:
        """Weigh documents that were placed in part by what was placed."""
        for words, _, length in (run for row in rows for run in row):
            if length < len(words.words):
                trained = int(np.count_nonzero(words.words[:length] >= self._loss_bit))
                words.weight = weigh(self._config, words.own_weight, trained)

    def _ledger_of(self, conversation: int) -> list[Ledger]:
        """Return the ledger of the source that a conversation is from, where there are several."""
        return [self.sources[self._mixture.source_of(conversation)]] if self._mixture else []

    def _count_sources(self, rows: list[Row]) -> None:
        """Count, document by document, what the packer counts in all."""
        for words, offset, length in (run for row in rows for run in row):
            [ledger] = self._ledger_of(words.conversation)
            # the stream gives a token twice where two rows or batches share it
            new = max(0, offset + length - words.taken)
            words.taken += new
            ledger.tokens_emitted += new
            cropped = len(words.words) - length if self._config.packing == "best_fit_crop" else 0
            ledger.tokens_cut["crop"] += cropped
            if new and words.taken + cropped == len(words.words):
                ledger.conversations_packed += 1
        for ledger in self.sources:
            ledger.conversations_waiting = ledger.tokens_waiting = 0
        for words, left in self._packer.left():
            [ledger] = self._ledger_of(words.conversation)
            ledger.conversations_waiting += left > 0
            ledger.tokens_waiting += left

    def _count_packer(self) -> None:
        ledger, packer = self.ledger, self._packer
        ledger.conversations_packed = packer.packed
        ledger.conversations_waiting = packer.waiting_documents
        ledger.tokens_emitted = packer.emitted
        ledger.tokens_waiting = packer.waiting_tokens
        ledger.tokens_cut["crop"] = packer.cropped
