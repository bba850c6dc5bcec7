"""Pack one shard of the conversations into rows.

    documents, in order   ->   ShardPacker.next_rows()   ->   Rows of the next batch   ->   pieces_of(), of several
     arrivals.py               packing/ decides when to       placed.py counts them         producer.py writes those of
                               read and what goes where                                     all shards into slots

A rank has one shard, or with shard="row" one for each of its rows. A shard can save its state and restore it. No torch,
no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from nanopack.config import LoaderConfig
from nanopack.conversations.order import Shard, permute
from nanopack.errors import ConversationError
from nanopack.ledger import Ledger
from nanopack.notes import Notes
from nanopack.packing.align import build
from nanopack.packing.balance import BalancedPacker
from nanopack.packing.holding import HoldingPacker
from nanopack.packing.rows import Packer, Rows
from nanopack.producer.ahead import changed_error, rows_of
from nanopack.producer.arrivals import Arrivals, describe_or_raise
from nanopack.producer.chunk import Chunk, Live, weigh
from nanopack.producer.placed import Placed
from nanopack.producer.reader import Reader
from nanopack.producer.stored import TOGETHER, StoreReader
from nanopack.ring.pieces import Pieces

ReadAll = Callable[[Iterable[int]], Iterator[Chunk]]
"""Reads the conversations of these indices, in this order."""


def shards_of(config: LoaderConfig, n: int, *, all_ranks: bool = False) -> list[Shard]:
    """Return the shards of n conversations that this rank reads: one, or with shard="row" one for each of its rows.

    With `all_ranks`, the shards of all ranks.
    """
    numbers = config.all_shards if all_ranks else config.shards
    return [Shard(n, number, len(config.all_shards), config.seed) for number in numbers]


class ShardPacker:
    """One shard of the conversations and its packing."""

    def __init__(self, shard: Shard, reader: Reader, read_all: ReadAll, logged: set[str] | None = None) -> None:
        """`logged` is what the log names once, for all shards together: it grows."""
        self.shard = shard
        self._reader = reader
        self._source = reader.source
        self._config = reader.config
        self._loss_bit = reader.layout.word_dtype.type(reader.layout.loss_bit)
        self._read_all = read_all
        self._live = Live()
        self._arrivals = Arrivals(shard, reader.source, reader.config, self._live, set() if logged is None else logged)
        self._placed = Placed(self._arrivals, reader, self._live)
        self.positions = Ledger()
        """The positions of the batches, which belong to no source."""
        self._packer = self._make_packer()
        self._whole_passes = self._config.packing.whole_passes
        # documents that were left when some were last forgotten
        self._kept = 0
        self._arrivals.start(self._chunks_from(0), 0, 0)

    def _make_packer(self) -> Packer | HoldingPacker:
        config = self._config
        packer = build(
            *(config.packing, self._arrivals.read),
            batch_size=config.shard_rows,
            seq_len=config.seq_len,
            align=config.document_align,
            shuffle=None if self.shard.seed is None else self._shuffle,
        )
        if config.balance is None:
            return packer
        if config.balance_across:
            return HoldingPacker(packer, on_packed=self._placed.count_cropped)
        return BalancedPacker(
            packer,
            config.shard_rows,
            cost=config.balance,
            window=config.balance_window or 1,
            seed=config.seed,
            on_packed=self._placed.count_cropped,
        )

    def _shuffle(self, places: np.ndarray, n: int | np.ndarray, first: int) -> np.ndarray:
        """Return which of n things of a pass come at these places; see `packing.whole_pass`."""
        assert self.shard.seed is not None
        return permute(places, n, self.shard.seed, np.full(len(places), self.shard.pass_of(first)))

    def _chunks_from(self, read: int) -> Iterator[Chunk]:
        epochs = self._config.epochs
        stop = None if epochs is None else self.shard.num_reads(epochs)
        if isinstance(self._reader, StoreReader):
            if self._whole_passes:
                return self._reader.passes(self.shard, read, stop)
            return self._reader.chunks(self.shard, read, stop, max(64, TOGETHER // len(self._config.shards)))
        return self._read_all(self.shard.conversations(read, stop))

    def next_rows(self) -> Rows:
        """Return the rows of the next batch; at the end of the data fewer than there should be, then none.

        Raises ConversationError for a bad conversation (with on_error="raise"), ValueError where nothing can be packed.
        """
        packer = self._packer
        rows = packer.next_rows()
        self._arrivals.settle(packer.packed + packer.waiting_documents)
        if self._config.packing.crops and packer is not self.holding:
            self._placed.count_cropped(rows)
        self._placed.count(rows)
        return rows

    def forget(self) -> None:
        """Forget the documents that no later rows need, from time to time: `pieces_of` does not find them any more."""
        live, since = self._live, self._arrivals.num_read
        if len(live.numbers) > 2 * self._kept + TOGETHER:
            live.keep(self._needed(), self.shard.start_of_pass(max(0, since - 1)) if self._whole_passes else since)
            self._kept = len(live.numbers)

    def pieces_of(self, rows: Rows) -> Pieces:
        """Return rows of `next_rows` with what is known of their documents."""
        live = self._live
        at = live.find(rows.documents)
        own_weights = None if live.own_weights is None else live.own_weights[at]
        loss_tokens = live.loss_tokens[at] if self._config.loss_weights == "conversation" else at
        splits = self._config.packing.splits
        pieces = Pieces(
            lengths=rows.lengths,
            offsets=rows.offsets,
            bounds=rows.bounds,
            conversations=live.conversations[at],
            weights=weigh(self._config, own_weights, loss_tokens),
            arrays=live.arrays,
            array=live.array[at] if len(live.arrays) > 1 else None,
            starts=live.starts[at] + rows.offsets if splits else live.starts[at],
            marks=self._reader.marks(own_weights),
            loss_tokens=self._known_loss_tokens(rows, at) if self._reader.layout.resident else None,
        )
        if self._config.packing.crops:
            self._weigh_cropped(rows, at, pieces)
        return pieces

    def _known_loss_tokens(self, rows: Rows, at: np.ndarray) -> np.ndarray:
        """Return the tokens in the loss of pieces that are whole documents, -1 for others: (P,) int64."""
        return np.where(rows.lengths == self._live.lengths[at], self._live.loss_tokens[at], -1)

    @property
    def holding(self) -> HoldingPacker | None:
        """The packer, where it is ahead of what it delivers: with `balance`."""
        return self._packer if isinstance(self._packer, HoldingPacker) else None

    def _needed(self) -> list[int]:
        """Return the documents that later rows need, ascending."""
        if self.holding is None:
            return self._packer.waiting()
        return sorted([*self._packer.waiting(), *self.holding.documents_ahead().tolist()])

    def _weigh_cropped(self, rows: Rows, at: np.ndarray, pieces: Pieces) -> None:
        """Weigh documents of which a part was placed by that part."""
        live = self._live
        for piece in np.flatnonzero(live.lengths[at] - rows.lengths).tolist():
            if pieces.weights is not None:
                index = at[piece : piece + 1]
                words = self._reader.words(live.chunk_of(index, rows.lengths[piece : piece + 1]), 0)
                count = np.array([np.count_nonzero(words >= self._loss_bit)])
                own = None if live.own_weights is None else live.own_weights[index]
                pieces.weights[piece : piece + 1] = weigh(self._config, own, count)

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
    def notes(self) -> Notes:
        """What was skipped and ignored."""
        return self._arrivals.notes

    @property
    def longest_wait(self) -> int:
        """Most rows that a document has waited so far."""
        return self._packer.longest_wait

    @property
    def passes(self) -> int:
        """Passes over the data that were read to their end."""
        return self.shard.epoch(self._arrivals.num_read) - 1

    @property
    def epoch(self) -> int:
        """Pass over the data that the reading has reached, from 1."""
        epoch = self.shard.epoch(self._arrivals.num_read)
        # the end of the last pass does not begin another
        return min(epoch, self._config.epochs or epoch)

    def progress(self) -> tuple[float, bool]:
        """Return the fraction of the data consumed, and whether that is all of it."""
        shard, passes, read = self.shard, self._config.epochs or 1, self._arrivals.num_read
        stream = self._config.packing.splits
        done = read if stream else read - self._packer.waiting_documents
        consumed = shard.number + shard.count * done
        last = consumed >= passes * shard.n
        if self._config.epochs is not None:
            return min(1.0, consumed / (passes * shard.n)), last
        # as nanochat: the stream reports where it reads, the rows how much they have consumed, past 1 in a second pass
        return (shard.order_index(done) if stream else consumed) / shard.n, last

    def state(self) -> dict[str, Any]:
        """Return the state without `positions`, as `pack_states` takes it: it is made for every batch."""
        waiting = self._packer.waiting()
        return {
            # what waits is named by its reads
            "waiting": waiting,
            # of stored documents it can be found whenever it is asked for
            "digest": None if isinstance(self._reader, StoreReader) else self._live.digest(waiting),
            "packer": self._packer.state(),
            "sources": [ledger.state() for ledger in self._arrivals.sources],
            "mixed": bool(self._source.names),
            "notes": self.notes.state(),
            **({} if self.holding is None else {"ahead": self.holding.ahead()}),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a saved state; only the documents that waited are read again.

        Raises ValueError where they have changed, or the state is of another packing.
        """
        whole, arrivals = Ledger.of(state["ledger"]), self._arrivals
        sources = [Ledger.of(ledger) for ledger in state["sources"]] or [whole.without_positions()]
        if len(sources) != len(arrivals.sources):
            raise ValueError(f"the state is of {len(sources)} sources, and the data have {len(arrivals.sources)}")
        arrivals.sources = sources
        self.positions = whole.only_positions()
        arrivals.notes = Notes.of(state.get("notes", ""))
        if state["packer"].keys() != self._packer.state().keys():
            raise ValueError("the state is of another packing; resume with the packing that the run began with")
        if self._whole_passes:
            return self._restore_pass(state, whole)
        ahead = rows_of(state.get("ahead", ()))
        digest = self._read_again(state["waiting"], {read for rows in ahead for read in rows.documents.tolist()})
        lengths = self._live.lengths[self._live.find(np.array(state["waiting"], np.int64))].tolist()
        if self.holding is not None:
            self._check_ahead(ahead)
            self.holding.hold(ahead)
        self._packer.restore(state["packer"], list(zip(state["waiting"], lengths, strict=True)))
        if self._config.packing.splits and state["waiting"]:
            self._placed.resume(state["waiting"][0], self._packer.remaining())
        if (self._packer.waiting_tokens, digest) != (whole.tokens_waiting, state["digest"]):
            raise changed_error(whole.tokens_waiting, self._packer.waiting_tokens)
        read, taken = whole.conversations_read, self._packer.packed + self._packer.waiting_documents
        arrivals.start(self._chunks_from(read), read, taken)

    def _restore_pass(self, state: dict[str, Any], whole: Ledger) -> None:
        """Restore a state in the middle of a pass: plan it again."""
        read, arrivals = whole.conversations_read, self._arrivals
        start = self.shard.start_of_pass(max(0, state["packer"]["first"]))
        arrivals.start(self._chunks_from(start), start, 0, counted=read)
        self._packer.restore(state["packer"], [])
        arrivals.took(self._packer.packed + self._packer.waiting_documents)
        if self._packer.waiting_tokens != whole.tokens_waiting:
            raise ValueError(
                f"{whole.tokens_waiting} tokens waited when the state was saved, and {self._packer.waiting_tokens} do "
                f"now: the data or the tokenizer have changed; resume with what was used"
            )

    def _check_ahead(self, ahead: list[Rows]) -> None:
        """Raise ValueError where a document in these rows has another length now."""
        for rows in ahead:
            known = self._live.lengths[self._live.find(rows.documents)]
            if ((known < rows.lengths) if self._config.packing.crops else (known != rows.lengths)).any():
                raise changed_error(int(rows.lengths.sum()), int(known.sum()))

    def _read_again(self, waiting: list[int], in_rows: set[int]) -> int:
        """Read the documents that waited, given by number, and those in rows; return the digest of the former."""
        numbers = np.array(sorted({*waiting, *in_rows}), np.int64)
        conversations, done = self.shard.at(numbers), 0
        chunks = [self._reader.read(conversations)] if isinstance(self._reader, StoreReader) else None
        for chunk in self._read_all(conversations.tolist()) if chunks is None else chunks:
            self._check_again(chunk)
            own = numbers[done : done + len(chunk.lengths)]
            self._live.put(own, chunk)
            for position, number in enumerate(own.tolist()):
                self._live.note_words(number, self._reader.words(chunk, position))
            done += len(own)
        return self._live.digest(waiting)

    def _check_again(self, chunk: Chunk) -> None:
        for position, trouble in chunk.troubles.items():
            if trouble.error is not None:
                conversation = int(chunk.conversations[position])
                what = describe_or_raise(trouble.error, conversation, self._source, self._config)
                raise ConversationError(f"{what}. It could be read before.")
        if (dropped := chunk.dropped(self._config)).any():
            where = self._source.where(int(chunk.conversations[int(dropped.argmax())]))
            raise ValueError(f"{where} has changed: nothing in it is in the loss any more")
