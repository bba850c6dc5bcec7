"""Refills and halves on the simulated device, with loads, and a trainer that reads what they wrote, all from one seed.

    seed   ->   run()   ->   a Fault that names it, or nothing to say

A batch is a table that holds its number. A load reads the records as kernels/advance.py does, and writes the number.
"""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import torch
from actors import Block, Fault, Memory
from nanopack.kernels.gather_torch import advance_torch
from simulated import SimulatedDevice

from nanopack.ring.facts import BatchFacts
from nanopack.upload.halves import Halves
from nanopack.upload.outputs import Outputs
from nanopack.upload.refills import RECORD_BYTES, Refills, half_bytes

BATCHES, BATCH_SIZE, SEQ_LEN = 4, 1, 9


def outputs() -> Outputs:
    """Where a load writes the number of its batch, its facts, and the loads so far."""
    return Outputs(torch.zeros(6, dtype=torch.int64), None, None, None, None, None)  # type: ignore[arg-type]


class Load:
    """The kernel: declares that it writes the counter, and finds out which half it is to read."""

    def __init__(self, tables: Memory, counter: Memory) -> None:
        self.tables, self.counter = tables.block.tensors[0], counter.block.tensors[0].view(torch.int64)
        self.writes = [counter.block]

    def __call__(self, half: torch.Tensor, out: Outputs) -> None:
        records = self.tables.view(torch.int64)
        record = int(torch.minimum(self.counter[1], self.counter[2]))
        at = int(records[8 * record]) if 0 <= record < len(records) // 8 else -1
        if not 0 <= at < len(self.tables) // 16:
            raise IndexError("the counter or a record is garbage")
        first = half.data_ptr() - self.tables.data_ptr()
        # before the first refill all are zeros
        if at and not first <= min(at * 16, record * RECORD_BYTES) < first + len(half):
            raise Fault("wrong data: a load reads the half that it must not")
        out.inputs[0] = int(self.tables.view(torch.int32)[4 * at])
        out.inputs[1] = self.counter[0]
        advance_torch(records, self.counter, out.inputs[2:6])


class Simulation:
    """Some batches, before the first refill."""

    def __init__(self, seed: int, halves: type[Halves] = Halves, *, clocks: bool = True) -> None:
        random = self.random = Random(seed)
        device = self.device = SimulatedDevice(random, clocks=clocks)
        self.count = random.randrange(4 * BATCHES)
        self.taken = self.seen = self.loads = 0
        self.streams = [device.current, device.new_stream("another stream")]
        size = half_bytes(BATCHES, BATCH_SIZE, 16 * (BATCHES + random.randrange(-2, 1)))
        staged = [device.host_memory(f"S[{h}]", size) for h in range(2)]
        self.staged: list[Block] = [memory.block for memory in staged]
        numbers = [device.host_memory(f"N[{h}]", 8) for h in range(2)]
        for _ in range(random.randrange(3)):
            device.work(device.current)
        self.outputs = device.outputs(outputs)
        self.halves = halves(device, staged, numbers, Load, self.outputs)
        arrays = [memory.block.tensors[0].numpy() for memory in staged]
        self.refills = Refills(self.halves, arrays, self.take, batches=BATCHES, batch_size=BATCH_SIZE, seq_len=SEQ_LEN)

    def take(self) -> tuple[np.ndarray, BatchFacts]:
        """Return the next batch, and note that the host now writes into the half that is not current."""
        block, device = self.staged[self.halves.other], self.device
        device.host_touch(block, "filling", write=True)
        if not self.refills._filled:
            block.spoil()
        device.pause()
        if self.taken == self.count:
            raise StopIteration
        self.taken += 1
        facts = BatchFacts(0, 0, self.taken, 2 * self.taken, 0.5 * self.taken, 3, b"", b"")
        return np.array([100 + self.taken, 0, 0, 0], np.int32).view(np.uint8), facts

    def train(self, batches: int, lies: int = 0) -> None:
        """Load and read about this many batches. `lies`: loads too many, once in a while."""
        ready = self.refills.refill()
        while ready and self.seen < batches:
            count = self.random.randrange(1, len(ready) + 1)
            for facts in ready[:count]:
                self.load(None if lies else facts)
            more = lies if self.random.random() < 0.3 else 0
            for _ in range(more):
                self.load(None)
            if self.random.random() < 0.3:
                self.switch()
            self.refills.count(count)
            ready = self.refills.refill()

    def load(self, facts: BatchFacts | None) -> None:
        """Queue a load, and a step that looks at what it wrote; None: a load too many."""
        device = self.device
        self.halves.load()
        for _ in range(self.random.randrange(3)):
            device.work(device.current)
        expected = None
        if facts is not None:
            self.seen += 1
            number = facts.num_loss_tokens
            expected = [
                100 + number,
                self.seen - 1,
                number,
                2 * number,
                int(np.float64(0.5 * number).view(np.int64)),
                3,
            ]
        block, memory = device._outputs[self.outputs.inputs.data_ptr()][0], self.outputs.inputs.data

        def look() -> None:
            if expected is not None and memory[:6].tolist() != expected:
                raise Fault(f"wrong data: {memory[:6].tolist()} in place of {expected}")

        device.read(block, device.current, look)

    def switch(self) -> None:
        """Change the stream, asking nobody."""
        self.device.current = self.random.choice(self.streams)

    def close(self) -> None:
        """Close, with steps still to run, and take the host's memory away."""
        for _ in range(self.random.choice((1, 2))):
            self.halves.close()
        for block in self.staged:
            self.device.host_touch(block, "unmapping", write=True)
            block.spoil()
        self.device.drain()


def run(seed: int, halves: Any = Halves, *, clocks: bool = True) -> None:
    """Run one schedule; raise Fault for what must not happen."""
    try:
        simulation = Simulation(seed, halves, clocks=clocks)
        try:
            wanted = simulation.random.randrange(2 * simulation.count + 1)
            simulation.train(wanted)
            if simulation.seen < min(wanted, simulation.count):
                raise Fault(f"{simulation.seen} of {simulation.count} batches")
        except RuntimeError as error:
            raise Fault(f"wrong data: {error}") from error
        simulation.close()
    except Fault as fault:
        raise Fault(f"{fault} (seed {seed})") from fault
