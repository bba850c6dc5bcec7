"""Start a child process, and hand it what it works with.

    process.py, workers.py: start(process), Handover.send()   ->   Handover.receive() in the child

A forked child inherits all of it. One that is spawned, or forked from a fork server, imports the main module first and
may die of that. multiprocessing writes what a child gets into a pipe whose reading end it holds itself, so that a dead
child would leave the parent waiting for ever; therefore only small things go that way. The rest follows through a pipe
of our own once the child says that it runs, and a death is its end of file.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, Literal, TypeAlias, get_args

from nanopack.errors import ProducerError
from nanopack.producer.child import FOR_THE_TRAINER, WATCH, Failure, how_it_ended
from nanopack.producer.cursors import cursors, own_cursors

log = logging.getLogger("nanopack")

StartMethod: TypeAlias = Literal["fork", "spawn", "forkserver"]
START_METHODS = (None, *get_args(StartMethod))
# A fork needs no pickling and no `__main__` guard, and takes milliseconds; on macOS the system's libraries forbid it.
DEFAULT_START_METHOD: StartMethod = "fork" if sys.platform == "linux" else "spawn"

# Seconds after which a child that does not say that it runs is worth a warning: it may import for ten.
SLOW_START = 20.0
_AT_THE_START = (
    "A process that is not forked imports the main module first: put what only the trainer runs under "
    '`if __name__ == "__main__":` and define the data set\'s class in a module; or use num_workers=0'
)


class Handover:
    """What a child process works with, on its way there."""

    def __init__(self, method: StartMethod, contents: Any) -> None:
        self._contents = contents
        self._positions = cursors() if method == "fork" else {}
        self._pickled: Any = None
        self._here: Connection | None = None
        self._there: Connection | None = None
        if method != "fork":
            self._here, self._there = multiprocessing.get_context(method).Pipe()

    def __reduce__(self) -> tuple[type[Arriving], tuple[Connection | None]]:
        # multiprocessing pickles a process while it starts it, the only time when its own locks may be pickled
        try:
            self._pickled = ForkingPickler.dumps(self._contents)
        except Exception as error:
            raise ValueError(
                f"num_workers=1 and more start a process, for which conversations and tokenizer must be picklable "
                f"unless it is forked ({type(error).__name__}: {error}); pass files, or use num_workers=0"
            ) from error
        return Arriving, (self._there,)

    def receive(self) -> Any:
        """Return the contents, in a forked child, which reads files at positions of its own from then on."""
        own_cursors(self._positions)
        return self._contents

    def send(self, process: Any, name: str) -> None:
        """Send the contents to a child that was started. Raises ProducerError where it dies, or cannot unpickle them.

        `name` names the child in messages.
        """
        if self._here is None or self._there is None:
            return
        self._there.close()
        try:
            self._wait_for(process, name)
            self._here.recv()
            self._here.send_bytes(self._pickled)
            self._pickled = None
            self._wait_for(process, name)
            failure = self._here.recv()
        except (EOFError, OSError) as error:
            ended = how_it_ended(process, "at its start; its own error is on stderr")
            raise ProducerError(f"{name} (pid {process.pid}) {ended}. {_AT_THE_START}") from error
        finally:
            self.close()
        if failure is not None:
            raise ProducerError(
                f"{name} (pid {process.pid}) could not unpickle the conversations or the tokenizer ({failure.what}). "
                f"{_AT_THE_START}"
            ) from failure.error().__cause__

    def close(self) -> None:
        """Close the pipe. May be called twice."""
        for pipe in (self._here, self._there):
            if pipe is not None:
                pipe.close()

    def _wait_for(self, process: Any, name: str) -> None:
        """Wait until the child says something. Raises EOFError where it dies first."""
        assert self._here is not None
        began, patience = time.monotonic(), SLOW_START
        while not self._here.poll(WATCH):
            # a process forked meanwhile may hold the pipe open
            if not lives(process) and not self._here.poll():
                raise EOFError
            if (waited := time.monotonic() - began) >= patience:
                log.warning("waited %.0f s for %s (pid %d) to start and import", waited, name, process.pid)
                patience *= 2


class Arriving:
    """A `Handover` in a child that is not forked."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def receive(self) -> Any:
        """Return the contents. Where they do not unpickle, the parent gets the error, and the process ends."""
        self._pipe.send(None)
        pickled = self._pipe.recv_bytes()
        try:
            contents = pickle.loads(pickled)
        except BaseException as error:
            self._pipe.send(Failure.of(error))
            os._exit(1)
        self._pipe.send(None)
        self._pipe.close()
        return contents


def start(process: Any, *, warn_of_threads: bool = False) -> None:
    """Start a process. Raises ValueError where that is impossible here, OSError where the system refuses it.

    With `warn_of_threads`, Python may warn of a fork while threads run.
    """
    if process._start_method != "fork" and hasattr(signal, "pthread_sigmask"):
        # started by `process.start()` itself, it would unblock the signals that are blocked below
        resource_tracker.ensure_running()
    if process._start_method == "forkserver":
        # it would keep them blocked, in whatever it forks
        forkserver.ensure_running()
    try:
        with _signals_deferred(), warnings.catch_warnings():
            if not warn_of_threads:
                warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
    except AssertionError as error:
        raise ValueError(
            "num_workers=1 and more start a process, which a daemonic process such as a DataLoader's worker may not; "
            "use num_workers=0 there, and give each of them rank= and world_size="
        ) from error
    except OSError as error:
        raise OSError(
            error.errno,
            f"the system refuses another process ({error.strerror}); use num_workers=0, or free memory, and look at "
            f"the limits of processes (ulimit -u) and of files (ulimit -n)",
        ) from error
    # multiprocessing would send it SIGTERM at this process's exit, which it ignores, and wait for it; it ends by itself
    getattr(multiprocessing.process, "_children", set()).discard(process)


def lives(process: Any) -> bool:
    """Return whether a child process lives."""
    if process._start_method != "forkserver":
        return bool(process.is_alive())
    # its exit code comes from the fork server, which a signal to the whole group may have ended
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def end_with(method: StartMethod, parent: int, wait: Callable[[float], object] = time.sleep) -> None:
    """Let a thread end this process with the one that started it, `parent`, even while the data set is at work.

    `wait` waits that many seconds; where it returns True, this process ends at once.
    """

    def watch() -> None:
        while not _is_orphan(method, parent) and not wait(WATCH):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _is_orphan(method: StartMethod, parent: int) -> bool:
    """Return whether the process that started this one, with that id, is gone."""
    if method != "forkserver":
        return os.getppid() != parent
    # the parent is the fork server: of the process that asked it there is the end of a pipe
    asked = multiprocessing.parent_process()
    return asked is None or not asked.is_alive()


@contextlib.contextmanager
def _signals_deferred() -> Iterator[None]:
    """Defer SIGINT until after the block: between start and bookkeeping it would orphan the child.

    The child begins with all signals FOR_THE_TRAINER blocked, until it ignores them.
    """
    handler, came = signal.getsignal(signal.SIGINT), []
    # a mask alone is not enough: another thread, such as torch's, receives the signal, and the main one is interrupted
    ours = callable(handler) and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, lambda *_: came.append(True))
    if hasattr(signal, "pthread_sigmask"):
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_TRAINER)
    try:
        yield
    finally:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if ours:
            signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)
