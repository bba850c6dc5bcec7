"""What the README shows is what happens."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanopack.cli.main import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^nanopack (.*?)(?:  +#.*)?$", README, re.MULTILINE)


def test_every_python_block_runs_as_a_flat_script(tmp_path):
    assert PYTHON
    printed = ""
    for block in PYTHON:
        script = tmp_path / "script.py"
        script.write_text(block)
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stderr) == (0, "")
        printed += done.stdout
    for words in ("nothing lost: True", "difference=None"):
        assert words in printed


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_works(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    chat = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello %d"}]}\n'
    (tmp_path / "chats.jsonl").write_text("".join(chat % i for i in range(2000)))
    # smaller than what the README shows, so that it takes a moment
    more = ["--batch-size", "2"] if "chats.jsonl" in command and not command.startswith("tokenize") else []
    if command.startswith("bench"):
        more = ["--quick", "--only", "padding"]
    if command == "demo-train":
        more = ["--steps", "5"]
    assert main([*command.split(), *more]) == 0
    assert capsys.readouterr().out


def test_it_leads_with_the_two_commands():
    head = README[: README.index("## ")]
    assert head.index("make demo") < head.index("make test") < head.index("import nanopack")


def test_it_can_be_read_at_once():
    assert len(README.splitlines()) <= 120
