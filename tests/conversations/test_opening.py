"""Conversations of every source are opened, or what is given is named with the remedy."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanopack.conversations.records import Conversation, Message, Part, Source, check, open_conversations
from nanopack.errors import ConversationError

HI = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with b, a, c and shards.jsonl/d.jsonl, each holding its name, and bad files."""
    monkeypatch.chdir(tmp_path)
    for name in "bac":
        Path(f"{name}.jsonl").write_text(json.dumps({"text": name}))
    Path("blank.jsonl").write_text("\n\n \n")
    Path("zero.jsonl.gz").write_bytes(b"")
    Path("notes.txt").write_text("notes")
    Path("broken.parquet").write_bytes(b"PAR1 no more")
    Path("empty").mkdir()
    Path("shards.jsonl").mkdir()
    Path("shards.jsonl/d.jsonl").write_text(json.dumps({"text": "d"}))
    return tmp_path


def texts(conversations: object) -> list[object]:
    source = open_conversations(conversations)
    return [check(source[index]).text for index in range(len(source))]


@pytest.mark.parametrize(
    ("conversations", "expected"),
    [
        pytest.param("b.jsonl", "b", id="path"),
        pytest.param(Path("b.jsonl"), "b", id="path-object"),
        pytest.param("[a-c].jsonl", "abc", id="glob-sorts"),
        pytest.param(Path("[a-c].jsonl"), "abc", id="glob-of-path-object"),
        pytest.param("*/d.jsonl", "d", id="glob-of-folders"),
        pytest.param("**/[ad].jsonl", "ad", id="glob-of-all-depths"),
        pytest.param("shards.jsonl", "d", id="folder"),
        pytest.param(["shards.jsonl", "a.jsonl"], "da", id="folder-in-list"),
        pytest.param(["c.jsonl", "a.jsonl", "b.jsonl"], "cab", id="list-keeps-order"),
        pytest.param(("c.jsonl", Path("[ab].jsonl"), "c.jsonl"), "cabc", id="list-of-paths-and-globs"),
        pytest.param([{"text": "x"}, {"text": "y"}], "xy", id="list-of-dicts"),
        pytest.param(({"text": "x"},), "x", id="tuple-of-dicts"),
        pytest.param(["blank.jsonl", "a.jsonl", "zero.jsonl.gz"], "a", id="empty-files-among-others"),
    ],
)
def test_paths_globs_and_lists_give_their_conversations_in_order(
    folder: Path, conversations: object, expected: str
) -> None:
    assert texts(conversations) == list(expected)


@pytest.mark.parametrize(
    ("conversations", "said"),
    [
        (["a.jsonl", "b.jsonl"], ""),
        (["[ab].jsonl", "a.jsonl"], "1 of the files are given again.*a.jsonl, after a.jsonl"),
        (["a.jsonl"] * 3, "2 of the files are given again"),
        (["a.jsonl", "linked/a.jsonl"], "1 of the files are given again.*linked/a.jsonl, after a.jsonl"),
    ],
)
def test_a_file_that_is_given_twice_is_named(
    folder: Path, caplog: pytest.LogCaptureFixture, conversations: object, said: str
) -> None:
    Path("linked").symlink_to(folder)
    assert texts(conversations)
    assert re.search(said, caplog.text) and bool(said) == bool(caplog.text)


