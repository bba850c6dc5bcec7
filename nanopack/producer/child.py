"""Let an error travel from one process to another: with its type where that can be, always with its traceback.

producer.py or workers.py fails   ->   Failure.of(error)   -- a pipe -->   Failure.error()   ->   raised, in its place
"""

from __future__ import annotations

import contextlib
import gc
import pickle
import signal
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from nanopack.errors import ProducerError

if sys.platform == "linux":
    import fcntl


class ProducerTraceback(Exception):
    """The traceback of an error as the producer process saw it; the cause of the error raised in the trainer's."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass(frozen=True)
class Failure:
    """An error as it travels."""

    pickled: bytes | None
    """The exception; None if it cannot be pickled, or is no ordinary one."""
    what: str
    """Type and message."""
    ordinary: bool
    """Whether it is an Exception."""
    trace: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Return what is to be told of an error."""
        pickled = None
        if isinstance(error, Exception):
            with contextlib.suppress(Exception):
                dumped = pickle.dumps(error)
                pickled = dumped if type(pickle.loads(dumped)) is type(error) else None
        what = type(error).__name__
        # an error that cannot even be told must not end in silence
        with contextlib.suppress(Exception):
            what += f": {error}"
        return cls(pickled, what, isinstance(error, Exception), "".join(traceback.format_exception(error)))

    def error(self) -> Exception:
        """Return the error, or a ProducerError that tells of it; its cause is the traceback."""
        error: Exception = ProducerError(f"the producer was stopped by {self.what}")
        if self.pickled:
            with contextlib.suppress(Exception):
                error = pickle.loads(self.pickled)
        error.__cause__ = ProducerTraceback(self.trace)
        return error


START_METHOD = "fork" if sys.platform == "linux" else "spawn"


# Seconds between looks at whether the parent still lives.
WATCH = 0.3


# What Linux lets anybody have; 64 KiB, as a pipe is made, hold little more than a chunk or a batch.
PIPE_BYTES = 1 << 20


def how_it_ended(process: Any, doing: object) -> str:
    """Say what became of a process that is gone, and what it was at."""
    process.join(1)
    code = process.exitcode
    if code is None or code >= 0:
        return f"exited with code {code} ({doing})"
    name = signal.Signals(-code).name
    hint = "; the system kills so when memory runs out" if name == "SIGKILL" else ""
    return f"was killed by {name} ({doing}){hint}"


def widen(pipe: Connection) -> None:
    """Make room in a pipe: who cannot send does not work ahead."""
    # only Linux can, and there no further than the limit of the system
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def leave_parent_behind() -> None:
    """Let go, in a process that was just forked, of what it has of its parent."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    # Ctrl-C goes to the whole group: the trainer decides what it means
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if "torch" in sys.modules:
        # a data set may use torch, whose threads are not there any more
        sys.modules["torch"].set_num_threads(1)
    gc.freeze()
