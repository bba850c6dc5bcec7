"""Neither a long run nor loaders that come and go leave memory, threads, files or processes."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import threading
from pathlib import Path

import pytest
from faulty import CHATS, SMALL, TOKENIZER, in_dev_shm

from nanopack import Loader
from nanopack.producer import process

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc as on Linux")


def test_a_loader_takes_no_room_in_dev_shm():
    before = in_dev_shm()
    with Loader(CHATS, TOKENIZER, prefetch=8) as loader:
        next(loader)
        assert in_dev_shm() == before


def resources():
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "memory_bytes": pages * os.sysconf("SC_PAGE_SIZE"),
        "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")),
        "shared": in_dev_shm(),
        "children": Path(f"/proc/self/task/{os.getpid()}/children").read_text().split(),
    }


def open_and_close(count):
    for number in range(count):
        loader = Loader(CHATS, TOKENIZER, num_workers=1 + number % 2, **SMALL)
        next(loader)
        if number % 3:
            loader.close()


@pytest.mark.parametrize("count", [10, pytest.param(40, marks=pytest.mark.slow)])
def test_loaders_that_come_and_go_leave_nothing(count):
    open_and_close(6)
    before = resources()
    open_and_close(count)
    after = resources()
    assert after.pop("memory_bytes") - before.pop("memory_bytes") < 4 << 20
    assert after == before


def test_a_refused_start_leaves_nothing_to_end_at_exit(monkeypatch):
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="num_workers=0 there") as kept:
        Loader(CHATS, TOKENIZER, **SMALL)
    assert not list(process._open) and kept
    process._close_all()
    del kept
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def soak(batches):
    with Loader(CHATS, TOKENIZER, batch_size=4, seq_len=128, extras=("positions",), loss_weights="token") as loader:
        pid = loader.producer_pid
        producer_pages = Path(f"/proc/{pid}/statm")
        for _ in range(1000):
            next(loader)
        before, producer_before = resources(), int(producer_pages.read_text().split()[1])
        for _ in range(batches):
            next(loader)
        after, producer_after = resources(), int(producer_pages.read_text().split()[1])
    grown = after.pop("memory_bytes") - before.pop("memory_bytes")
    assert grown < 2 << 20 and (producer_after - producer_before) * os.sysconf("SC_PAGE_SIZE") < 2 << 20
    assert after == before


@pytest.mark.parametrize("batches", [1_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_nothing_grows_while_batches_are_read(batches):
    soak(batches)
