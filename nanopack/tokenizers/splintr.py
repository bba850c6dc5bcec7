"""Encode with splintr-rs in tiktoken's stead: the same ids, sooner, and held against tiktoken's.

    Loader(encoder="fast")   ->   choose_encoder()   ->   FastTokenizer, for render.py; tiktoken's for everything else

Nothing is taken on trust. Only patterns known to split equally are accepted; the two encoders are compared at
construction, on a fuzz and on a sample of the data, and then on one text in a thousand. What they are known to differ
in, and what tiktoken may refuse, tiktoken encodes itself.
"""

from __future__ import annotations

import base64
import functools
import importlib
import os
import random
import time
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tiktoken

from nanopack.conversations.records import check
from nanopack.conversations.source import Source
from nanopack.errors import EncoderError
from nanopack.tokenizers.split_patterns import PatternError, plain
from nanopack.tokenizers.tokenizer import LONG_TEXT, AnyTokenizer, Tokenizer

ENCODERS = (None, "fast")
# One text in so many is compared with tiktoken's ids, the first of each process among them.
SPOT_CHECK = 1000
# Of the data, so much is compared at construction: conversations, characters in all and of a text, seconds to read.
SAMPLE, SAMPLE_CHARACTERS, SAMPLE_TEXT, SAMPLE_SECONDS = 8, 100_000, 20_000, 0.1
REMEDY = "leave encoder out: tiktoken is exact"

# Letters and digits that Unicode 17 added: neither splintr-rs 0.22 (PCRE2 10.4) nor tiktoken 0.14 knows them, and who
# will first?
UNICODE_17 = (
    *(0x088F, 0x0C5C, 0x0CDC, *range(0xA7CE, 0xA7D0), 0xA7D2, 0xA7D4, 0xA7F1, *range(0x10940, 0x1095A)),
    *(*range(0x10EC5, 0x10EC8), *range(0x11DB0, 0x11DEA), *range(0x16EA0, 0x16ED4), *range(0x16FF2, 0x16FF7)),
    *(*range(0x187F8, 0x18800), *range(0x18D09, 0x18D1F), *range(0x18D80, 0x18DF3), *range(0x1E6C0, 0x1E700)),
    *(*range(0x2B73A, 0x2B740), *range(0x2CEA2, 0x2CEAE), *range(0x323B0, 0x3347A)),
)
# The Mongolian vowel separator is white space to PCRE2 alone. The long s and the Kelvin sign are s and K where case
# does not count, and the two need not agree on where that is.
UNLIKE = (0x180E, 0x017F, 0x212A)

FUZZ_RUNS = ("a", "A", " ", "\n", "\t", "=", "1", "\0", "é", "漢", "\u00a0", "ab", " \n", "\r\n", "'s", "😀", "<|")
FUZZ_PIECES = (
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


def choose_encoder(encoder: str | None, tokenizer: AnyTokenizer, source: Source) -> AnyTokenizer:
    """Return what encodes for this tokenizer: itself, or with "fast" its `FastTokenizer`, compared with it.

    Raises ImportError without splintr-rs, and ValueError for an unknown encoder, a tokenizer that splintr-rs cannot
    take, or a text that the two encode differently.
    """
    if encoder is None:
        return tokenizer
    if encoder != "fast":
        raise ValueError(f"encoder={encoder!r} is not allowed; use one of {', '.join(map(repr, ENCODERS))}")
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(f"encoder='fast' is for tiktoken's encodings; {tokenizer.name!r} is none; leave encoder out")
    fast = FastTokenizer(tokenizer.encoding)
    for text in (*_fuzz(tokenizer), *_sample(source)):
        if difference := fast.difference(text):
            raise ValueError(difference)
    return fast


# A subclass, because all but the encoding is the tokenizer's own, its fingerprint included.
class FastTokenizer(Tokenizer):
    """A tiktoken `Encoding` whose texts splintr-rs encodes. Pickles, and may be forked."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        """Raise ImportError without splintr-rs, ValueError where it cannot take the encoding."""
        super().__init__(encoding)
        try:
            self._pattern = plain(encoding._pat_str)
        except PatternError as error:
            raise ValueError(f"encoder='fast' cannot take {self.name!r}: {error}; {REMEDY}") from error
        ranks = encoding._mergeable_ranks
        if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
            raise ValueError(f"encoder='fast' cannot take {self.name!r}: byte {missing[0]:#04x} has no rank; {REMEDY}")
        self._core, self._process = self._make_core(), os.getpid()
        self._encoded = 0

    def _make_core(self) -> Any:
        try:
            splintr = importlib.import_module("splintr")
        except ImportError as error:
            raise ImportError("encoder='fast' needs splintr-rs; pip install nanopack[fast]") from error
        ranks = self.encoding._mergeable_ranks.items()
        lines = b"".join([base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks])
        try:
            # without special tokens: what looks like one stays text; its other regex engine is slower, and knows
            # characters that tiktoken's does not
            return splintr.Tokenizer.from_bytes(lines, self._pattern).pcre2(True)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"encoder='fast' cannot take {self.name!r}: splintr-rs says: {reason}; {REMEDY}"
            ) from error

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, (n,) uint32: as `Tokenizer.encode`, with what it raises."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str | bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all texts in a row, and offsets: as `Tokenizer.encode_batch`, with what it raises.

        Raises EncoderError where a spot check finds other ids than tiktoken's.
        """
        ids, offsets = super().encode_batch(texts)
        number = sum([isinstance(text, str) for text in texts])
        if due := range(-self._encoded % SPOT_CHECK, number, SPOT_CHECK):
            places = [place for place, text in enumerate(texts) if isinstance(text, str)]
            for place in (places[number] for number in due):
                if difference := self._compare(str(texts[place]), ids[offsets[place] : offsets[place + 1]]):
                    raise EncoderError(difference)
        self._encoded += number
        return ids, offsets

    def _encode_each(self, texts: Sequence[str | bytes]) -> list[Any]:
        if self._process != os.getpid():
            # a fork may have come while another thread held a lock of the core's cache
            self._core, self._process = self._make_core(), os.getpid()
        # Not its batch call: that has a pool of threads, which are not there any more after a fork.
        encode = self._core.encode_flat
        strings = [text for text in texts if isinstance(text, str)]
        doubtful = "".join([text for text in strings if not text.isascii()])
        if max(map(len, strings), default=0) < LONG_TEXT and _means_the_same(doubtful):
            return [encode(text) if isinstance(text, str) else text for text in texts]
        # what is left are ids, and texts for tiktoken
        left = [encode(text) if isinstance(text, str) and _is_plain(text) else text for text in texts]
        return super()._encode_each(left)

    def difference(self, text: str) -> str | None:
        """Return in what the ids of a text differ from tiktoken's, None if in nothing."""
        return self._compare(text, super().encode_batch([text])[0])

    def _compare(self, text: str, got: np.ndarray) -> str | None:
        # by tiktoken as it is: not even the pattern is ours
        expected = np.frombuffer(self._encode_alone(text, own_pattern=True), np.uint32)
        if np.array_equal(expected, got):
            return None
        both = min(len(expected), len(got))
        at = int(np.argmax(np.append(expected[:both] != got[:both], True)))
        # the words before the place, as far as one line holds them
        before = len(self.decode(expected[:at]))
        shown = ascii(text[max(0, before - 20) : before + 20])
        return (
            f"encoder='fast' differs from tiktoken at token {at} of a text of {len(text):,} characters, about {shown}: "
            f"expected {expected[at : at + 6].tolist()}, got {got[at : at + 6].tolist()}; {REMEDY}"
        )


def _is_plain(text: str) -> bool:
    """Return whether splintr-rs may encode it: whether it is not long, and means the same to both."""
    return len(text) < LONG_TEXT and _means_the_same(text)


def _means_the_same(text: str) -> bool:
    """Return whether every character means the same to both."""
    if text.isascii():
        return True
    return not _special_characters()[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)].any()


