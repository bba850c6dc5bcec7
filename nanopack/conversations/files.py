"""Read record i of files without reading the records before it.

    paths   ->   open_files()   ->   Files[i], the raw record
              random_access.py       data_sets.py finds the paths before, records.py checks the record after

JSON lines, JSON arrays, Parquet and Arrow come in; parsed JSON and rows go out, whatever they hold. A text file is
scanned once for where its records begin; then a record is read as its bytes, or as a row of its row group.
"""

from __future__ import annotations

import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np

from nanopack.conversations.arrow import ArrowRows
from nanopack.conversations.json_array import scan_array
from nanopack.conversations.kinds import refuse_other_kinds
from nanopack.conversations.parquet import RowGroups, Rows
from nanopack.conversations.random_access import PlainBytes, Version
from nanopack.conversations.source import Source
from nanopack.conversations.unpacked import Scratch, UnpackedBytes
from nanopack.errors import ConversationError

TEXT_SUFFIXES = tuple(f"{kind}{packed}" for kind in (".jsonl", ".ndjson", ".json") for packed in ("", ".gz", ".zst"))
SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".arrow")
# What `datasets` writes next to the data.
NOT_DATA = ("dataset_info.json", "state.json", "dataset_dict.json", "dataset_infos.json")
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


def parse_json(raw: bytes, what: str) -> object:
    """Return the JSON value of a line or element; ConversationError where it is not one."""
    try:
        # JSON's own white space, and no other
        return json.loads(raw.decode().strip(" \t\r\n"))
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        why = f"not UTF-8: byte {byte:#04x} at byte {error.start + 1} of the {what}; save the file as UTF-8"
    except json.JSONDecodeError as error:
        near = error.doc[max(0, error.pos - 20) : error.pos + 20]
        why = f"not JSON: {error.msg}, column {error.colno}, near {near!r}; a {what} must be one JSON value"
        why += _hint(error, what)
    except (ValueError, RecursionError) as error:
        why = f"JSON that cannot be read: {error}"
    raise ConversationError(why)


def _hint(error: json.JSONDecodeError, what: str) -> str:
    """Return the rest of the error for JSON that cannot be parsed: why it may be so, and what to do."""
    if "\0" in error.doc:
        return ", and this holds zero bytes, as a crash leaves them in a file; make or copy it again"
    if what == "line" and error.doc[:1] == "[":
        return "; a file that is one JSON array must be named .json"
    if what == "line" and error.pos == len(error.doc):
        return ", and this one does not end; jq -c . file brings values of several lines into one each"
    return ""


Bytes = PlainBytes | UnpackedBytes


class Lines:
    """The records of a file of JSON lines: its lines that are not blank. Memory: 8 bytes a line."""

    def __init__(self, data: Bytes) -> None:
        self._data = data
        self._bounds, self._blank = scan_lines(data.chunks())

    def __len__(self) -> int:
        return len(self._bounds) - 1 - len(self._blank)

    def __getitem__(self, row: int) -> object:
        line = self._line(row)
        return parse_json(self._data.read(self._bounds[line], self._bounds[line + 1]), "line")

    def where(self, row: int) -> str:
        return f"{self._data.path}:{self._line(row) + 1}"

    def _line(self, row: int) -> int:
        return row + bisect_right(self._blank, row)


class Elements:
    """The records of a file that is one JSON array: its elements. Memory: 8 bytes an element."""

    def __init__(self, data: Bytes) -> None:
        self._data = data
        try:
            self._bounds = scan_array(data.chunks())
        except ValueError as error:
            what = f"{data.path} is a JSON array, but {error}"
            raise ValueError(f"{what}; make or copy it again, or name it .jsonl if it is JSON lines") from error

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, row: int) -> object:
        start, stop = self._bounds[row], self._bounds[row + 1] - 1
        return parse_json(self._data.read(start, stop) if stop > start else b"", "element")

    def where(self, row: int) -> str:
        return f"{self._data.path} element {row}"


def open_text(data: Bytes) -> Lines | Elements:
    """Return the records of a file of JSON; ValueError where it is something else.

    A .json file that begins with [ is an array; else it is JSON lines, as `datasets` writes them.
    """
    head = next(iter(data.chunks()), b"")
    refuse_other_kinds(data.path, head)
    name = data.path.lower().removesuffix(".gz").removesuffix(".zst")
    begins = head.removeprefix(BYTE_ORDER_MARK).lstrip()[:1]
    return Elements(data) if name.endswith(".json") and begins == b"[" else Lines(data)


Part = Lines | Elements | Rows | ArrowRows


class Files(Source):
    """The records of several files, one file after the other."""

    def __init__(self, parts: Sequence[Part], versions: Sequence[Version] = ()) -> None:
        self._parts, self._versions = parts, versions
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

    def version(self) -> str:
        """Return names, sizes and times of the files."""
        found = [(os.path.basename(one.path), one.size, one.mtime_ns) for one in self._versions]
        return repr(found) if found else ""

    def _find(self, index: int) -> tuple[Part, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"conversation {index} of {len(self)}")
        part = bisect_right(self._ends, index)
        return self._parts[part], index - (self._ends[part - 1] if part else 0)


def open_files(paths: Sequence[str], *, shuffled: bool = False) -> Files:
    """Return the records of files; ValueError where one cannot be read, ImportError where a package is missing.

    With `shuffled` they are to be read in any order: row groups of Parquet are then kept, unpacked, once they are read.
    """
    scratch = Scratch()
    groups = RowGroups(scratch if shuffled else None)

    def open_one(version: Version) -> Part:
        path, name = version.path, version.path.lower()
        if name.endswith(".parquet"):
            return Rows(version, groups)
        if name.endswith(".arrow"):
            return ArrowRows(path)
        raw = PlainBytes(version)
        if not name.endswith((".gz", ".zst")):
            return open_text(raw)
        refuse_other_kinds(path, PlainBytes.head(path), (b"\x1f\x8b" if name.endswith(".gz") else b"\x28\xb5\x2f\xfd",))
        return open_text(UnpackedBytes(raw, scratch))

    versions = [Version.of(path) for path in paths]
    return Files([open_one(version) for version in versions], versions)


def files_in(folder: str) -> list[str]:
    """Return the files of a folder that can be read, sorted; of one that `datasets` saved, those that it lists."""
    names = sorted(os.listdir(folder))
    if "dataset_dict.json" in names:
        splits = " or ".join(repr(os.path.join(folder, name)) for name in names if "." not in name)
        raise ValueError(f"conversations={folder!r} is a saved DatasetDict; name one of its splits, {splits}")
    if "state.json" in names and "dataset_info.json" in names:
        with open(os.path.join(folder, "state.json"), encoding="utf-8") as file:
            return [os.path.join(folder, data["filename"]) for data in json.load(file)["_data_files"]]
    known = [name for name in names if name.lower().endswith(SUFFIXES) and name not in NOT_DATA and name[0] not in "._"]
    files = [path for path in (os.path.join(folder, name) for name in known) if os.path.isfile(path)]
    if not files:
        known_suffixes = ", ".join(SUFFIXES)
        raise ValueError(f"conversations={folder!r} is a folder without files that end in {known_suffixes}; name files")
    return files
