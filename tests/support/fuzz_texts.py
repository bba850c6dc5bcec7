"""Texts on which two encoders or two split patterns may differ: long runs, odd white space, many scripts."""

from __future__ import annotations

import random
from collections.abc import Iterator

from hypothesis import strategies as st

from nanopack.tokenizers.tokenizer import Tokenizer

RUNS = ("a", "A", " ", "\n", "\t", "=", "1", "\0", "é", "漢", "\u00a0", "ab", " \n", "\r\n", "'s", "😀", "<|")
PIECES = (
    *("a", "Z", "the", " of", "donaudampfschifffahrtsgesellschaft", "é", "e\u0301", "ß", "ǅ", "ʰ", "ß", "İ", "ı", "ſ"),
    *("1", "22", "12345", "½", "Ⅷ", "٣", "'", "'s", "'S", "'LL", "'ſ", "’s", "_", "-", "!", "...", "://", "\\", "{}"),
    *(" ", "  ", "\n", "\r", "\r\n", "\n\n", "\t", "\v", "\f", "\x1c", "\x85", "\xa0", "\u1680", "\u180e", "\u2003"),
    *("\u2028", "\u2029", "\u202f", "\u3000", "\ufeff", "\u200b", "\u200d", "\0", "\x7f", "\ue000", "\U0010ffff"),
    *(
        "漢字",
        "かな",
        "한글",
        "Жизнь",
        "ελληνικά",
        "عربي",
        "עברית",
        "हिन्दी",
        "ไทย",
        "😀",
        "👩‍👩‍👧",
        "🇩🇪",
        "\u088f",
        "𝒳",
    ),
    *("<|bos|>", "<|endoftext|>", "<|im_start|>", "<|", "|>", "\ud800", "\udc00", "\ud83d\ude00"),
)


DOUBTFUL = ("ſ", "'ſ", "\u180e", "\u088f", "\ud800", "\udc00", "\ud83d\ude00")
RUN = st.builds(lambda piece, times: piece * times, st.sampled_from(PIECES), st.integers(2, 700))
TEXTS = st.lists(st.sampled_from(PIECES) | RUN | st.text(st.characters(), max_size=20), max_size=30).map("".join)


def fuzz(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield texts on which encoders may differ, the same ones each time: 250,000 characters."""
    chance = random.Random(0)
    yield ""
    for run in RUNS:
        for length in (499, 500, 501, 1200):
            yield f"x{(run * length)[:length]}y"
            yield (run * length)[:length]
    # a single doubtful piece sends the whole text to tiktoken
    plain = [piece for piece in PIECES if piece not in DOUBTFUL]
    for number in range(300):
        pieces = chance.choices(plain if number % 10 else PIECES, k=20)
        yield "".join([piece * (1 if chance.random() < 0.95 else 40) for piece in pieces])
    for begin in range(0, 0x110000, 0x8000):
        # a sample of all planes: each character before a letter, after a space, and before 's
        points = chance.sample(range(begin, begin + 0x8000), 48)
        yield "".join(f"{chr(point)}a {chr(point)}'s\n" for point in points)
    for token in sorted(tokenizer.special_tokens)[:20]:
        yield f"a{token}b {token}\n"
    tokens = chance.choices(list(tokenizer.encoding._mergeable_ranks), k=2000)
    for begin in range(0, 2000, 40):
        yield b"".join(tokens[begin : begin + 40]).decode("utf-8", "replace")
        yield b" ".join(tokens[begin : begin + 40]).decode("utf-8", "replace")
