"""What the commands print, save, draw and count, and what makes them fail."""

from __future__ import annotations

import dataclasses
import json
import re
import sys

import numpy as np
import pytest
import torch
from command_line import COMMANDS, SMALL, refusal, row_of
from data_sets import SHIPPED

from nanopack import Loader
from nanopack.cli import commands, options

pytestmark = pytest.mark.usefixtures("plain_terminal")


# What is printed


def test_pack_without_arguments_reports_the_shipped_conversations_and_draws_a_row(run):
    code, out, err = run("pack")
    with Loader(SHIPPED, "chat32k", epochs=1) as loader:
        batches = list(loader)
    ledger = loader.ledger()
    positions = len(batches) * 32 * 2048
    assert (code, err) == (0, "")
    assert row_of(out, "conversations") == ["conversations", f"{ledger['conversations']['packed']:,}", "packed"]
    assert row_of(out, "tokens")[1] == f"{ledger['tokens']['emitted']:,}"
    assert f"{ledger['tokens']['cut']['seq_len']:,}  cut: documents longer than a row" in out
    assert row_of(out, "batches")[:2] == ["batches", str(len(batches))]
    assert float(row_of(out, "tokens/s")[1].replace(",", "")) > 0
    assert row_of(out, "padding") == ["padding", f"{1 - sum(b.num_tokens for b in batches) / positions:.1%}"]
    full = sum(b.num_tokens for b in batches[:-1]) / (positions - 32 * 2048)
    assert f"{1 - full:.1%}  without the last batch" in out
    assert row_of(out, "in the loss")[3] == f"{ledger['targets']['in_loss'] / sum(b.num_tokens for b in batches):.1%}"
    assert row_of(out, "ledger")[:2] == ["ledger", "balanced"]
    assert re.search(r"\nrow 0  [a-zA-Z.]{71}\n", out)


def test_pack_counts_the_documents_that_repeat_a_history(run, tmp_path):
    said = [{"role": role, "content": "hi"} for role in ("user", "assistant") * 3]
    (tmp_path / "chat.jsonl").write_text(json.dumps(said))
    code, out, _ = run("pack", tmp_path / "chat.jsonl", *SMALL, "--turns", "each")
    assert code == 0
    assert row_of(out, "conversations") == ["conversations", "3", "packed"]
    assert "2  of those read repeat a history, for a later answer" in out


def test_padding_of_one_conversation_a_row_is_what_pad_has(run, chats):
    _, out, _ = run("pack", chats, *SMALL, "--json")
    _, pad, _ = run("pack", chats, "--batch-size", "1", "--seq-len", "64", "--packing", "pad", "--json")
    assert json.loads(out)["padding_one_a_row"] == json.loads(pad)["padding"]


def test_verify_without_arguments_finds_every_batch_equal(run):
    with Loader(SHIPPED, "chat32k", epochs=1) as loader:
        batches = list(loader)
    tokens = sum(batch.num_tokens for batch in batches)
    expected = f"{len(batches)} batches, {tokens:,} input tokens: equal to the reference packer in every field\n"
    assert run("verify") == (0, expected, "")


def test_inspect_without_arguments_reports_lengths_and_draws_a_batch(run):
    code, out, err = run("inspect")
    assert (code, err) == (0, "")
    assert row_of(out, "documents") == ["documents", "2,486"]
    assert re.search(r"^longest +4,919  conversations.jsonl:114$", out, re.M)
    assert re.search(r"^too long +22  documents, for a row of 2,049 tokens$", out, re.M)
    assert re.search(r"^ +1 - 16 +116 ", out, re.M)
    assert len(re.findall(r"^row \d  [a-zA-Z.]{71}$", out, re.M)) == 8
    assert re.search(r"^a  conversations.jsonl:8 +0 +1,954 +1,836  Summarize what you know", out, re.M)


def test_inspect_measures_what_was_read_and_counts_what_is_too_long(run, chats):
    with Loader(chats, "chat32k", 4, 64, packing="stream", epochs=1) as loader:
        list(loader)
    tokens = loader.ledger()["tokens"]["read"]
    _, out, _ = run("inspect", chats, *SMALL, "--json")
    documents, histogram = (json.loads(out)[name] for name in ("documents", "histogram"))
    assert documents["count"] == 40 and documents["tokens"] == tokens
    assert documents["mean"] == tokens / 40
    assert sum(found["documents"] for found in histogram) == 40
    assert sum(found["tokens"] for found in histogram) == tokens
    assert histogram[-1]["least"] == 66 and histogram[-1]["documents"] == documents["longer_than_row"] > 0
    assert json.loads(out)["packing"]["ledger"]["tokens"]["cut"] == {"seq_len": documents["tokens_beyond_row"]}


def test_inspect_of_a_rank_measures_its_shard(run, chats):
    for rank, count in enumerate([14, 13, 13]):
        _, out, _ = run("inspect", chats, *SMALL, "--rank", rank, "--world-size", 3, "--json")
        report = json.loads(out)
        assert report["documents"]["count"] == count
        assert report["documents"]["tokens"] == report["packing"]["ledger"]["tokens"]["read"]


