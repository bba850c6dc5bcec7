"""Fill slots with batches: the rows of all shards of a rank, one below the other.

    rows of every shard   ->   Producer.produce(slot)   ->   a filled slot, and BatchFacts
         shard.py                                             ring/

No torch, no GPU.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from functools import partial
from math import fsum
from typing import Any, NamedTuple

import numpy as np

from nanopack.notes import Notes
from nanopack.packing.balance import costs_of
from nanopack.packing.rows import Rows, joined
from nanopack.producer.across import AcrossRanks
from nanopack.producer.counting import BackgroundCount, counting
from nanopack.producer.packed_state import PackedState, pack_position, pack_states
from nanopack.producer.reader import Reader, read_in_turn
from nanopack.producer.shard import ReadAll, ShardPacker, shards_of
from nanopack.producer.start import DEFAULT_START_METHOD, StartMethod
from nanopack.producer.stored import StoreReader
from nanopack.producer.workers import Workers
from nanopack.ring.facts import BatchFacts
from nanopack.ring.pieces import Pieces, stack
from nanopack.ring.ring import COUNTING, FILLING, READING, ProducerStatus
from nanopack.ring.slot import Slot
from nanopack.ring.table import TableSlot

log = logging.getLogger("nanopack")

# Batches that are planned together, so that what numpy costs a call is shared.
TOGETHER = 16


class Start(NamedTuple):
    """Where a producer starts, and what is known beforehand."""

    state: dict[str, Any] | None = None
    """State of another producer, to resume from."""
    batches: int | None = None
    """Of the rank that has most of them, with `epochs`."""


FROM_THE_BEGINNING = Start()


class _Planned(NamedTuple):
    """A batch that is still to be written into a slot."""

    has_rows: bool
    """False at the end of the data."""
    laid: Any
    """For `fill` of a slot."""
    works: list[float]
    """The cost, by `balance`, of each shard's documents."""
    facts: dict[str, Any]
    """Of `BatchFacts`."""
    number: int
    """Of those planned together."""


