"""What any child process needs.

An error crosses the process boundary with its type where it pickles, with its traceback always:

process.py or workers.py fails   ->   Failure.of(error)   -- a pipe -->   Failure.error()   ->   raised in its turn

What it logs takes the same pipe: log_to()  -->  log_here().
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import pickle
import signal
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from nanopack.conversations.mapped import REMEDY, cut_off
from nanopack.errors import ProducerError

if sys.platform == "linux":
    import fcntl

log = logging.getLogger("nanopack")


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


class _ToParent(logging.Handler):
    def __init__(self, pipe: Connection) -> None:
        super().__init__()
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        self._pipe.send(record)


def log_to(pipe: Connection) -> None:
    """Send what this process logs to its parent, where the handlers are. Nobody else writes into the pipe."""
    log.handlers, log.propagate = [_ToParent(pipe)], False


def log_here(record: logging.LogRecord) -> None:
    """Log what a child process has sent."""
    # one that is spawned does not know the level that is set here
    if log.isEnabledFor(record.levelno):
        log.handle(record)


# Signals that launchers, schedulers and terminals send to every process of a run, for the trainer to act on.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGQUIT", "SIGXCPU")
FOR_THE_TRAINER = {getattr(signal, name) for name in _NAMES if hasattr(signal, name)}

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
    return f"was killed by {name} ({doing}){_why(name)}"


def _why(name: str) -> str:
    """Return the usual reason for which the system sends the signal, for the end of a message."""
    if name == "SIGKILL":
        return "; the system does this when memory runs out"
    if name != "SIGBUS":
        return ""
    files = cut_off()
    which = f": {'; '.join(files)}" if files else ""
    return f"; the system does this when a file that is mapped into memory was cut off{which}. Then {REMEDY}"


def widen(pipe: Connection) -> None:
    """Enlarge the buffer of a pipe: a sender that must wait cannot work ahead."""
    # only Linux can, up to the limit of the system
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def leave_parent_behind() -> None:
    """Drop in a new process what it inherited from its parent: signal handlers, torch's threads."""
    # asyncio of the trainer would read from it what comes here
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    _leave_signals_to_the_trainer()
    if "torch" in sys.modules:
        # a data set may use torch, whose threads did not survive the fork
        sys.modules["torch"].set_num_threads(1)
    gc.freeze()


def _leave_signals_to_the_trainer() -> None:
    """Ignore the signals FOR_THE_TRAINER: it may have batches to take before it saves. SIGKILL ends this process."""
    for number in FOR_THE_TRAINER:
        # A handler rather than SIG_IGN, which a program that the data set runs would inherit: subprocess could not
        # terminate it. A handler ends with exec.
        signal.signal(number, _ignore)
        if hasattr(signal, "siginterrupt"):
            # system calls of the data set are resumed
            signal.siginterrupt(number, False)
    if sys.platform == "linux":
        _leave_alternate_stack()
    # nor does a process that the data set forks, such as a pool's, ignore them
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_ignore_no_more)
    # blocked since this process was started
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FOR_THE_TRAINER)


class _Stack(ctypes.Structure):
    """stack_t of Linux."""

    _fields_ = (("ss_sp", ctypes.c_void_p), ("ss_flags", ctypes.c_int), ("ss_size", ctypes.c_size_t))


SS_DISABLE = 2


def _leave_alternate_stack() -> None:
    """Handle signals on this thread's own stack.

    faulthandler gives a thread another one, of a few KiB; Python's handlers use it too. Signals that arrive together
    are nested, and several of them overflow it, which is a SIGSEGV.
    """
    ctypes.CDLL(None).sigaltstack(ctypes.byref(_Stack(None, SS_DISABLE, 0)), None)


def _ignore(number: int, frame: object) -> None:
    """Do nothing."""


def _ignore_no_more() -> None:
    for number in FOR_THE_TRAINER:
        if signal.getsignal(number) is _ignore:
            signal.signal(number, signal.SIG_DFL)
