"""What does the trainer feel of its loader?  python bench/trainer.py

A training loop is played by steps of 400 small torch operations on one thread, as the host side of a real step. Its
step time is measured alone, with batches of a Loader(num_workers=1), whose producer is another process, and with a
thread of the same process doing that producer's work. A batch is taken every 32 steps, so that the producer keeps up.
The three take turns in one run; told are ratios to the loop alone. Then: how long `next` takes when batches are ready
(B=32, T=2048, CPU tensors): after steps, when its code and memory are in no cache any more, and right behind another
`next`; and how much of the latter is not the kernel.
"""

from __future__ import annotations

import contextlib
import json
import platform
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from importlib import resources

import numpy as np
import torch

from nanopack import Loader
from nanopack.ring.ring import Ring
from nanopack.upload.device import open_device
from nanopack.upload.executor import make_kernel
from nanopack.upload.outputs import outputs_maker

FILE = str(resources.files("nanopack") / "data" / "conversations.jsonl")
OPERATIONS, STEPS, TURNS, STEPS_A_BATCH, BURSTS = 400, 160, 5, 32, 40


def step(x: torch.Tensor) -> None:
    """Be the host side of a training step."""
    for _ in range(OPERATIONS):
        x = x * 0.999 + 0.001


def step_times_us(take_batch: Callable[[], object]) -> list[float]:
    """Return the times of STEPS steps, some of which take a batch first."""
    x = torch.ones(64)
    times = []
    for number in range(STEPS):
        began = time.perf_counter()
        if number % STEPS_A_BATCH == 0:
            take_batch()
        step(x)
        times.append((time.perf_counter() - began) * 1e6)
    return times


@contextlib.contextmanager
def packing_thread() -> Iterator[Callable[[], object]]:
    """Pack in a thread of this process, as many loaders do, up to four batches ahead; yield what takes one."""
    ready: queue.Queue[object] = queue.Queue(maxsize=4)
    stop = threading.Event()

    def pack() -> None:
        with Loader(FILE, "chat32k", num_workers=0) as loader:
            while not stop.is_set():
                batch = next(loader)
                with contextlib.suppress(queue.Full):
                    ready.put(batch, timeout=0.2)

    thread = threading.Thread(target=pack)
    thread.start()
    try:
        ready.get()
        yield ready.get
    finally:
        stop.set()
        thread.join()


def measure_steps() -> dict[str, list[float]]:
    """Return step times of the three loops, which take turns."""
    times: dict[str, list[float]] = {"alone": [], "process": [], "thread": []}
    for _ in range(TURNS):
        times["alone"] += step_times_us(lambda: None)
        with Loader(FILE, "chat32k", num_workers=1) as loader:
            next(loader)
            times["process"] += step_times_us(lambda loader=loader: next(loader))
        with packing_thread() as take:
            times["thread"] += step_times_us(take)
    return times


def measure_next() -> dict[str, float]:
    """Return medians in us: `next` after other work, those right behind it, and the kernel with its outputs."""
    x = torch.ones(64)
    times: dict[str, list[float]] = {"first": [], "following": [], "kernel": []}
    with Loader(FILE, "chat32k", num_workers=1, prefetch=8) as loader:
        layout, config = loader._producer.layout, loader.config
        ring = Ring(layout, 1)
        loader._producer.produce(ring.slots[0])
        staged = torch.from_numpy(ring.slots[0].buffer)
        cpu = open_device("cpu")
        kernel = make_kernel(None, cpu.device, layout, loader.tokenizer.bos_id, -100)
        make_outputs = outputs_maker(config, layout, cpu.device)
        for _ in range(BURSTS):
            while loader._feed.ready < 6:
                step(x)
            for name in ("first", *["following"] * 5):
                began = time.perf_counter()
                next(loader)
                times[name].append((time.perf_counter() - began) * 1e6)
            for _ in range(6):
                began = time.perf_counter()
                cpu.launch(kernel, staged, make_outputs(), None)
                times["kernel"].append((time.perf_counter() - began) * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Measure, print a table, and the same numbers as JSON on the last line."""
    torch.set_num_threads(1)
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread of torch {torch.__version__}"
    )
    times = measure_steps()
    alone = {"median": np.median(times["alone"]), "p99": np.percentile(times["alone"], 99)}
    result: dict[str, float] = {}
    print(
        f"{'loop':<10}{'median':>12}{'p99':>12}   of the loop alone ({alone['median']:.0f} us, {alone['p99']:.0f} us)"
    )
    for name, values in times.items():
        result[f"{name}_median"] = float(np.median(values) / alone["median"])
        result[f"{name}_p99"] = float(np.percentile(values, 99) / alone["p99"])
        print(f"{name:<10}{result[f'{name}_median']:>11.2f}x{result[f'{name}_p99']:>11.2f}x")
    found = measure_next()
    beside = found["following"] - found["kernel"]
    result |= {f"{name}_us": value for name, value in found.items()} | {"beside_kernel_us": beside}
    print(f"next(loader), batches ready, after other work of the loop's: {found['first']:.0f} us")
    print(f"next(loader) right behind it: {found['following']:.0f} us, {beside:.0f} us of it beside the kernel")
    print(json.dumps({name: round(value, 3) for name, value in result.items()}))


if __name__ == "__main__":
    main()
