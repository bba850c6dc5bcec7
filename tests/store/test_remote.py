"""Conversations and stores at URLs, through fsspec: file:// is this machine, memory:// stands for an object store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_sets import SHIPPED, SMALL

from nanopack import ConversationError
from nanopack.store import job, remote
from nanopack.store.remote import RemoteFiles, open_folder
from nanopack.store.tokenize import tokenize

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def memory(monkeypatch):
    """A file system in memory, empty, with two files of conversations."""
    monkeypatch.setattr(job, "LEAST_CONVERSATIONS", 500)
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    lines = SHIPPED.read_bytes().splitlines(keepends=True)
    fs.pipe_file("/in/a.jsonl", b"".join(lines[:1200]))
    fs.pipe_file("/in/b.jsonl", b"".join(lines[1200:]))
    yield fs
    fs.store.clear()


def local(tmp_path: Path) -> dict[str, bytes]:
    tokenize(SHIPPED, SMALL, tmp_path / "local", num_workers=0)
    return {str(file.relative_to(tmp_path / "local")): file.read_bytes() for file in (tmp_path / "local").rglob("*.*")}


@pytest.mark.parametrize(
    "conversations", ["memory://in", "memory://in/*.jsonl", ["memory://in/a.jsonl", "memory://in/b.jsonl"]]
)
def test_a_store_made_at_a_url_from_urls_has_the_same_bytes(memory, tmp_path, conversations):
    assert tokenize(conversations, SMALL, "memory://out", num_workers=0) is None
    found = {name.removeprefix("/out/"): memory.cat_file(name) for name in memory.find("/out")}
    assert found == local(tmp_path)
    # a second time there is nothing to do
    made = memory.modified("/out/manifest.json")
    tokenize(conversations, SMALL, "memory://out", num_workers=0)
    assert memory.modified("/out/manifest.json") == made


def test_what_a_killed_run_left_at_a_url_is_not_made_again(memory, tmp_path, monkeypatch):
    written = []
    put = remote.RemoteFolder.write

    def stops(self, name, chunks):
        if name == "part-00003.words":
            raise KeyboardInterrupt
        written.append(name)
        return put(self, name, chunks)

    with monkeypatch.context() as patch:
        patch.setattr(remote.RemoteFolder, "write", stops)
        with pytest.raises(KeyboardInterrupt):
            tokenize("memory://in", SMALL, "memory://out", num_workers=0)
    assert [name for name in written if name.endswith(".words")] == [f"part-0000{i}.words" for i in range(3)]
    before = {name: memory.modified(name) for name in memory.find("/out") if name.endswith(".words")}
    tokenize("memory://in", SMALL, "memory://out", num_workers=0)
    assert all(memory.modified(name) == moment for name, moment in before.items())
    found = {name.removeprefix("/out/"): memory.cat_file(name) for name in memory.find("/out")}
    assert found == local(tmp_path)


def test_file_urls_are_paths_of_this_machine(memory, tmp_path):
    tokenize(f"file://{SHIPPED}", SMALL, f"file://{tmp_path}/out", num_workers=2)
    expected = local(tmp_path)
    assert {str(f.relative_to(tmp_path / "out")): f.read_bytes() for f in (tmp_path / "out").rglob("*.*")} == expected


def test_a_bad_conversation_at_a_url_is_named_by_url_and_line(memory):
    memory.pipe_file("/in/c.jsonl", json.dumps({"text": "a"}).encode() + b"\n" + json.dumps({"text": 1}).encode())
    with pytest.raises(ConversationError, match=r"^memory:///?in/c\.jsonl:2, text must be"):
        tokenize("memory://in/c.jsonl", SMALL, "memory://out", num_workers=0)


def test_one_file_is_kept_here_at_a_time(memory):
    files = RemoteFiles(["memory://in/a.jsonl", "memory://in/b.jsonl"], [1200, 1286])
    folders = []
    for index in (0, 1300, 5):
        assert files[index] == json.loads(SHIPPED.read_text().splitlines()[index])
        folders.append(files._open[1].name)
    assert [Path(folder).exists() for folder in folders] == [False, False, True]
    with pytest.raises(ValueError, match="matches no file"):
        tokenize("memory://none", SMALL, "memory://out", num_workers=0)


def test_another_file_system_gets_its_files_under_another_name_first(tmp_path, monkeypatch):
    """Of the local one, as if it were none that is atomic."""
    seen = []
    fs = fsspec.filesystem("file")
    monkeypatch.setattr(type(fs), "mv", lambda self, a, b, **_: (seen.append((a, b)), Path(a).rename(b)))
    folder = remote.RemoteFolder(f"local://{tmp_path}")
    assert folder.write("x/a.words", [b"ab", b"c"]).bytes == 3
    assert folder.read("x/a.words") == b"abc" and folder.names("x") == ["a.words"]
    assert len(seen) == 1 and seen[0][0].endswith(".tmp") and seen[0][1].endswith("x/a.words")
    folder.remove_folder("x")
    assert folder.names("x") == [] and isinstance(open_folder("s3://bucket"), remote.RemoteFolder)
