"""Read row i of Parquet files, which have random access to row groups only.

path   ->   Rows[i], as a dict   ->   files.py
            RowGroups: the group read last or, for a shuffled data set, all that were read (unpacked.py)
"""

from __future__ import annotations

import importlib
import logging
import mmap
from bisect import bisect_right
from itertools import accumulate
from typing import Any

import numpy as np

from nanopack.conversations.arrow import cell_reader, columns_read, row_type
from nanopack.conversations.kinds import refuse_other_kinds
from nanopack.conversations.random_access import PlainBytes, Recent, Version, count_open, open_file
from nanopack.conversations.unpacked import ALIGN_BYTES, Scratch, no_room
from nanopack.errors import StorageError

log = logging.getLogger("nanopack")


class Mapped:
    """A row group that is mapped into memory, for which Python keeps a file open; None where that was closed."""

    def __init__(self, table: Any) -> None:
        self.file: Any = table


def read_row_group(version: Version, group: int, columns: tuple[str, ...]) -> Any:
    """Return one row group as a pyarrow table."""
    # One thread and a file of its own: nothing of pyarrow's is shared with a forked process.
    with open_file(version) as file:
        try:
            with _parquet(version.path).ParquetFile(file, pre_buffer=False) as groups:
                table = groups.read_row_group(group, list(columns), use_threads=False)
        # All of pyarrow's errors are ValueErrors or OSErrors.
        except (ValueError, OSError) as error:
            file.check()
            # what the system says of a read may pass
            if getattr(error, "errno", None):
                raise
            raise StorageError(f"{version.path} is damaged in row group {group} ({error}); copy it again") from error
        file.check()
        return table


def _parquet(path: str) -> Any:
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImportError(f"{path} is Parquet, which needs pyarrow; pip install nanopack-gpu[parquet]") from error


class RowGroups:
    """Decoded row groups of several files: the one read last or, with a `scratch` file, all that were read."""

    def __init__(self, scratch: Scratch | None) -> None:
        self.scratch = scratch
        self._last = Recent(1, read_row_group)
        self._mapped: dict[int, Mapped] = {}

    def __reduce__(self) -> tuple[type[RowGroups], tuple[Scratch | None]]:
        return RowGroups, (self.scratch,)

    def get(self, version: Version, group: int, columns: tuple[str, ...], begins: np.ndarray) -> Any:
        """Return a row group as a pyarrow table.

        `begins`, (groups of the file,) int64, has 1 + the place in `scratch` of those that are there; 0 elsewhere.
        """
        if self.scratch is not None and not begins[group]:
            self._keep(version, group, columns, begins)
        if self.scratch is None:
            return self._last.get(version, group, columns)
        return self._map(self.scratch, int(begins[group]) - 1)

    def _map(self, scratch: Scratch, begin: int) -> Any:
        """Return a row group that is in `scratch`; mapping one again takes a tenth of a millisecond."""
        mapped = self._mapped.get(begin)
        # held to the end: another thread may close it
        table = None if mapped is None else mapped.file
        if table is None:
            pa = importlib.import_module("pyarrow")
            table = pa.ipc.open_stream(pa.py_buffer(scratch.map(begin))).read_all()
            mapped = self._mapped[begin] = Mapped(table)
            count_open(mapped)
        return table

    def _keep(self, version: Version, group: int, columns: tuple[str, ...], begins: np.ndarray) -> None:
        assert self.scratch is not None
        data = _stream(self._last.get(version, group, columns))
        try:
            begin, _ = self.scratch.append([data])
        except OSError as error:
            self.scratch = None
            log.warning(
                "shuffled rows are slow from now on: each decodes its row group; %s", no_room(version.path, error)
            )
        else:
            begins[group] = begin + 1


def _stream(table: Any) -> bytes:
    """Return a table in Arrow's stream format, which says itself where it ends."""
    pa = importlib.import_module("pyarrow")
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data + b"\0" * (-len(data) % ALIGN_BYTES)


class Rows:
    """The rows of a Parquet file, as dicts of the columns that matter."""

    def __init__(self, version: Version, groups: RowGroups) -> None:
        self._version, self._groups = version, groups
        schema, sizes = self._footer(_parquet(version.path))
        self._columns = tuple(columns_read(version.path, schema))
        self._types = [schema.field(name).type for name in self._columns]
        self._names = schema.names
        self._ends = list(accumulate(sizes))
        self._prepare()

    def _prepare(self) -> None:
        self._cells = list(map(cell_reader, self._types))
        self._row = row_type(self._names, self._columns)
        self._begins = np.zeros(0, np.int64)
        if self._groups.scratch is not None:
            self._groups.scratch.create()
            # forked processes share it, and what any of them has unpacked
            self._begins = np.frombuffer(mmap.mmap(-1, 8 * max(1, len(self._ends))), np.int64)

    def __getstate__(self) -> dict[str, object]:
        # closures and classes made here do not pickle, and another process unpacks for itself
        return self.__dict__ | {"_cells": None, "_row": None, "_begins": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    def _footer(self, parquet: Any) -> tuple[Any, list[int]]:
        """Return the schema and the sizes of the row groups."""
        try:
            with open_file(self._version) as file, parquet.ParquetFile(file) as groups:
                sizes = [groups.metadata.row_group(k).num_rows for k in range(groups.num_row_groups)]
                return groups.schema_arrow, sizes
        # All of pyarrow's errors are ValueErrors or OSErrors.
        except (ValueError, OSError) as error:
            refuse_other_kinds(self._version.path, PlainBytes.head(self._version.path), (b"PAR1",))
            why = f"{self._version.path} cannot be read as Parquet ({error}); make or copy it again"
            raise ValueError(why) from error

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, row: int) -> object:
        group = bisect_right(self._ends, row)
        table = self._groups.get(self._version, group, self._columns, self._begins)
        at = row - (self._ends[group - 1] if group else 0)
        cells = zip(self._columns, self._cells, strict=True)
        return self._row({name: read(table.column(name)[at]) for name, read in cells})

    def where(self, row: int) -> str:
        return f"{self._version.path} row {row}"
