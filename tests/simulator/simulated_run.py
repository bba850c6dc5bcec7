"""Run the real loader on the simulated device, with a simulated producer and trainer, all from one seed.

    Config, seed   ->   run()   ->   a Fault that names both, or nothing to say

The loader is a real `Loader(num_workers=0)`: its core decides when a slot is submitted, delivered and reclaimed.
Replaced are its device, its upload (the real one on the simulated device, or a mutant of it) and its feed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from random import Random
from typing import Any

import torch
from actors import Fault, Stream
from simulated import SimulatedDevice
from simulated_feed import DATA_SETS, TOKENIZER, SimulatedFeed, data

from nanopack import Loader
from nanopack.batch import Batch
from nanopack.upload.executor import make_kernel
from nanopack.upload.outputs import outputs_maker
from nanopack.upload.prefetcher import Prefetcher
from nanopack.upload.upload import Upload
from nanopack.verify import first_difference

TENSORS = [field.name for field in fields(Batch) if str(field.type).startswith("torch.Tensor")]
UNMAPPED_BYTE = 0xCD
"""Other rubbish than the device's, so that a copy of it is seen."""


@dataclass(frozen=True)
class Config:
    """What a loader may be asked for; what else can differ is left to the seed."""

    slots: int = 4
    staging: int = 2
    static: bool = False
    overlap_copy: bool = True
    switch: bool = True
    """Whether the trainer changes its stream."""
    prefetch: int | None = None
    """Most batches that are ready and not taken; None: any from 1 to 8."""
    inline: bool = False
    """Whether the producer is in the caller's thread, where it fills a slot when it is waited for."""
    executor: str = "torch"


class Trainer:
    """Reads the batches in all the ways that are allowed: late, on other streams, on the host, or not at all."""

    def __init__(self, device: SimulatedDevice, expected: list[Batch], config: Config) -> None:
        self._device = device
        self._expected = expected
        self._static = config.static
        self._streams = [device.current]
        if config.switch:
            self._streams.append(device.new_stream("another stream"))
        self._side = device.new_stream("a side stream")
        self._held: list[tuple[Batch, Stream]] = []
        self.seen = 0

    def before(self) -> None:
        """Do what a training loop may do before it takes the next batch: change the stream, asking nobody."""
        if self._device.random.random() < 0.4:
            self._device.current = self._device.random.choice(self._streams)

    def use(self, batch: Batch) -> None:
        """Queue what reads the batch, or keep it for later."""
        device, stream = self._device, self._device.current
        if batch.step != self.seen or self.seen == len(self._expected):
            raise Fault(f"batch {batch.step} of {len(self._expected)} comes after {self.seen}")
        self.seen += 1
        for _ in range(device.random.randrange(4)):
            device.work(stream)
        ways = (self._step, self._step, self._step, self._on_the_side, self._on_the_host, self._drop)
        device.random.choice((*ways, self._drop if self._static else self._hold))(batch)
        del batch
        if device.random.random() < 0.1:
            self._synchronize(stream)
        if device.random.random() < 0.3:
            self.let_go()

    def let_go(self) -> None:
        """Read what was kept, each batch on its stream, and drop it."""
        while self._held:
            batch, stream = self._held.pop(self._device.random.randrange(len(self._held)))
            self._step(batch, stream)
            del batch

    def _step(self, batch: Batch, stream: Stream | None = None) -> None:
        device = self._device
        device.read(device.block_of(batch), stream or device.current, self._look(batch))

    def _on_the_side(self, batch: Batch) -> None:
        device, stream = self._device, self._device.current
        device.join(self._side, stream)
        self._step(batch, self._side)
        device.join(stream, self._side)

    def _on_the_host(self, batch: Batch) -> None:
        self._synchronize(self._device.current)
        self._device.host_touch(self._device.block_of(batch), "look", write=False)
        self._look(batch)()

    def _drop(self, batch: Batch) -> None:
        pass

    def _hold(self, batch: Batch) -> None:
        self._held.append((batch, self._device.current))

    def _synchronize(self, stream: Stream) -> None:
        event = self._device.new_event()
        self._device.record(event, stream)
        self._device.synchronize(event)

    def _look(self, batch: Batch) -> Callable[[], None]:
        """Return a check that compares the batch's memory, when it is called, with the reference's batch."""
        expected = self._expected[batch.step]
        # .data: looks at the memory, and does not keep it
        tensors = {name: tensor.data for name in TENSORS if (tensor := getattr(batch, name)) is not None}
        same_memory = replace(batch, **tensors)

        def look() -> None:
            if (difference := first_difference(expected, same_memory)) is not None:
                raise Fault(f"wrong data: batch {expected.step}, {difference}")

        return look


