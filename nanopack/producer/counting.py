"""Count the batches of all epochs, and the tokens in them, by rendering every conversation once.

    reader   ->   count_batches()   ->   (batches, tokens): `len(loader)`, and where a rank that runs out must stop
                  simulate() packs the lengths

Only lengths are kept, 8 bytes a conversation. No torch, no GPU.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial

import numpy as np

from nanopack.conversations.announced import announced
from nanopack.conversations.order import Shard
from nanopack.packing.simulate import simulating
from nanopack.producer.arrivals import describe_or_raise
from nanopack.producer.chunk import Chunk
from nanopack.producer.reader import Reader, read_in_turn
from nanopack.producer.shard import ReadAll, shards_of
from nanopack.producer.stored import TOGETHER, StoreReader
from nanopack.producer.workers import Workers

_COUNTING = (
    "counting the batches: %d of %d conversations are rendered after %.1f s; `iter(loader)`, as in "
    "tqdm(iter(loader)), needs no count, and with process_group each rank counts only its own"
)

Counting = Generator[None, None, tuple[int, int]]
"""Yields between any two chunks of conversations; its value are the batches and tokens."""


def count_batches(reader: Reader, *, all_ranks: bool, forked: int = 0) -> tuple[int, int]:
    """Return the number of batches in all epochs, from the first one on, and of the tokens packed into them.

    They are those of this rank, or with `all_ranks` those of the rank with most batches, and the tokens of all ranks.
    With `forked`, that many processes are forked to read. Raises as `ShardPacker.next_rows`.
    """
    config = reader.config
    # a daemonic process may start none
    if forked and not isinstance(reader, StoreReader) and not multiprocessing.current_process().daemon:
        with contextlib.closing(Workers(forked, reader, method="fork")) as processes:
            return finish(counting(reader, _announced(partial(processes.read_all, shards=1)), all_ranks=all_ranks))
    read_all = partial(read_in_turn, reader, batch_tokens=config.batch_size * config.seq_len, raise_interrupts=True)
    return finish(counting(reader, _announced(read_all), all_ranks=all_ranks))


def finish(steps: Counting) -> tuple[int, int]:
    """Return the value of a generator that counts."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found: tuple[int, int] = end.value
            return found


class BackgroundCount:
    """A count that is made bit by bit in idle time, so that it is known once it is needed."""

    def __init__(self, begin: Callable[[], Counting], batches: int | None = None) -> None:
        """`begin` starts the count; `batches` is its result, where that is known."""
        self._begin, self._batches = begin, batches
        self._steps: Counting | None = None
        self._over = batches is not None

    def advance(self) -> bool:
        """Count one more conversation; return False where that is over."""
        if self._over:
            return False
        self._steps = self._steps or self._begin()
        try:
            next(self._steps)
        except StopIteration as end:
            self._over, (self._batches, _) = True, end.value
        # it comes again, and is raised, where the count is needed
        except BaseException:
            self._over, self._steps = True, None
        return True

    def wait(self) -> int:
        """Return the number of batches, once the rest is counted."""
        if self._batches is None:
            self._batches, _ = finish(self._steps or self._begin())
            self._over = True
        return self._batches


def counting(reader: Reader, read_all: ReadAll, *, all_ranks: bool) -> Counting:
    """Count as `count_batches`, reading with `read_all`, and log nothing."""
    config = reader.config
    shards = shards_of(config, len(reader.source), all_ranks=all_ranks)
    lengths = yield from _measure(reader, shards, read_all)
    batches = tokens = 0
    for shard in shards:
        own, epochs = lengths[_order(reader, shard)], range(1, config.epochs or 1)
        passes = [part[part > 0] for part in np.split(own, [shard.num_reads(epoch) for epoch in epochs])]
        packed = yield from simulating(
            config.packing, passes, config.seq_len, batch_size=config.shard_rows, align=config.document_align
        )
        batches, tokens = max(batches, packed.batches), tokens + packed.emitted
    return batches, tokens


def _order(reader: Reader, shard: Shard) -> np.ndarray:
    """Return the conversations of a shard in all epochs, in the order in which they are read, int64."""
    reads = shard.num_reads(reader.config.epochs or 1)
    parts = [shard.at(np.arange(at, min(reads, at + TOGETHER), dtype=np.int64)) for at in range(0, reads, TOGETHER)]
    return np.concatenate([np.empty(0, np.int64), *parts])


def _measure(reader: Reader, shards: Iterable[Shard], read_all: ReadAll) -> Generator[None, None, np.ndarray]:
    """Find the length of each conversation for the packing, (n,) int64; 0 where it is dropped, skipped or not read.

    Those of the shards are read, each once.
    """
    lengths, wanted = np.zeros(len(reader.source), np.int64), np.zeros(len(reader.source), bool)
    for shard in shards:
        wanted[_order(reader, shard)] = True
    indices = np.flatnonzero(wanted)
    chunks: Iterator[Chunk]
    if isinstance(reader, StoreReader):
        # lengths are known without reading
        chunks = (reader.read(indices[at : at + TOGETHER]) for at in range(0, len(indices), TOGETHER))
    else:
        chunks = read_all(indices.tolist())
    for chunk in chunks:
        for position, trouble in chunk.troubles.items():
            if trouble.error is not None:
                conversation = int(chunk.conversations[position])
                describe_or_raise(trouble.error, conversation, reader.source, reader.config)
        lengths[chunk.conversations] = np.where(chunk.dropped(reader.config), 0, chunk.lengths)
        yield
    return lengths


def _announced(read_all: ReadAll) -> ReadAll:
    """Return a `read_all` that logs how far it is where that takes long."""

    def read_and_announce(indices: Iterable[int]) -> Iterator[Chunk]:
        indices = list(indices)
        return announced(read_all(indices), len(indices), _COUNTING, of=lambda chunk: len(chunk.lengths))

    return read_and_announce
