"""Give batches to a captured CUDA graph: static tensors, and a load that may be captured with the step.

    tables of the next k batches   ->   GraphBatches.refill()   ->   k replays of load() and the step
     producer/, in the ring             upload/refills.py            kernels/gather.py, kernels/advance.py

What a batch is, and in which order they come, is as for `next(loader)`.
"""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from typing import Any

import numpy as np
import torch

from nanopack.batch import Batch
from nanopack.checks import check_int
from nanopack.producer.packed_state import PackedState
from nanopack.producer.stored import StoreReader
from nanopack.ring.facts import BatchFacts
from nanopack.ring.layout import ENTRY_BYTES
from nanopack.run import Run
from nanopack.stages import as_batch, close_in_owner
from nanopack.upload.halves import Halves
from nanopack.upload.refills import Refills, half_bytes

# Room in a half for tables so much larger than those of mean batches; what does not fit comes with the next half.
ROOM = 1.25


class GraphBatches:
    """Static tensors, of which each `load()` writes the next batch. Made by `Loader.graph_batches`.

    The tensors are those of `Batch`, under the same names; and there are four more, on the device like them:
    `num_loss_tokens`, `num_tokens`, `max_seqlen`, () int64, and `weight_sum`, () float64. They are 0 in a batch of
    padding, which is what a load gives that has no batch: clamp what you divide by.
    """

    @torch.inference_mode(False)
    def __init__(self, run: Run, batches: int) -> None:
        """Allocate everything, and take the run's batches; `batches` is the most of a half."""
        self._run = run
        config, layout, device, resident = run.config, run.reader.layout, run.device_actions, run.resident
        if resident is None:
            raise ValueError("graph_batches needs the words on the device: make the loader with resident=True")
        check_int("k", batches, least=1)
        self._outputs = run.make_outputs()
        facts = torch.zeros(4, dtype=torch.int64, device=device.device)
        size = half_bytes(batches, config.batch_size, _table_bytes(resident.reader, batches))
        memory = np.zeros(2 * size + 128, np.uint8)
        with contextlib.ExitStack() as held:
            if device.pin(memory):
                held.callback(device.unpin, memory)
            parts = [memory[begin:end] for begin, end in ((0, size), (size, 2 * size))]
            seen = [memory[begin : begin + 8] for begin in (2 * size, 2 * size + 64)]
            halves = Halves(
                device,
                [torch.from_numpy(part) for part in parts],
                [torch.from_numpy(part) for part in seen],
                lambda tables, counter: resident.load(tables, counter, facts),
                self._outputs,
            )
            held.callback(halves.close)
            self.close: Any = weakref.finalize(self, close_in_owner, os.getpid(), held.pop_all())
        self._halves = halves
        self._refills = Refills(
            halves, parts, self._take, batches=batches, batch_size=config.batch_size, seq_len=config.seq_len
        )
        self._state: PackedState | None = None
        run.give_to(self)
        self.inputs, self.targets, self.weights, self.positions, self.doc_ids = self._outputs[:5]
        cu_seqlens = self._outputs.cu_seqlens
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens[: (layout.max_segments or 0) + 1]
        self.num_loss_tokens, self.num_tokens, self.max_seqlen = facts[0], facts[1], facts[3]
        self.weight_sum = facts[2:3].view(torch.float64)[0]

    @torch.inference_mode(False)
    def load(self) -> None:
        """Write the next batch into the tensors, on the current stream; or have that captured, to do so at each replay.

        No host decision depends on the batch, so it may be captured with the step in one CUDA graph. RuntimeError where
        the loader is closed or has made other graph batches since.
        """
        self._run.check_graph(self)
        self._halves.load()

    def refill(self, loaded: int = 0) -> list[Batch]:
        """Count the loads since the last call, and return the batches that may be loaded now; none are left at the end.

        Call it before the first load, and once all batches that it returned are loaded, or earlier: it then returns the
        rest of them. Where all are, it brings the next ones to the device while these loads still run. They run on the
        stream that is current in this call, or on one ordered after it. Of the batches, which all share the tensors,
        the numbers are for the host.

        `loaded`: how often `load` ran, replays and warm-up together; only these batches count as delivered, for
        `state_dict()` and `ledger()`. ValueError where that is more than there were, RuntimeError, a half later, where
        the device counted others; else raises as `next(loader)` does.
        """
        run, refills = self._run, self._refills
        began, at_the_end = time.perf_counter(), False
        with run.turn, torch.inference_mode(False):
            run.check_graph(self)
            if run.device_actions.capturing():
                raise RuntimeError(
                    "refill() inside a CUDA graph capture: its copies would become part of the graph; call it before "
                    "the capture begins, or after it"
                )
            for facts in refills.count(loaded):
                run.count(self._batch(facts, run.step), facts)
                self._state = PackedState.of(facts)
            try:
                ready = refills.refill()
                at_the_end = not ready
            finally:
                # what is on the device and not loaded is not delivered
                if not at_the_end:
                    run.prefetcher.state = self._state
            run.spend(time.perf_counter() - began)
            if at_the_end:
                run.end_pass()
            return [self._batch(facts, run.step + number) for number, facts in enumerate(ready)]

    def begin(self) -> None:
        """Begin with the batches of a new producer."""
        self._state = None
        self._refills.begin()

    def _batch(self, facts: BatchFacts, step: int) -> Batch:
        return as_batch(self._outputs, facts, step, self._run.reader.layout)

    def _take(self) -> tuple[np.ndarray, BatchFacts]:
        found: tuple[np.ndarray, BatchFacts] = self._run.prefetcher.next()
        return found


def _table_bytes(reader: StoreReader, batches: int) -> int:
    """Return the bytes of the tables of that many batches, about; at least those of the largest batch."""
    config, most = reader.config, reader.layout.nbytes
    pieces = config.batch_size * ((config.seq_len + 1) / reader.mean_length + 1)
    mean = ENTRY_BYTES * (config.batch_size + 1 + pieces)
    return int(min(batches * most, max(most, ROOM * batches * mean)))
