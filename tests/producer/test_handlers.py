"""What a signal handler of the trainer's raises reaches the trainer, whatever the loader does at that moment."""

from __future__ import annotations

import contextlib
import functools
import itertools
import signal
import sys
import time

import pytest
from faulty import CHATS, SMALL, TOKENIZER

from nanopack import Loader

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="timers as on Unix")

ERRORS = [RuntimeError("preempted"), TimeoutError("the step takes too long"), SystemExit(3), ValueError("stop")]


class Interrupted:
    """A data set within whose read of record 20 a signal arrives, and which perhaps wraps what its handler raises."""

    def __init__(self, wraps=False):
        self.wraps = wraps

    def __len__(self):
        return len(CHATS)

    def __getitem__(self, index):
        try:
            if index == 20:
                signal.raise_signal(signal.SIGALRM)
        except Exception as error:
            if self.wraps:
                raise LookupError(f"record {index}") from error
            raise
        return CHATS[index]


class Paused:
    """A data set that takes long to give record 20."""

    def __len__(self):
        return len(CHATS)

    def __getitem__(self, index):
        if index == 20:
            time.sleep(0.6)
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
def handled_by(handler):
    before = signal.signal(signal.SIGALRM, handler)
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


@pytest.mark.parametrize(
    "error, on_error, kind",
    [
        (ERRORS[0], "raise", "object"),
        (ERRORS[0], "skip", "method"),
        (ERRORS[1], "skip", "partial"),
        (ERRORS[2], "raise", "method"),
        (ERRORS[3], "skip", "object"),
        (ERRORS[3], "raise", "partial"),
    ],
    ids=repr,
)
def test_what_a_handler_raises_while_the_trainer_reads_reaches_it_and_is_no_bad_conversation(error, on_error, kind):
    for data in (Interrupted(), Interrupted(wraps=True)):
        with (
            Loader(data, TOKENIZER, num_workers=0, on_error=on_error, **SMALL) as loader,
            handled_by(KINDS[kind](error)),
        ):
            taken = taken_until(error, loader)
            assert loader.state_dict()["step"] == taken and loader.ledger()["conversations"]["skipped"] == 0
            # the row that was being filled is gone
            with pytest.raises(RuntimeError, match="interrupted in the middle of a batch; make a new one"):
                next(loader)


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_what_a_handler_raises_while_the_trainer_tokenizes_reaches_it(error, monkeypatch):
    with Loader(CHATS, TOKENIZER, num_workers=0, **SMALL) as loader:
        encode, texts = loader.tokenizer._faster, itertools.count()

        def interrupted(text, special):
            if next(texts) == 50:
                signal.raise_signal(signal.SIGALRM)
            return encode(text, special)

        # a ValueError there might be a text that tiktoken refuses
        monkeypatch.setattr(loader.tokenizer, "_faster", interrupted)
        with handled_by(Handler(error)):
            taken_until(error, loader)


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_what_a_handler_raises_while_the_trainer_waits_reaches_it_and_no_batch_is_lost(error):
    with Loader(CHATS, TOKENIZER, num_workers=0, **SMALL) as loader:
        expected = [next(loader).inputs.tolist() for _ in range(60)]
    with (
        Loader(Paused(), TOKENIZER, num_workers=1, prefetch=1, **SMALL) as loader,
        handled_by(Handler(error)),
    ):
        got = [next(loader).inputs.tolist()]
        signal.setitimer(signal.ITIMER_REAL, 0.3)
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
            with handled_by(Handler(RuntimeError("preempted"))):
                signal.raise_signal(signal.SIGALRM)
        except RuntimeError:
            # within the block it is the context of whatever is raised
            with pytest.raises(ValueError, match="conversation 20"):
                while True:
                    next(loader)
