"""The producer's process where it is hard: what test_faults.py does not break already."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import itertools
import logging
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from faulty import CHATS, SMALL, TOKENIZER, Faulty, in_dev_shm, is_gone, raising, within
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopack import ConversationError, Loader, reference
from nanopack.errors import ProducerError
from nanopack.packing.packings import PACKINGS
from nanopack.verify import compare

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc as on Linux"),
]


def wait_until(true, seconds=3.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.005)


def expected(count, **arguments):
    return itertools.islice(reference.batches(CHATS, TOKENIZER, **(SMALL | arguments)), count)


class Untellable(Exception):
    def __str__(self):
        raise RuntimeError("no words")


class UntellableHard(BaseException):
    def __str__(self):
        raise RuntimeError("no words")


class Changeling(MemoryError):
    """Pickles as something that is no exception."""

    def __reduce__(self):
        return dict, ()


class Stillborn(MemoryError):
    """Pickles, and cannot be unpickled."""

    def __reduce__(self):
        return Stillborn.fail, ()

    @staticmethod
    def fail():
        raise ValueError("not made to be unpickled")


@pytest.mark.parametrize(
    "error, kind, message",
    [
        (Untellable(), RuntimeError, "no words"),
        (UntellableHard(), ProducerError, "stopped by UntellableHard$"),
        (Changeling("x"), ProducerError, "stopped by Changeling: x"),
        (Stillborn("x"), ProducerError, "stopped by Stillborn: x"),
        (StopIteration(3), ConversationError, "StopIteration: 3"),
        (GeneratorExit(), ProducerError, "stopped by GeneratorExit"),
        # what ends the process when a pipe says it must not do so when a data set does
        (BrokenPipeError("theirs"), ConversationError, "BrokenPipeError: theirs"),
        (EOFError("theirs"), ConversationError, "EOFError: theirs"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_error_that_is_hard_to_tell_is_told(error, kind, message):
    with Loader(Faulty(20, raising(error)), TOKENIZER, **SMALL) as loader, within(5):
        got = []
        with pytest.raises(kind, match=message) as raised:
            for batch in loader:
                got.append(batch)
        assert raised.type is kind and "Traceback" in str(raised.value.__cause__)
    assert len(got) >= 20 and compare(expected(len(got)), iter(got)).difference is None


def test_a_tokenizer_that_raises_is_told_as_a_bad_conversation(monkeypatch):
    encode = __import__("nanopack.tokenizers.tokenizer", fromlist=["Tokenizer"]).Tokenizer.encode_batch

    def picky(self, texts):
        if any(text.endswith(" 7") for text in texts):
            raise ValueError("will not")
        return encode(self, texts)

    monkeypatch.setattr("nanopack.tokenizers.tokenizer.Tokenizer.encode_batch", picky)
    with Loader(CHATS, TOKENIZER, **SMALL) as loader, within(5):
        got = []
        with pytest.raises(ConversationError, match=r"conversation 7, .*will not"):
            for batch in loader:
                got.append(batch)
    assert len(got) >= 7 and compare(expected(len(got)), iter(got)).difference is None


def hog():
    limit = resource.getrlimit(resource.RLIMIT_AS)[1]
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + (32 << 20), limit))
    bytearray(1 << 30)


@pytest.mark.parametrize("workers", [1, 2])
def test_memory_that_runs_out_is_a_memory_error(workers):
    with Loader(Faulty(20, hog), TOKENIZER, num_workers=workers, **SMALL) as loader, within(5):
        with pytest.raises(MemoryError):
            for _ in loader:
                pass
        assert loader.stats()["batches"] >= 20 or workers > 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV], ids=lambda n: n.name)
@pytest.mark.parametrize("prefetch", [1, 4, 8])
def test_every_batch_that_was_ready_comes_before_the_death(number, prefetch):
    # without pytest's own handler, which would print the stack
    with Loader(Faulty(0, faulthandler.disable), TOKENIZER, prefetch=prefetch, **SMALL) as loader:
        process = loader._feed._process
        got = [next(loader)]
        # it fills all slots, and waits
        wait_until(lambda: loader._feed.ring.status.sent == loader._feed.ring.status.released + prefetch + 1)
        posted = loader._feed.ring.status.sent
        os.kill(process.pid, number)
        assert is_gone(process.pid)
        with within(2), pytest.raises(ProducerError, match=f"killed by {number.name}"):
            for batch in loader:
                got.append(batch)
    assert len(got) == posted and compare(expected(posted), iter(got)).difference is None


def test_a_death_is_noticed_though_a_stranger_holds_the_pipe_open(monkeypatch):
    """Whoever is forked by another thread while the process is started keeps the end of the news that it writes to."""
    strangers = []
    start = __import__("nanopack.producer.process", fromlist=["_start"])._start

    def start_late(process):
        pid = os.fork()
        if pid == 0:
            time.sleep(20)
            os._exit(0)
        strangers.append(pid)
        start(process)

    monkeypatch.setattr("nanopack.producer.process._start", start_late)
    loader = Loader(Faulty(20, lambda: os.kill(os.getpid(), signal.SIGKILL)), TOKENIZER, **SMALL)
    try:
        with within(4), pytest.raises(ProducerError, match="killed by SIGKILL"):
            for _ in loader:
                pass
        with within(2):
            loader.close()
    finally:
        os.kill(strangers[0], signal.SIGKILL)
        os.waitpid(strangers[0], 0)


def test_a_stall_names_the_stage_and_a_stop_in_it(caplog):
    stop = Faulty(20, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    with Loader(stop, TOKENIZER, epochs=1, **SMALL) as loader, caplog.at_level(logging.WARNING, "nanopack"):
        pid = loader.producer_pid
        threading.Timer(2.5, os.kill, (pid, signal.SIGCONT)).start()
        with within(8):
            assert compare(reference.batches(CHATS, TOKENIZER, epochs=1, **SMALL), loader).difference is None
    [stall] = [record.getMessage() for record in caplog.records]
    assert f"pid {pid}, stopped by a signal" in stall
    assert "reading and tokenizing, from conversation 20 on" in stall


def test_batches_that_are_ready_come_from_a_stopped_producer_without_a_wait():
    with Loader(CHATS, TOKENIZER, prefetch=4, **SMALL) as loader:
        got = [next(loader)]
        # two may be on the device already, and keep their slots until the next call
        wait_until(lambda: loader._feed.qsize() >= 3)
        os.kill(loader.producer_pid, signal.SIGSTOP)
        with within(1):
            got += [next(loader) for _ in range(3)]
    assert compare(expected(4), iter(got)).difference is None


@pytest.mark.parametrize("code", [0, 3])
def test_the_exit_of_a_bare_fork_leaves_the_producer_to_its_trainer(code, capfd):
    # multiprocessing ends at exit whom it takes for its children, and a bare fork takes the trainer's for its own
    with Loader(CHATS, TOKENIZER, **SMALL) as loader, within(10):
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


def test_data_loader_workers_come_and_go_beside_the_loader():
    with Loader(CHATS, TOKENIZER, **SMALL) as loader, within(20):
        got = []
        for _ in range(2):
            for _ in torch.utils.data.DataLoader(list(range(10)), num_workers=2):
                got.append(next(loader))
        pid = loader.producer_pid
    assert is_gone(pid) and compare(expected(len(got)), iter(got)).difference is None


def test_closing_at_any_moment_ends_next_with_the_same_error():
    for delay_ms in range(0, 20, 2):
        loader = Loader(CHATS, TOKENIZER, **SMALL)
        timer = threading.Timer(delay_ms / 1000, loader.close)
        timer.start()
        got = []
        with within(3), pytest.raises(RuntimeError, match=r"^the loader is closed"):
            for batch in loader:
                got.append(batch)
        timer.join()
        assert compare(expected(len(got)), iter(got)).difference is None


def test_two_threads_may_close_at_once_while_a_third_waits():
    loader = Loader(Faulty(5, lambda: time.sleep(60)), TOKENIZER, **SMALL)
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
        thread.join(3)
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
        thread.join(10)
        assert not thread.is_alive()
    both = sorted(got, key=lambda batch: batch.step)
    for half in (both[::2], both[1::2]):
        assert compare(reference.batches(CHATS, TOKENIZER, epochs=1, **SMALL), iter(half)).difference is None


def test_a_refused_start_leaves_nothing_to_end_at_exit(monkeypatch):
    from nanopack.producer import process

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


def test_news_of_all_slots_fit_the_pipe_though_a_batch_has_many_pieces():
    chats = [{"text": "a"}] * 10
    with Loader(chats, TOKENIZER, batch_size=16, seq_len=512, packing="stream", loss="all", prefetch=4) as loader:
        next(loader)
        wait_until(lambda: loader._feed.qsize() >= 3)


SCRIPT = """
import gc, os, signal, sys, threading, time, nanopack
import torch
torch.randn(300, 300) @ torch.randn(300, 300)
CHATS = [{"text": f"a b c d e f g {i}"} for i in range(40)]
class Data(list):
    def __init__(self, do=lambda: None, at=None):
        super().__init__(CHATS)
        self.do, self.at = do, at
    def __getitem__(self, i):
        if i == self.at:
            self.do()
        return super().__getitem__(i)
