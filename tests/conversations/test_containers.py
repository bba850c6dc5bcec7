"""The same records in every container: the same conversations, the same batches, or the same refusal."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
from containers import CONTAINERS, as_jsonl
from data_sets import SMALL
from outcomes import outcome, reference_outcome

import nanopack
from nanopack.conversations.records import check, open_conversations
from nanopack.reference.files import open_records
from nanopack.verify import compare

TEXTS = ["", "Q", "It is 5.", "two\nlines", "é🙂", "\u2028", "\x85", "[]", "{", '"\\"']


def draw_message(draw: random.Random, parts: bool) -> dict[str, Any]:
    said: Any = draw.choice(TEXTS)
    message = {"role": draw.choice(["user", "assistant", "system", "User", "gpt", "tool"]), "content": said}
    if parts:
        message["content"] = [{"type": "text", "text": draw.choice(TEXTS)} for _ in range(draw.randrange(3))]
    if draw.random() < 0.2:
        message["weight"] = draw.randrange(2)
    if draw.random() < 0.2:
        arguments = draw.choice([{"city": "Bonn"}, {"amount": 3}, {"deep": {"a": 1.5}}, {"deep": {"b": ["x"]}}])
        calls = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
        message["tool_calls"] = draw.choice([calls, calls * 2, []])
    if draw.random() < 0.1:
        message["name"] = "n"
    return message


def draw_records(seed: int, parts: bool | None = None, weighed: bool | None = None) -> list[dict[str, Any]]:
    """Records that Arrow can hold too: a column has one type, and a weight is given to all or to none."""
    draw = random.Random(seed)
    parts = draw.random() < 0.3 if parts is None else parts
    weighed = draw.random() < 0.5 if weighed is None else weighed
    given = draw.random() < 0.3
    key = draw.choice(["messages", "conversations"])
    records = []
    for _ in range(draw.randrange(1, 9)):
        record: dict[str, Any] = {key: [draw_message(draw, parts) for _ in range(draw.randrange(1, 4))]}
        kind = draw.random()
        if kind < 0.1:
            record = {"text": draw.choice(TEXTS)}
        elif kind < 0.2:
            ids = [draw.randrange(250) for _ in range(3)]
            record = {"input_ids": ids, "labels": [ids[0], -100, ids[2]], "attention_mask": [1, 1, draw.randrange(2)]}
        elif kind < 0.3:
            record = {"prompt": draw.choice(TEXTS), "completion": draw.choice(TEXTS)}
        elif kind < 0.4:
            record["system"] = draw.choice(TEXTS)
        elif kind < 0.5:
            record["mood"] = "good"
        elif kind < 0.6:
            record["tools"] = draw.choice([[], [{"name": "f", "parameters": draw.choice([{"a": 1}, {"b": "x"}])}]])
        elif kind < 0.65:
            record["label"] = draw.random() < 0.5
        if given and key in record:
            record["chat_template_kwargs"] = draw.choice([{"a": True}, {"b": "x"}, {"a": False, "b": "y"}])
        if weighed:
            record["weight"] = draw.choice([0.5, 1.0, 2.0])
        records.append(record)
    return records


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_same_records_mean_the_same_in_every_container(tmp_path: Path, container: str) -> None:
    seeds = 12 if container in ("dataset", "saved") else 30
    for seed in range(seeds):
        records = draw_records(seed)
        expected = [outcome(record) for record in records]
        data = CONTAINERS[container](records, tmp_path)
        source = open_conversations(data)
        assert [outcome(source[k]) for k in range(len(source))] == expected, seed
        stored = open_records(data)
        assert [reference_outcome(read()) for _, read in stored] == expected, seed
        assert [source.where(k) for k in range(len(source))] == [where for where, _ in stored]


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_same_records_give_the_same_batches_from_every_container(tmp_path: Path, container: str) -> None:
    records = [record for seed in range(40, 70) for record in draw_records(seed, parts=False, weighed=False)]
    arguments: dict[str, Any] = dict(batch_size=2, seq_len=24, template="chatml", on_error="skip", epochs=1)
    arguments |= dict(num_workers=0, loss_weights="token")
    data = CONTAINERS[container](records, tmp_path)
    with nanopack.Loader(records, SMALL, **arguments) as plain, nanopack.Loader(data, SMALL, **arguments) as other:
        found = compare(plain, other)
        assert found and found.batches > 3, found.difference


@pytest.mark.parametrize("container", ["json", "zst", "arrow", "saved", "parquet", "large"])
def test_a_source_of_any_file_pickles_and_reads_on(tmp_path: Path, container: str) -> None:
    records = [{"text": f"t{k}"} for k in range(7)]
    source = open_conversations(CONTAINERS[container](records, tmp_path))
    assert source[6] == records[6]
    other = pickle.loads(pickle.dumps(source))
    assert [other[k] for k in range(7)] == records


def test_a_null_in_an_arrow_struct_is_absent_and_a_null_in_json_stays(tmp_path: Path) -> None:
    calls = [[{"function": {"name": "f", "arguments": {key: value}}}] for key, value in (("city", "Bonn"), ("n", 3))]
    records = [{"messages": [{"role": "assistant", "content": "", "tool_calls": call}]} for call in calls]
    for container in ("dataset", "parquet", "arrow", "saved", "struct", "read-frame"):
        source = open_conversations(CONTAINERS[container](records, tmp_path))
        assert [outcome(source[k]) for k in range(2)] == [outcome(record) for record in records], container
    call = {"function": {"name": "f", "arguments": {"city": None}}}
    record = {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}
    source = open_conversations(as_jsonl([record], tmp_path))
    assert outcome(source[0])[0][0][2] == {"tool_calls": [call]}


def test_a_null_in_a_json_feature_of_a_dataset_stays(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    calls = [{"function": {"name": "f", "arguments": {"city": None}}}]
    plain = [{"role": "assistant", "content": "", "tool_calls": calls}]
    other = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"n": [3]}}}]}]
    records = [{"messages": plain}, {"messages": other}, {"messages": plain}]
    dataset = datasets.Dataset.from_list(records, on_mixed_types="use_json")
    dataset.to_parquet(tmp_path / "r.parquet")
    for data in (dataset, tmp_path / "r.parquet"):
        source, stored = open_conversations(data), open_records(data)
        assert [outcome(source[k]) for k in range(3)] == [outcome(record) for record in records]
        assert [reference_outcome(read()) for _, read in stored] == [outcome(record) for record in records]


@pytest.mark.parametrize("name", ["r.parquet", "r.arrow", "r.json"])
def test_a_table_without_conversations_says_which_columns_there_are(tmp_path: Path, name: str) -> None:
    container = {"r.parquet": "parquet", "r.arrow": "arrow", "r.json": "json"}[name]
    path = CONTAINERS[container]([{"chat": "x", "n": 1}], tmp_path)
    with pytest.raises(ValueError, match=r"chat.*n.*none of messages, conversations"):
        record = open_conversations(path)[0]
        check(record)


def test_lines_that_end_in_what_json_does_not_call_white_space_are_bad_in_both_packers(tmp_path: Path) -> None:
    for more in ("\u00a0", "\u2028", "\x0c", "\x85", "\x1c", "\x0b", "\u3000"):
        path = tmp_path / "r.jsonl"
        path.write_text(json.dumps({"text": "a"}) + more + "\n" + json.dumps({"text": "b"}) + " \t\r\n", "utf-8")
        assert nanopack.verify(path, SMALL, batch_size=1, seq_len=8, on_error="skip", num_workers=0)
        with pytest.raises(nanopack.ConversationError, match=r"r\.jsonl:1, not JSON: Extra data"):
            next(iter(nanopack.Loader(path, SMALL, batch_size=1, seq_len=8, num_workers=0)))
