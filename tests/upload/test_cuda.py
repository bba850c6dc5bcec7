"""The loader on a CUDA device, compared with the reference packer: what the simulator's device cannot show."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading

import pytest
import torch

from nanopack import Loader, reference
from nanopack.upload.device import Cuda
from nanopack.verify import compare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CHATS = [
    [{"role": "user", "content": f"{i} + 1?"}, {"role": "assistant", "content": f"{i + 1}." * (i % 7 + 1)}]
    for i in range(300)
]
ARGUMENTS = dict(batch_size=4, seq_len=128, seed=1, loss_weights="token", extras=("positions", "doc_ids", "cu_seqlens"))
EXECUTORS = pytest.mark.parametrize("executor", ["triton", "torch"])


def make(data=CHATS, **arguments):
    return Loader(data, "chat32k", device="cuda", **{**ARGUMENTS, **arguments})


def difference(batches, first=0, data=CHATS):
    """Return the first difference of these batches, the first of which is step `first`, from the reference's."""
    batches = list(batches)
    expected = itertools.islice(reference.batches(data, "chat32k", **ARGUMENTS), first, first + len(batches))
    assert batches
    return compare(expected, iter(batches)).difference


def take(loader, count):
    return list(itertools.islice(loader, count))


@pytest.fixture
def refused_pinning(monkeypatch):
    """Let CUDA itself refuse to pin a ring: the memory already is pinned."""
    pin, unpin = Cuda.pin, Cuda.unpin

    def pin_twice(self, memory):
        assert pin(self, memory)
        pinned = pin(self, memory)
        unpin(self, memory)
        return pinned

    monkeypatch.setattr(Cuda, "pin", pin_twice)


@EXECUTORS
def test_memory_that_cannot_be_pinned_costs_a_warning_and_no_batch(refused_pinning, caplog, executor):
    with make(executor=executor) as loader:
        # the refusal is not the next operation's
        assert torch.ones(3, device="cuda").sum().item() == 3
        assert difference(take(loader, 20)) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "bytes of host memory cannot be pinned (CUDA error 712)" in caplog.text


@EXECUTORS
@pytest.mark.parametrize("mode", [lambda: torch.device("cuda"), torch.inference_mode], ids=["device", "inference"])
def test_global_modes_of_torch_change_no_batch(executor, mode):
    with mode(), make(executor=executor) as loader:
        batches = take(loader, 10)
    assert difference(batches) is None


@EXECUTORS
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("static", [False, True])
def test_two_loaders_in_turn_do_not_disturb_each_other(executor, streams, static):
    validation = CHATS[::-1][:50]
    used = [torch.cuda.Stream() for _ in range(streams)]
    got = {0: [], 1: []}
    with make(executor=executor, static=static) as one, make(validation, executor=executor, static=static) as other:
        for turn in range(30):
            with torch.cuda.stream(used[turn % streams]):
                # two training batches, then one of validation
                which = int(turn % 3 == 2)
                batch = next((one, other)[which])
                # on the stream that it came on, so that a static one is read before it is overwritten
                got[which].append(copy_of(batch))
    torch.cuda.synchronize()
    assert difference(got[0]) is None
    assert difference(got[1], data=validation) is None


def copy_of(batch):
    tensors = {
        field.name: value.clone()
        for field in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, field.name), torch.Tensor)
    }
    return dataclasses.replace(batch, **tensors)


@EXECUTORS
def test_a_loader_made_in_one_thread_serves_another(executor):
    made = []
    thread = threading.Thread(target=lambda: made.append(make(executor=executor)))
    thread.start()
    thread.join()
    with made[0] as loader:
        assert difference(take(loader, 10)) is None


def test_a_compiled_step_sees_every_batch_and_compiles_once():
    compiled = torch.compile(lambda inputs, weights: (inputs * 2).sum() + weights.sum(), fullgraph=True)
    torch._dynamo.utils.counters.clear()
    seen = []
    with make() as loader:
        for batch in take(loader, 8):
            seen.append(compiled(batch.inputs, batch.weights))
    expected = itertools.islice(reference.batches(CHATS, "chat32k", **ARGUMENTS), 8)
    assert [value.item() for value in seen] == [float((b.inputs * 2).sum() + b.weights.sum()) for b in expected]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@EXECUTORS
@pytest.mark.parametrize("static", [False, True])
def test_a_run_resumes_while_work_is_queued(executor, static):
    with make(executor=executor, static=static) as loader:
        batches = [copy_of(next(loader)) for _ in range(5)]
        state = loader.state_dict()
        take(loader, 3)
        loader.load_state_dict(state)
        batches += [copy_of(next(loader)) for _ in range(5)]
    assert difference(batches) is None


def test_memory_that_ends_in_next_costs_no_batch():
    torch.cuda.empty_cache()
    kept = []
    with make() as loader, little_memory(8 << 20):
        with pytest.raises(torch.OutOfMemoryError):
            kept.extend(loader)
        failed = len(kept)
        first = kept[:20]
        del kept[:]
        after = take(loader, 5)
    assert difference(first) is None
    assert difference(after, first=failed) is None


@contextlib.contextmanager
def little_memory(nbytes):
    """Let torch's allocator have this many bytes more than it has."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + nbytes) / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
