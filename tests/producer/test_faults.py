"""Every fault of the producer's process or the trainer's ends in a named error or a clean end, never in a hang."""

from __future__ import annotations

import faulthandler
import gc
import itertools
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from faulty import CHATS, SMALL, TOKENIZER, Faulty, NotPicklable, in_dev_shm, is_gone, raising, within

import nanopack
from nanopack import ConversationError, Loader, reference
from nanopack.errors import ProducerError
from nanopack.packing import BestFitPad
from nanopack.producer import process
from nanopack.verify import compare

linux = pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc as on Linux")


def producer_of(loader):
    return loader._feed._process


def batches_until_error(loader):
    batches = []
    try:
        for batch in loader:
            batches.append(batch)
    except Exception as error:
        return batches, error
    return batches, None


class Hard(BaseException):
    pass


FAULTS = {
    "an exception": (raising(KeyError("gone")), ConversationError, "conversation 20, KeyError: 'gone'"),
    "one that cannot be pickled": (raising(NotPicklable(1, 2)), ConversationError, "NotPicklable: 1"),
    "SystemExit": (raising(SystemExit(3)), ProducerError, "stopped by SystemExit: 3"),
    "KeyboardInterrupt": (raising(KeyboardInterrupt()), ProducerError, "stopped by KeyboardInterrupt"),
    "a BaseException": (raising(Hard("panic")), ProducerError, "stopped by Hard: panic"),
    "out of memory": (raising(MemoryError("no room")), MemoryError, "no room"),
    "an exit of the process": (
        lambda: os._exit(7),
        ProducerError,
        "exited with code 7 .reading and tokenizing, from conversation",
    ),
    "SIGKILL": (lambda: os.kill(os.getpid(), signal.SIGKILL), ProducerError, "killed by SIGKILL .*memory runs out"),
    "SIGTERM": (lambda: os.kill(os.getpid(), signal.SIGTERM), ProducerError, "killed by SIGTERM"),
    # without pytest's own handler, which would print the stack
    "SIGSEGV": (
        lambda: (faulthandler.disable(), os.kill(os.getpid(), signal.SIGSEGV)),
        ProducerError,
        "killed by SIGSEGV",
    ),
}


@linux
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_after_the_batches_before_it(fault, workers):
    do, kind, message = FAULTS[fault]
    with within(5):
        loader = Loader(Faulty(20, do), TOKENIZER, num_workers=workers, epochs=1, **SMALL)
        batches, error = batches_until_error(loader)
        assert type(error) is kind
        assert error.__cause__ is None or "Traceback" in str(error.__cause__) or "EOF" in repr(error.__cause__)
        with pytest.raises(kind, match=message):
            next(loader)
    expected = list(reference.batches(CHATS, TOKENIZER, epochs=1, **SMALL))[: len(batches)]
    assert compare(iter(expected), iter(batches)).difference is None
    # what a killed process had not posted is lost with it; what raises comes in its place: all batches before it
    if workers == 1 and not fault.startswith("SIG") and "exit" not in fault:
        assert len(batches) == len(expected) >= 20
    assert is_gone(producer_of(loader).pid)
    loader.close()


@linux
def test_a_panic_of_the_tokenizer_is_an_error_like_others(monkeypatch):
    def panic(self, texts):
        raise Hard("tokenizer")

    monkeypatch.setattr("nanopack.tokenizers.tokenizer.Tokenizer.encode_batch", panic)
    with within(5), pytest.raises(ProducerError, match="stopped by Hard: tokenizer"):
        next(Loader(CHATS, TOKENIZER, **SMALL))


@linux
def test_a_stopped_producer_is_told_of_and_goes_on(caplog):
    loader = Loader(CHATS, TOKENIZER, prefetch=1, **SMALL)
    expected = reference.batches(CHATS, TOKENIZER, **SMALL)
    pid = producer_of(loader).pid
    got = [next(loader)]
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(2.2, os.kill, (pid, signal.SIGCONT)).start()
    with within(8), caplog.at_level(logging.WARNING, "nanopack"):
        got += [next(loader) for _ in range(12)]
    [stall, *_] = [record.getMessage() for record in caplog.records]
    assert f"pid {pid}, stopped by a signal" in stall and "waited 1.5 s" in stall
    assert compare((next(expected) for _ in range(13)), iter(got)).difference is None
    loader.close()


