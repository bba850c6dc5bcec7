"""What does a batch cost a GPU: the kernel, compared with a device copy; the copy to the device; a training loop?

    one slot, staged   ->   kernel, device copy, host copy, by CUDA events   ->   microseconds, fraction of the copy
    a small model      ->   trained on a fixed batch, ours, nanochat's       ->   milliseconds a step, beyond the fixed

Launches are captured into a CUDA graph, which measures the device's time and not the host's; buffers alternate, so that
together they exceed its cache. In the loop the next batch is fetched while the device works, and the host waits for the
device at the end of each step, as in nanochat.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from nanopack.cli.bench import gpu_resident, nanochat
from nanopack.cli.bench.corpus import ROW, ROWS, Data
from nanopack.cli.bench.other_packers import NotHereError, need
from nanopack.cli.bench.rounds import Measure, Pace, Result, Spread, Table, in_rounds, not_measured, ratio, spreads
from nanopack.cli.bench.throughput import MIDTRAINING, SFT
from nanopack.config import EXTRAS, LoaderConfig
from nanopack.conversations.records import open_conversations
from nanopack.loader import Loader
from nanopack.producer.producer import Producer
from nanopack.producer.reader import Reader
from nanopack.ring.ring import Ring
from nanopack.upload.executor import make_kernel
from nanopack.upload.outputs import outputs_maker

BUFFERS = 128
"""Buffers that alternate: more than 100 MB of outputs, while the largest cache has 60 MB."""
LAUNCH_SECONDS = 0.1
"""Of one measurement of launches: tens of thousands of them."""
MODEL_ROWS = 8
WIDTH, HEADS, LAYERS = 512, 8, 4
LEAST_STEPS, WARM_STEPS = 6, 6
KINDS: dict[str, dict[str, Any]] = {
    "inputs and targets": {},
    "with weights and all extras": {"loss_weights": "token", "extras": EXTRAS},
}
ALONE = "the loop alone, a fixed batch"
IGNORED = {MIDTRAINING: -1, SFT: -1}


def measure(data: Data, pace: Pace) -> Iterator[Table]:
    """Yield the times of the kernel and of the loop, or a note that there is no GPU."""
    if not torch.cuda.is_available():
        rows = ("kernel, copy, training loop", "words on the device: kernels, upload, captured step")
        yield Table("On a GPU", [not_measured(row, "no GPU") for row in rows])
        return
    device = torch.device("cuda", torch.cuda.current_device())
    kernels = [row for kind, settings in KINDS.items() for row in _kernel_rows(data, pace, device, kind, settings)]
    yield Table("The kernel and the copies, a batch", kernels)
    yield from gpu_resident.measure(data, pace, device, launch_times, lambda: Model(data.tokenizer.vocab_size).cuda())
    yield Table("A training loop", _loop_rows(data, pace))


def _kernel_rows(data: Data, pace: Pace, device: torch.device, kind: str, settings: dict[str, Any]) -> list[Result]:
    """Return the results of kernel, device copy and host copy for a batch of this kind."""
    try:
        need("triton")
    except NotHereError as why:
        return [not_measured(f"kernel, {kind}", str(why))]
    # imports Triton
    from nanopack.kernels.pack import pack_bytes

    config = LoaderConfig(batch_size=ROWS, seq_len=ROW, max_document_tokens=ROW, **settings)
    reader = Reader(open_conversations(data.chats), data.tokenizer, config)
    ring = Ring(reader.layout, 1)
    facts, slot = Producer(reader).produce(ring.slots[0]), ring.slots[0].buffer
    assert facts is not None
    make_outputs = outputs_maker(config, reader.layout, device)
    outputs = [make_outputs() for _ in range(BUFFERS)]
    host = torch.from_numpy(slot)[: facts.used_bytes].clone().pin_memory()
    staged = [torch.from_numpy(slot).to(device) for _ in range(BUFFERS)]
    kernel = make_kernel("triton", device, reader.layout, data.tokenizer.bos_id, -100)
    head = np.frombuffer(slot, np.int32, 4 * (ROWS + 1))
    n_bytes = pack_bytes(
        ROWS,
        ROW,
        word_bytes=reader.layout.word_bytes,
        n_pieces=len(facts.pieces) // 32,
        weights=config.loss_weights is not None,
        positions="positions" in config.extras,
        doc_ids="doc_ids" in config.extras,
        n_cu=int(head[-3]) if "cu_seqlens" in config.extras else 0,
        cu_size=0 if outputs[0].cu_seqlens is None else outputs[0].cu_seqlens.numel(),
    )
    # a copy of n bytes reads n and writes n
    memory = [torch.zeros(n_bytes // 2, dtype=torch.uint8, device=device) for _ in range(BUFFERS)]
    works: dict[str, Callable[[int], object]] = {
        "kernel": lambda i: kernel(staged[i], outputs[i]),
        "device copy of the same bytes": lambda i: memory[i].copy_(memory[i - 1]),
        "host copy, pinned": lambda i: staged[i][: facts.used_bytes].copy_(host, non_blocking=True),
    }
    times = launch_times(works, pace)
    moved = {"kernel": n_bytes, "device copy of the same bytes": n_bytes, "host copy, pinned": facts.used_bytes}
    copied = times["device copy of the same bytes"]
    return [
        Result(
            f"{name}, {kind}",
            {
                "device_us": spread,
                "moved_bytes": moved[name],
                "speed_gb_s": Spread(tuple(moved[name] / us / 1000 for us in spread.rounds)),
                **({"of_copy_speed_fraction": ratio(copied, spread)} if name == "kernel" else {}),
            },
        )
        for name, spread in times.items()
    ]


def launch_times(works: Mapping[str, Callable[[int], object]], pace: Pace) -> dict[str, Spread]:
    """Return the device's microseconds for each work on one buffer, by its name."""
    return spreads(in_rounds({name: _device_time(work) for name, work in works.items()}, pace, LAUNCH_SECONDS))


