"""Promises of nanopack/tokenizers/split_patterns.py, and of encoding by a rewritten pattern."""

from __future__ import annotations

import pytest
import regex
import tiktoken
from covering import only
from fuzz_texts import TEXTS
from hypothesis import example, given
from hypothesis import strategies as st
from split_patterns import O200K, PATTERNS, PATTERNS_IN_CONTEXT

from nanopack.tokenizers import tokenizer as tokenizers
from nanopack.tokenizers.split_patterns import PatternError, grouped, plain
from nanopack.tokenizers.tokenizer import LONG_TEXT, Tokenizer, load_tokenizer
from nanopack.verify import verify

O200K_LOWER, O200K_UPPER = (f"{alternative}'d)?" for alternative in O200K.split("'d)?|")[:2])
RANKS = load_tokenizer("chat32k").encoding._mergeable_ranks


def tokenizer(pattern: str) -> Tokenizer:
    specials = {"<|bos|>": len(RANKS)}
    return Tokenizer(tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=RANKS, special_tokens=specials))


TOKENIZERS = {name: tokenizer(pattern) for name, pattern in PATTERNS.items()}


@given(TEXTS, st.sampled_from(sorted(PATTERNS)))
@example("a  b\n\n c \r\n", "cl100k")
def test_a_rewritten_pattern_splits_every_text_alike(text, pattern):
    """By another regex engine than tiktoken's, one that reports where it splits."""
    expected = regex.findall(PATTERNS[pattern], text)
    assert regex.findall(plain(PATTERNS[pattern]), text) == expected
    assert regex.findall(grouped(PATTERNS[pattern]), text) == expected


@given(st.lists(TEXTS, max_size=4), st.sampled_from(sorted(PATTERNS)))
@example(["\u0301M", "\u0301aB"], "o200k")
def test_every_text_has_tiktokens_ids_in_every_known_pattern(texts, pattern):
    ids, offsets = TOKENIZERS[pattern].encode_batch(texts)
    for i, text in enumerate(texts):
        expected = TOKENIZERS[pattern].encoding.encode_ordinary(text)
        assert ids[offsets[i] : offsets[i + 1]].tolist() == expected
        assert TOKENIZERS[pattern].encode(text).tolist() == expected


@pytest.mark.parametrize("pattern, context", PATTERNS_IN_CONTEXT)
def test_every_character_has_tiktokens_ids(pattern, context):
    # the other planes are unassigned or private
    points = [*range(0xD800), *range(0xE000, 0x34000), *range(0xE0000, 0xE0200), 0xF0000, 0x10FFFF]
    for begin in range(0, len(points), 4096):
        text = "".join(context.format(chr(point)) for point in points[begin : begin + 4096])
        assert TOKENIZERS[pattern].encode(text).tolist() == TOKENIZERS[pattern].encoding.encode_ordinary(text)


@pytest.mark.parametrize("piece", ["a", "\0", " ", "\n", "\n ", "é", "漢", "ab", "the ", "1", "=", "'s", "😀"])
@pytest.mark.parametrize("length", [500, 4097, 50_000])
def test_long_runs_have_tiktokens_ids(piece, length):
    text = (piece * length)[:length]
    for variant in (text, f"x{text}", f"{text}y"):
        for each in TOKENIZERS.values():
            assert each.encode(variant).tolist() == each.encoding.encode_ordinary(variant)


# Spaces are refused by all, line ends by gpt2 and r50k, the others by none; to encode them takes a second.
REPEATED = only(
    [*((" ", name) for name in PATTERNS), ("\n", "gpt2"), ("\n", "cl100k"), ("a", "chat32k"), ("=", "o200k")],
    [" ", "\n", "a", "="],
    sorted(PATTERNS),
)


@pytest.mark.parametrize(("repeated", "pattern"), REPEATED)
def test_what_tiktoken_refuses_is_refused_and_nothing_else(repeated, pattern, capfd):
    text, each = repeated * 1_000_001 + "a" * repeated.isspace(), TOKENIZERS[pattern]
    try:
        expected = each.encoding._core_bpe.encode_to_tiktoken_buffer(text, frozenset())
    except BaseException:
        with pytest.raises(ValueError, match="tiktoken cannot encode this text of 1,000,0"):
            each.encode(text)
    else:
        assert each.encode(text).tobytes() == bytes(expected)


@pytest.mark.parametrize(
    ("alternatives", "text"),
    [
        pytest.param([O200K_LOWER, O200K_UPPER], "\u0301M", id="o200k"),
        pytest.param([O200K_LOWER, r"[^\r\n\p{L}\p{N}]?+\p{L}++"], "\u0301M", id="o200k-lower-cl100k"),
        pytest.param([O200K_UPPER, r"[^\r\n\p{L}\p{N}]?+\p{L}++"], "\u0301aB", id="o200k-upper-cl100k"),
    ],
)
@pytest.mark.parametrize("rest", [[], [r"\s+(?!\S)", r"\s"]], ids=["alone", "before-white-space"])
def test_alternatives_that_begin_alike_are_not_grouped(alternatives, rest, text):
    """The regex engine factors out a common beginning of a group, and then finds another match than one by one."""
    pattern = "|".join([*alternatives, *rest])
    each = tokenizer(pattern)
    assert each.encode(text).tolist() == each.encoding.encode_ordinary(text)
    with pytest.raises(PatternError, match="alternatives that begin alike"):
        plain(pattern)


