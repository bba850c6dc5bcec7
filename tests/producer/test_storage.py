"""What cannot be read stops the run, in both modes: on_error="skip" is for bad records alone."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from covering import pairs
from faulty import CHATS, SMALL, TOKENIZER, Faulty, raising, within

import nanopack
from nanopack import ConversationError, Loader, StorageError, reference
from nanopack.verify import compare

RECORDS = [{"text": f"a b c d e f g {k}"} for k in range(2000)]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr("nanopack.conversations.fetch.RETRIES", (0.05, 0.2, 0.2))


def read_all(data, **arguments):
    with Loader(data, TOKENIZER, epochs=1, prefetch=1, **(SMALL | arguments)) as loader:
        return list(iter(loader))


ERRORS = [TimeoutError("late"), ConnectionResetError("gone"), OSError(5, "Input/output error"), EOFError("cut")]


@pytest.mark.parametrize(("error", "on_error", "workers"), pairs(ERRORS, ["raise", "skip"], [0, 2]))
def test_an_error_of_the_storage_stops_the_run_in_both_modes_without_the_advice_to_skip(error, on_error, workers):
    with within(20), pytest.raises(StorageError, match=f"^conversation 20, {type(error).__name__}") as raised:
        read_all(Faulty(20, raising(error)), on_error=on_error, num_workers=workers)
    assert "skip" not in str(raised.value) and raised.value.__cause__


def caused():
    raise RuntimeError("no record") from ConnectionResetError("gone")


def in_the_handler():
    try:
        raise ConnectionResetError("gone")
    except ConnectionResetError:
        raise RuntimeError("no record")  # noqa: B904 (as it is often written)


def of_a_database():
    class OperationalError(Exception):
        pass

    raise RuntimeError("no record") from OperationalError("server closed the connection")


def of_a_cut_answer():
    raise RuntimeError("no record") from http.client.IncompleteRead(b"half")


def of_a_pool():
    raise RuntimeError("no record") from BrokenProcessPool("a worker died")


def of_a_cloud():
    # as azure-core defines it
    kind = type("ServiceRequestError", (Exception,), {"__module__": "azure.core.exceptions"})
    raise RuntimeError("no record") from kind("no connection")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("do", [caused, in_the_handler, of_a_database, of_a_cut_answer, of_a_pool, of_a_cloud])
def test_an_error_that_an_error_of_the_storage_caused_stops_the_run_too(do, workers):

    with within(20), pytest.raises(StorageError, match="conversation 20, RuntimeError: no record"):
        read_all(Faulty(20, do), on_error="skip", num_workers=workers)


@pytest.mark.parametrize(
    "sample",
    [
        lambda data: Loader(data, TOKENIZER, on_error="skip", **SMALL),
        lambda data: nanopack.mixture([(CHATS, 1), (data, 1)], by="token", tokenizer=TOKENIZER),
    ],
    ids=["fingerprint", "mean length"],
)
def test_a_conversation_of_a_sample_that_cannot_be_read_is_not_left_out_of_it(sample):
    with within(20), pytest.raises(StorageError, match=r"^conversation 39, TimeoutError: late"):
        sample(Faulty(39, raising(TimeoutError("late"))))


def test_a_store_that_is_gone_is_waited_for_once_and_not_for_each_conversation_of_a_chunk(tmp_path):
    class Gone(list):
        def __getitem__(self, index):
            # none of them is in the sample
            if index in (11, 12, 14):
                with open(tmp_path / "tried", "a") as file:
                    file.write(f"{index} ")
                raise TimeoutError("late")
            return super().__getitem__(index)

    with within(20), pytest.raises(StorageError, match=r"^conversation 11"):
        read_all(Gone(CHATS), num_workers=2)
    assert (tmp_path / "tried").read_text().split() == ["11"] * 4


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_store_that_fails_for_a_moment_loses_nothing(on_error):
    began = time.monotonic()

    def do():
        if time.monotonic() < began + 0.15:
            raise ConnectionResetError("busy")

    with within(20):
        got = read_all(Faulty("all", do), on_error=on_error, num_workers=0)
    assert compare(reference.batches(CHATS, TOKENIZER, epochs=1, **SMALL), iter(got)).difference is None


def write(path: Path, records) -> Path:
    import pyarrow as pa
    import pyarrow.parquet

    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(records), path, row_group_size=50)
    else:
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def rewrite_with_other_words(path: Path) -> None:
    """The same size and another content, in place."""
    with open(path, "r+b") as file:
        data = file.read().replace(b"a b c", b"x y z").replace(b"PAR1", b"PAR2")
        file.seek(0)
        file.write(data[::-1] if path.suffix in (".gz", ".parquet") else data)


HARM = {
    "deleted": os.unlink,
    "renamed": lambda path: os.rename(path, f"{path}.old"),
    "truncated": lambda path: os.truncate(path, 40),
    "rewritten": rewrite_with_other_words,
}


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("harm", HARM)
def test_a_parquet_file_that_changes_while_it_is_read_ends_the_run_by_name(tmp_path, harm, on_error):
    path = write(tmp_path / "chats.parquet", RECORDS)
    with within(20), Loader(str(path), TOKENIZER, epochs=1, prefetch=1, on_error=on_error, **SMALL) as loader:
        next(loader)
        HARM[harm](path)
        with pytest.raises(StorageError, match=r"chats\.parquet") as raised:
            for _ in loader:
                pass
    assert "skip" not in str(raised.value)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
@pytest.mark.parametrize("harm", ["truncated", "rewritten"])
def test_a_file_of_text_that_changes_while_it_is_read_ends_the_run_by_name(tmp_path, harm, kind, monkeypatch):
    path = write(tmp_path / f"chats.{kind}", RECORDS)
    with within(20), Loader(str(path), TOKENIZER, epochs=1, on_error="skip", num_workers=0, **SMALL) as loader:
        next(loader)
        before = len(RECORDS)
        HARM[harm](path)
        if kind == "jsonl.gz":
            # small enough to be unpacked as a whole: old content to the end
            assert len(list(iter(loader))) > before
            return
        with pytest.raises(StorageError, match=r"chats\.jsonl") as raised:
            for _ in loader:
                pass
    assert "skip" not in str(raised.value)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("harm", ["touched", "copied again", "gone for a moment"])
def test_a_file_with_the_same_content_goes_on(tmp_path, kind, harm, monkeypatch):
    # most files are opened again and again, as of a data set of hundreds
    monkeypatch.setattr("nanopack.conversations.random_access.most_open_files", lambda: 4)
    paths = [write(tmp_path / f"{k}.{kind}", RECORDS[k * 40 :][:40]) for k in range(10)]
    expected = read_all([str(path) for path in paths])
    with within(20), Loader([str(p) for p in paths], TOKENIZER, epochs=1, prefetch=1, **SMALL) as loader:
        got = [next(loader)]
        for path in paths:
            if harm == "touched":
                os.utime(path)
            elif harm == "copied again":
                data = path.read_bytes()
                path.unlink()
                path.write_bytes(data)
            else:
                os.rename(path, f"{path}.away")
        if harm == "gone for a moment":
            # however late the timer is
            monkeypatch.setattr("nanopack.conversations.fetch.RETRIES", (0.05,) * 300)
            threading.Timer(0.05, lambda: [os.rename(f"{path}.away", path) for path in paths]).start()
        got += iter(loader)
    assert compare(iter(expected), iter(got)).difference is None


def bad(index):
    return {"text": index}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_skips_a_hundred_in_a_row_stops(workers):
    data = [*CHATS, *map(bad, range(150)), *CHATS]
    with within(20), pytest.raises(ConversationError, match=r"^conversation 139, .* 100 conversations in a row"):
        read_all(data, on_error="skip", num_workers=workers)
    with pytest.raises(ConversationError, match="100 of 140"):
        list(reference.batches(data, TOKENIZER, epochs=1, on_error="skip", **SMALL))
    # one fewer is skipped
    assert read_all([*CHATS, *map(bad, range(99)), *CHATS], on_error="skip")


def test_a_run_that_skips_more_than_half_stops_once_a_thousand_are_read():
    data = [chat if k % 3 == 0 else bad(k) for k, chat in enumerate(RECORDS)]
    with within(20), pytest.raises(ConversationError, match=r"667 of 1001 conversations were skipped; on_error"):
        read_all(data, on_error="skip")
    with pytest.raises(ConversationError, match="667 of 1001"):
        list(reference.batches(data, TOKENIZER, epochs=1, on_error="skip", **SMALL))
    assert read_all(data[:900], on_error="skip")
