"""Read one rank's conversations, render them, and fill slots with batches.

    documents, in order   ->   Producer.produce(slot)   ->   a filled slot, and its facts
         reading.py          packing.py says when to read         ring.py
                               and what goes where

It holds the words of the documents that wait, and counts everything into the ledger. No torch, no GPU.
"""

from __future__ import annotations

import itertools
import logging
import pickle
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from nanopack.conversations import ConversationError, Share, Source
from nanopack.ledger import Ledger
from nanopack.packing import Run, make_packer
from nanopack.reading import Read, read_documents
from nanopack.recipe import Recipe
from nanopack.render import Document, make_renderer
from nanopack.ring import FILLING, READING, Filled, Layout, Signs, Slot, Words
from nanopack.tokenizers import AnyTokenizer

log = logging.getLogger("nanopack")


class Produced(NamedTuple):
    """A batch in a slot: what the host knows of it, and how far the data are read. See `Batch`."""

    filled: Filled
    epoch: int
    progress: float
    last: bool
    longest_wait: int
    """Most rows that a document has waited so far."""
    books: bytes
    """The ledger as it stands with this batch delivered, pickled: few ask for it."""


class Producer:
    """Fills slots with the batches of a recipe, one after the other."""

    def __init__(
        self, source: Source, tokenizer: AnyTokenizer, recipe: Recipe, *, threads: int = 0, signs: Signs | None = None
    ) -> None:
        """Raise ValueError where the tokenizer does not go with the template. See `read_documents` for `threads`.

        What the producer is at is told by `signs`, if anybody looks.
        """
        self._signs = signs
        self.source = source
        self.recipe = recipe
        self.layout = Layout.of(recipe, tokenizer.vocab_size)
        self.share = Share(len(source), recipe.rank, recipe.world_size)
        self.render = make_renderer(tokenizer, recipe.template)
        reads: Iterable[int] = itertools.count() if recipe.epochs is None else range(self.share.reads(recipe.epochs))
        indexes = map(self.share.conversation, reads)
        self._reading = read_documents(source, self.render, indexes, threads)
        self._fruitless = 0
        self._documents: dict[int, Words] = {}
        self._packer = make_packer(
            recipe.packing,
            self._read,
            batch_size=recipe.batch_size,
            seq_len=recipe.seq_len,
            window=recipe.window,
            max_age=recipe.max_age,
            refill=recipe.refill,
            overlap=recipe.overlap,
        )
        self._ledger = Ledger()

    def produce(self, slot: Slot) -> Produced | None:
        """Fill the slot with the next batch; return None, and leave it alone, at the end of the data.

        Raises ConversationError for a bad conversation (with on_error="raise"), ValueError where nothing can be packed.
        """
        rows = self._packer.next_rows()
        if not rows:
            self._count_packer()
            return None
        if self.recipe.packing == "best_fit_crop":
            self._cut_what_was_cropped([run for row in rows for run in row])
        if self._signs is not None:
            self._signs.say(FILLING)
        filled = slot.fill(rows, self._documents)
        self._forget({run.document for row in rows for run in row})
        self._count_slots(filled)
        self._count_packer()
        progress, last = self._progress()
        return Produced(
            filled=filled,
            epoch=self.share.epoch(self._ledger.conversations_read),
            progress=progress,
            last=last,
            longest_wait=self._packer.longest_wait,
            books=self.books(),
        )

    def books(self) -> bytes:
        """Return the ledger after the last call of `produce`, pickled."""
        return pickle.dumps(self._ledger)

    def _read(self) -> tuple[int, int] | None:
        """Read on until a document is good for packing; return its number and length, None at the end of the data."""
        while (read := self._read_on()) is not None:
            number = self._ledger.conversations_read
            self._ledger.conversations_read += 1
            if (words := self._words_of(read)) is not None:
                self._fruitless = 0
                self._documents[number] = words
                return number, len(words.words)
            self._fruitless += 1
            if self.recipe.epochs is None and self._fruitless >= self.share.n:
                raise ValueError(
                    f"nothing to pack: in a whole pass over the data ({self.share.n} conversations) each one was "
                    f"dropped because nothing in it is trained, or skipped as bad; look at the first, or use loss='all'"
                )
        return None

    def _read_on(self) -> Read | None:
        if self._signs is not None:
            self._signs.say(READING, self.share.conversation(self._ledger.conversations_read))
        return next(self._reading, None)

    def _words_of(self, read: Read) -> Words | None:
        """Return what the packing gets of one conversation, None if it is skipped or dropped; count what is lost."""
        if read.document is None:
            self._refuse(read)
            return None
        ids, mask = self._cut(read.document)
        trained = int(np.count_nonzero(mask))
        if self.recipe.drops_untrained and not trained:
            self._ledger.conversations_dropped["untrained"] += 1
            self._ledger.tokens_dropped += len(ids)
            return None
        words = ids.astype(self.layout.word_dtype)
        words[mask] |= words.dtype.type(self.layout.loss_bit)
        return Words(read.index, words, self._weight(read.weight, trained), read.weight)

    def _refuse(self, read: Read) -> None:
        """Skip a bad conversation, or raise what is wrong with it and where it stands."""
        error = read.error
        if not isinstance(error, Exception) or isinstance(error, MemoryError):
            raise error or AssertionError("a conversation without document and error")
        what = str(error) if isinstance(error, ConversationError) else f"{type(error).__name__}: {error}"
        if self.recipe.on_error == "raise":
            where = self.source.where(read.index)
            raise ConversationError(f'{where}, {what}. Fix it or pass on_error="skip".') from error
        self._ledger.conversations_skipped += 1
        log.warning("skipped %s, %s", self.source.where(read.index), what)

    def _cut(self, document: Document) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and loss bits of what is left after cutting."""
        recipe, ledger = self.recipe, self._ledger
        length = len(document.ids)
        ledger.tokens_read += length
        limits = {"max_tokens": recipe.max_tokens, "seq_len": recipe.row_tokens if recipe.cuts_to_row else None}
        for reason, limit in limits.items():
            if limit is not None and length > limit:
                ledger.tokens_cut[reason] += length - limit
                length = limit
        mask = np.ones(length, bool) if recipe.loss == "all" else document.mask[:length].copy()
        if not recipe.boundary_loss:
            mask[0] = False
        return document.ids[:length], mask

    def _weight(self, conversation_weight: float, trained: int) -> float:
        if self.recipe.weights == "conversation":
            return conversation_weight / trained if trained else 0.0
        return 1.0 if self.recipe.weights is None else conversation_weight

    def _cut_what_was_cropped(self, runs: list[Run]) -> None:
        """Weigh documents that were placed in part by what was placed."""
        for run in runs:
            words = self._documents[run.document]
            if run.length < len(words.words):
                trained = int(np.count_nonzero(words.words[: run.length] >= self.layout.loss_bit))
                words.weight = self._weight(words.conversation_weight, trained)

    def _forget(self, documents: set[int]) -> None:
        held = self._packer.held
        for document in documents:
            if document not in held:
                del self._documents[document]

    def _progress(self) -> tuple[float, bool]:
        """Return the share of the data consumed, and whether that is all of it."""
        ledger, share, passes = self._ledger, self.share, self.recipe.epochs or 1
        stream = self.recipe.packing == "stream"
        done = ledger.conversations_read
        if not stream:
            done = ledger.conversations_packed + ledger.conversations_dropped.total() + ledger.conversations_skipped
        consumed = share.rank + share.world_size * done
        last = consumed >= passes * share.n
        if self.recipe.epochs is not None:
            return min(1.0, consumed / (passes * share.n)), last
        # nanochat's: the stream tells where it reads, the rows how much they have consumed, past 1 in a second pass
        return (share.conversation(done) if stream else consumed) / share.n, last

    def _count_slots(self, filled: Filled) -> None:
        slots = self.recipe.batch_size * self.recipe.seq_len
        self._ledger.slots += slots
        self._ledger.slots_tokens += filled.num_tokens
        self._ledger.slots_padding += slots - filled.num_tokens
        self._ledger.targets_trained += filled.num_trained

    def _count_packer(self) -> None:
        ledger, packer = self._ledger, self._packer
        ledger.conversations_packed = packer.packed
        ledger.conversations_waiting = packer.waiting_documents
        ledger.tokens_emitted = packer.emitted
        ledger.tokens_waiting = packer.waiting_tokens
        if packer.cropped:
            ledger.tokens_cut["crop"] = packer.cropped
