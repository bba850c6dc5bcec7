"""Name the rows that are packed and not yet delivered, for a state, and find them again.

HoldingPacker.ahead()   ->   named(): bytes, pickled with every batch   ->   plain(): a state's lists   ->   rows_of()
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from nanopack.packing.rows import Rows

PlainBatch = list[list[int]]
"""[[read, ...], [length, ...], [documents of each row]]: a batch of whole documents, or of their beginnings."""
Named = tuple[list[tuple[int, int]], bytes, bytes, bytes]
"""Of each batch how many documents and bounds it has; documents, lengths and bounds of all, int64."""


def named(ahead: Sequence[Rows]) -> Named:
    """Name the rows of batches, at little cost: it is done for every batch, and few of these names are looked at."""
    counts = [(len(rows.documents), len(rows.bounds)) for rows in ahead]
    documents, lengths = b"".join(rows.documents.data for rows in ahead), b"".join(rows.lengths.data for rows in ahead)
    return counts, documents, lengths, b"".join(rows.bounds.data for rows in ahead)


def plain(names: Named) -> list[PlainBatch]:
    """Return the batches of `named` as a state has them (JSON-able)."""
    counts, *columns = names
    documents, lengths, bounds = (np.frombuffer(column, np.int64) for column in columns)
    found, piece, bound = [], 0, 0
    for pieces, ends in counts:
        own = slice(piece, piece + pieces)
        in_rows = np.diff(bounds[bound : bound + ends])
        found.append([documents[own].tolist(), lengths[own].tolist(), in_rows.tolist()])
        piece, bound = piece + pieces, bound + ends
    return found


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
