"""Read and render in several processes, and hand on in order.

    numbers of conversations   ->   Workers.read_all()   ->   lane.py
                                    Reader.read() in each process: reading.py

Processes, and not threads: what is done for a document beside tokenizing it needs Python, and threads would wait for
each other. Chunks of conversations go out in turn and come back as one message each; what a worker has read is told in
its place in the order, and its death as the end of its pipe.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from nanopack.errors import ConversationError, ProducerError
from nanopack.producer.child import START_METHOD, WATCH, Failure, how_it_ended, leave_parent_behind, widen
from nanopack.producer.reader import CHUNK, Read, Reader

# Requests that a worker may have before it: they must fit its pipe.
UNANSWERED = 64


class Ticket(NamedTuple):
    """A chunk that is in work."""

    worker: int
    number: int


class Workers:
    """Processes that read, at most as far ahead as they are asked to."""

    def __init__(self, count: int, reader: Reader, tell: Callable[[int], None] | None = None) -> None:
        """Start the processes. `tell` is called with the first number of each chunk that is waited for."""
        self._tell = tell
        context: Any = multiprocessing.get_context(START_METHOD)
        # whoever starts them here is itself a process of the loader's, and ends them
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
        self._processes: list[Any] = []
        self._requests: list[Connection] = []
        self._results: list[Connection] = []
        for number in range(count):
            requests, send = context.Pipe(duplex=False)
            receive, results = context.Pipe(duplex=False)
            widen(results)
            arguments = (reader, requests, results, os.getpid())
            process = context.Process(target=_work, args=arguments, name=f"nanopack worker {number}", daemon=True)
            process.start()
            requests.close()
            results.close()
            self._processes.append(process)
            self._requests.append(send)
            self._results.append(receive)
        # the first conversation of each chunk that is in work
        self._asked: list[deque[int]] = [deque() for _ in range(count)]
        self._submitted = 0
        self._received = [0] * count
        self._kept: dict[Ticket, list[Read]] = {}

    def read_all(self, indexes: Iterable[int], *, lanes: int) -> Iterator[Read]:
        """Yield the conversations of these numbers, in this order; as one of so many lanes that do so."""
        numbers, work = iter(indexes), deque[Ticket]()
        chunk = max(1, CHUNK // lanes)
        # one chunk in work and one that waits in each process, shared by the lanes
        ahead = max(1, 2 * len(self._processes) // lanes)
        while part := list(itertools.islice(numbers, chunk)):
            work.append(self._submit(part))
            if len(work) > ahead:
                yield from self._result(work.popleft())
        while work:
            yield from self._result(work.popleft())

    def _submit(self, indexes: list[int]) -> Ticket:
        count = len(self._processes)
        ticket = Ticket(self._submitted % count, self._submitted // count)
        self._submitted += 1
        # one that waits for its results to be taken takes no requests
        while ticket.number - self._received[ticket.worker] >= UNANSWERED:
            self._receive(ticket.worker)
        with self._death_told(ticket.worker):
            self._asked[ticket.worker].append(indexes[0])
            self._requests[ticket.worker].send(indexes)
        return ticket

    def _result(self, ticket: Ticket) -> list[Read]:
        while ticket not in self._kept:
            self._receive(ticket.worker)
        return self._kept.pop(ticket)

    def _receive(self, worker: int) -> None:
        if self._tell is not None:
            self._tell(self._asked[worker][0])
        with self._death_told(worker):
            reads = _unpacked(*self._results[worker].recv())
            self._asked[worker].popleft()
        self._kept[Ticket(worker, self._received[worker])] = reads
        self._received[worker] += 1

    @contextlib.contextmanager
    def _death_told(self, worker: int) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError) as error:
            process = self._processes[worker]
            ended = how_it_ended(process, f"reading and tokenizing, from conversation {self._asked[worker][0]} on")
            raise ProducerError(f"a worker of the producer (pid {process.pid}) {ended}") from error


def _work(reader: Reader, requests: Connection, results: Connection, parent: int) -> None:
    """Be a worker: read what is asked for, until the parent ends."""
    leave_parent_behind()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        while True:
            results.send(_packed(reader.read(requests.recv())))
    except (EOFError, OSError):
        pass  # the parent is gone
    finally:
        os._exit(0)


def _end_with(parent: int) -> None:
    """End the process with its parent, though the data set may be at work."""
    ended = threading.Event()
    while os.getppid() == parent:
        ended.wait(WATCH)
    os._exit(1)


def _error(failure: Failure) -> Exception:
    """Return what is wrong with a conversation: an exception is its own fault, anything else the process's."""
    error = failure.error()
    if failure.ordinary and isinstance(error, ProducerError):
        cause, error = error.__cause__, ConversationError(failure.what)
        error.__cause__ = cause
    return error


def _packed(reads: list[Read]) -> tuple[list[tuple[Any, ...]], bytes, str]:
    """Return what was read as one message: the words of all end to end, and what else there is of each."""
    words = [read.words for read in reads if read.words is not None]
    rest = [
        (
            read.index,
            -1 if read.words is None else len(read.words),
            read.tokens,
            read.cut,
            read.weight,
            read.own_weight,
            None if read.error is None else Failure.of(read.error),
        )
        for read in reads
    ]
    joined = np.concatenate(words) if words else np.empty(0, np.uint16)
    return rest, joined.tobytes(), joined.dtype.str


def _unpacked(rest: list[tuple[Any, ...]], joined: bytes, dtype: str) -> list[Read]:
    words, reads, at = np.frombuffer(joined, dtype), [], 0
    for index, length, tokens, cut, weight, own_weight, failure in rest:
        own = None if length < 0 else words[at : at + length]
        at += max(0, length)
        error = None if failure is None else _error(failure)
        reads.append(Read(index, own, tokens, cut, weight, own_weight, error))
    return reads
