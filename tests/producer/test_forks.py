"""A loader among threads, forks and other loaders: closed by any of them, used by its own process alone."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import sys
import threading
import time

import pytest
import torch
from faulty import CHATS, SMALL, TOKENIZER, Faulty, expected, is_gone, within

from nanopack import Loader, reference
from nanopack.verify import compare

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc as on Linux")


def test_dropping_the_loader_ends_its_producer():
    loader = Loader(CHATS, TOKENIZER, **SMALL)
    for _ in loader:
        break
    pid = loader.producer_pid
    with within(20):
        del loader, _
        gc.collect()
    assert is_gone(pid)


def test_a_loader_dropped_unclosed_in_a_cycle_ends_a_busy_producer():
    loader = Loader(Faulty(20, lambda: time.sleep(60)), TOKENIZER, **SMALL)
    loader.cycle = loader
    next(loader)
    pid = loader.producer_pid
    with within(20):
        del loader
        gc.collect()
    assert is_gone(pid)


def test_close_in_another_thread_ends_the_wait():
    loader = Loader(Faulty(20, lambda: time.sleep(60)), TOKENIZER, **SMALL)
    threading.Timer(0.5, loader.close).start()
    with within(20), pytest.raises(RuntimeError, match="the loader is closed"):
        for _ in loader:
            pass
    loader.close()
    assert is_gone(loader.producer_pid)


def test_closing_at_any_moment_ends_next_with_the_same_error():
    for delay_ms in range(0, 20, 2):
        loader = Loader(CHATS, TOKENIZER, **SMALL)
        timer = threading.Timer(delay_ms / 1000, loader.close)
        timer.start()
        got = []
        with within(20), pytest.raises(RuntimeError, match=r"^the loader is closed"):
            for batch in loader:
                got.append(batch)
        timer.join()
        assert compare(expected(len(got)), iter(got)).difference is None


def test_two_threads_may_close_at_once_while_a_third_waits():
    loader = Loader(Faulty(20, lambda: time.sleep(60)), TOKENIZER, **SMALL)
    errors = []

    def wait():
        try:
            for _ in loader:
                pass
        except BaseException as error:
            errors.append(error)

    def close():
        try:
            loader.close()
        except BaseException as error:
            errors.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.2)
    closing = [threading.Thread(target=close) for _ in range(2)]
    for thread in closing:
        thread.start()
    for thread in (waiting, *closing):
        thread.join(20)
        assert not thread.is_alive()
    assert [type(error) for error in errors] == [RuntimeError] and "closed" in str(errors[0])


def test_a_loader_may_be_made_and_read_in_any_thread():
    got = []

    def read():
        with Loader(CHATS, TOKENIZER, epochs=1, **SMALL) as loader:
            got.extend(loader)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    both = sorted(got, key=lambda batch: batch.step)
    for half in (both[::2], both[1::2]):
        assert compare(reference.batches(CHATS, TOKENIZER, epochs=1, **SMALL), iter(half)).difference is None


def test_two_loaders_at_once_do_not_disturb_each_other():
    with Loader(CHATS, TOKENIZER, **SMALL) as train, within(20):
        next(train)
        for _ in range(2):
            with Loader(CHATS[:5], TOKENIZER, epochs=1, **SMALL) as val:
                assert len(list(val)) == len(list(reference.batches(CHATS[:5], TOKENIZER, epochs=1, **SMALL)))
            assert is_gone(val.producer_pid)
        for _ in range(10):
            next(train)


def next_and_close(loader, pipe):
    try:
        next(loader)
    except RuntimeError as error:
        pipe.send(str(error))
    loader.close()


def assert_a_forked_process_is_refused(loader):
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=next_and_close, args=(loader, there))
    child.start()
    assert "belongs to process" in here.recv()
    child.join()


def test_a_process_forked_from_the_trainer_leaves_the_loader_alone():
    loader = Loader(CHATS, TOKENIZER, **SMALL)
    got = [next(loader)]
    with within(20):
        assert_a_forked_process_is_refused(loader)
        got += [next(loader) for _ in range(20)]
        # a DataLoader whose workers outlive the loader
        other = iter(torch.utils.data.DataLoader(list(range(100)), num_workers=1))
        next(other)
        pid = loader.producer_pid
        loader.close()
        assert is_gone(pid)
    assert compare(expected(21), iter(got)).difference is None


def test_a_forked_copy_of_an_inline_loader_is_refused_too():
    # both would fill the same slot
    with within(20):
        assert_a_forked_process_is_refused(Loader(CHATS, TOKENIZER, num_workers=0, **SMALL))


@pytest.mark.parametrize("code", [0, 3])
def test_the_exit_of_a_bare_fork_leaves_the_producer_to_its_trainer(code, capfd):
    # at exit multiprocessing ends the children it knows of, which after a bare fork are the trainer's
    with Loader(CHATS, TOKENIZER, **SMALL) as loader, within(20):
        got = [next(loader)]
        pid = os.fork()
        if pid == 0:
            refused = False
            try:
                next(loader)
            except RuntimeError as error:
                refused = "belongs to process" in str(error)
            with contextlib.suppress(BaseException):
                multiprocessing.util._exit_function()
            os._exit(code if refused else 99)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
        got += [next(loader) for _ in range(30)]
    assert compare(expected(31), iter(got)).difference is None
    assert capfd.readouterr().err == ""


def test_data_loader_workers_come_and_go_while_the_loader_runs():
    with Loader(CHATS, TOKENIZER, **SMALL) as loader, within(20):
        got = []
        for _ in range(2):
            for _ in torch.utils.data.DataLoader(list(range(10)), num_workers=2):
                got.append(next(loader))
        pid = loader.producer_pid
    assert is_gone(pid) and compare(expected(len(got)), iter(got)).difference is None


def test_a_data_set_may_use_torch_whose_threads_did_not_survive_the_fork():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)

    def add_in_parallel():
        torch.ones(1_000_000).sum()

    try:
        # starts the threads
        add_in_parallel()
        with within(20), Loader(Faulty("all", add_in_parallel), TOKENIZER, **SMALL) as loader:
            got = [next(loader) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    assert compare(expected(3), iter(got)).difference is None