def make(*data):
    loader = nanopack.Loader(Data(*data), "chat32k", batch_size=1, seq_len=8, packing="stream", loss="all")
    print(loader.producer_pid, flush=True)
    return loader
"""


@contextlib.contextmanager
def script(tmp_path, text, **files):
    for name, content in files.items():
        (tmp_path / f"{name}.py").write_text(content)
    path = tmp_path / "flat.py"
    path.write_text(SCRIPT + text)
    process = subprocess.Popen(
        [sys.executable, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


EXITS = {
    "busy in the data set": "loader = make(lambda: time.sleep(60), 20)\nnext(loader)\n",
    "stopped": "loader = make()\nnext(loader)\nos.kill(loader.producer_pid, signal.SIGSTOP)\n",
    "killed": "loader = make()\nnext(loader)\nos.kill(loader.producer_pid, signal.SIGKILL)\n",
    "waited for by a thread": (
        "loader = make(lambda: time.sleep(60), 20)\n"
        "def wait():\n    try:\n        [0 for _ in loader]\n    except RuntimeError:\n        pass\n"
        "threading.Thread(target=wait, daemon=True).start()\ntime.sleep(0.3)\n"
    ),
    "in a cycle": "loader = make()\nloader.cycle = loader\nnext(loader)\n",
    "beside another": "a, b = make(), make()\nnext(a), next(b)\n",
}


@pytest.mark.parametrize("state", EXITS)
def test_the_interpreter_ends_at_once_and_in_silence(tmp_path, state):
    with script(tmp_path, EXITS[state] + "print(time.time())\n") as trainer:
        out, err = trainer.communicate(timeout=20)
        took = time.time() - float(out.split()[-1])
        assert (trainer.returncode, err) == (0, "") and took < 2.5
        assert all(is_gone(pid) for pid in out.split()[:-1])


@pytest.mark.parametrize("state", ["stopped", "busy in the data set"])
def test_a_killed_trainer_takes_a_producer_along_whatever_it_is_at(tmp_path, state):
    before = in_dev_shm()
    with script(tmp_path, EXITS[state] + "print('ready', flush=True)\ntime.sleep(60)\n") as trainer:
        pid = int(trainer.stdout.readline())
        assert trainer.stdout.readline() == "ready\n"
        trainer.kill()
        try:
            # a process that is stopped does nothing, and be it to end, until it may go on
            if state == "stopped":
                trainer.wait(2)
                os.kill(pid, signal.SIGCONT)
            assert is_gone(pid)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert in_dev_shm() <= before


CONSTRUCTING = """
children = lambda: open(f"/proc/self/task/{os.getpid()}/children").read().split()
make().close()
caught = 0
for k in range(24):
    before = signal.getsignal(signal.SIGINT)
    # from a thread, and to the process: any of its threads may receive it
    timer = threading.Timer(0.0008 * k, os.kill, (os.getpid(), signal.SIGINT))
    loader = None
    try:
        timer.start()
        loader = make(lambda: time.sleep(60), 0)
        timer.join()
        time.sleep(0.01)
    except KeyboardInterrupt:
        caught += 1
    assert signal.getsignal(signal.SIGINT) is before
    timer.join()
    if loader is not None:
        loader.close()
    del loader
    gc.collect()
