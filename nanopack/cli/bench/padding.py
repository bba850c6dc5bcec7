"""How much of a batch is padding, how much is cut away, and how long does a document wait, for each packing and window?

    lengths of the documents   ->   each packer of packing.py   ->   padding, cut, longest wait

No clock here: every number is a count, the same on every machine. Each pass over the data has an order of its own, and
there are as many passes as it takes to have DOCUMENTS. Rows that the end of the data leaves half empty do not count.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from nanopack.cli.bench.corpus import ROW, ROWS, Data
from nanopack.cli.bench.rounds import Pace, Row, Table
from nanopack.config import LoaderConfig
from nanopack.packing.packers import WINDOWS, make_packer

DOCUMENTS, QUICK_DOCUMENTS = 50_000, 6_000
WINDOW_SIZES = (16, 32, 64, 128, 256, 1024, 4096)
QUICK_WINDOW_SIZES = (16, 64, 256)


def lengths(data: Data, documents: int) -> list[int]:
    """Return so many lengths at least, in whole passes over the data, each in an order of its own."""
    own = [len(document.ids) for document in data.documents]
    passes = -(-documents // len(own))
    return [length for seed in range(passes) for length in random.Random(seed).sample(own, len(own))]


def pack(packing: str, window: int | None, all_lengths: Sequence[int]) -> dict[str, int | float]:
    """Return padding and cut tokens as shares, and the longest wait in rows, until the data end."""
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
    # without max_age a document may starve, and would never be counted as placed
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
    """Return a table of the packings as they come, and one of windows."""
    some = lengths(data, QUICK_DOCUMENTS if pace.quick else DOCUMENTS)
    sizes = QUICK_WINDOW_SIZES if pace.quick else WINDOW_SIZES
    packings = [("pad", None), ("stream", None), *WINDOWS.items()]
    as_they_come = []
    for packing, window in packings:
        pace.tell(packing)
        name = packing if window is None else f"{packing}, window {window}"
        as_they_come.append(Row(name, {**pack(packing, window, some)}))
    return [
        Table(f"The packings as they come, {len(some):,} documents", as_they_come),
        Table("Other windows", [_of_window(window, some, pace) for window in sizes], "window"),
    ]


def _of_window(window: int, all_lengths: Sequence[int], pace: Pace) -> Row:
    pace.tell(f"window {window}")
    found = {packing: pack(packing, window, all_lengths) for packing in WINDOWS}
    return Row(
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
