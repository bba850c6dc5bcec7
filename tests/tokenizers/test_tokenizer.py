"""Promises of nanopack/tokenizers/tokenizer.py."""

from __future__ import annotations

import base64
import contextlib
import os
import pickle
import socket
import struct
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopack.tokenizers import rank_files as encodings
from nanopack.tokenizers import tokenizer as tokenizers
from nanopack.tokenizers.tokenizer import NANOCHAT_SPECIAL_TOKENS, Tokenizer, from_ranks, load_tokenizer
from nanopack.verify import verify

RANKS_FILE = str(resources.files("nanopack") / "data" / "chat32k.tiktoken")
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
BYTES = {bytes([byte]): byte for byte in range(256)}
TOKENIZER = load_tokenizer("chat32k")
LOOKS_SPECIAL = st.sampled_from(["<|assistant_end|>", "<|bos|>", "<|endoftext|>", "<|user_", "|>"])
# st.characters() has surrogates, st.text() alone has none.
TEXTS = st.lists(st.text(st.characters()) | LOOKS_SPECIAL | st.just("\0")).map("".join)


def small_encoding(specials: dict[str, int], name: str = "bytes") -> tiktoken.Encoding:
    return tiktoken.Encoding(name, pat_str=r"[\s\S]", mergeable_ranks=BYTES, special_tokens=specials)


def line(token: bytes, rank: object) -> bytes:
    return base64.b64encode(token) + b" " + str(rank).encode() + b"\n"


BYTE_LINES = [line(token, rank) for token, rank in BYTES.items()]


# The bundled tokenizer


def test_the_bundled_tokenizer_has_32768_ids_and_the_nine_special_tokens_come_last():
    assert TOKENIZER.name == "chat32k"
    assert TOKENIZER.vocab_size == 32768
    assert len(TOKENIZER.encoding._mergeable_ranks) == 32759
    assert "".join(NANOCHAT_SPECIAL_TOKENS) == (
        "<|bos|><|user_start|><|user_end|><|assistant_start|><|assistant_end|>"
        "<|python_start|><|python_end|><|output_start|><|output_end|>"
    )
    assert [TOKENIZER.special_id(token) for token in NANOCHAT_SPECIAL_TOKENS] == list(range(32759, 32768))
    assert TOKENIZER.bos_id == 32759


def test_the_bundled_ranks_and_pattern_are_those_of_the_file():
    with open(RANKS_FILE, "rb") as file:
        lines = [one.split() for one in file]
    assert TOKENIZER.encoding._mergeable_ranks == {base64.b64decode(token): int(rank) for token, rank in lines}
    assert TOKENIZER.encoding._pat_str == PATTERN


def test_the_bundled_tokenizer_is_loaded_once():
    assert load_tokenizer("chat32k") is TOKENIZER


def test_loading_the_bundled_tokenizer_uses_no_network_and_no_cache(monkeypatch, tmp_path):
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    tokenizers._bundled.__wrapped__("chat32k")
    assert list(tmp_path.iterdir()) == []


# Encoding and decoding


@given(TEXTS)
@settings(deadline=None)
def test_a_text_gets_the_ids_that_encode_ordinary_gives(text):
    assert TOKENIZER.encode(text).tolist() == TOKENIZER.encoding.encode_ordinary(text)
    assert TOKENIZER.encode(text).dtype == np.uint32


@given(st.lists(TEXTS))
@settings(deadline=None)
def test_a_batch_is_each_text_alone(texts):
    ids, offsets = TOKENIZER.encode_batch(texts)
    assert (ids.dtype, offsets.dtype, offsets.shape) == (np.uint32, np.int64, (len(texts) + 1,))
    assert (offsets[0], offsets[-1]) == (0, len(ids))
    for i, text in enumerate(texts):
        assert ids[offsets[i] : offsets[i + 1]].tolist() == TOKENIZER.encoding.encode_ordinary(text)


