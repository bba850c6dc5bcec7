"""Drive the stages: conversations in, one batch at each `next(loader)`.

    producer.py fills a slot   ->   Loader.__next__   ->   kernels/pack.py writes the tensors   ->   Batch

The public face of nanopack. What a batch contains is decided by the arguments alone: `reference.batches` with the same
arguments gives the same batches, slowly.
"""

from __future__ import annotations

import logging
import os
import pickle
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from nanopack.batch import Batch
from nanopack.conversations import open_conversations
from nanopack.device import Device, open_device
from nanopack.executor import Outputs, make_kernel, outputs_maker
from nanopack.explain import Explanation, explain
from nanopack.feed import End, Feed, Inline, News
from nanopack.ledger import Ledger
from nanopack.memory import Memory
from nanopack.process import Process
from nanopack.producer import Produced, Producer
from nanopack.recipe import Recipe, check_bool, check_int
from nanopack.ring import Ring
from nanopack.stats import Stats
from nanopack.templates import Template
from nanopack.tokenizers import load_tokenizer
from nanopack.upload import Upload

log = logging.getLogger("nanopack")


class Loader:
    """An iterator over packed `(B, T)` batches of chat conversations.

    Args:
        conversations: a data set (any object with `len` and `[int]`: a list, a `datasets.Dataset`), or path(s) or globs
            of `.jsonl`, `.jsonl.gz`, `.parquet`. A conversation is `{"messages": [{"role", "content"}, ...]}`, a bare
            list of messages, ShareGPT's `{"conversations": [{"from", "value"}, ...]}` or `{"text": ...}`; `"weight"` (a
            float >= 0) is its own loss weight. Roles: system, user, assistant, and where the template has it tool.
        tokenizer: a `tiktoken.Encoding`, a nanochat tokenizer folder or its `tokenizer.pkl`, an object whose `.enc` is
            an `Encoding`, a fast Hugging Face tokenizer, or `"chat32k"`, which ships with nanopack.
        batch_size: rows of a batch, B.
        seq_len: tokens of a row, T.
        packing: `"best_fit"` (rows of whole documents, hardly any padding, none waits long), `"stream"` (documents end
            to end: nanochat midtraining), `"best_fit_pad"` (nanochat SFT), `"best_fit_crop"` (nanochat pretraining),
            `"pad"` (one document a row).
        loss: `"assistant"`: a target is trained where the template says so; `"all"`: every token.
        weights: None, `"token"` (1.0 where trained) or `"conversation"` (1 / its trained tokens, so that each
            conversation counts once); a conversation's own weight multiplies either.
        extras: any of `"positions"`, `"doc_ids"`, `"cu_seqlens"`.
        max_pieces: pieces a row for which `cu_seqlens` has room; T // 8 + 1 if None.
        template: `"nanochat"`, `"chatml"`, `"llama3"`, a `nanopack.Template` of your own, or `"hf"`: the chat template
            of a transformers tokenizer (what {% generation %} marks is trained; see `nanopack/chat_template.py`).
        max_tokens: a document longer than this is cut (and counted).
        window: documents among which the best_fit packings choose: 64, 100 (`best_fit_pad`), 1000 (`best_fit_crop`).
        max_age: `best_fit` only: a document that has waited so many rows opens the next one; 128 if None.
        refill: documents that are read at a time when fewer than `window` wait.
        overlap: `stream` only: a batch advances by B * T tokens instead of B * T + 1, so that every token is a target.
        boundary_loss: False: the first token of a document is never a target.
        ignore_index: what `targets` holds where nothing is trained.
        rank, world_size: which share of the conversations this process reads; from `torch.distributed` where that is
            initialised, else 0 of 1.
        epochs: passes over the data, all of it delivered, the last rows padded; None: endless.
        device: where the tensors lie: a CUDA device (ROCm included) or the CPU; None: CUDA where there is one.
        executor: `"torch"` or `"triton"` (on the CPU only under Triton's interpreter, TRITON_INTERPRET=1); None: triton
            on a GPU, torch elsewhere.
        workers: tokenizing workers of the producer, which is a process of its own; 0: no process, conversations are
            tokenized in the caller's thread.
        prefetch: batches that the producer makes ahead.
        overlap_copy: copies run on a stream of their own; False: on the caller's, in order with its work.
        static: every batch is written into the same tensors (for CUDA graphs); they hold until the next call.
        on_error: `"raise"` at a bad conversation, or `"skip"` it (counted and logged).

    Raises:
        ValueError: an argument cannot be; the message names it, its value and what is allowed.
        ConversationError: (from `next`) a bad conversation; the message names file, line and message.
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
        weights: str | None = None,
        extras: Sequence[str] = (),
        max_pieces: int | None = None,
        template: str | Template = "nanochat",
        max_tokens: int | None = None,
        window: int | None = None,
        max_age: int | None = None,
        refill: int = 1,
        overlap: bool = False,
        boundary_loss: bool = True,
        ignore_index: int = -100,
        rank: int | None = None,
        world_size: int | None = None,
        epochs: int | None = None,
        device: str | torch.device | None = None,
        executor: str | None = None,
        workers: int = 1,
        prefetch: int = 4,
        overlap_copy: bool = True,
        static: bool = False,
        on_error: str = "raise",
    ) -> None:
        rank, world_size = _rank_and_world_size(rank, world_size)
        self.recipe = Recipe(
            batch_size=batch_size,
            seq_len=seq_len,
            packing=packing,
            loss=loss,
            weights=weights,
            extras=extras,
            max_pieces=max_pieces,
            template=template,
            max_tokens=max_tokens,
            window=window,
            max_age=max_age,
            refill=refill,
            overlap=overlap,
            boundary_loss=boundary_loss,
            ignore_index=ignore_index,
            rank=rank,
            world_size=world_size,
            epochs=epochs,
            on_error=on_error,
        )
        check_int("workers", workers, least=0)
        check_int("prefetch", prefetch, least=1)
        check_bool("overlap_copy", overlap_copy)
        check_bool("static", static)
        device_api = open_device(device)
        self.device = device_api.device
        self.tokenizer = load_tokenizer(tokenizer)
        self.source = open_conversations(conversations)
        self._producer = Producer(self.source, self.tokenizer, self.recipe)
        layout = self._producer.layout
        kernel = make_kernel(executor, self.device, layout, self.tokenizer.bos_id, ignore_index)
        outputs = outputs_maker(self.recipe, layout, self.device)
        if workers == 0:
            ring = Ring(layout, slots=1)
            self._feed: Feed = Inline(self._producer, ring)
        else:
            # one slot beside those that are ready: the one being filled
            threads = workers if workers > 1 else 0
            process = Process(self.source, self.tokenizer, self.recipe, layout, prefetch + 1, threads)
            ring, self._feed = process.ring, process
        self._owner = os.getpid()
        self._memory = Memory(device_api, self._feed, ring, self._owner)
        # runs also when the loader is dropped, and at the interpreter's exit
        self._shut = weakref.finalize(self, self._memory.give_back)
        self._memory.pin()
        slots = [torch.from_numpy(slot.buffer) for slot in ring.slots]
        self._upload = Upload(device_api, slots, outputs, kernel, overlap_copy=overlap_copy, static=static)
        self._memory.upload = self._upload
        self._device: Device = device_api
        self._ahead = overlap_copy
        self._facts: deque[Produced] = deque()
        self._step = 0
        self._books = self._producer.books()
        self._last_books: bytes | None = None
        self._end: Callable[[], BaseException] | None = None
        self._stats = Stats(ring_bytes=len(ring.buffer))

    def __iter__(self) -> Iterator[Batch]:
        """Return the loader itself: it goes on where it stands."""
        return self

    def __next__(self) -> Batch:
        """Return the next batch. After the end or an error every further call raises that again."""
        if self._end is _closed:
            raise _closed()
        if os.getpid() != self._owner:
            raise RuntimeError(f"this loader belongs to process {self._owner}; make one in this process")
        if self._device.capturing():
            raise RuntimeError(
                "next(loader) inside a CUDA graph capture: its copies would become part of the graph; take the batch "
                "before the capture begins"
            )
        began = time.perf_counter()
        try:
            with self._device.named("nanopack wait and copy"):
                self._submit_ready()
            if not self._upload.can_deliver:
                raise self._at_the_end()
            with self._device.named("nanopack kernel"):
                outputs = self._upload.deliver()
            produced = self._facts.popleft()
            if self._ahead:
                with self._device.named("nanopack copy ahead"):
                    self._submit_ready(ahead=True)
        except Exception:
            raise
        except BaseException:
            # Ctrl-C may have come between a message and what it means
            self._end = _interrupted
            raise
        batch = self._batch(outputs, produced)
        self._step += 1
        self._books = produced.books
        self._stats.queued = self._feed.ready
        self._stats.count(batch, produced, time.perf_counter() - began)
        return batch

    def _submit_ready(self, *, ahead: bool = False) -> None:
        """Submit what is ready; unless it is work ahead, wait until there is something to deliver, or the end."""
        upload = self._upload
        wait = not (ahead or upload.can_deliver)
        # where every slot is being copied the producer has none to fill, and there would be nothing to wait for
        for slot in upload.reclaim(wait=wait and upload.all_in_use):
            self._feed.free(slot)
        while upload.can_submit and self._end is None:
            news = self._take(wait=wait and not upload.can_deliver)
            if news is None:
                break
            try:
                upload.submit(news.slot, news.produced.filled.used_bytes)
            except Exception as error:
                self._fail(error)
                raise
            self._facts.append(news.produced)

    def _take(self, *, wait: bool) -> News | None:
        """Return the next ready slot, or None; what ends the loader is kept until the batches before it are out."""
        nothing_ready = wait and not self._feed.ready
        began = time.perf_counter()
        try:
            news = self._feed.take(wait=wait)
        except Exception as error:
            # the row that was being filled is gone: to go on would lose its documents in silence
            self._fail(error)
            return None
        if nothing_ready:
            self._stats.waited_for_producer += time.perf_counter() - began
        if isinstance(news, End):
            self._last_books = news.books
            self._end = StopIteration
            return None
        return news

    def _fail(self, error: Exception) -> None:
        self._end = lambda: error

    def _at_the_end(self) -> BaseException:
        """Return what ends the loader, now that every batch before it is delivered."""
        assert self._end is not None
        if self._last_books is not None:
            self._books = self._last_books
        return self._end()

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
            num_trained=filled.num_trained,
            num_tokens=filled.num_tokens,
            weight_sum=filled.weight_sum,
            max_seqlen=filled.max_seqlen,
            epoch=produced.epoch,
            progress=produced.progress,
            last=produced.last,
            word_pieces=filled.word_pieces,
        )

    def ledger(self) -> dict[str, Any]:
        """Return what happened to every conversation, token and slot up to the batch delivered last; see `Ledger`."""
        ledger: Ledger = pickle.loads(self._books)
        return ledger.report()

    def stats(self) -> dict[str, Any]:
        """Return where time and memory went so far; see `Stats` for the names and units."""
        return self._stats.report()

    def explain(self, batch: Batch, row: int, col: int) -> Explanation:
        """Return which conversation, message, role and text a slot came from, and why it is trained or not.

        Raises IndexError where the batch has no such row or column.
        """
        return explain(
            batch,
            row,
            col,
            source=self.source,
            tokenizer=self.tokenizer,
            render=self._producer.render,
            recipe=self.recipe,
        )

    def close(self) -> None:
        """End the loader: `next` raises from now on. Batches already delivered stay valid. May be called twice."""
        self._end = _closed
        self._shut()

    def __enter__(self) -> Loader:
        """Return the loader; leaving the block closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _closed() -> RuntimeError:
    return RuntimeError("the loader is closed; make a new one")


def _interrupted() -> RuntimeError:
    return RuntimeError("the loader was interrupted in the middle of a batch; make a new one")


def _rank_and_world_size(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return both as given, or as torch.distributed knows them."""
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank={rank!r} and world_size={world_size!r} go together; pass both, or neither")
    if rank is not None and world_size is not None:
        return rank, world_size
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        log.warning(
            "WORLD_SIZE=%s is set, but torch.distributed is not initialised: this process reads all the data as rank 0 "
            "of 1; initialise it first, or pass rank and world_size",
            os.environ["WORLD_SIZE"],
        )
    return 0, 1
