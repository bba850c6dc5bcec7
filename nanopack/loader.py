"""Drive the stages: conversations in, one batch at each `next(loader)`.

    producer/ fills a slot   ->   upload/: kernels/pack.py writes the tensors   ->   Loader.__next__   ->   Batch

The public face of nanopack. What a batch contains is decided by the arguments alone: `reference.batches` with the same
arguments gives the same batches, slowly.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch

from nanopack.batch import Batch, PieceTable
from nanopack.checks import check_bool, check_choice, check_int
from nanopack.config import (
    Encoder,
    Executor,
    Extra,
    FirstAssistant,
    LoaderConfig,
    Loss,
    LossWeights,
    OnError,
    ShardBy,
    TemplateName,
)
from nanopack.conversations.records import Conversations, open_conversations
from nanopack.distributed import agree_on_clock, agree_on_most, group_to_agree_in, rank_and_world_size
from nanopack.explain import Explanation, explain
from nanopack.ledger import Ledger, LedgerReport
from nanopack.notes import Notes
from nanopack.packing.packings import Packing, PackingName, as_packing
from nanopack.passes import NOT_A_DATA_SET, Pass, warn_of_empty_loop, warn_of_same_order
from nanopack.producer.feed import Feed, Inline
from nanopack.producer.process import Process
from nanopack.producer.producer import Producer, Start, count_batches, initial_state
from nanopack.producer.reader import Reader
from nanopack.producer.shard import state_of
from nanopack.producer.start import START_METHODS, StartMethod
from nanopack.render.templates import Template
from nanopack.ring.facts import BatchFacts
from nanopack.ring.ring import Ring
from nanopack.state import FORMAT, check_state, clock_of, fingerprint
from nanopack.stats import Stats, StatsReport
from nanopack.tokenizers.huggingface import HuggingFaceTokenizer
from nanopack.tokenizers.splintr import choose_encoder
from nanopack.tokenizers.tokenizer import TokenizerLike, load_tokenizer
from nanopack.upload.device import Device, open_device
from nanopack.upload.executor import make_kernel
from nanopack.upload.outputs import Outputs, outputs_maker
from nanopack.upload.prefetcher import Prefetcher
from nanopack.upload.upload import Upload


class Loader:
    """An iterator over packed `(B, T)` batches of chat conversations.

    Args:
        conversations: a data set (any object with `len` and `[int]`: a list, a `datasets.Dataset`, a
            `nanopack.mixture`), or path(s), folders or globs of `.jsonl`, `.ndjson`, `.json` (also `.gz`, `.zst`),
            `.parquet`, `.arrow`. A conversation is `{"messages": [{"role", "content"}, ...]}`, ShareGPT's
            `{"conversations": [{"from", "value"}, ...]}`, a bare list of messages, `{"prompt", "completion"}`,
            `{"instruction", "input", "output"}`, `{"text": ...}`, or tokens, `{"input_ids": ...}` with `"labels"` or
            `"loss_mask"`; `"weight"` (a float >= 0) is its own loss weight. docs/data.md says what every key does; one
            that matters and cannot be honoured is an error.
        tokenizer: a `tiktoken.Encoding`, a nanochat tokenizer folder or its `tokenizer.pkl`, an object whose `.enc` is
            an `Encoding`, a fast Hugging Face tokenizer, or `"chat32k"`, which ships with nanopack.
        batch_size: rows of a batch, B.
        seq_len: tokens of a row, T.

    What the batches are: part of a checkpoint's fingerprint.

    Args:
        packing: a name, or an object with options:

            ================= ================================ =========================================================
            `"best_fit"`      `BestFit(window=64,              rows of whole documents, hardly any padding, none waits
                              max_age=128)`                    long (TRL: "bfd")
            `"best_fit_pad"`  `BestFitPad(window=100)`         the same, but a document may wait forever: nanochat SFT
            `"best_fit_crop"` `BestFitCrop(window=1000)`       full rows, by cropping documents: nanochat pretraining
            `"stream"`        `Stream(overlap=False)`          documents end to end: nanochat midtraining (TRL:
                                                               "wrapped")
            `"pad"`           `Pad()`                          one document a row
            ================= ================================ =========================================================

        template: `"nanochat"`, `"chatml"`, `"llama3"`, a `nanopack.Template` of your own, or `"hf"`: the chat template
            of a transformers tokenizer (what {% generation %} marks is in the loss; see `nanopack.render.hf_template`).
        first_assistant: what to do with a chat that begins with the assistant, but for a system message: `"keep"` it,
            if the template can (nanochat cannot); `"raise"`; `"drop"` what comes before the first user message; or put
            an empty user message there (`"empty_user"`).
        loss: `"assistant"`: the targets that the template says, but for messages with `weight` 0; `"last"`: of those,
            the last answer's; `"all"`: every token, whatever masks and weights say.
        loss_weights: None, `"token"` (1.0 for each target in the loss) or `"conversation"` (1 / its targets in the
            loss, so that each conversation counts once); a conversation's own weight multiplies either.
        boundary_loss: False: the first token of a document is never a target.
        ignore_index: value of `targets` outside the loss.
        max_document_tokens: longer documents are cut to this many tokens (and the cut is counted); None: no limit.
        extras: any of `"positions"`, `"doc_ids"`, `"cu_seqlens"`.
        max_pieces: capacity of `cu_seqlens` in pieces per row, 1 to T; None: T // 8 + 1.
        seed: seed of a new order of the conversations in each pass, the same on all ranks; None: their own order.
        epochs: passes over the data, all of it delivered, the last rows padded; None: endless. All ranks deliver
            equally many batches: those that have fewer end with batches of padding.
        rank, world_size: which shard of the conversations this process reads; from `torch.distributed` where that is
            initialised, else 0 of 1. Pass both or neither.
        shard: `"rank"`: each rank packs one shard of the conversations; `"row"`: each row of the batches of all ranks
            together does, so that these do not depend on the number of ranks, and a run can resume with another.

    How they are made: free to change between runs.

    Args:
        device: device of the tensors: a CUDA device (ROCm included) or the CPU; None: CUDA where there is one.
        executor: `"torch"` or `"triton"` (on the CPU only under Triton's interpreter, TRITON_INTERPRET=1); None: triton
            on a GPU, torch elsewhere.
        encoder: `"fast"`: splintr-rs encodes instead of tiktoken, faster (`pip install nanopack[fast]`). The ids are
            the same: known differences go to tiktoken, and the two are compared on a sample of the data at
            construction, then on one text in a thousand. None: tiktoken, or the tokenizer itself.
        num_workers: number of tokenizing processes. 0: none, everything runs in the caller's thread. 1: the producer
            process tokenizes as well. n >= 2: the producer packs and n more processes tokenize (n + 1 in all).
        prefetch: batches that the producer makes ahead of time.
        static: every batch is written into the same tensors (for CUDA graphs), valid until the next call.
        on_error: `"raise"` for a bad conversation, or `"skip"` it (counted and logged). What cannot be read at all (a
            file that changed or is gone, a store that does not answer) stops the run either way, after a few tries;
            so do 100 bad conversations in a row, or more than half of the first 1,000 or more that a shard reads.
        process_group: process group (gloo, NCCL) of all ranks. With `epochs`, one all_reduce at construction agrees on
            the number of batches, so all ranks construct their loaders together. None: the default group of
            `torch.distributed` where it has `world_size` ranks; elsewhere a rank that runs out must render every other
            rank's data to find that number: slow.
        start_method: how the processes are started. `"fork"` takes milliseconds, but a lock of the data set that
            another thread holds just then stays locked in them for ever. `"spawn"` and `"forkserver"` import the main
            module first, seconds, which needs the `if __name__ == "__main__":` guard, and pickle the conversations.
            None: fork on Linux, spawn elsewhere.

    Raises:
        ValueError: an argument is invalid; the message names it, its value and what is allowed.
        ConversationError: (from `next`) a bad conversation; the message names file, line and message.
        StorageError: (from `next`) the data could not be read; the message names the file and the cause.
        ImportError: `encoder="fast"` without splintr-rs.
        EncoderError: (from `next`) the fast encoder gave a text other ids than tiktoken.
        ProducerError: the producer process died at its start, or (from `next`) later, or raised something other than an
            Exception.

    >>> with Loader([{"text": "Hello there"}], "chat32k", batch_size=1, seq_len=4, packing="stream") as loader:
    ...     inputs, targets = next(loader)
    >>> inputs.tolist(), targets.tolist()
    ([[32759, 5766, 986, 32759]], [[5766, 986, 32759, 5766]])
    """

    def __init__(
        self,
        conversations: Conversations,
        tokenizer: TokenizerLike,
        batch_size: int = 32,
        seq_len: int = 2048,
        *,
        # what the batches are: part of a checkpoint's fingerprint
        packing: PackingName | Packing = "best_fit",
        template: TemplateName | Template = "nanochat",
        first_assistant: FirstAssistant = "keep",
        loss: Loss = "assistant",
        loss_weights: LossWeights | None = None,
        boundary_loss: bool = True,
        ignore_index: int = -100,
        max_document_tokens: int | None = None,
        extras: Collection[Extra] = (),
        max_pieces: int | None = None,
        seed: int | None = None,
        epochs: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        shard: ShardBy = "rank",
        # how they are made: free to change between runs
        device: str | torch.device | None = None,
        executor: Executor | None = None,
        encoder: Encoder | None = None,
        num_workers: int = 1,
        prefetch: int = 4,
        static: bool = False,
        on_error: OnError = "raise",
        process_group: torch.distributed.ProcessGroup | None = None,
        start_method: StartMethod | None = None,
    ) -> None:
        rank, world_size = rank_and_world_size(rank, world_size)
        self.config = LoaderConfig(
            batch_size=batch_size,
            seq_len=seq_len,
            packing=as_packing(packing),
            template=template,
            first_assistant=first_assistant,
            loss=loss,
            loss_weights=loss_weights,
            boundary_loss=boundary_loss,
            ignore_index=ignore_index,
            max_document_tokens=max_document_tokens,
            extras=extras,
            max_pieces=max_pieces,
            seed=seed,
            epochs=epochs,
            rank=rank,
            world_size=world_size,
            shard=shard,
            on_error=on_error,
        )
        check_int("num_workers", num_workers, least=0)
        check_int("prefetch", prefetch, least=1)
        check_bool("static", static)
        check_choice("start_method", start_method, START_METHODS)
        device_api = open_device(device)
        self.device = device_api.device
        self.tokenizer = load_tokenizer(tokenizer)
        group = group_to_agree_in(process_group, epochs, world_size)
        if group is not None and isinstance(self.tokenizer, HuggingFaceTokenizer):
            # The date that a chat template writes is the same on all ranks.
            self.tokenizer = self.tokenizer.at(agree_on_clock(group, self.tokenizer.clock, self.device))
        self.source = open_conversations(conversations, shuffled=seed is not None)
        # only the reader gets the encoder: everything else, users included, sees the tokenizer that was given
        self._reader = Reader(self.source, choose_encoder(encoder, self.tokenizer, self.source), self.config)
        # a Hugging Face tokenizer sets its encoding up here, once, before processes are forked
        self._encoder = self._reader.tokenizer.encoder
        self._reader.check_template()
        # its sample is read before there is another process that reads
        self._fingerprint = fingerprint(self.source, self.tokenizer, self.config)
        layout = self._reader.layout
        # ordinary tensors, whatever mode the loader is made in, because they are written to in others
        with torch.inference_mode(False):
            self._kernel = make_kernel(executor, self.device, layout, self.tokenizer.bos_id, ignore_index)
            self._make_outputs = outputs_maker(self.config, layout, self.device)
            if static:
                # at the same addresses also after load_state_dict
                fixed = self._make_outputs()
                self._make_outputs = lambda: fixed
        self._device: Device = device_api
        self._workers, self._prefetch, self._start_method = num_workers, prefetch, start_method
        self._static = static
        self._owner = os.getpid()
        self._batches: int | None = None
        self._counts: dict[bool, tuple[int, int]] = {}
        self._turn = threading.RLock()
        self._passes, self._resumed, self._order_is_told = 0, False, False
        if group is not None:
            self._batches = agree_on_most(group, lambda: self._count(all_ranks=False)[0], self.device)
        self._release: Callable[[], Any] | None = None
        self._start(None)

    @torch.inference_mode(False)
    def _start(self, state: dict[str, Any] | None) -> None:
        """Set the stages up, from the beginning or from a state (`check_state`)."""
        feed, ring = self._start_producer(Start(state, self._batches))
        if self._release is not None:
            self._release()
        with contextlib.ExitStack() as held:
            held.callback(feed.close)
            if self._device.pin(ring.buffer):
                held.callback(self._device.unpin, ring.buffer)
            slots = [torch.from_numpy(slot.buffer) for slot in ring.slots]
            upload = Upload(self._device, slots, self._make_outputs, self._kernel, static=self._static)
            held.callback(upload.close)
            # a second time, to end first: whatever fails above ends it too
            held.callback(feed.close)
            # runs at close(), when the loader is dropped, and at the interpreter's exit
            self._release = weakref.finalize(self, _close, os.getpid(), held.pop_all())
        self._feed, self._upload = feed, upload
        self._prefetcher = Prefetcher(self._device, feed, upload, ahead=True)
        self._first_state = state or state_of(initial_state(self._reader))
        self._step = self._first_state["step"]
        self._stats = Stats(ring_bytes=len(ring.buffer), encoder=self._encoder)

    def _start_producer(self, start: Start) -> tuple[Feed, Ring]:
        if self._workers == 0:
            ring = Ring(self._reader.layout, slots=1)
            return Inline(Producer(self._reader, start), ring), ring
        # one slot more than those that are ready: the one being filled
        helpers = self._workers if self._workers > 1 else 0
        process = Process(self._reader, self._prefetch + 1, helpers, start, self._start_method)
        return process, process.ring

    def __iter__(self) -> Iterator[Batch]:
        """Return an iterator over the rest of the pass, or over a new pass where no batch is left of this one.

        A pass is all batches of `epochs`. Each has the same batches, in the same order, and begins at step 0 with new
        `ledger()` and `stats()`; `state_dict()` is a place in a pass. A loop left early is resumed by the next `iter`.
        The first `iter` after `load_state_dict` resumes from the state, even where that is the end: the loop is then
        empty, and a warning says so.
        """
        resumed, self._resumed = self._resumed, False
        if not self._prefetcher.closed and self._is_over():
            if resumed:
                warn_of_empty_loop()
            else:
                self.restart()
        return Pass(self.__next__, lambda: self._passes)

    def restart(self) -> None:
        """Begin a new pass: the next batch is the first one again, whatever was delivered before."""
        self._refuse_fork()
        with self._turn:
            self._prefetcher.check_open()
            self._resumed = False
            if self._step == 0:
                return
            if not self._order_is_told and self.config.seed is not None:
                self._order_is_told = True
                warn_of_same_order(self.config.seed, self.config.epochs)
            self._passes += 1
            self._start(None)

    def _is_over(self) -> bool:
        """Return whether no batch of the pass is left; waits until the next one is ready."""
        self._refuse_fork()
        with self._turn, torch.inference_mode(False):
            return self._step > 0 and self.config.epochs is not None and self._prefetcher.is_over()

    def __next__(self) -> Batch:
        """Return the next batch. After the end or an error every further call raises that again.

        Threads that call it take turns. To share a pass, they share one `iter(loader)`.
        """
        self._refuse_fork()
        with self._turn, torch.inference_mode(False):
            began = time.perf_counter()
            outputs, facts = self._prefetcher.next()
            batch = self._batch(outputs, facts)
            self._step += 1
            self._stats.queued = self._feed.qsize()
            self._stats.count(batch, facts, time.perf_counter() - began)
        return batch

    def _refuse_fork(self) -> None:
        if os.getpid() != self._owner:
            raise RuntimeError(f"this loader belongs to process {self._owner}; make one in this process")

    def _batch(self, outputs: Outputs, facts: BatchFacts) -> Batch:
        cu_seqlens = outputs.cu_seqlens
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens[: (self._reader.layout.max_segments or 0) + 1]
        return Batch(
            inputs=outputs.inputs,
            targets=outputs.targets,
            weights=outputs.weights,
            positions=outputs.positions,
            doc_ids=outputs.doc_ids,
            cu_seqlens=cu_seqlens,
            step=self._step,
            num_loss_tokens=facts.num_loss_tokens,
            num_tokens=facts.num_tokens,
            weight_sum=facts.weight_sum,
            max_seqlen=facts.max_seqlen,
            epoch=facts.epoch,
            progress=facts.progress,
            last=facts.last,
            word_pieces=PieceTable(facts.pieces, facts.pieces_per_row),
        )

    @property
    def producer_pid(self) -> int | None:
        """Process id of the producer, for py-spy and the like; None with num_workers=0."""
        return self._feed.pid

    def ledger(self) -> LedgerReport:
        """Count what became of every conversation, token and position up to the batch delivered last; see `Ledger`.

        For a mixture, `sources` has the counts of each source by name.
        """
        shards = list(self._state()["lanes"].values())
        packed = {name: sum(shard["packer"][name] for shard in shards) for name in ("packed", "emitted", "cropped")}
        sources = {
            name: Ledger.total(Ledger.of(shard["sources"][number]) for shard in shards)
            for number, name in enumerate(self.source.names)
        }
        notes = Notes.total(Notes.of(shard.get("notes", "")) for shard in shards)
        return self._ledger().report(packed, sources, notes)

    def _ledger(self) -> Ledger:
        return Ledger.total(Ledger.of(shard["ledger"]) for shard in self._state()["lanes"].values())

    def _state(self) -> dict[str, Any]:
        """Return {"step", "lanes"} after the batch delivered last."""
        packed = self._prefetcher.state
        # torch.distributed.checkpoint loads into the state that it is given: it must be nobody else's
        return copy.deepcopy(self._first_state) if packed is None else state_of(packed)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the run after the batch delivered last: plain data (JSON-able), kilobytes.

        `load_state_dict` of a loader with the same arguments resumes from it, with exactly the batches that this one
        would have given next. Prefetched batches are not part of it.
        """
        return {"format": FORMAT, **self._state(), "fingerprint": copy.deepcopy(self._fingerprint)}

    def load_state_dict(self, state_dict: Mapping[str, Any], *, strict: bool = True) -> None:
        """Resume from a state of this rank, or of all ranks (`nanopack.merge_states`); at any time.

        Only the conversations that waited for a row are read again, so it takes the same time at any step. `device`,
        `executor`, `encoder`, `num_workers`, `prefetch`, `extras` and `on_error` may differ from what they were; with
        shard="row" also `world_size`, when `batch_size * world_size` is the same.

        Raises ValueError, naming every difference, for a state of other data, tokenizer or arguments; with
        strict=False it is loaded all the same, as far as that is possible. After an error the loader is as it was. Data
        are compared by their number and a sample, and by the conversations that waited: where those have changed,
        ValueError is raised here with num_workers=0, else by the next `next`.
        """
        self._prefetcher.check_open()
        self._refuse_fork()
        with self._turn:
            before = self.tokenizer, self._reader, self._fingerprint
            self._set_clock(clock_of(state_dict))
            try:
                self._start(check_state(state_dict, self._fingerprint, self.config, strict=strict))
            except BaseException:
                self.tokenizer, self._reader, self._fingerprint = before
                raise
            self._resumed = True

    def _set_clock(self, clock: str | None) -> None:
        """Let a chat template that writes a date write that of the run which is resumed."""
        if isinstance(self.tokenizer, HuggingFaceTokenizer) and clock not in (None, self.tokenizer.clock):
            self.tokenizer = self.tokenizer.at(clock)
            self._reader = Reader(self.source, self.tokenizer, self.config)
            self._fingerprint = fingerprint(self.source, self.tokenizer, self.config)

    def __len__(self) -> int:
        """Return the number of batches in all epochs, from the first one on; exact.

        The first call renders all the data once, unless the ranks agreed through a process group. `list(loader)` and
        `tqdm(loader)` ask for it too; `list(iter(loader))` and `tqdm(iter(loader))` do not. Raises TypeError where
        `epochs` is None.
        """
        if self.config.epochs is None:
            raise TypeError(f"the batches are endless; pass epochs to have a number of them. {NOT_A_DATA_SET}")
        if self._batches is None:
            self._batches, _ = self._count(all_ranks=True)
        return self._batches

    def __getitem__(self, index: Any) -> Batch:
        """Raise TypeError: torch's DataLoader takes what has no `__getitem__` for a data set too."""
        raise TypeError(NOT_A_DATA_SET)

    def __reduce__(self) -> Any:
        """Raise TypeError: a process and its memory cannot be copied or pickled."""
        raise TypeError(
            f"a loader belongs to its process ({self._owner}) and is neither copied nor pickled: send the arguments to "
            f"the other process and make one there, with rank and world_size; state_dict() says where it stands"
        )

    def __bool__(self) -> bool:
        """Always True, so that `if loader:` does not call `len()`, which may render the whole data set."""
        return True

    @functools.cached_property
    def tokens_total(self) -> int:
        """Tokens that this rank trains on in all epochs, without padding; exact.

        This rank's data are rendered for it, once; not again where `len` has rendered them. Raises TypeError where
        `epochs` is None.
        """
        if self.config.epochs is None:
            raise TypeError("the tokens are endless; pass epochs to have a number of them")
        return self._count(all_ranks=False)[1]

    def _count(self, *, all_ranks: bool) -> tuple[int, int]:
        """Return the batches and tokens of all epochs, see `count_batches`; each is counted once."""
        all_ranks = all_ranks and self.config.world_size > 1
        if all_ranks not in self._counts:
            self._counts[all_ranks] = count_batches(self._reader, all_ranks=all_ranks)
        return self._counts[all_ranks]

    def stats(self) -> StatsReport:
        """Return where time and memory went so far; see `StatsReport` for names and units."""
        tokens_so_far = None if self.config.epochs is None else self._ledger().positions_tokens
        return self._stats.report(self._prefetcher.waited_s, tokens_so_far)

    def explain(self, batch: Batch, row: int, col: int) -> Explanation:
        """Explain a position: its conversation, message, role and text, and why it is in the loss or not.

        Raises IndexError where the batch has no such row or column, TypeError where one is no int.
        """
        return explain(
            batch,
            row,
            col,
            source=self.source,
            tokenizer=self.tokenizer,
            render=self._reader.render,
            config=self.config,
        )

    def close(self) -> None:
        """End the loader: `next` raises from now on. Batches already delivered stay valid. May be called twice."""
        self._prefetcher.close()
        if self._release is not None:
            self._release()

    def __enter__(self) -> Loader:
        """Return the loader; leaving the block closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close(owner: int, held: contextlib.ExitStack) -> None:
    """Release a loader's resources, but not in a process forked from its owner."""
    if os.getpid() == owner:
        held.close()
