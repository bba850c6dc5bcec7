"""Scripts in processes of their own that start at once: forked from one that has imported nanopack, and nothing more.

    path, arguments -> start -> Script: pid, stdout, communicate(), wait(), kill()
                       run   -> returncode, stdout, stderr

To import torch takes two seconds of a core, for each script. The process that is forked has one thread and has made no
loader. What a fork cannot show, an interpreter's start and the import, is left to tests/test_readme.py,
tests/test_wheel.py and tests/cli/test_main.py.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
import warnings
from pathlib import Path


class Script:
    """As subprocess.Popen is, with text, in a session of its own; what it wrote to stderr is read at its end."""

    def __init__(self, answers: socket.socket, stdout, stderr) -> None:
        self._answers, self.stdout, self._stderr = answers, stdout, stderr
        self.pid = int(answers.recv(100))
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._answers.settimeout(timeout)
            try:
                self.returncode = os.waitstatus_to_exitcode(int(self._answers.recv(100)))
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(f"the script of pid {self.pid}", timeout) from None
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """The rest of stdout, once no process can write to it, and all of stderr."""
        late = threading.Event()
        timer = threading.Timer(timeout, lambda: (late.set(), self.kill_group()))
        timer.start()
        out = self.stdout.read()
        self.wait()
        timer.cancel()
        self._stderr.seek(0)
        err = self._stderr.read()
        if late.is_set():
            raise subprocess.TimeoutExpired(f"the script of pid {self.pid}", timeout, out, err)
        return out, err

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill_group(self) -> None:
        """Also what the script started and left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def start(path, *arguments, cwd=None, stdin=subprocess.DEVNULL, stdout=None, stderr=None, **environment) -> Script:
    """Run a script.

    stdin, stdout, stderr: file descriptors or subprocess.DEVNULL; else what it writes is kept for Script.
    environment: changes to this process's; None removes a variable.
    """
    answers, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    read, write = os.pipe()
    written = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (Script reads it)
    variables = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    what = [[str(path), *map(str, arguments)], str(cwd or Path.cwd()), variables]
    with open(os.devnull, "r+b") as null:
        given = {None: write, subprocess.DEVNULL: null.fileno()}
        stderr = written.fileno() if stderr is None else stderr
        streams = [given.get(stream, stream) for stream in (stdin, stdout, stderr)]
        socket.send_fds(_origin(), [json.dumps(what).encode()], [theirs.fileno(), *streams])
    theirs.close()
    os.close(write)
    return Script(answers, open(read, encoding="utf-8"), written)


def run(path, *arguments, timeout: float = 200, **options) -> subprocess.CompletedProcess[str]:
    """Run a script to its end, as subprocess.run does; the options are those of `start`."""
    script = start(path, *arguments, **options)
    try:
        out, err = script.communicate(timeout)
    finally:
        script.kill_group()
    return subprocess.CompletedProcess([path, *arguments], script.returncode, out, err)


@functools.cache
def _origin() -> socket.socket:
    """Start the process to fork; it ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, __file__, str(theirs.fileno())]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True)
    theirs.close()
    # not close: a process that was forked from this one has the socket too
    atexit.register(lambda: (ours.shutdown(socket.SHUT_RDWR), process.wait()))
    return ours


def _asked(requests: socket.socket):
    """Fork for each request; return in the script's process, with its arguments."""
    while True:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        request, fds, *_ = socket.recv_fds(requests, 1 << 20, 4)
        if not request:
            os._exit(0)
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if (pid := os.fork()) == 0:
                return _become(fds, *json.loads(request))
            _report(pid, fds)
        for fd in fds:
            os.close(fd)


def _report(pid: int, fds: list[int]):
    """Say what the script's id is, and how it ended."""
    for fd in (0, 1, 2, *fds[1:]):
        os.close(fd)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    answers = socket.socket(fileno=fds[0])
    try:
        answers.send(str(pid).encode())
        answers.send(str(os.waitpid(pid, 0)[1]).encode())
    finally:
        os._exit(0)


def _become(fds: list[int], arguments: list[str], cwd: str, environment: dict[str, str]) -> list[str]:
    os.setsid()
    for number, fd in enumerate(fds[1:]):
        os.dup2(fd, number)
    for fd in fds:
        os.close(fd)
    # the objects of before know whether a stream is a terminal, and whether it can seek
    sys.stdin = sys.__stdin__ = os.fdopen(0, closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if shown := environment.get("PYTHONWARNINGS"):
        warnings.simplefilter(shown)
    return arguments


if __name__ == "__main__":
    import nanopack  # noqa: F401 (what all scripts import)

    sys.argv = _asked(socket.socket(fileno=int(sys.argv[1])))
    sys.path[0] = str(Path(sys.argv[0]).parent)
    # no function that returns before the end: what the script leaves open ends with the interpreter
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.modules["__main__"].__file__ = sys.argv[0]
    exec(compile(Path(sys.argv[0]).read_bytes(), sys.argv[0], "exec"), vars(sys.modules["__main__"]))
