"""How far is the slowest rank's work above the mean, and what does dealing rows by cost make of it?

    lengths of documents   ->   rows, their costs   ->   slowest over mean, as packed and balanced, by ranks and T

No clock here: every number is a count, in FLOPs of a Llama-3-8B's step. The lengths are drawn, lognormal with a mean of
1,700 and a sigma of 1.5, as of a long-context mixture; those of the conversations come last. Rows are drawn
from those that are packed, one a rank and step.
"""

from __future__ import annotations

import math
import random

from nanopack.cli.bench.corpus import ROW, Data
from nanopack.cli.bench.rounds import Pace, Result, Table
from nanopack.packing import BestFit
from nanopack.packing.imbalance import LLAMA_3_8B, drawn, row_costs

MEAN, SIGMA = 1700, 1.5
ROW_LENGTHS = (2048, 8192, 32_768, 65_536, 131_072)
RANKS = (8, 64)
WINDOWS, QUICK_WINDOWS = (8, 32), (8,)
DRAWN, QUICK_DRAWN = 200_000, 20_000
DRAWS, QUICK_DRAWS = 20, 2


def measure(data: Data, pace: Pace) -> list[Table]:
    """Return a table by row length of drawn documents, and one of the conversations."""
    draw, mu = random.Random(0), math.log(MEAN) - SIGMA**2 / 2
    lengths = [max(1, int(draw.lognormvariate(mu, SIGMA))) for _ in range(QUICK_DRAWN if pace.quick else DRAWN)]
    own = [len(document.ids) for document in data.documents]
    return [
        Table(
            "Lognormal lengths, mean 1,700, sigma 1.5",
            [one for length in ROW_LENGTHS for one in _of_row_length(length, lengths, pace)],
        ),
        Table("The conversations", _of_row_length(ROW, own, pace)),
    ]


def _of_row_length(seq_len: int, lengths: list[int], pace: Pace) -> list[Result]:
    pace.show(f"T={seq_len:,}")
    costs = row_costs(BestFit(), lengths, seq_len, LLAMA_3_8B)
    found = []
    for ranks in RANKS:
        for window in QUICK_WINDOWS if pace.quick else WINDOWS:
            one = drawn(costs, ranks=ranks, batch_size=1, window=window, windows=QUICK_DRAWS if pace.quick else DRAWS)
            numbers = {f"{field}_x": value for field, value in one._asdict().items()} if one else {}
            found.append(Result(f"T={seq_len:,}, {ranks} ranks, window {window}", {**numbers}))
    return found
