"""How much of a batch is padding, how much is cut and how long does a document wait, by packing and window?

    lengths of the documents   ->   each packing   ->   padding, cut, longest wait

No clock here: every number is a count, the same on every machine. The data is repeated, each pass in another order,
until there are DOCUMENTS. Rows left half empty by the end of the data do not count.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from nanopack.cli.bench.corpus import ROW, ROWS, Data
from nanopack.cli.bench.rounds import Pace, Result, Table
from nanopack.packing import BestFit, BestFitCrop, BestFitPad, Packing, Pad, Stream, simulate

DOCUMENTS, QUICK_DOCUMENTS = 50_000, 6_000
WINDOW_SIZES = (16, 32, 64, 128, 256, 1024, 4096)
QUICK_WINDOW_SIZES = (16, 64, 256)


def lengths(data: Data, documents: int) -> list[int]:
    """Return at least `documents` lengths: whole passes over the data, each in another order."""
    own = [len(document.ids) for document in data.documents]
    passes = -(-documents // len(own))
    return [length for seed in range(passes) for length in random.Random(seed).sample(own, len(own))]


def pack(packing: Packing, all_lengths: Sequence[int]) -> dict[str, int | float]:
    """Return the fractions of padding and of tokens cut, and the longest wait in rows, up to the end of the data."""
    packed = simulate(packing, all_lengths, ROW, batch_size=ROWS, to_end=False)
    return {
        "padding_fraction": packed.padding,
        "cut_fraction": packed.cut / sum(all_lengths),
        "rows": packed.rows,
        "longest_wait_rows": packed.longest_wait_rows,
    }


def measure(data: Data, pace: Pace) -> list[Table]:
    """Return a table of the packings with their defaults, and one of windows."""
    some = lengths(data, QUICK_DOCUMENTS if pace.quick else DOCUMENTS)
    sizes = QUICK_WINDOW_SIZES if pace.quick else WINDOW_SIZES
    packings: list[Packing] = [Pad(), Stream(), BestFit(), BestFitPad(), BestFitCrop()]
    defaults = []
    for packing in packings:
        pace.show(packing.name)
        window = packing.options().get("window")
        name = packing.name if window is None else f"{packing.name}, window {window}"
        defaults.append(Result(name, {**pack(packing, some)}))
    return [
        Table(f"Each packing with its defaults, {len(some):,} documents", defaults),
        Table("Other windows", [_of_window(window, some, pace) for window in sizes], "window"),
    ]


def _of_window(window: int, all_lengths: Sequence[int], pace: Pace) -> Result:
    pace.show(f"window {window}")
    found = {kind.name: pack(kind(window=window), all_lengths) for kind in (BestFit, BestFitPad, BestFitCrop)}
    return Result(
        str(window),
        {
            "best_fit_padding_fraction": found["best_fit"]["padding_fraction"],
            "best_fit_pad_padding_fraction": found["best_fit_pad"]["padding_fraction"],
            "best_fit_crop_cut_fraction": found["best_fit_crop"]["cut_fraction"],
            "best_fit_wait_rows": found["best_fit"]["longest_wait_rows"],
            "best_fit_pad_wait_rows": found["best_fit_pad"]["longest_wait_rows"],
            "best_fit_crop_wait_rows": found["best_fit_crop"]["longest_wait_rows"],
        },
    )
