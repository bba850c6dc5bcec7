"""Fill slots with batches: the rows of all shards of a rank, one below the other.

    rows of every shard   ->   Producer.produce(slot)   ->   a filled slot, and BatchFacts
         shard.py                                             ring/

No torch, no GPU.
"""

from __future__ import annotations

import logging
from functools import partial
from math import fsum
from typing import Any, NamedTuple

from nanopack.notes import Notes
from nanopack.packing.balance import costs_of
from nanopack.producer.across import AcrossRanks
from nanopack.producer.counting import BackgroundCount, counting
from nanopack.producer.packed_state import pack_state
from nanopack.producer.reader import Reader, read_in_turn
from nanopack.producer.shard import ReadAll, ShardPacker, shards_of
from nanopack.producer.start import DEFAULT_START_METHOD, StartMethod
from nanopack.producer.workers import Workers
from nanopack.ring.facts import BatchFacts
from nanopack.ring.pieces import Pieces, stack
from nanopack.ring.ring import COUNTING, FILLING, READING, ProducerStatus
from nanopack.ring.slot import Slot
from nanopack.ring.table import TableSlot

log = logging.getLogger("nanopack")


class Start(NamedTuple):
    """Where a producer starts, and what is known beforehand."""

    state: dict[str, Any] | None = None
    """State of another producer, to resume from."""
    batches: int | None = None
    """Of the rank that has most of them, with `epochs`."""


FROM_THE_BEGINNING = Start()


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
        told: set[str] = set()
        read_all = self._read_all()
        across = self._config.balance_across
        self._shards = [
            ShardPacker(shard, reader, read_all, told)
            for shard in shards_of(self._config, len(reader.source), all_ranks=across)
        ]
        self._own = [packer for packer in self._shards if packer.shard.number in self._config.shards]
        holding = [packer.holding for packer in self._shards if packer.holding is not None]
        self._across = AcrossRanks(self._config, holding) if across else None
        self._step = 0
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
        size = self._config.shard_rows
        there_is_more = self._across is not None and self._across.advance()
        parts = [packer.next_rows() for packer in self._shards]
        there_is_more |= any(part.num_rows for part in parts)
        if (passes := self._count_passes()) > self._passes:
            self._passes = passes
            self._report_skipped()
            if self._reader.cache is not None:
                self._reader.cache.finish()
        if not there_is_more and (self._across is not None or self._step >= self._batches_of_the_longest()):
            return None
        if self._status is not None:
            self._status.set(FILLING)
        if self._across is None:
            pieces = stack([part.padded_to(size) for part in parts])
        else:
            pieces = self._across.own_rows(parts)
        facts, counts = slot.fill(pieces, len(self._own))
        work = self._works(pieces)
        for packer, (tokens, loss_tokens), one in zip(self._own, counts, work, strict=True):
            packer.count_positions(tokens, loss_tokens, one)
        self._step += 1
        progress, last = zip(*(packer.progress() for packer in self._shards), strict=True)
        return facts._replace(
            epoch=max(packer.epoch for packer in self._shards),
            progress=fsum(progress) / len(progress),
            last=all(last),
            longest_wait_rows=max(packer.longest_wait for packer in self._shards),
            work=self._works(pieces, shards=1)[0],
            state=self.state_bytes(),
        )

    def _works(self, pieces: Pieces, shards: int | None = None) -> list[float]:
        """Return the cost, by `balance`, of the documents in the rows of each of `shards` shards; None: this rank's."""
        shards = shards or len(self._own)
        if self._config.balance is None:
            return [0.0] * shards
        bounds = pieces.bounds[:: pieces.num_rows // shards]
        found: list[float] = costs_of(pieces.lengths, bounds, self._config.balance).tolist()
        return found

    def state_bytes(self) -> bytes:
        """Return the state after the last call of `produce`, as `state_of` reads it."""
        return pack_state(self._step, self._own)

    def _count_passes(self) -> int:
        return min(packer.passes for packer in self._shards)

    def _notes(self) -> Notes:
        return Notes.total(packer.notes for packer in self._shards)

    def _report_skipped(self) -> None:
        """Log what was skipped, once a pass and only where there is more of it."""
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


def initial_state(reader: Reader) -> bytes:
    """Return the state of a producer that has not read anything, as `state_of` reads it."""
    shards = shards_of(reader.config, len(reader.source))
    return pack_state(0, [ShardPacker(shard, reader, lambda indices: iter(())) for shard in shards])
