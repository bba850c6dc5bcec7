"""Conversations of every source and shape become one shape; what is wrong is named; ranks share them out."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopack import reference
from nanopack.conversations.records import Conversation, Message, Part, check
from nanopack.errors import ConversationError

HI = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
HI_CHECKED = (Message("user", "hi"), Message("assistant", "hello"))


def user(**changes: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"} | changes]}


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
    "shape-is-null": ({"messages": None}, r"but none of .* with output: messages is null; remove the record, or fill"),
    "text-is-null": ({"text": None, "id": 3}, r"but none of .* with output: text is null; remove the record"),
    "answer-is-null": ({"prompt": "x", "completion": None}, r": completion is null; a prompt needs a completion"),
    "two-are-null": ({"prompt": None, "completion": None}, r": prompt and completion are null; remove the record"),
    "part-is-null": (
        user(content=[{"type": "text", "text": None}]),
        r"^message 1: text of part 0 must be a str, not None",
    ),
    "text-for-content": ([{"text": None}], r"^message 0: it has no role, but text, as a record has: give it a role"),
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
    "a-record-for-a-message": (
        [HI],
        r"^message 0: it has no role, but messages, as a record has: .* JSON array of records must be named \.json$",
    ),
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
    "part-type-missing": (user(content=[{"text": "x"}]), r"part 0 of content: it has no type; allowed are"),
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
