"""Scripts that end, are interrupted or are killed with a loader open: promptly, silently, and no process stays."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

import pytest
from faulty import in_dev_shm, is_gone, sleeps, wait_until
from trainer_script import script

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc as on Linux")
slow = pytest.mark.slow

STATES = {
    "busy in the data set": "loader = make(lambda: time.sleep(60), 20)\nnext(loader)\n",
    "stopped": "loader = make()\nnext(loader)\nos.kill(loader.producer_pid, signal.SIGSTOP)\n",
    "killed": "loader = make()\nnext(loader)\nos.kill(loader.producer_pid, signal.SIGKILL)\n",
    "awaited by a thread": (
        "loader = make(lambda: time.sleep(60), 20)\n"
        "def wait():\n    try:\n        [0 for _ in loader]\n    except RuntimeError:\n        pass\n"
        "threading.Thread(target=wait, daemon=True).start()\ntime.sleep(0.3)\n"
    ),
    "in a cycle": "loader = make()\nloader.cycle = loader\nnext(loader)\n",
    "one of two": "a, b = make(), make()\nnext(a), next(b)\n",
}


@pytest.mark.parametrize("state", ["busy in the data set", *[pytest.param(s, marks=slow) for s in list(STATES)[1:]]])
def test_the_interpreter_ends_promptly_and_silently(tmp_path, state):
    with script(tmp_path, STATES[state] + "print(time.time())\n") as trainer:
        out, err = trainer.communicate(timeout=50)
        took = time.time() - float(out.split()[-1])
        # far less than the data set sleeps
        assert (trainer.returncode, err) == (0, "") and took < 20
        assert all(is_gone(pid) for pid in out.split()[:-1])


@pytest.mark.parametrize("state", ["stopped", pytest.param("busy in the data set", marks=slow)])
def test_a_killed_trainer_takes_its_producer_and_its_memory_along(tmp_path, state):
    before = in_dev_shm()
    with script(tmp_path, STATES[state] + "print('ready', flush=True)\ntime.sleep(60)\n") as trainer:
        pid = int(trainer.stdout.readline())
        assert trainer.stdout.readline() == "ready\n"
        trainer.kill()
        try:
            # a stopped process does nothing, not even end, until it is continued
            if state == "stopped":
                trainer.wait(20)
                os.kill(pid, signal.SIGCONT)
            assert is_gone(pid)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert in_dev_shm() <= before


CONSTRUCTING = """
import logging
from pathlib import Path
# that it waits for the data set, which it says where the machine is so slow that Ctrl-C comes late
logging.getLogger("nanopack").setLevel(logging.ERROR)
children = lambda: Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
make().close()
caught = 0
for k in range(0, 24, EVERY):
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
assert caught == len(range(0, 24, EVERY)), caught
end = time.time() + 10
while children() and time.time() < end:
    time.sleep(0.02)
print("left", children())
"""


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=slow)])
def test_ctrl_c_during_the_start_reaches_the_user_and_leaves_no_process(tmp_path, every):
    with script(tmp_path, f"EVERY = {every}\n{CONSTRUCTING}") as trainer:
        out, err = trainer.communicate(timeout=100)
        assert (trainer.returncode, err) == (0, "") and out.endswith("left []\n")


STARTING = """
print("ready", flush=True)
while True:
    loaders = [nanopack.Loader([{"text": "a b c"}], "chat32k", batch_size=1, seq_len=8)]
"""


@pytest.mark.parametrize("delay_ms", [9, *[pytest.param(ms, marks=slow) for ms in (0, 3, 20, 45)]])
def test_ctrl_c_to_the_whole_group_while_loaders_start_leaves_no_process(tmp_path, delay_ms):
    with script(tmp_path, STARTING) as trainer:
        assert trainer.stdout.readline() == "ready\n"
        time.sleep(delay_ms / 1000)
        os.killpg(trainer.pid, signal.SIGINT)
        _, err = trainer.communicate(timeout=50)
        assert "KeyboardInterrupt" in err
        end = time.monotonic() + 10
        with pytest.raises(ProcessLookupError):
            while time.monotonic() < end:
                os.killpg(trainer.pid, 0)
                time.sleep(0.02)


RUNNING = """
loader = make(*DATA)
try:
    for batch in loader:
        print("batch", flush=True)
        time.sleep(0.01)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    raise
"""


@pytest.mark.parametrize("data", ["", pytest.param("lambda: time.sleep(60), 5", marks=slow)], ids=["loop", "next"])
def test_ctrl_c_reaches_the_user_and_leaves_no_process(tmp_path, data):
    with script(tmp_path, f"DATA = ({data})\n{RUNNING}") as trainer:
        pid = int(trainer.stdout.readline())
        assert trainer.stdout.readline() == "batch\n"
        time.sleep(0.5)
        os.killpg(trainer.pid, signal.SIGINT)
        out, err = trainer.communicate(timeout=50)
        assert "interrupted" in out and err.rstrip().endswith("KeyboardInterrupt")
        assert is_gone(pid)


CAUGHT = """
go = os.path.join(os.path.dirname(__file__), "go")
def hold():
    print("waits", flush=True)
    while not os.path.exists(go):
        time.sleep(0.01)
loader = make(hold, 20)
got, caught = [], 0
while len(got) < 100:
    try:
        got.append(next(loader).inputs.tolist())
    except KeyboardInterrupt:
        caught += 1
        if caught == 2:
            open(go, "w").close()
        print("interrupted", flush=True)
loader.close()
again = nanopack.Loader(CHATS, "chat32k", batch_size=1, seq_len=8, packing="stream", loss="all")
assert got == [next(again).inputs.tolist() for _ in got]
print("nothing is lost", caught)
"""


def test_a_caught_ctrl_c_while_next_waits_loses_nothing(tmp_path):
    with script(tmp_path, CAUGHT) as trainer:
        trainer.stdout.readline()
        assert trainer.stdout.readline() == "waits\n"
        for _ in range(2):
            wait_until(lambda: sleeps(trainer.pid))
            os.killpg(trainer.pid, signal.SIGINT)
            assert trainer.stdout.readline() == "interrupted\n"
        out, err = trainer.communicate(timeout=50)
        assert (out.replace("waits\n", ""), err) == ("nothing is lost 2\n", "")
