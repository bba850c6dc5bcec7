"""Signals to every process of a run: the trainer takes its batches and saves, and no process outlives it."""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from faulty import CHATS, SMALL, TOKENIZER, Faulty, is_gone, workers_of
from trainer_script import script

from nanopack import Loader

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc as on Linux")
slow = pytest.mark.slow
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]
SIGNALS += [signal.SIGQUIT, signal.SIGXCPU]

# A step is more micro-batches than are ever ready, so that the producer must live on to its end.
PREEMPTED = """
def main():
    came = []
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: came.append(number))
    options = dict(batch_size=1, seq_len=8, packing="stream", loss="all", prefetch=2)
    with nanopack.Loader(CHATS, "chat32k", num_workers=WORKERS, start_method=METHOD, **options) as loader:
        next(loader)
        print(loader.producer_pid, flush=True)
        seen, steps = 0, 1
        while seen < len(SIGNALS):
            for _ in range(16):
                next(loader)
                time.sleep(0.002)
            steps += 16
            if len(came) > seen:
                seen = len(came)
                assert loader.state_dict()["step"] == steps
                print("saved after", came[-1], flush=True)
if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    ("method", "workers"),
    [("fork", 1), ("fork", 2), pytest.param("spawn", 1, marks=slow), pytest.param("forkserver", 2, marks=slow)],
)
def test_after_a_signal_to_the_whole_group_the_trainer_finishes_its_step_and_saves(tmp_path, method, workers):
    text = f"SIGNALS, METHOD, WORKERS = {[*map(int, SIGNALS)]}, {method!r}, {workers}\n{PREEMPTED}"
    with script(tmp_path, text) as trainer:
        pid = int(trainer.stdout.readline())
        for number in SIGNALS:
            os.killpg(trainer.pid, number)
            assert trainer.stdout.readline() == f"saved after {int(number)}\n"
        _, err = trainer.communicate(timeout=50)
        # workers that are spawned may take a while to start
        assert trainer.returncode == 0 and all("waited" in line for line in err.splitlines())
        assert is_gone(pid)


KILLED = """
def main():
    # in the second chunk, and not in the sample that is read at construction
    data = Data(lambda: time.sleep(60), 38)
    options = dict(batch_size=1, seq_len=8, packing="stream", loss="all")
    loader = nanopack.Loader(CHATS if METHOD else data, "chat32k", num_workers=2, start_method=METHOD, **options)
    next(loader)
    print(loader.producer_pid, flush=True)
    time.sleep(60)
if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    ("number", "group", "method"),
    [
        (signal.SIGKILL, False, None),
        (signal.SIGTERM, True, None),
        pytest.param(signal.SIGKILL, True, "forkserver", marks=slow),
        pytest.param(signal.SIGTERM, False, "forkserver", marks=slow),
        pytest.param(signal.SIGKILL, False, "spawn", marks=slow),
        pytest.param(signal.SIGTERM, True, "spawn", marks=slow),
    ],
)
def test_no_process_is_left_once_the_trainer_dies(tmp_path, number, group, method):
    with script(tmp_path, f"METHOD = {method!r}\n{KILLED}") as trainer:
        producer = int(trainer.stdout.readline())
        workers = workers_of(producer) if method != "forkserver" else []
        (os.killpg if group else os.kill)(trainer.pid, number)
        assert trainer.wait(20) == -number
        assert is_gone(producer) and all(map(is_gone, workers))


def check_children():
    shell = subprocess.run(["sh", "-c", "kill -TERM $$; sleep 60"])
    assert shell.returncode == -signal.SIGTERM
    pid = os.fork()
    if pid == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM


@pytest.mark.parametrize("workers", [1, 2])
def test_a_program_that_the_data_set_runs_can_be_terminated(workers):
    with Loader(Faulty(20, check_children), TOKENIZER, epochs=1, num_workers=workers, **SMALL) as loader:
        assert len(list(iter(loader))) > 20


def read_under_signals():
    """As a library in C reads, which may take an interrupted call for an error."""
    read, write = os.pipe()
    reader = threading.get_ident()

    def disturb():
        for number in SIGNALS:
            time.sleep(0.05)
            signal.pthread_kill(reader, number)
        time.sleep(0.05)
        os.write(write, b"x")

    threading.Thread(target=disturb).start()
    assert ctypes.CDLL(None).read(read, ctypes.create_string_buffer(1), 1) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_interrupts_no_system_call_of_the_data_set(workers):
    with Loader(Faulty(20, read_under_signals), TOKENIZER, epochs=1, num_workers=workers, **SMALL) as loader:
        assert len(list(iter(loader))) > 20


def test_a_signal_to_the_producer_alone_does_not_wake_the_trainers_event_loop():
    read, write = socket.socketpair()
    write.setblocking(False)
    before = signal.set_wakeup_fd(write.fileno())
    try:
        with Loader(CHATS, TOKENIZER, prefetch=1, **SMALL) as loader:
            next(loader)
            for number in SIGNALS:
                os.kill(loader.producer_pid, number)
            for _ in range(20):
                next(loader)
            assert not select.select([read], [], [], 0)[0]
    finally:
        signal.set_wakeup_fd(before)
        read.close(), write.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_signals_that_arrive_together_do_not_overflow_the_stack_that_faulthandler_gave(workers):
    faulthandler.enable(sys.__stderr__)
    with Loader(CHATS, TOKENIZER, prefetch=1, num_workers=workers, **SMALL) as loader:
        next(loader)
        stopped = [loader.producer_pid, *(workers_of(loader.producer_pid) if workers > 1 else [])]
        for pid in stopped:
            for number in [signal.SIGSTOP, *SIGNALS, signal.SIGCONT]:
                os.kill(pid, number)
        for _ in range(20):
            next(loader)


def leave_open():
    global left
    left = Loader(CHATS, TOKENIZER, **SMALL)
    next(left)


def test_a_process_of_multiprocessing_ends_with_a_loader_open():
    """At its end it terminates and awaits the children that it knows of."""
    child = multiprocessing.get_context("fork").Process(target=leave_open)
    child.start()
    child.join(20)
    assert child.exitcode == 0


def test_to_await_all_children_of_multiprocessing_awaits_no_producer():
    with Loader(CHATS, TOKENIZER, **SMALL) as loader:
        next(loader)
        assert not multiprocessing.active_children()
