"""What does a batch cost a GPU that holds the words of all data: the kernels, the upload, a captured step?

    a store on the device, tables   ->   gather, a load, pack of the same rows, a device copy   ->   microseconds
    a small model                   ->   captured alone, and with its load                      ->   milliseconds a step

A part of the section gpu.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from nanopack.cli.bench.corpus import ROW, ROWS, Data, at_least
from nanopack.cli.bench.resident import TOKENS, stored
from nanopack.cli.bench.rounds import Measure, Pace, Result, Spread, Table, in_rounds, ratio, spreads
from nanopack.graph import GraphBatches
from nanopack.loader import Loader
from nanopack.producer.producer import Producer
from nanopack.producer.stored import reader_of
from nanopack.ring.ring import Ring
from nanopack.store.store import Store
from nanopack.upload.device import Cuda
from nanopack.upload.executor import make_kernel
from nanopack.upload.words import resident_words

BUFFERS = 128
"""Buffers that alternate, as in gpu.py."""
UPLOAD_BYTES, QUICK_UPLOAD_BYTES = 1 << 30, 1 << 26
MODEL_ROWS, STEPS = 8, 16
ALONE = "the captured step alone, a fixed batch"
KINDS: dict[str, dict[str, Any]] = {
    "inputs and targets": {},
    "with weights and extras": {"loss_weights": "token", "extras": ("positions", "doc_ids", "cu_seqlens")},
}
Times = Callable[[Mapping[str, Callable[[int], object]], Pace], dict[str, Spread]]
"""Measures the device's microseconds for each work on one buffer: `gpu.launch_times`."""


def measure(data: Data, pace: Pace, device: torch.device, times: Times, model: Any) -> Iterator[Table]:
    """Yield the times of the kernels, of captured steps of `model`, and of the upload."""
    with stored(at_least(data.documents, TOKENS), data) as store:
        rows = [row for kind, given in KINDS.items() for row in _kernels(store, pace, device, times, kind, given)]
        yield Table("Words on the device: the kernels, a batch", rows)
        yield Table("Words on the device: a captured step", _steps(store, pace, model))
    yield Table("Words on the device: the upload", _upload(pace, device))


