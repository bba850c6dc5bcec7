"""Name the rows that are packed and not yet delivered, for a state, and find them again.

    rows of documents   ->   name_row(), 8 bytes a number   ->   plain_rows(): a state's lists   ->   rows_of()

Made once a row, in bytes that pickle at the speed of a copy, because a state is made for every batch.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping
from itertools import chain

from nanopack.packing.rows import Row, Run
from nanopack.producer.reader import ReadDocument

PlainRow = list[list[int]]
"""[[read, ...], [length, ...]], an entry a run; [[], []]: a row of padding."""


def name_row(row: Row) -> bytes:
    """Return a row of whole documents, or of their beginnings, as bytes for `plain_rows`."""
    return array("q", [run[0].read for run in row] + [run[2] for run in row]).tobytes()


def plain_rows(batches: Iterable[Iterable[bytes]]) -> list[list[PlainRow]]:
    """Return the rows of batches as a state has them (JSON-able); b"" is a row of padding."""
    return [[_plain(array("q", named).tolist()) for named in rows] for rows in batches]


def _plain(numbers: list[int]) -> PlainRow:
    return [numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]]


def reads_in(batches: Iterable[Iterable[PlainRow]]) -> set[int]:
    """Return the reads of a shard whose documents are in these rows."""
    return {read for rows in batches for reads, _ in rows for read in reads}


def rows_of(
    batches: Iterable[Iterable[PlainRow]],
    documents: Mapping[int, ReadDocument],
    crop: Callable[[ReadDocument, int], None] | None,
) -> list[list[Row]]:
    """Return the rows of batches, made of documents by their reads. ValueError where one has another length now.

    With `crop`, a longer document is cropped to the length that it has in its row.
    """
    found = [
        [[Run(documents[read], 0, length) for read, length in zip(*row, strict=True)] for row in rows]
        for rows in batches
    ]
    for document, _, length in chain.from_iterable(chain.from_iterable(found)):
        if crop is not None and length < len(document.words):
            crop(document, length)
        if length != len(document.words):
            raise changed_error(length, len(document.words))
    return found


def changed_error(were: int, are: int) -> ValueError:
    """Return the error for documents that waited, of these numbers of tokens."""
    return ValueError(
        f"the documents that waited had {were} tokens when the state was saved, and have {are} now, or others: the "
        f"data or the tokenizer have changed; resume with what was used"
    )
