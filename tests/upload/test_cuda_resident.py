"""A loader whose words are on a CUDA device, and its graph batches, compared with a loader on the CPU."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from stores import store_of

from nanopack import Loader, mixture
from nanopack.upload.device import Cuda
from nanopack.verify import compare, first_difference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"{i} + 1?"},
            {"role": "assistant", "content": f"{i + 1}." * (i % 7 + 1)},
        ],
        "weight": (1, 0.5, 2)[i % 3],
    }
    for i in range(300)
]
ARGUMENTS = dict(batch_size=4, seq_len=128, seed=1, loss_weights="token", extras=("positions", "doc_ids", "cu_seqlens"))
TENSORS = ("inputs", "targets", "weights", *ARGUMENTS["extras"])
each_executor = pytest.mark.parametrize("executor", ["triton", "torch"])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return store_of(tmp_path_factory.mktemp("cuda") / "store", CHATS, "chat32k", shard_documents=70)


def make(data, **arguments):
    return Loader(data, None, **{"device": "cuda", "resident": True, **ARGUMENTS, **arguments})


def expected(data, count, **arguments):
    with make(data, device="cpu", resident=False, num_workers=0, **arguments) as loader:
        return [copy_of(batch) for batch in itertools.islice(loader, count)]


def copy_of(batch):
    """The batch with tensors of its own, copied on the current stream."""
    tensors = {name: getattr(batch, name).clone() for name in TENSORS if getattr(batch, name) is not None}
    return dataclasses.replace(batch, **tensors)


@each_executor
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_those_of_the_cpu(store, executor, static, workers):
    with make(store, executor=executor, static=static, num_workers=workers) as loader:
        got = [copy_of(batch) if static or k % 2 else batch for k, batch in enumerate(itertools.islice(loader, 40))]
    assert compare(iter(expected(store, 40)), iter(got)).difference is None


def test_words_may_stay_in_pinned_host_memory(store):
    with make(store, resident="host") as loader:
        got = list(itertools.islice(loader, 20))
    assert compare(iter(expected(store, 20)), iter(got)).difference is None
    with pytest.raises(ValueError, match="needs executor='triton'"):
        make(store, resident="host", executor="torch")


@each_executor
def test_marks_and_a_mixture_and_any_loss(store, executor, tmp_path):
    light = [{**chat, "weight": k % 2} for k, chat in enumerate(CHATS[:40])]
    mixed = mixture([(store, 3), (store_of(tmp_path / "light", light, "chat32k"), 1)])
    for arguments in ({"boundary_loss": False}, {"loss": "all"}, {"packing": "best_fit_crop"}):
        with Loader(
            mixed, "chat32k", device="cuda", resident=True, executor=executor, **ARGUMENTS | arguments
        ) as loader:
            got = list(itertools.islice(loader, 12))
        with Loader(mixed, "chat32k", device="cpu", **ARGUMENTS | arguments) as loader:
            assert compare(itertools.islice(loader, 12), iter(got)).difference is None


class Step:
    """A step that copies all that a load wrote, captured with the load."""

    def __init__(self, batches):
        self.batches = batches
        names = (*TENSORS, "num_loss_tokens", "num_tokens", "weight_sum", "max_seqlen")
        self.copies = {name: torch.empty_like(getattr(batches, name)) for name in names}
        self.run()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.run()

    def run(self):
        self.batches.load()
        for name, copy in self.copies.items():
            copy.copy_(getattr(self.batches, name))

    def replay(self, batch):
        """Replay, and return the batch with what the step saw, and its numbers, all copied on the current stream."""
        self.graph.replay()
        seen = {name: copy.clone() for name, copy in self.copies.items()}
        return dataclasses.replace(batch, **{name: seen.pop(name) for name in TENSORS}), seen


@each_executor
@pytest.mark.parametrize("workers", [0, 1])
def test_a_captured_step_with_its_load_sees_every_batch_through_many_refills(store, executor, workers):
    with make(store, executor=executor, num_workers=workers, epochs=2) as loader:
        batches = loader.graph_batches(5)
        # warms up on a batch of padding, and captures before there are any
        step, got = Step(batches), []
        ready = batches.refill()
        while ready:
            for batch in ready:
                got.append(step.replay(batch))
            ready = batches.refill(len(ready))
    want = expected(store, None, epochs=2)
    assert len(want) > 20
    assert compare(iter(want), iter([batch for batch, _ in got])).difference is None
    for batch, seen in got:
        assert {name: value.item() for name, value in seen.items()} == {name: getattr(batch, name) for name in seen}


@each_executor
def test_graphs_resume_and_replay_on_streams_in_turn(store, executor):
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    with make(store, executor=executor) as loader:
        batches = loader.graph_batches(3)
        step, got, state = Step(batches), [], None
        for turn in range(8):
            with torch.cuda.stream(streams[turn % 2]):
                ready = batches.refill(3 if turn else 0)
                got += [step.replay(batch)[0] for batch in ready]
            if turn == 4:
                state = loader.state_dict()
        assert state["step"] == 12
        loader.load_state_dict(state)
        again = []
        with torch.cuda.stream(streams[0]):
            ready = batches.refill()
            again += [step.replay(batch)[0] for batch in ready]
            torch.cuda.synchronize()
    want = expected(store, 24)
    assert compare(iter(want), iter(got)).difference is None
    assert compare(iter(want[12:15]), iter(again)).difference is None


def test_a_replay_too_many_is_padding_and_then_an_error(store):
    with make(store) as loader:
        batches = loader.graph_batches(3)
        step = Step(batches)
        ready = batches.refill()
        for batch in ready:
            step.replay(batch)
        padding, seen = step.replay(batch)
        assert seen["num_loss_tokens"].item() == 0 and (padding.targets == -100).all()
        ready = batches.refill(3)
        for batch in ready:
            step.replay(batch)
        with pytest.raises(RuntimeError, match="the device counted 4"):
            batches.refill(3)


def test_a_loader_is_closed_or_dropped_with_loads_queued(store):
    for drop in (False, True):
        loader = make(store)
        batches = loader.graph_batches(4)
        for _ in batches.refill():
            batches.load()
        if not drop:
            loader.close()
        del loader, batches
    torch.cuda.synchronize()


def test_nothing_waits_for_the_device(store):
    with make(store) as loader:
        list(itertools.islice(loader, 3))
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = list(itertools.islice(loader, 20))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(first_difference(a, b) is None for a, b in zip(expected(store, 23)[3:], got, strict=True))


def test_want_of_room_is_said_in_bytes(store, monkeypatch):
    monkeypatch.setattr(Cuda, "free_bytes", lambda self: (10, 20))
    with pytest.raises(MemoryError, match="10 of 20 are free: use resident='host'"):
        make(store)