def test_inspect_measures_the_conversations_that_it_packs_also_where_each_row_is_a_shard(run, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": "word " * (k % 13)}) + "\n" for k in range(40)), encoding="utf-8")
    options = ("--batch-size", 2, "--seq-len", 64, "--shard", "row", "--rank", 1, "--world-size", 2, "--json")
    _, out, _ = run("inspect", path, *options)
    found = json.loads(out)
    assert found["documents"]["count"] == found["packing"]["ledger"]["conversations"]["read"] == 20
    assert found["documents"]["tokens"] == found["packing"]["ledger"]["tokens"]["read"]


def test_inspect_measures_a_document_once_however_many_epochs(run, chats):
    _, out, _ = run("inspect", chats, *SMALL, "--epochs", 3, "--json")
    assert json.loads(out)["documents"]["count"] == 40


def test_inspect_draws_the_batch_and_lists_the_row_that_were_asked_for(run, chats):
    _, out, _ = run("inspect", chats, *SMALL, "--batch", 2, "--rows", 2, "--row", 3)
    with Loader(chats, "chat32k", 4, 64, epochs=1) as loader:
        batch = list(loader)[2]
    drawing, listing = out.split("\nBatch 2, ")[1].split("\nRow 3:\n")
    assert re.findall(r"^row (\d) ", drawing, re.M) == ["0", "1", "3"]
    for piece in batch.pieces[3]:
        assert f"chats.jsonl:{piece.conversation + 1} " in listing
    assert len(re.findall(r"chats\.jsonl:", listing)) == len(batch.pieces[3])


def test_inspect_lists_the_first_pieces_of_a_row_or_all_of_the_row_asked_for(run, tmp_path):
    path = tmp_path / "short.jsonl"
    path.write_text('{"text": "hi"}\n' * (options.LISTED_PIECES + 5))
    for packing in ("stream", "best_fit"):
        _, out, _ = run("inspect", path, *SMALL, "--packing", packing)
        listing = out.split("\nRow 0:\n")[1]
        assert listing.count("short.jsonl:") == options.LISTED_PIECES and "and 5 more\n" in listing
        _, out, _ = run("inspect", path, *SMALL, "--packing", packing, "--row", 0)
        listing = out.split("\nRow 0:\n")[1]
        assert listing.count("short.jsonl:") == options.LISTED_PIECES + 5 and " more" not in listing


def test_explain_says_what_the_loader_says(run, chats):
    with Loader(chats, "chat32k", 4, 64, epochs=1) as loader:
        next(loader)
        found = loader.explain(next(loader), 2, 30)
    code, out, err = run("inspect", chats, *SMALL, "--batch", 1, "--explain", "2,30")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "batch 1, row 2, column 30"
    assert str(found.input) in out and str(found.target) in out
    assert out.splitlines()[-1] == f"{'in the loss' if found.in_loss else 'not in the loss'}: {found.reason}"
    code, out, _ = run("inspect", chats, *SMALL, "--batch", 1, "--explain", "2,30", "--json")
    assert (code, json.loads(out)) == (0, dataclasses.asdict(found))


def test_pack_as_json_balances(run, chats):
    code, out, err = run("pack", chats, *SMALL, "--json")
    report = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    conversations, tokens, positions = (report["ledger"][name] for name in ("conversations", "tokens", "positions"))
    parts = ("packed", "skipped", "waiting")
    dropped = sum(conversations["dropped"].values())
    assert conversations["read"] == 40 == sum(conversations[part] for part in parts) + dropped
    assert tokens["read"] == tokens["emitted"] + sum(tokens["cut"].values()) + tokens["dropped"] + tokens["waiting"]
    assert positions["total"] == report["batches"] * 4 * 64 == positions["tokens"] + positions["padding"]
    assert report["padding"] == positions["padding"] / positions["total"]
    assert report["ledger"]["balanced"] is True


def test_verify_as_json_counts(run, chats):
    code, out, _ = run("verify", chats, *SMALL, "--max-batches", 2, "--json")
    assert (code, out.count("\n")) == (0, 1)
    report = json.loads(out)
    assert report.pop("tokens") > 400
    assert report == {"equal": True, "batches": 2, "difference": None}


def test_max_batches_stops_and_reports_what_still_waits(run, chats):
    _, out, _ = run("pack", chats, *SMALL, "--max-batches", 1)
    assert row_of(out, "batches")[1] == "1"
    assert "read, still waiting for a row" in out
    assert "without the last batch" not in out


def test_a_shard_without_conversations_is_all_padding(run, chats):
    for command in ("pack", "inspect"):
        code, out, err = run(command, chats, "--rank", 50, "--world-size", 100)
        assert (code, err) == (0, "")
        assert row_of(out, "batches")[1] == "1" and row_of(out, "padding")[1] == "100.0%"


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_packed_is_exit_code_1_and_one_line(run, untrained, command):
    code, out, err = run(command, untrained)
    assert (code, err) == (1, "nanopack: nothing was packed; conversations: 1 read, 1 dropped, 0 skipped\n")
    if command == "verify":
        assert out == ""
        assert json.loads(run(command, untrained, "--json")[1])["equal"] is False
    else:
        assert row_of(out, "batches")[1] == "0" and row_of(out, "padding")[1] == "-"


def test_all_lines_skipped_is_exit_code_1(run, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"messages": 5}\n{"messages": 6}\n')
    for command in COMMANDS:
        code, _, err = run(command, tmp_path / "bad.jsonl", "--on-error", "skip")
        assert code == 1
        assert err.splitlines()[-1] == "nanopack: nothing was packed; conversations: 2 read, 0 dropped, 2 skipped"


def test_colours_only_on_a_terminal_that_wants_them(run, chats, monkeypatch):
    assert "\x1b" not in run("inspect", chats, *SMALL)[1]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert "\x1b[38;5;33m" in run("inspect", chats, *SMALL)[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in run("inspect", chats, *SMALL)[1]
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in run("inspect", chats, *SMALL)[1]


def test_nothing_forces_colours_or_progress_into_a_pipe(run, chats, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in "".join(run("inspect", chats, *SMALL)[1:])


@pytest.mark.parametrize("columns", [1, 9, 24, 39])
def test_rows_fit_a_terminal_however_narrow(run, chats, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, err = run("inspect", chats, *SMALL)
    rows = re.findall(r"^(?:col  |row \d).*$", out, re.M)
    assert (code, err, len(rows)) == (0, "", 5)
    # a row needs its name and one character
    assert max(map(len, rows)) <= max(columns, len("row 0  a"))


def test_words_of_a_conversation_cannot_command_the_terminal(run, tmp_path):
    path = tmp_path / "evil.jsonl"
    path.write_text(json.dumps({"text": "red \x1b[31m bell \x07 title \x1b]0;x\x07"}))
    _, out, _ = run("inspect", path, *SMALL)
    assert "red ?[31m bell ? title" in out
    for column in range(12):
        out += run("inspect", path, *SMALL, "--explain", f"0,{column}")[1]
    assert "\\x1b" in out and "\x1b" not in out and "\x07" not in out


# What is saved


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_saved_batches_are_the_loaders(run, chats, tmp_path, suffix):
    out = tmp_path / f"batches.{suffix}"
    wanted = ("--loss-weights", "conversation", "--extras", "positions,doc_ids,cu_seqlens")
    code, report, _ = run("pack", chats, *SMALL, *wanted, "--save", out, "--json")
    extras = ("positions", "doc_ids", "cu_seqlens")
    with Loader(chats, "chat32k", 4, 64, loss_weights="conversation", extras=extras, epochs=1) as loader:
        batches = list(loader)
    if suffix == "npz":
        saved = {name: torch.from_numpy(array) for name, array in np.load(out).items()}
    else:
        saved = pytest.importorskip("safetensors.torch").load_file(out)
    assert code == 0 and sorted(saved) == sorted(["inputs", "targets", "weights", *extras])
    for name, array in saved.items():
        stacked = torch.stack([getattr(batch, name) for batch in batches])
        assert array.dtype == stacked.dtype and torch.equal(array, stacked)
        assert json.loads(report)["saved"][name] == list(stacked.shape)


def test_tensors_that_were_not_asked_for_are_not_saved(run, chats, tmp_path):
    assert run("pack", chats, *SMALL, "--save", tmp_path / "a.npz")[0] == 0
    assert sorted(np.load(tmp_path / "a.npz")) == ["inputs", "targets"]


@pytest.mark.parametrize(
    ("module", "arguments", "remedy"),
    [
        (
            *("safetensors.torch", ("pack", "--save", "a.safetensors")),
            "safetensors; pip install nanopack-gpu[safetensors]",
        ),
        ("matplotlib.figure", ("inspect", "--lengths-png", "a.png"), "matplotlib; pip install nanopack-gpu[plot]"),
    ],
)
def test_a_package_that_is_missing_is_named_before_anything_is_packed(run, module, arguments, remedy, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(commands, "Loader", None)
    assert f"{arguments[-1]} needs {remedy}" in refusal(run(*arguments))


# What is drawn


def test_inspect_writes_a_plot_of_the_lengths_and_a_page_of_the_batch(run, chats, tmp_path):
    lengths, page = tmp_path / "lengths.png", tmp_path / "batch.html"
    code, out, err = run("inspect", chats, *SMALL, "--batch", 2, "--lengths-png", lengths, "--html", page)
    assert (code, err) == (0, "") and out.endswith(f"\nWritten: {lengths}, {page}\n")
    assert lengths.read_bytes().startswith(b"\x89PNG") and "batch 2" in page.read_text()
    code, out, _ = run("inspect", chats, *SMALL, "--lengths-png", lengths, "--json")
    assert json.loads(out)["written"] == [str(lengths)]


def test_no_page_of_a_batch_that_does_not_exist(run, untrained, tmp_path):
    assert "--batch=0 does not exist" in refusal(run("inspect", untrained, "--html", tmp_path / "a.html"))
    assert not (tmp_path / "a.html").exists()
