"""Reading record i of a file: the right record, only that one, in bounded memory, from everywhere."""

from __future__ import annotations

import contextlib
import gc
import gzip
import json
import os
import pickle
import random
import resource
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from record_files import RECORDS, write_lines, write_parquet

from nanopack.conversations import files, parquet, unpacked
from nanopack.conversations import random_access as file_bytes
from nanopack.conversations.records import open_conversations
from nanopack.errors import ConversationError, StorageError


@pytest.fixture(params=["chats.jsonl", "chats.jsonl.gz", "chats.parquet"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """RECORDS in a file of each kind."""
    write = write_parquet if request.param.endswith(".parquet") else write_lines
    return write(tmp_path / request.param, RECORDS)


# What a line may hold, and what may stand between lines.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
blanks = st.sampled_from([b"", b"  ", b"\t", b"\r", b" \r"])
json_lines = st.builds(
    lambda before, text, ascii, after: before + json.dumps({"text": text}, ensure_ascii=ascii).encode() + after,
    blanks,
    texts,
    st.booleans(),
    st.sampled_from([b"", b"", b"  ", b" " * 90]),
)
line_files = st.fixed_dictionaries(
    {
        "lines": st.lists(st.one_of(json_lines, json_lines, blanks), max_size=12),
        "end": st.sampled_from([b"\n", b"\r\n"]),
        "final": st.booleans(),
        "mark": st.booleans(),
        "cuts": st.none() | st.lists(st.integers(0, 300), max_size=3),
    }
)


def write_line_file(folder: str, number: int, file: dict[str, Any]) -> list[tuple[str, object]]:
    """Write a file as drawn, gzipped in members cut at `cuts`; return place and value of every record."""
    data = file["end"].join(file["lines"]) + (file["end"] if file["final"] else b"")
    data = files.BYTE_ORDER_MARK * file["mark"] + data
    name = os.path.join(folder, f"{number}.jsonl")
    if file["cuts"] is not None:
        name += ".gz"
        bounds = [0, *sorted(min(cut, len(data)) for cut in file["cuts"]), len(data)]
        data = b"".join(gzip.compress(data[a:b]) for a, b in pairwise(bounds))
    Path(name).write_bytes(data)
    numbered = enumerate(file["lines"], start=1)
    return [(f"{name}:{k}", json.loads(line)) for k, line in numbered if line.strip()]


@given(
    drawn=st.lists(line_files, min_size=1, max_size=3),
    chunk=st.integers(3, 60),
    block=st.integers(1, 60),
    order=st.randoms(use_true_random=False),
)
def test_every_record_is_read_back_in_any_order_and_knows_its_line(
    tmp_path_factory: pytest.TempPathFactory,
    drawn: list[dict[str, Any]],
    chunk: int,
    block: int,
    order: random.Random,
) -> None:
    folder = str(tmp_path_factory.mktemp("files"))
    expected = [pair for number, file in enumerate(drawn) for pair in write_line_file(folder, number, file)]
    paths = sorted(os.path.join(folder, name) for name in os.listdir(folder))
    with patch.object(file_bytes, "SCAN_BYTES", chunk), patch.object(unpacked, "READ_BYTES", block):
        source = files.open_files(paths)
        assert len(source) == len(expected)
        for index in order.sample(range(len(expected)), len(expected)):
            assert (source.where(index), source[index]) == expected[index]


def test_records_of_every_kind_of_file_are_read_back(path: Path) -> None:
    source = open_conversations(path)
    assert len(source) == len(RECORDS)
    order = random.Random(0).sample(range(len(RECORDS)), len(RECORDS))
    assert [source[index] for index in order] == [RECORDS[index] for index in order]
    assert source.where(16) == (f"{path} row 16" if path.suffix == ".parquet" else f"{path}:17")


def test_an_index_outside_is_an_index_error_and_never_another_record(path: Path) -> None:
    source = open_conversations(path)
    for index in (len(RECORDS), len(RECORDS) + 1, -1):
        with pytest.raises(IndexError, match=f"conversation {index} of 200"):
            source[index]
        with pytest.raises(IndexError):
            source.where(index)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_more_files_than_may_be_open_are_read(tmp_path: Path, suffix: str) -> None:
    write = write_parquet if suffix == ".parquet" else write_lines
    for number in range(200):
        write(tmp_path / f"{number:03}{suffix}", [{"text": str(number)}])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/dev/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 20, hard))
    try:
        source = open_conversations(tmp_path / f"*{suffix}")
        order = random.Random(0).sample(range(200), 200)
        assert [source[index] for index in order] == [{"text": str(index)} for index in order]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_dropping_the_source_closes_its_files(tmp_path: Path) -> None:
    before = os.listdir("/dev/fd")
    source = open_conversations([write_lines(tmp_path / f"{k}.jsonl", RECORDS) for k in range(5)])
    assert len(os.listdir("/dev/fd")) == len(before) + 5
    del source
    assert os.listdir("/dev/fd") == before


