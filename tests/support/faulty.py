"""A data set that misbehaves at one of its conversations, and helpers that observe how the processes around it end."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
from pathlib import Path

from nanopack import reference

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


def raising(error):
    def do():
        raise error

    return do


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


class NotPicklable(Exception):
    def __init__(self, a, b):
        super().__init__(a)
        self.lock = threading.Lock()
