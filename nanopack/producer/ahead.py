"""Name the rows that are packed and not yet delivered, for a state, and find them again.

HoldingPacker.ahead()   ->   bytes, pickled with every batch   ->   plain(): a state's lists   ->   rows_of()
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from nanopack.packing.rows import Rows

PlainBatch = list[list[int]]
"""[[read, ...], [length, ...], [documents of each row]]: a batch of whole documents, or of their beginnings."""


def plain(ahead: Iterable[Iterable[bytes]]) -> list[PlainBatch]:
    """Return batches as a state has them (JSON-able), from `HeldRows.named`."""
    return [[np.frombuffer(numbers, np.int64).tolist() for numbers in named] for named in ahead]


def rows_of(ahead: Iterable[Any]) -> list[Rows]:
    """Return the rows of the batches in a state."""
    found = []
    for batch in ahead:
        documents, lengths, counts = (np.array(numbers, np.int64) for numbers in batch)
        found.append(Rows(documents, np.zeros(len(documents), np.int64), lengths, np.cumsum([0, *counts.tolist()])))
    return found


def changed_error(were: int, are: int) -> ValueError:
    """Return the error for documents that waited, of these numbers of tokens."""
    return ValueError(
        f"the documents that waited had {were} tokens when the state was saved, and have {are} now, or others: the "
        f"data or the tokenizer have changed; resume with what was used"
    )
