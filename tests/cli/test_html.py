"""The page of a batch says what explain says, and nothing in a conversation can act in it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from itertools import chain
from pathlib import Path

import pytest

from nanopack import Loader, cli, demo
from nanopack.cli.html import explain_rows, save_page
from nanopack.packing import BestFitCrop, Stream

EVIL = "</script><script>alert(1)</script><!-- <b>&amp; {{title}} {{data}}"
CHATS = [
    *[c for c in demo.shipped() if c["source"] == "arithmetic"][:6],
    *demo.shipped()[:20],
    {"messages": [{"role": "user", "content": EVIL}, {"role": "assistant", "content": EVIL}]},
    {"text": "Plain text, all of it in the loss."},
    {"input_ids": [32759, 5, 6, 7, 8], "loss_mask": [0, 0, 1, 1, 0]},
]
CASES = {
    "best_fit": {},
    "pad": {"packing": "pad"},
    "stream": {"packing": Stream(overlap=True)},
    "crop": {"packing": BestFitCrop(window=4)},
    "all": {"loss": "all", "boundary_loss": False, "loss_weights": "token"},
}


@pytest.fixture
def page(tmp_path):
    """Return page(**arguments) -> the text of a page of batch 1, the loader's explanations of each of its positions."""

    def make(**arguments):
        arguments = {"batch_size": 3, "seq_len": 64, "epochs": 1, "num_workers": 0, **arguments}
        with Loader(CHATS, "chat32k", **arguments) as loader:
            next(loader)
            batch = next(loader)
            rows = explain_rows(batch, loader)
            expected = [[loader.explain(batch, row, column) for column in range(64)] for row in range(3)]
        save_page(rows, tmp_path / "page.html", title=f"{EVIL}.jsonl")
        return (tmp_path / "page.html").read_text(encoding="utf-8"), expected

    return make


def read(text):
    """Return the page's data, as a browser would find them: up to the first end of a script."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script', text, re.S)[1])


def as_shown(token):
    if token is None:
        return None
    part = "" if token.message is None else f", message {token.message} ({token.role})"
    return {"text": token.text, "from": f"{token.where}{part}, token {token.offset}"}


def look_up(data, row, column):
    """Return a token as the page shows it."""
    span = next((one for one in data["rows"][row]["spans"] if one[0] <= column < one[1]), None)
    if span is None:
        return None
    start, _, _, where, message, role, offset = span
    part = "" if message is None else f", message {message} ({role})"
    text = data["texts"][data["rows"][row]["texts"][column]]
    return {"text": text, "from": f"{data['locations'][where]}{part}, token {offset + column - start}"}


@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES)
def test_it_says_of_every_position_what_explain_says(page, arguments):
    text, expected = page(**arguments)
    data = read(text)
    for row, column in ((row, column) for row in range(3) for column in range(64)):
        one = expected[row][column]
        got = look_up(data, row, column), look_up(data, row, column + 1)
        assert got == (as_shown(one.input), as_shown(one.target)), (row, column)
        assert data["reasons"][data["rows"][row]["reasons"][column]] == [one.in_loss, one.reason]


@pytest.mark.skipif(not shutil.which("node"), reason="needs node, to run the page's script")
def test_its_script_says_the_same(page, tmp_path):
    text, expected = page()
    script = re.findall(r"<script>(.*?)</script>", text, re.S)[-1]
    functions = script[: script.index("function draw")].replace('document.getElementById("data").textContent', "given")
    ask = "[...Array(3).keys()].map(r => [...Array(64).keys()].map(c => explain(r, c)))"
    given = json.dumps(json.dumps(read(text)))
    (tmp_path / "page.js").write_text(f"const given = {given};{functions};console.log(JSON.stringify({ask}))")
    (tmp_path / "whole.js").write_text(script)
    subprocess.run(["node", "--check", tmp_path / "whole.js"], check=True)
    shown = json.loads(subprocess.run(["node", tmp_path / "page.js"], capture_output=True, check=True).stdout)
    for one, got in zip(chain(*expected), chain(*shown), strict=True):
        for name in ("input", "target"):
            if got[name]:
                del got[name]["piece"]
        assert got == {
            **{n: as_shown(getattr(one, n)) for n in ("input", "target")},
            "inLoss": one.in_loss,
            "reason": one.reason,
        }


def test_nothing_in_a_conversation_or_a_file_name_becomes_markup(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("a<") / "script><script>alert(2) <b> {{data}}.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(CHATS[26]))
    assert cli.main(["inspect", str(path), "--html", "a.html", "--batch-size", "1", "--seq-len", "256"]) == 0
    text = Path("a.html").read_text(encoding="utf-8")
    for words in ("<script>alert", "<b>", "<!-- "):
        assert words not in text
    assert text.count("<script") == text.count("</script") == 2
    data = read(text)
    assert data["locations"] == [f"{path}:1"]
    assert "".join(data["texts"][number] for number in data["rows"][0]["texts"] if number >= 0).count(EVIL) == 2


def test_it_needs_nothing_from_elsewhere(page):
    assert not re.search(r"https?:|\bsrc=|\bhref=|@import|url\(|fetch\(|innerHTML", page()[0])


def test_a_large_batch_makes_a_small_page(tmp_path, capsys):
    assert cli.main(["inspect", "--html", str(tmp_path / "a.html")]) == 0
    assert capsys.readouterr().out.endswith(f"\nWritten: {tmp_path / 'a.html'}\n")
    assert Path(tmp_path / "a.html").stat().st_size < 1_000_000
    data = read((tmp_path / "a.html").read_text())
    assert [len(row["reasons"]) for row in data["rows"]] == [2048] * 32