def _kernels(
    store: Store, pace: Pace, device: torch.device, launch_times: Times, kind: str, given: dict[str, Any]
) -> list[Result]:
    """Return the times of the kernels for one and the same batch, and of a copy of the bytes that gather moves."""
    from nanopack.kernels.gather import gather_bytes

    with Loader(store, None, ROWS, ROW, device=device, resident=True, num_workers=0, **given) as loader:
        made = loader.graph_batches(BUFFERS)
        [batch, *_] = made.refill()
        # from now on every load is one of the first batch, and none of padding
        counter = made._halves._counter.view(torch.int64)
        counter[2] = counter[1]
        run = loader._run
        resident: Any = run.resident
        table = _filled(store, loader, device, resident=True)
        slot, kernel = _filled(store, loader, device, resident=False), _pack(store, loader, device)
        outputs = [run.make_outputs() for _ in range(BUFFERS)]
        n_bytes = gather_bytes(
            ROWS,
            ROW,
            word_bytes=store.word_dtype.itemsize,
            n_words=sum(piece.length for row in batch.word_pieces for piece in row),
            n_pieces=sum(map(len, batch.word_pieces)),
            weights=batch.weights is not None,
            positions=batch.positions is not None,
            doc_ids=batch.doc_ids is not None,
            cu_size=0 if outputs[0].cu_seqlens is None else outputs[0].cu_seqlens.numel(),
        )
        memory = [torch.zeros(n_bytes // 2, dtype=torch.uint8, device=device) for _ in range(BUFFERS)]
        host = table.cpu().pin_memory()
        copies = [torch.empty_like(table) for _ in range(2)]
        copy = f"device copy of the same bytes, {kind}"
        works: dict[str, Callable[[int], object]] = {
            f"gather, {kind}": lambda i: resident.kernel(table, outputs[i]),
            f"a load: gather and advance, {kind}": lambda i: made.load(),
            f"pack of the same rows, {kind}": lambda i: kernel(slot, outputs[i]),
            copy: lambda i: memory[i].copy_(memory[i - 1]),
            f"host copy of the table, {kind}": lambda i: copies[i % 2].copy_(host, non_blocking=True),
        }
        times = launch_times(works, pace)
    moved = {name: len(host) if "table" in name else n_bytes for name in works}
    return [
        Result(
            name,
            {
                "device_us": spread,
                "moved_bytes": moved[name],
                **({} if "copy" in name else {"of_copy_speed_fraction": ratio(times[copy], spread)}),
            },
        )
        for name, spread in times.items()
    ]


def _filled(store: Store, loader: Loader, device: torch.device, *, resident: bool) -> torch.Tensor:
    """Return the used bytes of the first slot, on the device."""
    reader = reader_of(store, loader.tokenizer, loader.config, resident=resident)
    slot = Ring(reader.layout, 1).slots[0]
    facts = Producer(reader).produce(slot)
    assert facts is not None
    # pack reads T + 1 words from the start of each row
    used = facts.used_bytes if resident else reader.layout.nbytes
    return torch.from_numpy(slot.buffer[:used]).to(device)


def _pack(store: Store, loader: Loader, device: torch.device) -> Callable[[Any, Any], None]:
    layout = reader_of(store, loader.tokenizer, loader.config).layout
    return make_kernel("triton", device, layout, loader.tokenizer.bos_id, loader.config.ignore_index)


def _upload(pace: Pace, device: torch.device) -> list[Result]:
    """Return how fast words that are in the host's memory are brought to the device, and a pinned copy of them."""
    # of zeros the system would map one and the same page
    words = np.ones((QUICK_UPLOAD_BYTES if pace.quick else UPLOAD_BYTES) // 2, np.uint16)
    pinned = torch.empty(words.nbytes, dtype=torch.uint8, pin_memory=True)
    to = torch.empty(words.nbytes, dtype=torch.uint8, device=device)

    def upload(seconds: float) -> float:
        return _gb_s(words.nbytes, lambda: resident_words([words], words.dtype, Cuda(device)))

    def copy(seconds: float) -> float:
        return _gb_s(words.nbytes, lambda: to.copy_(pinned, non_blocking=True))

    found = spreads(in_rounds({"the words, by chunks": upload, "one pinned copy": copy}, pace))
    return [Result(name, {"speed_gb_s": spread, "moved_bytes": words.nbytes}) for name, spread in found.items()]


def _gb_s(nbytes: int, work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    kept = work()
    torch.cuda.synchronize()
    del kept
    return nbytes / (time.perf_counter() - began) / 1e9


class Captured:
    """A step of training, captured with what gives its batch."""

    def __init__(self, model: Any, batches: GraphBatches, load: Callable[[], object]) -> None:
        """`load` is the batches' own, or does nothing: then the batch is always the same."""
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, capturable=True)
        self._model, self._batches, self._load = model, batches, load
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        self._optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._run(clear=False)

    def _run(self, *, clear: bool = True) -> None:
        if clear:
            self._optimizer.zero_grad(set_to_none=True)
        self._load()
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = self._model(self._batches.inputs, self._batches.targets, -100)
        loss.backward()
        self._optimizer.step()


def _steps(store: Store, pace: Pace, make_model: Any) -> list[Result]:
    """Return the milliseconds of a captured step with a fixed batch, and with a load in the graph and its refills."""
    with Loader(store, None, MODEL_ROWS, ROW, device="cuda", resident=True) as loader:
        batches = loader.graph_batches(STEPS)
        ready = batches.refill()
        batches.load()
        # a batch to begin with, which the fixed step keeps
        ready = batches.refill(1)
        fixed = Captured(make_model(), batches, lambda: None)
        # warm-up loads count
        loading = Captured(make_model(), batches, batches.load)
        ready = batches.refill(3)

        ended = [torch.cuda.Event(), torch.cuda.Event()]

        def alone(turn: int) -> int:
            for _ in range(STEPS):
                fixed.graph.replay()
            # as far ahead of the device as with refills
            ended[turn % 2].record()
            ended[1 - turn % 2].synchronize()
            return STEPS

        def with_load(turn: int) -> int:
            nonlocal ready
            count = len(ready)
            for _ in ready:
                loading.graph.replay()
            ready = batches.refill(count)
            return count

        found = spreads(in_rounds({ALONE: _step_ms(alone), "with its load and refills": _step_ms(with_load)}, pace))
    return [
        Result(name, {"step_ms": spread, "beyond_alone_ms": _difference(spread, found[ALONE])})
        for name, spread in found.items()
    ]


def _step_ms(work: Callable[[int], int]) -> Measure[float]:
    """Return the measurement of a step's milliseconds; `work(turn)` queues steps, and returns how many."""

    def measure(seconds: float) -> float:
        torch.cuda.synchronize()
        count = turn = 0
        began = time.perf_counter()
        while not count or time.perf_counter() - began < seconds:
            count += work(turn)
            turn += 1
        torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - began) / count

    return measure


def _difference(of: Spread, to: Spread) -> Spread:
    return Spread(tuple(a - b for a, b in zip(of.rounds, to.rounds, strict=True)))
