"""Files of records, as the tests write them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

RECORDS = [{"text": f"record {k} " + "é🙂x" * (k % 7)} for k in range(200)]


def write_lines(path: Path, records: Sequence[object]) -> Path:
    data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_parquet(path: Path, rows: Sequence[object], row_group_size: int = 50) -> Path:
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path
