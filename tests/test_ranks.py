"""A loader knows its rank, is warned of ranks that it does not know, and works in the workers of a DataLoader."""

from __future__ import annotations

import functools
import gc
import logging

import pytest
import torch
from data_sets import SMALL
from torch.testing._internal.distributed.fake_pg import FakeStore

import nanopack
from nanopack.distributed import LAUNCHERS

# In the caller's thread: tests/producer/test_process.py shows that a process gives the same batches.
Loader = functools.partial(nanopack.Loader, num_workers=0)


def test_rank_and_world_size_come_from_torch_distributed_where_it_is_initialised(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        loader = Loader([{"text": "ab"}], SMALL, 1, 8)
        assert (loader.config.rank, loader.config.world_size) == (0, 1)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("count", ["", "1", "4"])
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_of_several_processes_without_torch_distributed_is_warned_of(monkeypatch, caplog, name, count):
    monkeypatch.setenv(name, count)
    with caplog.at_level(logging.WARNING, "nanopack"):
        Loader([{"text": "ab"}], SMALL, 1, 8, rank=0, world_size=1)
        assert not caplog.text
        Loader([{"text": "ab"}], SMALL, 1, 8)
    assert (f"{name}=4 is set" in caplog.text and "rank 0 of 1" in caplog.text) == (count == "4")


@pytest.mark.parametrize(("given", "ranks"), [({}, 1), ({}, 2), ({"rank": 0, "world_size": 1}, 2)])
def test_a_loader_without_a_rank_is_refused_once_there_are_ranks(given, ranks):
    loader = Loader([{"text": "ab"}], SMALL, 1, 8, num_workers=0, **given)
    next(loader)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        if given or ranks == 1:
            next(loader)
            return
        for take in (next, lambda loader: next(iter(loader))):
            with pytest.raises(RuntimeError, match=r"2 ranks.*after this loader was made.*after init_process_group"):
                take(loader)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("rank", "world_size"), [(1, 2), (0, 3), (1, 3)])
def test_a_loader_is_refused_once_its_process_is_another_rank_and_works_without_a_group(rank, world_size):
    def join(rank, world_size):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)

    join(1, 3)
    try:
        loader = Loader([{"text": "ab"}] * 9, SMALL, 1, 8)
        next(loader)
        torch.distributed.destroy_process_group()
        next(loader)
        join(rank, world_size)
        if (rank, world_size) == (1, 3):
            next(loader)
            return
        with pytest.raises(RuntimeError, match=f"{world_size} ranks, and this is rank {rank}, .* rank 1 of 3"):
            next(loader)
    finally:
        torch.distributed.destroy_process_group()


class InEachWorker(torch.utils.data.IterableDataset):
    """Batches of a loader that is made in each worker of a DataLoader, with a rank or without."""

    def __init__(self, ranked):
        self.ranked = ranked

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        ranks = {"rank": worker.id, "world_size": worker.num_workers} if self.ranked else {}
        data = [{"text": chr(97 + k) * 7} for k in range(8)]
        with Loader(data, SMALL, 1, 8, loss="all", packing="pad", epochs=1, num_workers=0, **ranks) as loader:
            for batch in loader:
                yield int(batch.inputs[0, 1])


@pytest.mark.parametrize(("workers", "ranked"), [(1, False), (2, True)])
def test_workers_of_a_dataloader_deliver_each_conversation_once(workers, ranked):
    got = torch.utils.data.DataLoader(InEachWorker(ranked), batch_size=None, num_workers=workers)
    assert sorted(token for token in got if chr(token) in "abcdefgh") == list(range(97, 105))


def test_several_workers_of_a_dataloader_without_a_rank_are_refused(monkeypatch):
    # how long it waits for each of its workers to end by itself
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    with pytest.raises(ValueError, match=r"rank=get_worker_info\(\).id, world_size=2"):
        list(torch.utils.data.DataLoader(InEachWorker(ranked=False), batch_size=None, num_workers=2))
    # ends its workers; a producer that is forked while they run would wait for them, 5 s each
    gc.collect()
