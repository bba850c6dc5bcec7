"""Promises of iterating: each `for` over a finished loader is a pass over all of its batches, and none comes twice."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import pickle
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from data_sets import SMALL

import nanopack
from nanopack import Loader, reference
from nanopack.verify import first_difference

CHATS = [
    [{"role": "user", "content": f"{i} + {i}?"}, {"role": "assistant", "content": f"{2 * i}. " * (i % 5 + 1)}]
    for i in range(20)
]
FINITE: dict[str, Any] = {"batch_size": 2, "seq_len": 16, "epochs": 1}


def differences(wanted: list[nanopack.Batch], got: list[nanopack.Batch]) -> list[str | None]:
    assert len(wanted) == len(got)
    return [first_difference(*pair) for pair in zip(wanted, got, strict=True)]


def expected(**arguments: Any) -> list[nanopack.Batch]:
    return list(reference.batches(CHATS, SMALL, **FINITE | arguments))


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_every_loop_over_a_finite_loader_is_a_whole_pass_with_the_same_batches(num_workers):
    want = expected(seed=3)
    with Loader(CHATS, SMALL, **FINITE, seed=3, num_workers=num_workers) as loader:
        for _ in range(3):
            assert differences(want, list(loader)) == [None] * len(want)
            assert len(loader) == len(want) == loader.state_dict()["step"] > 4
            assert loader.ledger()["balanced"]


def test_a_loop_left_early_is_resumed_by_the_next_one_and_then_a_new_pass_begins():
    want = expected()
    loader = Loader(CHATS, SMALL, **FINITE)
    for step in range(3):
        assert next(iter(loader)).step == step
    assert differences(want[3:], list(loader)) == [None] * len(want[3:])
    assert differences(want, list(loader)) == [None] * len(want)


def test_a_loop_that_took_exactly_what_was_left_is_followed_by_a_new_pass():
    """Trainers that know the length fetch that many batches, and do not ask for one more."""
    want = expected()
    loader = Loader(CHATS, SMALL, **FINITE)
    for _ in range(3):
        assert differences(want, list(itertools.islice(loader, len(want)))) == [None] * len(want)


def test_an_iterator_gives_one_pass_and_stays_at_its_end():
    want = expected()
    loader = Loader(CHATS, SMALL, **FINITE)
    iterator = iter(loader)
    chunks = []
    while chunk := list(itertools.islice(iterator, 4)):
        chunks += chunk
    assert len(chunks) == len(want) and list(iterator) == []
    following = iter(loader)
    assert next(following).step == 0
    assert list(iterator) == [], "an old iterator takes no batch of the new pass"
    assert next(following).step == 1


def test_next_after_the_end_raises_until_iter_begins_a_new_pass():
    loader = Loader(CHATS, SMALL, **FINITE)
    count = len(list(loader))
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(loader)
        assert loader.state_dict()["step"] == count
    assert next(iter(loader)).step == 0


def test_restart_begins_again_from_any_place():
    want = expected(seed=1)
    loader = Loader(CHATS, SMALL, **FINITE, seed=1)
    for taken in (0, 1, 3, len(want)):
        loader.restart()
        assert differences(want[:taken], list(itertools.islice(loader, taken))) == [None] * taken
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        loader.restart()


def test_an_endless_loader_is_never_rewound_by_iterating():
    loader = Loader(CHATS, SMALL, 2, 16)
    steps = [batch.step for _ in range(3) for batch in itertools.islice(loader, 20)]
    assert steps == list(range(60))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_resumed_run_finishes_its_pass_and_the_next_loop_begins_a_new_one(num_workers):
    want = expected(seed=2)
    first = Loader(CHATS, SMALL, **FINITE, seed=2)
    list(first)
    taken = list(itertools.islice(first, 3))
    with Loader(CHATS, SMALL, **FINITE, seed=2, num_workers=num_workers) as again:
        again.load_state_dict(first.state_dict())
        assert differences(want, taken + list(again)) == [None] * len(want)
        assert differences(want, list(again)) == [None] * len(want)


def test_a_state_of_the_end_is_a_finished_run_and_the_empty_loop_is_reported(caplog):
    loader = Loader(CHATS, SMALL, **FINITE)
    count = len(list(loader))
    again = Loader(CHATS, SMALL, **FINITE)
    again.load_state_dict(loader.state_dict())
    with caplog.at_level(logging.WARNING, "nanopack"):
        assert list(again) == []
    assert "no batch is left" in caplog.text and "restart()" in caplog.text
    assert len(list(again)) == count


def test_a_shuffled_pass_that_is_repeated_is_reported_once(caplog):
    loader = Loader(CHATS, SMALL, **FINITE, seed=2)
    with caplog.at_level(logging.WARNING, "nanopack"):
        for _ in range(3):
            list(loader)
    assert caplog.text.count("in the same order") == 1 and "epochs=" in caplog.text


def test_an_error_is_raised_again_by_every_loop():
    loader = Loader([{"text": "ab"}, {"text": 5}], SMALL, 1, 8, epochs=1)
    for _ in range(2):
        with pytest.raises(nanopack.ConversationError):
            list(loader)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_threads_that_share_an_iterator_take_turns_and_no_batch_is_lost(num_workers):
    chats = [{"text": f"text {i}"} for i in range(400)]
    with Loader(chats, SMALL, 1, 16, packing="pad", loss="all", epochs=1, num_workers=num_workers) as loader:
        iterator, steps, errors = iter(loader), Counter[int](), []

        def take() -> None:
            try:
                steps.update(batch.step for batch in iterator)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=take) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not errors and steps == Counter(range(400))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps], ids=lambda f: f.__name__)
def test_a_loader_cannot_be_copied_and_says_what_to_do_instead(copied: Callable[[Loader], Any]):
    with (
        Loader(CHATS, SMALL, **FINITE) as loader,
        pytest.raises(TypeError, match=r"belongs to its process.*make one there"),
    ):
        copied(loader)


@pytest.mark.parametrize("epochs", [None, 1])
def test_a_torch_data_loader_around_it_is_refused_with_the_remedy(epochs):
    with Loader(CHATS, SMALL, 2, 16, epochs=epochs) as loader:
        around = torch.utils.data.DataLoader(loader, batch_size=None)
        with pytest.raises(TypeError, match=r"not a data set.*iterate over the loader itself"):
            list(around)


@pytest.mark.parametrize("mode", ["default device", "device", "inference"])
@pytest.mark.parametrize("static", [False, True])
def test_a_loader_is_made_and_used_under_any_mode_of_torch(mode, static):
    want = expected(loss_weights="token", extras=("positions", "doc_ids", "cu_seqlens"))
    arguments = FINITE | {"loss_weights": "token", "extras": ("positions", "doc_ids", "cu_seqlens"), "static": static}
    modes: dict[str, Callable[[], Any]] = {
        "default device": contextlib.nullcontext,
        "device": lambda: torch.device("meta"),
        "inference": torch.inference_mode,
    }

    def make():
        if mode == "default device":
            torch.set_default_device("meta")
        with modes[mode]():
            loader = Loader(CHATS, SMALL, **arguments, device="cpu")
            first = next(loader)
            assert not first.inputs.is_inference() and first.inputs.device.type == "cpu"
            assert differences(want[:1], [first]) == [None]
            return loader

    # a default device is that of its thread
    with ThreadPoolExecutor(1) as thread:
        loader = thread.submit(make).result()
    for wanted, got in zip(want[1:], loader, strict=True):
        assert differences([wanted], [got]) == [None]


def test_fake_tensors_are_refused_by_name_and_cost_no_batch():
    from torch._subclasses.fake_tensor import FakeTensorMode

    want = expected()
    loader = Loader(CHATS, SMALL, **FINITE)
    refused = pytest.raises(RuntimeError, match=r"outside of FakeTensorMode; .*mode\.from_tensor\(batch\.inputs\)")
    with FakeTensorMode() as mode:
        with refused:
            next(loader)
        with refused:
            Loader(CHATS, SMALL, **FINITE)
    batches = list(loader)
    assert differences(want, batches) == [None] * len(want)
    assert mode.from_tensor(batches[0].inputs).shape == batches[0].inputs.shape