def test_a_folder_that_cannot_be_listed_is_not_said_to_be_empty(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scandir(path: object) -> object:
        raise OSError(24, "Too many open files", path)

    # glob takes it for a folder without files
    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(os, "listdir", scandir)
    with pytest.raises(OSError, match=r"Too many open files.*empty"):
        open_conversations("empty/*.jsonl")


@pytest.mark.parametrize("has_length", [False, True])
def test_a_data_set_that_can_only_be_iterated_is_refused_when_it_is_opened(has_length: bool) -> None:
    torch = pytest.importorskip("torch")
    members = {"__iter__": lambda self: iter([HI]), **({"__len__": lambda self: 1} if has_length else {})}
    kind = type("Streamed", (torch.utils.data.IterableDataset,), members)
    with pytest.raises(ValueError, match=r"\[int\].*list\(...\) of it"):
        open_conversations(kind())


def test_a_file_whose_name_looks_like_a_glob_is_meant_itself(folder: Path) -> None:
    Path("[ab].jsonl").write_text('{"text": "itself"}')
    assert texts("[ab].jsonl") == ["itself"]


def test_an_upper_case_suffix_is_known(folder: Path) -> None:
    os.rename("a.jsonl", "A.JSONL")
    assert texts("A.JSONL") == ["a"]


@pytest.mark.parametrize(
    ("conversations", "message"),
    [
        pytest.param("none.jsonl", r"='none.jsonl' does not exist; the working directory", id="missing-file"),
        pytest.param(["a.jsonl", "none.jsonl"], r"='none.jsonl' does not exist", id="missing-file-in-list"),
        pytest.param("none*.jsonl", r"='none\*.jsonl' matches no file; the working directory", id="empty-glob"),
        pytest.param("empty", r"='empty' is a folder without files that end in .jsonl,", id="folder"),
        pytest.param("e*y", r"='empty' is a folder without files", id="folder-in-glob"),
        pytest.param("notes.txt", r"='notes.txt' has an unknown suffix; known are .jsonl,", id="suffix"),
        pytest.param("*.t*", r"='notes.txt' has an unknown suffix", id="suffix-in-glob"),
        pytest.param("pipe.jsonl", r"is not a file that can be read; give a plain file", id="pipe"),
        pytest.param("blank.jsonl", r"=\['blank.jsonl'\] holds no conversation; give", id="blank-file"),
        pytest.param("zero.jsonl.gz", r"=\['zero.jsonl.gz'\] holds no conversation", id="empty-gz"),
        pytest.param("broken.parquet", r"cannot be read as Parquet \(.*make or copy", id="parquet"),
        pytest.param("columns.parquet", r"columns chat, id, but none of messages, .*name", id="columns"),
        pytest.param([], r"=\[\] holds no conversation; give at least one", id="empty-list"),
        pytest.param((), r"=\(\) holds no conversation", id="empty-tuple"),
        pytest.param(["a.jsonl", HI], r"mixes paths with {.*} of type dict; give paths or", id="path-dict"),
        pytest.param([HI, "a.jsonl"], r"mixes paths with {.*} of type dict", id="dict-path"),
        pytest.param(["Hello there."], r"'Hello there.' does not exist.*a text goes in as", id="texts"),
        pytest.param(["What? " * 40], r"matches no file", id="text-like-a-glob"),
        pytest.param([1, 2], r"=\[1, 2\] of type list holds no records; give", id="list-of-numbers"),
        pytest.param([None], r"=\[None\] of type list holds no records", id="list-of-none"),
        pytest.param(HI, r"is one dict; put a conversation into a list", id="one-conversation"),
        pytest.param({"train": [HI]}, r"is one dict; .*give one split of a DatasetDict", id="splits"),
        pytest.param(iter([HI]), r"of type list_iterator has no len\(\) and \[int\]; give", id="iterator"),
        pytest.param((HI for _ in "a"), r"of type generator has no len\(\) and \[int\]", id="generator"),
        pytest.param({1, 2}, r"={1, 2} of type set has no len\(\) and \[int\]", id="set"),
        pytest.param(None, r"=None of type NoneType has no len\(\)", id="none"),
        pytest.param(17, r"=17 of type int has no len\(\)", id="number"),
        pytest.param(list, r"of type type has no len\(\)", id="class"),
        pytest.param(b"a.jsonl", r"of type bytes is not a path; give it as str", id="bytes"),
    ],
)
def test_what_holds_no_conversations_is_an_error_that_names_value_and_remedy(
    folder: Path, conversations: object, message: str
) -> None:
    if conversations == "pipe.jsonl":
        os.mkfifo("pipe.jsonl")
    if conversations == "columns.parquet":
        pa = pytest.importorskip("pyarrow")
        table = pa.table({"chat": ["x"], "id": [1]})
        pytest.importorskip("pyarrow.parquet").write_table(table, "columns.parquet")
    with pytest.raises(ValueError, match=message):
        open_conversations(conversations)


class Verses(Source):
    """Conversations of a kind that open_conversations does not know."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> object:
        return {"text": "x"}

    def where(self, index: int) -> str:
        return "a verse"


def test_an_empty_source_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Verses, "__len__", lambda self: 0)
    with pytest.raises(ValueError, match="holds no conversation"):
        open_conversations(Verses())


def test_a_data_set_whose_where_means_something_else_is_no_source() -> None:
    class Series:
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> object:
            return {"text": "x"}

        def where(self, condition: object) -> str:
            raise AssertionError("a pandas.Series gives the elements for which the condition holds")

    assert open_conversations(Series()).where(0) == "conversation 0"


class Task:
    """An object with len and [int] that takes Python's integers only and notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> dict[str, object]:
        assert type(index) is int
        self.asked.append(index)
        return {"text": str(index)}


def test_an_object_is_asked_for_the_conversation_wanted_and_no_other() -> None:
    task = Task()
    source = open_conversations(task)
    assert task.asked == []
    assert source[17] == {"text": "17"}
    third: Any = np.int64(3)
    assert source[third] == {"text": "3"}
    assert task.asked == [17, 3]
    assert source.where(17) == "conversation 17"
    for index in (100, -1):
        with pytest.raises(IndexError, match=f"conversation {index} of 100"):
            source[index]


def test_a_source_opens_as_itself(folder: Path) -> None:
    for conversations in ("a.jsonl", [HI]):
        source = open_conversations(conversations)
        assert open_conversations(source) is source
    verses = Verses()
    assert open_conversations(verses) is verses


def test_a_hugging_face_dataset_gives_its_conversations() -> None:
    datasets = pytest.importorskip("datasets")
    parts = [{"type": "text", "text": "x", "image": None}, {"type": "python", "text": "1", "image": None}]
    rows = [
        {"messages": [{"role": "user", "content": [parts[0]], "name": None}], "weight": None, "text": None},
        {"messages": [{"role": "assistant", "content": parts, "name": "a"}], "weight": 2.0, "text": None},
    ]
    source = open_conversations(datasets.Dataset.from_list(rows))
    assert [check(source[k]) for k in range(2)] == [
        Conversation((Message("user", (Part("text", "x"),)),)),
        Conversation((Message("assistant", (Part("text", "x"), Part("python", "1")), {"name": "a"}),), None, 2.0),
    ]


@pytest.mark.parametrize("format", ["pandas", "arrow"])
def test_a_dataset_that_hands_out_arrays_or_tables_is_told_how_to_hand_out_dicts(format: str) -> None:
    dataset = pytest.importorskip("datasets").Dataset.from_list([HI])
    pytest.importorskip("pandas")
    source = open_conversations(dataset.with_format(format))
    with pytest.raises(ConversationError, match=r"^[^\n]* with \.with_format\(None\)$"):
        check(source[0])


def test_a_table_and_data_sets_of_several_parts_are_told_what_to_give_on_one_line() -> None:
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    dataset = datasets.Dataset.from_list([HI])
    for conversations, remedy in [
        (pandas.DataFrame([HI]), r"df\.to_dict\('records'\)"),
        (datasets.DatasetDict(train=dataset), r"data\['train'\]"),
        (dataset.to_iterable_dataset(), r"list\(\.\.\.\) of it"),
    ]:
        with pytest.raises(ValueError, match=rf"^conversations=[^\n]* of type [^\n]*give [^\n]*{remedy}[^\n]*$"):
            open_conversations(conversations)
