"""Read one shard of the conversations, document by document, and pack it into rows.

    documents, in order   ->   ShardPacker.next_rows()   ->   rows of runs of documents
         reader.py             packing/ decides when to        producer.py writes the rows of all shards into a slot
                               read and what goes where

A rank has one shard, or with shard="row" one for each of its rows. Everything that is read is counted here, and a shard
can save its state and restore it. No torch, no GPU.
"""

from __future__ import annotations

import logging
import pickle
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np

from nanopack.config import LoaderConfig
from nanopack.conversations.order import Shard
from nanopack.conversations.source import Source
from nanopack.errors import NEVER_SKIPPED, ConversationError, EncoderError
from nanopack.ledger import Ledger
from nanopack.notes import Notes
from nanopack.packing.balance import BalancedPacker
from nanopack.packing.rows import Packer, Row
from nanopack.producer.ahead import changed_error, name_row, plain_rows, reads_in, rows_of
from nanopack.producer.reader import ReadDocument, Reader, weigh

log = logging.getLogger("nanopack")

# A run that skips this many conversations of a shard in a row stops: its data are wrong, not a few of its records.
MOST_SKIPPED_IN_A_ROW = 100
# So does one that has skipped more than half of those read, once it has read this many.
JUDGED_AFTER = 1000

ReadAll = Callable[[Iterable[int]], Iterator[ReadDocument]]
"""Reads the conversations of these indices, in this order."""


def shards_of(config: LoaderConfig, n: int, *, all_ranks: bool = False) -> list[Shard]:
    """Return the shards of n conversations that this rank reads: one, or with shard="row" one for each of its rows.

    With `all_ranks`, the shards of all ranks.
    """
    numbers = config.all_shards if all_ranks else config.shards
    return [Shard(n, number, len(config.all_shards), config.seed) for number in numbers]


def describe_or_raise(document: ReadDocument, source: Source, config: LoaderConfig) -> str:
    """Raise the error of a document, naming its place; with on_error="skip", return that message instead.

    Errors that are not the conversation's fault are always raised as they are.
    """
    error = document.error
    assert error is not None
    if isinstance(error, EncoderError):
        raise EncoderError(f"{source.where(document.conversation)}, {error}") from error
    if not isinstance(error, Exception) or isinstance(error, NEVER_SKIPPED):
        raise error
    what = str(error) if isinstance(error, ConversationError) else f"{type(error).__name__}: {error}"
    what = f"{source.where(document.conversation)}, {what}"
    if config.on_error == "raise":
        raise ConversationError(f'{what}. Fix it or pass on_error="skip".') from error
    return what


