"""What a signal handler of the trainer's raises reaches the trainer, whatever the loader does at that moment."""

from __future__ import annotations

import contextlib
import functools
import signal
import sys
import time

import pytest
from faulty import CHATS, SMALL, TOKENIZER

from nanopack import Loader

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="timers as on Unix")

ERRORS = [RuntimeError("preempted"), TimeoutError("the step takes too long"), SystemExit(3), ValueError("stop")]


class Slow:
    """A data set that sleeps in each read, and perhaps wraps what interrupts it in an error of its own."""

    def __init__(self, wraps=False):
        self.wraps = wraps

    def __len__(self):
        return len(CHATS)

    def __getitem__(self, index):
        try:
            time.sleep(0.01)
        except Exception as error:
            if self.wraps:
                raise LookupError(f"record {index}") from error
            raise
        return CHATS[index]


class Handler:
    """A handler that raises; as an object, a method or a function, as programs have them."""

    def __init__(self, error):
        self.error = error

    def __call__(self, number, frame):
        raise self.error

    def method(self, number, frame):
        self(number, frame)


KINDS = {
    "object": Handler,
    "method": lambda error: Handler(error).method,
    "partial": lambda error: functools.partial(lambda handler, *_: handler(*_), Handler(error)),
}


@contextlib.contextmanager
def timer(handler, seconds=0.15):
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def taken_until(error, loader):
    """How many batches come before that very error."""
    taken = 0
    with pytest.raises(type(error)) as raised:
        while taken < 1000:
            next(loader)
            taken += 1
    assert raised.value is error
    return taken


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_what_a_handler_raises_while_the_trainer_reads_reaches_it_and_is_no_bad_conversation(error, on_error, kind):
    for data in (Slow(), Slow(wraps=True)):
        with Loader(data, TOKENIZER, num_workers=0, on_error=on_error, **SMALL) as loader, timer(KINDS[kind](error)):
            taken = taken_until(error, loader)
            assert loader.state_dict()["step"] == taken and loader.ledger()["conversations"]["skipped"] == 0
            # the row that was being filled is gone
            with pytest.raises(RuntimeError, match="interrupted in the middle of a batch; make a new one"):
                next(loader)


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_what_a_handler_raises_while_the_trainer_tokenizes_reaches_it(error, monkeypatch):
    with Loader(CHATS, TOKENIZER, num_workers=0, **SMALL) as loader:
        fill_in = loader._run.reader.render.fill_in

        def slowly(plans):
            time.sleep(0.05)
            return fill_in(plans)

        monkeypatch.setattr(loader._run.reader.render, "fill_in", slowly)
        with timer(Handler(error)):
            taken_until(error, loader)


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_what_a_handler_raises_while_the_trainer_waits_reaches_it_and_no_batch_is_lost(error):
    with Loader(Slow(), TOKENIZER, num_workers=0, **SMALL) as loader:
        expected = [next(loader).inputs.tolist() for _ in range(20)]
    with Loader(Slow(), TOKENIZER, num_workers=1, prefetch=1, **SMALL) as loader, timer(Handler(error), 0.05):
        got = []
        with pytest.raises(type(error)) as raised:
            while True:
                got.append(next(loader).inputs.tolist())
        assert raised.value is error
        while len(got) < len(expected):
            got.append(next(loader).inputs.tolist())
        assert got == expected


def test_a_handler_s_exception_that_the_program_has_caught_is_not_taken_for_a_later_error():
    bad = [*CHATS[:20], {"text": 5}]
    with Loader(bad, TOKENIZER, num_workers=0, **SMALL) as loader:
        try:
            with timer(Handler(RuntimeError("preempted")), 0.01):
                time.sleep(1)
        except RuntimeError:
            # within the block it is the context of whatever is raised
            with pytest.raises(ValueError, match="conversation 20"):
                while True:
                    next(loader)
