"""Read record i of files without reading the records before it.

    paths   ->   open_files()   ->   Files[i], the raw record
                 file_bytes.py       conversations.py finds the paths before and checks the record after

.jsonl, .jsonl.gz and .parquet come in; parsed JSON and Parquet rows go out, whatever they hold. A file of
lines is scanned once for where they begin; then a record is read as its bytes, or as a row of its row group.
"""

from __future__ import annotations

import importlib
import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from nanopack.conversations.random_access import GzipBytes, OpenFile, PlainBytes, Recent, Version
from nanopack.conversations.source import Source
from nanopack.errors import ConversationError

COLUMNS = ("messages", "conversations", "text", "input_ids")
BESIDE = ("loss_mask", "weight")
NUMBERS = {"bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}
OPEN_FILES = 64
RECENT_BLOCKS = 4
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def scan_lines(chunks: Iterable[bytes]) -> tuple[array[int], array[int]]:
    """Return (bounds, blank): where lines begin, and which are blank. Both take 8 bytes an entry.

    Line k, from 0, is bytes bounds[k] to bounds[k + 1]; the last one may lack its line end. `blank` has an
    entry for every blank line: the number of records before it. A byte order mark belongs to no line.

    >>> scan_lines([b"{}", b"\\n\\n[]"])
    (array('q', [0, 3, 4, 6]), array('q', [1]))
    """
    bounds, blank, size, open_line_blank = array("q", [0]), array("q"), 0, True
    for chunk in chunks:
        if size == 0 and chunk.startswith(BYTE_ORDER_MARK):
            size = bounds[0] = len(BYTE_ORDER_MARK)
            chunk = chunk[size:]
        first = len(bounds) - 1
        ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
        bounds.frombytes((ends + (size + 1)).astype(np.int64).tobytes())
        for line in _blank_lines(chunk, ends, open_line_blank):
            blank.append(first + line - len(blank))
        rest = chunk[ends[-1] + 1 :] if len(ends) else chunk
        open_line_blank = (open_line_blank or len(ends) > 0) and not rest.strip()
        size += len(chunk)
    if size > bounds[-1]:
        if open_line_blank:
            blank.append(len(bounds) - 1 - len(blank))
        bounds.append(size)
    return bounds, blank


def _blank_lines(chunk: bytes, ends: np.ndarray, open_line_blank: bool) -> list[int]:
    """Return which of the lines that end in the chunk are blank, from 0; the first may begin before it."""
    if len(ends) == 0:
        return []
    head = [0] if open_line_blank and chunk[: ends[0] + 1].isspace() else []
    # Few lines begin with white space, so only those are looked at one by one.
    suspects = np.flatnonzero(np.frombuffer(chunk, np.uint8)[ends[:-1] + 1] <= ord(" "))
    return head + [int(k) + 1 for k in suspects if chunk[ends[k] + 1 : ends[k + 1] + 1].isspace()]


def parse_line(raw: bytes) -> object:
    """Return the JSON value of a line; ConversationError where it is not one."""
    try:
        return json.loads(raw.decode().rstrip())
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        why = f"not UTF-8: byte {byte:#04x} at byte {error.start + 1} of the line; save the file as UTF-8"
    except json.JSONDecodeError as error:
        near = error.doc[max(0, error.pos - 20) : error.pos + 20]
        why = f"not JSON: {error.msg}, column {error.colno}, near {near!r}; a line must be one JSON value"
    except (ValueError, RecursionError) as error:
        why = f"JSON that cannot be read: {error}"
    raise ConversationError(why)


class Lines:
    """The records of a .jsonl or .jsonl.gz file: its lines that are not blank. Memory: 8 bytes a line."""

    def __init__(self, data: PlainBytes | GzipBytes) -> None:
        self._data = data
        self._bounds, self._blank = scan_lines(data.chunks())

    def __len__(self) -> int:
        return len(self._bounds) - 1 - len(self._blank)

    def __getitem__(self, row: int) -> object:
        line = self._line(row)
        return parse_line(self._data.read(self._bounds[line], self._bounds[line + 1]))

    def where(self, row: int) -> str:
        return f"{self._data.path}:{self._line(row) + 1}"

    def _line(self, row: int) -> int:
        return row + bisect_right(self._blank, row)


def read_row_group(version: Version, group: int, columns: tuple[str, ...]) -> Any:
    """Return one row group as a pyarrow table."""
    # One thread and a file of its own: nothing of pyarrow's is shared with a forked process.
    with OpenFile(version) as file, _parquet(version.path).ParquetFile(file, pre_buffer=False) as groups:
        return groups.read_row_group(group, list(columns), use_threads=False)


def _parquet(path: str) -> Any:
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImportError(f"{path} is Parquet, which needs pyarrow; pip install nanopack[parquet]") from error


class Rows:
    """The rows of a Parquet file, as dicts of our columns. Memory: the row group read last in all files."""

    def __init__(self, version: Version, groups: Recent[Any]) -> None:
        self._version, self._groups = version, groups
        found, sizes = self._footer(_parquet(version.path))
        if not set(COLUMNS) & set(found):
            raise ValueError(
                f"{version.path} has the columns {', '.join(found)}, but none of {', '.join(COLUMNS)}; "
                "give the column with the conversations one of these names"
            )
        self._columns = tuple(name for name in (*COLUMNS, *BESIDE) if name in found)
        self._ends = list(accumulate(sizes))

    def _footer(self, parquet: Any) -> tuple[list[str], list[int]]:
        """Return the names of the columns and the sizes of the row groups."""
        try:
            with OpenFile(self._version) as file, parquet.ParquetFile(file) as groups:
                sizes = [groups.metadata.row_group(k).num_rows for k in range(groups.num_row_groups)]
                return groups.schema_arrow.names, sizes
        # All of pyarrow's errors are ValueErrors or OSErrors.
        except (ValueError, OSError) as error:
            why = f"{self._version.path} cannot be read as Parquet ({error}); make or copy it again"
            raise ValueError(why) from error

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, row: int) -> object:
        group = bisect_right(self._ends, row)
        table = self._groups.get(self._version, group, self._columns)
        at = row - (self._ends[group - 1] if group else 0)
        return {name: _value(table.column(name)[at]) for name in self._columns}

    def where(self, row: int) -> str:
        return f"{self._version.path} row {row}"


