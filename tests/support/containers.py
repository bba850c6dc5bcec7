"""The same records in every container that people keep them in."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Records = Sequence[Any]


def as_jsonl(records: Records, folder: Path) -> Path:
    path = folder / "r.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def as_gz(records: Records, folder: Path) -> Path:
    path = folder / "r.jsonl.gz"
    path.write_bytes(gzip.compress(as_jsonl(records, folder).read_bytes()))
    return path


def as_zst(records: Records, folder: Path) -> Path:
    zstandard = pytest.importorskip("zstandard")
    path = folder / "r.ndjson.zst"
    path.write_bytes(zstandard.compress(as_jsonl(records, folder).read_bytes()))
    return path


def as_json(records: Records, folder: Path) -> Path:
    path = folder / "r.json"
    path.write_text(json.dumps(list(records)), encoding="utf-8")
    return path


def as_pretty_json(records: Records, folder: Path) -> Path:
    path = folder / "r.json"
    path.write_text(json.dumps(list(records), indent=2, ensure_ascii=False), encoding="utf-8")
    return path


def as_json_lines_called_json(records: Records, folder: Path) -> Path:
    path = folder / "lines.json"
    path.write_bytes(as_jsonl(records, folder).read_bytes())
    return path


def as_folder(records: Records, folder: Path) -> Path:
    middle = len(records) // 2
    (folder / "data").mkdir(exist_ok=True)
    for name, part in (("a", records[:middle]), ("b", records[middle:])):
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part), encoding="utf-8")
    (folder / "data" / "README.md").write_text("no records")
    return folder / "data"


def wide(records: Records) -> list[dict[str, Any]]:
    """The records with the keys of all: Arrow takes the columns of the first."""
    names = {key: None for record in records for key in record}
    return [{**names, **record} for record in records]


def as_dataset(records: Records, folder: Path) -> Any:
    return pytest.importorskip("datasets").Dataset.from_list(wide(records))


def as_saved_dataset(records: Records, folder: Path) -> Path:
    as_dataset(records, folder).save_to_disk(folder / "saved")
    return folder / "saved"


def table(records: Records) -> Any:
    return pytest.importorskip("pyarrow").Table.from_pylist(wide(records))


def as_parquet(records: Records, folder: Path) -> Path:
    path = folder / "r.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(table(records), path, row_group_size=3)
    return path


def as_large_parquet(records: Records, folder: Path) -> Path:
    """Large lists and strings, strings at the top as a dictionary."""
    pa = pytest.importorskip("pyarrow")

    def large(kind: Any, top: bool = False) -> Any:
        if pa.types.is_list(kind):
            return pa.large_list(large(kind.value_type))
        if pa.types.is_struct(kind):
            return pa.struct([pa.field(field.name, large(field.type)) for field in kind])
        if kind == pa.string():
            return pa.dictionary(pa.int32(), pa.string()) if top else pa.large_string()
        return kind

    plain = table(records)
    schema = pa.schema([pa.field(field.name, large(field.type, True)) for field in plain.schema])
    path = folder / "large.parquet"
    rows = pa.Table.from_pylist(wide(records), schema=schema)
    pytest.importorskip("pyarrow.parquet").write_table(rows, path)
    return path


def as_arrow(records: Records, folder: Path) -> Path:
    pa = pytest.importorskip("pyarrow")
    rows, path = table(records), folder / "r.arrow"
    with pa.ipc.new_file(str(path), rows.schema) as file:
        file.write_table(rows, max_chunksize=3)
    return path


def as_struct_of_lists(records: Records, folder: Path) -> Path:
    """Parquet whose messages are one struct of lists."""
    turned = []
    for record in records:
        columns: dict[str, Any] = dict(record)
        for name in ("messages", "conversations"):
            if isinstance(messages := record.get(name), list) and all(isinstance(m, dict) for m in messages):
                names = {key: None for message in messages for key in message}
                columns[name] = {key: [message.get(key) for message in messages] for key in names}
        turned.append(columns)
    return as_parquet(turned, folder)


def as_frame(records: Records, folder: Path) -> Any:
    return pytest.importorskip("pandas").DataFrame(list(records)).to_dict("records")


def as_read_frame(records: Records, folder: Path) -> Any:
    """What pandas makes of Parquet: arrays of dicts of arrays."""
    pandas = pytest.importorskip("pandas")
    return pandas.read_parquet(as_parquet(records, folder)).to_dict("records")


def as_series(records: Records, folder: Path) -> Any:
    """A Series whose labels say another order."""
    return pytest.importorskip("pandas").Series(list(records), index=list(range(len(records)))[::-1])


def as_array(records: Records, folder: Path) -> Any:
    array = np.empty(len(records), object)
    array[:] = list(records)
    return array


PYTHON = {"list": lambda records, _: list(records), "tuple": lambda records, _: tuple(records), "array": as_array}
TEXT = {
    "jsonl": as_jsonl,
    "gz": as_gz,
    "zst": as_zst,
    "json": as_json,
    "pretty": as_pretty_json,
    "lines.json": as_json_lines_called_json,
    "folder": as_folder,
}
ARROW = {
    "dataset": as_dataset,
    "saved": as_saved_dataset,
    "parquet": as_parquet,
    "large": as_large_parquet,
    "arrow": as_arrow,
}
PANDAS = {"frame": as_frame, "read-frame": as_read_frame, "series": as_series}
CONTAINERS: dict[str, Callable[[Records, Path], Any]] = {
    **PYTHON, **TEXT, **ARROW, **PANDAS, "struct": as_struct_of_lists
}  # fmt: skip
