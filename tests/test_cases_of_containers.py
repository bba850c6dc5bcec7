"""What people's data are in, and what they call it: cases from public bug reports, each with variants of its kind.

Each case is stated by its right value: the tokens of a document, those in the loss between [[ and ]].
"""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shown import ROW, SMALL, A, U, chatml, refused, shown

import nanopack
from nanopack import ConversationError
from nanopack.conversations.records import check, open_conversations

# W14: the order of a Series is its own


def test_w14_a_series_is_read_in_its_own_order() -> None:
    pandas = pytest.importorskip("pandas")
    for index in ([2, 0, 3, 1], list("abcd"), [7, 7, 7, 7]):
        source = open_conversations(pandas.Series([{"text": f"n{k}"} for k in range(4)], index=index))
        assert [source[k] for k in range(4)] == [{"text": f"n{k}"} for k in range(4)]


# C1, B1: what pandas and Parquet make of a list


def test_c1_object_arrays_are_lists_at_every_depth() -> None:
    def array(*items: Any) -> np.ndarray:
        found = np.empty(len(items), object)
        found[:] = items
        return found

    expected = chatml("user Q", "assistant A")
    assert shown({"messages": array(U, A)}) == expected
    assert shown(array(U, A)) == expected
    parts = array({"type": "text", "text": "Q"})
    assert shown({"messages": array(U | {"content": parts}, A)}) == expected


def test_b1_a_struct_of_lists_is_a_list_of_messages() -> None:
    expected = chatml("user Q", "assistant A")
    assert shown({"messages": {"role": ["user", "assistant"], "content": ["Q", "A"]}}) == expected
    assert shown({"conversations": {"from": ["human", "gpt"], "value": ("Q", "A")}}) == expected
    held = {"role": ["user", "assistant"], "content": ["Q", "BAD"], "weight": [None, 0], "name": None}
    assert shown({"messages": [*[U, A]]}) == expected and "[[" not in shown({"messages": held}, packing="best_fit_pad")
    refused({"messages": {"role": ["user"], "content": ["Q", "A"]}})


# M1, C6, C8: files


@pytest.mark.parametrize("name", ["r.json", "r.json.gz", "R.JSON"])
@pytest.mark.parametrize("indent", [None, 2])
def test_m1_a_json_array_is_read(tmp_path: Path, name: str, indent: int | None) -> None:
    data = json.dumps([{"messages": [U, A]}, {"text": "x"}], indent=indent).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    source = open_conversations(tmp_path / name)
    assert [source[0], source[1]] == [{"messages": [U, A]}, {"text": "x"}]
    assert nanopack.verify(tmp_path / name, SMALL, **ROW)


@pytest.mark.parametrize("indent", [None, 2])
def test_c6_a_json_array_called_jsonl_is_called_an_array(tmp_path: Path, indent: int | None) -> None:
    (tmp_path / "r.jsonl").write_text(json.dumps([{"messages": [U, A]}, {"messages": [U, A]}], indent=indent))
    with pytest.raises(ConversationError, match=r"one JSON array.* must be named \.json"):
        check(open_conversations(tmp_path / "r.jsonl")[0])


LINE = json.dumps({"messages": [U, A]}).encode() + b"\n"
KINDS = {
    "gzip": (gzip.compress(LINE), r"is gzip, .*name it \.gz"),
    "utf-16": (LINE.decode().encode("utf-16"), "is UTF-16.*save it as UTF-8"),
    "utf-16-le": (LINE.decode().encode("utf-16-le"), "is UTF-16.*save it as UTF-8"),
    "utf-32-be": (LINE.decode().encode("utf-32-be"), "is UTF-16 or UTF-32.*save it as UTF-8"),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "is a Git LFS pointer.*git lfs pull",
    ),
    "parquet": (b"PAR1....PAR1", r"is Parquet, .*name it \.parquet"),
    "zstd": (b"\x28\xb5\x2f\xfd....", r"is zstd, .*name it \.zst"),
    "zip": (b"PK\x03\x04....", "is a zip archive"),
    "tar": (b"a.jsonl".ljust(257, b"\0") + b"ustar\x0000", "is a tar archive, .*; unpack it"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4", "is a 7z archive, .*; unpack it"),
    "lz4": (b"\x04\x22\x4d\x18\x64\x40\xa7", "is lz4, .*; unpack it"),
    "arrow-stream": (b"\xff\xff\xff\xff\xa8\1\0\0\x10\0\0\0", r"is Arrow, .*; name it \.arrow"),
    "numpy": (b"\x93NUMPY\1\0v\0", r"is an array of numpy, .*; convert it to \.jsonl"),
    **{f"pickle-{k}": (pickle.dumps([LINE], k), r"is a pickle, .*; convert it") for k in range(2, 6)},
    "avro": (b"Obj\x01\x04\x14avro.codec\x08null", "is Avro, .*; convert it"),
    "hdf5": (b"\x89HDF\r\n\x1a\n\0\0\0\0", "is HDF5, .*; convert it"),
    "sqlite": (b"SQLite format 3\0\x10\0\1\1", "is a database of SQLite, .*; convert it"),
    "orc": (b"ORC\n\x0b\n\3\0\0\0\x12", "is ORC, .*; convert it"),
    "safetensors": (b'\x48\0\0\0\0\0\0\0{"a":{"dtype":"I64"', "is safetensors, .*; convert it"),
    "tfrecord": (b"\x5e\1\0\0\0\0\0\0abcd" + LINE, "is binary, .*; convert it"),
    "html": (b"\n<!DOCTYPE html>\n<html>", "is HTML or XML, .* server .*: download that again"),
    "zeros": (bytes(5000), r"begins with zero bytes \(.* at least\), as .* the machine crashed; make or copy it again"),
}
# what text files hold, and others do not
OTHERS = {
    **KINDS,
    "json": (LINE, r"is JSON, .*; name it \.json, or \.jsonl"),
    "array": (b" [" + LINE + b"]", "is JSON, "),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".ndjson"])
