"""A data set that misbehaves at one of its conversations, and helpers that observe how the processes around it end."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import itertools
import os
import signal
import threading
import time
from pathlib import Path

from nanopack import ConversationError, ProducerError, reference

TOKENIZER = "chat32k"
SMALL = {"batch_size": 1, "seq_len": 8, "packing": "stream", "loss": "all"}
# Ten tokens each with bos: one batch of nine tokens or more a conversation.
CHATS = [{"text": f"a b c d e f g {i}"} for i in range(40)]


class Faulty(list):
    """CHATS, which do something at one of them, or at "all"."""

    def __init__(self, at, do):
        super().__init__(CHATS)
        self.at, self.do = at, do

    def __getitem__(self, index):
        if self.at in (index, "all"):
            self.do()
        return super().__getitem__(index)


class Busy(list):
    """CHATS, one of which fails when a process reads it for the first time."""

    def __init__(self):
        super().__init__(CHATS)
        self.tried = False

    def __getitem__(self, index):
        if index == 20 and not self.tried:
            self.tried = True
            raise ConnectionResetError("busy")
        return super().__getitem__(index)


def fail(error):
    raise error


def raising(error):
    return functools.partial(fail, error)


class NotPicklable(Exception):
    """Nor does its class take the arguments that it is unpickled with."""

    def __init__(self, a, b):
        super().__init__(a)
        self.lock = threading.Lock()


class Hard(BaseException):
    pass


def fail_to_pickle():
    raise NotPicklable(1, 2)


def kill(number):
    # without pytest's own handler, which would print the stack
    faulthandler.disable()
    os.kill(os.getpid(), number)


def killing(number):
    return functools.partial(kill, number)


READING = "reading and tokenizing, from conversation"
# What a data set does, and the type and the message of the error that comes of it.
FAULTS = {
    "an exception": (raising(KeyError("gone")), ConversationError, "conversation 20, KeyError: 'gone'"),
    "one that cannot be pickled": (fail_to_pickle, ConversationError, "NotPicklable: 1"),
    "SystemExit": (raising(SystemExit(3)), ProducerError, "stopped by SystemExit: 3"),
    "KeyboardInterrupt": (raising(KeyboardInterrupt()), ProducerError, "stopped by KeyboardInterrupt"),
    "a BaseException": (raising(Hard("panic")), ProducerError, "stopped by Hard: panic"),
    "out of memory": (raising(MemoryError("no room")), MemoryError, "no room"),
    "an exit of the process": (functools.partial(os._exit, 7), ProducerError, f"exited with code 7 .{READING}"),
    "SIGKILL": (killing(signal.SIGKILL), ProducerError, "killed by SIGKILL .*memory runs out"),
    "SIGABRT": (killing(signal.SIGABRT), ProducerError, "killed by SIGABRT"),
    "SIGSEGV": (killing(signal.SIGSEGV), ProducerError, "killed by SIGSEGV"),
}


class Moved(list):
    """CHATS, which call `do` when they are unpickled for the n-th time."""

    def __init__(self, n, do):
        super().__init__(CHATS)
        self.n, self.do = n, do

    def __reduce__(self):
        return move, (self.n - 1, self.do)


def move(n, do):
    if n == 0:
        do()
    return Moved(n, do)


def expected(count, **arguments):
    """The reference's first batches of CHATS."""
    return itertools.islice(reference.batches(CHATS, TOKENIZER, **(SMALL | arguments)), count)


def ready(loader):
    """How many batches wait to be taken."""
    return loader._run.feed.qsize()


def sent_once_full(loader, prefetch):
    """How many batches the producer has sent once all slots are full, when it sends no more."""
    status = loader._run.feed.ring.status
    wait_until(lambda: status.sent == status.released + prefetch + 1)
    return status.sent


def wait_until(true, seconds=20.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "the awaited state did not come"
        time.sleep(0.005)


def once(true, do):
    """Call `do` in a thread as soon as it is so."""
    threading.Thread(target=lambda: (wait_until(true), do()), daemon=True).start()


def sleeps(pid):
    """Whether a process waits for something, and is neither running, nor due to run, nor stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "S"


def workers_of(producer):
    """The ids of the two workers of a producer, whose own id this is."""
    children = Path(f"/proc/{producer}/task/{producer}/children")
    wait_until(lambda: len(children.read_text().split()) == 2)
    return [int(child) for child in children.read_text().split()]


def is_gone(pid, within=10.0):
    """Whether the process ends in time: it does not exist, or is a zombie that its parent has not reaped."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


@contextlib.contextmanager
def within(seconds):
    """Fail if the body takes longer; an alarm ends a hang. Generous limits: they are to find hangs, not slowness."""

    def late(*_):
        raise AssertionError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def in_dev_shm():
    """The files in shared memory, but for those that other tests' multiprocessing and DataLoaders make meanwhile."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith(("sem.", "torch_"))}
