"""Run the producer in a process of its own, so that no Python runs beside the trainer's.

    trainer's process                                   producer's process
    Process.take(), Process.free()   <- news, a pipe -   _serve(): Producer.produce(slot)
    both map the ring; its `Signs` count messages posted and slots freed, and tell what the producer is at

A death shows as the end of the pipe and not as a timeout: nobody but the producer holds the writing end of the news.
The producer ends when a second pipe does, which carries nothing, and in any case when its parent is not the one that it
had at the start: a third process, forked from the trainer, might still hold the trainer's ends of the pipes.

On Linux the producer is forked: it needs no pickling and no `__main__` guard, and it touches neither torch's threads
nor CUDA, which do not survive a fork. Elsewhere it is spawned, and what it gets must be picklable.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from nanopack.config import LoaderConfig
from nanopack.conversations.records import Source
from nanopack.errors import ProducerError
from nanopack.producer.child import START_METHOD, WATCH, Failure, how_it_ended, leave_parent_behind, widen
from nanopack.producer.feed import End, News
from nanopack.producer.producer import Produced, Producer, Start
from nanopack.ring.layout import Layout
from nanopack.ring.ring import Ring
from nanopack.ring.signs import WAITING
from nanopack.ring.slot import Filled, PieceTable
from nanopack.tokenizers.tokenizer import AnyTokenizer

log = logging.getLogger("nanopack")

# Seconds after which a wait is worth a warning.
STALL = 1.5
# Seconds between a producer's looks for a free slot.
LOOK = 0.002
# Seconds that close() leaves a producer to end by itself.
GRACE = 0.1


class Process:
    """A feed whose producer runs in a process of its own. See `Feed` for what its methods do."""

    def __init__(
        self,
        source: Source,
        tokenizer: AnyTokenizer,
        config: LoaderConfig,
        layout: Layout,
        slots: int,
        workers: int,
        start: Start,
    ) -> None:
        """Start the process. Raises ValueError where it cannot be started here, and says what else is possible."""
        context: Any = multiprocessing.get_context(START_METHOD)
        size = Ring.bytes_of(layout, slots)
        self.ring = Ring(layout, slots, None if START_METHOD == "fork" else context.RawArray("B", size))
        self._news, news = context.Pipe(duplex=False)
        alive, self._alive = context.Pipe(duplex=False)
        self._received = 0
        self._closed = False
        self._trainer = os.getpid()
        self._lock = threading.RLock()
        _open.add(self)
        arguments = (source, tokenizer, config, workers, start, self.ring, news, alive, self._trainer)
        self._process: Any = context.Process(target=_serve, args=arguments, name="nanopack producer", daemon=True)
        try:
            widen(news)
            _start(self._process)
        except BaseException:
            # Ctrl-C may have come when the process stood already, and nobody else has it to close
            self.close()
            raise
        finally:
            news.close()
            alive.close()

    def take(self, *, wait: bool) -> News | End | None:
        """Return the next ready slot, or the end; without `wait`, None if there is none yet."""
        with self._lock:
            while wait or self.ready:
                message: tuple[Any, ...] | End | Failure | logging.LogRecord = self._receive()
                if isinstance(message, logging.LogRecord):
                    # a spawned producer does not know the level that is set here
                    if log.isEnabledFor(message.levelno):
                        log.handle(message)
                    continue
                self._received += 1
                if isinstance(message, Failure):
                    raise message.error()
                return message if isinstance(message, End) else _news(message)
        return None

    def free(self, slot: int) -> None:
        """Give a slot back to be filled again."""
        # Slots are filled and come free in turn, so a count says which. A message would wake the producer, which costs
        # the trainer half a millisecond on a virtual machine; the producer looks at the count instead.
        assert slot == self.ring.signs.freed % len(self.ring.slots), (
            "slots come free in the order in which they were filled"
        )
        self.ring.signs.freed += 1

    @property
    def ready(self) -> int:
        """Messages that are waiting to be taken."""
        # a message may be here before it is counted
        return max(0, self.ring.signs.posted - self._received)

    def close(self) -> None:
        """End the process, whatever it is at. May be called twice, and from another thread while one waits."""
        if os.getpid() != self._trainer:
            return
        self._closed = True
        with contextlib.suppress(OSError):
            self._alive.close()
        # a producer that waits for a slot ends by itself; one that is busy or stopped is ended, and wakes who waits
        if self._process.pid is not None:
            self._process.join(GRACE)
            self._process.kill()
            self._process.join()
        with self._lock:
            self._news.close()
        _open.discard(self)

    def disown(self) -> None:
        """In a process forked from the trainer: let go of its ends of the pipes."""
        self._news.close()
        self._alive.close()
        # at this process's exit multiprocessing would end what it believes to be its child
        children: set[Any] = getattr(multiprocessing.process, "_children", set())
        children.discard(self._process)

    def _receive(self) -> Any:
        """Return the next message, however long it takes; tell the log when that is long."""
        waited, patience = 0.0, STALL
        began = time.monotonic()
        try:
            while not self.ready and not self._news.poll(min(patience - waited, STALL)):
                # whoever was forked while the process was started may hold the pipe open
                if not self._process.is_alive() and not self._news.poll():
                    raise EOFError
                waited = time.monotonic() - began
                if waited >= patience:
                    log.warning("%s", self._describe_stall(waited))
                    patience *= 2
            return self._news.recv()
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            if self._closed:
                raise RuntimeError("the loader is closed; make a new one") from None
            raise self._death() from error

    def _describe_stall(self, waited: float) -> str:
        pid = self._process.pid
        stopped = ""
        # the state of a process is the field behind its name, which is in brackets; only Linux tells
        with contextlib.suppress(OSError, IndexError):
            with open(f"/proc/{pid}/stat") as file:
                state = file.read().rsplit(")", 1)[1].split()[0]
            stopped = ", stopped by a signal (SIGCONT lets it go on)" if state in "Tt" else ""
        return f"waited {waited:.1f} s for the producer process (pid {pid}{stopped}): {self.ring.signs}"

    def _death(self) -> ProducerError:
        ended = how_it_ended(self._process, self.ring.signs)
        return ProducerError(f"the producer process (pid {self._process.pid}) {ended}")


_open: weakref.WeakSet[Process] = weakref.WeakSet()


def _close_all() -> None:
    for process in list(_open):
        process.close()


def _disown_all() -> None:
    for process in list(_open):
        process.disown()


# behind multiprocessing's own, so run before it: that one would wait for a producer that is stopped
atexit.register(_close_all)
# whoever else is forked from the trainer must not keep the pipes open
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_all)


def _start(process: Any) -> None:
    """Start the process. Raises ValueError where that cannot be."""
    try:
        with _ctrl_c_waits(), warnings.catch_warnings():
            # Python warns of forking beside threads: the producer uses no lock that one of them could hold
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
    except AssertionError as error:
        raise ValueError(
            "num_workers=1 and more start a process, which a daemonic process such as a DataLoader's worker may not; "
            "use num_workers=0 there"
        ) from error
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"num_workers=1 and more start a process, for which conversations and tokenizer must be picklable on this "
            f"platform ({error}); pass files, or use num_workers=0"
        ) from error


@contextlib.contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Let Ctrl-C come behind the block: between the fork and the note of it, it would leave a child nobody knows of."""
    handler, came = signal.getsignal(signal.SIGINT), []
    # a mask alone does not do: another thread, such as torch's, receives the signal, and the main one is interrupted
    ours = callable(handler) and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, lambda *_: came.append(True))
    # the mask is the child's, until it ignores the signal
    if hasattr(signal, "pthread_sigmask"):
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if ours:
            signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


