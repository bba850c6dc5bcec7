"""Name the rows that are packed and not yet delivered, for a state, and find them again.

    rows of documents   ->   name_row(), 8 bytes a number   ->   plain_rows(): a state's lists   ->   rows_of()

Made once a row, in bytes that pickle at the speed of a copy, because a state is made for every batch.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nanopack.packing.rows import Row, Run
from nanopack.producer.reader import ReadDocument

PlainRow = list[Any]
"""[CRC32 of the documents' checksums, [read, ...], [length, ...]], an entry a run; [0, [], []]: a row of padding."""


def digest(documents: Iterable[ReadDocument]) -> int:
    """Return a checksum of documents."""
    return zlib.crc32(b"".join([document.checksum for document in documents]))


def name_row(row: Row) -> bytes:
    """Return a row of whole documents, or of their beginnings, as bytes for `plain_rows`."""
    documents = [run.document for run in row]
    return array("q", [digest(documents), *[d.read for d in documents], *[run.length for run in row]]).tobytes()


def plain_rows(batches: Iterable[Iterable[bytes]]) -> list[list[PlainRow]]:
    """Return the rows of batches as a state has them, (JSON-able); b"" is a row of padding."""
    return [[_plain(named) for named in rows] for rows in batches]


def _plain(named: bytes) -> PlainRow:
    numbers = array("q", named).tolist() or [0]
    runs = len(numbers) // 2
    return [numbers[0], numbers[1 : 1 + runs], numbers[1 + runs :]]


def reads_in(batches: Iterable[Iterable[PlainRow]]) -> set[int]:
    """Return the reads of a shard whose documents are in these rows."""
    return {read for rows in batches for _, reads, _ in rows for read in reads}


def rows_of(batches: Iterable[Iterable[PlainRow]], documents: Mapping[int, ReadDocument]) -> list[list[Row]]:
    """Return the rows of batches, made of documents by their reads. ValueError where a document is another one."""
    return [[_row(documents, *row) for row in rows] for rows in batches]


def _row(documents: Mapping[int, ReadDocument], was: int, reads: Sequence[int], lengths: Sequence[int]) -> Row:
    row = [Run(documents[read], 0, length) for read, length in zip(reads, lengths, strict=True)]
    if digest(run.document for run in row) != was:
        raise ValueError(
            f"the documents of reads {', '.join(map(str, reads))} are not those of the row that waited for its turn "
            f"when the state was saved: the data or the tokenizer have changed; resume with what was used"
        )
    return row
