"""A torchrun run is killed again and again, wherever it is: resumed, it has the losses of a run that was not."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from distributed_run import SAVE_EVERY
from launched import Run, until

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc"),
    pytest.mark.trainers,
]
SEED = 0 if "CI" in os.environ else random.randrange(10_000)
STEPS = 240
VICTIMS = ("a rank", "all ranks", "a producer", "torchrun")


@pytest.mark.parametrize("times", [1, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_at_random_moments_a_torchrun_run_has_the_losses_and_weights_of_one_that_was_not(times, tmp_path):
    print(f"SEED = {SEED}")
    moments = random.Random(SEED)
    strikes = [*itertools.product((signal.SIGTERM, signal.SIGKILL), itertools.islice(itertools.cycle(VICTIMS), times))]
    moments.shuffle(strikes)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, weights = finished(tmp_path / "whole")
    folder = tmp_path / "killed"
    while strikes:
        with Run(folder, world_size=2, restarts=len(strikes), steps=STEPS) as run:
            while strikes and waited_for_a_moment(run, moments):
                strike(run, *strikes.pop(), moments)
        if run.first.returncode == 0:
            begin_again(folder, weights)
    lines, ended_with = finished(folder)
    assert {line for line in lines if not line.startswith("from")} == set(whole[1:]) and len(whole) == 1 + STEPS
    assert_resumed_from_the_last_checkpoint(lines)
    assert_same(ended_with, weights)


def finished(folder):
    """Run to the end, from where the run before was; return all lines and the weights."""
    with Run(folder, world_size=2, steps=STEPS) as run:
        assert run.first.wait(300) == 0, run.log.read_text()
        return run.lines(), torch.load(folder / "weights")


def begin_again(folder, weights):
    """After a run that ended before it was killed."""
    assert_same(torch.load(folder / "weights"), weights)
    (folder / "checkpoint").unlink()


def assert_same(got, weights):
    for name, expected in weights.items():
        assert torch.equal(got[name], expected), name


def assert_resumed_from_the_last_checkpoint(lines):
    last = -1
    for line in lines:
        if line.startswith("from"):
            start = int(line.split()[1])
            assert start in (0, STEPS) or last - SAVE_EVERY < start <= last + 1
            assert start or last < SAVE_EVERY or last == STEPS - 1
        else:
            last = int(line.split()[0])


def waited_for_a_moment(run, moments):
    """Wait for a moment of the training, or now and then of its start; return whether the run has not ended."""
    begun = len(run.lines())
    if moments.random() < 0.8:
        until(200, lambda: run.first.poll() is not None or len(run.lines()) > begun)
    time.sleep(moments.uniform(0, 2))
    return run.first.poll() is None


def strike(run, number, victim, moments):
    """Send the signal to the victim; await the end of the processes that should end, and that nothing is left."""
    # torchrun forgets a rank that it is just starting when SIGTERM comes
    ranks, producers = run.ranks_and_producers(both=victim in ("a producer", "torchrun"))
    before, shared, come = run.processes() - {run.first.pid}, in_shared_memory(), len(run.lines())
    struck = {
        "a rank": moments.sample(ranks, min(1, len(ranks))),
        "all ranks": ranks,
        "a producer": moments.sample(producers, min(1, len(producers))),
        # SIGKILL to it alone leaves the ranks to themselves
        "torchrun": [run.first.pid, *(ranks if number == signal.SIGKILL else [])],
    }[victim]
    for pid in struck:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    print(f"{number.name} to {victim}, {len(ranks)} ranks, {len(producers)} producers, after {run.lines()[-1:]}")
    if victim == "a producer" and number == signal.SIGTERM:
        # when a run ends is for its trainer to say
        until(200, lambda: len(run.lines()) > come + 3 or run.first.poll() == 0)
        assert run.first.poll() == 0 or struck[0] in run.processes()
        return
    if victim == "torchrun":
        run.first.wait(200)
    until(200, lambda: not before & run.processes())
    until(60, lambda: in_shared_memory() <= shared)


def in_shared_memory():
    """Shared memory and semaphores of all processes: those of others come and go."""
    system_v = [Path(f"/proc/sysvipc/{kind}").read_text().splitlines() for kind in ("shm", "sem")]
    return {*os.listdir("/dev/shm"), *(line.split()[1] for line in itertools.chain(*system_v))}
