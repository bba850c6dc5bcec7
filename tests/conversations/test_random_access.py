"""Bytes of plain and compressed files: read anywhere, few at a time, and never those of another file."""

from __future__ import annotations

import gzip
import json
import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from record_files import RECORDS, write_lines

from nanopack.conversations import random_access as file_bytes
from nanopack.conversations import unpacked
from nanopack.conversations.records import open_conversations


def test_reading_a_record_reads_its_bytes_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_conversations(write_lines(tmp_path / "chats.jsonl", RECORDS))
    reads: list[tuple[int, int]] = []
    pread = os.pread

    def noted(fd: int, length: int, at: int) -> bytes:
        reads.append((length, at))
        return pread(fd, length, at)

    monkeypatch.setattr(os, "pread", noted)
    assert source[150] == RECORDS[150]
    before = sum(len(json.dumps(record, ensure_ascii=False).encode()) + 1 for record in RECORDS[:150])
    assert reads == [(len(json.dumps(RECORDS[150], ensure_ascii=False).encode()) + 1, before)]


def peak_bytes(path: Path) -> tuple[int, int, int]:
    """Open a file; return its length in lines, the memory then held, and the most held before."""
    tracemalloc.start()
    source = open_conversations(path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return len(source), held, peak


def test_opening_a_jsonl_file_holds_8_bytes_a_line_and_a_few_chunks(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b'{"text": "aaaaaaaaaaaaaaaaaaa"}\n' * 1_000_000)
    lines, held, peak = peak_bytes(path)
    assert held < 8 * lines * 9 / 8 + 50_000
    # Of a chunk there are its bytes, its comparison, and positions of at most 24 bytes a line.
    assert peak < held + 4 * file_bytes.SCAN_BYTES


def test_opening_a_gzip_file_holds_8_bytes_a_line_and_a_few_chunks(tmp_path: Path) -> None:
    noise = random.Random(0)
    lines = [b'{"text": "%s"}\n' % noise.randbytes(1_000).hex().encode() for _ in range(20_000)]
    path = tmp_path / "chats.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(lines), 1))
    _, held, peak = peak_bytes(path)
    assert held < 8 * len(lines) * 9 / 8 + 50_000
    assert peak < held + 4 * file_bytes.SCAN_BYTES


def test_a_file_crowded_out_while_it_is_read_stays_open_until_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_bytes, "most_open_files", lambda: 1)
    source = open_conversations([write_lines(tmp_path / f"{k}.jsonl", [{"text": f"{k}"}]) for k in range(2)])
    pread = os.pread

    def interrupted(fd: int, length: int, at: int) -> bytes:
        monkeypatch.setattr(os, "pread", pread)
        assert source[1] == {"text": "1"}
        return pread(fd, length, at)

    monkeypatch.setattr(os, "pread", interrupted)
    assert source[0] == {"text": "0"}


def test_a_file_cut_off_while_in_use_is_an_error(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "chats.jsonl", RECORDS)
    source = open_conversations(path)
    assert source[0] == RECORDS[0]
    os.truncate(path, 100)
    with pytest.raises(ValueError, match=r"chats\.jsonl was cut off while in use"):
        source[199]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        pytest.param(lambda data: data[:-4], r"is cut off in line 201;", id="trailer-cut"),
        pytest.param(lambda data: data[: len(data) // 2], r"is cut off in line \d+; test it with", id="half"),
        pytest.param(lambda data: data[:5], r"is cut off in line 1;", id="header-cut"),
        pytest.param(lambda data: data[:-8] + b"\0" * 8, r"noticed after line 200 .*incorrect data", id="crc"),
        pytest.param(lambda data: b"plain" + data, r"noticed after line 0 .*incorrect header", id="no-gzip"),
        pytest.param(lambda data: data + b"more", r"noticed after line 200 .*header", id="garbage-after"),
        pytest.param(lambda data: data[:400] + b"\xff" * 9 + data[409:], r"is damaged", id="bytes-changed"),
    ],
)
def test_a_damaged_gzip_file_is_an_error_that_names_file_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, break_it: Callable[[bytes], bytes], message: str
) -> None:
    # A byte at a time, so that all lines before the damage have come out.
    monkeypatch.setattr(unpacked, "READ_BYTES", 1)
    path = write_lines(tmp_path / "chats.jsonl.gz", RECORDS)
    path.write_bytes(break_it(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"chats\.jsonl\.gz.*{message}"):
        open_conversations(path)


def test_zero_bytes_after_a_gzip_member_are_no_damage(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "chats.jsonl.gz", RECORDS)
    path.write_bytes(path.read_bytes() + b"\0" * 40_000 + gzip.compress(b'{"text": "after"}') + b"\0")
    source = open_conversations(path)
    assert len(source) == 201
    assert source[200] == {"text": "after"}
