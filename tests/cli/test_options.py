"""Which options there are, how they reach the loader, and which values are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from command_line import COMMANDS, refusal
from data_sets import SHIPPED

import nanopack
from nanopack.cli import commands, options
from nanopack.config import LoaderConfig
from nanopack.packing import BestFit, BestFitCrop, Stream

pytestmark = pytest.mark.usefixtures("plain_terminal")
RANKS = Path(nanopack.__file__).parent / "data" / "chat32k.tiktoken"


# How options reach the loader

GIVEN = {
    "batch_size": (["--batch-size", "3"], 3),
    "seq_len": (["--seq-len", "9"], 9),
    "packing": (["--packing", "best_fit_crop"], BestFitCrop()),
    "loss": (["--loss", "all"], "all"),
    "loss_weights": (["--loss-weights", "token"], "token"),
    "extras": (["--extras", "positions,doc_ids"], ["positions", "doc_ids"]),
    "max_pieces": (["--max-pieces", "5"], 5),
    "template": (["--template", "chatml"], "chatml"),
    "first_assistant": (["--first-assistant", "raise"], "raise"),
    "turns": (["--turns", "each"], "each"),
    "max_document_tokens": (["--max-document-tokens", "6"], 6),
    "boundary_loss": (["--no-boundary-loss"], False),
    "ignore_index": (["--ignore-index", "-1"], -1),
    "rank": (["--rank", "1"], 1),
    "world_size": (["--world-size", "2"], 2),
    "shard": (["--shard", "row"], "row"),
    "document_align": (["--document-align", "8"], 8),
    "balance": (["--balance", "57000,1"], (57000.0, 1.0)),
    "balance_across": (["--balance-across"], True),
    "balance_window": (["--balance-window", "16"], 16),
    "seed": (["--seed", "6"], 6),
    "epochs": (["--epochs", "4"], 4),
    "on_error": (["--on-error", "skip"], "skip"),
    "executor": (["--executor", "torch"], "torch"),
}


def test_every_argument_that_decides_the_batches_is_an_option():
    assert GIVEN.keys() - {"executor"} == {field.name for field in dataclasses.fields(LoaderConfig)}


@pytest.mark.parametrize("command", COMMANDS)
def test_options_reach_the_loader_and_no_other_arguments_do(run, command, monkeypatch, tmp_path):
    seen = []
    (mine := tmp_path / "mine.pkl").touch()

    def loader(conversations, tokenizer, **arguments):
        seen.append((conversations, tokenizer, arguments))
        raise ValueError("seen")

    monkeypatch.setattr(commands, "Loader", loader)
    run(command)
    assert seen.pop() == ([str(SHIPPED)], "chat32k", {"epochs": 1})
    for name, (flags, value) in GIVEN.items():
        run(command, "a.jsonl", "b.jsonl", "--tokenizer", mine, *flags)
        assert seen.pop() == (["a.jsonl", "b.jsonl"], str(mine), {"epochs": 1, name: value})


PACKINGS_GIVEN = [
    (["--window", "7", "--max-age", "8", "--refill", "2"], BestFit(window=7, max_age=8, refill=2)),
    (["--packing", "best_fit_crop", "--window", "7"], BestFitCrop(window=7)),
    (["--packing", "stream", "--overlap"], Stream(overlap=True)),
]


@pytest.mark.parametrize(("flags", "packing"), PACKINGS_GIVEN)
def test_packing_options_reach_the_packing(run, monkeypatch, flags, packing):
    def loader(*_, **arguments):
        assert arguments["packing"] == packing
        raise ValueError("seen")

    monkeypatch.setattr(commands, "Loader", loader)
    assert "seen" in refusal(run("pack", *flags))


def test_help_names_every_option_and_default(run):
    for command in COMMANDS:
        code, out, _ = run(command, "--help")
        assert code == 0
        for flags, _ in [*GIVEN.values(), *PACKINGS_GIVEN]:
            assert all(f"  {flag}" in out for flag in flags if flag.startswith("--"))
        assert "(default: 2048)" in out and "(default: best_fit)" in out
    code, out, _ = run("--help")
    assert code == 0 and all(f"nanopack {command} [FILES...]" in out for command in COMMANDS)
    assert run("--version") == (0, f"nanopack {nanopack.__version__}\n", "")
    assert options.LISTED_PIECES > 0


# What is refused

REFUSED = {
    "no command": ([], "arguments are required: COMMAND"),
    "unknown command": (["pak"], "'pak'"),
    "unknown flag": (["pack", "--sequence", "3"], "unrecognized arguments: --sequence"),
    "abbreviated flag": (["pack", "--batch", "3"], "unrecognized arguments: --batch"),
    "no such file": (["pack", "nowhere.jsonl"], "nanopack: conversations='nowhere.jsonl' does not exist"),
    "no such glob": (["verify", "nowhere-*.jsonl"], "'nowhere-*.jsonl' matches no file"),
    "a folder": (["inspect", "."], "conversations='.' is a folder without files that end in .jsonl"),
    "unknown suffix": (["pack", __file__], "unknown suffix"),
    "batch size 0": (["pack", "--batch-size", "0"], "batch_size=0 is not allowed"),
    "negative length": (["verify", "--seq-len", "-1"], "seq_len=-1 is not allowed"),
    "no number": (["pack", "--seq-len", "many"], "--seq-len: invalid int value: 'many'"),
    "window 0": (["pack", "--window", "0"], "window=0 is not allowed; use an int from 1 upwards"),
    "unknown packing": (["pack", "--packing", "tight"], "--packing: invalid choice: 'tight'"),
    "window of stream": (["inspect", "--packing", "stream", "--window", "9"], "window=9 has no meaning"),
    "unknown extra": (["pack", "--extras", "positions,x"], "'x' is not known"),
    "rank alone": (["pack", "--rank", "1"], "nanopack: rank=1, but no world_size; pass both"),
    "rank too large": (["pack", "--rank", "2", "--world-size", "2"], "use an int from 0 to 1"),
    "no such tokenizer": (["pack", "--tokenizer", "gpt9"], "tokenizer='gpt9' is neither a bundled name"),
    "ranks as tokenizer": (["pack", "--tokenizer", str(RANKS)], "no split pattern"),
    "empty tokenizer": (["pack", "--tokenizer", ""], "tokenizer='' is empty"),
    "template without tokens": (["pack", "--template", "chatml"], "lacks special tokens of template='chatml'"),
    "no epoch": (["pack", "--epochs", "0"], "epochs=0 is not allowed"),
    "no batch": (["pack", "--max-batches", "0"], "--max-batches: '0' is not a number from 1 upwards"),
    "saved as csv": (["pack", "--save", "a.csv"], "'a.csv' does not end in .npz or .safetensors"),
    "drawn as jpg": (["inspect", "--lengths-png", "a.jpg"], "--lengths-png: 'a.jpg' does not end in .png"),
    "drawn nowhere": (["inspect", "--lengths-png", "nowhere/a.png"], "there is no folder 'nowhere'"),
    "page as htm": (["inspect", "--html", "a.htm"], "--html: 'a.htm' does not end in .html"),
    "explained and drawn": (
        ["inspect", "--explain", "0,0", "--html", "a.html"],
        "--explain is about one token and draws",
    ),
    "saved nowhere": (["pack", "--save", "nowhere/a.npz"], "there is no folder 'nowhere'"),
    "batch beyond the end": (["inspect", "--batch", "99"], "--batch=99 does not exist; there are 5 batches"),
    "explained beyond the end": (["inspect", "--batch", "99", "--explain", "0,0"], "--batch=99 does not exist"),
    "row beyond the batch": (["inspect", "--row", "32"], "--row=32 is outside the batch; use 0 to 31"),
    "explained row": (["inspect", "--explain", "32,0"], "row=32 is outside the batch; use 0 to 31"),
    "explained column": (["inspect", "--explain", "0,2048"], "col=2048 is outside the batch; use 0 to 2047"),
    "explained what": (["inspect", "--explain", "here"], "'here' is not ROW,COL"),
}


def test_one_batch_is_counted_as_one(run, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    line = refusal(run("inspect", tmp_path / "a.jsonl", "--batch", 1))
    assert "--batch=1 does not exist; there is 1 batch, numbered from 0" in line


@pytest.mark.parametrize(("argv", "says"), REFUSED.values(), ids=REFUSED)
def test_bad_input_gives_one_line_and_exit_code_2(run, argv, says, monkeypatch, tmp_path):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.chdir(tmp_path)
    assert says in refusal(run(*argv))


def test_a_folder_is_no_place_to_save_at(run, tmp_path):
    (tmp_path / "a.npz").mkdir()
    assert "a.npz' cannot be written: it is a folder" in refusal(run("pack", "--save", tmp_path / "a.npz"))


def test_nothing_packed_saves_nothing(run, untrained, tmp_path):
    code, _, err = run("pack", untrained, "--save", tmp_path / "a.npz")
    assert code == 1 and err.startswith("nanopack: nothing was packed")
    assert not (tmp_path / "a.npz").exists()