@pytest.mark.parametrize("token", NANOCHAT_SPECIAL_TOKENS)
def test_text_that_looks_like_a_special_token_stays_text(token):
    ids = TOKENIZER.encode(f"a{token}b").tolist()
    assert max(ids) < 32759
    assert TOKENIZER.decode(ids) == f"a{token}b"


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        pytest.param("a\ud800b", "a\ufffdb", id="lone-high"),
        pytest.param("a\udc00b", "a\ufffdb", id="lone-low"),
        pytest.param("\ud800", "\ufffd", id="alone"),
        pytest.param("\udc00\ud800", "\ufffd\ufffd", id="wrong-order"),
        pytest.param("\ud83d\ude00", "\U0001f600", id="a-pair-is-its-character"),
    ],
)
def test_lone_surrogates_become_the_replacement_character(text, meaning):
    expected = TOKENIZER.encoding.encode_ordinary(meaning)
    assert TOKENIZER.encode(text).tolist() == expected
    ids, offsets = TOKENIZER.encode_batch(["x", text, "y"])
    assert ids[offsets[1] : offsets[2]].tolist() == expected


@given(st.text())
@settings(deadline=None)
def test_decoding_gives_the_text_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.decode(TOKENIZER.encode(text).tolist()) == text


def test_special_ids_decode_to_their_names_and_broken_utf8_to_the_replacement_character():
    assert TOKENIZER.decode(range(32759, 32768)) == "".join(NANOCHAT_SPECIAL_TOKENS)
    half = TOKENIZER.encoding._mergeable_ranks[b"\xc3"]
    assert TOKENIZER.decode([TOKENIZER.bos_id, half]) == "<|bos|>\ufffd"
    assert TOKENIZER.decode([]) == ""


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param([32768], id="after-the-last"),
        pytest.param([-1], id="negative"),
        pytest.param([1.5], id="fraction"),
        pytest.param(["a"], id="text"),
        pytest.param([[1, 2]], id="two-dimensions"),
        pytest.param([2**64], id="too-large"),
        pytest.param(None, id="none"),
    ],
)
def test_ids_that_are_none_are_refused(ids):
    with pytest.raises(ValueError, match=r"'chat32k' cannot decode these ids .* from 0 to 32767"):
        TOKENIZER.decode(ids)


def test_a_text_that_tiktoken_refuses_is_a_value_error_that_says_why():
    text = "a" + " " * 1_000_001 + "b"
    for encode in (TOKENIZER.encode, lambda text: TOKENIZER.encode_batch(["fine", text])):
        with pytest.raises(ValueError, match=r"1,000,003 characters \(.*backtracking\); .* shorten it") as caught:
            encode(text)
        assert not isinstance(caught.value, UnicodeError)


def test_a_panic_of_tiktoken_is_a_value_error(capfd):
    # Built by hand, so its missing bytes were never checked.
    encoding = tiktoken.Encoding(
        "few", pat_str=r"\w+", mergeable_ranks={b"a": 0, b"b": 1}, special_tokens={"<|bos|>": 2}
    )
    tokenizer = Tokenizer(encoding)
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["ab", text])):
        with pytest.raises(ValueError, match=r"cannot encode this text of 3 characters"):
            encode("abc")
    assert "panicked" in capfd.readouterr().err


def test_a_conversation_at_which_tiktoken_panics_is_skipped_as_the_reference_does(capfd):
    ranks = {bytes([byte]): byte for byte in range(256) if byte != ord("q")}
    encoding = tiktoken.Encoding("no q", pat_str=r"\w+|\W", mergeable_ranks=ranks, special_tokens={"<|bos|>": 256})
    chats = [{"text": text} for text in ("abc", "quick", "def")]
    found = verify(chats, encoding, batch_size=1, seq_len=8, epochs=1, on_error="skip")
    assert (found.difference, found.batches) == (None, 1)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, MemoryError])
def test_an_interruption_is_not_taken_for_a_bad_text(interruption, monkeypatch):
    def interrupt(encoding: tiktoken.Encoding) -> Callable[..., bytes]:
        def encode(text: str, allowed: frozenset[str]) -> bytes:
            raise interruption

        return encode

    monkeypatch.setattr(tokenizers, "_core_encode", interrupt)
    tokenizer = Tokenizer(TOKENIZER.encoding)
    with pytest.raises(interruption):
        tokenizer.encode("text")
    with pytest.raises(interruption):
        tokenizer.encode_batch(["text"])


# What a Tokenizer knows of its encoding


