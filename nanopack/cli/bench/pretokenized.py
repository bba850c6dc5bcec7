"""How fast are pretokenized documents packed, compared with other packers and a copy of the same bytes?

    documents as arrays   ->   our packings, other projects', a copy   ->   tokens per second, padding, ratios

One thread each. Documents are cut to T beforehand, so that no contender cuts or drops any. nanopack and Grain make
batches of 12 and 24 bytes a token; TRL makes packed Arrow rows, which have yet to become tensors. The copy moves one
batch of ours, 12 bytes a position, to another: no packer that writes batches of this kind can be faster.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from nanopack.cli.bench import other_packers, stored
from nanopack.cli.bench.corpus import ROW, ROWS, Data, at_least
from nanopack.cli.bench.other_packers import NotHereError, PackedContender, PackedWork
from nanopack.cli.bench.rounds import Measure, Pace, Result, Spread, Table, in_rounds, not_measured, ratio
from nanopack.loader import Loader
from nanopack.packing.packings import PACKINGS
from nanopack.render.document import Document

TOKENS, QUICK_TOKENS = 4_000_000, 300_000
COPY = "a copy of the same bytes"
OURS = "nanopack, best_fit"
# more batches than a level-2 cache holds
COPIES = 16


class Packed(NamedTuple):
    """Measured once."""

    tokens_per_s: float
    padding_fraction: float


@contextlib.contextmanager
def loader(documents: Sequence[Document], tokenizer: Any, **settings: Any) -> Iterator[PackedWork]:
    """Open a loader over pretokenized documents; yield what fetches a batch."""
    records = [{"input_ids": document.ids, "loss_mask": document.mask} for document in documents]
    with Loader(records, tokenizer, ROWS, ROW, device="cpu", **settings) as batches:
        yield lambda: (next(batches).num_tokens, ROWS * ROW)


@contextlib.contextmanager
def copy() -> Iterator[PackedWork]:
    """Yield what copies the tensors of a batch to another."""
    made = [
        (torch.zeros(ROWS, ROW, dtype=torch.int32), torch.zeros(ROWS, ROW, dtype=torch.int64)) for _ in range(COPIES)
    ]
    pairs = itertools.cycle(zip(made, made[1:] + made[:1], strict=True))

    def work() -> tuple[int, int]:
        for to, source in zip(*next(pairs), strict=True):
            to.copy_(source)
        return ROWS * ROW, ROWS * ROW

    yield work


def measure_of(contender: PackedContender, warm: int) -> Measure[Packed]:
    """Return the measurement that opens the contender, does `warm` units of work, and then counts."""

    def measure(seconds: float) -> Packed:
        with contender() as work:
            for _ in range(warm):
                work()
            tokens = positions = 0
            began = time.perf_counter()
            while not tokens or time.perf_counter() - began < seconds:
                more_tokens, more_positions = work()
                tokens, positions = tokens + more_tokens, positions + more_positions
            return Packed(tokens / (time.perf_counter() - began), 1 - tokens / positions)

    return measure


def measure(data: Data, pace: Pace) -> list[Table]:
    """Return tokens per second and padding of each, and its ratios to the copy and to our default packing."""
    documents = at_least(data.documents, QUICK_TOKENS if pace.quick else TOKENS)
    contenders = {}
    for packing in PACKINGS:
        contender = partial(loader, documents, data.tokenizer, packing=packing, num_workers=0)
        contenders[f"nanopack, {packing}"] = measure_of(contender, 2)
    process = partial(loader, documents, data.tokenizer, num_workers=1)
    contenders["nanopack, best_fit, in a process"] = measure_of(process, pace.drain)
    contenders[COPY] = measure_of(copy, COPIES)
    absent = []
    for name, make in _others(documents).items():
        pace.show(f"preparing {name}")
        try:
            contenders[name] = measure_of(make(), 1)
        except NotHereError as why:
            absent.append(not_measured(name, str(why)))
    of_records = Table("From pretokenized documents to batches", [*rows(in_rounds(contenders, pace)), *absent])
    return [of_records, *stored.tables(pace)]


def _others(documents: Sequence[Document]) -> dict[str, Callable[[], PackedContender]]:
    return {
        "TRL pack_dataset, bfd": lambda: other_packers.trl(documents, "bfd"),
        "TRL pack_dataset, wrapped": lambda: other_packers.trl(documents, "wrapped"),
        "Grain first fit, 64 rows": lambda: other_packers.grain(documents, 64),
        "Grain first fit, 8 rows": lambda: other_packers.grain(documents, 8),
        "transformers, flattening collator": lambda: other_packers.flattening(documents),
    }


def rows(measured: dict[str, list[Packed]]) -> list[Result]:
    """Return a result for each, with its ratios."""
    speeds = {name: Spread(tuple(packed.tokens_per_s for packed in rounds)) for name, rounds in measured.items()}
    return [
        Result(
            name,
            {
                "tokens_per_s": speed,
                "padding_fraction": Spread(tuple(packed.padding_fraction for packed in measured[name])),
                "of_copy_fraction": ratio(speed, speeds[COPY]),
                "to_best_fit_x": ratio(speed, speeds[OURS]),
            },
        )
        for name, speed in speeds.items()
    ]
