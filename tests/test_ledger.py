"""The ledger balances after every batch, and notices every counter that is off by one."""

from __future__ import annotations

import functools
import itertools

import pytest
from data_sets import PACKINGS, SMALL, data_sets, drawn_arguments
from hypothesis import given
from hypothesis import strategies as st

import nanopack
from nanopack.ledger import Ledger
from nanopack.packing import BestFitCrop

# In the caller's thread: tests/producer/test_process.py shows that a process gives the same batches.
Loader = functools.partial(nanopack.Loader, num_workers=0)


def ledger_of(loader):
    [shard] = loader.state_dict()["lanes"].values()
    return Ledger.of(shard["ledger"])


@pytest.mark.parametrize(
    "counter",
    [
        "conversations_read",
        "conversations_packed",
        "conversations_skipped",
        "conversations_waiting",
        "tokens_read",
        "tokens_emitted",
        "tokens_dropped",
        "tokens_waiting",
        "positions",
        "positions_tokens",
        "positions_padding",
    ],
)
def test_the_ledger_notices_a_counter_that_is_off_by_one(counter):
    loader = Loader([{"text": "abc" * i} for i in range(1, 9)], SMALL, 2, 8, packing=BestFitCrop(window=3))
    next(loader)
    ledger = ledger_of(loader)
    assert ledger.imbalances() == []
    setattr(ledger, counter, getattr(ledger, counter) + 1)
    assert len(ledger.imbalances()) == 1
    assert ledger.report()["balanced"] is False


def test_the_ledger_notices_more_targets_in_the_loss_than_tokens():
    loader = Loader([{"text": "abc"}] * 3, SMALL, 2, 8)
    next(loader)
    ledger = ledger_of(loader)
    ledger.targets_in_loss = ledger.tokens_emitted + 1
    assert len(ledger.imbalances()) == 1


@pytest.mark.parametrize(("counter", "reason"), [("conversations_dropped", "untrained"), ("tokens_cut", "seq_len")])
def test_the_ledger_notices_a_reason_that_is_off_by_one(counter, reason):
    loader = Loader([{"text": "abc"}] * 3, SMALL, 2, 8)
    next(loader)
    ledger = ledger_of(loader)
    getattr(ledger, counter)[reason] += 1
    assert len(ledger.imbalances()) == 1


@given(data=st.data())
def test_the_ledger_balances_after_every_batch(data):
    packing = data.draw(st.sampled_from(PACKINGS))
    loader = Loader(data.draw(data_sets), SMALL, **data.draw(drawn_arguments(packing)))
    try:
        for _ in itertools.islice(loader, 20):
            assert loader.ledger()["balanced"], loader.ledger()["imbalances"]
    except ValueError as error:
        assert "in a whole pass" in str(error)
