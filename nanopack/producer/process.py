"""Run the producer in its own process, so that its Python does not compete with the trainer's for the GIL.

    trainer's process                                   producer's process
    Process.get(), Process.release()  <- BatchFacts -   _serve(): Producer.produce(slot)
                                          a pipe
    both map the ring; its `ProducerStatus` counts messages sent and slots released, and names the producer's stage

A death shows as the end of the pipe rather than as a timeout: only the producer holds its writing end. The producer
ends when a second pipe does, which carries nothing, and in any case when its parent is no longer the one that it
started with: a third process, forked from the trainer, might still hold the trainer's ends of the pipes.

Signals that are for the trainer, such as a scheduler's SIGTERM to the whole group, the producer ignores (child.py): the
trainer may have batches to take before it saves. start.py says how it is started. A forked one touches neither torch's
threads nor CUDA, which do not survive a fork.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import multiprocessing
import os
import pickle
import threading
import time
import weakref
from multiprocessing.connection import Connection
from typing import Any

from nanopack.errors import ProducerError, interrupt_in
from nanopack.producer.child import Failure, how_it_ended, leave_parent_behind, log_here, log_to, widen
from nanopack.producer.cursors import pipes_of
from nanopack.producer.feed import End
from nanopack.producer.producer import Producer, Start
from nanopack.producer.reader import Reader
from nanopack.producer.start import DEFAULT_START_METHOD, Handover, StartMethod, end_with, lives, start
from nanopack.ring.facts import BatchFacts
from nanopack.ring.ring import WAITING, Ring

log = logging.getLogger("nanopack")

# Seconds after which a wait is worth a warning.
STALL = 1.5
# Seconds between a producer's looks for a free slot.
LOOK = 0.002
# Seconds that close() gives a producer to end by itself.
GRACE = 0.1


class Process:
    """A producer in a process of its own. `Feed` describes the methods."""

    def __init__(
        self, reader: Reader, slots: int, workers: int, first: Start, method: StartMethod | None = None
    ) -> None:
        """Start the process. Raises as `start.start` and `Handover.send` do."""
        method = method or DEFAULT_START_METHOD
        if method == "fork" and (shared := pipes_of(reader.source.objects())):
            raise ValueError(
                f"the data set's attribute {shared[0]!r} is an open socket or pipe, which forked processes would "
                f"share: answers would go astray. Connect in each process when it first reads (os.getpid() says "
                f"which), or use num_workers=0"
            )
        context: Any = multiprocessing.get_context(method)
        size = Ring.bytes_of(reader.layout, slots)
        self.ring = Ring(reader.layout, slots, None if method == "fork" else context.RawArray("B", size))
        self._messages, messages = context.Pipe(duplex=False)
        alive, self._alive = context.Pipe(duplex=False)
        self._received = 0
        self._states = b""
        self.waits = False
        self._forked = method == "fork"
        self._closed = False
        self._trainer = os.getpid()
        self._lock = threading.RLock()
        handover = Handover(method, (reader, workers, first))
        arguments = (handover, method, self.ring, messages, alive, self._trainer)
        self._process: Any = context.Process(target=_serve, args=arguments, name="nanopack producer", daemon=True)
        _open.add(self)
        try:
            widen(messages)
            start(self._process, warn_of_threads=reader.source.runs_foreign_code)
            messages.close()
            handover.send(self._process, "the producer process")
        except BaseException:
            # Ctrl-C may come once the process runs, and nobody else could close it then
            self.close()
            raise
        finally:
            handover.close()
            messages.close()
            alive.close()

    @property
    def pid(self) -> int | None:
        """Of the process."""
        pid: int | None = self._process.pid
        return pid

    def get(self, *, wait: bool) -> BatchFacts | End | None:
        """Return the next filled slot, or the end; without `wait`, None if there is none yet."""
        with self._lock:
            while wait or self.qsize():
                message: tuple[Any, ...] | End | Failure | logging.LogRecord = self._receive()
                if isinstance(message, logging.LogRecord):
                    log_here(message)
                    continue
                self._received += 1
                if isinstance(message, Failure):
                    raise message.error()
                if isinstance(message, End):
                    return message
                facts = BatchFacts._make(message)
                self._states = facts.states or self._states
                return facts._replace(states=self._states)
        return None

    def release(self, slot: int) -> None:
        """Give a slot back to be filled again."""
        # Slots are filled and released in turn, so a count says which. A message would wake the producer, which costs
        # the trainer half a millisecond on a virtual machine; the producer looks at the count instead.
        status = self.ring.status
        assert slot == status.released % len(self.ring.slots), (
            "slots are released in the order in which they were filled"
        )
        status.released += 1

    def qsize(self) -> int:
        """Return the number of messages that wait in the pipe."""
        # a message may be here before it is counted
        sent: int = self.ring.status.sent
        return max(0, sent - self._received)

    def close(self) -> None:
        """End the process, whatever it is doing. May be called twice, and from another thread while one waits."""
        if os.getpid() != self._trainer:
            return
        self._closed = True
        with contextlib.suppress(OSError):
            self._alive.close()
        # a producer that waits for a slot ends by itself; one that is busy or stopped is killed: that wakes a `get`
        if self._process.pid is not None:
            self._process.join(GRACE)
            self._process.kill()
            self._process.join()
        with self._lock:
            self._messages.close()
        _open.discard(self)

    def disown(self) -> None:
        """Close the trainer's ends of the pipes in a process forked from it."""
        self._messages.close()
        self._alive.close()

    def _receive(self) -> Any:
        """Return the next message, however long it takes; log a warning when it takes long."""
        waited, patience = 0.0, STALL
        began = time.monotonic()
        self.waits = True
        try:
            while not self.qsize() and not self._messages.poll(min(patience - waited, STALL)):
                # a process forked while this one was started may hold the pipe open
                if not lives(self._process) and not self._messages.poll():
                    raise EOFError
                waited = time.monotonic() - began
                if waited >= patience:
                    log.warning("%s", self._describe_stall(waited))
                    patience *= 2
            self.waits = False
            return self._messages.recv()
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            if self._closed:
                raise RuntimeError("the loader is closed; make a new one") from None
            # a handler that raises TimeoutError
            if interrupt_in(error) is not None:
                raise
            raise self._death() from error

    def _describe_stall(self, waited: float) -> str:
        pid = self._process.pid
        stopped = ""
        # the state of a process is the field after its name, which is in brackets; only Linux has the file
        with contextlib.suppress(OSError, IndexError):
            with open(f"/proc/{pid}/stat") as file:
                state = file.read().rsplit(")", 1)[1].split()[0]
            stopped = ", stopped by a signal (SIGCONT resumes it)" if state in "Tt" else ""
        what = f"waited {waited:.1f} s for the producer process (pid {pid}{stopped}): {self.ring.status.describe()}"
        if self._forked and not stopped and not self.ring.status.sent and waited > 2 * STALL:
            what += (
                ". Nothing came yet: a lock that another thread held at the fork, or threads of the data set's, which "
                'have no copy there? Then make them in __getitem__, or use start_method="spawn" or num_workers=0'
            )
        return what

    def _death(self) -> ProducerError:
        ended = how_it_ended(self._process, self.ring.status.describe())
        return ProducerError(f"the producer process (pid {self._process.pid}) {ended}")


