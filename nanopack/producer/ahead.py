"""Name the rows that are packed and not yet delivered, for a state, and find them again.

HoldingPacker.ahead()   ->   named(): bytes, of each batch   ->   plain(): a state's lists   ->   rows_of()
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from nanopack.packing.rows import Rows

PlainBatch = list[list[int]]
"""[[read, ...], [length, ...], [documents of each row]]: a batch of whole documents, or of their beginnings."""
Named = tuple[bytes, bytes, bytes]
"""Documents, lengths and bounds of a batch, int64."""


def named(rows: Rows) -> Named:
    """Name the rows of a batch, at little cost: few of these names are looked at."""
    return rows.documents.tobytes(), rows.lengths.tobytes(), rows.bounds.tobytes()


def plain(names: Named) -> PlainBatch:
    """Return a batch as a state has it (JSON-able)."""
    documents, lengths, bounds = (np.frombuffer(column, np.int64) for column in names)
    return [documents.tolist(), lengths.tolist(), np.diff(bounds).tolist()]


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
