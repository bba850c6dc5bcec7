"""Set up the stages from the producer to the tensors, and release them in order.

reader, Start   ->   start_producer()   ->   Stages: producer, ring, upload   ->   Stages.prefetcher.next()
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from nanopack.batch import Batch, PieceTable
from nanopack.producer.feed import Feed, Inline
from nanopack.producer.process import Process
from nanopack.producer.producer import Producer, Start
from nanopack.producer.reader import Reader
from nanopack.producer.start import StartMethod
from nanopack.producer.stored import StoreReader
from nanopack.ring.facts import BatchFacts
from nanopack.ring.layout import Layout
from nanopack.ring.ring import Ring
from nanopack.upload.device import Device, Kernel
from nanopack.upload.outputs import Outputs
from nanopack.upload.prefetcher import Prefetcher
from nanopack.upload.upload import Upload


class Processes(NamedTuple):
    """How many processes there are and how they work, as the arguments of `Loader` say."""

    num_workers: int
    prefetch: int
    start_method: StartMethod | None


def start_producer(reader: Reader, start: Start, processes: Processes) -> tuple[Feed, Ring]:
    """Start the producer, in a process of its own unless num_workers is 0."""
    if processes.num_workers == 0:
        ring = Ring(reader.layout, slots=1)
        return Inline(Producer(reader, start), ring), ring
    # stored documents are looked up faster than sent
    helpers = processes.num_workers if processes.num_workers > 1 and not isinstance(reader, StoreReader) else 0
    # one slot more than those that are ready: the one being filled
    process = Process(reader, processes.prefetch + 1, helpers, start, processes.start_method)
    return process, process.ring


class Stages:
    """The stages after the reader, released by `close`, when this is dropped, and at the interpreter's exit."""

    def __init__(
        self,
        device: Device,
        feed: Feed,
        ring: Ring,
        make_outputs: Callable[[], Outputs],
        kernel: Kernel,
        *,
        static: bool,
    ) -> None:
        self.feed = feed
        self.ring = ring
        with contextlib.ExitStack() as held:
            held.callback(feed.close)
            if device.pin(ring.buffer):
                held.callback(device.unpin, ring.buffer)
            slots = [torch.from_numpy(slot.buffer) for slot in ring.slots]
            self.upload = Upload(device, slots, make_outputs, kernel, static=static)
            held.callback(self.upload.close)
            # a second time, to end first: whatever fails above ends it too
            held.callback(feed.close)
            self.close: Any = weakref.finalize(self, close_in_owner, os.getpid(), held.pop_all())
        self.prefetcher = Prefetcher(device, feed, self.upload, ahead=True)


def close_in_owner(owner: int, held: contextlib.ExitStack) -> None:
    """Release what is held, but not in a process forked from its owner."""
    if os.getpid() == owner:
        held.close()


def as_batch(outputs: Outputs, facts: BatchFacts, step: int, layout: Layout) -> Batch:
    """Return the batch of these tensors and facts."""
    cu_seqlens, size = outputs.cu_seqlens, (layout.max_segments or 0) + 1
    return Batch(
        inputs=outputs.inputs,
        targets=outputs.targets,
        weights=outputs.weights,
        positions=outputs.positions,
        doc_ids=outputs.doc_ids,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens[:size],
        step=step,
        num_loss_tokens=facts.num_loss_tokens,
        num_tokens=facts.num_tokens,
        weight_sum=facts.weight_sum,
        max_seqlen=facts.max_seqlen,
        epoch=facts.epoch,
        progress=facts.progress,
        last=facts.last,
        word_pieces=PieceTable(facts.pieces, facts.pieces_per_row),
        work=facts.work,
        cu_seqlens_real=cu_seqlens[layout.real_at :][:size] if cu_seqlens is not None and layout.real else None,
    )
