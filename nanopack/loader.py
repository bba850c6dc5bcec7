"""Drive the stages: conversations in, one batch at each `next(loader)`.

    producer/ fills a slot   ->   upload/: kernels/pack.py writes the tensors   ->   Loader.__next__   ->   Batch

The public face of nanopack. What a batch contains is decided by the arguments alone: `reference.batches` with the same
arguments gives the same batches, slowly.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

import torch

from nanopack.batch import Batch
from nanopack.checks import check_bool, check_choice, check_int, check_resident
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
    Turns,
)
from nanopack.conversations.answers import Answers
from nanopack.conversations.data_sets import Conversations
from nanopack.distributed import group_to_agree_in, rank_and_world_size, refuse_other_ranks
from nanopack.explain import Explanation, explain
from nanopack.graph import GraphBatches
from nanopack.ledger import LedgerReport, report_of
from nanopack.packing.cost import Balance, as_cost
from nanopack.packing.packings import Packing, PackingName, as_packing
from nanopack.passes import NOT_A_DATA_SET, Pass, warn_of_empty_loop
from nanopack.producer.start import START_METHODS, StartMethod
from nanopack.render.templates import Template
from nanopack.run import Run
from nanopack.stages import Processes
from nanopack.stats import StatsReport
from nanopack.store.opening import open_data, settle
from nanopack.tokenizers.tokenizer import AnyTokenizer, TokenizerLike
from nanopack.upload.device import open_device


class Loader:
    """An iterator over packed `(B, T)` batches of chat conversations.

    Args:
        conversations: a data set (any object with `len` and `[int]`: a list, a `datasets.Dataset`, a
            `nanopack.mixture`), the folder of a token store (`nanopack tokenize`; docs/store.md), or path(s), folders
            or globs of `.jsonl`, `.ndjson`, `.json` (also `.gz`, `.zst`), `.parquet`, `.arrow`. A conversation is
            `{"messages": [{"role", "content"}, ...]}`, ShareGPT's `{"conversations": [{"from", "value"}, ...]}`, a
            bare list of messages, `{"prompt", "completion"}`, `{"instruction", "input", "output"}`, `{"text": ...}`, or
            tokens, `{"input_ids": ...}` with `"labels"` or `"loss_mask"`; `"weight"` (a float >= 0) is its own loss
            weight; 0 keeps it out of the loss. docs/data.md says what every key does; one that matters and cannot be
            honoured is an error.
        tokenizer: a `tiktoken.Encoding`, a nanochat tokenizer folder or its `tokenizer.pkl`, an object whose `.enc` is
            an `Encoding`, a fast Hugging Face tokenizer, or `"chat32k"`, which ships with nanopack. None: of a token
            store, which needs none; one that is given must be the one that made it.
        batch_size: rows of a batch, B.
        seq_len: tokens of a row, T.

    What the batches are: part of a checkpoint's fingerprint.

    Args:
        packing: a name, or an object with options:

            - `"best_fit"`, `BestFit(window=64, max_age=128)`: rows of whole documents, hardly any padding, none waits
              long (TRL: "bfd")
            - `"best_fit_pad"`, `BestFitPad(window=100)`: the same, but a document may wait forever: nanochat SFT
            - `"best_fit_crop"`, `BestFitCrop(window=1000)`: full rows, by cropping documents: nanochat pretraining
            - `"stream"`, `Stream(overlap=False)`: documents end to end: nanochat midtraining (TRL: "wrapped")
            - `"pad"`, `Pad()`: one document a row

        template: `"nanochat"`, `"chatml"`, `"llama3"`, a `nanopack.Template` of your own, or `"hf"`: the chat template
            of a transformers tokenizer (what {% generation %} marks is in the loss; see `nanopack.render.hf_template`).
            `"hf-training"`: the one that trl trains by in its place.
        first_assistant: what to do with a chat that begins with the assistant, but for a system message: `"keep"` it,
            if the template can (nanochat cannot); `"raise"`; `"drop"` what comes before the first user message; or put
            an empty user message there (`"empty_user"`).
        turns: `"all"`: a conversation is one document; `"each"`: each of its answers is one, after the messages before
            it, as at inference (no earlier thoughts), and alone in the loss; with loss="assistant" only. All data are
            read once at construction, to count them; the ledger counts the copies.
        loss: `"assistant"`: the targets that the template says, but for messages with `weight` 0; `"last"`: of those,
            the last answer's; `"all"`: every token, whatever masks and weights say.
        loss_weights: None, `"token"` (1.0 for each target in the loss) or `"conversation"` (1 / its targets in the
            loss, so that each conversation counts once); a conversation's own weight multiplies either.
        boundary_loss: False: the first token of a document is never a target.
        ignore_index: value of `targets` outside the loss.
        max_document_tokens: longer documents are cut to this many tokens (and the cut is counted); None: no limit.
        extras: any of `"positions"`, `"doc_ids"`, `"cu_seqlens"`, `"cu_seqlens_real"`.
        max_pieces: capacity of `cu_seqlens` in pieces per row, 1 to T; None: T // 8 + 1.
        seed: seed of a new order of the conversations in each pass, the same on all ranks; None: their own order.
        epochs: passes over the data, all of it delivered, the last rows padded; None: endless. All ranks deliver
            equally many batches: those that have fewer end with batches of padding.
        rank, world_size: which shard of the conversations this process reads; from `torch.distributed` where that is
            initialised, else 0 of 1. Pass both or neither. Ranks that share a replica of the model (tensor, pipeline,
            context parallel) read the same data: pass those of the data-parallel mesh, `mesh["dp"].get_local_rank()`
            and `mesh["dp"].size()`, to each.
        shard: `"rank"`: each rank packs one shard of the conversations; `"row"`: each row of the batches of all ranks
            together does, so that these do not depend on the number of ranks, and a run can resume with another.
        document_align: every document takes a multiple of this many tokens in its row; the rest is padding inside its
            piece, the bos and out of the loss. It divides `seq_len`: 16 for FP8, 128 for the tiles of flex attention, 2
            * the ranks of context parallelism. See docs/align.md.
        balance: the cost of documents by which rows are dealt to steps, so that a step costs every rank about the same:
            a pair (a, b) for a * L + b * L^2 of a document of L tokens, a `nanopack.ModelSizes`, or a transformers
            config; None: rows stay where they were packed. See docs/balance.md: of no use below 8k tokens a row.
        balance_window: batches that are dealt together, and that the packing is ahead; with the number of accumulated
            batches a step of the optimizer has exactly the rows that it had without. None: 8, with `balance`.
        balance_across: deal the rows of all ranks together instead of each shard's own: nearly perfect. Every rank
            packs the lengths of all, so the data must be a token store; what is loaded are the merged states of all.

    How they are made: free to change between runs.

    Args:
        device: device of the tensors: a CUDA device (ROCm included) or the CPU; None: CUDA where there is one.
        executor: `"torch"` or `"triton"` (on the CPU only under Triton's interpreter, TRITON_INTERPRET=1); None: triton
            on a GPU, torch elsewhere.
        encoder: `"fast"`: splintr-rs encodes instead of tiktoken, faster (`pip install nanopack-gpu[fast]`). The ids
            are the same: known differences go to tiktoken, and the two are compared on a sample of the data at
            construction, then on one text in a thousand. None: tiktoken, or the tokenizer itself.
        num_workers: number of tokenizing processes. 0: none, everything runs in the caller's thread; `prefetch` and
            `start_method` have no effect. 1: the producer process tokenizes as well. n >= 2: the producer packs and n
            more processes tokenize (n + 1 in all).
        prefetch: batches that the producer makes ahead of time.
        static: every batch is written into the same tensors (for CUDA graphs), valid until the next call.
        resident: True: all words of a token store are brought to the device once, at construction, and a batch is a
            table of a few kilobytes (docs/resident.md); `"host"`: they stay in pinned host memory, which the kernel
            reads. MemoryError where there is not the room.
        on_error: `"raise"` for a bad conversation, or `"skip"` it (counted and logged). What cannot be read at all (a
            file that changed or is gone, a store that does not answer) stops the run either way, after a few tries;
            so do 100 bad conversations in a row, or more than half of the first 1,000 or more that a shard reads.
        process_group: process group (gloo, NCCL) of all ranks. With `epochs`, they agree at construction on the number
            of batches, and that their data are the same, so all ranks construct their loaders together. None: the
            default group of `torch.distributed` where it has `world_size` ranks; elsewhere each producer renders the
            data of all ranks once, in idle time, to find that number: a rank that runs out before waits for it.
        start_method: how the processes are started. `"fork"` takes milliseconds, but a lock of the data set that
            another thread holds just then stays locked in them for ever. `"spawn"` and `"forkserver"` import the main
            module first, seconds, which needs the `if __name__ == "__main__":` guard, and pickle the conversations.
            None: fork on Linux, spawn elsewhere.
        cache: folder that keeps the rendered documents, under a digest of data, tokenizer and template: what reads them
            (ranks, runs that are resumed) adds to it, and once all are there they are a token store, which is read from
            then on. The batches are the same. There is none while a conversation is bad. Data other than files and a
            datasets.Dataset are read once at construction, to see whether they have changed. None: no cache.

    Raises:
        ValueError: an argument is invalid; the message names it, its value and what is allowed. Or the ranks of
            `process_group` have other data, another tokenizer or another seed.
        ConversationError: (from `next`) a bad conversation; the message names file, line and message.
        StorageError: (from `next`) the data could not be read; the message names the file and the cause.
        ImportError: `encoder="fast"` without splintr-rs.
        EncoderError: (from `next`) the fast encoder gave a text other ids than tiktoken.
        ProducerError: the producer process died, at its start or (from `next`) later, or raised no `Exception`.

    >>> with Loader([{"text": "Hello there"}], "chat32k", batch_size=1, seq_len=4, packing="stream") as loader:
    ...     inputs, targets = next(loader)
    >>> inputs.tolist(), targets.tolist()
    ([[32759, 5766, 986, 32759]], [[5766, 986, 32759, 5766]])
    """

    def __init__(
        self,
        conversations: Conversations,
        tokenizer: TokenizerLike | None = None,
        batch_size: int = 32,
        seq_len: int = 2048,
        *,
        # what the batches are: part of a checkpoint's fingerprint
        packing: PackingName | Packing = "best_fit",
        template: TemplateName | Template = "nanochat",
        first_assistant: FirstAssistant = "keep",
        turns: Turns = "all",
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
        document_align: int = 1,
        balance: Balance | None = None,
        balance_window: int | None = None,
        balance_across: bool = False,
        # how they are made: free to change between runs
        device: str | torch.device | None = None,
        executor: Executor | None = None,
        encoder: Encoder | None = None,
        num_workers: int = 1,
        prefetch: int = 4,
        static: bool = False,
        resident: bool | Literal["host"] = False,
        on_error: OnError = "raise",
        process_group: torch.distributed.ProcessGroup | None = None,
        start_method: StartMethod | None = None,
        cache: str | os.PathLike[str] | None = None,
    ) -> None:
        self._rank_is_given = rank is not None
        rank, world_size = rank_and_world_size(rank, world_size)
        source = open_data(conversations, shuffled=seed is not None)
        asked = dict(template=template, first_assistant=first_assistant, turns=turns, loss=loss)
        settled, made = settle(source, tokenizer, asked)
        self.config = LoaderConfig(
            batch_size=batch_size,
            seq_len=seq_len,
            packing=as_packing(packing),
            **made,
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
            document_align=document_align,
            balance=None if balance is None else as_cost(balance),
            balance_window=balance_window,
            balance_across=balance_across,
            on_error=on_error,
        )
        check_int("num_workers", num_workers, least=0)
        check_int("prefetch", prefetch, least=1)
        check_bool("static", static)
        check_resident(resident)
        check_choice("start_method", start_method, START_METHODS)
        group = group_to_agree_in(process_group, epochs, world_size)
        self.source = Answers(source, first_assistant, seed) if turns == "each" and not source.rendered else source
        self._run = Run(
            self.source,
            settled,
            self.config,
            open_device(device),
            Processes(num_workers, prefetch, start_method),
            executor=executor,
            encoder=encoder,
            static=static,
            resident=resident,
            group=group,
            cache=cache,
        )

    @property
    def tokenizer(self) -> AnyTokenizer:
        """The tokenizer, as it was loaded."""
        return self._run.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self._run.device

    def __iter__(self) -> Iterator[Batch]:
        """Return an iterator over the rest of the pass, or over a new pass where no batch is left of this one.

        A pass is all batches of `epochs`. Each has the same batches, in the same order, and begins at step 0 with new
        `ledger()` and `stats()`; `state_dict()` is a place in a pass. A loop left early is resumed by the next `iter`.
        The first `iter` after `load_state_dict` resumes from the state, even where that is the end: the loop is then
        empty, and a warning says so.
        """
        resumed, self._run.resumed = self._run.resumed, False
        if not self._run.prefetcher.closed and self._run.is_over():
            if resumed:
                warn_of_empty_loop()
            else:
                self.restart()
        return Pass(self.__next__, lambda: self._run.passes)

    def restart(self) -> None:
        """Begin a new pass: the next batch is the first one again, whatever was delivered before."""
        self._run.restart()

    def __next__(self) -> Batch:
        """Return the next batch. After the end or an error every further call raises that again.

        Threads that call it take turns. To share a pass, they share one `iter(loader)`.
        """
        if not self._rank_is_given:
            refuse_other_ranks(self.config.rank, self.config.world_size)
        return self._run.next()

    @property
    def producer_pid(self) -> int | None:
        """Process id of the producer, for py-spy and the like; None with num_workers=0."""
        return self._run.feed.pid

    def graph_batches(self, k: int) -> GraphBatches:
        """Return static tensors and a `load` for CUDA graphs, for which up to `k` batches are made ready at a time.

        With resident=True. From now on the batches go there, from the one after that delivered last, and `next` raises.
        ValueError for another k or loader. See docs/resident.md.
        """
        return GraphBatches(self._run, k)

    def ledger(self) -> LedgerReport:
        """Count what became of every conversation, token and position up to the batch delivered last; see `Ledger`.

        For a mixture, `sources` has the counts of each source by name.
        """
        shards = self._run.shards().values()
        return report_of(shards, self.source.names, dealt=self.config.balance_across)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the run after the batch delivered last: plain data (JSON-able), kilobytes.

        `load_state_dict` of a loader with the same arguments resumes from it, with exactly the batches that this one
        would have given next. Prefetched batches are not part of it.
        """
        return self._run.state()

    def load_state_dict(self, state_dict: Mapping[str, Any], *, strict: bool = True) -> None:
        """Resume from a state of this rank, or of all ranks (`nanopack.merge_states`); at any time.

        Only the conversations that waited for a row are read again, so it takes the same time at any step. Arguments
        that are free to change between runs may differ, and so may `extras` and `max_pieces`; with shard="row" also
        `world_size`, when `batch_size * world_size` is the same.

        Raises ValueError, naming every difference, for a state of other data, tokenizer or arguments; with
        strict=False it is loaded all the same, as far as that is possible. After an error the loader is as it was. Data
        are compared by their number and a sample, and by the conversations that waited: where those have changed,
        ValueError is raised here with num_workers=0, else by the next `next`.
        """
        self._run.load(state_dict, strict=strict)

    def __len__(self) -> int:
        """Return the number of batches in all epochs, from the first one on; exact.

        The first call renders all the data once, in as many processes as `num_workers`, unless the ranks agreed through
        a process group, a pass was finished, or the state that was loaded knows it. `list(loader)` and `tqdm(loader)`
        ask for it too; `list(iter(loader))` and `tqdm(iter(loader))` do not. Raises TypeError where `epochs` is None.
        """
        if self.config.epochs is None:
            raise TypeError(f"the batches are endless; pass epochs to have a number of them. {NOT_A_DATA_SET}")
        return self._run.batches()

    def __getitem__(self, index: Any) -> Batch:
        """Raise TypeError: torch's DataLoader takes what has no `__getitem__` for a data set too."""
        raise TypeError(NOT_A_DATA_SET)

    def __reduce__(self) -> Any:
        """Raise TypeError: a process and its memory cannot be copied or pickled."""
        raise TypeError(
            f"a loader belongs to its process ({self._run.owner}) and is neither copied nor pickled: send the "
            f"arguments to the other process and make one there, with rank and world_size; state_dict() is its state"
        )

    def __bool__(self) -> bool:
        """Always True, so that `if loader:` does not call `len()`, which may render the whole data set."""
        return True

    @property
    def tokens_total(self) -> int:
        """Tokens that this rank trains on in all epochs, without padding; exact.

        This rank's data are rendered for it once, unless `len` did that. Raises TypeError where `epochs` is None.
        """
        if self.config.epochs is None:
            raise TypeError("the tokens are endless; pass epochs to have a number of them")
        return self._run.tokens()

    def stats(self) -> StatsReport:
        """Return the time and memory spent so far; see `StatsReport` for names and units."""
        return self._run.stats()

    def explain(self, batch: Batch, row: int, col: int) -> Explanation:
        """Explain a position: its conversation, message, role and text, and why it is in the loss or not.

        Raises IndexError where the batch has no such row or column, TypeError where one is no int, ValueError where the
        data have changed since.
        """
        run = self._run
        return explain(
            batch, row, col, source=run.source, tokenizer=run.tokenizer, render=run.reader.render, config=run.config
        )

    def close(self) -> None:
        """End the loader: `next` raises from now on. Batches already delivered stay valid. May be called twice."""
        self._run.close()

    def __enter__(self) -> Loader:
        """Return the loader; leaving the block closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
