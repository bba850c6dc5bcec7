"""Run a job's parts: here one after the other, or in processes on all cores.

Job, numbers of parts   ->   run_here(), run_in_processes()   ->   (number, Part) as they finish
                             job.py: write_part()                  ray.py is another one of these
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from nanopack.errors import ProducerError
from nanopack.store.job import Job, Part, write_part

Engine = Callable[[Job, Sequence[int], Callable[[int], object]], Iterator[tuple[int, Part]]]
"""Yields parts as they finish; reports how many conversations were read since the last report."""

# Seconds between two reports of the progress, and after which an orphan ends itself.
TICK = 0.2
# What a worker works with: inherited by the fork, or sent once.
_work: dict[str, Any] = {}


def run_here(job: Job, parts: Sequence[int], on_read: Callable[[int], object]) -> Iterator[tuple[int, Part]]:
    """Tokenize the parts in this process."""
    for part in parts:
        yield part, write_part(job, part, on_read)


def run_in_processes(workers: int) -> Engine:
    """Return the engine that tokenizes with `workers` processes; they end with this one, however it ends."""

    def run(job: Job, parts: Sequence[int], on_read: Callable[[int], object]) -> Iterator[tuple[int, Part]]:
        # a Hugging Face tokenizer sets its encoding up before processes are forked
        _ = job.tokenizer.encoder
        forks = "fork" in multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("fork" if forks else None)
        read = context.Value("q", 0)
        pool = ProcessPoolExecutor(workers, context, _begin, (job, read, os.getpid()))
        with _ended(pool):
            futures = {pool.submit(_write, part): part for part in parts}
            yield from _finished(futures, _reporter(read, on_read))

    return run


def _reporter(read: Any, on_read: Callable[[int], object]) -> Callable[[], object]:
    """Return the function that reports what was read since it was called last."""
    reported = 0

    def report() -> None:
        nonlocal reported
        # without its lock, which a killed worker may hold
        now = read.get_obj().value
        on_read(now - reported)
        reported = now

    return report


def _finished(futures: dict[Future[Part], int], report: Callable[[], object]) -> Iterator[tuple[int, Part]]:
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, TICK, FIRST_COMPLETED)
        report()
        # of several errors the first one in the data
        for future in sorted(done, key=futures.__getitem__):
            try:
                yield futures[future], future.result()
            except BrokenProcessPool as error:
                raise ProducerError(
                    "a tokenizing process was killed (out of memory?); what was finished stays: run the same again, "
                    "with fewer workers if it was the memory"
                ) from error


@contextlib.contextmanager
def _ended(pool: ProcessPoolExecutor) -> Iterator[None]:
    """Kill the pool's processes where the block fails: nobody waits for a part that nobody wants."""
    try:
        yield
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(job: Job, read: Any, parent: int) -> None:
    """Set a worker up."""
    # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _work.update(job=job, read=read)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(TICK)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write(part: int) -> Part:
    read = _work["read"]

    def on_read(count: int) -> None:
        with read.get_lock():
            read.value += count

    return write_part(_work["job"], part, on_read)
