"""A device that only exists in tests: it runs what is queued late and in any order, and sees what is not ordered.

    nanopack/upload/upload.py   ->   SimulatedDevice   ->   a Fault: memory touched in no order, or a kernel fed garbage

An ordinary test cannot see a missing wait: on an eager device, or a slow host, all comes right by luck. Here

1. every actor (host, producer, each stream) carries a vector clock. Each access to a piece of memory is checked against
   all earlier ones: where neither's clock knows of the other's and one of them writes, that is a fault, in whatever
   order the two happened to run. Only stream order, record and wait, a query that said yes, synchronize, and the pipe
   between producer and host order anything. Queueing one after another does not, but for what the host did.
2. what is queued runs later. At every call time passes: each stream takes some steps, none, or all, at a speed of its
   own, drawn from the seed; so copies run first or last, a stream starves, or nothing runs until the host waits for it.
   A copy has two halves. Memory is filled with rubbish when it is allocated and when it is freed, on the stream that it
   was allocated on: the caching allocator hands freed memory out again at once, in the order of that stream.

Memory is freed when the last reference to it goes, as torch does. All chance comes from one random.Random.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np
import torch
from actors import SPEEDS, Actor, Block, Clock, Event, Fault, Memory, Stream, Ticket


class SimulatedDevice:
    """`nanopack.upload.device.Device`, and what the trainer and the producer in a test need besides."""

    def __init__(self, random: Random, *, clocks: bool = True) -> None:
        """Without `clocks` only wrong data are a fault."""
        self.random = random
        self.clocks = clocks
        self.is_capturing = False
        self.faults: list[str] = []
        self.calls = 0
        self.waits = 0
        self.copied = 0
        """Copies that are done."""
        self.interrupt_at: int | None = None
        self.live_bytes = 0
        self._pool: list[tuple[Block, Any]] = []
        self._outputs: dict[int, tuple[Block, Any]] = {}
        self._watches: dict[Block, Any] = {}
        self._speeds: dict[Any, int] = {}
        self._restless = random.choice((0.0, 0.02, 0.2))
        self._streams: list[Stream] = []
        self._actors = 0
        self.host = self.actor("the host")
        self.current = self.new_stream("the caller's stream")

    # Time

    def actor(self, name: str) -> Actor:
        """Return someone new who touches memory."""
        self._actors += 1
        return Actor(self._actors - 1, name)

    def moves(self, mover: Any) -> None:
        """From now on call mover.step() as time passes."""
        self._speeds[mover] = self.random.choice(SPEEDS)

    def pause(self) -> None:
        """Let time pass: each mover takes as many steps as chance and its speed let it."""
        random = self.random
        self.calls += 1
        if self.faults:
            raise Fault(self.faults[0])
        if self.calls == self.interrupt_at:
            raise KeyboardInterrupt
        if random.random() < self._restless:
            self._speeds = {mover: random.choice(SPEEDS) for mover in self._speeds}
        movers = list(self._speeds.items())
        first = int(random.random() * len(movers))
        for mover, speed in movers[first:] + movers[:first]:
            for _ in range(int(random.random() * (speed + 1)) if speed else 0):
                if not mover.step():
                    break

    def drain(self) -> None:
        """Run all that is queued, in an order left to chance."""
        while any(stream.queue for stream in self._streams):
            self.random.choice(self._streams).step()
        if self.faults:
            raise Fault(self.faults[0])

    def stand_still(self) -> None:
        """From now on nothing runs but what somebody waits for."""
        self._speeds = dict.fromkeys(self._speeds, 0)
        self._restless = 0.0

    def _finish(self, ticket: Ticket) -> None:
        while not ticket.done:
            if not ticket.stream.step():
                blocked_on = ticket.stream.queue[0]
                assert isinstance(blocked_on, Ticket)
                self._finish(blocked_on)

    # Memory

    def touch(self, block: Block, actor: Actor, clock: Clock, *, write: bool, what: str) -> None:
        """Note an access, and a fault where one before it is not known to be over."""
        what = f"{what} on {actor.name}"
        reads, writes = block.touched
        for earlier in (writes, reads) if write else (writes,):
            for other, (time, other_what) in earlier.items():
                if clock[other] < time and self.clocks:
                    self.faults.append(f"{block.name}: '{other_what}' and '{what}' are not ordered")
        block.touched[write][actor.index] = (clock[actor.index], what)
        for part in block.parts:
            self.touch(part, actor, clock, write=write, what=what)

    def _queue(
        self,
        stream: Stream,
        what: str,
        work: Callable[[], None],
        *,
        reads: Sequence[Block] = (),
        writes: Sequence[Block] = (),
    ) -> None:
        stream.learn(self.host.clock)
        clock = stream.tick()
        for block in reads:
            self.touch(block, stream, clock, write=False, what=what)
        for block in writes:
            self.touch(block, stream, clock, write=True, what=what)
        stream.queue.append(work)

    def _spoil_later(self, block: Block, what: str) -> None:
        assert block.stream is not None
        self._queue(block.stream, f"{what} of memory", block.spoil, writes=[block])

    def _freed(self, block: Block) -> None:
        assert block.stream is not None
        self.live_bytes -= sum(tensor.nbytes for tensor in block.tensors)
        self._spoil_later(block, "reuse")
        self._queue(block.stream, "reuse of memory", block.check_spoilt, reads=[block])

    def host_slot(self, number: int, nbytes: int) -> Memory:
        """Return memory of the host for a slot."""
        return self.host_memory(f"H[{number}]", nbytes)

    def host_memory(self, name: str, nbytes: int) -> Memory:
        """Return memory of the host."""
        return Memory(Block(name, [torch.zeros(nbytes, dtype=torch.uint8)]), nbytes, None, None)

    def host_touch(self, block: Block, what: str, *, write: bool) -> None:
        """Note that the host touches memory now."""
        self.touch(block, self.host, self.host.tick(), write=write, what=what)

    def outputs(self, make: Callable[[], Any]) -> Any:
        """Return `make()`, or what was freed on this stream, filled with rubbish; it is freed when its `inputs` go."""
        self.pause()
        freed = [item for item in self._pool if item[0].stream is self.current]
        if freed and self.random.random() < 0.7:
            block, inner = freed[-1]
            self._pool.remove(freed[-1])
        else:
            inner = make()
            block = Block("outputs", [tensor for tensor in inner if tensor is not None], self.current)
        # .data: the same memory as another tensor, that no view keeps alive
        handed_out = inner._make(None if tensor is None else tensor.data for tensor in inner)
        self._outputs[inner.inputs.data_ptr()] = (block, inner)
        self.live_bytes += sum(tensor.nbytes for tensor in block.tensors)

        def freed_now(_: Any) -> None:
            self._freed(block)
            self._pool.append((block, inner))

        self._watches[block] = weakref.ref(handed_out.inputs, freed_now)
        self._spoil_later(block, "allocation")
        return handed_out

    def block_of(self, batch: Any) -> Block:
        """Return the memory that a batch lies in."""
        return self._outputs[batch.inputs.data_ptr()][0]

    # The interface of nanopack.upload.device.Device

    def current_stream(self) -> Stream:
        return self.current

    def new_stream(self, name: str = "the copy stream") -> Stream:
        # torch hands out 32 streams in turn, so a new one may be one that somebody has
        if self._streams and self.random.random() < 0.1:
            return self.random.choice(self._streams)
        self._actors += 1
        stream = Stream(self._actors - 1, name)
        self._streams.append(stream)
        self.moves(stream)
        return stream

    def run_others(self) -> None:
        """Run all that can run while the caller's stream stands still."""
        while any(stream.step() for stream in self._streams if stream is not self.current):
            pass

    def new_event(self) -> Event:
        return Event()

    def zeros(self, nbytes: int) -> Memory:
        self.pause()
        memory = torch.empty(nbytes, dtype=torch.uint8)
        block = Block("D", [memory], self.current)
        self.live_bytes += nbytes
        self._spoil_later(block, "allocation")
        self._queue(self.current, "zeroing", lambda: memory.fill_(0), writes=[block])
        return Memory(block, nbytes, None, self._freed)

    def halves(self, memory: Memory) -> tuple[Memory, Memory]:
        block, size = memory.block, memory.nbytes // 2
        first, second = (block.part(f"D[{h}]", tensor) for h, tensor in enumerate(block.tensors[0].chunk(2)))
        return Memory(first, size, memory, None), Memory(second, size, memory, None)

    def number(self, memory: Memory) -> int:
        self.pause()
        self.host_touch(memory.block, "look", write=False)
        return int(memory.block.tensors[0][:8].view(torch.int64)[0])

    def copy(self, to: Memory, source: Memory, stream: Stream) -> None:
        self.pause()
        to_bytes, source_bytes = to.block.tensors[0].numpy(), source.block.tensors[0].numpy()
        half = source.nbytes // 2
        for part in (slice(0, half), slice(half, source.nbytes)):

            def copy_half(part: slice = part) -> None:
                np.copyto(to_bytes[part], source_bytes[part])
                self.copied += part.stop == source.nbytes

            self._queue(stream, "copy", copy_half, reads=[source.block], writes=[to.block])

    def launch(self, kernel: Callable[[Any, Any], None], staged: Memory, outputs: Any, stream: Stream) -> None:
        self.pause()
        assert stream is self.current, "a kernel runs on the current stream, whatever stream it is given"
        block, inner = self._outputs[outputs.inputs.data_ptr()]
        slot = staged.block.tensors[0]

        def run() -> None:
            try:
                kernel(slot, inner)
            except (IndexError, RuntimeError) as error:
                raise Fault(f"the kernel was fed garbage: {str(error).splitlines()[0]}") from error

        self._queue(stream, "kernel", run, reads=[staged.block], writes=[block, *getattr(kernel, "writes", ())])

    def record(self, event: Event, stream: Stream) -> None:
        self.pause()
        stream.learn(self.host.clock)
        event.latest = Ticket(stream)
        stream.queue.append(event.latest.run)

    def wait(self, stream: Stream, event: Event) -> None:
        self.pause()
        if event.latest is not None:
            stream.learn(event.latest.clock)
            stream.queue.append(event.latest)

    def query(self, event: Event) -> bool:
        self.pause()
        if event.latest is None:
            return True
        if event.latest.done:
            self.host.learn(event.latest.clock)
        return event.latest.done

    def synchronize(self, event: Event) -> None:
        self.waits += 1
        self.pause()
        if event.latest is not None:
            self._finish(event.latest)
            self.host.learn(event.latest.clock)

    def capturing(self) -> bool:
        return self.is_capturing

    def named(self, what: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    # The trainer's own work

    def work(self, stream: Stream) -> None:
        """Queue something that takes time and touches nothing."""
        self._queue(stream, "work", lambda: None)

    def read(self, block: Block, stream: Stream, look: Callable[[], None]) -> None:
        """Queue a training step, which reads a batch."""
        self.pause()
        self._queue(stream, "training step", look, reads=[block])

    def join(self, stream: Stream, other: Stream) -> None:
        """Let `stream` wait for all that is now in `other`, as stream.wait_stream(other) does."""
        event = self.new_event()
        self.record(event, other)
        self.wait(stream, event)