class Producer:
    """Fills slots with the batches of one rank, one after the other."""

    def __init__(
        self,
        reader: Reader,
        start: Start = FROM_THE_BEGINNING,
        *,
        workers: int = 0,
        method: StartMethod = DEFAULT_START_METHOD,
        status: ProducerStatus | None = None,
    ) -> None:
        """Raise as `ShardPacker.restore` does.

        With `workers`, that many processes, started by `method`, read ahead; with 0, conversations are read here when
        they are needed. The stage of the work is reported to `status`; without one this is the trainer's own process,
        where Ctrl-C is raised at once.
        """
        self._config = reader.config
        self._reader = reader
        self._status = status
        self._reading = READING
        self._on_chunk = None if status is None else self._say_what_is_read
        self._workers = Workers(workers, reader, self._on_chunk, method) if workers else None
        logged: set[str] = set()
        read_all = self._read_all()
        across = self._config.balance_across
        self._shards = [
            ShardPacker(shard, reader, read_all, logged)
            for shard in shards_of(self._config, len(reader.source), all_ranks=across)
        ]
        self._own = [packer for packer in self._shards if packer.shard.number in self._config.shards]
        holding = [packer.holding for packer in self._shards if packer.holding is not None]
        self._across = AcrossRanks(self._config, holding) if across else None
        self._step = 0
        self._together = TOGETHER if isinstance(reader, StoreReader) else 1
        self._planned: deque[_Planned] = deque()
        self._count = BackgroundCount(lambda: counting(reader, read_all, all_ranks=True), start.batches)
        if start.state is not None:
            self._step = start.state["step"]
            for packer in self._shards:
                packer.restore(start.state["lanes"][str(packer.shard.number)])
        self._passes, self._skipped = self._count_passes(), self._notes().num_skipped

    def produce(self, slot: Slot | TableSlot) -> BatchFacts | None:
        """Fill the slot with the next batch; at the end of the data return None, and leave the slot as it is.

        Where another rank has more batches than this one, batches of padding follow, so that all deliver equally many.
        Raises as `ShardPacker.next_rows` and `Reader.check_files` do.
        """
        self._reader.check_files()
        if not self._planned:
            self._plan(slot)
        self._last = planned = self._planned.popleft()
        if not planned.has_rows and (self._across is not None or self._step >= self._batches_of_the_longest()):
            return None
        if self._status is not None:
            self._status.set(FILLING)
        known, filled = planned.laid.known, slot.fill(planned.laid)
        for packer, *counts in zip(self._own, known.tokens, filled.loss_tokens, planned.works, strict=True):
            packer.count_positions(*counts)
        self._step += 1
        states, state = self.packed_state()
        num_loss_tokens = sum(filled.loss_tokens)
        return BatchFacts(
            slot=slot.number,
            used_bytes=filled.used_bytes,
            num_loss_tokens=num_loss_tokens,
            num_tokens=sum(known.tokens),
            weight_sum=float(num_loss_tokens) if filled.weight_sum is None else filled.weight_sum,
            max_seqlen=known.max_seqlen,
            pieces=known.pieces,
            pieces_per_row=known.pieces_per_row,
            states=states,
            state=state,
            **planned.facts,
        )

    def _plan(self, slot: Slot | TableSlot) -> None:
        """Plan the next batches: several of stored documents, which are known without reading, else one.

        They are for slots like this one.
        """
        parts: list[list[Rows]] = []
        facts, states = list[dict[str, Any]](), list[dict[str, Any]]()
        there_is_more = True
        while there_is_more and len(parts) < self._together:
            there_is_more = self._across is not None and self._across.advance()
            parts.append([packer.next_rows() for packer in self._shards])
            there_is_more |= any(rows.num_rows for rows in parts[-1])
            facts.append(self._facts())
            states.append({str(packer.shard.number): packer.state() for packer in self._own})
        self._report_passes()
        pieces = self._pieces_of(parts)
        works = self._works(pieces, len(parts) * len(self._own))
        of_batches = works if len(self._own) == 1 else self._works(pieces, len(parts))
        for packer in self._shards:
            packer.forget()
        self._states = pack_states(states)
        shards = len(self._own)
        laid = slot.lay_out(pieces, len(parts), shards)
        for batch, (one, of_batch, work) in enumerate(zip(laid, facts, of_batches, strict=True)):
            has_rows = there_is_more or batch < len(parts) - 1
            its_works = works[batch * shards : (batch + 1) * shards]
            self._planned.append(_Planned(has_rows, one, its_works, {**of_batch, "work": work}, batch))

    def _facts(self) -> dict[str, Any]:
        """Return the facts of the batch whose rows the packers gave last, by the names of `BatchFacts`."""
        progress, last = zip(*(packer.progress() for packer in self._shards), strict=True)
        return {
            "epoch": max(packer.epoch for packer in self._shards),
            "progress": fsum(progress) / len(progress),
            "last": all(last),
            "longest_wait_rows": max(packer.longest_wait for packer in self._shards),
        }

    def _pieces_of(self, parts: Sequence[Sequence[Rows]]) -> Pieces:
        """Return the rows of this rank's batches, one below the other, of the rows of each batch and shard."""
        if self._across is not None:
            found = [packer.pieces_of(joined(rows)) for packer, *rows in zip(self._shards, *parts, strict=True)]
            return self._across.own_rows(found, np.array([[rows.num_rows for rows in part] for part in parts]))
        size, shards = self._config.shard_rows, len(self._shards)
        padded = [[rows.padded_to(size) for rows in part] for part in parts]
        pieces = stack([packer.pieces_of(joined(rows)) for packer, *rows in zip(self._shards, *padded, strict=True)])
        if shards == 1 or len(parts) == 1:
            return pieces
        return pieces.chosen(np.arange(pieces.num_rows).reshape(shards, -1, size).swapaxes(0, 1).ravel())

    def _works(self, pieces: Pieces, parts: int) -> list[float]:
        """Return the cost, by `balance`, of the documents in each of `parts` equal parts of the rows."""
        if self._config.balance is None:
            return [0.0] * parts
        bounds = pieces.bounds[:: pieces.num_rows // parts]
        found: list[float] = costs_of(pieces.lengths, bounds, self._config.balance).tolist()
        return found

    def packed_state(self) -> PackedState:
        """Return the state after the last call of `produce`."""
        return PackedState(self._states, pack_position(self._step, self._last.number, self._own))

    def _count_passes(self) -> int:
        return min(packer.passes for packer in self._shards)

    def _notes(self) -> Notes:
        return Notes.total(packer.notes for packer in self._shards)

    def _report_passes(self) -> None:
        """At the end of a pass, log what was skipped where there is more of it, and finish the cache."""
        if (passes := self._count_passes()) == self._passes:
            return
        self._passes = passes
        if self._reader.cache is not None:
            self._reader.cache.finish()
        if (notes := self._notes()).num_skipped > self._skipped:
            self._skipped = notes.num_skipped
            log.warning("%s", notes.describe_skipped())

    def _batches_of_the_longest(self) -> int:
        """Return the number of batches of the rank with most of them. Called when this one has no more."""
        if self._config.world_size == 1:
            return self._step
        self._reading = COUNTING
        return self._count.wait()

    def count_on(self) -> bool:
        """Use idle time to count the batches of all ranks, for the end; return False where none is left."""
        if self._config.epochs is None or self._config.world_size == 1 or self._across is not None:
            return False
        self._reading = COUNTING
        counted = self._count.advance()
        self._reading = READING
        return counted

    def _say_what_is_read(self, conversation: int) -> None:
        assert self._status is not None
        self._status.set(self._reading, conversation)

    def _read_all(self) -> ReadAll:
        """Return the reading of conversations.

        In the trainer's process it does not refer to this, which would be a cycle: mapped files would stay open until
        the next garbage collection.
        """
        config, own = self._config, self._status is None
        if self._workers is not None:
            return partial(self._workers.read_all, shards=len(config.shards))
        tokens = config.shard_rows * config.seq_len
        return partial(read_in_turn, self._reader, batch_tokens=tokens, on_chunk=self._on_chunk, raise_interrupts=own)


def initial_state(reader: Reader) -> PackedState:
    """Return the state of a producer that has not read anything."""
    shards = shards_of(reader.config, len(reader.source))
    packers = [ShardPacker(shard, reader, lambda indices: iter(())) for shard in shards]
    states = pack_states([{str(packer.shard.number): packer.state() for packer in packers}])
    return PackedState(states, pack_position(0, 0, packers))
