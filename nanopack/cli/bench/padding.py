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
from nanopack.config import LoaderConfig
from nanopack.packing.packers import WINDOWS, make_packer

DOCUMENTS, QUICK_DOCUMENTS = 50_000, 6_000
WINDOW_SIZES = (16, 32, 64, 128, 256, 1024, 4096)
QUICK_WINDOW_SIZES = (16, 64, 256)


def lengths(data: Data, documents: int) -> list[int]:
    """Return at least `documents` lengths: whole passes over the data, each in another order."""
    own = [len(document.ids) for document in data.documents]
    passes = -(-documents // len(own))
    return [length for seed in range(passes) for length in random.Random(seed).sample(own, len(own))]


def pack(packing: str, window: int | None, all_lengths: Sequence[int]) -> dict[str, int | float]:
    """Return the fractions of padding and of tokens cut, and the longest wait in rows, up to the end of the data."""
    config = LoaderConfig(packing=packing, window=window, batch_size=ROWS, seq_len=ROW)
    limit = config.row_tokens if config.cuts_to_row else max(all_lengths)
    ended = False

    def read() -> tuple[int, int] | None:
        nonlocal ended
        item = next(numbered, None)
        ended = item is None
        return item

    numbered = iter([(number, min(length, limit)) for number, length in enumerate(all_lengths)])
    packer = make_packer(packing, read, batch_size=ROWS, seq_len=ROW, window=window)
    rows = tokens = 0
    while (batch := packer.next_rows()) and not ended:
        rows += len(batch)
        tokens += sum(min(sum(run.length for run in row), ROW) for row in batch)
    # without max_age a document may starve: it is never placed, and so never counted
    state = packer.state()
    still_waiting = [state["row"] - since for since in state.get("since", ())]
    beyond_row = sum(max(0, length - limit) for length in all_lengths)
    return {
        "padding_share": 1 - tokens / (rows * ROW) if rows else 0.0,
        "cut_share": (beyond_row + packer.cropped) / sum(all_lengths),
        "rows": rows,
        "longest_wait_rows": max([packer.longest_wait, *still_waiting]),
    }


def measure(data: Data, pace: Pace) -> list[Table]:
    """Return a table of the packings with their defaults, and one of windows."""
    some = lengths(data, QUICK_DOCUMENTS if pace.quick else DOCUMENTS)
    sizes = QUICK_WINDOW_SIZES if pace.quick else WINDOW_SIZES
    packings = [("pad", None), ("stream", None), *WINDOWS.items()]
    defaults = []
    for packing, window in packings:
        pace.show(packing)
        name = packing if window is None else f"{packing}, window {window}"
        defaults.append(Result(name, {**pack(packing, window, some)}))
    return [
        Table(f"Each packing with its defaults, {len(some):,} documents", defaults),
        Table("Other windows", [_of_window(window, some, pace) for window in sizes], "window"),
    ]


def _of_window(window: int, all_lengths: Sequence[int], pace: Pace) -> Result:
    pace.show(f"window {window}")
    found = {packing: pack(packing, window, all_lengths) for packing in WINDOWS}
    return Result(
        str(window),
        {
            "best_fit_padding_share": found["best_fit"]["padding_share"],
            "best_fit_pad_padding_share": found["best_fit_pad"]["padding_share"],
            "best_fit_crop_cut_share": found["best_fit_crop"]["cut_share"],
            "best_fit_wait_rows": found["best_fit"]["longest_wait_rows"],
            "best_fit_pad_wait_rows": found["best_fit_pad"]["longest_wait_rows"],
            "best_fit_crop_wait_rows": found["best_fit_crop"]["longest_wait_rows"],
        },
    )