def _device_time(work: Callable[[int], object]) -> Measure[float]:
    """Return the measurement of the device's microseconds for the work on one buffer."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # compilation cannot be captured
        work(0)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for i in range(BUFFERS):
            work(i)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def measure(seconds: float) -> float:
        graph.replay()
        torch.cuda.synchronize()
        times_us: list[float] = []
        began = time.perf_counter()
        while not times_us or time.perf_counter() - began < seconds:
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times_us.append(begin.elapsed_time(end) * 1000 / BUFFERS)
        return float(np.median(times_us))

    return measure


class Model(nn.Module):
    """A small decoder."""

    def __init__(self, vocab_size: int, width: int = WIDTH, heads: int = HEADS, layers: int = LAYERS) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor, ignore_index: int) -> torch.Tensor:
        """Return the loss."""
        mask = nn.Transformer.generate_square_subsequent_mask(inputs.shape[1], device=inputs.device)
        logits = self.head(self.layers(self.embedding(inputs), mask=mask, is_causal=True))
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=ignore_index)


class Steps(NamedTuple):
    """Means over the steps of one measurement, in milliseconds."""

    step_ms: float
    in_next_ms: float


Batch = tuple[torch.Tensor, torch.Tensor]


def train(
    model: Model, take: Callable[[], Batch], seconds: float, *, ignore_index: int, synchronize: Callable[[], object]
) -> Steps:
    """Train for about `seconds`; every batch is fetched while the device works on the one before."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    device_type = next(model.parameters()).device.type
    nexts: list[float] = []
    inputs, targets = take()
    began = 0.0
    for step in range(1 << 60):
        if step == WARM_STEPS:
            synchronize()
            nexts, began = [], time.perf_counter()
        with torch.autocast(device_type, torch.bfloat16):
            loss = model(inputs, targets, ignore_index)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        asked = time.perf_counter()
        inputs, targets = take()
        nexts.append(time.perf_counter() - asked)
        synchronize()
        if step >= WARM_STEPS + LEAST_STEPS and time.perf_counter() - began >= seconds:
            break
    return Steps(1000 * (time.perf_counter() - began) / len(nexts), 1000 * sum(nexts) / len(nexts))


def _loop_rows(data: Data, pace: Pace) -> list[Result]:
    """Return the steps of the loop alone and with each loader, alternating."""
    model = Model(data.tokenizer.vocab_size).cuda()
    contenders: dict[str, Callable[[], Any]] = {
        ALONE: partial(_fixed, data),
        "nanopack, num_workers=1": partial(_loader, data, 1),
        "nanopack, num_workers=2": partial(_loader, data, 2),
        MIDTRAINING: partial(_generator, data, nanochat.midtraining),
        SFT: partial(_generator, data, nanochat.sft),
    }

    def measure_steps(name: str, seconds: float) -> Steps:
        with contenders[name]() as take:
            ignored = IGNORED.get(name, -100)
            return train(model, take, seconds, ignore_index=ignored, synchronize=torch.cuda.synchronize)

    measured = in_rounds({name: partial(measure_steps, name) for name in contenders}, pace)
    alone = [steps.step_ms for steps in measured[ALONE]]
    return [_loop_row(name, steps, alone) for name, steps in measured.items()]


def _loop_row(name: str, steps: Sequence[Steps], alone: Sequence[float]) -> Result:
    step_ms = [each.step_ms for each in steps]
    return Result(
        name,
        {
            "step_ms": Spread(tuple(step_ms)),
            "beyond_alone_ms": Spread(tuple(a - b for a, b in zip(step_ms, alone, strict=True))),
            "in_next_ms": Spread(tuple(each.in_next_ms for each in steps)),
        },
    )


@contextlib.contextmanager
def _loader(data: Data, workers: int) -> Iterator[Callable[[], Batch]]:
    with Loader(
        data.chats, data.tokenizer, MODEL_ROWS, ROW, max_document_tokens=ROW, device="cuda", num_workers=workers
    ) as batches:

        def take() -> Batch:
            inputs, targets = next(batches)
            return inputs, targets

        yield take


@contextlib.contextmanager
def _generator(data: Data, make: Any) -> Iterator[Callable[[], Batch]]:
    render = nanochat.renderer(data.tokenizer.encoding)
    batches = make(data.chats, render, MODEL_ROWS, ROW, device="cuda")
    yield lambda: next(batches)[:2]


@contextlib.contextmanager
def _fixed(data: Data) -> Iterator[Callable[[], Batch]]:
    with _loader(data, 1) as take:
        batch = take()
    yield lambda: batch
