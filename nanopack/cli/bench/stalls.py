"""How long does the trainer wait for its batch, and how long would its GPU stand still for it?

    a step begins on the device   ->   next(loader) on the host   ->   the host waits for the device

That is the order of nanochat's loop: the next batch is fetched while the device works. Told are the time in `next`,
which the host feels, and what of it goes beyond the step, which the device feels. The device is played by the clock.
The host waits for it without sleep: so does a host that launches kernels, or waits in CUDA's default way; a sleeping
one would lend its core to the loaders. On two cores this is the harder test.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from nanopack.cli.bench import nanochat
from nanopack.cli.bench.corpus import ROW, ROWS, Data
from nanopack.cli.bench.rounds import Pace, Row, Spread, Table, Take, Turn, take_turns
from nanopack.cli.bench.throughput import MIDTRAINING, SFT, generator, loader

STEPS_MS = (5, 20, 100)
QUICK_STEPS_MS = (20,)
# Of a turn.
LEAST_STEPS = 4


class Waits(NamedTuple):
    """Of one turn, milliseconds."""

    in_next_ms: float
    """Mean of a step."""
    device_waits_ms: float
    """Mean of a step: the time in `next` beyond the step."""
    longest_next_ms: float
    """Longest `next`."""


class PackedInWorkers(IterableDataset[Any]):
    """nanochat's SFT generator in each worker of a DataLoader, over that worker's share of the chats."""

    def __init__(self, data: Data) -> None:
        self._data = data

    def __iter__(self) -> Iterator[Any]:
        worker: Any = get_worker_info()
        render = nanochat.renderer(self._data.tokenizer.encoding)
        share = {"rank": worker.id, "world_size": worker.num_workers}
        return nanochat.sft(self._data.chats, render, ROWS, ROW, **share)


@contextlib.contextmanager
def data_loader(data: Data, workers: int) -> Iterator[Take]:
    """Open torch's DataLoader with workers that render and pack; yield what takes a batch."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    dataset = PackedInWorkers(data)
    held = [iter(DataLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context=context))]
    try:
        yield lambda: int(next(held[0])[2])
    finally:
        # the workers end with the iterator
        held.clear()


def play(take: Take, step_ms: float, seconds: float, least_steps: int = LEAST_STEPS) -> Waits:
    """Train for so many seconds, and return how long the steps waited."""
    nexts: list[float] = []
    beyond: list[float] = []
    began = time.perf_counter()
    while len(nexts) < least_steps or time.perf_counter() - began < seconds:
        asked = time.perf_counter()
        take()
        got = time.perf_counter()
        nexts.append(1000 * (got - asked))
        beyond.append(max(0.0, nexts[-1] - step_ms))
        while time.perf_counter() < asked + step_ms / 1000:
            pass
    return Waits(sum(nexts) / len(nexts), sum(beyond) / len(beyond), max(nexts))


def _turn(open_: Callable[[], AbstractContextManager[Take]], drain: int, step_ms: float) -> Turn[Waits]:
    def turn(seconds: float) -> Waits:
        with open_() as take:
            for _ in range(drain):
                take()
            # a generator makes nothing ahead, and needs no steps to come into its stride
            play(take, step_ms, 0, drain)
            return play(take, step_ms, seconds)

    return turn


def measure(data: Data, pace: Pace) -> list[Table]:
    """Return what each loader makes a step wait, at each step time."""
    contenders: dict[str, tuple[Callable[[], AbstractContextManager[Take]], int]] = {
        "nanopack, num_workers=1": (partial(loader, data, num_workers=1), pace.drain),
        "nanopack, num_workers=2": (partial(loader, data, num_workers=2), pace.drain),
        MIDTRAINING: (partial(generator, data, nanochat.midtraining), 1),
        SFT: (partial(generator, data, nanochat.sft), 1),
        "torch DataLoader, 2 workers, SFT in them": (partial(data_loader, data, 2), pace.drain),
    }
    tables = []
    for step_ms in QUICK_STEPS_MS if pace.quick else STEPS_MS:
        turns = {name: _turn(open_, drain, step_ms) for name, (open_, drain) in contenders.items()}
        measured = take_turns(turns, pace)
        tables.append(Table(f"A step of {step_ms} ms", [_row(name, waits) for name, waits in measured.items()]))
    return tables


def _row(name: str, waits: Sequence[Waits]) -> Row:
    return Row(name, {field: Spread(tuple(getattr(each, field) for each in waits)) for field in Waits._fields})
