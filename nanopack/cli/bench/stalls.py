"""How long does the trainer wait for its batches, and what else does it feel of its loader?

    a step begins on the device   ->   next(loader) on the host   ->   the host waits for the device
    a loop of host work alone     ->   the same with a loader     ->   the ratio of step times

The first is the order of nanochat's loop: the next batch is fetched while the device works. Reported are the time in
`next`, which the host feels, and its excess over the step, which the device feels. The clock plays the device, and the
host waits for it without sleeping, as a host does that launches kernels or waits in CUDA's default way; a sleeping host
would lend its core to the loaders. On two cores this is the harder test.

The second is a loop of small torch operations on one thread, the host side of a training step: what does a producer
cost it, as a process and as a thread? Last: how long does `next` take if batches are ready, after other work, which
evicts its code and memory from the caches, and right after another `next`? (bench_stages.py measures the kernel alone.)
"""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from nanopack.cli.bench import nanochat
from nanopack.cli.bench.corpus import ROW, ROWS, Data
from nanopack.cli.bench.rounds import (
    Contender,
    Measure,
    Pace,
    Result,
    Spread,
    Table,
    Work,
    in_rounds,
    not_measured,
    ratio,
)
from nanopack.cli.bench.throughput import MIDTRAINING, SFT, generator, loader
from nanopack.loader import Loader

STEPS_MS = (5, 20, 100)
QUICK_STEPS_MS = (20,)
LEAST_STEPS = 4
"""Steps of one measurement."""
OPERATIONS, STEPS, STEPS_A_BATCH = 400, 160, 32
"""Of the loop of host work: a batch is fetched so rarely that the producer keeps up."""
READY, BURSTS, FILL_S = 6, 20, 1.0
"""Batches that are fetched in a burst, once the producer has had time to fill the ring."""
ALONE = "the loop alone"


class Waits(NamedTuple):
    """Waits of one measurement, in milliseconds."""

    in_next_ms: float  # mean of a step
    device_waits_ms: float  # mean of a step: the time in `next` beyond the step
    longest_next_ms: float


class PackedInWorkers(IterableDataset[Any]):
    """nanochat's SFT generator in each worker of a DataLoader, over that worker's shard of the chats."""

    def __init__(self, data: Data) -> None:
        self._data = data

    def __iter__(self) -> Iterator[Any]:
        worker: Any = get_worker_info()
        render = nanochat.renderer(self._data.tokenizer.encoding)
        shard = {"rank": worker.id, "world_size": worker.num_workers}
        return nanochat.sft(self._data.chats, render, ROWS, ROW, **shard)


