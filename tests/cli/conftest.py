"""The command line in this process, and files to give it."""

from __future__ import annotations

import pytest
from data_sets import SHIPPED

from nanopack import cli


@pytest.fixture
def plain_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.fixture
def run(capsys):
    """Return run(*argv) -> exit code, stdout, stderr."""

    def run_main(*argv):
        code = cli.main([str(argument) for argument in argv])
        return (code, *capsys.readouterr())

    return run_main


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(SHIPPED.read_text().splitlines(keepends=True)[:40]))
    return path


@pytest.fixture
def untrained(tmp_path):
    path = tmp_path / "untrained.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Is anybody there?"}]}\n')
    return path


@pytest.fixture
def broken(chats, tmp_path):
    lines = chats.read_text().splitlines()
    lines[16] = '{"messages": [{"role": "user", "content": "hi"'
    path = tmp_path / "broken.jsonl"
    path.write_text("\n".join(lines))
    return path
