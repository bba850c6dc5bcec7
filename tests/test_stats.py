"""Promises of nanopack/stats.py: who waited for whom."""

from __future__ import annotations

import sys
import time

import pytest
from faulty import CHATS, SMALL, TOKENIZER, Faulty, ready, wait_until

from nanopack import Loader

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc as on Linux")


def test_a_trainer_that_finds_its_batches_ready_has_not_waited():
    with Loader(CHATS, TOKENIZER, **SMALL) as loader:
        next(loader)
        waited = loader.stats()["waited_for_producer_s"]
        for _ in range(20):
            wait_until(lambda: ready(loader))
            next(loader)
        stats = loader.stats()
    assert stats["waited_for_producer_s"] == waited
    assert (stats["batches"], stats["tokens"], stats["padding"]) == (21, 21 * 8, 0)


def test_a_slow_data_set_is_waited_for():
    with Loader(Faulty("all", lambda: time.sleep(0.02)), TOKENIZER, prefetch=1, **SMALL) as loader:
        for _ in range(20):
            next(loader)
        stats = loader.stats()
    assert 0.2 < stats["waited_for_producer_s"] <= stats["next_s"]
    assert (stats["batches"], stats["tokens"], stats["padding"]) == (20, 160, 0)