def test_a_long_text_is_split_by_the_encodings_own_pattern(monkeypatch):
    # a rewritten pattern that splits differently shows which of the two encoded a text
    monkeypatch.setattr(tokenizers, "grouped", lambda pattern: pattern.replace(r"|\s+(?!\S)", ""))
    each = tokenizer(PATTERNS["chat32k"])
    for length in (LONG_TEXT - 1, LONG_TEXT):
        text = "a  b" + "c" * (length - 4)
        own = length == LONG_TEXT
        expected = each.encoding.encode_ordinary(text)
        assert (each.encode(text).tolist() == expected) == own
        assert (each.encode_batch(["b", text])[0][1:].tolist() == expected) == own


def test_a_known_pattern_is_rewritten_an_unknown_one_used_as_it_is_and_the_encoding_kept(monkeypatch):
    used = []

    class Encoding(tiktoken.Encoding):
        def __init__(self, name, *, pat_str, **rest):
            used.append(pat_str)
            super().__init__(name, pat_str=pat_str, **rest)

    monkeypatch.setattr(tiktoken, "Encoding", Encoding)
    for pattern in (PATTERNS["cl100k"], r"\w+|\W+"):
        assert tokenizer(pattern).encoding._pat_str == pattern
    assert used == [PATTERNS["cl100k"], grouped(PATTERNS["cl100k"]), r"\w+|\W+"]


@pytest.mark.parametrize("pattern", sorted(PATTERNS))
def test_what_needs_no_backtracking_is_in_one_group(pattern):
    found = grouped(PATTERNS[pattern])
    assert found.startswith("(?:") and found.endswith((r")|\s+(?!\S)|\s+", r")|\s+(?!\S)|\s"))
    assert found.replace("(?:", "", 1).replace(r")|\s+(?!\S)", r"|\s+(?!\S)") == plain(PATTERNS[pattern])


def test_a_pattern_that_matches_something_else_is_noticed(monkeypatch):
    monkeypatch.setattr(tokenizers, "grouped", lambda pattern: pattern.replace(r"|\s+(?!\S)", ""))
    wrong = tokenizer(PATTERNS["chat32k"])
    assert wrong.encode("a  b").tolist() != wrong.encoding.encode_ordinary("a  b")


@pytest.mark.parametrize(
    ("pattern", "alternative"),
    [
        pytest.param(r"\s++(?!\S)|\s", r"\s++(?!\S)", id="possessive-before-a-lookahead"),
        pytest.param(r"\s*+[\r\n]|\s", r"\s*+[\r\n]", id="possessive-before-what-it-holds"),
        pytest.param(r"\p{L}+?|\s", r"\p{L}+?", id="lazy"),
        pytest.param(r" ?\p{L}+++|\s", r" ?\p{L}+++", id="two-pluses"),
        pytest.param(r"(?>\p{L}+)|\s", r"(?>\p{L}+)", id="atomic"),
        pytest.param(r"\w+|\W+", r"\w+", id="unknown"),
        pytest.param(r"(?i)\s+|\s", r"(?i)\s+", id="a-flag-for-all"),
        pytest.param(r"(?:\s+|\s)\p{N}|\s", r"(?:\s+|\s)\p{N}", id="a-group"),
        pytest.param(r"a[|]b|\s", "a[|]b", id="a-bar-in-a-class"),
        pytest.param(r"\||\s", r"\|", id="an-escaped-bar"),
    ],
)
def test_a_pattern_that_is_not_known_to_match_alike_is_refused(pattern, alternative):
    with pytest.raises(PatternError, match="is not among the known alternatives") as caught:
        plain(pattern)
    assert str(caught.value).startswith(f"{alternative!r} of its split pattern {pattern!r}")
    assert grouped(pattern) == pattern


@pytest.mark.parametrize("pattern", ["", "(", r"\s|", r"|\s", r"\s|)", r"\s||\s", "\\"])
def test_a_pattern_that_cannot_be_read_is_refused(pattern):
    with pytest.raises(PatternError, match="its split pattern"):
        plain(pattern)


@pytest.mark.parametrize("pattern", sorted(PATTERNS))
def test_known_patterns_lose_their_possessive_quantifiers_and_nothing_else(pattern):
    found = plain(PATTERNS[pattern])
    assert not any(twice in found for twice in ("++", "?+", "*+", "3}+"))
    assert found == PATTERNS[pattern].replace("++", "+").replace("?+", "?").replace("*+", "*").replace("3}+", "3}")


def test_a_wrong_pattern_is_a_difference_to_the_reference_which_keeps_to_the_encodings_own(monkeypatch):
    chats = [{"text": f"Say {i}  twice,   or  not.\n\n  At all"} for i in range(8)]
    arguments = {"batch_size": 2, "seq_len": 16, "packing": "stream", "loss": "all"}
    assert verify(chats, tokenizer(PATTERNS["chat32k"]), **arguments).difference is None
    monkeypatch.setattr(tokenizers, "grouped", lambda pattern: pattern.replace(r"|\s+(?!\S)", ""))
    assert verify(chats, tokenizer(PATTERNS["chat32k"]), **arguments).difference
