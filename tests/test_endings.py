"""How a loader ends: by an error, an interrupt, the end of the data, close."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
from data_sets import SMALL

import nanopack
from nanopack import ConversationError

# In the caller's thread: tests/producer/test_process.py shows that a process gives the same batches.
Loader = functools.partial(nanopack.Loader, num_workers=0)


def test_after_an_error_the_loader_does_not_go_on_as_if_nothing_were_lost():
    loader = Loader([{"text": "ab"}, {"text": 3}, {"text": "cd"}], SMALL, 1, 8, packing="pad")
    next(loader)
    for _ in range(2):
        with pytest.raises(ConversationError, match="conversation 1"):
            next(loader)


def test_an_interrupted_batch_is_not_continued_in_silence(monkeypatch):
    class Slow(list):
        interrupted = False

        def __getitem__(self, index):
            if self.interrupted:
                raise KeyboardInterrupt
            return {"text": "a"}

    data = Slow([{}])
    loader = Loader(data, SMALL, 1, 8)
    data.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        next(loader)
    with pytest.raises(RuntimeError, match="interrupted"):
        next(loader)


def interrupt() -> None:
    raise KeyboardInterrupt


def memory_is_short() -> None:
    raise MemoryError("for this copy")


def failing_ahead(loader: nanopack.Loader, monkeypatch: pytest.MonkeyPatch, fail: Callable[[], None]) -> None:
    """Let the copy of the second batch fail, which comes ahead, in the call for the first."""
    get, submit, submitted = loader._run.feed.get, loader._run.upload.submit, []

    def failing(slot: int, used_bytes: int) -> None:
        submitted.append(slot)
        if len(submitted) == 2:
            fail()
        submit(slot, used_bytes)

    # whatever the pace, what comes ahead is there
    monkeypatch.setattr(loader._run.feed, "get", lambda *, wait: get(wait=True))
    monkeypatch.setattr(loader._run.upload, "submit", failing)


def test_a_batch_that_an_interrupt_kept_back_does_not_count_as_delivered_and_none_after_it_comes(monkeypatch):
    with nanopack.Loader([{"text": "ab"}] * 9, SMALL, 1, 8, packing="pad", num_workers=1) as loader:
        before = loader.state_dict()
        failing_ahead(loader, monkeypatch, interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(loader)
        assert loader.state_dict() == before
        for _ in range(2):
            with pytest.raises(RuntimeError, match="interrupted in the middle of a batch; make a new one"):
                next(loader)
        loader.load_state_dict(before)
        assert next(loader).step == 0


def test_a_copy_ahead_that_fails_is_raised_after_the_batches_before_it(monkeypatch):
    with nanopack.Loader([{"text": "ab"}] * 9, SMALL, 1, 8, packing="pad", num_workers=1) as loader:
        failing_ahead(loader, monkeypatch, memory_is_short)
        assert next(loader).step == 0
        for _ in range(2):
            with pytest.raises(MemoryError, match="for this copy"):
                next(loader)
        assert loader.state_dict()["step"] == 1


def test_the_end_stays_the_end_and_closing_twice_is_safe():
    loader = Loader([{"text": "ab"}], SMALL, 1, 8, epochs=1)
    assert len(list(loader)) == 1
    with pytest.raises(StopIteration):
        next(loader)
    loader.close()
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def test_leaving_the_block_closes_the_loader_and_keeps_the_batches():
    with Loader([{"text": "ab"}], SMALL, 1, 8) as loader:
        batch = next(loader)
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)
    assert batch.inputs[0, :3].tolist() == [256, 97, 98]
