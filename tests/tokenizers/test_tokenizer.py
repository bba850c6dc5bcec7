"""Promises of nanopack/tokenizers/tokenizer.py."""

from __future__ import annotations

import base64
import pickle
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
from bundled import PATTERN, RANKS_FILE
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopack.tokenizers import tokenizer as tokenizers
from nanopack.tokenizers.tokenizer import NANOCHAT_SPECIAL_TOKENS, Tokenizer, load_tokenizer
from nanopack.verify import verify

BYTES = {bytes([byte]): byte for byte in range(256)}
TOKENIZER = load_tokenizer("chat32k")
LOOKS_SPECIAL = st.sampled_from(["<|assistant_end|>", "<|bos|>", "<|endoftext|>", "<|user_", "|>"])
# st.characters() has surrogates, st.text() alone has none.
TEXTS = st.lists(st.text(st.characters()) | LOOKS_SPECIAL | st.just("\0")).map("".join)


def small_encoding(specials: dict[str, int], name: str = "bytes") -> tiktoken.Encoding:
    return tiktoken.Encoding(name, pat_str=r"[\s\S]", mergeable_ranks=BYTES, special_tokens=specials)


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


def test_a_fingerprint_is_computed_once_and_is_that_of_a_copy(monkeypatch):
    tokenizer = pickle.loads(pickle.dumps(TOKENIZER))
    found = tokenizer.fingerprint()
    assert found == TOKENIZER.fingerprint()
    monkeypatch.setattr("nanopack.tokenizers.tokenizer.hashlib", None)
    assert tokenizer.fingerprint() == found
