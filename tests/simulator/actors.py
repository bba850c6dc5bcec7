"""Actors with vector clocks, and memory that knows who touched it last: the parts of a simulated device.

See simulated.py, which puts them together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch

Clock = list[int]
ACTORS = 8
SPEEDS = (0, 0, 1, 3, 1000)
"""Most steps that an actor takes while time passes once."""
RUBBISH_BYTE = 0xAB
RUBBISH = -0x54545455


class Fault(AssertionError):
    """What must not happen on a device, or would only show on another one."""


class Actor:
    """Accesses memory. Its vector clock counts, for each actor, the actions that happened before its next one."""

    def __init__(self, index: int, name: str) -> None:
        self.index = index
        self.name = name
        self.clock: Clock = [0] * ACTORS

    def learn(self, clock: Clock) -> None:
        """Order the next action after everything that this clock has seen."""
        self.clock = list(map(max, self.clock, clock))

    def tick(self) -> Clock:
        """Do one more thing; return the clock at which it is done."""
        self.clock = self.clock.copy()
        self.clock[self.index] += 1
        return self.clock


class Stream(Actor):
    """Work in order: functions, and waits for tickets."""

    def __init__(self, index: int, name: str) -> None:
        super().__init__(index, name)
        self.queue: deque[Callable[[], None] | Ticket] = deque()

    def step(self) -> bool:
        """Do the next thing, if there is one and it need not wait."""
        if not self.queue:
            return False
        work = self.queue[0]
        if isinstance(work, Ticket):
            if not work.done:
                return False
        else:
            work()
        self.queue.popleft()
        return True


class Ticket:
    """One record of an event."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.clock = stream.tick()
        self.done = False

    def run(self) -> None:
        self.done = True


class Event:
    """An event, as it was recorded last."""

    latest: Ticket | None = None


class Block:
    """A piece of memory, and who touched it last."""

    def __init__(self, name: str, tensors: Sequence[torch.Tensor], stream: Stream | None = None) -> None:
        self.name = name
        self.tensors = tensors
        self.stream = stream
        self.touched: tuple[dict[int, tuple[int, str]], ...] = ({}, {})
        """What reads it and what writes it: of each actor the last time, and what that was."""
        self.parts: list[Block] = []
        """Parts of it that are touched apart."""

    def part(self, name: str, tensor: torch.Tensor) -> Block:
        """Return a part of it, which so far was touched as the whole was."""
        part = Block(name, [tensor], self.stream)
        part.touched = tuple(dict(touched) for touched in self.touched)
        self.parts.append(part)
        return part

    def spoil(self) -> None:
        """Fill it with rubbish."""
        for tensor in self.tensors:
            tensor.fill_(RUBBISH_BYTE if tensor.dtype is torch.uint8 else RUBBISH)

    def check_spoilt(self) -> None:
        """Fault where something else came to lie in the rubbish."""
        first = self.tensors[0].view(-1)[0].item()
        if first not in (RUBBISH_BYTE, RUBBISH):
            raise Fault(f"wrong data: {self.name} was written when it had long been somebody else's")


class Memory:
    """Bytes of a block, as upload.py gets them; a slice keeps the whole alive."""

    def __init__(self, block: Block, nbytes: int, base: Memory | None, free: Callable[[Block], None] | None) -> None:
        self.block = block
        self.nbytes = nbytes
        self.base = base
        self.free = free

    def __len__(self) -> int:
        return self.nbytes

    def __getitem__(self, part: slice) -> Memory:
        start, stop, _ = part.indices(self.nbytes)
        assert start == 0, "only the front of a slot is ever copied"
        return Memory(self.block, stop, self, None)

    def __del__(self) -> None:
        if self.free is not None:
            self.free(self.block)
