"""Run other projects' packers on the same pretokenized documents, called as their users call them, on one thread.

    documents in each one's form   ->   a PackedContender each   ->   tokens and positions of a unit of work

Their input is prepared before the clock starts, and they return their own form: packed Arrow rows (TRL), numpy batches
(Grain), one flat tensor without padding (transformers).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from nanopack.cli.bench.corpus import ROW, ROWS
from nanopack.render.document import Document

PackedWork = Callable[[], tuple[int, int]]
"""Does one unit of work; returns its tokens, and the positions that they take with their padding."""
PackedContender = Callable[[], AbstractContextManager[PackedWork]]


class NotHereError(Exception):
    """A package is not installed or cannot be imported; the message becomes the note in the report."""


def need(package: str, name: str | None = None) -> Any:
    """Return the package, or what it calls `name`, which may import more of it; NotHereError if that fails."""
    if importlib.util.find_spec(package.partition(".")[0]) is None:
        raise NotHereError(f"{package.partition('.')[0]} is not installed")
    try:
        found = importlib.import_module(package)
        return getattr(found, name) if name else found
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), "")
        raise NotHereError(f"{package} cannot be imported ({type(error).__name__}: {first_line})") from error


def trl(documents: Sequence[Document], strategy: str, row: int = ROW) -> PackedContender:
    """Return TRL's pack_dataset over all documents at once, in memory; `row` tokens make a row."""
    pack_dataset, datasets = need("trl", "pack_dataset"), need("datasets")
    need("pyarrow").set_cpu_count(1)
    datasets.disable_progress_bars()
    columns = {"input_ids": [d.ids.astype(np.int32) for d in documents], "loss_mask": [d.mask for d in documents]}
    dataset = datasets.Dataset.from_dict(columns).with_format("arrow")
    tokens = sum(len(document.ids) for document in documents)

    @contextlib.contextmanager
    def contender() -> Iterator[PackedWork]:
        def work() -> tuple[int, int]:
            packed = pack_dataset(dataset, row, strategy, {"load_from_cache_file": False})
            return tokens, len(packed) * row

        yield work

    return contender


def grain(documents: Sequence[Document], bins: int) -> PackedContender:
    """Return Grain's first fit with `bins` open rows, batched."""
    grain_, experimental = need("grain"), need("grain.experimental")
    records = [{"input_ids": d.ids.astype(np.int32), "loss_mask": d.mask.astype(np.int32)} for d in documents]

    @contextlib.contextmanager
    def contender() -> Iterator[PackedWork]:
        one_thread = grain_.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        parent = grain_.MapDataset.source(records).repeat().to_iter_dataset(one_thread)
        wanted = {"input_ids": ROW, "loss_mask": ROW}
        packed = experimental.FirstFitPackIterDataset(parent, length_struct=wanted, num_packing_bins=bins)
        batches = iter(packed.batch(ROWS))

        def work() -> tuple[int, int]:
            batch = next(batches)
            segments = batch["input_ids_segment_ids"]
            return int(np.count_nonzero(segments)), segments.size

        yield work

    return contender


def flattening(documents: Sequence[Document]) -> PackedContender:
    """Return transformers' flattening collator over batches of as many documents as fit."""
    collate = need("transformers", "DataCollatorWithFlattening")(return_tensors="pt")
    groups: list[list[dict[str, list[int]]]] = [[]]
    room = ROWS * ROW
    for document in documents:
        if len(document.ids) > room:
            groups.append([])
            room = ROWS * ROW
        labels = np.where(document.mask, document.ids.astype(np.int64), -100)
        groups[-1].append({"input_ids": document.ids.tolist(), "labels": labels.tolist()})
        room -= len(document.ids)

    @contextlib.contextmanager
    def contender() -> Iterator[PackedWork]:
        endless = itertools.cycle(groups)

        def work() -> tuple[int, int]:
            tokens = int(collate(next(endless))["input_ids"].numel())
            return tokens, tokens

        yield work

    return contender