@linux
def test_a_stopped_producer_does_not_keep_close_waiting():
    loader = Loader(CHATS, TOKENIZER, **SMALL)
    next(loader)
    pid = producer_of(loader).pid
    os.kill(pid, signal.SIGSTOP)
    with within(2):
        loader.close()
    assert is_gone(pid, 0.5)


@linux
def test_dropping_the_loader_ends_its_producer():
    loader = Loader(CHATS, TOKENIZER, **SMALL)
    for _ in loader:
        break
    pid = producer_of(loader).pid
    with within(2):
        del loader, _
        gc.collect()
    assert is_gone(pid)


@linux
def test_close_in_another_thread_ends_the_wait():
    loader = Loader(Faulty(20, lambda: time.sleep(60)), TOKENIZER, **SMALL)
    threading.Timer(0.5, loader.close).start()
    with within(4), pytest.raises(RuntimeError, match="the loader is closed"):
        for _ in loader:
            pass
    loader.close()
    assert is_gone(producer_of(loader).pid)


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


@linux
def test_a_process_forked_from_the_trainer_leaves_the_loader_alone():
    loader = Loader(CHATS, TOKENIZER, **SMALL)
    expected = reference.batches(CHATS, TOKENIZER, **SMALL)
    got = [next(loader)]
    with within(5):
        assert_a_forked_process_is_refused(loader)
        got += [next(loader) for _ in range(20)]
        # a DataLoader beside it, whose workers outlive the loader
        beside = iter(torch.utils.data.DataLoader(list(range(100)), num_workers=1))
        next(beside)
        pid = producer_of(loader).pid
        loader.close()
        assert is_gone(pid)
    assert compare((next(expected) for _ in range(21)), iter(got)).difference is None


@linux
def test_a_forked_copy_of_an_inline_loader_is_refused_too():
    # both would fill the same slot
    with within(5):
        assert_a_forked_process_is_refused(Loader(CHATS, TOKENIZER, num_workers=0, **SMALL))


@linux
def test_two_loaders_at_once_do_not_disturb_each_other():
    with Loader(CHATS, TOKENIZER, **SMALL) as train, within(5):
        next(train)
        for _ in range(2):
            with Loader(CHATS[:5], TOKENIZER, epochs=1, **SMALL) as val:
                assert len(list(val)) == len(list(reference.batches(CHATS[:5], TOKENIZER, epochs=1, **SMALL)))
            assert is_gone(producer_of(val).pid)
        for _ in range(10):
            next(train)


def test_a_daemonic_process_is_told_what_to_do(monkeypatch):
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    with pytest.raises(ValueError, match="num_workers=0 there"):
        Loader(CHATS, TOKENIZER, **SMALL)


def test_what_the_producer_logs_arrives_in_the_trainers_handlers(caplog):
    with caplog.at_level(logging.WARNING, "nanopack"):
        list(Loader([*CHATS[:3], {"text": 1}], TOKENIZER, epochs=1, on_error="skip", **SMALL))
    assert "skipped 1 bad conversation: 1 like conversation 3" in caplog.text


@linux
@pytest.mark.parametrize("unpicklable", [False, True])
def test_a_spawned_producer_gives_the_same_batches_or_says_what_it_needs(monkeypatch, unpicklable):
    monkeypatch.setattr(process, "START_METHOD", "spawn")
    if unpicklable:
        with pytest.raises(ValueError, match="must be picklable"):
            Loader(Faulty(0, lambda: None), TOKENIZER, **SMALL)
        return
    expected = reference.batches(CHATS, TOKENIZER, epochs=1, **SMALL)
    with within(30), Loader(CHATS, TOKENIZER, epochs=1, **SMALL) as loader:
        assert compare(expected, iter(loader)).difference is None