def _value(scalar: Any) -> object:
    """Return a cell as Python has it; ids and masks as an array, for they are long."""
    numbers = getattr(scalar, "values", None)
    if numbers is not None and str(numbers.type) in NUMBERS and not numbers.null_count:
        return numbers.to_numpy(zero_copy_only=False)
    return scalar.as_py()


class Files(Source):
    """The records of several files, one file after the other."""

    def __init__(self, parts: Sequence[Lines | Rows]) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> object:
        part, row = self._find(index)
        return part[row]

    def where(self, index: int) -> str:
        """Return file and line (from 1), or file and row (from 0)."""
        part, row = self._find(index)
        return part.where(row)

    def _find(self, index: int) -> tuple[Lines | Rows, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"conversation {index} of {len(self)}")
        part = bisect_right(self._ends, index)
        return self._parts[part], index - (self._ends[part - 1] if part else 0)


def open_files(paths: Sequence[str]) -> Files:
    """Return the records of .jsonl, .jsonl.gz and .parquet files; ValueError where a file cannot be read."""
    files, groups = Recent(OPEN_FILES, OpenFile), Recent(1, read_row_group)
    blocks = Recent(RECENT_BLOCKS, GzipBytes.inflate)

    def open_one(path: str) -> Lines | Rows:
        status = os.stat(path)
        version = Version(path, status.st_size, status.st_mtime_ns)
        if path.lower().endswith(".parquet"):
            return Rows(version, groups)
        raw = PlainBytes(version, files)
        return Lines(GzipBytes(raw, blocks) if path.lower().endswith(".gz") else raw)

    return Files([open_one(path) for path in paths])
