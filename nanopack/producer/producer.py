"""Bring the rows of a rank's lanes together, and fill slots with batches.

    rows of every lane   ->   Producer.produce(slot)   ->   a filled slot, and its facts
         lane.py                                             ring.py

No torch, no GPU.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from functools import partial
from math import fsum
from typing import Any, NamedTuple

from nanopack.config import LoaderConfig
from nanopack.conversations.records import Source, check
from nanopack.errors import TemplateError
from nanopack.packing.rows import Row
from nanopack.producer.counting import count_batches
from nanopack.producer.reader import Read, Reader, read_in_turn
from nanopack.producer.shard import Lane
from nanopack.producer.workers import Workers
from nanopack.render.renderer import missing_tokens
from nanopack.ring.layout import Layout
from nanopack.ring.signs import FILLING, READING, Signs
from nanopack.ring.slot import Filled, Slot
from nanopack.tokenizers.tokenizer import AnyTokenizer


class Produced(NamedTuple):
    """A batch in a slot: what the host knows of it, and how far the data are read. See `Batch`."""

    filled: Filled
    epoch: int
    progress: float
    last: bool
    longest_wait: int
    """Most rows that a document has waited so far."""
    books: bytes
    """`Producer.state` with this batch delivered, pickled: few ask for it."""


class Start(NamedTuple):
    """Where a producer begins, and what is known beforehand."""

    state: dict[str, Any] | None = None
    """Of another producer: this one goes on where it stood."""
    batches: int | None = None
    """Of the rank that has most of them, with `epochs`."""


FROM_THE_BEGINNING = Start()


class Producer:
    """Fills slots with the batches of a config, one after the other."""

    def __init__(
        self,
        source: Source,
        tokenizer: AnyTokenizer,
        config: LoaderConfig,
        start: Start = FROM_THE_BEGINNING,
        *,
        workers: int = 0,
        signs: Signs | None = None,
    ) -> None:
        """Raise TemplateError where the first conversation needs tokens that the tokenizer lacks; see `Lane.restore`.

        With `workers`, so many processes read ahead; without, conversations are read here when they are needed.
        What the producer is at is told by `signs`, if anybody looks.
        """
        self._signs = signs
        self.source = source
        self.config = config
        self.layout = Layout.of(config, tokenizer.vocab_size)
        self._reader = Reader(source, tokenizer, config, self.layout)
        self.render = self._reader.render
        if missing_tokens(tokenizer, config.template):
            self._try_the_first()
        self._tell = None if signs is None else partial(signs.say, READING)
        self._workers = Workers(workers, self._reader, self._tell) if workers else None
        self._lanes = [Lane(number, source, config, self.layout, self._read_all) for number in config.lanes]
        self._step = 0
        self._batches = start.batches
        if start.state is not None:
            self._step = start.state["step"]
            for lane in self._lanes:
                lane.restore(start.state["lanes"][str(lane.number)])

    def produce(self, slot: Slot) -> Produced | None:
        """Fill the slot with the next batch; return None, and leave it alone, at the end of the data.

        Where another rank has more batches than this one, padding follows what this one has, so that all have equally
        many. Raises as `Lane.next_rows` does.
        """
        rows = [lane.next_rows() for lane in self._lanes]
        if not any(rows) and self._step >= self._batches_of_the_longest():
            return None
        if self._signs is not None:
            self._signs.say(FILLING)
        rows = [[*own, *[[]] * (self.config.lane_rows - len(own))] for own in rows]
        filled = slot.fill([row for own in rows for row in own])
        self._count_slots(rows, filled.row_trained)
        self._step += 1
        progress, last = zip(*(lane.progress() for lane in self._lanes), strict=True)
        return Produced(
            filled=filled,
            epoch=max(lane.epoch for lane in self._lanes),
            progress=fsum(progress) / len(progress),
            last=all(last),
            longest_wait=max(lane.longest_wait for lane in self._lanes),
            books=self.books(),
        )

    def _try_the_first(self) -> None:
        """Refuse a tokenizer at once, rather than with the first batch, where the data begin with messages."""
        try:
            self.render(check(self.source[0]))
        except TemplateError:
            raise
        except Exception:
            # what else is wrong with it is told in its turn
            return

    def books(self) -> bytes:
        """Return `state()`, pickled."""
        return pickle.dumps(self.state())

    def state(self) -> dict[str, Any]:
        """Return where the producer stands after the last call of `produce`, as plain data (JSON-able)."""
        return {"step": self._step, "lanes": {str(lane.number): lane.state() for lane in self._lanes}}

    def count_batches(self, *, of_all_ranks: bool) -> tuple[int, int]:
        """Return how many batches are to come in all, from the first one on, and the tokens in them.

        It renders all the data, or this rank's share of them, and packs their lengths.
        """
        lanes = self.config.all_lanes if of_all_ranks else self.config.lanes
        return count_batches(self.source, self.config, lanes, self._read_all)

    def _batches_of_the_longest(self) -> int:
        """Return how many batches the rank with most of them has. Called when this one has no more."""
        if self.config.world_size == 1:
            return self._step
        if self._batches is None:
            self._batches, _ = self.count_batches(of_all_ranks=True)
        return self._batches

    def _read_all(self, indexes: Iterable[int]) -> Iterator[Read]:
        if self._workers is not None:
            return self._workers.read_all(indexes, lanes=len(self.config.lanes))
        tokens = self.config.lane_rows * self.config.seq_len
        return read_in_turn(self._reader, indexes, batch_tokens=tokens, tell=self._tell)

    def _count_slots(self, rows: list[list[Row]], row_trained: list[int]) -> None:
        trained = iter(row_trained)
        for lane, own in zip(self._lanes, rows, strict=True):
            tokens = sum(min(sum(run.length for run in row), self.config.seq_len) for row in own)
            lane.count_slots(tokens, sum(next(trained) for _ in own))
