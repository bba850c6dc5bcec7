"""Packers of others over the same ready tokens, each as its users call it, on one thread.

    documents, as each wants them   ->   an Open for each that is installed   ->   tokens and slots of a piece of work

What they are given is prepared before the clock starts, and what they return is theirs: packed Arrow rows (TRL), numpy
batches (Grain), one flat tensor without padding (transformers).
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
from nanopack.render.renderer import Document

TakePacked = Callable[[], tuple[int, int]]
"""Does a piece of work and returns the tokens in it, and the slots that these take with their padding."""
OpenPacked = Callable[[], AbstractContextManager[TakePacked]]


class NotHereError(Exception):
    """A package is not installed, or cannot be imported; the message is the reason in the report."""


def need(package: str) -> Any:
    """Return the package of that name; NotHereError says why not."""
    if importlib.util.find_spec(package.partition(".")[0]) is None:
        raise NotHereError(f"{package.partition('.')[0]} is not installed")
    try:
        return importlib.import_module(package)
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), "")
        raise NotHereError(f"{package} cannot be imported ({type(error).__name__}: {first_line})") from error


def trl(documents: Sequence[Document], strategy: str) -> OpenPacked:
    """Return TRL's pack_dataset over all documents at a time, in memory."""
    pack_dataset, datasets = need("trl").pack_dataset, need("datasets")
    need("pyarrow").set_cpu_count(1)
    datasets.disable_progress_bars()
    columns = {"input_ids": [d.ids.astype(np.int32) for d in documents], "loss_mask": [d.mask for d in documents]}
    dataset = datasets.Dataset.from_dict(columns).with_format("arrow")
    tokens = sum(len(document.ids) for document in documents)

    @contextlib.contextmanager
    def open_() -> Iterator[TakePacked]:
        def take() -> tuple[int, int]:
            packed = pack_dataset(dataset, ROW, strategy, {"load_from_cache_file": False})
            return tokens, len(packed) * ROW

        yield take

    return open_


def grain(documents: Sequence[Document], bins: int) -> OpenPacked:
    """Return Grain's first fit into so many open rows, in batches."""
    grain_, experimental = need("grain"), need("grain.experimental")
    records = [{"input_ids": d.ids.astype(np.int32), "loss_mask": d.mask.astype(np.int32)} for d in documents]

    @contextlib.contextmanager
    def open_() -> Iterator[TakePacked]:
        one_thread = grain_.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        parent = grain_.MapDataset.source(records).repeat().to_iter_dataset(one_thread)
        wanted = {"input_ids": ROW, "loss_mask": ROW}
        packed = experimental.FirstFitPackIterDataset(parent, length_struct=wanted, num_packing_bins=bins)
        batches = iter(packed.batch(ROWS))

        def take() -> tuple[int, int]:
            batch = next(batches)
            segments = batch["input_ids_segment_ids"]
            return int(np.count_nonzero(segments)), segments.size

        yield take

    return open_


def flattening(documents: Sequence[Document]) -> OpenPacked:
    """Return transformers' flattening collator over as many documents as fit into a batch."""
    collate = need("transformers").DataCollatorWithFlattening(return_tensors="pt")
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
    def open_() -> Iterator[TakePacked]:
        turns = itertools.cycle(groups)

        def take() -> tuple[int, int]:
            tokens = int(collate(next(turns))["input_ids"].numel())
            return tokens, tokens

        yield take

    return open_