@functools.cache
def _special_characters() -> np.ndarray:
    """Return for each code point whether tiktoken must encode it: (0x110000,) bool.

    That is so where the encoders may go by different versions of Unicode, because it has no character there as far as
    Python knows, and where it is a surrogate, which tiktoken's encoding mends.
    """
    table = np.ones(0x110000, bool)
    # planes 4 to 13 have no characters, 15 and 16 are for private use
    for begin, end in ((0, 0x34000), (0xE0000, 0xE0200)):
        table[begin:end] = [unicodedata.category(chr(point)) in ("Cn", "Cs") for point in range(begin, end)]
    table[0xF0000:] = False
    table[[*UNICODE_17, *UNLIKE]] = True
    return table


def _fuzz(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield texts at which encoders come apart: the same ones each time."""
    chance = random.Random(0)
    yield ""
    for run in FUZZ_RUNS:
        for length in (499, 500, 501, 1200):
            yield f"x{(run * length)[:length]}y"
            yield (run * length)[:length]
    # one piece that is not plain sends the whole text to tiktoken
    plain = [piece for piece in FUZZ_PIECES if _is_plain(piece)]
    for number in range(300):
        pieces = chance.choices(plain if number % 10 else FUZZ_PIECES, k=20)
        yield "".join([piece * (1 if chance.random() < 0.95 else 40) for piece in pieces])
    for begin in range(0, 0x110000, 0x8000):
        # a sample of all planes, each character before a letter, behind a space, and where 's may follow
        points = chance.sample(range(begin, begin + 0x8000), 48)
        yield "".join(f"{chr(point)}a {chr(point)}'s\n" for point in points)
    for token in sorted(tokenizer.special_tokens)[:20]:
        yield f"a{token}b {token}\n"
    tokens = chance.choices(list(tokenizer.encoding._mergeable_ranks), k=2000)
    for begin in range(0, 2000, 40):
        yield b"".join(tokens[begin : begin + 40]).decode("utf-8", "replace")
        yield b" ".join(tokens[begin : begin + 40]).decode("utf-8", "replace")


def _sample(source: Source) -> Iterator[str]:
    """Yield texts of evenly spaced conversations, the first and the last among them."""
    began, characters = time.perf_counter(), 0
    for index in sorted({round(k * (len(source) - 1) / (SAMPLE - 1)) for k in range(SAMPLE)}):
        try:
            conversation = check(source[index])
        # what is wrong with it is told in its turn
        except Exception:
            continue
        contents = [message.content for message in conversation.messages] or [conversation.text or ""]
        for content in contents:
            for text in [content] if isinstance(content, str) else [part.text for part in content]:
                yield text[:SAMPLE_TEXT]
                characters += min(len(text), SAMPLE_TEXT)
                if characters > SAMPLE_CHARACTERS or time.perf_counter() - began > SAMPLE_SECONDS:
                    return