def test_vocab_size_is_one_more_than_the_largest_id_whatever_lies_between():
    assert Tokenizer(small_encoding({"<|bos|>": 256})).vocab_size == 257
    assert Tokenizer(small_encoding({"<|bos|>": 1000, "<|other|>": 700})).vocab_size == 1001


@pytest.mark.parametrize(
    ("specials", "bos_id"),
    [
        pytest.param({"<|bos|>": 300}, 300, id="bos"),
        pytest.param({"<|endoftext|>": 301}, 301, id="endoftext"),
        pytest.param({"<|endoftext|>": 301, "<|bos|>": 302}, 302, id="bos-before-endoftext"),
        pytest.param({"<|begin_of_text|>": 303, "<|end_of_text|>": 304}, 303, id="llama3"),
        pytest.param({"<|begin_of_text|>": 303, "<|endoftext|>": 304}, 303, id="llama3-before-endoftext"),
        pytest.param({"<|begin_of_text|>": 303, "<|bos|>": 302}, 302, id="bos-before-llama3"),
    ],
)
def test_bos_is_bos_else_llama3s_else_endoftext(specials, bos_id):
    assert Tokenizer(small_encoding(specials)).bos_id == bos_id


def test_an_encoding_without_a_beginning_of_sequence_is_refused():
    with pytest.raises(ValueError, match=r"'bytes' has no special token '<\|bos\|>'; it has: <\|x\|>\. Give"):
        load_tokenizer(small_encoding({"<|x|>": 256}))


def test_a_missing_special_token_is_named_with_those_that_there_are():
    tokenizer = Tokenizer(small_encoding({"<|bos|>": 256, **{f"<|r{i}|>": 300 + i for i in range(500)}}))
    with pytest.raises(ValueError, match=r"'bytes'.*'<\|im_start\|>'; it has: <\|bos\|>, <\|r0\|>") as caught:
        tokenizer.special_id("<|im_start|>")
    assert len(str(caught.value)) < 400


def test_ids_that_leave_no_room_for_the_loss_bit_are_refused():
    assert Tokenizer(small_encoding({"<|bos|>": 2**31 - 1})).vocab_size == 2**31
    with pytest.raises(ValueError, match=r"has id 2147483648; give one whose ids are below"):
        Tokenizer(small_encoding({"<|bos|>": 2**31}))


# Ways to name a tokenizer


def nanochat_folder(folder: Path, protocol: int | None = None) -> Path:
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(TOKENIZER.encoding, protocol))
    return folder


@pytest.mark.parametrize(
    "given_as",
    [
        pytest.param(lambda folder: TOKENIZER.encoding, id="encoding"),
        pytest.param(lambda folder: SimpleNamespace(enc=TOKENIZER.encoding), id="nanochat-object"),
        pytest.param(lambda folder: nanochat_folder(folder), id="folder"),
        pytest.param(lambda folder: str(nanochat_folder(folder)), id="folder-as-str"),
        pytest.param(lambda folder: nanochat_folder(folder) / "tokenizer.pkl", id="pickle"),
        pytest.param(lambda folder: str(nanochat_folder(folder) / "tokenizer.pkl"), id="pickle-as-str"),
        *(pytest.param(partial(nanochat_folder, protocol=p), id=f"protocol-{p}") for p in range(3, 6)),
    ],
)
def test_every_way_to_give_a_tokenizer_gives_the_same(given_as, tmp_path):
    tokenizer = load_tokenizer(given_as(tmp_path))
    text = "It's 12345 <|bos|>\n\n  naïve"
    assert tokenizer.encode(text).tolist() == TOKENIZER.encode(text).tolist()
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.bos_id) == ("chat32k", 32768, 32759)
    assert type(tokenizer.encoding) is tiktoken.Encoding


def test_a_tokenizer_is_taken_as_it_is():
    assert load_tokenizer(TOKENIZER) is TOKENIZER


def test_a_tokenizer_survives_its_own_pickle():
    again = pickle.loads(pickle.dumps(TOKENIZER))
    assert again.encode("hello world").tolist() == TOKENIZER.encode("hello world").tolist()


def hugging_face_folder(folder: Path) -> str:
    (folder / "tokenizer.json").write_text("{}")
    return str(folder)


