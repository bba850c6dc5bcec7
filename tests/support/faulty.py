"""A data set that does harm at one of its conversations, and what shows how the processes around it end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

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


def is_gone(pid, within=2.0):
    """Whether the process ends in time: it is no more, or only waits for its parent to ask how it ended."""
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
    """Fail where the body takes longer; a hang is ended by the alarm."""

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
    """What lies in shared memory, without the semaphores of other programs' multiprocessing, which come and go."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.")}


class NotPicklable(Exception):
    def __init__(self, a, b):
        super().__init__(a)
        self.lock = threading.Lock()
