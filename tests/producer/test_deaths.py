"""A producer or a worker that is killed or stopped ends in a named error or a warning, never in a hang."""

from __future__ import annotations

import faulthandler
import gc
import itertools
import logging
import os
import re
import signal
import sys
import time

import pytest
from faulty import (
    CHATS,
    SMALL,
    TOKENIZER,
    Faulty,
    expected,
    is_gone,
    once,
    ready,
    sent_once_full,
    wait_until,
    within,
    workers_of,
)

import nanopack
from nanopack import Loader, reference
from nanopack.errors import ProducerError
from nanopack.verify import compare

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc as on Linux")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV], ids=lambda n: n.name)
@pytest.mark.parametrize("prefetch", [1, 4, 8])
def test_every_batch_that_was_ready_comes_before_the_death(number, prefetch):
    # without pytest's own handler, which would print the stack
    with Loader(Faulty(0, faulthandler.disable), TOKENIZER, prefetch=prefetch, **SMALL) as loader:
        got = [next(loader)]
        sent = sent_once_full(loader, prefetch)
        os.kill(loader.producer_pid, number)
        assert is_gone(loader.producer_pid)
        with within(20), pytest.raises(ProducerError, match=f"killed by {number.name}"):
            for batch in loader:
                got.append(batch)
    assert len(got) == sent and compare(expected(sent), iter(got)).difference is None


def test_a_death_is_noticed_though_a_stranger_holds_the_pipe_open(monkeypatch):
    """A process that another thread forks while the producer starts inherits the writing end of its pipe."""
    strangers = []
    start = nanopack.producer.process.start

    def start_late(process, **options):
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        strangers.append(pid)
        start(process, **options)

    monkeypatch.setattr("nanopack.producer.process.start", start_late)
    loader = Loader(Faulty(20, lambda: os.kill(os.getpid(), signal.SIGKILL)), TOKENIZER, **SMALL)
    try:
        with within(20), pytest.raises(ProducerError, match="killed by SIGKILL"):
            for _ in loader:
                pass
        with within(20):
            loader.close()
    finally:
        os.kill(strangers[0], signal.SIGKILL)
        os.waitpid(strangers[0], 0)


def test_a_stall_names_the_stage_and_a_stop_in_it(caplog):
    stop = Faulty(20, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    with Loader(stop, TOKENIZER, epochs=1, **SMALL) as loader, caplog.at_level(logging.WARNING, "nanopack"):
        pid = loader.producer_pid
        once(lambda: "stopped by a signal" in caplog.text, lambda: os.kill(pid, signal.SIGCONT))
        with within(20):
            assert compare(reference.batches(CHATS, TOKENIZER, epochs=1, **SMALL), loader).difference is None
    stall = next(line for line in caplog.messages if f"pid {pid}, stopped by a signal" in line)
    assert float(re.search(r"waited (\d+\.\d) s", stall)[1]) >= 1.5
    assert "reading and tokenizing, from conversation 20 on" in stall


def test_batches_that_are_ready_come_from_a_stopped_producer_without_a_wait():
    with Loader(CHATS, TOKENIZER, prefetch=4, **SMALL) as loader:
        got = [next(loader)]
        # two may be on the device already, and keep their slots until the next call
        wait_until(lambda: ready(loader) >= 3)
        os.kill(loader.producer_pid, signal.SIGSTOP)
        with within(20):
            got += [next(loader) for _ in range(3)]
    assert compare(expected(4), iter(got)).difference is None


def test_a_stopped_producer_does_not_keep_close_waiting():
    loader = Loader(CHATS, TOKENIZER, **SMALL)
    next(loader)
    pid = loader.producer_pid
    os.kill(pid, signal.SIGSTOP)
    with within(20):
        loader.close()
    assert is_gone(pid)


@pytest.mark.parametrize("end", ["close", "drop", "kill the producer"])
def test_workers_end_with_their_producer(end):
    loader = Loader(CHATS, TOKENIZER, num_workers=2, **SMALL)
    next(loader)
    producer, workers = loader.producer_pid, workers_of(loader.producer_pid)
    if end == "close":
        loader.close()
    elif end == "drop":
        del loader
        gc.collect()
    else:
        os.kill(producer, signal.SIGKILL)
    assert is_gone(producer) and all(map(is_gone, workers))


def test_a_killed_worker_is_named_with_what_it_was_doing():
    with Loader(CHATS, TOKENIZER, num_workers=2, prefetch=1, **SMALL) as loader:
        first = next(loader)
        os.kill(workers_of(loader.producer_pid)[1], signal.SIGKILL)
        with within(20):
            message = r"a worker of the producer \(pid \d+\) was killed by SIGKILL \(reading and tokenizing"
            batches = []
            with pytest.raises(ProducerError, match=message):
                for batch in loader:
                    batches.append(batch)
    assert compare(expected(1 + len(batches)), iter([first, *batches])).difference is None


def test_a_stopped_worker_is_waited_for_with_a_warning_and_nothing_is_lost(caplog):
    with Loader(CHATS, TOKENIZER, num_workers=2, prefetch=1, **SMALL) as loader:
        got = [next(loader)]
        workers = workers_of(loader.producer_pid)
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        once(lambda: caplog.records, lambda: [os.kill(worker, signal.SIGCONT) for worker in workers])
        with within(20):
            got += itertools.islice(loader, 500)
    assert "reading and tokenizing, from conversation" in caplog.text
    assert compare(expected(501), iter(got)).difference is None