_open: weakref.WeakSet[Process] = weakref.WeakSet()


def _close_all() -> None:
    for process in list(_open):
        process.close()


def _disown_all() -> None:
    for process in list(_open):
        process.disown()


# registered after multiprocessing's own, so it runs first: that one would wait for a producer that is stopped
atexit.register(_close_all)
# any other process forked from the trainer must not keep the pipes open
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_all)


def _serve(
    handover: Handover,
    method: StartMethod,
    ring: Ring,
    messages: Connection,
    alive: Connection,
    trainer: int,
) -> None:
    """Run in the producer process: fill each slot that is free, in order, until the data or the trainer end."""
    try:
        _settle(method, messages, alive, trainer)
        reader, workers, first = handover.receive()
        producer = Producer(reader, first, workers=workers, method=method, status=ring.status)
        _produce(producer, ring, messages, alive)
    except (EOFError, BrokenPipeError):
        pass  # the trainer has closed the loader, or is gone
    except BaseException as error:
        with contextlib.suppress(OSError):
            _send(Failure.of(error), ring, messages)
    finally:
        # nothing here is worth waiting for, and the trainer's unflushed buffers are not ours to write
        os._exit(0)


def _produce(producer: Producer, ring: Ring, messages: Connection, alive: Connection) -> None:
    sent = b""
    for number in itertools.count():
        ring.status.set(WAITING)
        while number >= ring.status.released + len(ring.slots):
            if alive.poll(0 if producer.count_on() else LOOK):
                alive.recv()  # nothing is ever sent: this raises EOFError, the trainer has closed
        facts = producer.produce(ring.slots[number % len(ring.slots)])
        if facts is None:
            return _send(End(producer.packed_state()), ring, messages)
        # with the first of the batches that were planned together; the trainer keeps them for the others
        _send(tuple(facts if facts.states is not sent else facts._replace(states=b"")), ring, messages)
        sent = facts.states


def _send(message: tuple[Any, ...] | End | Failure, ring: Ring, messages: Connection) -> None:
    messages.send(message)
    # counted when all of it is in the pipe: after a look at the count, reading does not wait
    ring.status.sent += 1


def _settle(method: StartMethod, messages: Connection, alive: Connection, trainer: int) -> None:
    """Give up what a forked process inherits from its parent, and end with it."""
    leave_parent_behind()
    log_to(messages)
    # or when it has dropped the loader: `alive` ends then
    end_with(method, trainer, alive.poll)