def empty_file(path: Path) -> str:
    path.write_bytes(b"")
    return str(path)


class HuggingFace:
    __module__ = "transformers.tokenization_utils"


@pytest.mark.parametrize(
    ("given_as", "error"),
    [
        pytest.param(lambda folder: "chat99k", "'chat99k' is neither a bundled name nor", id="unknown-name"),
        pytest.param(lambda folder: "cl100k_base", "bundled name .'chat32k'., a tiktoken.Enc", id="tiktokens-name"),
        pytest.param(lambda folder: folder / "none.pkl", "none.pkl' is neither a bundled name", id="missing-file"),
        pytest.param(lambda folder: "a\0b", "nor an existing file or folder", id="null-in-the-name"),
        pytest.param(lambda folder: "a" * 5000, "nor an existing file or folder", id="name-too-long"),
        pytest.param(lambda folder: folder, "is a folder without a tokenizer.pkl", id="empty-folder"),
        pytest.param(hugging_face_folder, "a Hugging Face tokenizer on disk; pass", id="hugging-face-folder"),
        pytest.param(
            lambda folder: hugging_face_folder(folder) + "/tokenizer.json",
            "a Hugging Face tokenizer on disk; pass transformers.AutoTokenizer",
            id="hugging-face-file",
        ),
        pytest.param(lambda folder: HuggingFace(), "Face tokenizer without a fast core", id="hugging-face-object"),
        pytest.param(
            lambda folder: SimpleNamespace(tokenizer=HuggingFace()),
            "is a Hugging Face tokenizer without a fast core",
            id="nanochats-hugging-face-object",
        ),
        pytest.param(lambda folder: RANKS_FILE, r"no split pattern; give .*from_ranks\(path, pattern=", id="ranks"),
        pytest.param(lambda folder: empty_file(folder / "a.bin"), "a.bin' is not a .pkl file", id="other-file"),
        pytest.param(lambda folder: "", "tokenizer='' is empty; give a bundled", id="empty-name"),
        pytest.param(lambda folder: None, "tokenizer is of type NoneType; give a bundled", id="none"),
        pytest.param(lambda folder: 32768, "tokenizer is of type int", id="number"),
        pytest.param(lambda folder: b"chat32k", "tokenizer is of type bytes", id="bytes"),
        pytest.param(lambda folder: {"name": "x"}, "tokenizer is of type dict", id="dict"),
        pytest.param(lambda folder: SimpleNamespace(enc="x"), "of type SimpleNamespace", id="enc-is-no-encoding"),
        pytest.param(lambda folder: tiktoken.Encoding, "of type type", id="the-class-itself"),
    ],
)
def test_what_is_no_tokenizer_is_refused(given_as, error, tmp_path):
    with pytest.raises(ValueError, match=error) as caught:
        load_tokenizer(given_as(tmp_path))
    assert not isinstance(caught.value, UnicodeError)


# Hostile and broken pickles


