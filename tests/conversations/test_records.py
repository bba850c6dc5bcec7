"""Conversations of every source and shape become one shape; what is wrong is named; ranks share them out."""

from __future__ import annotations

import json
import math
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopack import reference
from nanopack.conversations.records import Conversation, Message, Part, Source, check, open_conversations
from nanopack.errors import ConversationError

HI = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
HI_CHECKED = (Message("user", "hi"), Message("assistant", "hello"))


def user(**changes: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"} | changes]}


# Opening


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


# Checking

strings = st.text(max_size=8)
part_dicts = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "python", "python_output"]), "text": strings},
    optional={"extra": st.none()},
)
contents: st.SearchStrategy[Any] = st.one_of(strings, st.lists(part_dicts, max_size=3))
pairs = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), contents), min_size=1, max_size=5)
weights = st.one_of(st.none(), st.integers(0, 9), st.floats(0, 1e30))


@given(pairs, weights, st.sampled_from(["human", "user"]), st.sampled_from(["gpt", "chatgpt"]))
def test_every_shape_of_a_conversation_becomes_the_same(
    pairs: list[tuple[str, Any]], weight: float | None, human: str, gpt: str
) -> None:
    messages = tuple(
        Message(role, body if isinstance(body, str) else tuple(Part(p["type"], p["text"]) for p in body))
        for role, body in pairs
    )
    expected = Conversation(messages, None, 1.0 if weight is None else float(weight))
    bare = [{"role": role, "content": body, "name": None} for role, body in pairs]
    names = {"user": human, "assistant": gpt, "system": "system"}
    shared = [{"from": names[role], "value": body} for role, body in pairs]
    assert check({"messages": bare, "weight": weight, "id": 1}) == expected
    assert check({"messages": bare, "weight": weight, "text": None, "conversations": None}) == expected
    assert check({"conversations": shared, "weight": weight, "messages": None}) == expected
    assert check(bare) == Conversation(messages)
    assert check(tuple(bare)) == Conversation(messages)


@pytest.mark.parametrize("text", ["x", "", "<|bos|>", "\ud800"])
def test_a_text_is_a_conversation_without_messages(text: str) -> None:
    assert check({"text": text, "weight": 3, "messages": None}) == Conversation((), text, 3.0)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int8, np.int64, Fraction])
def test_a_weight_may_be_any_real_number(kind: type) -> None:
    weight = check({"text": "x", "weight": kind(3)}).weight
    assert weight == 3.0 and type(weight) is float


def test_the_roles_of_sharegpt_become_ours() -> None:
    roles = ["system", "human", "gpt", "user", "assistant", "chatgpt", "function_call", "observation", "tool"]
    checked = check({"conversations": [{"from": role, "value": ""} for role in roles]})
    assert [message.role for message in checked.messages] == [
        "system",
        *["user", "assistant"] * 2,
        *["assistant"] * 2,
        *["tool"] * 2,
    ]


def test_a_tool_may_be_called_as_llama_3_does() -> None:
    checked = check([{"role": role, "content": ""} for role in ("tool", "ipython")])
    assert [message.role for message in checked.messages] == ["tool", "tool"]


LONG = "ab" * 5000

ALLOWED = "allowed are assistant, developer, system, tool, user, or ShareGPT's names for them"