class Simulation:
    """A loader on a simulated device, before its first batch."""

    def __init__(
        self,
        config: Config,
        seed: int,
        upload: type[Upload] = Upload,
        *,
        clocks: bool = True,
        hasty: bool = False,
        data_set: int | None = None,
    ) -> None:
        random = self.random = Random(seed)
        chosen = self.data = data(random.randrange(DATA_SETS) if data_set is None else data_set)
        device = self.device = SimulatedDevice(random, clocks=clocks)
        self.loader = Loader(chosen.conversations, TOKENIZER, num_workers=0, **chosen.arguments)
        loader_config = self.loader.config
        layout = self.loader._run.reader.layout
        slots = [device.host_slot(number, layout.nbytes) for number in range(config.slots)]
        self.slots = [slot.block for slot in slots]
        self.trainer = Trainer(device, chosen.batches, config)
        for _ in range(random.randrange(3)):
            device.work(device.current)
        self.memory_is_short = 0.0
        make = outputs_maker(loader_config, layout, torch.device("cpu"))

        def outputs() -> Any:
            if random.random() < self.memory_is_short:
                raise torch.OutOfMemoryError
            return device.outputs(make)

        self.upload = upload(
            device,
            slots,
            outputs,
            make_kernel(
                config.executor, torch.device("cpu"), layout, self.loader.tokenizer.bos_id, loader_config.ignore_index
            ),
            staging=config.staging,
            overlap_copy=config.overlap_copy,
            static=config.static,
        )
        prefetch = config.prefetch or random.randint(1, 8)
        self.feed = SimulatedFeed(device, chosen, self.slots, prefetch, inline=config.inline, hasty=hasty)
        self.loader._run.prefetcher = Prefetcher(device, self.feed, self.upload, ahead=config.overlap_copy)

    def train(self, batches: int) -> bool:
        """Train on this many batches; return whether the data ended first."""
        trainer, expected = self.trainer, self.data.batches
        while trainer.seen < batches:
            trainer.before()
            try:
                batch = next(self.loader)
            except torch.OutOfMemoryError:
                if self.random.random() < 0.2:
                    return False
                continue
            except (StopIteration, ValueError) as end:
                if trainer.seen != len(expected) or type(end) is not self.data.ends_with:
                    raise Fault(f"{end!r} after {trainer.seen} of {len(expected)} batches") from end
                return True
            trainer.use(batch)
            del batch
        return False

    def check_that_slots_come_back(self) -> None:
        """After the end of the data, once all is copied, every slot must be free."""
        self.device.drain()
        if sorted([*self.upload.reclaim(), *self.feed.slots]) != list(range(len(self.slots))):
            raise Fault("a slot did not come back")

    def close(self) -> None:
        """Close everything, with the trainer's steps still to run, and take the memory away."""
        self.trainer.before()
        if self.random.random() < 0.5:
            self.trainer.let_go()
        for _ in range(self.random.choice((1, 1, 2))):
            self.loader.close()
            self.feed.close()
            self.upload.close()
        for block in self.slots:
            self.device.host_touch(block, "unmapping", write=True)
            block.tensors[0].fill_(UNMAPPED_BYTE)
        self.trainer.let_go()
        self.device.drain()
        # the traceback of an error holds the batch that was being delivered when it came
        if self.device.live_bytes and self.data.ends_with is StopIteration:
            raise Fault(f"{self.device.live_bytes} bytes of device memory are not let go")


def run(
    config: Config, seed: int, upload: type[Upload] = Upload, *, batches: int | None = None, **options: Any
) -> None:
    """Run one schedule of `batches` batches (None: a random number); raise Fault for what must not happen."""
    try:
        simulation = Simulation(config, seed, upload, **options)
        simulation.memory_is_short = simulation.random.choice((0.0, 0.1))
        if batches is None:
            batches = simulation.random.randrange(2 * len(simulation.data.batches) + 1)
        if simulation.train(batches) and simulation.random.random() < 0.5:
            simulation.check_that_slots_come_back()
        simulation.close()
    except Fault as fault:
        raise Fault(f"{fault} ({config}, seed {seed})") from fault