assert caught == 24, caught
end = time.time() + 1
while children() and time.time() < end:
    time.sleep(0.02)
print("left", children())
"""


def test_ctrl_c_during_the_start_reaches_the_user_and_leaves_no_process(tmp_path):
    with script(tmp_path, CONSTRUCTING) as trainer:
        out, err = trainer.communicate(timeout=40)
        assert (trainer.returncode, err) == (0, "") and out.splitlines()[-1] == "left []"


CAUGHT = """
loader = make(lambda: time.sleep(60), 20)
try:
    for batch in loader:
        pass
except KeyboardInterrupt:
    print("interrupted", flush=True)
try:
    next(loader)
except RuntimeError as error:
    print(error, flush=True)
pid = loader.producer_pid
began = time.time()
del loader
gc.collect()
print(time.time() - began < 1.5, os.path.exists(f"/proc/{pid}"))
"""


def test_a_loader_dropped_unclosed_in_a_cycle_ends_a_busy_producer():
    loader = Loader(Faulty(20, lambda: time.sleep(60)), TOKENIZER, **SMALL)
    loader.cycle = loader
    next(loader)
    pid = loader.producer_pid
    with within(2):
        del loader
        gc.collect()
    assert is_gone(pid)


def test_ctrl_c_in_next_that_the_user_catches_leaves_a_loader_that_says_so(tmp_path):
    with script(tmp_path, CAUGHT) as trainer:
        trainer.stdout.readline()
        time.sleep(0.7)
        os.killpg(trainer.pid, signal.SIGINT)
        out, err = trainer.communicate(timeout=10)
        assert err == ""
        assert out.splitlines()[0] == "interrupted" and "make a new one" in out and out.endswith("True False\n")


SPAWNED = """
if __name__ == "__main__":
    import data
    from nanopack.producer import process
    process.START_METHOD = "spawn"
    with nanopack.Loader(
        data.Reporting(), "chat32k", batch_size=1, seq_len=8, packing="stream", loss="all", epochs=1
    ) as loader:
        for batch in loader:
            pass
    from pathlib import Path
    print(Path(data.__file__).with_name("modules").read_text())
