"""Promises of nanopack/cli/tokenizer.py: --tokenizer takes any tokenizer of this machine, and --template uses it."""

from __future__ import annotations

import json

import pytest
import tiktoken

from nanopack.cli.main import main
from nanopack.cli.tokenizer import find_tokenizer
from nanopack.tokenizers.tokenizer import load_tokenizer

pytest.importorskip("transformers", reason="needs transformers: pip install 'nanopack-gpu[hf]'")

from tiny_hf import MARKED, make_core, make_tokenizer

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Oh"}]}


@pytest.fixture
def chats(tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text(f"{json.dumps(CHAT)}\n" * 20, encoding="utf-8")
    return str(file)


@pytest.fixture
def folder(tmp_path):
    make_tokenizer(MARKED).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("template", ["hf", "chatml"])
@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_folder_or_its_file_is_a_hugging_face_tokenizer_with_its_chat_template(chats, folder, form, template, capsys):
    given = str(folder if form == "folder" else folder / "tokenizer.json")
    arguments = ["--tokenizer", given, "--template", template, "--seq-len", "64", "--batch-size", "2"]
    assert main(["verify", chats, *arguments]) == 0
    assert "equal" in capsys.readouterr().out


def test_a_bare_tokenizer_json_under_any_name_is_one_without_a_chat_template(tmp_path, chats, capsys):
    file = tmp_path / "mine.json"
    file.write_text(make_core().to_str(), encoding="utf-8")
    arguments = ["--tokenizer", str(file), "--seq-len", "64", "--batch-size", "2"]
    assert main(["pack", chats, *arguments, "--template", "chatml"]) == 0
    assert main(["pack", chats, *arguments, "--template", "hf"]) == 2
    assert "has none; set its chat_template" in capsys.readouterr().err
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "tokenizer.json").write_text(make_core().to_str(), encoding="utf-8")
    found = load_tokenizer(find_tokenizer(str(tmp_path / "alone")))
    assert found.encode("Hi").tolist() == load_tokenizer(make_core()).encode("Hi").tolist()


def test_a_name_on_the_hub_is_looked_for_on_this_machine_only(monkeypatch, capsys, chats, folder):
    import transformers

    asked = []

    def from_pretrained(name, **settings):
        asked.append((name, settings))
        if name != "me/mine":
            raise OSError("not here")
        return make_tokenizer(MARKED)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    assert find_tokenizer("me/mine").chat_template == MARKED
    assert main(["pack", chats, "--tokenizer", "me/other"]) == 2
    error = capsys.readouterr().err
    assert "tokenizer='me/other' is neither a file nor a folder" in error and "hf download me/other" in error
    assert asked == [(name, {"local_files_only": True}) for name in ("me/mine", "me/other")]


def test_an_encoding_of_tiktoken_is_taken_by_its_name(monkeypatch):
    encoding = load_tokenizer("chat32k").encoding
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding if name == "o200k_base" else None)
    assert find_tokenizer("o200k_base") is encoding


@pytest.mark.parametrize("text", ["chat32k", "nanochat/folder/tokenizer.pkl", "./here", "nothing", "out/tokenizer"])
def test_everything_else_is_load_tokenizers_business(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # a folder that is there is no name on the hub
    (tmp_path / "out" / "tokenizer").mkdir(parents=True)
    assert find_tokenizer(text) == text


def test_ranks_that_cannot_be_fetched_are_an_error_with_the_remedy(monkeypatch):
    def offline(name):
        raise ConnectionError(f"no route to the ranks of {name}")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(
        ValueError, match=r"could not fetch its ranks \(ConnectionError\); put them into the folder TIKTOKEN_CACHE_DIR"
    ):
        find_tokenizer("o200k_base")
