"""Every key of a record, message and part does what the table says, or the record is refused, or the key is named."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
from containers import CONTAINERS
from data_sets import SMALL as ENCODING
from key_oracle import REFUSED, draw_record, meaning
from outcomes import outcome, reference_outcome

from nanopack.cli.options import FILES_HELP
from nanopack.config import FIRST_ASSISTANTS, LOSSES
from nanopack.conversations.files import SUFFIXES
from nanopack.conversations.keys import (
    HARMLESS,
    IN_LOSS,
    MASK,
    MESSAGE,
    NOT_IN_LOSS,
    PACKED,
    PART,
    PASSED,
    READ,
    RECORD,
    SYSTEM,
    TEMPLATE,
    WANTED,
)
from nanopack.conversations.keys import REFUSED as NO
from nanopack.conversations.messages import ROLES
from nanopack.conversations.records import check, open_conversations
from nanopack.errors import ConversationError
from nanopack.reference.files import open_records
from nanopack.render.renderer import Renderer
from nanopack.tokenizers.tokenizer import load_tokenizer

SMALL = load_tokenizer(ENCODING)

U = {"role": "user", "content": "Q"}
A = {"role": "assistant", "content": "A"}


# What can hold records of any shape; columns of one type, as Arrow has them, are for test_containers.py.
ANY_SHAPE = ["list", "tuple", "array", "series", "jsonl", "gz", "zst", "json", "pretty", "folder"]


def compare_with_oracle(seed: int, count: int, container: str, folder: Path) -> int:
    """Compare records in a container with what the oracle says of them; return how many are refused."""
    draw = random.Random(seed)
    records = [draw_record(draw) for _ in range(count)]
    expected = [meaning(record) for record in records]
    data = CONTAINERS[container](records, folder)
    source, stored = open_conversations(data), open_records(data)
    assert len(source) == len(stored) == count
    for place, record in enumerate(records):
        assert outcome(source[place]) == expected[place], record
        assert reference_outcome(stored[place][1]()) == expected[place], record
    return expected.count(REFUSED)


@pytest.mark.parametrize("container", ANY_SHAPE)
def test_a_random_record_means_what_the_table_says_or_is_refused(tmp_path: Path, container: str) -> None:
    refused = compare_with_oracle(ANY_SHAPE.index(container), 300, container, tmp_path)
    assert 50 < refused < 250


@pytest.mark.slow
def test_20000_random_records_mean_what_the_table_says_or_are_refused(tmp_path: Path, capsys: Any) -> None:
    refused = sum(compare_with_oracle(2026 + k, 2000, ANY_SHAPE[k], tmp_path) for k in range(10))
    with capsys.disabled():
        print(f"\n20,000 random records: {refused:,} refused, the others mean what the oracle says")


# Every key of the table, in a record, a message and a part, from Python, JSON, Arrow and Parquet.

PLACES = ["list", "jsonl", "dataset", "parquet", "read-frame"]
RENDER = {name: Renderer(SMALL, name) for name in ("nanochat", "chatml")}


def in_container(record: dict[str, Any], container: str, folder: Path) -> Any:
    [index] = range(len(source := open_conversations(CONTAINERS[container]([record], folder))))
    return source[index]


def refusal(record: object) -> str:
    """What is said against the record by check or by a template of ours."""
    try:
        for render in RENDER.values():
            render(check(record))
    except ConversationError as error:
        return str(error)
    return ""


def keys_of(table: Any, *kinds: str) -> list[str]:
    return [key for key, kind in table.items() if kind in kinds]


@pytest.mark.parametrize("container", PLACES)
def test_a_key_of_a_record_that_cannot_be_honoured_is_named(tmp_path: Path, container: str) -> None:
    for key in keys_of(RECORD, NO, TEMPLATE, MASK):
        value = {"tools": [{"name": "f"}], "chat_template_kwargs": {"a": 1}}.get(key, [1, 0])
        assert key in refusal(in_container({"messages": [U, A], key: value}, container, tmp_path)), key
        assert refusal(in_container({"messages": [U, A], key: None}, container, tmp_path)) == "", key


@pytest.mark.parametrize("container", PLACES)
def test_a_key_of_a_message_that_cannot_be_honoured_is_named_with_the_message(tmp_path: Path, container: str) -> None:
    for key in keys_of(MESSAGE, NO, TEMPLATE):
        value = {"tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}.get(key, "R")
        said = refusal(in_container({"messages": [U, A | {key: value}]}, container, tmp_path))
        assert said.startswith("message 1: ") and key in said, key
        assert refusal(in_container({"messages": [U, A | {key: None}]}, container, tmp_path)) == "", key


@pytest.mark.parametrize("container", PLACES)
def test_a_key_of_a_part_that_cannot_be_honoured_is_named(tmp_path: Path, container: str) -> None:
    for key in keys_of(PART, NO):
        parts = [{"type": "text", "text": "x", key: "y"}]
        said = refusal(in_container({"messages": [U | {"content": parts}]}, container, tmp_path))
        assert said.startswith("message 0: part 0 of content: ") and key in said, key


@pytest.mark.parametrize("container", PLACES)
@pytest.mark.parametrize(("key", "kind"), [item for item in MESSAGE.items() if item[1] in (IN_LOSS, NOT_IN_LOSS)])
def test_a_key_that_says_whether_a_message_is_learnt_is_obeyed(
    tmp_path: Path, container: str, key: str, kind: str
) -> None:
    for value in (0, 1, False, True, 0.0):
        record = {"messages": [U, A | {key: value}, U, A]}
        learnt = bool(value) == (kind == IN_LOSS)
        found = check(in_container(record, container, tmp_path))
        assert [message.train for message in found.messages] == [True, learnt, True, True]
        for render in RENDER.values():
            document = render(found)
            assert (SMALL.decode(document.ids[document.mask].tolist()).count("A") == 2) == learnt


@pytest.mark.parametrize("container", PLACES)
def test_harmless_keys_change_nothing_and_unknown_ones_are_named(tmp_path: Path, container: str) -> None:
    harmless = dict.fromkeys(keys_of(RECORD, HARMLESS), 1) | {"messages": [U, A]}
    notes = dict.fromkeys(keys_of(MESSAGE, HARMLESS, PASSED), "1")
    found = check(in_container(harmless | {"messages": [U | notes, A | notes]}, container, tmp_path))
    assert found.ignored_keys == ()
    assert [(message.role, message.content) for message in found.messages] == [("user", "Q"), ("assistant", "A")]
    parts = [{"type": "text", "text": "A", "glow": 1, "id": "7"}]
    unknown = {"messages": [U, A | {"mood": "good"}, U, A | {"content": parts}], "colour": "red", "prompt": "Q"}
    if container not in ("dataset", "parquet", "read-frame"):  # Arrow has no lists of strings and dicts
        found = check(in_container(unknown, container, tmp_path))
        assert found.ignored_keys == ("colour", "message.mood", "part.glow", "prompt")
        assert refusal(unknown) == ""


OF_LOSS = (
    "train trained training trainable loss mask masks masked weight weights label labels learn learned learnt "
    "supervised ignore ignored"
)
OF_MEDIA = "image images video videos audio audios pixel"


@pytest.mark.parametrize(
    ("word", "value"), [*((w, False) for w in OF_LOSS.split()), *((w, "x") for w in OF_MEDIA.split())]
)
def test_an_unknown_key_with_a_word_that_matters_is_refused(word: str, value: object) -> None:
    record, message = {"messages": [U, A], f"is_{word}": value}, {"messages": [U, A | {f"is{word.title()}": value}]}
    part = {"messages": [U, A | {"content": [{"type": "text", "text": "A", f"our_{word}": value}]}]}
    for refused in (record, message, part):
        assert outcome(refused) == reference_outcome(refused) == REFUSED, refused


def test_the_tables_name_each_kind_once() -> None:
    assert {*RECORD.values()} == {HARMLESS, READ, MASK, PACKED, SYSTEM, TEMPLATE, NOT_IN_LOSS, WANTED, NO}
    assert {*MESSAGE.values()} == {HARMLESS, READ, IN_LOSS, NOT_IN_LOSS, TEMPLATE, PASSED, NO}
    assert {*PART.values()} == {HARMLESS, READ, NO}


# docs/data.md: one table

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
TABLES = {"record": RECORD, "message": MESSAGE, "part": PART}
# Words that a row of the kind has.
SAYS = {
    HARMLESS: "harmless",
    MASK: "in the loss where|token is removed|several documents",
    PACKED: "several documents",
    SYSTEM: "a first system message",
    TEMPLATE: 'go to the chat template with `template="hf"`',
    IN_LOSS: "nothing of the message is in the loss",
    NOT_IN_LOSS: "the reverse|refused, but for NeMo",
    WANTED: "`false` is refused",
    PASSED: 'go to the chat template with `template="hf"`; harmless',
    NO: "refused",
}


def documented(table: str) -> dict[str, str]:
    """What docs/data.md says of each key."""
    text = DOCS.read_text(encoding="utf-8").split(f"| key of a {table} | does |\n", 1)[1].split("\n\n")[0]
    rows = [line.strip("| ").split(" | ", 1) for line in text.splitlines()[1:]]
    return {key: does for names, does in rows for key in re.findall("`([a-z_]+)`", names)}


@pytest.mark.parametrize("table", TABLES)
def test_the_page_says_of_every_key_what_the_table_says(table: str) -> None:
    kinds, said = TABLES[table], documented(table)
    assert not {*said} - {*kinds}
    # the shapes have a table of their own, and notes are too many
    own = {key for key, kind in kinds.items() if kind not in (HARMLESS, PASSED, READ)}
    assert not own - {*said}
    for key, does in said.items():
        assert re.search(SAYS.get(kinds[key], ""), does), key


def test_the_page_has_every_shape_role_and_suffix() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for key in (*keys_of(RECORD, READ), *keys_of(MESSAGE, READ), *keys_of(PART, READ)):
        assert re.search(f'[`"]{key}[`"]', text), key
    for suffix in SUFFIXES:
        assert f"`{suffix.removesuffix('.gz').removesuffix('.zst')}`" in text
    for role in ("human", "gpt", "chatgpt", "bing", "bard", "model", "bot", "function_call", "observation", "function"):
        assert role in ROLES and role in text
    for key in ("ignored_keys", *LOSSES, *FIRST_ASSISTANTS):
        assert key in text


def test_the_help_of_the_command_line_names_every_kind_of_file() -> None:
    said = set(re.findall(r"\.[a-z]+", FILES_HELP))
    assert said >= {*SUFFIXES} - {s for s in SUFFIXES if s.count(".") > 1}
    assert {".gz", ".zst"} <= said and "docs/data.md" in FILES_HELP
