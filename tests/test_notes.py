"""What is left out is reported once, by reason, with an example; and counted in the ledger across a resume."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from data_sets import SMALL

import nanopack
from nanopack.notes import KEYS, OTHER, OTHER_KEYS, REASONS, Notes, reason_of

U = {"role": "user", "content": "Q"}
A = {"role": "assistant", "content": "A"}
GOOD = {"messages": [U, A]}
ROLE = {"messages": [U, {"role": "judge", "content": "x"}]}
ORDER = {"messages": [U, U, A]}
ARGUMENTS: dict[str, Any] = dict(batch_size=1, seq_len=64, device="cpu", on_error="skip")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("shard", ["rank", "row"])
def test_what_is_skipped_is_logged_once_a_pass_with_an_example_of_each_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, num_workers: int, shard: str
) -> None:
    path = tmp_path / "r.jsonl"
    records = [GOOD, ROLE, ORDER, GOOD, ROLE, ORDER, ROLE, GOOD]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = {**ARGUMENTS, "num_workers": num_workers, "shard": shard, "batch_size": 2}
    with nanopack.Loader(path, SMALL, epochs=1, **arguments) as loader:
        assert sum(1 for _ in loader) > 0
        ledger = loader.ledger()
    assert ledger["balanced"] and ledger["conversations"]["skipped"] == 5
    # of two rows' shards, the first has lines 1, 3, 5 and 7
    line = 2 if shard == "rank" else 5
    assert sorted((one["count"], one["example"].split(",")[0]) for one in ledger["skipped"].values()) == [
        (2, f"{path}:3"),
        (3, f"{path}:{line}"),
    ]
    [said] = warnings(caplog)
    assert said.startswith(
        f"skipped 5 bad conversations: 3 like {path}:{line}, message 1: role is 'judge'; allowed are"
    )
    assert f"; 2 like {path}:3, message 1: role is 'user' twice in a row" in said


def test_a_line_for_each_is_logged_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "nanopack")
    with nanopack.Loader([GOOD, ROLE, ORDER], SMALL, epochs=1, num_workers=0, **ARGUMENTS) as loader:
        list(loader)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.DEBUG]
    assert [line.split(",")[0] for line in said] == ["skipped conversation 1", "skipped conversation 2"]


def test_a_second_pass_reports_again_and_nothing_skipped_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    # one document a row, so that little is read ahead
    with nanopack.Loader([GOOD, ROLE], SMALL, epochs=2, num_workers=0, packing="pad", **ARGUMENTS) as loader:
        list(loader)
    assert [line.split(":")[0] for line in warnings(caplog)] == [
        "skipped 1 bad conversation",
        "skipped 2 bad conversations",
    ]
    caplog.clear()
    with nanopack.Loader([GOOD] * 3, SMALL, epochs=2, num_workers=0, **ARGUMENTS) as loader:
        list(loader)
    assert warnings(caplog) == []


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_an_unknown_key_is_named_once_and_counted(caplog: pytest.LogCaptureFixture, num_workers: int) -> None:
    records = [GOOD, GOOD | {"mood": "x"}, {"messages": [U | {"tone": 1}, A]}, GOOD | {"mood": "y", "id": 3}]
    with nanopack.Loader(records, SMALL, epochs=1, **ARGUMENTS, num_workers=num_workers) as loader:
        list(loader)
        assert loader.ledger()["ignored_keys"] == {"mood": 2, "message.tone": 1}
    assert [line.split(";")[0] for line in warnings(caplog)] == [
        "conversation 1: nothing reads the key 'mood'",
        "conversation 2: nothing reads the key 'message.tone'",
    ]


def test_an_unread_column_of_parquet_is_named_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pa = pytest.importorskip("pyarrow")
    table = pa.Table.from_pylist([GOOD | {"mood": "x", "source": "s"}] * 3)
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "r.parquet")
    with nanopack.Loader(tmp_path / "r.parquet", SMALL, epochs=1, num_workers=0, **ARGUMENTS) as loader:
        list(loader)
        assert loader.ledger()["ignored_keys"] == {"mood": 3}
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("text", ["<|bos|>x", "x<|im_end|>", "<|im_start|>user\nQ<|im_end|>\n"])
def test_w15_a_text_that_spells_a_special_token_is_named_once_and_counted(
    caplog: pytest.LogCaptureFixture, text: str
) -> None:
    records = [{"text": "x"}, {"text": text}, {"text": text}, {"messages": [U | {"content": text}, A]}]
    with nanopack.Loader(records, SMALL, epochs=1, num_workers=0, **ARGUMENTS) as loader:
        list(loader)
        assert loader.ledger()["texts_with_special_tokens"] == 2
    [said] = warnings(caplog)
    assert said.startswith("conversation 1: the text spells the special token '<|")
    assert "give messages or input_ids" in said


def test_notes_survive_a_resume_and_a_merge() -> None:
    records = [GOOD, ROLE, GOOD | {"mood": "x"}, ORDER, GOOD, ROLE] * 4
    arguments = {**ARGUMENTS, "num_workers": 0, "epochs": 1, "shard": "row"}
    with nanopack.Loader(records, SMALL, **arguments) as loader:
        list(loader)
        expected = loader.ledger()
    with nanopack.Loader(records, SMALL, **arguments) as loader:
        next(loader)
        state = json.loads(json.dumps(loader.state_dict()))
    with nanopack.Loader(records, SMALL, **arguments) as loader:
        loader.load_state_dict(state)
        list(loader)
        assert loader.ledger() == expected
    assert {type(value) for value in state["lanes"]["0"].values()} <= {list, int, dict, str}


def test_reasons_are_what_errors_have_in_common_and_bounded_in_number() -> None:
    assert reason_of("message 2: role is 'a'; x") == reason_of("message 17: role is 'it\\'s'; x")
    assert reason_of("near '[{\"a\"' at 5") == reason_of('near "x" at 1,000.5')
    assert "template='hf'" in reason_of("only template='hf' writes it")
    notes = Notes()
    for number in range(200):
        notes.skip(f"here, reason {chr(65 + number % 26)}{chr(65 + number // 26)}", "here")
    assert len(notes.skipped) == REASONS + 1 and notes.skipped[OTHER]["count"] == 200 - REASONS
    assert Notes.of(notes.dump()) == notes
    assert Notes.total([notes, notes]).num_skipped == 400


@pytest.mark.parametrize("num_workers", [0, 2])
def test_keys_without_end_are_named_up_to_a_limit_and_counted_and_the_state_stays_small(
    caplog: pytest.LogCaptureFixture, num_workers: int
) -> None:
    records = [{**GOOD, "mood": 1, f"note {k}": k, f"remark {k}": k} for k in range(400)]
    arguments = {**ARGUMENTS, "batch_size": 8, "num_workers": num_workers}
    with nanopack.Loader(records, SMALL, epochs=1, **arguments) as loader:
        list(loader)
        ignored, state = loader.ledger()["ignored_keys"], json.dumps(loader.state_dict())
    assert len(ignored) == KEYS + 1 and ignored["mood"] == 400
    # each record counts once
    assert ignored[OTHER_KEYS] == 400 - (KEYS - 2) // 2 and len(state) < 5000
    assert len(warnings(caplog)) == KEYS + 1 and "50 keys are named by now" in warnings(caplog)[-1]
