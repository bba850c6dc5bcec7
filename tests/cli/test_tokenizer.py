"""Promises of nanopack/cli/tokenizer.py: --tokenizer takes any tokenizer of this machine, and --template uses it."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import tiktoken

from nanopack.cli.main import main
from nanopack.cli.tokenizer import find_tokenizer
from nanopack.tokenizers.tokenizer import load_tokenizer

pytest.importorskip("transformers", reason="needs transformers: pip install 'nanopack-gpu[hf]'")

from bundled import RANKS_FILE
from tiny_hf import CALLS, MARKED, make_core, make_tokenizer

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


@pytest.fixture
def hub(tmp_path, monkeypatch, folder):
    """Hugging Face's cache, with me/mine and, without a tokenizer.json, me/slow."""
    import huggingface_hub

    for name, files in (("mine", folder.iterdir()), ("slow", [folder / "tokenizer_config.json"])):
        kept = tmp_path / "hub" / f"models--me--{name}"
        (kept / "snapshots" / "1").mkdir(parents=True)
        (kept / "refs").mkdir()
        (kept / "refs" / "main").write_text("1", encoding="utf-8")
        for file in files:
            shutil.copy(file, kept / "snapshots" / "1" / file.name)
        (kept / "snapshots" / "1" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    shutil.copy(RANKS_FILE, tmp_path / "hub" / "models--me--slow" / "snapshots" / "1" / "tokenizer.model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_a_name_on_the_hub_is_looked_for_on_this_machine_only(hub, monkeypatch, capsys, chats):
    import transformers

    asked = []
    from_pretrained = transformers.AutoTokenizer.from_pretrained

    def asking(name, **settings):
        asked.append((name, settings))
        return from_pretrained(name, **settings)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", asking)
    assert find_tokenizer("me/mine").chat_template == MARKED
    assert main(["pack", chats, "--tokenizer", "me/other"]) == 2
    error = capsys.readouterr().err
    assert "tokenizer='me/other' is neither a file nor a folder" in error and "hf download me/other" in error
    settings = {"local_files_only": True, "trust_remote_code": False}
    assert asked == [(name, settings) for name in ("me/mine", "me/other")]


def test_a_name_on_the_hub_is_refused_where_transformers_would_guess(hub):
    with pytest.raises(ValueError, match=r"'me/slow' is in Hugging Face's cache, but with no tokenizer\.json; load it"):
        find_tokenizer("me/slow")


def test_an_encoding_of_tiktoken_is_taken_by_its_name(monkeypatch):
    encoding = load_tokenizer("chat32k").encoding
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding if name == "o200k_base" else None)
    assert find_tokenizer("o200k_base") is encoding


@pytest.mark.parametrize("text", ["chat32k", "mine.pkl", "nanochat", "ranks.tiktoken", ""])
def test_what_load_tokenizer_reads_is_left_to_it(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nanochat").mkdir()
    for name in ("nanochat/tokenizer.pkl", "nanochat/tokenizer.json", "mine.pkl", "ranks.tiktoken"):
        (tmp_path / name).touch()
    assert find_tokenizer(text) == text


def test_a_home_directory_is_known_where_the_shell_leaves_it_alone(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_tokenizer("~/tokenizer").chat_template == MARKED


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_chat_template_in_a_file_of_its_own_is_read_without_a_config_too(folder, name):
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == MARKED
    if name != "tokenizer_config.json":
        (folder / "tokenizer_config.json").unlink()
    assert find_tokenizer(str(folder / name if name.endswith("json") else folder)).chat_template == MARKED


NAMED = {"default": MARKED, "tool_use": CALLS}


@pytest.mark.parametrize("how", ["files", "config"])
def test_of_several_chat_templates_the_default_one_is_used_and_one_is_needed(folder, chats, capsys, how):
    def save(named):
        shutil.rmtree(folder)
        make_tokenizer(named if how == "files" else None).save_pretrained(folder)
        if how == "config":
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
            (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")

    arguments = ["--tokenizer", str(folder), "--template", "hf", "--seq-len", "64", "--batch-size", "2"]
    save(NAMED)
    assert main(["verify", chats, *arguments]) == 0
    save({"chat": MARKED, "tool_use": CALLS})
    assert main(["verify", chats, *arguments]) == 2
    assert "has the chat templates 'chat', 'tool_use', and none is called default; call" in capsys.readouterr().err


SLOW = ["vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "tekken.json", "tokenizer_config.json"]


@pytest.mark.parametrize("form", ["folder", "file"])
@pytest.mark.parametrize("name", SLOW)
def test_a_tokenizer_whose_split_transformers_would_guess_is_refused_by_name(tmp_path, chats, capsys, name, form):
    # the ranks of chat32k, of whose digits transformers would take three at a time
    shutil.copy(RANKS_FILE, tmp_path / "tokenizer.model" if name == "tokenizer_config.json" else tmp_path / name)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}', encoding="utf-8")
    assert main(["pack", chats, "--tokenizer", str(tmp_path if form == "folder" else tmp_path / name)]) == 2
    named = "tokenizer.model" if name == "tokenizer_config.json" else name
    assert f"has {named}, but no tokenizer.json; load it in Python as its makers do, and" in capsys.readouterr().err


# What stands in which file of a folder, None for what is removed, and what is said of it.
BROKEN = {
    "cut-json": (
        {"tokenizer.json": '{"version": '},
        r"tokenizer\.json is no object of JSON: download or save it again",
    ),
    "empty-json": ({"tokenizer.json": ""}, r"tokenizer\.json is no object of JSON"),
    "cut-alone": ({"tokenizer.json": "{", "tokenizer_config.json": None}, r"tokenizer\.json is no object of JSON"),
    "list": ({"tokenizer.json": "[1]"}, r"tokenizer\.json is no object of JSON"),
    "other-json": ({"tokenizer.json": '{"a": 1}'}, r"cannot be loaded by transformers \(KeyError.*; download or save"),
    "other-alone": ({"tokenizer.json": '{"a": 1}', "tokenizer_config.json": None}, "cannot be loaded .*; download or"),
    "pointer": ({"tokenizer.json": "version https://git-lfs.github.com/spec/v1"}, r"Git LFS pointer, .* git lfs pull"),
    "cut-config": ({"tokenizer_config.json": '{"a":'}, r"tokenizer_config\.json is no object of JSON"),
    "null-config": ({"tokenizer_config.json": "null"}, r"tokenizer_config\.json is no object of JSON"),
    "code": (
        {"tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["mine.Mine", null]}, "tokenizer_class": "Mine"}'},
        r"no code of a tokenizer is run here: load it in Python with trust_remote_code=True, and give it to",
    ),
    "config-alone": (
        {"tokenizer.json": None},
        r"has tokenizer_config\.json, but no tokenizer\.json; load it in Python",
    ),
    "nothing": (
        {"tokenizer.json": None, "tokenizer_config.json": None},
        r"is a folder without a tokenizer, such as tokenizer\.json or tokenizer\.pkl; give chat32k",
    ),
    "no-jinja": (
        {"chat_template.jinja": "a\n{% for %}"},
        r"its chat template is not Jinja in line 2 \(.*\); correct it",
    ),
}


@pytest.mark.parametrize("edge", BROKEN)
def test_a_broken_folder_is_one_line_that_says_what_is_wrong_and_what_to_do(folder, chats, capsys, monkeypatch, edge):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody is asked whether code may run"))
    files, message = BROKEN[edge]
    for name, text in files.items():
        (folder / name).unlink(missing_ok=True)
        if text is not None:
            (folder / name).write_text(text, encoding="utf-8")
    assert main(["pack", chats, "--tokenizer", str(folder), "--template", "hf"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nanopack: ") and error.count("\n") == 1 and str(folder) in error
    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "is neither a bundled name nor an existing file or folder; give chat32k, which ships"),
        ("./here", r"'\./here' is neither a bundled name nor an existing"),
        ("none/tokenizer.pkl/x", "is neither a bundled name nor an existing"),
        ("notes.txt", r"is neither a \.pkl nor a \.json file; give chat32k"),
        ("other.json", r"cannot be loaded by transformers \(Exception: .*; download or save it again"),
        ("no.json", r"no\.json is no object of JSON: download or save it again"),
        # a folder that is there is no name on the hub
        ("out/tokenizer", "'out/tokenizer' is a folder without a tokenizer"),
    ],
)
def test_what_is_no_tokenizer_is_an_error_with_the_remedy(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "tokenizer").mkdir(parents=True)
    for name, content in {"notes.txt": "a", "other.json": '{"a": 1}', "no.json": "nope"}.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        find_tokenizer(text)


def test_a_file_without_permission_is_named(folder, chats, capsys, monkeypatch):
    opened = open

    def refusing(file, *arguments, **settings):
        if str(file).endswith("tokenizer.json"):
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file, *arguments, **settings)

    monkeypatch.setattr("builtins.open", refusing)
    assert main(["pack", chats, "--tokenizer", str(folder)]) == 2
    assert capsys.readouterr().err == f"nanopack: {folder / 'tokenizer.json'}: Permission denied\n"


def test_a_package_that_a_tokenizer_takes_is_named(folder, monkeypatch):
    import transformers

    def lacking(*_, **__):
        raise ImportError("\nThis takes the mistral-common library.\nInstall it.\n")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lacking)
    with pytest.raises(ImportError, match=r"takes a package that is not installed: .* the mistral-common library\."):
        find_tokenizer(str(folder))


def test_bench_takes_the_same_names_and_says_which_it_can_measure(folder, chats, capsys):
    assert main(["bench", chats, "--quick", "--tokenizer", str(folder)]) == 2
    assert "is not tiktoken's, which nanochat needs, and bench compares with nanochat; give" in capsys.readouterr().err


def test_ranks_that_cannot_be_fetched_are_an_error_with_the_remedy(monkeypatch):
    def offline(name):
        raise ConnectionError(f"no route to the ranks of {name}")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(
        ValueError, match=r"could not fetch its ranks \(ConnectionError\); put them into the folder TIKTOKEN_CACHE_DIR"
    ):
        find_tokenizer("o200k_base")