class Runs:
    """Unpickled by pickle.load, this calls `function(*args)`."""

    def __init__(self, function: Callable, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple:
        return self.call


def string(text: str) -> bytes:
    """The opcode that pushes a string."""
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def call(function: bytes, argument: str) -> bytes:
    """A pickle by hand: push the function, push the argument, call."""
    return b"c" + function.replace(b" ", b"\n") + b"\n" + string(argument) + b"\x85R."


def with_state(state: bytes) -> bytes:
    """A pickle by hand: an Encoding, given the state that the opcodes `state` push."""
    return b"\x80\x02ctiktoken.core\nEncoding\n)\x81" + state + b"b."


def with_changed_state(**changes: object) -> bytes:
    return with_state(pickle.dumps({**STATE, **changes}, 3)[2:-1])


STATE = {
    "name": "x",
    "pat_str": PATTERN,
    "mergeable_ranks": TOKENIZER.encoding._mergeable_ranks,
    "special_tokens": TOKENIZER.encoding._special_tokens,
}
REAL = pickle.dumps(TOKENIZER.encoding, 4)
TOUCH = Runs(os.system, "touch marker")
# Where pickle itself reads one of these, there is a file named marker.
RUNS_CODE = {
    **{f"os.system-protocol-{protocol}": pickle.dumps(TOUCH, protocol) for protocol in range(6)},
    "eval": pickle.dumps(Runs(eval, "open('marker', 'w')")),
    "exec": pickle.dumps(Runs(exec, "open('marker', 'w')")),
    "open": pickle.dumps(Runs(open, "marker", "w")),
    "nested": pickle.dumps(Runs(pickle.loads, pickle.dumps(TOUCH))),
    "next-to-an-encoding": pickle.dumps([TOKENIZER.encoding, TOUCH]),
    "before-an-encoding": pickle.dumps(TOUCH, 2)[:-1] + b"0" + REAL,
    "in-the-state": with_changed_state(name=TOUCH),
    "python-2-name": call(b"__builtin__ eval", "open('marker', 'w')"),
    "through-a-module-of-tiktoken": b"\x80\x04"
    + string("tiktoken.load")
    + string("os.system")
    + b"\x93"
    + string("touch marker")
    + b"\x85R.",
    "opcode-inst": b"(" + string("touch marker") + b"ios\nsystem\n.",
    "opcode-obj": b"(cos\nsystem\n" + string("touch marker") + b"o.",
}
NO_ENCODING = {
    "dotted-name": b"\x80\x04" + string("tiktoken.core") + string("Encoding.__init__.__globals__") + b"\x93.",
    "function-of-tiktoken": call(b"tiktoken.load read_file", "tokenizer.pkl"),
    "get-encoding": call(b"tiktoken get_encoding", "gpt2"),
    "getattr": call(b"builtins getattr", "x"),
    "copyreg": call(b"copyreg __newobj__", "x"),
    "encoding-protocol-0": pickle.dumps(TOKENIZER.encoding, 0),
    "encoding-protocol-1": pickle.dumps(TOKENIZER.encoding, 1),
    # Up to protocol 2, bytes are pickled as a call of _codecs.encode.
    "encoding-protocol-2": pickle.dumps(TOKENIZER.encoding, 2),
    "encoding-of-another-module": with_changed_state().replace(b"tiktoken.core", b"tokenizers", 1),
    "state-is-a-name": with_state(string("gpt2")),
    "state-is-missing": with_state(b"")[:-2] + b".",
    "state-is-a-list": with_state(b"]"),
    "state-lacks-keys": with_state(b"}" + string("name") + string("x") + b"s"),
    "state-has-a-key-more": with_changed_state(explicit_n_vocab=3),
    "name-is-a-number": with_changed_state(name=5),
    "state-for-the-class": b"ctiktoken.core\nEncoding\n}" + string("state") + string("gpt2") + b"sb.",
    "the-class-itself": b"ctiktoken.core\nEncoding\n.",
    "called-with-an-argument": call(b"tiktoken.core Encoding", "x"),
    "called-without-arguments": b"ctiktoken.core\nEncoding\n)R.",
    "extension": b"\x80\x02\x82\xf0.",
    "persistent-id": string("something") + b"Q.",
    "persistent-id-as-text": b"Psomething\n.",
    "out-of-band-buffer": b"\x80\x05\x97.",
    "dict": pickle.dumps(STATE),
    "none": pickle.dumps(None),
    "tuple": pickle.dumps((TOKENIZER.encoding,)),
    "another-class": pickle.dumps(SimpleNamespace(enc=1)),
    "truncated": REAL[: len(REAL) // 2],
    "without-its-last-byte": REAL[:-1],
    "empty": b"",
    "text": b"this is not a pickle",
    "json": b'{"model": {}}',
    "only-stop": b".",
    "stack-underflow": b"\x80\x02R.",
    "protocol-from-the-future": b"\x80\x09.",
    "absurd-length": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",
}


@pytest.mark.parametrize("data", [pytest.param(d, id=case) for case, d in {**RUNS_CODE, **NO_ENCODING}.items()])
def test_a_pickle_that_is_not_an_encoding_is_refused_and_runs_nothing(data, tmp_path, monkeypatch):
    def refuse(name: str) -> None:
        raise AssertionError(f"looked up {name}")

    monkeypatch.setattr("tiktoken.registry.get_encoding", refuse)
    monkeypatch.chdir(tmp_path)
    stand_in = dict(vars(encodings._State))
    Path("tokenizer.pkl").write_bytes(data)
    for given_as in ("tokenizer.pkl", "."):
        with pytest.raises(ValueError, match=r"^tokenizer.pkl is not a pickled tiktoken Encoding \(") as caught:
            load_tokenizer(given_as)
        remedy = "Nothing in it was executed. Save the tokenizer again with pickle.dump(encoding, file), or pass"
        assert remedy in str(caught.value)
        assert os.listdir() == ["tokenizer.pkl"]
    assert dict(vars(encodings._State)) == stand_in


@pytest.mark.parametrize("data", [pytest.param(data, id=case) for case, data in RUNS_CODE.items()])
def test_pickle_itself_would_run_them(data, tmp_path, monkeypatch):
    """Without this the table above would prove nothing."""
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(TypeError):
        pickle.loads(data)
    assert Path("marker").exists()


def test_an_error_about_a_pickle_says_what_it_asked_for(tmp_path):
    file = tmp_path / "tokenizer.pkl"
    file.write_bytes(RUNS_CODE["os.system-protocol-0"])
    with pytest.raises(ValueError, match=r"it asks for (posix|nt)\.system\)"):
        load_tokenizer(file)
    file.write_bytes(pickle.dumps(TOKENIZER.encoding, 0))
    with pytest.raises(ValueError, match=r"it asks for copy_?reg\._reconstructor\)"):
        load_tokenizer(file)
    file.write_bytes(with_state(string("gpt2")))
    with pytest.raises(ValueError, match=r"it only names 'gpt2', so pass tiktoken.get_encoding\('gpt2'\)"):
        load_tokenizer(file)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"mergeable_ranks": {b"a": 0, b"b": 0}}, id="equal-ranks-make-tiktoken-panic"),
        pytest.param({"mergeable_ranks": {b"a": 0}}, id="bytes-without-a-rank"),
        pytest.param({"mergeable_ranks": {}}, id="no-ranks"),
        pytest.param({"mergeable_ranks": {"a": 0}}, id="text-for-bytes"),
        pytest.param({"mergeable_ranks": {b"a": "0"}}, id="text-for-a-rank"),
        pytest.param({"mergeable_ranks": [b"a"]}, id="a-list-of-ranks"),
        pytest.param({"pat_str": "("}, id="broken-pattern"),
        pytest.param({"pat_str": 5}, id="a-number-for-a-pattern"),
        pytest.param({"special_tokens": {"<|bos|>": -1}}, id="negative-id"),
        pytest.param({"special_tokens": None}, id="special-tokens-are-none"),
    ],
)
def test_an_encoding_that_cannot_work_is_refused_when_its_pickle_is_read(changes, tmp_path, capfd):
    file = tmp_path / "tokenizer.pkl"
    file.write_bytes(with_changed_state(**changes))
    with pytest.raises(ValueError, match=r"tokenizer.pkl: (tiktoken rejects|byte 0x00 has no rank)"):
        load_tokenizer(file)


