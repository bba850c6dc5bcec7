"""What any child process needs.

An error crosses the process boundary with its type where it pickles, with its traceback always:

process.py or workers.py fails   ->   Failure.of(error)   -- a pipe -->   Failure.error()   ->   raised in its turn
"""

from __future__ import annotations

import contextlib
import gc
import pickle
import signal
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from nanopack.errors import ProducerError
from nanopack.producer.cursors import own_cursors

if sys.platform == "linux":
    import fcntl


class ProducerTraceback(Exception):
    """Traceback of an error in a child process; the cause of the error raised in the trainer's."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass(frozen=True)
class Failure:
    """An error on its way between processes."""

    pickled: bytes | None
    """The exception; None if it does not pickle, or is no Exception."""
    what: str
    """Type and message."""
    ordinary: bool
    """Whether it is an Exception."""
    trace: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Return the failure that carries an error."""
        pickled = None
        if isinstance(error, Exception):
            with contextlib.suppress(Exception):
                dumped = pickle.dumps(error)
                pickled = dumped if type(pickle.loads(dumped)) is type(error) else None
        what = type(error).__name__
        # an error whose message fails must not end in silence
        with contextlib.suppress(Exception):
            what += f": {error}"
        return cls(pickled, what, isinstance(error, Exception), "".join(traceback.format_exception(error)))

    def error(self) -> Exception:
        """Return the error, or a ProducerError that describes it; its cause is the traceback."""
        error: Exception = ProducerError(f"the producer was stopped by {self.what}")
        if self.pickled:
            with contextlib.suppress(Exception):
                error = pickle.loads(self.pickled)
        error.__cause__ = ProducerTraceback(self.trace)
        return error


START_METHOD = "fork" if sys.platform == "linux" else "spawn"


# Seconds between looks at whether the parent still lives.
WATCH = 0.3


# The most that Linux allows everybody; the default of 64 KiB holds little more than a chunk or a batch.
PIPE_BYTES = 1 << 20


def how_it_ended(process: Any, doing: object) -> str:
    """Return in words how a process ended, and what it was doing."""
    process.join(1)
    code = process.exitcode
    if code is None or code >= 0:
        return f"exited with code {code} ({doing})"
    name = signal.Signals(-code).name
    hint = "; the system does this when memory runs out" if name == "SIGKILL" else ""
    return f"was killed by {name} ({doing}){hint}"


def widen(pipe: Connection) -> None:
    """Enlarge the buffer of a pipe: a sender that must wait cannot work ahead."""
    # only Linux can, up to the limit of the system
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def leave_parent_behind(positions: Mapping[int, int]) -> None:
    """Drop in a freshly forked process what it inherited from its parent: signal handlers, torch's threads.

    `positions` are the parent's `cursors()`, which become its own; {} where it is spawned.
    """
    own_cursors(positions)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    # Ctrl-C goes to the whole group: the trainer decides what it means
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if "torch" in sys.modules:
        # a data set may use torch, whose threads did not survive the fork
        sys.modules["torch"].set_num_threads(1)
    gc.freeze()
