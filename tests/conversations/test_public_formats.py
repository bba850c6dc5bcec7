"""Records as public data sets, logs and trainers have them: what they say is in the loss, or they are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from containers import as_dataset, as_jsonl, as_parquet
from shown import BAD, SMALL, A, U, chatml, refused, shown

import nanopack
from nanopack import ConversationError
from nanopack.conversations.records import check, open_conversations

S = {"role": "system", "content": "S"}
H, G = {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"a": {"type": "string"}}}}
QA = chatml("user Q", "assistant A")
SQA = chatml("system S", "user Q", "assistant A")
MASKED = chatml("user Q", "!assistant BAD", "user Q", "assistant A")
NOTHING = dict.fromkeys(("tool_calls", "reasoning_content", "refusal", "annotations", "audio", "function_call"))

# By name: the record, what of it is packed, and which keys are named as unknown.
READ: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "tulu-3": ({"id": "x", "messages": [U, A], "source": "s"}, QA, ()),
    "ultrachat-200k": ({"prompt": "Q", "prompt_id": "x", "messages": [U, A]}, QA, ("prompt",)),
    "ultrafeedback": (
        {"prompt": "Q", "chosen": [U, A], "rejected": [U, BAD], "messages": [U, A], "score_chosen": 7.5},
        QA,
        ("chosen", "prompt", "rejected", "score_chosen"),
    ),
    "openthoughts": (
        {"system": "S", "conversations": [{"from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}]},
        SQA,
        (),
    ),
    "sharegpt-system": ({"id": "x", "conversations": [{"from": "system", "value": "S"}, H, G]}, SQA, ()),
    "llama-factory-tools": (
        {
            "conversations": [H, {"from": "function_call", "value": "C"}, {"from": "observation", "value": "R"}, G],
            "system": "S",
            "tools": "[]",
        },
        chatml("system S", "user Q", "assistant C", "tool R", "assistant A"),
        (),
    ),
    "alpaca": ({"instruction": "Q", "input": "", "output": "A"}, QA, ()),
    "alpaca-history": (
        {"instruction": "Q", "input": "", "output": "A", "system": "S", "history": [["H", "B"]]},
        chatml("system S", "user H", "assistant B", "user Q", "assistant A"),
        (),
    ),
    "openai-fine-tune": (
        {"messages": [U, BAD | {"weight": 0}, U, A | {"weight": 1}], "tools": [], "parallel_tool_calls": False},
        MASKED,
        (),
    ),
    "verl": ({"messages": [U, BAD | {"trainable": False}, U, A]}, MASKED, ()),
    "ms-swift": ({"messages": [U | {"loss": None}, BAD | {"loss": False}, U, A | {"loss": None}]}, MASKED, ()),
    "axolotl": (
        {"conversations": [H, {"from": "gpt", "value": "BAD", "train": False, "train_detail": None}, H, G]},
        MASKED,
        (),
    ),
    "train-on-turn": ({"messages": [U, BAD | {"train_on_turn": False}, U, A | {"train_on_turn": True}]}, MASKED, ()),
    "nemo": (
        {
            "mask": "User",
            "system": "S",
            "conversations": [
                {"from": "User", "value": "Q"},
                {"from": "Assistant", "value": "A", "label": "quality:4"},
            ],
            "type": "VALUE_TO_TEXT",
        },
        SQA,
        ("message.label", "type"),
    ),
    "kto": ({"prompt": [U], "completion": [A], "label": True}, QA, ()),
    "vllm-log": ({"messages": [U, A | NOTHING | {"tool_calls": []}], "usage": {"total_tokens": 3}}, QA, ()),
    "anthropic": (
        {
            "system": [{"type": "text", "text": "S", "cache_control": {"type": "ephemeral"}}],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Q"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "A", "citations": None}], "id": "m"},
            ],
            "stop_reason": "end_turn",
        },
        SQA,
        (),
    ),
    "system-message": ({"system_message": "S", "messages": [U, A]}, SQA, ()),
    "trl-conversational": ({"prompt": [S, U], "completion": [A]}, SQA, ()),
    "classified": ({"messages": [U, A], "label": 3, "train_source": "web"}, QA, ("train_source",)),
}


@pytest.mark.parametrize("name", READ)
def test_what_a_public_format_says_is_in_the_loss(tmp_path: Path, name: str) -> None:
    record, expected, ignored = READ[name]
    assert shown(record) == expected
    assert check(record).ignored_keys == ignored
    for container in (as_jsonl, as_dataset, as_parquet):
        source = open_conversations(container([record], tmp_path))
        found = check(source[0])
        assert found.messages == check(record).messages
        assert set(found.ignored_keys) >= {key for key in ignored if "." not in key}


def assistant(**more: Any) -> dict[str, Any]:
    return {"messages": [U, A | more]}


def blocks(*parts: dict[str, Any]) -> dict[str, Any]:
    return assistant(content=list(parts))


CHOICE = "a preference; to train on chosen"
REFUSED: dict[str, tuple[Any, str]] = {
    "hh-rlhf": ({"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q"}, CHOICE),
    "dpo": ({"prompt": [U], "chosen": [A], "rejected": [BAD]}, CHOICE),
    "dpo-without-prompt": ({"chosen": [U, A], "rejected": [U, BAD]}, CHOICE),
    "kto-undesired": ({"prompt": [U], "completion": [A], "label": False}, "label is False: the answer is not one"),
    "kto-of-llama-factory": ({"messages": [U, A], "kto_tag": False}, "kto_tag is False"),
    "dolly": ({"instruction": "Q", "context": "C", "response": "A"}, "rename response and context"),
    "dolly-half-renamed": ({"instruction": "Q", "context": "C", "output": "A"}, "context is not read"),
    "chatglm": ({"prompt": "Q", "completion": "A", "history": [["H", "B"]]}, "history is not read"),
    "squad": ({"prompt": "Q", "completion": "A", "context": "C"}, "context is not read .* write it into the prompt"),
    "alpaca-with-text": ({"instruction": "Q", "output": "A", "text": "Q A"}, "text and instruction; remove all"),
    "flan": ({"inputs": "Q", "targets": "A"}, "rename one"),
    "ultrachat": ({"id": "0", "data": ["Q", "A"]}, "none of messages"),
    "oasst": ({"text": "Q", "role": "prompter", "message_id": "m"}, "one message, of role 'prompter'"),
    "xlam": ({"query": "Q", "answers": "[]", "tools": "[]"}, "none of messages"),
    "apigen": ({"conversations": [H, G], "tools": json.dumps([TOOL])}, "the record has tools"),
    "nemotron": ({"input": [U], "output": "A", "reasoning": "on"}, "none of messages"),
    "nemotron-renamed": ({"prompt": [U], "completion": "A", "reasoning": "on"}, "reasoning cannot be honoured"),
    "reasoning-of-a-record": (
        {"messages": [U, A], "chain_of_thought": "R"},
        "chain_of_thought cannot be .* the answer",
    ),
    "llava": ({"id": "0", "image": "a.jpg", "conversations": [H, G]}, "image cannot be honoured"),
    "image-path": ({"messages": [U, A], "image_path": "a.jpg"}, "image_path is not known"),
    "messages-as-text": ({"messages": json.dumps([U, A])}, "the messages must be a list, not"),
    "gemini": ({"contents": [{"role": "user", "parts": [{"text": "Q"}]}]}, "none of messages"),
    "gemini-messages": ({"messages": [{"role": "user", "parts": [{"text": "Q"}]}, A]}, "message 0: parts cannot be"),
    "ai-sdk": (assistant(content="", parts=[{"type": "text", "text": "A"}]), "message 1: parts .* as content"),
    "loss-mask-of-turns": ({"conversations": [H, G], "loss_mask": [0, 1]}, "loss_mask is about input_ids"),
    "loss-weight": (assistant(loss_weight=0.5), "message 1: loss_weight cannot be honoured"),
    "mask-of-a-message": (assistant(mask=True), "message 1: mask cannot be honoured"),
    "train-detail": (assistant(train_detail=[{"begin_offset": 0, "end_offset": 3}]), "train_detail cannot be"),
    "weight-of-a-half": (assistant(weight=0.5), "message 1: weight must be 0 or 1"),
    "part-not-trained": (blocks({"type": "text", "text": "A", "train": False}), "train cannot be honoured"),
    "tool-use": (blocks({"type": "tool_use", "name": "f", "input": {}}), "type is 'tool_use'"),
    "tool-result": ({"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "R"}]}]}, "tool_res"),
    "thinking-block": (blocks({"type": "thinking", "thinking": "R"}, {"type": "text", "text": "A"}), "'thinking'"),
    "image-part": (blocks({"type": "image_url", "image_url": {"url": "u"}}), "type is 'image_url'"),
    "audio-part": (blocks({"type": "input_audio", "input_audio": {"data": ""}}), "type is 'input_audio'"),
    "role-tool-call": ({"messages": [U, {"role": "tool_call", "content": "{}"}]}, "message 1: role is 'tool_call'"),
    "call-of-one": (assistant(content="", arguments={"a": 1}, name="f"), "message 1: it has arguments"),
    "camel-case": (assistant(toolCalls=[{"function": {"name": "f"}}]), "toolCalls is not known, .* tool_calls"),
    "capitals": (assistant(Weight=0), "message 1: Weight is not known, and looks like weight"),
    "system-in-camel-case": ({"systemPrompt": "S", "messages": [U, A]}, "looks like system_prompt"),
    "unknown-flag": (assistant(should_train=False), "message 1: should_train is not known, and may say"),
    "unknown-mask": ({"input_ids": [5, 6], "supervised_mask": [0, 1]}, "supervised_mask is not known, and may say"),
    "other-labels": ({"input_ids": [5, 6], "label_ids": [-100, 6]}, "label_ids cannot be honoured.*labels"),
    "packed-by-megatron": ({"input_ids": [5, 6], "seq_start_id": [0, 1]}, "seq_start_id shows several documents"),
    "packed-by-segments": ({"input_ids": [5, 6], "segment_ids": [0, 1]}, "segment_ids shows several documents"),
    "packed-by-cu-seqlens": ({"input_ids": [5, 6], "cu_seqlens": [0, 1, 2]}, "cu_seqlens shows several documents"),
    "effort": ({"messages": [U, A], "reasoning_effort": "high"}, "reasoning_effort .* into chat_template_kwargs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_of_a_public_format_is_refused(tmp_path: Path, name: str) -> None:
    record, message = REFUSED[name]
    with pytest.raises(ConversationError, match=message):
        nanopack.render.Renderer(SMALL, "chatml")(check(record))
    refused(record)
    for container in (as_jsonl, as_dataset, as_parquet):
        # a table without any column of ours is refused when it is opened
        with pytest.raises(ValueError):
            source = open_conversations(container([record], tmp_path))
            nanopack.render.Renderer(SMALL, "chatml")(check(source[0]))


def test_one_document_under_the_keys_of_packed_ones_is_read() -> None:
    for key, value in (("segment_ids", [3, 3]), ("cu_seqlens", [0, 2]), ("seq_start_id", [0]), ("doc_ids", [0, 0])):
        assert shown({"input_ids": [65, 66], key: value}) == "A[[B]]"
    packed = {"input_ids": [65, 66, 0], "attention_mask": [1, 1, 0], "segment_ids": [1, 1, 0]}
    assert shown(packed) == "A[[B]]"
    assert check({"messages": [U, A], "doc_ids": ["a", "b"]}).ignored_keys == ("doc_ids",)


def test_keys_that_are_no_strings_are_named() -> None:
    assert check({"messages": [U, A | {3: "x"}], 7: "y", "z": 1}).ignored_keys == ("7", "message.3", "z")


# The record's own weight


def test_a_weight_of_0_is_obeyed_without_loss_weights_and_others_are_counted() -> None:
    for record in ({"messages": [U, A]}, {"text": "AB"}, {"input_ids": [65, 66]}):
        assert "[[" in shown({**record, "weight": 1})
        assert "[[" not in shown({**record, "weight": 0}, packing="best_fit_pad")
    records = [{"text": "a", "weight": 0.5}, {"text": "b", "weight": 1}, {"text": "c", "weight": 0}, {"text": "d"}]
    for weights, counted in ((None, {"weight (loss_weights is None)": 1}), ("token", {})):
        arguments: dict[str, Any] = dict(batch_size=1, seq_len=8, epochs=1, loss_weights=weights, num_workers=0)
        with nanopack.Loader(records, SMALL, **arguments) as loader:
            list(loader)
            assert loader.ledger()["ignored_keys"] == counted
            assert loader.ledger()["conversations"]["dropped"] == {"untrained": 1}


# pandas' and torch's ways to hand out the same records


def test_what_pandas_writes_for_nothing_is_nothing() -> None:
    pandas = pytest.importorskip("pandas")
    rows = [{"messages": [U, A], "system": "S", "tools": None}, {"messages": [U, A], "system": None, "tools": []}]
    frame = pandas.DataFrame(rows).convert_dtypes()
    records = frame.to_dict("records")
    assert [shown(record) for record in records] == [SQA, QA]
    assert check({"messages": [U, A], "system": pandas.NaT, "text": pandas.NA, "labels": pandas.NA}).text is None


def calls(**arguments: Any) -> dict[str, Any]:
    # older versions of datasets sort the keys
    return assistant(content="", tool_calls=[{"function": {"arguments": arguments, "name": "f"}, "type": "function"}])


@pytest.mark.parametrize("form", ["python", "numpy", "torch", "Subset", "random_split", "ConcatDataset", "Column"])
def test_a_null_of_arrow_is_absent_in_every_form_of_a_dataset(form: str) -> None:
    from outcomes import outcome, reference_outcome
    from torch.utils import data

    from nanopack.reference.files import open_records

    records = [calls(city="Bonn"), calls(deep={"x": [1.5]}, n=3), calls(deep={"y": True})]
    dataset: Any = as_dataset(records, Path())
    if form in ("python", "numpy", "torch"):
        dataset = dataset.with_format(form)
    elif form == "Column":
        dataset = dataset["messages"]
    elif form == "ConcatDataset":
        dataset = data.ConcatDataset([dataset.select([0]), dataset.select([1, 2])])
    else:
        dataset = data.Subset(dataset, [0, 1, 2]) if form == "Subset" else data.random_split(dataset, [3, 0])[0]
    source, stored = open_conversations(dataset), open_records(dataset)
    expected = sorted(str(outcome(record)) for record in records)
    assert sorted(str(outcome(source[k])) for k in range(3)) == expected
    assert sorted(str(reference_outcome(read())) for _, read in stored) == expected


def test_a_table_in_memory_says_what_to_give_instead() -> None:
    pyarrow = pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match=r"give datasets\.Dataset\(table\), or the file"):
        open_conversations(pyarrow.Table.from_pylist([{"text": "a"}]))


@pytest.mark.parametrize("form", ["numpy", "torch"])
def test_flags_and_weights_of_a_formatted_dataset_are_those_of_a_list(form: str) -> None:
    pytest.importorskip("datasets")
    records = [
        {"messages": [U | {"weight": 0}, A | {"weight": 0}, U | {"weight": 1}, A | {"weight": 1}], "weight": 0.5},
        {"messages": [U | {"weight": 1}, A | {"weight": 1}], "weight": 2.0},
    ]
    source = open_conversations(as_dataset(records, Path()).with_format(form))
    for place, record in enumerate(records):
        found, expected = check(source[place]), check(record)
        assert (found.messages, found.weight) == (expected.messages, expected.weight)
    wanted = [{"prompt": "Q", "completion": "A", "label": label} for label in (True, False)]
    source = open_conversations(as_dataset(wanted, Path()).with_format(form))
    assert check(source[0]).messages == check(wanted[0]).messages
    refused(source[1])


def test_ids_in_an_object_array_are_those_of_a_list() -> None:
    import numpy as np

    assert shown({"input_ids": np.array([65, 66], object), "labels": np.array([-100, 66], object)}) == "A[[B]]"
    for labels in ([-100, 66.0], [True, True], np.array([-100, 66.0], object)):
        refused({"input_ids": [65, 66], "labels": labels})
