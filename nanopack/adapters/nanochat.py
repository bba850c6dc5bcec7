"""Give nanochat's training scripts their batches: generators of `(inputs, targets)`, in place of its own.

    nanochat's data set, its tokenizer   ->   mid_loader(), sft_loader(), base_loader()   ->   x, y = next(train_loader)
                                                     loader.py does the work

Each names the arguments with which `Loader` does what that loop of nanochat does, bit for bit, and tells a `Progress`
what nanochat's generator writes into the script's globals. What changes in `scripts/mid_train.py` is how the loaders
are made; with `sft_loader` it is the same in `scripts/chat_sft.py`:

    told = Progress(num_iterations)
    train_loader = mid_loader(
        train_dataset, tokenizer, device_batch_size, max_seq_len, device=device,
        rank=ddp_rank, world_size=ddp_world_size, progress=told,
    )
    build_val_loader = lambda: mid_loader(
        val_dataset, tokenizer, device_batch_size, max_seq_len, device=device,
        rank=ddp_rank, world_size=ddp_world_size,
    )

and one line after each of the two `x, y = next(train_loader)`, before the loop and after the backward pass:

    last_step, approx_progress = told.last_step, told.approx_progress  # and told.current_epoch
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from nanopack.batch import Batch
from nanopack.config import check_int
from nanopack.conversations.records import SUFFIXES
from nanopack.loader import Loader

Pairs: TypeAlias = Generator[tuple[torch.Tensor, torch.Tensor], None, None]

TIMINGS = ("built", "trained")
# nanochat's renderer cuts every conversation here, however long a row is.
MAX_TOKENS = 2048
IGNORE_INDEX = -1


class Progress:
    """How far a training loader is: what the script assigns to its globals after each `next(train_loader)`.

    Args:
        num_iterations: batches until the last step, if the data do not end before; each batch of an accumulated
            gradient counts. 0 or -1: until the end of the data.
        timing: which batch is told of when one is handed out. `"built"`: that one, as nanochat does, which builds it
            right then. But its loop takes a batch as soon as the one before is trained, and ends when it sees
            `last_step`: the last batch is never trained, of `num_iterations` one is missing, and the learning rate is
            one batch ahead. `"trained"`: the one handed out before, which the loop has trained by then. The last batch
            is trained too, and `approx_progress` is the share that has been.

    >>> for timing in TIMINGS:
    ...     told, trained = Progress(num_iterations=3, timing=timing), 0
    ...     loader = mid_loader([{"text": "Hi"}] * 99, "chat32k", 1, 4, device="cpu", progress=told, num_workers=0)
    ...     x, y = next(loader)
    ...     while not told.last_step:
    ...         trained += 1
    ...         x, y = next(loader)
    ...     timing, trained
    ('built', 2)
    ('trained', 3)
    """

    last_step: bool
    """True from the batch on that is the last: number `num_iterations`, or the one that reaches the end of the data."""
    approx_progress: float
    """Share of the data consumed, as `Batch.progress`; with `num_iterations`, batches divided by it. May pass 1."""
    current_epoch: int
    """Pass over the data that the reading has reached, from 1."""

    def __init__(self, num_iterations: int = -1, *, timing: str = "built") -> None:
        check_int("num_iterations", num_iterations, least=-1)
        if timing not in TIMINGS:
            raise ValueError(f"timing={timing!r} is not allowed; use one of {', '.join(map(repr, TIMINGS))}")
        self.num_iterations = num_iterations
        self.timing = timing
        self._newest = (False, 0.0, 1)
        self._show(self._newest)

    def hand_out(self, batch: Batch) -> None:
        """Take note that this batch is handed out."""
        before, built, n = self._newest, batch.step + 1, self.num_iterations
        last_step = batch.last or 0 < n <= built
        self._newest = (last_step, built / n if n > 0 else batch.progress, batch.epoch)
        self._show(before if self.timing == "trained" else self._newest)

    def _show(self, values: tuple[bool, float, int]) -> None:
        self.last_step, self.approx_progress, self.current_epoch = values


def mid_loader(
    dataset: Any,
    tokenizer: Any,
    B: int,
    T: int,
    *,
    device: str | torch.device,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress | None = None,
    loss: str = "all",
    max_document_tokens: int | None = MAX_TOKENS,
    num_workers: int = 1,
    prefetch: int = 4,
) -> Pairs:
    """Return a generator of nanochat's midtraining batches: conversations end to end, B * T + 1 tokens a batch.

    Args:
        dataset: a nanochat task or mixture, or whatever else `Loader` takes.
        tokenizer: nanochat's own object, a `tiktoken.Encoding`, or the folder of a nanochat tokenizer.
        B: rows of a batch.
        T: tokens of a row.
        device: where the tensors shall lie.
        rank: which share of the data this process reads, as `ddp_rank`.
        world_size: of so many, as `ddp_world_size`.
        progress: is told of every batch; leave it out for validation.
        loss: `"all"`: every token is a target, as in nanochat; `"assistant"`: -1 where the assistant does not speak.
        max_document_tokens: where a conversation is cut; 2048, whatever T is, in nanochat; None: nowhere.
        num_workers: 0 does without a process of the loader's own, 2 and more tokenize in so many threads of it.
        prefetch: batches that are made ahead.

    The tensors, (B, T) int32 and int64, are fresh ones each time. The generator's `close()`, or its end as garbage,
    ends the loader. Raises ValueError, at once, for an argument that cannot be; from `next`, what `Loader` raises.
    """
    loader = Loader(
        dataset,
        tokenizer,
        B,
        T,
        packing="stream",
        loss=loss,
        max_document_tokens=max_document_tokens,
        ignore_index=IGNORE_INDEX,
        rank=rank,
        world_size=world_size,
        device=device,
        num_workers=num_workers,
        prefetch=prefetch,
    )
    return _pairs(loader, progress)


def sft_loader(
    dataset: Any,
    tokenizer: Any,
    B: int,
    T: int,
    *,
    device: str | torch.device,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress | None = None,
    loss: str = "assistant",
    max_document_tokens: int | None = MAX_TOKENS,
    num_workers: int = 1,
    prefetch: int = 4,
) -> Pairs:
    """Return a generator of nanochat's SFT batches: rows of whole conversations, the best fit of 100, then padding.

    Targets are -1 in padding and where the assistant does not speak (`loss="all"`: in padding alone). A conversation
    longer than T + 1 tokens is cut to that; nanochat, which never finds a row for it, ends up with padding only.
    For everything else see `mid_loader`.
    """
    loader = Loader(
        dataset,
        tokenizer,
        B,
        T,
        packing="best_fit_pad",
        window=100,
        loss=loss,
        max_document_tokens=max_document_tokens,
        ignore_index=IGNORE_INDEX,
        rank=rank,
        world_size=world_size,
        device=device,
        num_workers=num_workers,
        prefetch=prefetch,
    )
    return _pairs(loader, progress)


def base_loader(
    documents: Any,
    tokenizer: Any,
    B: int,
    T: int,
    *,
    device: str | torch.device,
    rank: int | None = None,
    world_size: int | None = None,
    progress: Progress | None = None,
    input_dtype: torch.dtype = torch.int32,
    num_workers: int = 1,
    prefetch: int = 4,
) -> Pairs:
    """Return a generator of nanochat's pretraining batches: the best fit of 1,000 documents, the last of a row cropped.

    Args:
        documents: strings, or `{"text": ...}`, in anything with `len` and `[int]`; or path(s) or globs of the files
            that `Loader` takes, such as nanochat's Parquet files: a list of strings that all end in .parquet, .jsonl
            or .jsonl.gz is a list of paths.
        tokenizer: see `mid_loader`, as for what is not said here.
        B: rows of a batch.
        T: tokens of a row.
        device: where the tensors shall lie.
        rank: which share of the data this process reads; from `torch.distributed`, as nanochat's, where left out.
        world_size: of so many; likewise.
        progress: is told of every batch. nanochat's own loader tells nothing; the share of the data is that of SFT.
        input_dtype: `torch.int64` for inputs as nanochat's.
        num_workers: see `mid_loader`.
        prefetch: batches that are made ahead.

    Rank r of W reads documents r, r + W, r + 2W, ...; nanochat's reads the row groups r, r + W, ... of each file. For
    one rank the batches are the same where each row group holds a multiple of 128 documents.
    """
    if input_dtype not in (torch.int32, torch.int64):
        raise ValueError(f"input_dtype={input_dtype!r} is not allowed; use torch.int32 or torch.int64")
    loader = Loader(
        _records(documents),
        tokenizer,
        B,
        T,
        packing="best_fit_crop",
        window=1000,
        refill=128,
        loss="all",
        ignore_index=IGNORE_INDEX,
        rank=rank,
        world_size=world_size,
        device=device,
        num_workers=num_workers,
        prefetch=prefetch,
    )
    return _pairs(loader, progress, input_dtype)


def _pairs(loader: Loader, progress: Progress | None, input_dtype: torch.dtype = torch.int32) -> Pairs:
    pairs = _deliver(loader, progress, input_dtype)
    # to where it holds the loader: one that was never started would not let go of it at close()
    next(pairs)
    return pairs


def _deliver(loader: Loader, progress: Progress | None, input_dtype: torch.dtype) -> Generator[Any, None, None]:
    with loader:
        if progress is not None and not isinstance(progress, Progress):
            raise ValueError(f"progress={progress!r} is not allowed; use a Progress, or None")
        yield
        for batch in loader:
            if progress is not None:
                progress.hand_out(batch)
            yield batch.inputs.to(input_dtype), batch.targets


@dataclass(frozen=True)
class _Texts:
    """Strings as the records that a loader takes."""

    texts: Any

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> object:
        text = self.texts[index]
        return {"text": text} if isinstance(text, str) else text


def _records(documents: Any) -> Any:
    """Return what `Loader` takes for documents: strings become records, unless they are paths."""
    indexed = hasattr(type(documents), "__len__") and hasattr(type(documents), "__getitem__")
    # a dict has no number 0; what is wrong with it, Loader says
    if not indexed or isinstance(documents, (str, Mapping)):
        return documents
    if not len(documents) or not isinstance(documents[0], str):
        return documents
    paths = isinstance(documents, (list, tuple)) and all(map(_looks_like_a_path, documents))
    return documents if paths else _Texts(documents)


def _looks_like_a_path(document: object) -> bool:
    return isinstance(document, str) and document.lower().endswith(SUFFIXES)
