"""What does growth cost: more data, wider windows, more workers, a later step to resume at; and the first batch?

    the data 1, 10, 100 times over             ->   tokens per second, memory of the trainer and of its processes
    best fit of windows 16 to 4096             ->   microseconds a document, ours and by a scan of all that wait
    workers 1 to the number of cores           ->   tokens per second
    Loader(...) to the first batch             ->   seconds
    load_state_dict(...) to the first batch    ->   milliseconds, for states saved early and late

The data is repeated by arithmetic, not copied, shuffled, and read once, or for LIMIT_S; starting the producer counts.
Memory is Linux's: resident, which counts pages shared with other processes, and private, which does not. A loader that
replays what it has read would take a thousand times as long to resume at step 100,000 as at step 100.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nanopack.cli.bench.corpus import ROW, ROWS, Data, Repeated
from nanopack.cli.bench.padding import lengths
from nanopack.cli.bench.rounds import Pace, Result, Spread, Table, in_rounds, ratio, spreads, tokens_per_s
from nanopack.cli.bench.throughput import loader
from nanopack.loader import Loader
from nanopack.packing import BestFit

TIMES, QUICK_TIMES = (1, 10, 100), (1, 10)
LIMIT_S, QUICK_LIMIT_S = 15.0, 0.5
WINDOW_SIZES = (16, 64, 256, 1024, 4096)
QUICK_WINDOW_SIZES = (16, 256)
MB = 1e6
RESUME_STEPS, QUICK_RESUME_STEPS = (100, 100_000), (10, 200)
RESUME_ROWS, RESUME_ROW = 4, 256


def measure(data: Data, pace: Pace) -> list[Table]:
    """Return a table for each of the five."""
    parts = (_data_grows, _windows_grow, _workers_grow, _startup, _resume)
    return [part(data, pace) for part in parts]


def _data_grows(data: Data, pace: Pace) -> Table:
    rows = []
    for times in QUICK_TIMES if pace.quick else TIMES:
        pace.show(f"the data {times} times")
        chats = Repeated(data.chats, times)
        numbers = _one_pass(data, chats, QUICK_LIMIT_S if pace.quick else LIMIT_S)
        note = "" if "trainer_resident_mb" in numbers else "memory not measured: no /proc here"
        rows.append(Result(f"{times} x the data", numbers, note))
    return Table("More data, num_workers=1, one pass", rows)


def _one_pass(data: Data, chats: Sequence[Any], limit_s: float) -> dict[str, Any]:
    settings: dict[str, Any] = {"max_document_tokens": ROW, "epochs": 1, "seed": 0, "num_workers": 1, "device": "cpu"}
    memory: dict[str, Any] = {}
    tokens, progress = 0, 0.0
    began = time.perf_counter()
    with Loader(chats, data.tokenizer, ROWS, ROW, **settings) as batches:
        for batch in batches:
            tokens, progress = tokens + batch.num_tokens, batch.progress
            # near the end of the pass the producer may have ended
            if batch.step % 64 == 0 or not memory:
                memory = memory_mb() or memory
            if time.perf_counter() - began > limit_s:
                break
        elapsed = time.perf_counter() - began
    return {"tokens_per_s": tokens / elapsed, "conversations": len(chats), "passed_fraction": progress, **memory}


def memory_mb() -> dict[str, float]:
    """Return the memory of this process, and of its descendants together; nothing without /proc."""
    with contextlib.suppress(OSError):
        trainer, others = _memory_of(os.getpid()), [_memory_of(pid) for pid in _descendants(os.getpid())]
        return {
            "trainer_resident_mb": trainer[0],
            "trainer_private_mb": trainer[1],
            "producer_resident_mb": sum(resident for resident, _ in others),
            "producer_private_mb": sum(private for _, private in others),
        }
    return {}


def _memory_of(pid: int) -> tuple[float, float]:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    kilobytes = {name: int(number) for name, number in re.findall(r"^(\w+): +(\d+) kB$", rollup, re.M)}
    private = kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]
    return kilobytes["Rss"] * 1024 / MB, private * 1024 / MB


def _descendants(pid: int) -> list[int]:
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            found += [child, *_descendants(child)]
    return found


def _windows_grow(data: Data, pace: Pace) -> Table:
    sizes = QUICK_WINDOW_SIZES if pace.quick else WINDOW_SIZES
    some = lengths(data, 2 * max(sizes))
    measures = {}
    for window in sizes:
        measures[f"window {window}"] = partial(_choose, some, window)
        measures[f"window {window}, scanned"] = partial(_scan, some, window)
    costs = spreads(in_rounds(measures, pace, pace.seconds / 4))
    rows = [
        Result(
            str(window),
            {
                "best_fit_us": costs[f"window {window}"],
                "scan_us": costs[f"window {window}, scanned"],
                "scan_to_best_fit_x": ratio(costs[f"window {window}, scanned"], costs[f"window {window}"]),
            },
        )
        for window in sizes
    ]
    return Table("Wider windows: choosing a document", rows, "window")


def _choose(all_lengths: Sequence[int], window: int, seconds: float) -> float:
    """Return microseconds a document for our best fit, with a full window."""
    kept = np.minimum(all_lengths, ROW + 1)
    firsts = itertools.count(step=len(kept))

    def read() -> tuple[np.ndarray, np.ndarray]:
        return np.arange(len(kept)) + next(firsts), kept

    packer = BestFit(window=window).build(read, batch_size=1, seq_len=ROW)
    packer.next_rows()
    before, began = packer.packed, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds or packer.packed == before:
        packer.next_rows()
    return elapsed * 1e6 / (packer.packed - before)


def _scan(all_lengths: Sequence[int], window: int, seconds: float) -> float:
    """Return microseconds a document for nanochat's best fit, which scans all that wait; lengths only, as above."""
    numbers = iter(range(1 << 60))
    waiting: list[int] = []

    def row() -> int:
        room, placed = ROW + 1, 0
        while room:
            while len(waiting) < window:
                waiting.append(min(all_lengths[next(numbers) % len(all_lengths)], ROW + 1))
            best, best_length = -1, 0
            for i, length in enumerate(waiting):
                if length <= room and length > best_length:
                    best, best_length = i, length
            if best < 0:
                break
            room -= waiting.pop(best)
            placed += 1
        return placed

    row()
    placed, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds or not placed:
        placed += row()
    return elapsed * 1e6 / placed


