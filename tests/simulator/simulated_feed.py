"""What the simulated producer reads, and the feed through which it fills slots. See simulated.py.

data(number)   ->   SimulatedFeed   ->   the loader, whose batches must be those of the data set's reference
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from actors import RUBBISH_BYTE, Actor, Block, Clock, Fault
from data_sets import byte_tokenizer
from simulated import SimulatedDevice

from nanopack import Loader, reference
from nanopack.batch import Batch
from nanopack.producer.feed import End
from nanopack.producer.producer import Producer
from nanopack.producer.reader import Reader
from nanopack.ring.facts import BatchFacts
from nanopack.ring.slot import Slot

TOKENIZER = byte_tokenizer()
DATA_SETS = 32


@dataclass(frozen=True)
class Data:
    """Conversations, the loader's arguments for them, the reference's batches, and what the producer makes of them."""

    conversations: list[Any]
    arguments: dict[str, Any]
    batches: list[Batch]
    produced: list[tuple[np.ndarray, BatchFacts]]
    """The used bytes of each slot, and its facts: what the real producer gave."""
    end: Exception | End
    """What it gave after them."""

    @property
    def ends_with(self) -> type[Exception]:
        """What `next` raises then."""
        return StopIteration if isinstance(self.end, End) else type(self.end)


@functools.cache
def data(number: int) -> Data:
    """Return a small data set; every fourth has an invalid conversation."""
    random = Random(number)
    batch_size = random.choice((1, 1, 2))
    conversations: list[Any] = [
        {"text": "abcdefghij"[: random.randrange(8)]} for _ in range(batch_size * random.randrange(5, 10))
    ]
    if number % 4 == 3:
        conversations.insert(random.randrange(len(conversations) + 1), {"text": 1})
    arguments: dict[str, Any] = {
        "batch_size": batch_size,
        "seq_len": random.choice((4, 8)),
        "packing": random.choice(("stream", "pad", "pad")),
        "loss": "all",
        "epochs": 1,
    }
    if number % 8 > 5:
        extras = {"loss_weights": "token", "extras": ("positions", "doc_ids", "cu_seqlens")}
        arguments |= extras | {"max_pieces": arguments["seq_len"]}
    batches = []
    with contextlib.suppress(ValueError):
        for batch in reference.batches(conversations, TOKENIZER, **arguments):
            batches.append(batch)
    return Data(
        conversations, arguments, batches, *_produce(Loader(conversations, TOKENIZER, num_workers=0, **arguments))
    )


def _produce(loader: Loader) -> tuple[list[tuple[np.ndarray, BatchFacts]], Exception | End]:
    reader = Reader(loader.source, loader.tokenizer, loader.config)
    producer, layout = Producer(reader), reader.layout
    slot = Slot(layout, np.zeros(layout.nbytes, np.uint8))
    slots = []
    try:
        while (facts := producer.produce(slot)) is not None:
            slots.append((slot.buffer[: facts.used_bytes].copy(), facts))
    except ValueError as error:
        return slots, error
    return slots, End(producer.packed_state())


class SimulatedFeed:
    """A feed whose producer fills slots a step at a time, when time passes on the device or somebody waits for it."""

    waits = False

    def __init__(
        self, device: SimulatedDevice, chosen: Data, slots: list[Block], prefetch: int, *, inline: bool, hasty: bool
    ) -> None:
        """A `hasty` producer sends the facts before the slot is filled."""
        self._device = device
        self._chosen = chosen
        self._slots = slots
        self._prefetch = prefetch
        self._hasty = hasty
        self.lag = 0.2
        self._actor: Actor = device.host if inline else device.actor("the producer")
        self._messages: deque[tuple[BatchFacts | End | Exception, Clock]] = deque()
        self._free: deque[tuple[int, Clock]] = deque((slot, self._actor.clock) for slot in range(len(slots)))
        self._work = self._fill()
        if not inline:
            device.moves(self)

    @property
    def slots(self) -> list[int]:
        """The slots that are here, free or ready."""
        return [slot for slot, _ in self._free] + [
            sent.slot for sent, _ in self._messages if isinstance(sent, BatchFacts)
        ]

    def step(self) -> bool:
        """Continue filling; return False where there is nothing to do."""
        return next(self._work, False)

    def _fill(self) -> Generator[bool, None, None]:
        for filled, facts in self._chosen.produced:
            while not self._free or len(self._messages) >= self._prefetch:
                yield False
            slot, clock = self._free.popleft()
            self._actor.learn(clock)
            memory = self._slots[slot].tensors[0].numpy()
            memory.fill(RUBBISH_BYTE)
            self._touch(slot)
            half = len(filled) // 2
            for part in (slice(0, half), slice(half, len(filled))):
                if self._hasty and part.start:
                    self._send(facts._replace(slot=slot))
                yield True
                memory[part] = filled[part]
                self._touch(slot)
            if not self._hasty:
                self._send(facts._replace(slot=slot))
            yield True
        # a copy, because an exception collects tracebacks, and these keep batches
        self._send(copy.copy(self._chosen.end))

    def _touch(self, slot: int) -> None:
        self._device.touch(self._slots[slot], self._actor, self._actor.tick(), write=True, what="filling")

    def _send(self, message: BatchFacts | End | Exception) -> None:
        self._messages.append((message, self._actor.clock))

    def get(self, *, wait: bool) -> BatchFacts | End | None:
        """As `nanopack.producer.feed.Feed.get`; without `wait`, what is ready may still be in the pipe."""
        self._device.pause()
        if wait:
            while not self._messages:
                if not self.step() and not self._messages:
                    raise Fault("deadlock: the host waits for the producer, and the producer for a free slot")
        elif not self._messages or self._device.random.random() < self.lag:
            return None
        message, clock = self._messages.popleft()
        self._device.host.learn(clock)
        if isinstance(message, (BatchFacts, End)):
            return message
        try:
            raise message
        finally:
            del message

    def release(self, slot: int) -> None:
        """As `nanopack.producer.feed.Feed.release`."""
        assert slot not in self.slots, f"slot {slot} is given back twice"
        self._free.append((slot, self._device.host.clock))

    def qsize(self) -> int:
        """As `nanopack.producer.feed.Feed.qsize`."""
        return len(self._messages)

    def close(self) -> None:
        """End the producer, and wait until it has ended."""
        self._work.close()
        self._device.host.learn(self._actor.clock)
