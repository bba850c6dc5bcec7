"""Whatever a data set or a tokenizer raises in the producer becomes a named error after the batches before it."""

from __future__ import annotations

import itertools
import logging
import os
import resource
import sys
from pathlib import Path

import pytest
from faulty import CHATS, FAULTS, SMALL, TOKENIZER, Busy, Faulty, Hard, expected, is_gone, raising, within

import nanopack
from nanopack import ConversationError, Loader, StorageError, reference
from nanopack.errors import ProducerError
from nanopack.tokenizers.tokenizer import Tokenizer
from nanopack.verify import compare

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc as on Linux")


def batches_until_error(loader):
    batches = []
    try:
        for batch in loader:
            batches.append(batch)
    except Exception as error:
        return batches, error
    return batches, None


# A spawned process takes seconds to start.
SPAWNED = [pytest.param(*case, marks=pytest.mark.slow) for case in itertools.product(FAULTS, [1, 2], ["spawn"])]
SPAWNED[0] = pytest.param("an exception", 1, "spawn")


@pytest.mark.parametrize(("fault", "workers", "method"), [*itertools.product(FAULTS, [1, 2], [None]), *SPAWNED])
def test_a_fault_is_named_after_the_batches_before_it(fault, workers, method):
    do, kind, message = FAULTS[fault]
    with within(100 if method else 20):
        loader = Loader(Faulty(20, do), TOKENIZER, num_workers=workers, epochs=1, start_method=method, **SMALL)
        batches, error = batches_until_error(loader)
        assert type(error) is kind
        assert error.__cause__ is None or "Traceback" in str(error.__cause__) or "EOF" in repr(error.__cause__)
        with pytest.raises(kind, match=message):
            next(loader)
    expected = list(reference.batches(CHATS, TOKENIZER, epochs=1, **SMALL))[: len(batches)]
    assert compare(iter(expected), iter(batches)).difference is None
    # a killed process loses what it had not sent; what raises comes after all batches before it
    if workers == 1 and not fault.startswith("SIG") and "exit" not in fault:
        assert len(batches) == len(expected) >= 20
    assert is_gone(loader.producer_pid)
    loader.close()


class Untellable(Exception):
    def __str__(self):
        raise RuntimeError("no words")


class UntellableHard(BaseException):
    def __str__(self):
        raise RuntimeError("no words")


class Changeling(MemoryError):
    """Unpickles as something other than an exception."""

    def __reduce__(self):
        return dict, ()


class Stillborn(MemoryError):
    """Pickles but does not unpickle."""

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
        # from a pipe these end the process; from a data set they must not
        (BrokenPipeError("theirs"), StorageError, "BrokenPipeError: theirs"),
        (EOFError("theirs"), StorageError, "EOFError: theirs"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_error_that_hardly_pickles_or_prints_still_arrives(error, kind, message):
    with Loader(Faulty(20, raising(error)), TOKENIZER, **SMALL) as loader, within(20):
        got = []
        with pytest.raises(kind, match=message) as raised:
            for batch in loader:
                got.append(batch)
        assert raised.type is kind and "Traceback" in str(raised.value.__cause__)
    assert len(got) >= 20 and compare(expected(len(got)), iter(got)).difference is None


def test_a_panic_of_the_tokenizer_is_an_error_like_others(monkeypatch):
    def panic(self, texts):
        raise Hard("tokenizer")

    monkeypatch.setattr(Tokenizer, "encode_batch", panic)
    with within(20), pytest.raises(ProducerError, match="stopped by Hard: tokenizer"):
        next(Loader(CHATS, TOKENIZER, **SMALL))


def test_a_tokenizer_that_raises_is_reported_as_a_bad_conversation(monkeypatch):
    encode = Tokenizer.encode_batch

    def picky(self, texts):
        if any(isinstance(text, str) and text.endswith(" 7") for text in texts):
            raise ValueError("will not")
        return encode(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", picky)
    with Loader(CHATS, TOKENIZER, **SMALL) as loader, within(20):
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
    with Loader(Faulty(20, hog), TOKENIZER, num_workers=workers, **SMALL) as loader, within(20):
        with pytest.raises(MemoryError):
            for _ in loader:
                pass
        assert loader.stats()["batches"] >= 20 or workers > 1


def test_the_error_is_part_of_the_public_face():
    assert nanopack.ProducerError is ProducerError


def test_what_the_producer_logs_arrives_in_the_trainers_handlers(caplog):
    with caplog.at_level(logging.WARNING, "nanopack"):
        list(Loader([*CHATS[:3], {"text": 1}], TOKENIZER, epochs=1, on_error="skip", **SMALL))
    assert "skipped 1 bad conversation: 1 like conversation 3" in caplog.text


@pytest.mark.parametrize(
    ("workers", "method"), [(1, "fork"), (2, "fork"), pytest.param(2, "spawn", marks=pytest.mark.slow)]
)
def test_what_a_worker_logs_arrives_in_the_trainers_handlers(caplog, workers, method):
    with within(60), Loader(Busy(), TOKENIZER, epochs=1, num_workers=workers, start_method=method, **SMALL) as loader:
        assert list(iter(loader))
    assert caplog.text.count("conversation 20, ConnectionResetError: busy; trying again") == 1


def test_what_a_worker_that_counts_logs_arrives_in_the_trainers_handlers(caplog):
    with within(20), Loader(Busy(), TOKENIZER, epochs=1, num_workers=2, prefetch=1, **SMALL) as loader:
        assert len(loader)
    assert "conversation 20, ConnectionResetError: busy; trying again" in caplog.text
