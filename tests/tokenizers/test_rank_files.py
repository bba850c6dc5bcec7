"""A file of ranks gives the tokenizer that it describes, or is refused by line."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from bundled import PATTERN, RANKS_FILE

from nanopack.tokenizers.tokenizer import from_ranks


def line(token: bytes, rank: object) -> bytes:
    return base64.b64encode(token) + b" " + str(rank).encode() + b"\n"


BYTE_LINES = [line(token, rank) for token, rank in ((bytes([byte]), byte) for byte in range(256))]


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