def _workers_grow(data: Data, pace: Pace) -> Table:
    cores = os.cpu_count() or 1
    counts = sorted({*(2**power for power in range(cores.bit_length())), cores})
    measures = {
        f"num_workers={workers}": tokens_per_s(partial(loader, data, num_workers=workers), warm=pace.drain)
        for workers in counts
    }
    speeds = spreads(in_rounds(measures, pace))
    rows = [
        Result(name, {"tokens_per_s": speed, "to_1_worker_x": ratio(speed, speeds["num_workers=1"])})
        for name, speed in speeds.items()
    ]
    return Table(f"More workers, of {cores} cores", rows)


def _startup(data: Data, pace: Pace) -> Table:
    measures = {f"num_workers={workers}": partial(_first_batch, data, workers) for workers in (0, 1, 2)}
    rows = [
        Result(name, {"first_batch_s": Spread(tuple(rounds))}) for name, rounds in in_rounds(measures, pace).items()
    ]
    return Table("From Loader(...) to the first batch, window 64", rows)


def _first_batch(data: Data, workers: int, _: float) -> float:
    began = time.perf_counter()
    with loader(data, num_workers=workers, packing=BestFit(window=64)) as work:
        work()
        return time.perf_counter() - began


def _resume(data: Data, pace: Pace) -> Table:
    steps = QUICK_RESUME_STEPS if pace.quick else RESUME_STEPS
    records = [{"input_ids": document.ids, "loss_mask": document.mask} for document in data.documents]
    settings: dict[str, Any] = {"loss": "all", "num_workers": 0, "device": "cpu"}
    states = {}
    with Loader(records, data.tokenizer, RESUME_ROWS, RESUME_ROW, **settings) as batches:
        for step in range(max(steps) + 1):
            if step in steps:
                states[step] = json.loads(json.dumps(batches.state_dict()))
            if step % 1000 == 0:
                pace.show(f"packing to step {max(steps):,}: {step:,}")
            next(batches)

        def resume(step: int, _: float) -> float:
            began = time.perf_counter()
            batches.load_state_dict(states[step])
            next(batches)
            return (time.perf_counter() - began) * 1000

        times = spreads(in_rounds({f"{step}": partial(resume, step) for step in steps}, pace))
    results = [
        Result(
            f"{step}",
            {
                "first_batch_ms": times[f"{step}"],
                f"to_step_{steps[0]}_x": ratio(times[f"{step}"], times[f"{steps[0]}"]),
                "state_bytes": len(json.dumps(states[step])),
            },
        )
        for step in steps
    ]
    return Table(f"Resuming pretokenized documents, B={RESUME_ROWS}, T={RESUME_ROW}, num_workers=0", results, "step")
