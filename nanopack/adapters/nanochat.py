"""Feed nanochat's training scripts: generators of `(inputs, targets)` that replace its own.

    nanochat's data set, its tokenizer   ->   mid_loader(), sft_loader(), base_loader()   ->   x, y = next(train_loader)
                                                     loader.py does the work

Each calls `Loader` with the arguments that reproduce that loop of nanochat bit for bit, and keeps in a `Progress` what
nanochat's generator writes into the script's globals. In `scripts/mid_train.py` only the construction of the loaders
changes; with `sft_loader` the same holds for `scripts/chat_sft.py`:

    state = Progress(num_iterations)
    train_loader = mid_loader(
        train_dataset, tokenizer, device_batch_size, max_seq_len, device=device,
        rank=ddp_rank, world_size=ddp_world_size, progress=state,
    )
    build_val_loader = lambda: mid_loader(
        val_dataset, tokenizer, device_batch_size, max_seq_len, device=device,
        rank=ddp_rank, world_size=ddp_world_size,
    )

and one line after each of the two `x, y = next(train_loader)`, before the loop and after the backward pass:

    last_step, approx_progress = state.last_step, state.approx_progress  # and state.current_epoch
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch

from nanopack.batch import Batch
from nanopack.checks import check_choice, check_int
from nanopack.config import Loss
from nanopack.conversations.records import SUFFIXES
from nanopack.loader import Loader
from nanopack.packing import BestFitCrop, BestFitPad, Stream

Pairs: TypeAlias = Generator[tuple[torch.Tensor, torch.Tensor], None, None]

Timing: TypeAlias = Literal["built", "trained"]
TIMINGS = get_args(Timing)
# nanochat's renderer cuts every conversation here, whatever the length of a row.
MAX_DOCUMENT_TOKENS = 2048
IGNORE_INDEX = -1


class Progress:
    """How far a training loader is: what the script assigns to its globals after each `next(train_loader)`.

    Args:
        num_iterations: batches until the last step, unless the data end earlier; each batch of an accumulated
            gradient counts. 0 or -1: until the end of the data.
        timing: which batch the values describe. `"built"`: the one just handed out, as in nanochat, which builds it
            right then. But its loop takes a batch as soon as the previous one is trained, and stops when it sees
            `last_step`: the last batch is never trained, one of `num_iterations` is missing, and the learning rate is
            one batch ahead. `"trained"`: the one handed out before that, which the loop has trained by then. The last
            batch is trained too, and `approx_progress` is the fraction trained.

    >>> for timing in TIMINGS:
    ...     state, trained = Progress(num_iterations=3, timing=timing), 0
    ...     loader = mid_loader([{"text": "Hi"}] * 99, "chat32k", 1, 4, device="cpu", progress=state, num_workers=0)
    ...     x, y = next(loader)
    ...     while not state.last_step:
    ...         trained += 1
    ...         x, y = next(loader)
    ...     timing, trained
    ('built', 2)
    ('trained', 3)
    """

    last_step: bool
    """True for batch number `num_iterations`, or the one that reaches the end of the data, and for every later one."""
    approx_progress: float
    """Fraction of the data consumed, as `Batch.progress`; with `num_iterations`, of these batches. May exceed 1."""
    current_epoch: int
    """Pass over the data that the reading has reached, from 1."""

    def __init__(self, num_iterations: int = -1, *, timing: Timing = "built") -> None:
        check_int("num_iterations", num_iterations, least=-1)
        check_choice("timing", timing, TIMINGS)
        self.num_iterations = num_iterations
        self.timing = timing
        self._newest = (False, 0.0, 1)
        self._show(self._newest)

    def update(self, batch: Batch) -> None:
        """Record that this batch is handed out."""
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
    loss: Loss = "all",
    max_document_tokens: int | None = MAX_DOCUMENT_TOKENS,
    num_workers: int = 1,
    prefetch: int = 4,
) -> Pairs:
    """Return a generator of nanochat's midtraining batches: conversations end to end, B * T + 1 tokens a batch.

    Args:
        dataset: a nanochat task or mixture, or whatever else `Loader` takes.
        tokenizer: nanochat's own object, a `tiktoken.Encoding`, or the folder of a nanochat tokenizer.
        B: rows of a batch.
        T: tokens of a row.
        device: device of the tensors.
        rank, world_size: which shard of the data this process reads: `ddp_rank` of `ddp_world_size`.
        progress: updated with every batch; leave it out for validation.
        loss: `"all"`: every token is a target, as in nanochat; `"assistant"`: -1 where the assistant does not speak.
        max_document_tokens: conversations are cut to this many tokens: 2048 in nanochat, whatever T is; None: no limit.
        num_workers: number of tokenizing processes, as of `Loader`: 0, none; 1, the producer; n >= 2, n more.
        prefetch: batches that are made ahead of time.

    Yields (B, T) tensors, int32 inputs and int64 targets, new ones each time. The loader is closed with the generator,
    by its `close()` or when it is garbage-collected. Raises ValueError at the call for an invalid argument; `next`
    raises what `Loader` raises.
    """
    loader = Loader(
        dataset,
        tokenizer,
        B,
        T,
        packing=Stream(),
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
    loss: Loss = "assistant",
    max_document_tokens: int | None = MAX_DOCUMENT_TOKENS,
    num_workers: int = 1,
    prefetch: int = 4,
) -> Pairs:
    """Return a generator of nanochat's SFT batches: rows of whole conversations, the best fit of 100, then padding.

    Targets are -1 in padding and where the assistant does not speak (`loss="all"`: in padding only). A conversation
    longer than T + 1 tokens is cut to that; nanochat never finds a row for one, and ends up with padding only.
    The arguments are those of `mid_loader`.
    """
    loader = Loader(
        dataset,
        tokenizer,
        B,
        T,
        packing=BestFitPad(window=100),
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
        rank, world_size: which shard of the data this process reads; None: from `torch.distributed`, as in nanochat.
        progress: updated with every batch. nanochat's own loader reports none; the fraction of the data is that of SFT.
        input_dtype: `torch.int64` for inputs as nanochat's.
        tokenizer, B, T, device, num_workers, prefetch: as of `mid_loader`.

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
        packing=BestFitCrop(window=1000, refill=128),
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
    # start it, so that it holds the loader: close() on a generator that never ran would not close the loader
    next(pairs)
    return pairs


def _deliver(loader: Loader, progress: Progress | None, input_dtype: torch.dtype) -> Generator[Any, None, None]:
    with loader:
        if progress is not None and not isinstance(progress, Progress):
            raise ValueError(f"progress={progress!r} is not allowed; use a Progress, or None")
        yield
        for batch in loader:
            if progress is not None:
                progress.update(batch)
            yield batch.inputs.to(input_dtype), batch.targets


@dataclass(frozen=True)
class _Texts:
    """A data set of strings, as records."""

    texts: Any

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> object:
        text = self.texts[index]
        return {"text": text} if isinstance(text, str) else text


def _records(documents: Any) -> Any:
    """Return the documents in a form that `Loader` takes: strings become records, unless they are paths."""
    indexed = hasattr(type(documents), "__len__") and hasattr(type(documents), "__getitem__")
    # a dict has no document 0; Loader refuses it with an explanation
    if not indexed or isinstance(documents, (str, Mapping)):
        return documents
    if not len(documents) or not isinstance(documents[0], str):
        return documents
    paths = isinstance(documents, (list, tuple)) and all(map(_looks_like_a_path, documents))
    return documents if paths else _Texts(documents)


def _looks_like_a_path(document: object) -> bool:
    return isinstance(document, str) and document.lower().endswith(SUFFIXES)
