"""An unknown key that holds what a known one would is refused by both packers, from every container; others pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from containers import CONTAINERS
from key_oracle import REFUSED
from outcomes import outcome, reference_outcome

from nanopack.conversations.records import check, open_conversations
from nanopack.errors import ConversationError
from nanopack.reference.files import open_records

U = {"role": "user", "content": "Q"}
A = {"role": "assistant", "content": "A"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CONTAINERS_READ = ["list", "jsonl", "dataset", "parquet"]


def refusal(record: object) -> str:
    """What is said against the record, which the reference refuses too."""
    assert reference_outcome(record) == REFUSED, record
    with pytest.raises(ConversationError) as error:
        check(record)
    return str(error.value)


def passes(record: object) -> bool:
    """Whether both packers take the record, and alike."""
    return outcome(record) == reference_outcome(record) != REFUSED


@pytest.mark.parametrize(
    "key", ["rationale", "think", "reasoning_trace", "thoughtProcess", "scratchpad", "inner_monologue"]
)
def test_a_thought_under_an_unknown_name_is_refused(key: str) -> None:
    part = [{"type": "text", "text": "A", key: "R"}]
    for record in (
        {"messages": [U, A | {key: "R"}]},
        {"messages": [U, A], key: ["R"]},
        {"messages": [U, A | {"content": part}]},
    ):
        assert "looks like reasoning_content" in refusal(record)


@pytest.mark.parametrize("key", ["tool_invocations", "toolUseBlock", "functions_called", "tool_call_requests"])
def test_a_call_under_an_unknown_name_is_refused(key: str) -> None:
    for value in ([{"name": "f"}], {"name": "f"}, "f(x=1)"):
        assert "looks like tool_calls" in refusal({"messages": [U, A | {key: value}]})


@pytest.mark.parametrize("key", ["function_calls", "tool_use", "tool_output", "cot", "chain_of_thought", "partial"])
def test_a_call_or_thought_that_some_chat_templates_read_is_a_key_of_the_template(key: str) -> None:
    record = {"messages": [U, A | {key: "R"}]}
    assert passes(record)
    assert check(record).messages[1].rest == {key: "R"}


@pytest.mark.parametrize("key", ["available_tools", "tool_definitions", "functionSchemas", "mcp_tools"])
@pytest.mark.parametrize("container", CONTAINERS_READ)
def test_definitions_of_tools_under_an_unknown_name_are_refused(key: str, container: str, tmp_path: Path) -> None:
    for value in (TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])]):
        data = CONTAINERS[container]([{"messages": [U, A], key: value}], tmp_path)
        assert "looks like tools" in refusal(open_conversations(data)[0])


@pytest.mark.parametrize("key", ["sys_prompt", "system_instructions", "developer_message", "sys", "preamble"])
@pytest.mark.parametrize("container", CONTAINERS_READ)
def test_a_system_prompt_under_an_unknown_name_is_refused(key: str, container: str, tmp_path: Path) -> None:
    data = CONTAINERS[container]([{"messages": [U, A], key: "Be curt."}], tmp_path)
    assert "looks like system" in refusal(open_conversations(data)[0])


@pytest.mark.parametrize("key", ["example_weight", "instanceWeight", "weights", "loss_scale", "sampling_weight"])
@pytest.mark.parametrize("value", [0.25, 3])
def test_a_weight_under_an_unknown_name_is_refused(key: str, value: float) -> None:
    assert "may say what is in the loss" in refusal({"messages": [U, A], key: value})


@pytest.mark.parametrize(
    "note",
    [
        {"reasoning_model": "o1"},
        {"requires_reasoning": True},
        {"is_reasoning": "yes"},
        {"thinking_mode": "on"},
        {"num_tools": 3},
        {"tool_names": ["f"]},
        {"tools_used": ["f", "g"]},
        {"tool_choice": "auto"},
        {"system_fingerprint": "fp_1"},
        {"system_prompt_id": "7"},
        {"has_system_prompt": True},
        {"loss": 2.31},
        {"weight_kg": 80.5},
        {"label": 0},
        {"num_images": 2},
    ],
    ids=str,
)
def test_a_note_about_thoughts_tools_or_weights_passes(note: dict[str, Any]) -> None:
    assert passes({"messages": [U, A], **note})


@pytest.mark.parametrize(
    "note", [{"tool": "calculator"}, {"function": "f"}, {"tool_name": "f"}, {"channel": "final"}], ids=str
)
def test_a_note_of_a_message_passes(note: dict[str, Any]) -> None:
    assert passes({"messages": [U, A, {"role": "tool", "content": "5", **note}]})


@pytest.mark.parametrize("channel", ["analysis", "commentary"])
def test_what_harmony_does_not_say_aloud_is_left_to_the_chat_template(channel: str) -> None:
    assert check([U, A | {"channel": channel}]).messages[1].rest == {"channel": channel}
    assert passes([U, A | {"channel": channel}])


@pytest.mark.parametrize(
    "label",
    [
        {"kto_tag": 0},
        {"kto_tag": "False"},
        {"label": "false"},
        {"label": False},
        {"prompt": "P", "completion": "C", "label": 0},
    ],
    ids=str,
)
def test_an_answer_that_is_labelled_as_bad_is_refused_however_the_label_is_written(label: dict[str, Any]) -> None:
    assert "the answer is not one to learn" in refusal(label if "prompt" in label else {"messages": [U, A], **label})


def test_turns_before_the_messages_are_refused_because_they_would_be_lost() -> None:
    assert "history is not read" in refusal({"messages": [U, A], "history": [["a", "b"]]})
    assert passes({"messages": [U, A], "history": []})


# Next to input_ids

IDS = [5, 6, 7, 8]


@pytest.mark.parametrize("container", CONTAINERS_READ)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("targets", [-100, -100, 7, 8]),
        ("label", [-100, -100, 7, 8]),
        ("is_completion", [False, False, True, True]),
        ("role_ids", [0, 0, 1, 1]),
        ("advantages", [0.0, 0.0, 0.5, 0.5]),
        ("prompt_length", 2),
        ("answer_start_idx", 2),
        ("promptIds", [5, 6]),
        ("assistant_spans", [[2, 4]]),
        ("doc_lengths", [1, 3]),
        ("cu_seq_lens_q", [0, 1, 4]),
    ],
)
def test_what_nothing_reads_of_each_token_or_of_an_answer_is_refused(
    container: str, key: str, value: Any, tmp_path: Path
) -> None:
    data = CONTAINERS[container]([{"input_ids": IDS, key: value}], tmp_path)
    assert key in refusal(open_conversations(data)[0])
    [(_, read)] = open_records(data)
    assert reference_outcome(read()) == REFUSED


@pytest.mark.parametrize(
    "note",
    [
        {"token_type_ids": [0, 0, 0, 0]},
        {"special_tokens_mask": [1, 0, 0, 0]},
        {"offset_mapping": [[0, 1], [1, 2], [2, 3], [3, 4]]},
        {"input_length": 4},
        {"prompt_hash": "x"},
        {"scores": [1, 2, 3, 4]},
        {"labels": [-100, -100, 7, 8], "prompt_length": 2},
        {"loss_mask": [0, 0, 1, 1], "completion_ids": [7, 8]},
    ],
    ids=str,
)
def test_what_says_nothing_of_the_loss_passes_next_to_tokens(note: dict[str, Any]) -> None:
    assert passes({"input_ids": IDS, **note})
