"""Run a job's parts on a Ray cluster: the same pure task an input part, scheduled by Ray.

    Job, numbers of parts   ->   on_ray(address)   ->   (number, Part) as they finish
                                 job.py: write_part() in Ray's workers, on any node

A task that runs twice writes the same bytes, atomically, so that a lost node costs only the parts it was at. The inputs
and the store must be where every node sees them: a shared folder, or a URL (remote.py).
"""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nanopack.store.job import Job, Part, write_part
from nanopack.store.remote import count_records

# Jobs that this worker knows, so that a tokenizer is set up once a process and not once a part.
_jobs: dict[str, Job] = {}


class on_ray:
    """The engine that runs on a Ray cluster: that of `address`, else the one that RAY_ADDRESS names, else a local one.

    A driver that has called ray.init already keeps its cluster.
    """

    def __init__(self, address: str | None = None) -> None:
        """Connect. ImportError without Ray, ConnectionError where nothing answers at the address."""
        self._ray = _load()
        if not self._ray.is_initialized():
            self._ray.init(address=address, log_to_driver=False)

    def __call__(self, job: Job, parts: Sequence[int], on_read: Callable[[int], object]) -> Iterator[tuple[int, Part]]:
        """Yield the parts as they finish."""
        ray, key = self._ray, uuid.uuid4().hex
        # in a list, so that a worker fetches it only where it does not know it
        held = [ray.put(job)]
        # a lost worker or node is no fault of a part, however often it comes; an error of the task is not tried again
        write = ray.remote(max_retries=-1, retry_exceptions=False)(_write)
        waiting = {write.remote(key, held, part): part for part in parts}
        try:
            while waiting:
                (done,), _ = ray.wait(list(waiting), num_returns=1)
                part = waiting.pop(done)
                found = _result(ray, done)
                on_read(len(job.conversations(part)))
                yield part, found
        finally:
            for task in waiting:
                ray.cancel(task, force=True)

    def count(self, urls: Sequence[str]) -> list[int]:
        """Return the number of records of each file, counted on the cluster."""
        task = self._ray.remote(max_retries=-1)(count_records)
        counts: list[int] = self._ray.get([task.remote(url) for url in urls])
        return counts


def _result(ray: Any, done: Any) -> Part:
    try:
        found: Part = ray.get(done)
    except ray.exceptions.RayTaskError as error:
        # Ray's error is of the cause's class, too, with all of Ray's text
        raise error.cause from None
    return found


def _write(key: str, held: list[Any], part: int) -> Part:
    if key not in _jobs:
        _jobs[key] = _load().get(held[0])
    return write_part(_jobs[key], part)


def _load() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ImportError("engine='ray' needs Ray; pip install nanopack-gpu[ray]") from error
