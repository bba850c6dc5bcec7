"""The command line as a process: errors, exit codes, terminals, pipes and Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import numpy as np
import pytest
from command_line import SMALL, refusal

from nanopack import Loader, cli

pytestmark = pytest.mark.usefixtures("plain_terminal")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def test_an_error_of_the_operating_system_names_the_file(run, chats, tmp_path, monkeypatch):
    def full(path, **_):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(np, "savez", full)
    out = tmp_path / "a.npz"
    assert refusal(run("pack", chats, *SMALL, "--save", out)) == f"nanopack: {out}: No space left on device\n"


def test_an_error_of_ours_that_is_not_bad_input_keeps_its_traceback(chats, monkeypatch):
    def fail(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(Loader, "__next__", fail)
    with pytest.raises(RuntimeError, match="broken"):
        cli.main(["pack", str(chats)])


# Real processes and terminals

MAIN = (sys.executable, "-m", "nanopack.cli")
COMMAND = Path(__file__).parents[1] / "support" / "cli_run.py"


def on_a_terminal(*argv, until=None):
    """Run with stderr on a terminal; return exit code and what it showed. Ctrl-C once `until` shows."""
    master, slave = pty.openpty()
    process = forked.start(COMMAND, *argv, stderr=slave, stdin=slave, stdout=subprocess.DEVNULL)
    os.close(slave)
    shown = b""
    deadline = time.monotonic() + 100
    try:
        while time.monotonic() < deadline:
            try:
                chunk = os.read(master, 4096)
            except OSError:
                # Linux's end of a terminal that nobody holds any more.
                break
            if not chunk:
                break
            shown += chunk
            if until and until in shown:
                until = None
                process.send_signal(signal.SIGINT)
        return process.wait(timeout=60), shown.decode()
    finally:
        process.kill()
        os.close(master)


def test_progress_shows_on_a_terminal_and_nowhere_else(chats):
    code, shown = on_a_terminal("pack", chats, *SMALL)
    assert code == 0
    lines = ESCAPES.sub("", shown).split("\r")
    assert re.match(r"packing .{40}   0%", lines[1] or lines[0])
    assert any(re.match(r"packing .{40} +\d+% \d+ batch", line) for line in lines)
    assert lines[-1].strip() == ""
    piped = forked.run(COMMAND, "pack", chats, *SMALL)
    assert (piped.returncode, piped.stderr) == (0, "")
    assert "packing" not in piped.stdout and "ledger" in piped.stdout


def test_an_error_replaces_the_progress_bar(broken):
    _, shown = on_a_terminal("verify", broken, *SMALL)
    assert re.fullmatch(r"nanopack: \S+broken.jsonl:17, .*\r\n", ESCAPES.split(shown)[-1])


def test_a_warning_does_not_run_into_the_progress_bar(broken):
    code, shown = on_a_terminal("pack", broken, *SMALL, "--on-error", "skip")
    assert code == 0
    assert re.search(r"\x1b\[2Knanopack: skipped 1 bad conversation: 1 like \S+broken.jsonl:17, [^\r]*\r\n", shown)


def test_ctrl_c_ends_with_130_and_no_traceback():
    code, shown = on_a_terminal("pack", "--epochs", 10_000, *SMALL, until=b" batches")
    assert code == 130
    assert "Traceback" not in shown
    assert ESCAPES.split(shown)[-1].strip() == "" and shown.endswith("\x1b[2K")


def test_a_closed_pipe_is_quiet(chats):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*MAIN, "inspect", str(chats), *SMALL], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_words_that_stdout_cannot_write_are_escaped(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"text": "日本"}))
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*MAIN, "inspect", str(path), *SMALL], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u65e5\\u672c" in done.stdout


def test_help_imports_neither_triton_nor_an_extra_nor_the_demo(tmp_path):
    (tmp_path / "script.py").write_text(
        "import sys; from nanopack.cli import main; main(['pack', '--help']); "
        "print(sorted({'triton', 'pyarrow', 'safetensors', 'transformers', 'matplotlib', 'nanopack.demo'}"
        " & {*sys.modules}))"
    )
    assert forked.run(tmp_path / "script.py", TRITON_INTERPRET=None).stdout.splitlines()[-1] == "[]"