"""
DATA = """
import sys
from pathlib import Path
class Reporting(list):
    def __init__(self):
        super().__init__([{"text": "a b c d e f g h"}] * 4)
    def __getitem__(self, i):
        if i == 3:
            roots = {name.split(".")[0] for name in sys.modules}
            Path(__file__).with_name("modules").write_text(" ".join(sorted(roots)))
        return super().__getitem__(i)
"""


def test_a_producer_imports_no_triton(tmp_path):
    with script(tmp_path, SPAWNED, data=DATA) as trainer:
        out, err = trainer.communicate(timeout=40)
        assert err == "" and "nanopack" in out.split() and "triton" not in out.split()


chats = st.lists(st.text("ab ", max_size=30).map(lambda text: {"text": "x" + text}), min_size=1, max_size=12)


@settings(max_examples=25)
@given(
    data=chats,
    packing=st.sampled_from(list(PACKINGS)),
    workers=st.sampled_from([0, 1, 2, 4]),
    prefetch=st.integers(1, 8),
    epochs=st.integers(1, 3),
    batch_size=st.integers(1, 3),
)
def test_workers_and_prefetch_change_nothing(data, packing, workers, prefetch, epochs, batch_size):
    arguments = {
        "batch_size": batch_size,
        "seq_len": 16,
        "packing": packing,
        "loss": "all",
        "epochs": epochs,
        "loss_weights": "conversation",
        "extras": ("positions", "doc_ids", "cu_seqlens"),
        "max_pieces": 16,
    }
    wanted = reference.batches(data, TOKENIZER, **arguments)
    with within(20), Loader(data, TOKENIZER, num_workers=workers, prefetch=prefetch, **arguments) as loader:
        assert compare(wanted, loader).difference is None


def resources():
    gc.collect()
    return {
        "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")),
        "shared": in_dev_shm(),
        "children": Path(f"/proc/self/task/{os.getpid()}/children").read_text().split(),
    }


def memory_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_and_close(count):
    for number in range(count):
        loader = Loader(CHATS, TOKENIZER, num_workers=1 + number % 2, **SMALL)
        next(loader)
        if number % 3:
            loader.close()


def test_loaders_that_come_and_go_leave_nothing():
    open_and_close(10)
    before, memory = resources(), memory_bytes()
    open_and_close(40)
    assert resources() == before
    assert memory_bytes() - memory < 4 << 20


def test_a_slow_trainer_does_not_wait_and_a_slow_data_set_is_waited_for():
    with Loader(CHATS, TOKENIZER, **SMALL) as loader, within(20):
        next(loader)
        began = loader.stats()
        for _ in range(20):
            time.sleep(0.02)
            next(loader)
        assert loader.stats()["waited_for_producer_s"] - began["waited_for_producer_s"] < 0.02
        assert loader.stats()["queue_depth"] >= 1
    with Loader(Faulty("all", lambda: time.sleep(0.02)), TOKENIZER, **SMALL) as loader, within(20):
        for _ in range(20):
            next(loader)
        stats = loader.stats()
    assert 0.2 < stats["waited_for_producer_s"] <= stats["next_s"] < 5
    assert stats["batches"] == 20 and stats["tokens"] == 160 and stats["padding"] == 0