def test_a_forked_process_and_its_parent_read_at_the_same_time(path: Path) -> None:
    source = open_conversations(path)
    assert source[100] == RECORDS[100]
    child = os.fork()
    right = all(source[k] == RECORDS[k] for _ in range(3) for k in random.sample(range(200), 200))
    if child == 0:
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert right


def test_threads_read_at_the_same_time(path: Path) -> None:
    source = open_conversations([path] * 3)
    wrong: list[int] = []

    def read(seed: int) -> None:
        order = random.Random(seed).sample(range(600), 600)
        wrong.extend(index for index in order if source[index] != RECORDS[index % 200])

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_source_pickles_after_reading_and_reads_on(path: Path) -> None:
    source = open_conversations(path)
    assert source[7] == RECORDS[7]
    other = pickle.loads(pickle.dumps(source))
    assert [other[index] for index in (150, 7)] == [RECORDS[150], RECORDS[7]]
    assert other.where(7) == source.where(7)


def test_a_file_changed_since_opening_is_an_error_and_not_another_record(path: Path) -> None:
    pickled = pickle.dumps(open_conversations(path))
    path.write_bytes(b"x" + path.read_bytes())
    with pytest.raises(ValueError, match=r"chats\..* has changed since it was opened; open the conv"):
        pickle.loads(pickled)[0]


def note_row_groups(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[str]]]:
    """Return a list that grows by number and columns of every row group read."""
    read: list[tuple[int, list[str]]] = []
    inner = parquet.read_row_group

    def noted(version: file_bytes.Version, group: int, columns: tuple[str, ...]) -> object:
        table = inner(version, group, columns)
        read.append((group, table.column_names))
        return table

    monkeypatch.setattr(parquet, "read_row_group", noted)
    return read


def test_parquet_reads_a_row_group_once_in_sequence_and_keeps_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "chats.parquet", RECORDS, row_group_size=50)
    read = note_row_groups(monkeypatch)
    source = open_conversations(path)
    assert [source[k] for k in range(200)] == RECORDS
    assert [group for group, _ in read] == [0, 1, 2, 3]
    assert source[0] == RECORDS[0]
    assert [group for group, _ in read] == [0, 1, 2, 3, 0]


def test_parquet_gives_the_known_columns_and_reads_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = note_row_groups(monkeypatch)
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "hi", "name": None}], "weight": 0.5, "score": 1},
        {"messages": [{"role": "user", "content": "ho", "name": "x"}], "weight": None, "score": 2},
    ]
    source = open_conversations(write_parquet(tmp_path / "chats.parquet", rows))
    said = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "ho", "name": "x"}]]
    assert [source[0], source[1]] == [{"messages": m, "weight": w} for m, w in zip(said, [0.5, None], strict=True)]
    assert read == [(0, ["messages", "weight"])]


def test_without_pyarrow_a_parquet_file_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "chats.parquet", RECORDS)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"chats\.parquet .*pip install nanopack-gpu\[parquet\]"):
        open_conversations(path)