class ShardPacker:
    """One shard of the conversations and its packing."""

    def __init__(self, shard: Shard, reader: Reader, read_all: ReadAll, told: set[str] | None = None) -> None:
        """`told` is what the log names once, for all shards together: it grows."""
        self.shard = shard
        self._source = reader.source
        self._config = reader.config
        self._loss_bit = reader.layout.word_dtype.type(reader.layout.loss_bit)
        self._read_all = read_all
        self.sources = [Ledger() for _ in self._source.names or ("",)]
        """What became of the documents, by source of a mixture."""
        self.positions = Ledger()
        """The positions of the batches, which belong to no source."""
        self.notes = Notes()
        self._told: set[str] = set() if told is None else told
        self._num_read = 0
        self._skipped_in_a_row = 0
        # conversations that gave no document since the last one that did, and how many reads that took
        self._fruitless: set[int] = set()
        self._in_vain = 0
        self._packer = self._make_packer()
        self._documents = self._documents_from(0)

    def _make_packer(self) -> Packer | BalancedPacker:
        config = self._config
        packer = config.packing.build(self._next_document, batch_size=config.shard_rows, seq_len=config.seq_len)
        if config.balance is None:
            return packer
        return BalancedPacker(
            packer,
            config.shard_rows,
            cost=config.balance,
            window=config.balance_window or 1,
            seed=config.seed,
            name=self._crop_and_name,
        )

    def _crop_and_name(self, row: Row) -> bytes:
        """Name a row that is packed, and will be delivered later."""
        self._crop_last(row)
        return name_row(row)

    def next_rows(self) -> list[Row]:
        """Return the rows of the next batch; at the end of the data fewer than there should be, then none.

        Raises ConversationError for a bad conversation (with on_error="raise"), ValueError where nothing can be packed.
        """
        rows = self._packer.next_rows()
        for row in rows:
            self._crop_last(row)
        for document, offset, length in chain.from_iterable(rows):
            new = offset + length - document.taken
            # the stream repeats a token that two rows or batches share
            if new > 0:
                document.taken += new
                self.sources[document.source].emit(new, ends=document.taken == len(document.words))
        return rows

    def _crop_last(self, row: Row) -> None:
        """Crop the last document of a row where only a part of it was placed, and count what is cut."""
        if self._config.packing.crops and row and (cut := len(row[-1].document.words) - row[-1].length):
            self.sources[row[-1].document.source].crop(cut)
            self._crop(row[-1].document, row[-1].length)

    def _crop(self, document: ReadDocument, length: int) -> None:
        """Cut a document to the part that was placed, and weigh it by that."""
        document.words = document.words[:length]
        document.weight = weigh(
            self._config, document.own_weight, int(np.count_nonzero(document.words >= self._loss_bit))
        )

    def count_positions(self, tokens: int, loss_tokens: int, work: float) -> None:
        """Count the positions of this shard's rows in a batch: those with tokens, and the targets in the loss.

        `work` is what their documents cost by `balance`.
        """
        positions = self._config.shard_rows * self._config.seq_len
        self.positions.positions += positions
        self.positions.positions_tokens += tokens
        self.positions.positions_padding += positions - tokens
        self.positions.targets_in_loss += loss_tokens
        self.positions.work += work

    @property
    def longest_wait(self) -> int:
        """Most rows that a document has waited so far."""
        return self._packer.longest_wait

    @property
    def passes(self) -> int:
        """Passes over the data that were read to their end."""
        return self.shard.epoch(self._num_read) - 1

    @property
    def epoch(self) -> int:
        """Pass over the data that the reading has reached, from 1."""
        epoch = self.shard.epoch(self._num_read)
        # the end of the last pass does not begin another
        return min(epoch, self._config.epochs or epoch)

    def progress(self) -> tuple[float, bool]:
        """Return the fraction of the data consumed, and whether that is all of it."""
        shard, passes = self.shard, self._config.epochs or 1
        stream = self._config.packing.splits
        done = self._num_read if stream else self._num_read - self._packer.waiting_documents
        consumed = shard.number + shard.count * done
        last = consumed >= passes * shard.n
        if self._config.epochs is not None:
            return min(1.0, consumed / (passes * shard.n)), last
        # as nanochat: the stream reports where it reads, the rows how much they have consumed, past 1 in a second pass
        return (shard.order_index(done) if stream else consumed) / shard.n, last

    def state(self) -> dict[str, Any]:
        """Return the state, as `state_of` completes it. It is made for every batch: to be pickled at once."""
        waiting = self._packer.waiting()
        return {
            # what waits is named by its reads
            "waiting": [document.read for document in waiting],
            "digest": _digest(waiting),
            "packer": self._packer.state(),
            "ledger": vars(self.positions),
            "sources": [vars(ledger) for ledger in self.sources],
            "mixed": bool(self._source.names),
            "notes": vars(self.notes),
            **self._ahead(),
        }

    def _ahead(self) -> dict[str, Any]:
        """Return the rows that are packed and not delivered, batch by batch, as `name_row` names them."""
        if not isinstance(self._packer, BalancedPacker):
            return {}
        return {"ahead": [[held.named for held in batch] for batch in self._packer.ahead()]}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a saved state; only the documents that waited are read again.

        Raises ValueError where they have changed, or the state is of another packing.
        """
        whole = Ledger.of(state["ledger"])
        sources = [Ledger.of(ledger) for ledger in state["sources"]] or [whole.without_positions()]
        if len(sources) != len(self.sources):
            raise ValueError(f"the state is of {len(sources)} sources, and the data have {len(self.sources)}")
        self.sources = sources
        self.positions = whole.only_positions()
        self.notes = Notes.of(state.get("notes", ""))
        self._num_read = whole.conversations_read
        if state["packer"].keys() != self._packer.state().keys():
            raise ValueError("the state is of another packing; resume with the packing that the run began with")
        ahead = state.get("ahead", [])
        numbers = sorted({*state["waiting"], *reads_in(ahead)})
        documents = dict(zip(numbers, self._read_all(self.shard.at(np.array(numbers, np.int64))), strict=True))
        for number, document in documents.items():
            self._check_again(document)
            document.read, document.source = number, self._source.source_of(document.conversation)
        waiting = [(documents[number], len(documents[number].words)) for number in state["waiting"]]
        if isinstance(self._packer, BalancedPacker):
            self._packer.hold(rows_of(ahead, documents, self._crop if self._config.packing.crops else None))
        self._packer.restore(state["packer"], waiting)
        # of a waiting document without remaining tokens, the stream repeats only the last one
        remaining = dict(self._packer.remaining())
        for document, length in waiting:
            document.taken = length - remaining.get(document, 0)
        if (self._packer.waiting_tokens, _digest(self._packer.waiting())) != (whole.tokens_waiting, state["digest"]):
            raise changed_error(whole.tokens_waiting, self._packer.waiting_tokens)
        self._documents = self._documents_from(self._num_read)

    def _check_again(self, document: ReadDocument) -> None:
        if document.error is not None:
            what = describe_or_raise(document, self._source, self._config)
            raise ConversationError(f"{what}. It could be read before.")
        if document.dropped:
            where = self._source.where(document.conversation)
            raise ValueError(f"{where} has changed: nothing in it is in the loss any more")

    def _documents_from(self, read: int) -> Iterator[ReadDocument]:
        epochs = self._config.epochs
        return self._read_all(self.shard.conversations(read, None if epochs is None else self.shard.num_reads(epochs)))

    def _next_document(self) -> tuple[ReadDocument, int] | None:
        """Read until there is a document to pack; return it and its length, None at the end of the data."""
        for document in self._documents:
            if self._accept(document):
                self._fruitless.clear()
                self._in_vain = 0
                return document, len(document.words)
            self._give_up_on_nothing(document.conversation)
        return None

    def _accept(self, document: ReadDocument) -> bool:
        """Count a document, and return whether it is to be packed."""
        document.read = self._num_read
        self._num_read += 1
        document.source = self._source.source_of(document.conversation)
        ledger = self.sources[document.source]
        ledger.conversations_copies += self._source.is_copy(document.conversation)
        if document.error is not None:
            what = describe_or_raise(document, self._source, self._config)
            log.debug("skipped %s", what)
            self.notes.skip(what, self._source.where(document.conversation))
            ledger.skip()
            self._refuse_to_skip_more(what)
            return False
        self._skipped_in_a_row = 0
        if document.ignored_keys or document.special_token:
            self._note(document)
        ledger.read(document.num_tokens, document.cut, dropped=document.dropped)
        return not document.dropped

    def _refuse_to_skip_more(self, what: str) -> None:
        """Raise ConversationError where so much is skipped that hardly anything would be left."""
        self._skipped_in_a_row += 1
        skipped = sum(ledger.conversations_skipped for ledger in self.sources)
        if self._skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            how = f"{self._skipped_in_a_row} conversations in a row were skipped"
        elif self._num_read >= JUDGED_AFTER and 2 * skipped > self._num_read:
            how = f"{skipped} of {self._num_read} conversations were skipped"
        else:
            return
        raise ConversationError(f'{what}. {how}; on_error="skip" is for a few bad ones: repair the data')

    def _note(self, document: ReadDocument) -> None:
        """Count what of a record is not read, and name it in the log where it is new."""
        where, notes = self._source.where(document.conversation), self.notes
        for key in document.ignored_keys:
            notes.ignored_keys[key] = notes.ignored_keys.get(key, 0) + 1
            if key not in self._told:
                self._told.add(key)
                log.warning("%s: nothing reads the key %r; it is named once, and counted in the ledger", where, key)
        if document.special_token:
            notes.texts_with_special_tokens += 1
            if "" not in self._told:
                self._told.add("")
                log.warning(
                    "%s: the text spells the special token %r, which stays text; for the token itself give messages or "
                    "input_ids; it is named once, and counted in the ledger",
                    where,
                    document.special_token,
                )

    def _give_up_on_nothing(self, conversation: int) -> None:
        """Raise ValueError where further reading can give no document any more."""
        if self._config.epochs is not None:
            return
        n = self.shard.n
        self._in_vain += 1
        self._fruitless.add(conversation)
        # without a shuffle, n reads have covered every conversation that the shard will ever read
        if len(self._fruitless) == n or (self.shard.seed is None and self._in_vain >= n):
            raise ValueError(
                f"nothing to pack: in a whole pass over the data ({n} conversations) each one was dropped because "
                f"nothing in it is in the loss, or skipped as bad; look at the first, or use loss='all'"
            )


def _digest(documents: Iterable[ReadDocument]) -> int:
    """Return a checksum of documents that wait."""
    return zlib.crc32(b"".join([document.checksum for document in documents]))


def pack_state(step: int, shards: Iterable[ShardPacker]) -> bytes:
    """Return the state after `step` batches, pickled: it is made for every batch, and few are ever looked at."""
    return pickle.dumps((step, {str(packer.shard.number): packer.state() for packer in shards}))


def state_of(packed: bytes) -> dict[str, Any]:
    """Return a packed state as plain data (JSON-able): {"step", "lanes": {number: state of the shard}}.

    Keys as state.py describes them.
    """
    step, shards = pickle.loads(packed)
    for shard in shards.values():
        shard["ledger"] = Ledger.total(map(Ledger.of, (shard["ledger"], *shard["sources"]))).state()
        if not shard.pop("mixed"):
            shard["sources"] = []
        if "ahead" in shard:
            shard["ahead"] = plain_rows(shard["ahead"])
        shard["notes"] = Notes(**shard["notes"]).dump()
    return {"step": step, "lanes": shards}
