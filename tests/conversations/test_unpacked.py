"""What has no random access is unpacked once, by the first that reads it."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
from record_files import RECORDS, write_lines, write_parquet

from nanopack.conversations import parquet, unpacked
from nanopack.conversations.records import open_conversations
from nanopack.errors import StorageError


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The row groups that this process decodes, as it does."""
    read, groups = parquet.read_row_group, list[int]()

    def noted(version: Any, group: int, columns: Any) -> Any:
        groups.append(group)
        return read(version, group, columns)

    monkeypatch.setattr(parquet, "read_row_group", noted)
    return groups


def shuffled_order(seed: int = 0) -> list[int]:
    return random.Random(seed).sample(range(len(RECORDS)), len(RECORDS))


def test_shuffled_rows_decode_each_row_group_once(tmp_path: Path, decoded: list[int]) -> None:
    path = write_parquet(tmp_path / "chats.parquet", RECORDS, row_group_size=10)
    source = open_conversations(path, shuffled=True)
    for seed in range(3):
        assert all(source[k] == RECORDS[k] for k in shuffled_order(seed))
    assert sorted(decoded) == list(range(20))


def test_rows_in_order_decode_each_row_group_once_a_pass_and_write_nothing(
    tmp_path: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacked.Scratch, "create", None)
    source = open_conversations(write_parquet(tmp_path / "chats.parquet", RECORDS, row_group_size=10))
    assert all(source[k] == RECORDS[k] for k in range(len(RECORDS)))
    assert decoded == list(range(20))


def test_forked_processes_share_what_one_of_them_has_unpacked(tmp_path: Path, decoded: list[int]) -> None:
    source = open_conversations(write_parquet(tmp_path / "chats.parquet", RECORDS, row_group_size=10), shuffled=True)
    child = os.fork()
    if child == 0:
        right = all(source[k] == RECORDS[k] for k in shuffled_order())
        os._exit(0 if right and len(decoded) == 20 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert all(source[k] == RECORDS[k] for k in shuffled_order())
    assert not decoded


def test_processes_that_unpack_at_the_same_time_do_not_write_over_each_other(tmp_path: Path) -> None:
    paths = [write_parquet(tmp_path / f"{k}.parquet", RECORDS, row_group_size=5) for k in range(2)]
    source = open_conversations(paths, shuffled=True)
    children = []
    for seed in range(4):
        if (child := os.fork()) == 0:
            order = random.Random(seed).sample(range(400), 400)
            os._exit(0 if all(source[k] == RECORDS[k % 200] for k in order) else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert all(source[k] == RECORDS[k % 200] for k in range(400))


def test_a_pickled_source_unpacks_for_itself(tmp_path: Path) -> None:
    paths = [
        write_parquet(tmp_path / "chats.parquet", RECORDS),
        write_lines(tmp_path / "a.jsonl.gz", RECORDS),
        write_lines(tmp_path / "b.jsonl.gz", RECORDS[:50]),
    ]
    source = open_conversations(paths, shuffled=True)
    assert source[0] == RECORDS[0]
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[k] for k in (7, 207, 407, 449)] == [RECORDS[7], RECORDS[7], RECORDS[7], RECORDS[49]]
    assert [source[k] for k in (7, 207, 407, 449)] == [RECORDS[7], RECORDS[7], RECORDS[7], RECORDS[49]]


def test_a_parquet_file_that_was_unpacked_may_go(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "chats.parquet", RECORDS, row_group_size=100)
    source = open_conversations(path, shuffled=True)
    assert source[150] == RECORDS[150]
    path.unlink()
    assert source[199] == RECORDS[199]
    with pytest.raises(FileNotFoundError):
        source[0]


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: Any, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(unpacked, "_write", fail)


@pytest.mark.usefixtures("full_disk")
def test_a_gzip_file_that_does_not_fit_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "chats.jsonl.gz", RECORDS)
    with pytest.raises(StorageError, match=r"chats\.jsonl\.gz does not fit unpacked .*No space.*TMPDIR.*\.jsonl"):
        open_conversations(path)


@pytest.mark.usefixtures("full_disk")
def test_row_groups_that_do_not_fit_are_decoded_again_and_again_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_conversations(write_parquet(tmp_path / "chats.parquet", RECORDS, row_group_size=10), shuffled=True)
    with caplog.at_level(logging.WARNING):
        assert all(source[k] == RECORDS[k] for k in shuffled_order())
    (warning,) = caplog.messages
    assert "slow" in warning and "chats.parquet" in warning and "TMPDIR" in warning
