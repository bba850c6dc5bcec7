"""Bring values out of Arrow (Parquet, .arrow, datasets.Dataset) as JSON would have them.

    a column's type or feature   ->   cell_reader(), without_nulls()   ->   plain lists and dicts
                                            files.py, data_sets.py

Arrow gives every struct of a column the fields of all of them, null where one has none. So a null field of a struct
counts as absent, at every depth; within a value of Arrow's JSON type nothing is touched.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nanopack.conversations.keys import HARMLESS, RECORD, SHAPES, Row
from nanopack.conversations.kinds import refuse_other_kinds
from nanopack.conversations.lookalikes import may_look_like
from nanopack.conversations.mapped import MappedFiles
from nanopack.conversations.random_access import PlainBytes
from nanopack.conversations.tokens import may_divide

NUMBERS = {"bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}


def without_nulls(value: Any, feature: Any) -> Any:
    """Return the value of a feature of `datasets` without the null fields of its structs."""
    if isinstance(value, dict):
        if type(feature).__name__ == "Json":
            return value
        # A Sequence of a dict is handed out as a dict of lists.
        fields = feature if isinstance(feature, Mapping) else getattr(feature, "feature", None) or {}
        return {k: without_nulls(v, fields.get(k)) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        # a list's feature is [feature], or an object that has it
        of_items = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return value if type(feature).__name__ == "Json" else [without_nulls(item, of_items) for item in value]
    return value


def cell_reader(kind: Any) -> Callable[[Any], Any]:
    """Return the function that gives a cell of that Arrow type as JSON would have it; ids and masks as an array."""
    values = getattr(kind, "value_type", None)
    if values is not None and str(values) in NUMBERS and not str(kind).startswith("dictionary"):
        # a list of numbers is long
        return _numbers
    plain = _plain(kind)
    return (lambda cell: cell.as_py()) if plain is None else (lambda cell: plain(cell.as_py()))


def _numbers(cell: Any) -> Any:
    values = cell.values
    return cell.as_py() if values is None or values.null_count else values.to_numpy(zero_copy_only=False)


def _plain(kind: Any) -> Callable[[Any], Any] | None:
    """Return the function that brings a value of that type, as pyarrow gives it, into JSON's form; None: it has it."""
    types = importlib.import_module("pyarrow").types
    if str(kind) == "extension<arrow.json>":
        return lambda value: None if value is None else json.loads(value)
    if not types.is_nested(kind):
        return None
    if types.is_struct(kind):
        fields = {field.name: plain for field in kind if (plain := _plain(field.type)) is not None}

        def change(value: Any) -> Any:
            if not fields:
                return {name: item for name, item in value.items() if item is not None}
            some = ((name, item) for name, item in value.items() if item is not None)
            return {name: fields[name](item) if name in fields else item for name, item in some}
    elif types.is_map(kind):
        of_values = _plain(kind.item_type) or _same

        def change(value: Any) -> Any:
            return {key: of_values(item) for key, item in value}
    else:
        of_items = _plain(kind.value_type)
        if of_items is None:
            return None

        def change(value: Any) -> Any:
            return [of_items(item) for item in value]

    return lambda value: None if value is None else change(value)


def _same(value: Any) -> Any:
    return value


def columns_read(path: str, schema: Any) -> list[str]:
    """Return which of a table's columns are to be read; ValueError where none of them holds conversations."""
    names: Sequence[str] = schema.names
    if not set(SHAPES) & set(names):
        raise ValueError(
            f"{path} has the columns {', '.join(names)}, but none of {', '.join(SHAPES)}; "
            "give the column with the conversations one of these names"
        )
    of_tokens = "input_ids" in names
    return [name for name in names if _matters(name) or (of_tokens and _may_be_of_tokens(schema.field(name)))]


def _may_be_of_tokens(field: Any) -> bool:
    """Return whether a column that is not known may say something of each token, or where an answer begins."""
    values = str(getattr(field.type, "value_type", ""))
    return field.name not in RECORD and (values in NUMBERS | {"float", "double"} or may_divide(field.name))


def _matters(name: str) -> bool:
    return RECORD[name] != HARMLESS if name in RECORD else may_look_like(name, "record") != ""


def row_type(names: Sequence[str], read: Sequence[str]) -> type[Row]:
    """Return the class of the rows of a table, of whose columns some are read: it names unknown ones that are not."""
    return type("Row", (Row,), {"unread": tuple(sorted({*names} - {*RECORD} - {*read}))})


class ArrowRows:
    """The rows of an .arrow file, mapped into memory, as dicts of the columns that matter."""

    def __init__(self, path: str) -> None:
        self._path, self._place = path, os.path.abspath(path)
        self._open()

    def _open(self) -> None:
        pa = _pyarrow(self._path)
        try:
            mapped = pa.memory_map(self._path)
            # a file of Arrow's IPC format, or the stream that `datasets` writes
            whole = mapped.read(6) == b"ARROW1"
            mapped.seek(0)
            opened = pa.ipc.open_file(mapped) if whole else pa.ipc.open_stream(mapped)
            self._table = opened.read_all()
        # All of pyarrow's errors are ValueErrors or OSErrors.
        except (ValueError, OSError) as error:
            refuse_other_kinds(self._path, PlainBytes.head(self._path), (b"ARROW1", b"\xff\xff\xff\xff"))
            raise ValueError(f"{self._path} cannot be read as Arrow ({error}); make or copy it again") from error
        self._file = MappedFiles([self._path])
        names = self._table.column_names
        read = columns_read(self._path, self._table.schema)
        self._cells = [
            (name, self._table.column(name), cell_reader(self._table.schema.field(name).type)) for name in read
        ]
        self._row = row_type(names, read)

    def __reduce__(self) -> tuple[type[ArrowRows], tuple[str]]:
        return ArrowRows, (self._place,)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, row: int) -> object:
        self._file.check()
        return self._row({name: read(column[row]) for name, column, read in self._cells})

    def where(self, row: int) -> str:
        return f"{self._path} row {row}"


def _pyarrow(path: str) -> Any:
    try:
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise ImportError(f"{path} is Arrow, which needs pyarrow; pip install nanopack-gpu[parquet]") from error