# Every row is line 17 of a file; the others are whole.
BAD_LINES = {
    "cut-off": (b'{"text": "a', r"^not JSON: Unterminated string .*, column 10, near '{\"text\": \"a'; "),
    "comma-missing": (b'{"text": "a" "b"}', r"^not JSON: Expecting ',' delimiter, column 14, near"),
    "two-records": (b'{"text": "a"} {"text": "b"}', r"^not JSON: Extra data, column 15,"),
    "pretty-printed": (
        b"{",
        r"^not JSON: Expecting .*, column 2, .*one JSON value, and this one does not end; jq -c \.",
    ),
    "zeros": (
        b"\0" * 500,
        r"^not JSON: .*this holds zero bytes, as a crash leaves them in a file; make or copy it again$",
    ),
    "column-counts-characters": ('{"é": 🙂}'.encode(), r"^not JSON: Expecting value, column 7,"),
    "not-utf-8": (b'{"text": "\xff"}', r"^not UTF-8: byte 0xff at byte 11 of the line; save the file"),
    "latin-1": ('{"text": "é"}'.encode("latin-1"), r"^not UTF-8: byte 0xe9 at byte 11"),
    "number-too-long": (b'{"text": ' + b"9" * 5000 + b"}", r"^JSON that cannot be read: Exceeds the limit"),
    "too-deep": (b"[" * 200_000, r"^JSON that cannot be read: .*recursion"),
    "mark-inside": (b"\xef\xbb\xbf{}", r"^not JSON: Unexpected UTF-8 BOM.*, column 1,"),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("edge", BAD_LINES)
def test_a_bad_line_17_says_what_is_wrong_and_harms_no_other_line(tmp_path: Path, edge: str, suffix: str) -> None:
    bad, message = BAD_LINES[edge]
    lines = [json.dumps(record).encode() for record in RECORDS]
    lines[16] = bad
    data = b"\n".join(lines)
    path = tmp_path / f"chats{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    source = open_conversations(path)
    assert source.where(16) == f"{path}:17"
    with pytest.raises(ConversationError, match=message):
        source[16]
    assert [source[15], source[17]] == [RECORDS[15], RECORDS[17]]


def test_many_data_sets_share_one_budget_of_open_files(tmp_path: Path) -> None:
    sources = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # loaders of other tests may still hold files
    gc.collect()
    before = len(os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 200, hard))
    try:
        for number in range(10):
            paths = [write_lines(tmp_path / f"{number}-{k}.jsonl", [{"text": f"{number} {k}"}]) for k in range(40)]
            sources.append(open_conversations(paths))
        for _ in range(2):
            assert all(source[k] == {"text": f"{n} {k}"} for n, source in enumerate(sources) for k in range(40))
        assert len(os.listdir("/dev/fd")) - before <= file_bytes.most_open_files() < 60
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_many_open_files_of_others_are_an_error_that_names_the_limit(tmp_path: Path) -> None:
    source = open_conversations(write_lines(tmp_path / "chats.jsonl", [{"text": "a"}]))
    other = pickle.loads(pickle.dumps(source))
    del source
    gc.collect()
    limit = len(os.listdir("/dev/fd")) + 40
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    held = []
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        message = rf"chats\.jsonl: too many open files, with a limit of {limit}; .*ulimit -n"
        with pytest.raises(StorageError, match=message):
            other[0]
        os.close(held.pop())
        assert other[0] == {"text": "a"}
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_folder_whose_name_looks_like_a_glob_is_meant_itself(tmp_path: Path, shuffled: bool) -> None:
    for folder in ("run[1]", "run1", "run[2]/a*"):
        (tmp_path / folder).mkdir(parents=True)
        write_lines(tmp_path / folder / "chats.jsonl", [{"text": folder}])
    assert open_conversations(tmp_path / "run[1]/*.jsonl", shuffled=shuffled)[0] == {"text": "run[1]"}
    assert open_conversations(tmp_path / "run[2]/a*/*.jsonl", shuffled=shuffled)[0] == {"text": "run[2]/a*"}
    # where there is no such folder it is a glob
    assert open_conversations(tmp_path / "run[12]/*.jsonl", shuffled=shuffled)[0] == {"text": "run1"}
