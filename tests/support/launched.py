"""Start distributed_run.py, plain or under torchrun, and find every process that comes of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = Path(__file__).parent / "distributed_run.py"


class Run:
    """The training script in a folder, plain or under torchrun, with all processes that come of it."""

    def __init__(self, folder, world_size=None, restarts=0, steps=None):
        self.folder = folder
        self._mark = f"NANOPACK_TEST_RUN={folder}"
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        torchrun += [f"--nproc-per-node={world_size}", f"--max-restarts={restarts}", "--monitor-interval=0.05"]
        command = [sys.executable, *(torchrun if world_size else []), SCRIPT, folder]
        command += [str(steps)] if steps else []
        settings = {"NANOPACK_TEST_RUN": str(folder), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        # else ranks that torchrun restarts find in its store the addresses of those that were killed
        settings["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        self.log = folder / f"log of {world_size or 'no torchrun'}"
        with open(self.log, "ab") as log:
            self.first = subprocess.Popen(command, env={**os.environ, **settings}, stdout=log, stderr=log)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in self.processes():
            kill(pid)
        self.first.wait(5)

    def processes(self):
        """Every process of the run, found by what its environment says: a child's child inherits it."""
        found = set()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if self._mark.encode() in path.read_bytes().split(b"\0"):
                    found.add(int(path.parent.name))
        return found

    def ranks_and_producers(self, both=False):
        """The ranks and their producers: once there is one, with `both` one of each, or the run is over."""
        while True:
            ranks = children(self.first.pid)
            producers = [pid for rank in ranks for pid in self._producer_of(rank)]
            if (producers if both else ranks) or self.first.poll() is not None:
                return ranks, producers
            time.sleep(0.01)

    def _producer_of(self, rank):
        with contextlib.suppress(FileNotFoundError, ValueError):
            return [int((self.folder / f"producer of {rank}").read_text())]
        return []

    def ranks(self, world_size):
        return [int((self.folder / f"pid{rank}").read_text()) for rank in range(world_size)]

    def lines(self):
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / "losses").read_text().splitlines()
        return []

    def wait_for_step(self, step):
        until(200, lambda: self.first.poll() is not None or any(line.startswith(f"{step} ") for line in self.lines()))
        assert self.first.poll() is None, self.log.read_text()


def children(pid):
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def kill(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def until(seconds, is_so):
    late = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < late, f"not so after {seconds} s"
        time.sleep(0.01)