BAD_RECORDS: dict[str, tuple[object, str]] = {
    "none": (None, r"^a conversation is a dict or a list of messages, not None of type NoneType$"),
    "string": ("hi", r"^a conversation is a dict or a list .* not 'hi' of type str$"),
    "number": (3, r"not 3 of type int$"),
    "no-shape": ({"prompt": "x"}, r"^the record has the keys \['prompt'\], but none of .*; rename one$"),
    "empty-dict": ({}, r"^the record has the keys \[\], but none of messages, conversations, text"),
    "shape-is-null": ({"messages": None}, r"^the record has the keys \['messages'\], but none of"),
    "a-message-alone": ({"role": "user", "content": "x"}, r"this is a message, put it into a list$"),
    "two-shapes": (HI | {"text": "x"}, r"^the record has messages and text; remove all of them but one, or"),
    "three-shapes": (
        HI | {"text": "", "conversations": []},
        r"^the record has messages and conv.* and text;",
    ),
    "messages-string": ({"messages": "hi"}, r"^the messages must be a list, not 'hi' of type str$"),
    "messages-dict": ({"messages": {"role": ["user"]}}, r"^the messages must be a list, not {'role'.* dict$"),
    "messages-empty": ({"messages": []}, r"^the list of messages is empty; there must be at least one$"),
    "bare-empty": ([], r"^the list of messages is empty"),
    "message-string": ({"messages": ["hi"]}, r"^message 0: it must be a dict of 'role' .* not 'hi' of"),
    "message-null": ([HI["messages"][0], None], r"^message 1: it must be a dict of 'role' .* not None"),
    "role-missing": ([{"content": "x"}], rf"^message 0: role is None; {ALLOWED}$"),
    "role-unknown": (user(role="judge"), rf"^message 1: role is 'judge'; {ALLOWED}"),
    "role-number": (user(role=1), r"^message 1: role is 1; allowed"),
    "role-unhashable": (user(role=["user"]), r"^message 1: role is \['user'\]; allowed"),
    "role-long": (user(role=LONG), r"^message 1: role is '(ab)+a?\.\.\.b?(ab)+'; allowed"),
    "role-twice": (user(**{"from": "gpt"}), r"^message 1: it has both 'role' and 'from'; remove one of them$"),
    "content-twice": (user(value="x"), r"^message 1: it has both 'content' and 'value'; remove one"),
    "a-record-for-a-message": ([HI], r"^message 0: this is a record, not a message: .* must be named \.json$"),
    "sharegpt-value": (
        {"conversations": [{"from": "gpt", "value": 1}]},
        r"^message 0: value must be a str or a list of parts, not 1 of type int$",
    ),
    "content-missing": ([{"role": "user"}], r"^message 0: content must be a str or .* not None"),
    "content-null": (user(content=None), r"^message 1: content must be .* not None of type NoneType$"),
    "content-number": (user(content=1.5), r"^message 1: content must be .* not 1.5 of type float$"),
    "content-bytes": (user(content=b"x"), r"^message 1: content must be .* not b'x' of type bytes$"),
    "content-dict": (
        user(content={"text": LONG}),
        r"^message 1: content must be .* not {'text': .{,60} dict$",
    ),
    "part-string": (user(content=["x"]), r"^message 1: part 0 of content must be a dict of .* not 'x'"),
    "part-type-missing": (user(content=[{"text": "x"}]), r"part 0 of content: type is None; allowed are"),
    "part-type-unknown": (
        user(content=[{"type": "text", "text": "x"}, {"type": "image", "text": "x"}]),
        r"^message 1: part 1 of content: type is 'image'; allowed are text, python, python_output$",
    ),
    "part-type-unhashable": (user(content=[{"type": [], "text": ""}]), r"content: type is \[\]; allowed"),
    "part-text-missing": (
        user(content=[{"type": "text"}]),
        r"^message 1: text of part 0 must be a str, not None of type NoneType$",
    ),
    "part-text-number": (
        user(content=[{"type": "python", "text": 1}]),
        r"^message 1: text of part 0 must be",
    ),
    "text-list": ({"text": ["x"]}, r"^text must be a str, not \['x'\] of type list$"),
    "text-number": ({"text": 0}, r"^text must be a str, not 0 of type int$"),
    "weight-negative": (HI | {"weight": -0.5}, r"^weight must be a number from 0 to 3.4e\+38 .* not -0.5"),
    "weight-nan": (HI | {"weight": math.nan}, r"^weight must be .* not nan"),
    "weight-infinite": (HI | {"weight": math.inf}, r"^weight must be .* not inf"),
    "weight-infinite-in-float32": (HI | {"weight": 3.5e38}, r"^weight must be .* not 3.5e\+38"),
    "weight-huge-integer": (HI | {"weight": 10**400}, r"^weight must be .* not 1000"),
    "weight-bool": (HI | {"weight": True}, r"^weight must be .* not True of type bool$"),
    "weight-numpy-bool": (HI | {"weight": np.True_}, r"^weight must be .* not True of type bool$"),
    "weight-infinite-in-float16": (HI | {"weight": np.float16(math.inf)}, r"^weight must be .* not inf"),
    "weight-string": ({"text": "x", "weight": "1"}, r"^weight must be .* not '1' of type str$"),
}


