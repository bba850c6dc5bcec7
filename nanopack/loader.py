"""Drive the stages: conversations in, one batch at each `next(loader)`.

    producer.py fills a slot   ->   delivery.py: kernels/pack.py writes the tensors   ->   Loader.__next__   ->   Batch

The public face of nanopack. What a batch contains is decided by the arguments alone: `reference.batches` with the same
arguments gives the same batches, slowly.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
import pickle
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from nanopack.batch import Batch
from nanopack.config import LoaderConfig, check_bool, check_int
from nanopack.conversations.records import open_conversations
from nanopack.distributed import agree_on_clock, agree_on_most, check_group, rank_and_world_size
from nanopack.explain import Explanation, explain
from nanopack.ledger import Ledger
from nanopack.mixture import Mixture
from nanopack.producer.feed import Feed, Inline
from nanopack.producer.process import Process
from nanopack.producer.producer import Produced, Producer, Start
from nanopack.render.templates import Template
from nanopack.ring.ring import Ring
from nanopack.state import FORMAT, check_state, clock_of, fingerprint
from nanopack.stats import Stats
from nanopack.tokenizers.huggingface import HuggingFaceTokenizer
from nanopack.tokenizers.splintr import choose_encoder
from nanopack.tokenizers.tokenizer import load_tokenizer
from nanopack.upload.delivery import Delivery
from nanopack.upload.device import Device, open_device
from nanopack.upload.executor import make_kernel
from nanopack.upload.memory import Memory
from nanopack.upload.outputs import Outputs, outputs_maker
from nanopack.upload.upload import Upload

log = logging.getLogger("nanopack")


class Loader:
    """An iterator over packed `(B, T)` batches of chat conversations.

    Args:
        conversations: a data set (any object with `len` and `[int]`: a list, a `datasets.Dataset`, a
            `nanopack.mixture`), or path(s), folders or globs of `.jsonl`, `.ndjson`, `.json` (also `.gz`, `.zst`),
            `.parquet`, `.arrow`. A conversation is `{"messages": [{"role", "content"}, ...]}`, ShareGPT's
            `{"conversations": [{"from", "value"}, ...]}`, a bare list of messages, `{"prompt", "completion"}`,
            `{"instruction", "input", "output"}`, `{"text": ...}`, or tokens that are ready, `{"input_ids": ...}` with
            `"labels"` or `"loss_mask"`; `"weight"` (a float >= 0) is its own loss weight. docs/data.md says what every
            key does; one that matters and cannot be honoured is an error.
        tokenizer: a `tiktoken.Encoding`, a nanochat tokenizer folder or its `tokenizer.pkl`, an object whose `.enc` is
            an `Encoding`, a fast Hugging Face tokenizer, or `"chat32k"`, which ships with nanopack.
        batch_size: rows of a batch, B.
        seq_len: tokens of a row, T.
        packing: `"best_fit"` (rows of whole documents, hardly any padding, none waits long), `"stream"` (documents end
            to end: nanochat midtraining), `"best_fit_pad"` (nanochat SFT), `"best_fit_crop"` (nanochat pretraining),
            `"pad"` (one document a row).
        loss: `"assistant"`: the targets that the template says, but for messages with `weight` 0; `"last"`: of those,
            the last answer's; `"all"`: every token, whatever masks and weights say.
        loss_weights: None, `"token"` (1.0 where trained) or `"conversation"` (1 / its trained tokens, so that each
            conversation counts once); a conversation's own weight multiplies either.
        extras: any of `"positions"`, `"doc_ids"`, `"cu_seqlens"`.
        max_pieces: pieces a row for which `cu_seqlens` has room, at most T; T // 8 + 1 if None.
        encoder: `"fast"`: splintr-rs encodes in tiktoken's stead, sooner (`pip install nanopack[fast]`).
            The ids are the same: known differences go to tiktoken, the two are compared here on a fuzz and a sample of
            the data (a tenth of a second), and then on one text in a thousand. None: tiktoken, or the tokenizer itself.
        template: `"nanochat"`, `"chatml"`, `"llama3"`, a `nanopack.Template` of your own, or `"hf"`: the chat template
            of a transformers tokenizer (what {% generation %} marks is trained; see `nanopack/chat_template.py`).
        first_assistant: what to do with a chat that begins with the assistant (or whose system message it follows):
            `"keep"` it, if the template can (nanochat cannot), `"raise"`, `"drop"` what comes before the first user
            message, or put an empty user message there (`"empty_user"`).
        max_document_tokens: a document longer than this is cut (and counted).
        window: documents among which the best_fit packings choose: 64, 100 (`best_fit_pad`), 1000 (`best_fit_crop`).
        max_age: `best_fit` only: a document that has waited so many rows opens the next one; 128 if None.
        refill: documents that are read at a time when fewer than `window` wait.
        overlap: `stream` only: a batch advances by B * T tokens instead of B * T + 1, so that every token is a target.
        boundary_loss: False: the first token of a document is never a target.
        ignore_index: what `targets` holds where nothing is trained.
        rank, world_size: which share of the conversations this process reads; from `torch.distributed` where that is
            initialised, else 0 of 1.
        shard: `"rank"`: each rank packs its own share of the conversations; `"row"`: each row of all ranks' batches
            together does, so that these do not depend on the number of ranks, and a run can go on with another.
        seed: a new order of the conversations in each pass, the same on all ranks; None: their own order.
        epochs: passes over the data, all of it delivered, the last rows padded; None: endless. All ranks deliver
            equally many batches: those that have fewer end with batches of padding.
        device: where the tensors lie: a CUDA device (ROCm included) or the CPU; None: CUDA where there is one.
        executor: `"torch"` or `"triton"` (on the CPU only under Triton's interpreter, TRITON_INTERPRET=1); None: triton
            on a GPU, torch elsewhere.
        num_workers: number of tokenizing processes. 0: none, everything runs in the caller's thread. 1: the producer
            process tokenizes as well. n >= 2: the producer packs and n more processes tokenize (n + 1 in all).
        prefetch: batches that the producer makes ahead.
        static: every batch is written into the same tensors (for CUDA graphs); they hold until the next call.
        on_error: `"raise"` at a bad conversation, or `"skip"` it (counted and logged).
        process_group: with `epochs`, the process group (gloo, NCCL) of all ranks, through which they agree here, by one
            all_reduce, how many batches the longest has; without, a rank that is done renders the others' shares.

    Raises:
        ValueError: an argument cannot be; the message names it, its value and what is allowed.
        ConversationError: (from `next`) a bad conversation; the message names file, line and message.
        ImportError: `encoder="fast"` without splintr-rs.
        EncoderError: (from `next`) a text got other ids from the fast encoder than from tiktoken.
        ProducerError: (from `next`) the producer's process died, or was stopped by what is no ordinary exception.

    >>> with Loader([{"text": "Hello there"}], "chat32k", batch_size=1, seq_len=4, packing="stream") as loader:
    ...     inputs, targets = next(loader)
    >>> inputs.tolist(), targets.tolist()
    ([[32759, 5766, 986, 32759]], [[5766, 986, 32759, 5766]])
    """

    def __init__(
        self,
        conversations: Any,
        tokenizer: Any,
        batch_size: int = 32,
        seq_len: int = 2048,
        *,
        packing: str = "best_fit",
        loss: str = "assistant",
        loss_weights: str | None = None,
        extras: Sequence[str] = (),
        max_pieces: int | None = None,
        encoder: str | None = None,
        template: str | Template = "nanochat",
        first_assistant: str = "keep",
        max_document_tokens: int | None = None,
        window: int | None = None,
        max_age: int | None = None,
        refill: int = 1,
        overlap: bool = False,
        boundary_loss: bool = True,
        ignore_index: int = -100,
        rank: int | None = None,
        world_size: int | None = None,
        shard: str = "rank",
        seed: int | None = None,
        epochs: int | None = None,
        device: str | torch.device | None = None,
        executor: str | None = None,
        num_workers: int = 1,
        prefetch: int = 4,
        static: bool = False,
        on_error: str = "raise",
        process_group: Any = None,
    ) -> None:
        rank, world_size = rank_and_world_size(rank, world_size)
        self.config = LoaderConfig(
            batch_size=batch_size,
            seq_len=seq_len,
            packing=packing,
            loss=loss,
            loss_weights=loss_weights,
            extras=extras,
            max_pieces=max_pieces,
            template=template,
            first_assistant=first_assistant,
            max_document_tokens=max_document_tokens,
            window=window,
            max_age=max_age,
            refill=refill,
            overlap=overlap,
            boundary_loss=boundary_loss,
            ignore_index=ignore_index,
            rank=rank,
            world_size=world_size,
            shard=shard,
            seed=seed,
            epochs=epochs,
            on_error=on_error,
        )
        check_int("num_workers", num_workers, least=0)
        check_int("prefetch", prefetch, least=1)
        check_bool("static", static)
        device_api = open_device(device)
        self.device = device_api.device
        self.tokenizer = load_tokenizer(tokenizer)
        if process_group is not None:
            if epochs is None:
                raise ValueError("process_group has no meaning without epochs; leave it out, or pass epochs")
            check_group(process_group, world_size)
            if isinstance(self.tokenizer, HuggingFaceTokenizer):
                clock = agree_on_clock(process_group, self.tokenizer.clock, self.device)
                self.tokenizer = self.tokenizer.at(clock)
        self.source = open_conversations(conversations)
        # what only encodes: everything else, and whoever looks at the loader, has the tokenizer that was given
        self._encoder = choose_encoder(encoder, self.tokenizer, self.source)
        self._producer = Producer(self.source, self._encoder, self.config)
        layout = self._producer.layout
        self._kernel = make_kernel(executor, self.device, layout, self.tokenizer.bos_id, ignore_index)
        self._make_outputs = outputs_maker(self.config, layout, self.device)
        if static:
            # at the same addresses also when a state is taken up
            fixed = self._make_outputs()
            self._make_outputs = lambda: fixed
        self._device: Device = device_api
        self._workers, self._prefetch = num_workers, prefetch
        self._static = static
        self._owner = os.getpid()
        self._batches: int | None = None
        if process_group is not None:
            self._batches = agree_on_most(
                process_group, lambda: self._count_batches(of_all_ranks=False)[0], self.device
            )
        self._shut: Callable[[], Any] | None = None
        self._start(None)

    def _start(self, state: dict[str, Any] | None) -> None:
        """Set the stages up, to go on from a state or to begin."""
        start = Start(state, self._batches)
        parts = (self.source, self._encoder, self.config)
        if self._workers == 0:
            self._producer = Producer(*parts, start)
            ring = Ring(self._producer.layout, slots=1)
            self._feed: Feed = Inline(self._producer, ring)
        else:
            # one slot beside those that are ready: the one being filled
            helpers = self._workers if self._workers > 1 else 0
            process = Process(*parts, self._producer.layout, self._prefetch + 1, helpers, start)
            ring, self._feed = process.ring, process
        if self._shut is not None:
            self._shut()
        self._memory = Memory(self._device, self._feed, ring, self._owner)
        # runs also when the loader is dropped, and at the interpreter's exit
        self._shut = weakref.finalize(self, self._memory.give_back)
        self._memory.pin()
        slots = [torch.from_numpy(slot.buffer) for slot in ring.slots]
        self._upload = Upload(self._device, slots, self._make_outputs, self._kernel, static=self._static)
        self._memory.upload = self._upload
        books = pickle.dumps(state) if state else self._producer.books()
        self._delivery = Delivery(self._device, self._feed, self._upload, books, ahead=True)
        self._step = state["step"] if state else 0
        self._stats = Stats(ring_bytes=len(ring.buffer))

    def __iter__(self) -> Iterator[Batch]:
        """Return the loader itself: it goes on where it stands."""
        return self

    def __next__(self) -> Batch:
        """Return the next batch. After the end or an error every further call raises that again."""
        self._refuse_fork()
        began = time.perf_counter()
        outputs, produced = self._delivery.next()
        batch = self._batch(outputs, produced)
        self._step += 1
        self._stats.queued = self._feed.ready
        self._stats.count(batch, produced, time.perf_counter() - began)
        return batch

    def _refuse_fork(self) -> None:
        if os.getpid() != self._owner:
            raise RuntimeError(f"this loader belongs to process {self._owner}; make one in this process")

    def _batch(self, outputs: Outputs, produced: Produced) -> Batch:
        filled, cu_seqlens = produced.filled, outputs.cu_seqlens
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens[: (self._producer.layout.max_segments or 0) + 1]
        return Batch(
            inputs=outputs.inputs,
            targets=outputs.targets,
            weights=outputs.weights,
            positions=outputs.positions,
            doc_ids=outputs.doc_ids,
            cu_seqlens=cu_seqlens,
            step=self._step,
            num_loss_tokens=sum(filled.row_trained),
            num_tokens=filled.num_tokens,
            weight_sum=filled.weight_sum,
            max_seqlen=filled.max_seqlen,
            epoch=produced.epoch,
            progress=produced.progress,
            last=produced.last,
            word_pieces=filled.word_pieces,
        )

    def ledger(self) -> dict[str, Any]:
        """Return what happened to every conversation, token and slot up to the batch delivered last; see `Ledger`.

        Of a mixture, `sources` tells it for each source.
        """
        names = self.source.names if isinstance(self.source, Mixture) else ()
        return self._ledger().report({name: self._ledger(number) for number, name in enumerate(names)})

    def _ledger(self, source: int | None = None) -> Ledger:
        lanes = pickle.loads(self._delivery.books)["lanes"].values()
        counted = [lane["ledger"] if source is None else lane["sources"][source] for lane in lanes]
        return Ledger.total(map(Ledger.of, counted))

    def state_dict(self) -> dict[str, Any]:
        """Return where the run stands after the batch delivered last: plain data (JSON-able), kilobytes.

        `load_state_dict` of a loader with the same arguments goes on from there, with the very batches that this one
        would have given next. What was prefetched is not part of it.
        """
        # torch.distributed.checkpoint loads into what it is given: that must not be the fingerprint to compare with
        return {"format": FORMAT, **pickle.loads(self._delivery.books), "fingerprint": copy.deepcopy(self._fingerprint)}

    def load_state_dict(self, state_dict: Mapping[str, Any], *, strict: bool = True) -> None:
        """Go on from a state: of this rank, or of all ranks (`nanopack.merge_states`). It may come at any time.

        Only the conversations that waited for a row are read again, so it takes as long at any step. `device`,
        `executor`, `encoder`, `num_workers`, `prefetch`, `extras` and `on_error` may differ from what they were; with
        shard="row" also `world_size`, when `batch_size * world_size` is the same.

        Raises ValueError, naming every difference, for a state of other data, tokenizer or arguments; with
        strict=False it is loaded all the same, as far as that is possible. The loader then stands where it stood. The
        data are compared by their number and a sample, and by the conversations that waited: where those have changed,
        ValueError comes from here with num_workers=0, else from the next `next`.
        """
        self._delivery.check_open()
        self._refuse_fork()
        given = self.tokenizer, self._encoder, self._producer, self._fingerprint
        if isinstance(self._encoder, HuggingFaceTokenizer):
            # The date that a chat template writes is the one that it wrote.
            self.tokenizer = self._encoder = self._encoder.at(clock_of(state_dict))
            self._fingerprint = fingerprint(self.source, self.tokenizer, self.config)
            if self.tokenizer is not given[0]:
                self._producer = Producer(self.source, self._encoder, self.config)
        try:
            self._start(check_state(state_dict, self._fingerprint, self.config, strict=strict))
        except BaseException:
            self.tokenizer, self._encoder, self._producer, self._fingerprint = given
            raise

    @functools.cached_property
    def _fingerprint(self) -> dict[str, Any]:
        return fingerprint(self.source, self.tokenizer, self.config)

    def __len__(self) -> int:
        """Return how many batches there are in all, from the first one on; exact.

        All the data are rendered for it, once, unless `process_group` was given; `list(loader)` asks for it too. Raises
        TypeError where `epochs` is None.
        """
        if self.config.epochs is None:
            raise TypeError("the batches are endless; pass epochs to have a number of them")
        if self._batches is None:
            self._batches, _ = self._count_batches(of_all_ranks=True)
        return self._batches

    def __bool__(self) -> bool:
        """Return True: a loader is something, whether it has batches or not."""
        return True

    @functools.cached_property
    def tokens_total(self) -> int:
        """Tokens that this rank trains on in all epochs, padding not counted; exact.

        This rank's data are rendered for it, once. Raises TypeError where `epochs` is None.
        """
        if self.config.epochs is None:
            raise TypeError("the tokens are endless; pass epochs to have a number of them")
        return self._count_batches(of_all_ranks=False)[1]

    def _count_batches(self, *, of_all_ranks: bool) -> tuple[int, int]:
        counter = Producer(self.source, self._encoder, self.config)
        return counter.count_batches(of_all_ranks=of_all_ranks)

    def stats(self) -> dict[str, Any]:
        """Return where time and memory went so far; see `Stats` for the names and units."""
        return self._stats.report(
            self._delivery.waited_for_producer, None if self.config.epochs is None else self._ledger().slots_tokens
        )

    def explain(self, batch: Batch, row: int, col: int) -> Explanation:
        """Return which conversation, message, role and text a slot came from, and why it is trained or not.

        Raises IndexError where the batch has no such row or column, TypeError where one is no int.
        """
        return explain(
            batch,
            row,
            col,
            source=self.source,
            tokenizer=self.tokenizer,
            render=self._producer.render,
            config=self.config,
        )

    def close(self) -> None:
        """End the loader: `next` raises from now on. Batches already delivered stay valid. May be called twice."""
        self._delivery.close()
        if self._shut is not None:
            self._shut()

    def __enter__(self) -> Loader:
        """Return the loader; leaving the block closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
