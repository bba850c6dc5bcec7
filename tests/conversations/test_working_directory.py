"""Files that are named by relative paths are read on when the program has changed its working directory."""

from __future__ import annotations

import functools

import pytest
from record_files import RECORDS, write_lines, write_parquet

from nanopack import Loader
from nanopack.conversations import open_conversations, random_access
from nanopack.verify import compare

ARGUMENTS = {"tokenizer": "chat32k", "batch_size": 2, "seq_len": 64, "packing": "stream", "epochs": 1}


def write_arrow(path, records):
    pa = pytest.importorskip("pyarrow")
    table = pa.Table.from_pylist(records)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


WRITE = {
    "chats.jsonl": write_lines,
    "chats.jsonl.gz": write_lines,
    "chats.parquet": functools.partial(write_parquet, row_group_size=20),
    "chats.arrow": write_arrow,
}


@pytest.mark.parametrize(
    ("workers", "method"), [(0, None), (1, "fork"), pytest.param(1, "spawn", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", WRITE)
def test_batches_and_positions_are_those_of_the_files_found_at_construction(
    name, workers, method, tmp_path, monkeypatch
):
    WRITE[name](tmp_path / name, RECORDS)
    monkeypatch.chdir(tmp_path)
    # each of the files is opened again
    monkeypatch.setattr(random_access, "most_open_files", lambda: 0)
    with Loader(name, cache="cache", num_workers=workers, start_method=method, **ARGUMENTS) as loader:
        (tmp_path / "elsewhere").mkdir()
        WRITE[name](tmp_path / "elsewhere" / name, RECORDS[::-1])
        monkeypatch.chdir(tmp_path / "elsewhere")
        expected = list(loader)
        assert name in str(loader.explain(expected[0], 0, 3))
        loader.restart()
        assert compare(iter(expected), loader).difference is None and len(expected) == len(loader) > 9
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == [name]


@pytest.mark.parametrize("name", WRITE)
def test_records_are_those_of_the_files_found_at_construction(name, tmp_path, monkeypatch):
    WRITE[name](tmp_path / name, RECORDS)
    monkeypatch.chdir(tmp_path)
    source = open_conversations([name])
    monkeypatch.chdir("/")
    assert [source[k] for k in range(0, 200, 7)] == RECORDS[::7]
