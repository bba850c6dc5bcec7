"""Read and tokenize in several processes, and yield the documents in order.

    indices of conversations   ->   Workers.read_all()   ->   shard.py
                                    reader.py: Reader.read() in each process

Processes rather than threads: apart from tokenizing, the work on a document holds the GIL. Chunks go out to the workers
in turn, and each comes back as it was read: the facts of its documents, and their words as one array. A worker's death
shows as the end of its pipe.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from nanopack.errors import ConversationError, ProducerError
from nanopack.producer.child import Failure, how_it_ended, leave_parent_behind, log_here, log_to, widen
from nanopack.producer.chunk import Chunk, Trouble
from nanopack.producer.reader import CHUNK, Reader
from nanopack.producer.start import DEFAULT_START_METHOD, Handover, StartMethod, end_with, start

# Most requests that may wait for a worker: they must fit into its pipe.
UNANSWERED = 64


class Ticket(NamedTuple):
    """A chunk that was asked for: the worker, and the number of the chunk among those of that worker."""

    worker: int
    number: int


class Workers:
    """Processes that read ahead, but never more than was asked for."""

    def __init__(
        self,
        count: int,
        reader: Reader,
        on_chunk: Callable[[int], None] | None = None,
        method: StartMethod = DEFAULT_START_METHOD,
    ) -> None:
        """Start the processes. `on_chunk` is called with the first index of each chunk that is waited for.

        Raises as `start.start` and `Handover.send` do.
        """
        self._on_chunk = on_chunk
        context: Any = multiprocessing.get_context(method)
        # multiprocessing lets no daemonic process start children, because it would orphan them when it is terminated;
        # this one, the producer, may: its workers end themselves when it is gone
        process: Any = multiprocessing.current_process()
        process._config["daemon"] = False
        self._processes: list[Any] = []
        self._requests: list[Connection] = []
        self._results: list[Connection] = []
        handovers = []
        for number in range(count):
            requests, send = context.Pipe(duplex=False)
            receive, results = context.Pipe(duplex=False)
            widen(results)
            handovers.append(Handover(method, reader))
            arguments = (handovers[-1], method, requests, results, os.getpid())
            process = context.Process(target=_work, args=arguments, name=f"nanopack worker {number}", daemon=True)
            start(process)
            requests.close()
            results.close()
            self._processes.append(process)
            self._requests.append(send)
            self._results.append(receive)
        # they import at the same time
        for handover, process in zip(handovers, self._processes, strict=True):
            handover.send(process, "a worker of the producer")
        # the first conversation of each chunk that a worker still owes
        self._asked: list[deque[int]] = [deque() for _ in range(count)]
        self._submitted = 0
        self._received = [0] * count
        self._kept: dict[Ticket, Chunk] = {}

    def read_all(self, indices: Iterable[int], *, shards: int) -> Iterator[Chunk]:
        """Yield the conversations of these indices, in this order; `shards` iterators share the workers."""
        numbers, work = iter(indices), deque[Ticket]()
        chunk = max(1, CHUNK // shards)
        # one chunk in work and one waiting in each process, shared by the shards
        ahead = max(1, 2 * len(self._processes) // shards)
        while part := list(itertools.islice(numbers, chunk)):
            work.append(self._submit(part))
            if len(work) > ahead:
                yield self._result(work.popleft())
        while work:
            yield self._result(work.popleft())

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in (*self._requests, *self._results):
            pipe.close()

    def _submit(self, indices: list[int]) -> Ticket:
        count = len(self._processes)
        ticket = Ticket(self._submitted % count, self._submitted // count)
        self._submitted += 1
        # a worker whose results nobody receives takes no requests
        while ticket.number - self._received[ticket.worker] >= UNANSWERED:
            self._receive(ticket.worker)
        with self._death_named(ticket.worker):
            self._asked[ticket.worker].append(indices[0])
            self._requests[ticket.worker].send(indices)
        return ticket

    def _result(self, ticket: Ticket) -> Chunk:
        while ticket not in self._kept:
            self._receive(ticket.worker)
        return self._kept.pop(ticket)

    def _receive(self, worker: int) -> None:
        if self._on_chunk is not None:
            self._on_chunk(self._asked[worker][0])
        with self._death_named(worker):
            chunk = _receive(self._results[worker])
            self._asked[worker].popleft()
        self._kept[Ticket(worker, self._received[worker])] = chunk
        self._received[worker] += 1

    @contextlib.contextmanager
    def _death_named(self, worker: int) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError) as error:
            process = self._processes[worker]
            ended = how_it_ended(process, f"reading and tokenizing, from conversation {self._asked[worker][0]} on")
            raise ProducerError(f"a worker of the producer (pid {process.pid}) {ended}") from error


def _work(handover: Handover, method: StartMethod, requests: Connection, results: Connection, parent: int) -> None:
    """Run in a worker: read what is asked for, until the parent ends."""
    leave_parent_behind()
    log_to(results)
    end_with(method, parent)
    try:
        reader = handover.receive()
        while True:
            _send(reader.read(requests.recv()), results)
    except (EOFError, OSError):
        pass  # the parent is gone
    finally:
        os._exit(0)


def _error(failure: Failure) -> Exception:
    """Return the error of a conversation: an Exception is its own fault, anything else stops the producer."""
    error = failure.error()
    if failure.ordinary and isinstance(error, ProducerError):
        cause, error = error.__cause__, ConversationError(failure.what)
        error.__cause__ = cause
    return error


def _send(chunk: Chunk, results: Connection) -> None:
    """Send a chunk as two messages: its columns, and the words of all documents."""
    (words,) = chunk.arrays
    failures = {
        position: (None if trouble.error is None else Failure.of(trouble.error), *trouble[1:])
        for position, trouble in chunk.troubles.items()
    }
    results.send((chunk._replace(arrays=(), troubles={}), failures, words.dtype.str))
    results.send_bytes(words.view(np.uint8).data)


def _receive(results: Connection) -> Chunk:
    """Receive a chunk; its words are those of the message."""
    while isinstance(message := results.recv(), logging.LogRecord):
        log_here(message)
    chunk: Chunk
    chunk, failures, dtype = message
    troubles = {
        position: Trouble(None if failure is None else _error(failure), *notes)
        for position, (failure, *notes) in failures.items()
    }
    return chunk._replace(arrays=[np.frombuffer(results.recv_bytes(), dtype)], troubles=troubles)