@linux
@pytest.mark.parametrize("packing", ["best_fit", "stream", "best_fit_pad", "best_fit_crop", "pad"])
def test_any_number_of_workers_and_any_prefetch_gives_the_same_batches(packing):
    arguments = {"batch_size": 2, "seq_len": 16, "packing": packing, "epochs": 2, "loss_weights": "token"}
    for workers, prefetch in ((1, 1), (1, 4), (2, 2), (4, 8)):
        expected = Loader(CHATS, TOKENIZER, num_workers=0, **arguments)
        with Loader(CHATS, TOKENIZER, num_workers=workers, prefetch=prefetch, **arguments) as loader:
            assert compare(expected, loader).difference is None
            assert loader.ledger() == expected.ledger()


SCRIPT = """
import os, sys, time, torch, nanopack
torch.randn(300, 300) @ torch.randn(300, 300)
torch.set_num_threads(2)
torch.ones(1_000_000).add_(1)
class Data(list):
    def __init__(self):
        super().__init__({"text": f"a b c d e f g {i}"} for i in range(40))
        self.cannot_be_pickled = lambda: None
DURING = sys.argv[1]
if DURING == "next":
    class Data(Data):
        def __getitem__(self, i):
            time.sleep(30 if i == 5 else 0)
            return super().__getitem__(i)
loader = nanopack.Loader(Data(), "chat32k", batch_size=1, seq_len=8, packing="stream", loss="all")
print(loader.producer_pid, flush=True)
batch = next(loader)
if DURING == "exit":
    sys.exit(0)
try:
    while True:
        if DURING == "loop":
            time.sleep(0.01)
        batch = next(loader)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    raise
"""


def run_script(tmp_path, during):
    script = tmp_path / "flat.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, script, during],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONWARNINGS": "default"},
    )


@linux
def test_a_flat_script_may_end_with_the_loader_open(tmp_path):
    trainer = run_script(tmp_path, "exit")
    out, err = trainer.communicate(timeout=30)
    assert (trainer.returncode, err) == (0, "")
    assert is_gone(int(out))


@linux
@pytest.mark.parametrize("during", ["loop", "next"])
def test_ctrl_c_reaches_the_user_and_leaves_no_process(tmp_path, during):
    trainer = run_script(tmp_path, during)
    pid = int(trainer.stdout.readline())
    time.sleep(0.7)
    os.killpg(trainer.pid, signal.SIGINT)
    out, err = trainer.communicate(timeout=10)
    assert "interrupted" in out and err.rstrip().endswith("KeyboardInterrupt")
    assert is_gone(pid)


START = """
import nanopack
print("ready", flush=True)
loaders = []
while True:
    loaders = [nanopack.Loader([{"text": "a b c"}], "chat32k", batch_size=1, seq_len=8)]
"""


@linux
@pytest.mark.parametrize("delay_ms", [0, 3, 9, 20, 45])
def test_ctrl_c_while_a_loader_starts_leaves_no_process(tmp_path, delay_ms):
    script = tmp_path / "start.py"
    script.write_text(START)
    trainer = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert trainer.stdout.readline() == "ready\n"
    time.sleep(delay_ms / 1000)
    os.killpg(trainer.pid, signal.SIGINT)
    _, err = trainer.communicate(timeout=10)
    assert "KeyboardInterrupt" in err
    end = time.monotonic() + 2
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(trainer.pid, 0)
            time.sleep(0.02)


@linux
def test_a_loader_takes_no_room_in_dev_shm():
    before = in_dev_shm()
    with Loader(CHATS, TOKENIZER, prefetch=8) as loader:
        next(loader)
        assert in_dev_shm() == before


@linux
@pytest.mark.parametrize("during", ["loop", "next"])
def test_a_killed_trainer_takes_its_producer_and_its_memory_along(tmp_path, during):
    before = in_dev_shm()
    trainer = run_script(tmp_path, during)
    pid = int(trainer.stdout.readline())
    time.sleep(0.5)
    trainer.kill()
    assert is_gone(pid)
    trainer.communicate()
    assert in_dev_shm() <= before


def resources():
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "memory_bytes": pages * os.sysconf("SC_PAGE_SIZE"),
        "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")),
        "shared": in_dev_shm(),
    }


