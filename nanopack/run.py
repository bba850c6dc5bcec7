"""Run the stages of one loader: start them, take batches, begin new passes, save and resume.

    config, reader   ->   Run.next()   ->   Loader.__next__
    Stages                Run.state(), Run.load(), Run.restart(), Run.batches()

Loader (loader.py) is the face of it, and says what each of these promises.
"""

from __future__ import annotations

import copy
import functools
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

import torch

from nanopack.batch import Batch
from nanopack.checks import refuse_fake_tensors
from nanopack.config import Encoder, Executor, LoaderConfig
from nanopack.conversations.source import Source
from nanopack.distributed import OtherRanks, agree_on_clock, agree_on_most, are_all_ranks, refuse_other_data
from nanopack.ledger import Ledger
from nanopack.passes import warn_of_same_order
from nanopack.producer.caching import cached
from nanopack.producer.counting import count_batches
from nanopack.producer.packed_state import add_digests, state_of
from nanopack.producer.producer import Start, initial_state
from nanopack.producer.reader import Reader
from nanopack.producer.start import DEFAULT_START_METHOD
from nanopack.producer.stored import StoreReader, reader_of
from nanopack.ring.facts import BatchFacts
from nanopack.stages import Processes, Stages, as_batch, start_producer
from nanopack.state import FORMAT, batches_of, check_state, clock_of, fingerprint, sample_of, shared_facts, whole_digest
from nanopack.stats import Stats, StatsReport
from nanopack.tokenizers.huggingface import HuggingFaceTokenizer
from nanopack.tokenizers.splintr import choose_encoder
from nanopack.tokenizers.tokenizer import AnyTokenizer
from nanopack.upload.device import Cpu, Cuda
from nanopack.upload.executor import make_kernel
from nanopack.upload.outputs import outputs_maker
from nanopack.upload.prefetcher import Prefetcher
from nanopack.upload.refills import HostTables
from nanopack.upload.resident import Resident