@pytest.mark.parametrize("kind", KINDS)
def test_c8_a_file_under_a_wrong_name_is_called_what_it_is(tmp_path: Path, kind: str, suffix: str) -> None:
    data, message = KINDS[kind]
    (tmp_path / f"r{suffix}").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        open_conversations(tmp_path / f"r{suffix}")


NAMES = {"r.parquet": "parquet", "r.arrow": "arrow-stream", "r.jsonl.gz": "gzip", "r.jsonl.zst": "zstd"}


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n, own in NAMES.items() for k in OTHERS if k != own])
def test_c8_so_it_is_under_the_name_of_what_is_no_text(tmp_path: Path, name: str, kind: str) -> None:
    data, message = OTHERS[kind]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        open_conversations(tmp_path / name)


def test_c8_text_that_holds_the_mark_of_a_tar_archive_is_text(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"text": "'.ljust(257, "x") + 'ustar  "}')
    assert json.dumps(open_conversations(tmp_path / "r.jsonl")[0]) == (tmp_path / "r.jsonl").read_text()


def test_m1_a_home_directory_and_a_folder_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "b.jsonl").write_text('{"text": "b"}\n')
    (tmp_path / "data" / "a.json").write_text('[{"text": "a"}]')
    (tmp_path / "data" / ".hidden.jsonl").write_text("{")
    for path in ("~/data", "~/data/*", str(tmp_path / "data")):
        source = open_conversations(path)
        assert [source[k] for k in range(len(source))] == [{"text": "a"}, {"text": "b"}]
    assert nanopack.verify("~/data", SMALL, **ROW)


def test_m1_a_saved_dataset_of_splits_names_them(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    split = datasets.Dataset.from_list([{"text": "a"}])
    datasets.DatasetDict(train=split, test=split).save_to_disk(tmp_path / "d")
    with pytest.raises(ValueError, match=r"is a saved DatasetDict; name one of its splits, '.*d/test' or '.*d/train'"):
        open_conversations(tmp_path / "d")
    assert open_conversations(tmp_path / "d" / "train")[0] == {"text": "a"}


# M2: content as text parts


@pytest.mark.parametrize("kind", ["text", "input_text", "output_text"])
def test_m2_text_parts_are_their_text(kind: str) -> None:
    def parts(*texts: str) -> list[dict[str, str]]:
        return [{"type": kind, "text": text} for text in texts]

    messages = [{"role": "system", "content": parts("S")}, {"role": "user", "content": parts("Q", "1", "")}]
    messages.append({"role": "assistant", "content": parts("A", "B")})
    assert shown({"messages": messages}) == chatml("system S", "user Q1", "assistant AB")
    assert shown({"messages": messages}, "nanochat").endswith(
        "S\n\nQ1<|user_end|><|assistant_start|>[[AB<|assistant_end|>]]"
    )
    assert shown([U | {"content": []}, A]) == chatml("user ", "assistant A")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "text", "text": "x", "image_url": "y"},
        {"type": "text", "text": "x", "weight": 0},
        {"type": "text", "text": None},
        {"type": "thinking", "thinking": "R"},
    ],
)
def test_m2_parts_that_are_more_than_text_are_refused(part: dict[str, Any]) -> None:
    assert "part 0" in refused({"messages": [U, A | {"content": [part]}]})


# M5, M6: names


def test_m5_either_form_of_a_message_is_read_under_either_key() -> None:
    shared = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    expected = chatml("user Q", "assistant A")
    for record in ({"messages": shared}, {"conversations": [U, A]}, shared, {"messages": [U, shared[1]]}):
        assert shown(record) == expected
    assert shown({"messages": [{"role": "user", "value": "Q", "content": None}, A]}) == expected


@pytest.mark.parametrize(
    ("name", "role"),
    [
        *(("User", "user"), ("HUMAN", "user"), ("prompter", "user"), ("Assistant", "assistant"), ("GPT", "assistant")),
        *(("bing", "assistant"), ("bard", "assistant"), ("model", "assistant"), ("function_call", "assistant")),
        *(("function", "tool"), ("observation", "tool"), ("developer", "system"), ("System", "system")),
    ],
)
def test_m6_roles_have_many_names(name: str, role: str) -> None:
    turn = f"{role} x" if role != "assistant" else "assistant x"
    assert shown([U, {"role": name, "content": "x"}, U, A]) == chatml("user Q", turn, "user Q", "assistant A")
    assert check([{"role": "developer", "content": "x"}]).messages[0].role == "developer"
