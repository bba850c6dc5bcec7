"""What makes a command fail, and what it says then."""

from __future__ import annotations

import json
import re

import pytest
from command_line import COMMANDS, SMALL, refusal, row_of

import nanopack.upload.executor
from nanopack import Loader
from nanopack.cli import commands

# What is skipped


@pytest.mark.parametrize("command", COMMANDS)
def test_a_broken_line_is_named_with_what_to_do(run, broken, command):
    line = refusal(run(command, broken, *SMALL))
    assert f"{broken}:17, not JSON: " in line and line.endswith('Fix it or pass on_error="skip".\n')


@pytest.mark.parametrize("command", ["pack", "inspect"])
def test_a_broken_line_can_be_skipped_and_is_counted(run, broken, command):
    code, out, err = run(command, broken, *SMALL, "--on-error", "skip")
    assert code == 0
    assert "1  skipped: invalid\n" in out and row_of(out, "ledger")[1] == "balanced"
    assert err.startswith(f"nanopack: skipped 1 bad conversation: 1 like {broken}:17, ") and err.count("\n") == 1
    _, _, err = run(command, broken, *SMALL, "--on-error", "skip", "-v")
    assert err.startswith(f"nanopack: skipped {broken}:17, ") and err.count("\n") == 2
    code, out, err = run(command, broken, *SMALL, "--on-error", "skip", "--json")
    report = json.loads(out)
    assert report.get("packing", {}) and '"skipped": 1' in out and '"balanced": true' in out


def test_verify_can_skip_a_broken_line(run, broken):
    code, out, _ = run("verify", broken, *SMALL, "--on-error", "skip")
    assert code == 0 and "equal to the reference packer" in out


# What must not pass


def test_verify_reports_the_first_difference_of_a_broken_executor(run, chats, monkeypatch):
    whole = nanopack.upload.executor.pack_torch

    def broken(words, table, inputs, targets, *others, **numbers):
        whole(words, table, inputs, targets, *others, **numbers)
        inputs[2, 5] += 1

    monkeypatch.setattr(nanopack.upload.executor, "pack_torch", broken)
    code, out, err = run("verify", chats, *SMALL)
    assert (code, err) == (1, "")
    assert re.fullmatch(r"not equal to the reference packer: batch 0, inputs\[2, 5\]: expected (\d+), got (\d+)\n", out)
    code, out, _ = run("verify", chats, *SMALL, "--json")
    report = json.loads(out)
    assert (code, report["equal"], report["batches"]) == (1, False, 0)
    assert report["difference"].startswith("batch 0, inputs[2, 5]: expected ")


def test_verify_compares_with_the_options_given(run, chats, monkeypatch):
    # a loader that ignores an argument must not pass: here all tokens are always in the loss
    def everything(*arguments, **named):
        return Loader(*arguments, **{**named, "loss": "all"})

    monkeypatch.setattr(commands, "Loader", everything)
    assert run("verify", chats, *SMALL, "--loss", "all")[0] == 0
    assert run("verify", chats, *SMALL)[0] == 1


@pytest.mark.parametrize("command", ["pack", "inspect"])
def test_an_unbalanced_ledger_is_reported_and_fails(run, chats, monkeypatch, command):
    sound = Loader.ledger
    lost = ["tokens read: 9 counted, 8 accounted for"]
    monkeypatch.setattr(Loader, "ledger", lambda self: sound(self) | {"balanced": False, "imbalances": lost})
    code, out, _ = run(command, chats, *SMALL)
    assert code == 1
    assert re.search(r"^ledger +UNBALANCED  tokens read: 9 counted, 8 accounted for$", out, re.M)