# Ranks files


def write_ranks(folder: Path, lines: list[bytes]) -> str:
    file = folder / "small.tiktoken"
    file.write_bytes(b"".join(lines))
    return str(file)


def test_a_ranks_file_gives_the_tokenizer_it_describes(tmp_path):
    lines = [*BYTE_LINES, line(b"he", 256), line(b"hel", 257)]
    tokenizer = from_ranks(write_ranks(tmp_path, lines), pattern=r"\w+|\W+", special_tokens=["<|bos|>", "<|x|>"])
    assert tokenizer.encode("help<|x|>").tolist() == [257, ord("p"), *b"<|", ord("x"), *b"|>"]
    assert (tokenizer.bos_id, tokenizer.special_id("<|x|>"), tokenizer.vocab_size) == (258, 259, 260)
    assert tokenizer.name == "small"
    assert from_ranks(RANKS_FILE, pattern=PATTERN, name="mine").name == "mine"


def test_the_order_of_lines_and_blank_lines_mean_nothing(tmp_path):
    lines = [b"\n", *reversed(BYTE_LINES), b"   \r\n"]
    tokenizer = from_ranks(write_ranks(tmp_path, lines), pattern=r"[\s\S]")
    assert tokenizer.encode("ab").tolist() == [97, 98]
    assert tokenizer.bos_id == 256