def _serve(
    source: Source,
    tokenizer: AnyTokenizer,
    config: LoaderConfig,
    workers: int,
    start: Start,
    ring: Ring,
    news: Connection,
    alive: Connection,
    trainer: int,
) -> None:
    """Be the producer process: fill each slot that comes free, in order, until the data or the trainer end."""
    try:
        _settle(news, alive, trainer)
        producer = Producer(source, tokenizer, config, start, workers=workers, signs=ring.signs)
        _produce(producer, ring, news, alive)
    except (EOFError, BrokenPipeError):
        pass  # the trainer has closed the loader, or is gone
    except BaseException as error:
        with contextlib.suppress(OSError):
            _post(Failure.of(error), ring, news)
    finally:
        # nothing here is worth waiting for, and what the trainer had in its buffers is not ours to write
        os._exit(0)


def _produce(producer: Producer, ring: Ring, news: Connection, alive: Connection) -> None:
    for number in itertools.count():
        ring.signs.say(WAITING)
        while number >= ring.signs.freed + len(ring.slots):
            if alive.poll(LOOK):
                alive.recv()  # nothing is ever sent: this raises EOFError, the trainer has closed
        slot = number % len(ring.slots)
        produced = producer.produce(ring.slots[slot])
        if produced is None:
            return _post(End(producer.books()), ring, news)
        _post(_plain(slot, produced), ring, news)


def _plain(slot: int, produced: Produced) -> tuple[Any, ...]:
    """Return the news as a tuple of numbers and bytes: to unpickle objects would take the trainer ten times as long."""
    *counts, pieces = produced.filled
    return (slot, *counts, pieces.table, pieces.counts, *produced[1:])


def _news(plain: tuple[Any, ...]) -> News:
    """Return what `_plain` was given."""
    counts = len(Filled._fields) - 1
    slot, facts, (table, piece_counts, *rest) = plain[0], plain[1 : 1 + counts], plain[1 + counts :]
    return News(slot, Produced(Filled._make([*facts, PieceTable(table, piece_counts)]), *rest))


def _post(message: tuple[Any, ...] | End | Failure, ring: Ring, news: Connection) -> None:
    news.send(message)
    # counted when all of it is in the pipe: who sees the count can read without waiting
    ring.signs.posted += 1


def _settle(news: Connection, alive: Connection, trainer: int) -> None:
    """Leave behind what a forked process has of its parent, and end with it."""
    leave_parent_behind()
    log.handlers, log.propagate = [_ToTrainer(news)], False
    threading.Thread(target=_end_with, args=(alive, trainer), daemon=True).start()


def _end_with(alive: Connection, trainer: int) -> None:
    """End the process with the trainer, or when it has dropped the loader, though the data set may be at work."""
    while os.getppid() == trainer and not alive.poll(WATCH):
        pass
    os._exit(1)


class _ToTrainer(logging.Handler):
    """Sends what the producer logs to the trainer's process, where the handlers are."""

    def __init__(self, news: Connection) -> None:
        super().__init__()
        self._news = news

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        self._news.send(record)
