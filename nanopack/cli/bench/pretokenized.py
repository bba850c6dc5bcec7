"""How fast are documents packed whose tokens are ready, beside the packers of others and a copy of the same bytes?

    documents as arrays   ->   our packings, others', a copy of a batch   ->   tokens per second, padding, ratios

One thread each. Documents are cut to T beforehand, so that nobody cuts or drops. Ours and Grain's make batches, 12 and
24 bytes a token; TRL makes packed rows of Arrow, which are still to be made tensors. The copy is of a batch of ours, 12
bytes a slot, to another: no packer that writes such batches can be faster.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from nanopack.cli.bench import other_packers as peers
from nanopack.cli.bench.corpus import ROW, ROWS, Data, at_least
from nanopack.cli.bench.other_packers import NotHereError, OpenPacked, TakePacked
from nanopack.cli.bench.rounds import Pace, Row, Spread, Table, Turn, not_measured, ratio, take_turns
from nanopack.loader import Loader
from nanopack.packing.packers import PACKINGS
from nanopack.render.renderer import Document

TOKENS, QUICK_TOKENS = 4_000_000, 300_000
COPY = "a copy of the same bytes"
OURS = "nanopack, best_fit"
# More batches than a cache of the second level holds.
COPIES = 16


class Packed(NamedTuple):
    """Of one turn."""

    tokens_per_s: float
    padding_share: float


@contextlib.contextmanager
def loader(documents: Sequence[Document], tokenizer: Any, **settings: Any) -> Iterator[TakePacked]:
    """Open a loader over ready tokens; yield what takes a batch."""
    records = [{"input_ids": document.ids, "loss_mask": document.mask} for document in documents]
    with Loader(records, tokenizer, ROWS, ROW, device="cpu", **settings) as batches:
        yield lambda: (next(batches).num_tokens, ROWS * ROW)


@contextlib.contextmanager
def copy() -> Iterator[TakePacked]:
    """Yield what copies the tensors of a batch."""
    made = [
        (torch.zeros(ROWS, ROW, dtype=torch.int32), torch.zeros(ROWS, ROW, dtype=torch.int64)) for _ in range(COPIES)
    ]
    turns = itertools.cycle(zip(made, made[1:] + made[:1], strict=True))

    def take() -> tuple[int, int]:
        for to, source in zip(*next(turns), strict=True):
            to.copy_(source)
        return ROWS * ROW, ROWS * ROW

    yield take


def turn_of(open_: OpenPacked, warm: int) -> Turn[Packed]:
    """Return the turn that opens the contender, lets it work `warm` times, and then measures."""

    def turn(seconds: float) -> Packed:
        with open_() as take:
            for _ in range(warm):
                take()
            tokens = slots = 0
            began = time.perf_counter()
            while not tokens or time.perf_counter() - began < seconds:
                more_tokens, more_slots = take()
                tokens, slots = tokens + more_tokens, slots + more_slots
            return Packed(tokens / (time.perf_counter() - began), 1 - tokens / slots)

    return turn


def measure(data: Data, pace: Pace) -> list[Table]:
    """Return tokens per second and padding of all, and the ratios to the copy and to our default packing."""
    documents = at_least(data.documents, QUICK_TOKENS if pace.quick else TOKENS)
    turns = {}
    for packing in PACKINGS:
        open_ = partial(loader, documents, data.tokenizer, packing=packing, num_workers=0)
        turns[f"nanopack, {packing}"] = turn_of(open_, 2)
    process = partial(loader, documents, data.tokenizer, num_workers=1)
    turns["nanopack, best_fit, in a process"] = turn_of(process, pace.drain)
    turns[COPY] = turn_of(copy, COPIES)
    absent = []
    for name, make in _peers(documents).items():
        pace.tell(f"preparing {name}")
        try:
            turns[name] = turn_of(make(), 1)
        except NotHereError as why:
            absent.append(not_measured(name, str(why)))
    return [Table("Ready tokens to batches", [*rows(take_turns(turns, pace)), *absent])]


def _peers(documents: Sequence[Document]) -> dict[str, Callable[[], OpenPacked]]:
    return {
        "TRL pack_dataset, bfd": lambda: peers.trl(documents, "bfd"),
        "TRL pack_dataset, wrapped": lambda: peers.trl(documents, "wrapped"),
        "Grain first fit, 64 rows": lambda: peers.grain(documents, 64),
        "Grain first fit, 8 rows": lambda: peers.grain(documents, 8),
        "transformers, flattening collator": lambda: peers.flattening(documents),
    }


def rows(measured: dict[str, list[Packed]]) -> list[Row]:
    """Return a row of each, with its ratios."""
    speeds = {name: Spread(tuple(packed.tokens_per_s for packed in rounds)) for name, rounds in measured.items()}
    return [
        Row(
            name,
            {
                "tokens_per_s": speed,
                "padding_share": Spread(tuple(packed.padding_share for packed in measured[name])),
                "of_copy_share": ratio(speed, speeds[COPY]),
                "to_best_fit_x": ratio(speed, speeds[OURS]),
            },
        )
        for name, speed in speeds.items()
    ]
