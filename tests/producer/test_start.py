"""A producer that cannot start is an error within seconds that says what to do; Ctrl-C ends the wait for it."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
from faulty import CHATS, SMALL, TOKENIZER, Faulty, Moved, is_gone, once, raising, within
from trainer_script import script

import nanopack
from nanopack import Loader
from nanopack.errors import ProducerError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc as on Linux")
slow = pytest.mark.slow
README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def executable(monkeypatch, tmp_path):
    """Lets spawned processes run a shell script instead of Python."""
    multiprocessing.resource_tracker.ensure_running()

    def replace(text):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        monkeypatch.setattr(multiprocessing.spawn, "_python_exe", os.fsencode(path))

    return replace


@pytest.mark.parametrize(
    ("text", "end"), [("exit 7", "exited with code 7"), ("kill -KILL $$", "was killed by SIGKILL")], ids=str
)
def test_a_child_that_dies_before_it_runs_is_an_error_with_the_remedies(executable, text, end):
    executable(text)
    with within(10), pytest.raises(ProducerError, match=end) as raised:
        Loader(CHATS, TOKENIZER, start_method="spawn", **SMALL)
    for remedy in ('if __name__ == "__main__":', "class in a module", "num_workers=0"):
        assert remedy in str(raised.value)


def test_ctrl_c_ends_the_wait_for_a_child_that_starts(executable, tmp_path):
    started = tmp_path / "pid"
    executable(f"echo $$ > {started}; exec sleep 60")
    once(lambda: started.exists() and started.read_text(), lambda: os.kill(os.getpid(), signal.SIGINT))
    with within(20), pytest.raises(KeyboardInterrupt):
        Loader(CHATS, TOKENIZER, start_method="spawn", **SMALL)
    assert is_gone(started.read_text().strip())


# The second move is from the producer to its workers.
@pytest.mark.parametrize(("workers", "moves"), [(1, 1), pytest.param(2, 1, marks=slow), pytest.param(2, 2, marks=slow)])
@pytest.mark.parametrize(
    ("do", "message"),
    [
        (raising(AttributeError("no class")), "could not unpickle .*AttributeError: no class"),
        pytest.param(functools.partial(os._exit, 7), "exited with code 7 .at its start", marks=slow),
    ],
    ids=["raises", "exits"],
)
def test_data_that_do_not_arrive_are_an_error_with_the_remedies(do, message, workers, moves):
    with within(100), pytest.raises(ProducerError, match=message) as raised:
        next(Loader(Moved(moves, do), TOKENIZER, num_workers=workers, start_method="spawn", **SMALL))
    assert "define the data set's class in a module" in str(raised.value)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_data_that_do_not_pickle_are_refused_with_the_remedy(method):
    with within(20), pytest.raises(ValueError, match=r"must be picklable unless it is forked .*num_workers=0"):
        Loader(Faulty(0, lambda: None), TOKENIZER, start_method=method, **SMALL)


def test_an_unknown_start_method_is_refused():
    with pytest.raises(ValueError, match="start_method='thread' is not allowed; use one of None, 'fork'"):
        Loader(CHATS, TOKENIZER, start_method="thread", **SMALL)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=slow)])
def test_the_first_example_of_the_readme_spawned_without_a_guard_ends_in_the_error(tmp_path, workers):
    example = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    spawned, count = re.subn(r"(Loader\(.*)\) as", rf'\1, start_method="spawn", num_workers={workers}) as', example)
    assert count == 1
    with script(tmp_path, spawned) as trainer:
        _, err = trainer.communicate(timeout=100)
    assert trainer.returncode == 1
    assert "has finished its bootstrapping phase" in err
    assert "ProducerError: the producer process" in err and 'under `if __name__ == "__main__":`' in err


class Locked(list):
    """Conversations that are read under a lock."""

    def __init__(self):
        super().__init__(CHATS)
        self.lock = threading.Lock()

    def __getitem__(self, index):
        with self.lock:
            return super().__getitem__(index)


HINT = 'use start_method="spawn"'


@pytest.mark.parametrize("held", [True, False])
def test_a_lock_that_was_held_at_the_fork_is_hinted_at_where_nothing_came(monkeypatch, caplog, held):
    monkeypatch.setattr("nanopack.producer.process.STALL", 0.1)
    start, data = nanopack.producer.process.start, Locked()

    def start_locked(process, **options):
        with data.lock if held else contextlib.nullcontext():
            start(process, **options)

    monkeypatch.setattr("nanopack.producer.process.start", start_locked)
    loader = Loader(data if held else Faulty(20, lambda: time.sleep(60)), TOKENIZER, **SMALL)
    # the third warning comes after the time of the hint
    once(lambda: HINT in caplog.text if held else caplog.text.count("waited") >= 3, loader.close)
    with caplog.at_level(logging.WARNING, "nanopack"), within(20), pytest.raises(RuntimeError, match="closed"):
        for _ in loader:
            pass
    assert "waited" in caplog.text and (HINT in caplog.text) == held


@pytest.mark.parametrize(("data", "warned"), [(CHATS, 0), (Faulty(99, None), 1)], ids=["list", "class of the user's"])
def test_pythons_warning_of_threads_at_a_fork_is_silent_only_where_no_code_of_the_users_runs(monkeypatch, data, warned):
    start = multiprocessing.context.ForkProcess.start

    def start_with_threads(process):
        warnings.warn("multi-threaded, use of fork() may lead to deadlocks", DeprecationWarning, stacklevel=2)
        start(process)

    monkeypatch.setattr(multiprocessing.context.ForkProcess, "start", start_with_threads)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Loader(data, TOKENIZER, **SMALL).close()
    assert len([one for one in caught if "deadlocks" in str(one.message)]) == warned


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("code", [errno.EAGAIN, errno.ENOMEM], ids=errno.errorcode.get)
def test_a_fork_that_the_system_refuses_is_an_error_with_the_remedy(monkeypatch, code, workers):
    fork, trainer = os.fork, os.getpid()

    def refused():
        if workers == 1 or os.getpid() != trainer:
            raise OSError(code, os.strerror(code))
        return fork()

    monkeypatch.setattr(os, "fork", refused)
    with within(20), pytest.raises(OSError, match=r"refuses another process .*num_workers=0") as raised:
        next(Loader(CHATS, TOKENIZER, num_workers=workers, **SMALL))
    assert raised.value.errno == code