def soak(batches):
    with Loader(CHATS, TOKENIZER, batch_size=4, seq_len=128, extras=("positions",), loss_weights="token") as loader:
        pid = producer_of(loader).pid
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


@linux
def test_nothing_grows_over_two_thousand_batches():
    soak(2_000)


@linux
@pytest.mark.slow
def test_nothing_grows_over_twenty_thousand_batches():
    soak(20_000)


@linux
def test_stats_tell_who_waited_for_whom():
    with Loader(Faulty(-1, None), TOKENIZER, **SMALL) as loader:
        next(loader)
        waited = loader.stats()["waited_for_producer_s"]
        for _ in range(20):
            with within(5):
                while not loader._feed.qsize():
                    time.sleep(0.001)
            next(loader)
        assert loader.stats()["waited_for_producer_s"] == waited, "batches were ready"
    assert loader.stats()["batches"] == 21 and loader.stats()["tokens"] == 21 * 8

    class Slow(list):
        def __getitem__(self, index):
            time.sleep(0.02)
            return super().__getitem__(index)

    with Loader(Slow(CHATS), TOKENIZER, **SMALL) as loader:
        for _ in range(20):
            next(loader)
        assert loader.stats()["waited_for_producer_s"] > 0.2


def test_the_error_is_part_of_the_public_face():
    assert nanopack.ProducerError is ProducerError


def workers_of(loader):
    pid = producer_of(loader).pid
    with within(2):
        while len(found := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()) < 2:
            time.sleep(0.01)
    return [int(child) for child in found]


@linux
@pytest.mark.parametrize("end", ["close", "drop", "kill the producer"])
def test_workers_end_with_their_producer(end):
    loader = Loader(CHATS, TOKENIZER, num_workers=2, **SMALL)
    next(loader)
    producer, workers = producer_of(loader).pid, workers_of(loader)
    if end == "close":
        loader.close()
    elif end == "drop":
        del loader
        gc.collect()
    else:
        os.kill(producer, signal.SIGKILL)
    assert is_gone(producer) and all(map(is_gone, workers))


@linux
def test_a_killed_worker_is_named_with_what_it_was_at():
    with Loader(CHATS, TOKENIZER, num_workers=2, prefetch=1, **SMALL) as loader:
        first = next(loader)
        os.kill(workers_of(loader)[1], signal.SIGKILL)
        with within(5):
            batches, error = batches_until_error(loader)
        assert isinstance(error, ProducerError)
        message = r"a worker of the producer \(pid \d+\) was killed by SIGKILL \(reading and tokenizing"
        assert re.search(message, str(error))
    expected = itertools.islice(reference.batches(CHATS, TOKENIZER, **SMALL), 1 + len(batches))
    assert compare(expected, iter([first, *batches])).difference is None


@linux
def test_a_stopped_worker_is_waited_for_with_a_warning_and_nothing_is_lost(caplog):
    with Loader(CHATS, TOKENIZER, num_workers=2, prefetch=1, **SMALL) as loader:
        got = [next(loader)]
        workers = workers_of(loader)
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        threading.Timer(2.2, lambda: [os.kill(worker, signal.SIGCONT) for worker in workers]).start()
        with within(20):
            got += itertools.islice(loader, 500)
    assert "reading and tokenizing, from conversation" in caplog.text
    expected = itertools.islice(reference.batches(CHATS, TOKENIZER, **SMALL), 501)
    assert compare(expected, iter(got)).difference is None


@linux
def test_more_requests_than_a_pipe_holds_do_not_lock_the_workers_up():
    """A thousand rows read side by side, each a chunk ahead, and documents that fill the pipe of the results."""
    chats = [{"text": f"{'a b c d e f g h ' * 400}{k}"} for k in range(1200)]
    arguments = dict(batch_size=1000, seq_len=16, shard="row", packing=BestFitPad(window=2), loss="all")
    with within(60), Loader(chats, TOKENIZER, num_workers=2, **arguments) as loader:
        batch = next(loader)
    expected = next(reference.batches(chats, TOKENIZER, **arguments))
    assert compare(iter([expected]), iter([batch])).difference is None
