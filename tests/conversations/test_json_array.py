"""The elements of a JSON array are found whatever they hold, in chunks of any size, in little memory."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopack.conversations.json_array import scan_array
from nanopack.conversations.records import open_conversations
from nanopack.errors import ConversationError
from nanopack.reference.files import open_records

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('ab"\\[]{},é \n', max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('a"\\]', max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(values, max_size=6), st.sampled_from([None, 1, "\t"]), st.booleans(), st.integers(1, 40))
def test_elements_are_found_in_chunks_of_any_size(elements: list[Any], indent: Any, ascii: bool, size: int) -> None:
    data = (" \n" + json.dumps(elements, indent=indent, ensure_ascii=ascii) + "\r\n ").encode()
    bounds = scan_array(data[at : at + size] for at in range(0, len(data), size))
    assert [json.loads(data[a : b - 1]) for a, b in itertools.pairwise(bounds)] == elements


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b'[{"a": 1}, {"b"', "is a JSON array, but the array does not end; make or copy", id="cut-off"),
        pytest.param(b'[{"a": "]', "the array does not end", id="cut-off-in-a-string"),
        pytest.param(b"[", "the array does not end", id="only-begun"),
        pytest.param(b'[{"text": "a"}]\n[{"text": "b"}]', r"after the array's end comes b'\[{\"text", id="lines"),
        pytest.param(b'[{"text": "a"}] x', "after the array's end comes b'x'", id="more"),
    ],
)
def test_what_is_no_whole_array_is_refused_when_it_is_opened(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        open_conversations(path)
    with pytest.raises(ValueError, match=r"r\.json: "):
        open_records(path)


def test_a_bad_element_is_named_and_harms_no_other(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(b'\xef\xbb\xbf[{"text": "a"}, {"text": nope}, {"text": "\xff"}, , {"text": "b"}]')
    source, stored = open_conversations(path), open_records(path)
    assert len(source) == len(stored) == 5
    assert [source.where(1), stored[1][0]] == [f"{path} element 1"] * 2
    assert [source[0], source[4]] == [{"text": "a"}, {"text": "b"}] == [stored[0][1](), stored[4][1]()]
    for bad, message in ((1, "not JSON: Expecting value"), (2, "not UTF-8: byte 0xff"), (3, "not JSON: Expecting")):
        with pytest.raises(ConversationError, match=message):
            source[bad]
        with pytest.raises(ValueError):
            stored[bad][1]()


@pytest.mark.parametrize("data", [b"[]", b"[ \n\t]", b"\xef\xbb\xbf[]\n"])
def test_an_empty_array_holds_no_conversation(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="holds no conversation"):
        open_conversations(path)
    assert open_records(path) == []


def test_a_large_array_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    record = json.dumps(
        {"conversations": [{"from": "human", "value": "é\\" * 200}, {"from": "gpt", "value": "x" * 400}]}
    )
    count = 20_000
    with path.open("w") as file:
        file.write("[\n" + ",\n".join([record] * count) + "\n]")
    tracemalloc.start()
    source = open_conversations(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(source) == count and source[count - 1] == json.loads(record)
    assert path.stat().st_size > 30e6 and peak < 12e6
