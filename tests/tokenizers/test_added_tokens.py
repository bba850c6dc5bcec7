"""Promises of nanopack/tokenizers/added_tokens.py: added tokens are found where tokenizers finds them."""

from __future__ import annotations

import re
from itertools import pairwise, product

import pytest
from hypothesis import assume, example, given, reject
from hypothesis import strategies as st

from nanopack.tokenizers.added_tokens import AddedTokens, any_of
from nanopack.tokenizers.rank_files import is_panic

pytest.importorskip("tokenizers", reason="needs transformers: pip install 'nanopack-gpu[hf]'")

CONTENTS = ("<a>", "<a>>", "<<", "a>b", "  ", "éé", "<ab>")
WORDS = st.lists(st.sampled_from([*CONTENTS, *"<a>b é\n\x1c\u3000x"]), max_size=15).map("".join)


def make(flags):
    """Return a core whose added tokens have these flags, in turn: lstrip, rstrip, normalized, special."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.BPE({letter: n for n, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for content, (left, right, late, special) in zip(CONTENTS, flags, strict=False):
        token = AddedToken(content, lstrip=left, rstrip=right, normalized=late, special=special)
        (core.add_special_tokens if special else core.add_tokens)([token])
    return core


FLAGS = st.tuples(*[st.sampled_from(list(product((False, True), repeat=4)))] * len(CONTENTS))


@given(FLAGS, WORDS, st.booleans())
@example([(True, True, False, False)] * len(CONTENTS), "    ", False)
def test_they_are_those_that_tokenizers_finds(flags, text, special_is_text):
    core = make(flags)
    core.encode_special_tokens = special_is_text
    tokens = core.get_added_tokens_decoder()
    as_text = {token.content for token in tokens.values() if token.special} if special_is_text else frozenset()
    try:
        encoded = core.encode(text, add_special_tokens=False)
    # tokenizers itself, where tokens overlap that take blanks along
    except BaseException as error:
        assert is_panic(error)
        reject()
    expected = [(number, *span) for number, span in zip(encoded.ids, encoded.offsets, strict=True) if number in tokens]
    # so does it find a token in another
    assume(all(one[2] <= two[1] for one, two in pairwise(expected)))
    found = AddedTokens(tokens, as_text).cut(text)
    assert [tuple(token) for token in found] == expected
    assert AddedTokens(tokens, as_text).within(text) or not found


@given(st.lists(st.text("ab<|\\.", min_size=1, max_size=5), min_size=1), st.text("ab<|\\.", max_size=30))
def test_the_longest_of_the_leftmost_is_found(words, text):
    longest = re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)))
    assert re.findall(any_of(words), text) == longest.findall(text)


def test_without_words_nothing_is_found():
    assert not re.search(any_of([]), "") and not re.search(any_of([]), "a")
