"""What people's data say is what is in the loss: cases from public bug reports, each with variants of its kind.

Each case is stated by its right value: the tokens of a document, those in the loss between [[ and ]].
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from shown import BAD, ROW, SMALL, A, U, chatml, refused, shown

import nanopack
from nanopack import ConversationError
from nanopack.conversations.records import check

TEMPLATES = ["nanochat", "chatml"]

# W1: ready tokens with Hugging Face's names for the mask

IDS = [65, 66, 67, 68]
TOKENS = {
    "labels": ({"labels": [65, -100, 67, 68]}, "AB[[CD]]"),
    "labels-of-the-whole": ({"labels": IDS}, "A[[BCD]]"),
    "labels-and-attention": ({"labels": [65, -100, 67, -100], "attention_mask": [1, 1, 1, 0]}, "AB[[C]]"),
    "padded-on-the-left": ({"labels": [-100, -100, 67, 68], "attention_mask": [0, 1, 1, 1]}, "B[[CD]]"),
    "labels-as-array": ({"labels": np.array([-100, 66, -100, 68])}, "A[[B]]C[[D]]"),
    "assistant-masks": ({"assistant_masks": [0, 0, 1, 0]}, "AB[[C]]D"),
    "completion-mask": ({"completion_mask": [0, 0, 1, 1]}, "AB[[CD]]"),
    "masks-that-agree": ({"loss_mask": [0, 0, 1, 1], "labels": [-100, -100, 67, 68]}, "AB[[CD]]"),
    "attention-alone": ({"attention_mask": [1, 1, 0, 0]}, "A[[B]]"),
    "masks-that-agree-but-at-a-pad": (
        {"loss_mask": [0, 0, 1, 1], "labels": [-100, -100, 67, -100], "attention_mask": [1, 1, 1, 0]},
        "AB[[C]]",
    ),
    "hole-in-attention": ({"attention_mask": [1, 0, 1, 1]}, "A[[CD]]"),
    "of-a-tokenizer": ({"attention_mask": [1] * 4, "token_type_ids": [0] * 4, "length": 4}, "A[[BCD]]"),
    "position-ids": ({"position_ids": [0, 1, 2, 3], "labels": [-100, -100, -100, 68]}, "ABC[[D]]"),
}


@pytest.mark.parametrize("case", TOKENS)
def test_w1_masks_of_ready_tokens_are_obeyed_under_every_name(case: str) -> None:
    masks, expected = TOKENS[case]
    assert shown({"input_ids": IDS, **masks}) == expected


def test_w1_a_record_whose_labels_are_all_masked_is_not_in_the_loss() -> None:
    record = {"input_ids": [1, 2, 3], "labels": [-100] * 3}
    with nanopack.Loader([record], SMALL, **ROW) as loader:
        assert list(loader) == [] and loader.ledger()["conversations"]["dropped"] == {"untrained": 1}


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        pytest.param(
            {"labels": [66, 67, 68, -100]}, r"labels\[0\] is 66, neither input_ids\[0\].*shifted", id="shifted"
        ),
        pytest.param({"labels": [-100, 9, -100, -100]}, r"labels\[1\] is 9, neither", id="another"),
        pytest.param({"labels": [65]}, "labels has 1 entries for 4 input_ids", id="short"),
        pytest.param({"attention_mask": [0] * 4}, "attention_mask is 0 everywhere", id="all-pads"),
        pytest.param({"attention_mask": [1, 1, 2, 2]}, "attention_mask must be bools or 0 and 1", id="packed"),
        pytest.param({"position_ids": [0, 1, 0, 1]}, "position_ids do not count up by 1", id="packed-positions"),
        pytest.param({"position_ids": [0.0, 1.0, 2.0, 3.0]}, "position_ids do not count up", id="float-positions"),
        pytest.param({"position_ids": [0, 1]}, "position_ids has 2 entries for 4 input_ids; give", id="few-positions"),
        pytest.param({"seq_lengths": [2, 2]}, "seq_lengths shows several documents", id="packed-lengths"),
        pytest.param({"loss_mask": [1] * 4, "labels": [-100, *IDS[1:]]}, "loss_mask and labels contradict", id="two"),
        pytest.param(
            {"assistant_masks": [1, 0, 0, 0], "completion_mask": [1, 1, 0, 0]}, "contradict each other", id="trl"
        ),
        pytest.param({"prompt_mask": [1, 1, 0, 0]}, "prompt_mask cannot be honoured", id="unknown-meaning"),
        pytest.param({"mask": [1, 1, 0, 0]}, "mask is .* say loss_mask or attention_mask", id="ambiguous"),
        pytest.param({"tools": [{"name": "f"}]}, "tools belongs to messages", id="tools"),
    ],
)
def test_w1_masks_that_cannot_be_obeyed_are_refused(masks: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversationError, match=message):
        check({"input_ids": IDS, **masks})
    refused({"input_ids": IDS, **masks})


def test_w1_a_mask_next_to_messages_is_refused() -> None:
    for key in ("labels", "loss_mask", "attention_mask", "assistant_masks"):
        assert f"{key} is about input_ids" in refused({"messages": [U, A], key: [1, 0]})
        assert f"{key} is about input_ids" in refused({"text": "x", key: [1, 0]})


# W2: do not learn this turn


@pytest.mark.parametrize("flag", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"masked": True}, {"loss": False}])
def test_w2_a_message_that_says_so_is_not_learnt(flag: dict[str, Any]) -> None:
    good = {key: not value if isinstance(value, bool) else 1 for key, value in flag.items()}
    record = {"messages": [U, BAD | flag, U, A | good]}
    assert shown(record) == chatml("user Q", "!assistant BAD", "user Q", "assistant A")
    nanochat = shown(record, "nanochat")
    assert "<|assistant_start|>BAD<|assistant_end|>" in nanochat and "[[A<|assistant_end|>]]" in nanochat
    shared = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "BAD", **flag}, {"from": "user", "value": "Q"}]
    assert shown({"conversations": [*shared, A]}) == chatml("user Q", "!assistant BAD", "user Q", "assistant A")


def test_w2_a_part_of_code_is_not_learnt_either() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "python", "text": "b"}, {"type": "python_output", "text": "c"}]
    text = shown({"messages": [U, A | {"content": parts, "weight": 0}, U, A]}, "nanochat")
    assert text.count("[[") == 1 and text.endswith("[[A<|assistant_end|>]]")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param({"weight": 0.5}, "weight must be 0 or 1", id="half"),
        pytest.param({"weight": 2}, "weight must be 0 or 1", id="twice"),
        pytest.param({"weight": "0"}, "weight must be 0 or 1", id="text"),
        pytest.param({"train": "no"}, "train must be 0 or 1", id="word"),
        pytest.param({"weight": 0, "train": True}, "weight and train contradict each other", id="two"),
        pytest.param({"mask": True}, "mask cannot be honoured", id="ambiguous"),
        pytest.param({"train_detail": [{"begin_offset": 0}]}, "train_detail cannot be honoured", id="characters"),
    ],
)
def test_w2_a_flag_that_cannot_be_obeyed_is_refused(flags: dict[str, Any], message: str) -> None:
    assert f"message 1: {message}" in refused({"messages": [U, A | flags]})


def test_w2_to_learn_what_the_user_says_is_refused_and_a_flag_without_effect_is_not() -> None:
    assert "message 0: train is True, but what a user says" in refused({"messages": [U | {"train": True}, A]})
    for flag in ({"weight": 1}, {"masked": False}, {"weight": 0}, {"train": False}):
        assert shown({"messages": [U | flag, A]}) == chatml("user Q", "assistant A")


# W3: what stands next to the conversation


def test_w3_a_system_next_to_the_conversation_is_its_first_message() -> None:
    shared = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    expected = chatml("system Be curt.", "user Q", "assistant A")
    for key in ("system", "system_prompt"):
        assert shown({key: "Be curt.", "tools": "[]", "conversations": shared}) == expected
    assert shown({"system": "Be curt.", "messages": [U, A]}) == expected
    assert shown({"system": "Be curt.", "prompt": "Q", "completion": "A"}) == expected
    assert shown({"system": "Be curt.", "instruction": "Q", "input": "", "output": "A"}) == expected
    assert "Be curt.\n\nQ" in shown({"system": "Be curt.", "messages": [U, A]}, "nanochat")
    for nothing in ("", None, []):
        assert shown({"system": nothing, "messages": [U, A]}) == chatml("user Q", "assistant A")


def test_w3_two_systems_are_refused() -> None:
    for role in ("system", "developer"):
        first = {"role": role, "content": "S"}
        assert "message 0 is the system's already" in refused({"system": "T", "messages": [first, U, A]})


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("tools", [[{"type": "function"}], '[{"type": "function"}]', ['{"name": "f"}']])
def test_w3_tools_are_refused_where_they_cannot_be_written(template: str, tools: Any) -> None:
    assert "it has tools" in refused({"tools": tools, "messages": [U, A]}, template).replace("the record", "it")
    assert check({"tools": tools, "messages": [U, A]}).tools is not None


def test_w3_template_arguments_are_refused_where_they_cannot_be_used_and_nothing_counts_as_absent() -> None:
    for kwargs in ({"enable_thinking": False}, '{"enable_thinking": false}'):
        record = {"messages": [U, A], "chat_template_kwargs": kwargs}
        assert "chat_template_kwargs" in refused(record)
        assert check(record).template_kwargs == {"enable_thinking": False}
    for nothing in ([], "", "[]", None, {}, "{}", "null", " [] "):
        others = {"tools": nothing, "chat_template_kwargs": nothing}
        assert shown({"messages": [U, A], **others}) == chatml("user Q", "assistant A")


@pytest.mark.parametrize("key", ["images", "functions", "train", "sample_weight"])
def test_w3_what_nothing_can_honour_is_refused(key: str) -> None:
    assert f"{key} cannot be honoured" in refused({"messages": [U, A], key: [1]})


# W4, M11: what a message holds and our templates do not write

WRITTEN = {
    "reasoning_content": "R",
    "reasoning": "R",
    "thinking": "R",
    "refusal": "No.",
    "function_call": {"name": "f", "arguments": "{}"},
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
    "audio": {"id": "x"},
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("key", WRITTEN)
@pytest.mark.parametrize("content", ["A", "", None])
def test_w4_what_a_template_cannot_write_is_refused_with_message_key_and_remedy(
    template: str, key: str, content: str | None
) -> None:
    said = refused({"messages": [U, A | {"content": content, key: WRITTEN[key]}]}, template)
    assert f"message 1: it has {key}, which only template='hf' writes; write" in said


@pytest.mark.parametrize("nothing", [None, "", [], {}, "[]"])
def test_w4_a_key_that_says_nothing_is_absent(nothing: Any) -> None:
    message = A | dict.fromkeys(WRITTEN, nothing) | {"annotations": nothing, "name": nothing}
    assert shown({"messages": [U, message]}) == chatml("user Q", "assistant A")


def test_w4_harmless_keys_pass() -> None:
    notes = {"id": "1", "tool_call_id": "c", "index": 0, "timestamp": 1.5, "name": "n"}
    assert shown({"messages": [U | notes, A | notes], "id": 3, "source": "s"}) == chatml("user Q", "assistant A")


# Prompt and completion, Alpaca, preferences


def test_prompt_and_completion_are_question_and_answer() -> None:
    expected = chatml("user Q", "assistant A")
    assert shown({"prompt": "Q", "completion": "A"}) == expected
    assert shown({"prompt": [U], "completion": [A]}) == expected
    longer = {"prompt": [U, BAD, U], "completion": [A]}
    assert shown(longer) == chatml("user Q", "!assistant BAD", "user Q", "assistant A")
    two = {"prompt": [U], "completion": [A, U, A]}
    assert shown(two) == chatml("user Q", "assistant A", "user Q", "assistant A")


def test_an_alpaca_record_is_question_and_answer() -> None:
    assert shown({"instruction": "Q", "input": "", "output": "A"}) == chatml("user Q", "assistant A")
    assert shown({"instruction": "Q", "input": "1", "output": "A"}) == chatml("user Q\n1", "assistant A")
    asked = {"instruction": "Q", "output": "A", "history": [["H", "B"]]}
    assert shown(asked) == chatml("user H", "assistant B", "user Q", "assistant A")


def test_a_preference_is_refused_with_a_hint_and_a_prompt_next_to_messages_is_named() -> None:
    assert "a preference; to train on chosen" in refused({"prompt": "Q", "chosen": "A", "rejected": "B"})
    assert "a prompt needs a completion" in refused({"prompt": "Q"})
    assert check({"prompt": "Q", "messages": [U, A], "prompt_id": "x"}).ignored_keys == ("prompt",)


# Only the last answer, and a conversation that begins with the assistant


def test_only_the_last_answer_is_in_the_loss() -> None:
    record = {"messages": [U, BAD, U, A]}
    assert shown(record, loss="last") == chatml("user Q", "!assistant BAD", "user Q", "assistant A")
    record = {"messages": [U, BAD, U, A, U]}
    assert shown(record, loss="last") == chatml("user Q", "!assistant BAD", "user Q", "assistant A", "user Q")
    assert shown({"prompt": [U, BAD, U], "completion": [A]}, loss="last").count("[[") == 1
    assert shown({"input_ids": IDS, "labels": [-100, 66, -100, 68]}, loss="last") == "A[[B]]C[[D]]"
    assert "[[" not in shown({"messages": [U, A, U, BAD | {"weight": 0}]}, loss="last", packing="best_fit_pad")


@pytest.mark.parametrize(
    ("messages", "drop", "empty_user"),
    [
        pytest.param([A, U, A], ["user Q", "assistant A"], ["user ", "assistant A", "user Q", "assistant A"], id="gpt"),
        pytest.param(
            [{"role": "system", "content": "S"}, A, U, A],
            ["system S", "user Q", "assistant A"],
            ["system S", "user ", "assistant A", "user Q", "assistant A"],
            id="after-system",
        ),
        pytest.param([U, A], ["user Q", "assistant A"], ["user Q", "assistant A"], id="as-usual"),
    ],
)
def test_a_conversation_that_begins_with_the_assistant_is_a_choice(
    messages: list[Any], drop: list[str], empty_user: list[str]
) -> None:
    record = {"messages": messages}
    assert shown(record, first_assistant="drop") == chatml(*drop)
    assert shown(record, first_assistant="empty_user") == chatml(*empty_user)
    for template in TEMPLATES:
        assert nanopack.verify([record], SMALL, template=template, first_assistant="empty_user", **ROW)
    arguments: dict[str, Any] = dict(template="chatml", first_assistant="raise", **ROW)
    if messages[0] == U:
        assert nanopack.verify([record], SMALL, **arguments)
        return
    with pytest.raises(ConversationError, match="begins with the assistant; first_assistant="):
        next(nanopack.Loader([record], SMALL, **arguments))


def test_explain_names_the_messages_that_are_packed() -> None:
    arguments: dict[str, Any] = dict(template="chatml", first_assistant="empty_user", **ROW)
    with nanopack.Loader([{"messages": [A, U, A]}], SMALL, **arguments) as loader:
        batch = next(loader)
        roles = {loader.explain(batch, 0, col).input.role for col in range(batch.num_tokens)}
    assert roles == {None, "user", "assistant"}


# C7: what explain says of tokens without a mask


def test_c7_explain_does_not_speak_of_a_mask_that_is_not_there() -> None:
    for record, said in (
        ({"input_ids": IDS}, "no mask keeps it out of the loss"),
        ({"input_ids": IDS, "labels": [-100, 66, 67, 68]}, "its mask puts it in the loss"),
        ({"input_ids": IDS, "loss_mask": [0, 0, 0, 1]}, "its mask keeps it out of the loss"),
    ):
        with nanopack.Loader([record], SMALL, **ROW) as loader:
            assert said in str(loader.explain(next(loader), 0, 0))


def test_n4_bools_among_ids_are_refused() -> None:
    assert "input_ids mixes bools" in refused({"input_ids": [5, True, 7]})