@pytest.mark.parametrize("edge", BAD_RECORDS)
def test_a_bad_record_is_an_error_that_names_message_value_and_remedy(edge: str) -> None:
    record, message = BAD_RECORDS[edge]
    with pytest.raises(ConversationError, match=message) as caught:
        check(record)
    # The caller puts the place before it and a full stop after it.
    assert not str(caught.value).endswith(".")
    assert len(str(caught.value)) < 250


# Documents that are rendered already


def test_ids_and_mask_are_taken_as_they_are() -> None:
    ids, mask = np.array([5, 6, 7], np.uint16), np.array([False, True, True])
    found = check({"input_ids": ids, "loss_mask": mask, "weight": 2}).tokens
    assert found is not None and found.ids is ids and found.mask is mask
    listed = check({"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}).tokens
    assert listed is not None and listed.mask is not None
    assert listed.ids.tolist() == [5, 6, 7] and listed.mask.tolist() == [False, True, True]
    assert check({"input_ids": (1, 2)}).tokens.mask is None


@pytest.mark.parametrize("name", ["input_ids", "loss_mask"])
def test_a_masked_array_is_taken_only_where_nothing_in_it_is_masked(name: str) -> None:
    record: dict[str, Any] = {"input_ids": np.array([1, 0, 1]), "loss_mask": np.array([1, 0, 1])}
    record[name] = np.ma.array([1, 0, 1], mask=False)
    found = check(record).tokens
    assert found is not None and found.mask is not None
    assert found.ids.tolist() == [1, 0, 1] and found.mask.tolist() == [True, False, True]
    record[name] = np.ma.array([1, 0, 1], mask=[False, True, False])
    message = rf"^{name} has masked entries: masked_array\(data=\[1, --, 1\].*; give \.compressed\(\) or \.filled"
    with pytest.raises(ConversationError, match=message):
        check(record)
    with pytest.raises(ConversationError):
        next(reference.batches([record], "chat32k"))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        pytest.param({"input_ids": []}, "input_ids is empty; a document has at least one token", id="empty"),
        pytest.param({"input_ids": [1.5]}, "input_ids must be ints, not float64", id="floats"),
        pytest.param({"input_ids": [True]}, "input_ids must be ints, not bool", id="bools"),
        pytest.param({"input_ids": ["a"]}, "input_ids must be ints", id="text"),
        pytest.param({"input_ids": [[1], [2]]}, r"must be flat, not of shape \(2, 1\)", id="nested"),
        pytest.param({"input_ids": [[1], [2, 3]]}, "no flat array", id="ragged"),
        pytest.param({"input_ids": 7}, r"must be flat, not of shape \(\)", id="number"),
        pytest.param({"input_ids": [1, 2], "loss_mask": [1]}, "1 entries for 2 input_ids", id="mask-short"),
        pytest.param({"input_ids": [1, 2], "loss_mask": [1, 2]}, "bools or 0 and 1", id="mask-of-2"),
        pytest.param({"input_ids": [1, 2], "loss_mask": [0.0, 1.0]}, "bools or 0 and 1", id="mask-of-floats"),
        pytest.param({"input_ids": [1], "text": "a"}, "text and input_ids", id="two-shapes"),
    ],
)
def test_what_is_no_document_is_refused(record: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversationError, match=message):
        check(record)