@pytest.mark.parametrize(
    ("change", "error"),
    [
        pytest.param({3: b"AA=A 3\n"}, r"small.tiktoken:4: b'AA=A 3' is not a base64 token", id="not-base64"),
        pytest.param({3: b"!Aw== 3\n"}, r"small.tiktoken:4: .* is not a base64 token", id="stray-character"),
        pytest.param({3: b"\xff\xfe 3\n"}, r"small.tiktoken:4: .* is not a base64 token", id="binary"),
        pytest.param({3: b"Aw==\n"}, r"small.tiktoken:4: .* is not a base64 token, a space and a rank", id="no-rank"),
        pytest.param({3: b"Aw== 3 3\n"}, r"small.tiktoken:4: .* is not a base64", id="three-columns"),
        pytest.param({3: b"Aw== three\n"}, r"small.tiktoken:4: .* is not a base64", id="rank-in-words"),
        pytest.param({3: b"Aw== -3\n"}, r"small.tiktoken:4: .* is not a base64", id="negative-rank"),
        pytest.param({3: b"Aw== 3.0\n"}, r"small.tiktoken:4: .* is not a base64", id="fraction"),
        pytest.param({9: line(b"\x09", 3)}, r"tiktoken:10: rank 3 is in line 4 already", id="rank-twice"),
        pytest.param({9: line(b"\x03", 9)}, r"tiktoken:10: token b'\\x03' is in line 4 already", id="token-twice"),
        pytest.param({9: BYTE_LINES[3]}, r"tiktoken:10: token b'\\x03' is in line 4 already", id="line-twice"),
        pytest.param({9: b""}, r"small.tiktoken:10: rank 10, but rank 9 is missing", id="gap"),
        pytest.param({9: line(b"\x09", 900)}, r"tiktoken:11: rank 10, but rank 9 is missing", id="far-away"),
        pytest.param({0: b""}, r"small.tiktoken:1: rank 1, but rank 0 is missing", id="starts-at-one"),
        pytest.param({255: b""}, r"tiktoken: byte 0xff has no rank \(1 of the 256 bytes", id="a-byte-is-missing"),
        pytest.param(dict.fromkeys(range(256), b""), r"tiktoken: there are no ranks in it", id="empty"),
    ],
)
def test_a_bad_ranks_file_is_refused_by_line(change, error, tmp_path):
    lines = [change.get(i, text) for i, text in enumerate(BYTE_LINES)]
    with pytest.raises(ValueError, match=error):
        from_ranks(write_ranks(tmp_path, lines), pattern=r"[\s\S]")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        pytest.param({"path": "none.tiktoken"}, "ranks file 'none.tiktoken' does not exist", id="missing-file"),
        pytest.param({"pattern": None}, "pattern=None must be the tokenizer's split pattern", id="pattern-none"),
        pytest.param({"pattern": ""}, "pattern='' must be", id="pattern-empty"),
        pytest.param({"pattern": "("}, r"tiktoken: tiktoken rejects its contents .*parenthesis", id="pattern"),
        pytest.param({"special_tokens": "<|bos|>"}, "special_tokens='.*' must be a sequence", id="a-string"),
        pytest.param({"special_tokens": ["<|bos|>", 5]}, "must be a sequence of strings", id="a-number"),
        pytest.param({"special_tokens": ["<|bos|>", ""]}, "none empty", id="an-empty-one"),
        pytest.param({"special_tokens": ["<|bos|>"] * 2}, r"'<\|bos\|>' comes twice", id="twice"),
        pytest.param({"special_tokens": ["<|bos|>", "hello"]}, "'hello' is an ordinary token", id="ordinary-token"),
        pytest.param({"special_tokens": []}, r"no special token '<\|bos\|>'; it has: none", id="no-special-tokens"),
    ],
)
def test_bad_arguments_of_from_ranks_are_refused(arguments, error):
    with pytest.raises(ValueError, match=error):
        from_ranks(**{"path": RANKS_FILE, "pattern": PATTERN, **arguments})