class Run:
    """What a loader does. Threads take turns."""

    def __init__(
        self,
        source: Source,
        tokenizer: AnyTokenizer,
        config: LoaderConfig,
        device: Cpu | Cuda,
        processes: Processes,
        *,
        executor: Executor | None,
        encoder: Encoder | None,
        static: bool,
        resident: bool | str,
        group: Any,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        """Start the stages; raise as `Loader` does."""
        refuse_fake_tensors()
        if group is not None and isinstance(tokenizer, HuggingFaceTokenizer):
            # The date that a chat template writes is the same on all ranks.
            tokenizer = tokenizer.at(agree_on_clock(group, tokenizer.clock, device.device))
        self.source, self.tokenizer, self.config = source, tokenizer, config
        # only the reader gets the encoder: everything else, users included, sees the tokenizer that was given
        self._is_resident = bool(resident)
        encoding = choose_encoder(encoder, tokenizer, source)
        self.reader = reader_of(source, encoding, config, resident=self._is_resident)
        # a Hugging Face tokenizer sets its encoding up here, once, before processes are forked
        self._encoder = self.reader.tokenizer.encoder
        self.reader.check_template()
        # read before there is another process that reads
        self._sample = sample_of(source, config.seed)
        self._others = None
        if group is not None:
            refuse_other_data(group, shared_facts(self._fingerprint), device.device)
        elif are_all_ranks(config.rank, config.world_size):
            self._others = OtherRanks(shared_facts(self._fingerprint), config.rank, config.world_size)
        self._cache = cache
        self._data = self._sample + whole_digest(source, config.seed) if cache is not None else ""
        self.reader = self._cached(self.reader)
        # ordinary tensors, whatever mode the loader is made in, because they are written to in others
        with torch.inference_mode(False):
            self.resident = None
            if resident:
                self.resident = Resident(self.reader, device, executor, on_host=resident == "host")
                self._kernel = self.resident.kernel
            else:
                self._kernel = make_kernel(
                    executor, device.device, self.reader.layout, tokenizer.bos_id, config.ignore_index
                )
            self.make_outputs = outputs_maker(config, self.reader.layout, device.device)
            if static:
                # at the same addresses also after a load
                fixed = self.make_outputs()
                self.make_outputs = lambda: fixed
        self.device, self.device_actions = device.device, device
        self._processes, self.static = processes, static
        self.owner = os.getpid()
        self.turn = threading.RLock()
        self.passes, self.resumed, self._order_is_told = 0, False, False
        self._counts: dict[bool, tuple[int, int]] = {}
        # in all epochs: as counted, and as delivered in a whole pass, which is no part of a state
        self.known_batches: int | None = None
        self._delivered: int | None = None
        # the lengths of stored documents are known: each rank counts those of all, when it needs the number
        if group is not None and not isinstance(self.reader, StoreReader):
            self.known_batches = agree_on_most(group, lambda: self._count(all_ranks=False)[0], device.device)
        self._stages: Stages | None = None
        self._graph: Any = None
        self._start(None)

    def _cached(self, reader: Reader) -> Reader:
        """Return a reader of the same documents that reads what is cached, or caches what it reads."""
        if self._cache is None:
            return reader
        return cached(reader, self._cache, self._data, self.tokenizer)

    @torch.inference_mode(False)
    def _start(self, state: dict[str, Any] | None) -> None:
        """Set the stages up, from the beginning or from a state (`check_state`)."""
        self.reader = self._cached(self.reader)
        self.feed, ring = start_producer(self.reader, Start(state, self.known_batches), self._processes)
        if self._stages is not None:
            self._stages.close()
        self._stages = Stages(self.device_actions, self.feed, ring, self.make_outputs, self._kernel, static=self.static)
        self.upload, self.prefetcher = self._stages.upload, self._stages.prefetcher
        own = {str(number) for number in self.config.shards}
        if state is not None:
            # with balance_across a rank loads those of all ranks
            state = {**state, "lanes": {number: one for number, one in state["lanes"].items() if number in own}}
        self._first_state = state or state_of(initial_state(self.reader))
        self.step = self._first_state["step"]
        if self._graph is not None:
            self._give_to_graph()
        self._stats = Stats(ring_bytes=len(ring.buffer), encoder=self._encoder)

    def next(self) -> Batch:
        """Return the next batch."""
        self._refuse_fork()
        refuse_fake_tensors()
        with self.turn, torch.inference_mode(False):
            began = time.perf_counter()
            if self._graph is not None:
                raise RuntimeError("the batches of this loader go to its graph_batches; make another loader for `next`")
            try:
                outputs, facts = self.prefetcher.next()
            except StopIteration:
                self.end_pass()
                raise
            batch = as_batch(outputs, facts, self.step, self.reader.layout)
            self.count(batch, facts)
            self._stats.queued = self.feed.qsize()
            self.spend(time.perf_counter() - began)
        return batch

    def count(self, batch: Batch, facts: BatchFacts) -> None:
        """Count a batch as delivered."""
        self.step += 1
        self._stats.count(batch, facts)
        if self._others is not None:
            self._others.count()

    def spend(self, seconds: float) -> None:
        """Count seconds that the caller waited for `next` or `refill`."""
        self._stats.spend(seconds)

    def end_pass(self) -> None:
        """Note that all batches are delivered."""
        if self._first_state["step"] == 0:
            self._delivered = self.step

    def give_to(self, graph: Any) -> None:
        """From now on let `GraphBatches` take the batches, from the one after that delivered last."""
        with self.turn:
            if self.step and self.config.balance_across and self.config.world_size > 1:
                raise ValueError(
                    "graph_batches with balance_across resume from the states of all ranks: make them before the first "
                    "batch, or load a merged state"
                )
            self._graph = graph
            if self.step == 0:
                self._give_to_graph()
            else:
                self._start(check_state(self.state(), self._fingerprint, self.config, strict=True))

    def _give_to_graph(self) -> None:
        assert self._stages is not None
        tables = HostTables([slot.buffer for slot in self._stages.ring.slots])
        self.prefetcher = Prefetcher(self.device_actions, self.feed, tables, ahead=False)
        self._graph.begin()

    def check_graph(self, graph: Any) -> None:
        """Raise RuntimeError where the batches do not go to this `GraphBatches` any more, or there are none: closed."""
        self._refuse_fork()
        self.prefetcher.check_open()
        if self._graph is not graph:
            raise RuntimeError("the batches of this loader go to other graph_batches; use those that were made last")

    def is_over(self) -> bool:
        """Return whether no batch of the pass is left; waits until the next one is ready."""
        self._refuse_fork()
        with self.turn, torch.inference_mode(False):
            return self.step > 0 and self.config.epochs is not None and self.prefetcher.is_over()

    def restart(self) -> None:
        """Begin a new pass, unless this one has not begun."""
        self._refuse_fork()
        with self.turn:
            self.prefetcher.check_open()
            self.resumed = False
            if self.step == 0:
                return
            if not self._order_is_told and self.config.seed is not None:
                self._order_is_told = True
                warn_of_same_order(self.config.seed, self.config.epochs)
            self.passes += 1
            self._start(None)

    def _refuse_fork(self) -> None:
        if os.getpid() != self.owner:
            raise RuntimeError(f"this loader belongs to process {self.owner}; make one in this process")

    def shards(self) -> dict[str, Any]:
        """Return the state of each shard after the batch delivered last."""
        shards: dict[str, Any] = self._state()["lanes"]
        return shards

    def _state(self) -> dict[str, Any]:
        """Return {"step", "lanes"} after the batch delivered last."""
        packed = self.prefetcher.state
        # torch.distributed.checkpoint loads into the state that it is given: it must be nobody else's
        return copy.deepcopy(self._first_state) if packed is None else state_of(packed)

    def state(self) -> dict[str, Any]:
        """Return the state after the batch delivered last."""
        own, state = copy.deepcopy(self._fingerprint), self._state()
        add_digests(state, self.reader)
        return {"format": FORMAT, **state, "batches": self.known_batches, "fingerprint": own}

    def load(self, state: Mapping[str, Any], *, strict: bool) -> None:
        """Resume from a state; after an error all is as it was."""
        self.prefetcher.check_open()
        self._refuse_fork()
        with self.turn:
            before = self.tokenizer, self.reader, self._fingerprint, self.known_batches
            self._set_clock(clock_of(state))
            try:
                checked = check_state(state, self._fingerprint, self.config, strict=strict)
                self.known_batches = self.known_batches or batches_of(state, self._fingerprint)
                self._start(checked)
            except BaseException:
                self.tokenizer, self.reader, self._fingerprint, self.known_batches = before
                raise
            self.resumed = True

    def _set_clock(self, clock: str | None) -> None:
        """Let a chat template that writes a date write that of the run which is resumed."""
        if isinstance(self.tokenizer, HuggingFaceTokenizer) and clock not in (None, self.tokenizer.clock):
            self.tokenizer = self.tokenizer.at(clock)
            # its encoder may be another
            encoding = self.reader.tokenizer
            assert isinstance(encoding, HuggingFaceTokenizer)
            reader = reader_of(self.source, encoding.at(clock), self.config, resident=self._is_resident)
            self.reader = self._cached(reader)
            self._fingerprint = fingerprint(self.source, self._sample, self.tokenizer, self.config)

    @functools.cached_property
    def _fingerprint(self) -> dict[str, Any]:
        return fingerprint(self.source, self._sample, self.tokenizer, self.config)

    def batches(self) -> int:
        """Return the number of batches in all epochs, counted once."""
        if self._delivered is not None:
            return self._delivered
        if self.known_batches is None:
            self.known_batches, _ = self._count(all_ranks=True)
        return self.known_batches

    def tokens(self) -> int:
        """Return the number of tokens of this rank in all epochs, counted once."""
        return self._count(all_ranks=False)[1]

    def _count(self, *, all_ranks: bool) -> tuple[int, int]:
        all_ranks = all_ranks and self.config.world_size > 1
        if all_ranks not in self._counts:
            method = self._processes.start_method or DEFAULT_START_METHOD
            # a process that is not forked takes seconds to start
            forked = self._processes.num_workers if method == "fork" else 0
            self._counts[all_ranks] = count_batches(self.reader, all_ranks=all_ranks, forked=forked)
        return self._counts[all_ranks]

    def stats(self) -> StatsReport:
        """Return the time and memory spent so far."""
        ledger = Ledger.total(Ledger.of(shard["ledger"]) for shard in self.shards().values())
        tokens_so_far = None if self.config.epochs is None else ledger.positions_tokens
        return self._stats.report(self.prefetcher.waited_s, tokens_so_far)

    def close(self) -> None:
        """Release all; `next` raises from now on."""
        self.prefetcher.close()
        if self._graph is not None:
            self._graph.close()
        if self._stages is not None:
            self._stages.close()
        if self.resident is not None:
            self.resident.release()
