"""How many batches there will be: counted once, by as many processes as tokenize, and before a rank needs it."""

from __future__ import annotations

import itertools
import json
import logging
import os
import time

import pytest
from data_sets import SMALL
from faulty import once, wait_until, within

import nanopack
from nanopack import Loader
from nanopack.conversations import announced
from nanopack.producer import counting

TEXTS = [{"text": "a" * (k % 23)} for k in range(400)]
ARGUMENTS = {"batch_size": 2, "seq_len": 32, "epochs": 2, "seed": 1}


class Noted(list):
    """Texts, of which it is noted which process reads them."""

    def __init__(self, records, path, delay=0.0):
        super().__init__(records)
        self.path, self.delay = path, delay

    def __getitem__(self, index):
        time.sleep(self.delay)
        with open(self.path, "a") as file:
            file.write(f"{os.getpid()} {index}\n")
        return super().__getitem__(index)

    def readers(self):
        return [int(line.split()[0]) for line in self.path.read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_the_length_is_exact_however_many_processes_count(workers):
    with within(30), Loader(TEXTS, SMALL, num_workers=workers, **ARGUMENTS) as loader:
        assert len(loader) == len(list(iter(loader)))


@pytest.mark.parametrize("workers", [1, 3])
def test_the_length_is_counted_by_as_many_processes_as_tokenize_and_not_by_the_trainer(tmp_path, workers):
    data = Noted(TEXTS, tmp_path / "readers")
    with within(30), Loader(data, SMALL, num_workers=workers, prefetch=1, **ARGUMENTS) as loader:
        next(loader)
        before = set(data.readers())
        assert len(loader) > 10
        assert len(set(data.readers()) - before) == workers
        # the sample of the fingerprint, before there was another process
        assert data.readers().count(os.getpid()) == 16


def test_a_long_count_is_announced_with_the_remedy(monkeypatch, caplog):
    monkeypatch.setattr(announced, "PATIENCE", 1e-6)
    with Loader(TEXTS, SMALL, num_workers=0, **ARGUMENTS) as loader, caplog.at_level(logging.WARNING):
        assert len(loader) and len(loader)
    assert "counting the batches: 1 of 400 conversations" in caplog.messages[0] and "iter(loader)" in caplog.messages[0]
    assert len(caplog.messages) < 40


def test_a_finished_pass_and_a_state_that_knows_the_length_are_not_counted_again(monkeypatch):
    with Loader(TEXTS, SMALL, num_workers=0, **ARGUMENTS) as loader:
        next(loader)
        length = len(loader)
        state = json.loads(json.dumps(loader.state_dict()))
    monkeypatch.setattr("nanopack.run.count_batches", None)
    with Loader(TEXTS, SMALL, num_workers=0, **ARGUMENTS) as loader:
        assert len(list(iter(loader))) == len(loader) == length
    with Loader(TEXTS, SMALL, num_workers=0, **ARGUMENTS) as loader:
        loader.load_state_dict(state)
        assert len(loader) == length == state["batches"]
    assert nanopack.merge_states([state])["batches"] == length


def test_the_length_in_the_state_of_other_arguments_is_not_believed():
    with Loader(TEXTS, SMALL, num_workers=0, **ARGUMENTS) as loader:
        assert len(loader)
        state = loader.state_dict()
    with Loader(TEXTS, SMALL, num_workers=0, **(ARGUMENTS | {"epochs": 4})) as loader:
        loader.load_state_dict(state, strict=False)
        assert len(loader) == len(list(itertools.chain(iter(loader)))) > state["batches"]


def test_the_length_is_that_of_a_whole_pass_after_one_that_began_with_other_arguments():
    with Loader(TEXTS, SMALL, num_workers=0, **ARGUMENTS) as loader:
        state = [(next(loader), loader.state_dict()) for _ in range(20)][-1][1]
    with Loader(TEXTS, SMALL, num_workers=0, **(ARGUMENTS | {"batch_size": 4})) as loader:
        loader.load_state_dict(state, strict=False)
        assert 20 + len(list(loader)) > len(loader) == len(list(iter(loader)))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_rank_without_a_process_group_counts_all_ranks_while_it_is_idle(tmp_path, workers):
    data = Noted(TEXTS, tmp_path / "readers", delay=0.001)
    shard = {"rank": 0, "world_size": 2, "num_workers": workers, "prefetch": 1}
    with within(60), Loader(data, SMALL, **shard, **ARGUMENTS) as loader:
        next(loader)
        # two passes of its own half, once all of the data, and the sample
        wait_until(lambda: len(data.readers()) >= len(TEXTS) + 16, 30)
        list(iter(loader))
        assert len(data.readers()) <= 2 * len(TEXTS) + 16 + 32 * workers


def test_a_count_that_was_waited_for_is_not_continued():
    def begin():
        yield
        yield
        return 7, 30

    count = counting.BackgroundCount(begin)
    assert count.advance()
    assert count.wait() == 7
    assert not count.advance() and count.wait() == 7


def test_a_producer_that_counts_says_so(caplog, monkeypatch, tmp_path):
    trainer, said = os.getpid(), tmp_path / "said"

    class Slow(list):
        def __getitem__(self, index):
            if index % 2 and os.getpid() != trainer:
                wait_until(said.exists)
            return super().__getitem__(index)

    monkeypatch.setattr("nanopack.producer.process.STALL", 0.1)
    once(lambda: "counting the batches of all ranks" in caplog.text, said.touch)
    arguments = {"rank": 0, "world_size": 2, "epochs": 1, "seq_len": 64}
    with within(60), caplog.at_level(logging.WARNING), Loader(Slow(TEXTS[:200]), SMALL, **arguments) as loader:
        list(iter(loader))
    assert any("counting the batches of all ranks" in line and "process_group" in line for line in caplog.messages)