@contextlib.contextmanager
def data_loader(data: Data, workers: int) -> Iterator[Work]:
    """Open torch's DataLoader with workers that render and pack; yield what fetches a batch."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    dataset = PackedInWorkers(data)
    held = [iter(DataLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context=context))]
    try:
        yield lambda: int(next(held[0])[2])
    finally:
        # the workers end with the iterator
        held.clear()


def play(work: Work, step_ms: float, seconds: float, least_steps: int = LEAST_STEPS) -> Waits:
    """Play a training loop for about `seconds`, and return how long its steps waited."""
    nexts: list[float] = []
    beyond: list[float] = []
    began = time.perf_counter()
    while len(nexts) < least_steps or time.perf_counter() - began < seconds:
        asked = time.perf_counter()
        work()
        got = time.perf_counter()
        nexts.append(1000 * (got - asked))
        beyond.append(max(0.0, nexts[-1] - step_ms))
        while time.perf_counter() < asked + step_ms / 1000:
            pass
    return Waits(sum(nexts) / len(nexts), sum(beyond) / len(beyond), max(nexts))


def _waits(contender: Contender, drain: int, step_ms: float) -> Measure[Waits]:
    def measure(seconds: float) -> Waits:
        with contender() as work:
            for _ in range(drain):
                work()
            # a generator makes nothing ahead, and needs no steps to settle
            play(work, step_ms, 0, drain)
            return play(work, step_ms, seconds)

    return measure


def measure(data: Data, pace: Pace) -> list[Table]:
    """Return the waits of each loader at each step time, what a loader costs a host loop, and the time in `next`."""
    contenders: dict[str, tuple[Contender, int]] = {
        "nanopack, num_workers=1": (partial(loader, data, num_workers=1), pace.drain),
        "nanopack, num_workers=2": (partial(loader, data, num_workers=2), pace.drain),
        MIDTRAINING: (partial(generator, data, nanochat.midtraining), 1),
        SFT: (partial(generator, data, nanochat.sft), 1),
        "torch DataLoader, 2 workers, SFT in them": (partial(data_loader, data, 2), pace.drain),
    }
    tables = []
    for step_ms in QUICK_STEPS_MS if pace.quick else STEPS_MS:
        measures = {name: _waits(contender, drain, step_ms) for name, (contender, drain) in contenders.items()}
        measured = in_rounds(measures, pace)
        tables.append(Table(f"A step of {step_ms} ms", [_result(name, waits) for name, waits in measured.items()]))
    return [*tables, _with_host_work(data, pace), _next_when_ready(data, pace)]


def _result(name: str, waits: Sequence[Waits]) -> Result:
    return Result(name, {field: Spread(tuple(getattr(each, field) for each in waits)) for field in Waits._fields})


def host_step(x: torch.Tensor) -> None:
    """Do the host work of a training step."""
    for _ in range(OPERATIONS):
        x = x * 0.999 + 0.001


@contextlib.contextmanager
def packing_thread(data: Data) -> Iterator[Work]:
    """Pack in a thread of this process, as many loaders do, up to four batches ahead; yield what fetches one."""
    ready: queue.Queue[int] = queue.Queue(maxsize=4)
    stop = threading.Event()

    def pack() -> None:
        with loader(data, num_workers=0) as work:
            while not stop.is_set():
                tokens = work()
                with contextlib.suppress(queue.Full):
                    ready.put(tokens, timeout=0.2)

    thread = threading.Thread(target=pack)
    thread.start()
    try:
        yield ready.get
    finally:
        stop.set()
        thread.join()


def _with_host_work(data: Data, pace: Pace) -> Table:
    contenders: Mapping[str, Contender] = {
        ALONE: lambda: contextlib.nullcontext(lambda: 0),
        "nanopack, num_workers=1": partial(loader, data, num_workers=1),
        "a packing thread in this process": partial(packing_thread, data),
    }
    steps = STEPS // 4 if pace.quick else STEPS
    measured = in_rounds({name: partial(_host_loop, each, steps) for name, each in contenders.items()}, pace)
    medians, tails = (
        {name: Spread(tuple(float(np.percentile(times, at)) for times in rounds)) for name, rounds in measured.items()}
        for at in (50, 99)
    )
    results = [
        Result(
            name,
            {
                "step_us": medians[name],
                "step_p99_us": tails[name],
                "median_to_alone_x": ratio(medians[name], medians[ALONE]),
                "p99_to_alone_x": ratio(tails[name], tails[ALONE]),
            },
        )
        for name in contenders
    ]
    return Table(f"A step of {OPERATIONS} small torch operations, a batch every {STEPS_A_BATCH}", results)


def _host_loop(contender: Contender, steps: int, _: float) -> list[float]:
    """Return the time of each step in microseconds, with the batch that some of them fetch."""
    x = torch.ones(64)
    times = []
    with contender() as work:
        work()
        for number in range(steps):
            began = time.perf_counter()
            if number % STEPS_A_BATCH == 0:
                work()
            host_step(x)
            times.append((time.perf_counter() - began) * 1e6)
    return times


def _next_when_ready(data: Data, pace: Pace) -> Table:
    settings: dict[str, Any] = {"max_document_tokens": ROW, "num_workers": 1, "device": "cpu", "prefetch": READY + 2}
    names = ("after other work", *["right after another"] * (READY - 1))
    times: dict[str, list[float]] = {name: [] for name in names}
    x = torch.ones(64)
    with Loader(data.chats, data.tokenizer, ROWS, ROW, **settings) as batches:
        for number in range(2 if pace.quick else BURSTS):
            pace.show(f"next, batches ready: {number + 1}")
            waited, began = batches.stats()["waited_for_producer_s"], time.perf_counter()
            while time.perf_counter() - began < FILL_S:
                host_step(x)
            burst = []
            for _ in names:
                began = time.perf_counter()
                next(batches)
                burst.append((time.perf_counter() - began) * 1e6)
            # a wait means that the ring was not full
            if batches.stats()["waited_for_producer_s"] == waited:
                for name, time_us in zip(names, burst, strict=True):
                    times[name].append(time_us)
    results = [
        Result(name, {"next_us": Spread(tuple(all_us))})
        if all_us
        else not_measured(name, "the producer never filled the ring in time")
        for name, all_us in times.items()
    ]
    return Table("next(loader) when batches are ready, num_workers=1", results)
