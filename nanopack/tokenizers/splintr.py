"""Encode with splintr-rs instead of tiktoken: the same ids, faster, continuously checked against tiktoken.

    Loader(encoder="fast")   ->   choose_encoder()   ->   FastTokenizer, for rendering; all else uses tiktoken's
                                                           or a HuggingFaceTokenizer whose byte-level texts it encodes

Only split patterns known to split alike are accepted. The two encoders are compared on a sample of the data at
construction, and on one text in a thousand after that; the tests compare them on far more, for the range of versions
that setup.py allows. Anything they might encode differently is left to tiktoken: characters new in Unicode 17, very
long texts.
"""

from __future__ import annotations

import base64
import functools
import importlib
import os
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tiktoken

from nanopack.conversations.fetch import peek
from nanopack.conversations.order import evenly_spaced
from nanopack.conversations.records import check
from nanopack.conversations.source import Source
from nanopack.errors import EncoderError
from nanopack.tokenizers.buffers import due_texts
from nanopack.tokenizers.byte_level import LONG_TEXT, ByteLevel
from nanopack.tokenizers.split_patterns import PatternError, plain
from nanopack.tokenizers.tokenizer import AnyTokenizer, Tokenizer

ENCODERS = (None, "fast")
# Every n-th text is compared with tiktoken's ids, starting with the first of each process.
SPOT_CHECK = 1000
# The sample compared at construction: conversations, characters in total, characters per text, seconds of reading.
SAMPLE, SAMPLE_CHARACTERS, SAMPLE_TEXT, SAMPLE_SECONDS = 8, 100_000, 20_000, 0.1
REMEDY = "leave encoder out: tiktoken is exact"

# Letters and digits that Unicode 17 added. Neither splintr-rs 0.22 (PCRE2 10.4) nor tiktoken 0.14 knows them, and a
# later version of one may know them before the other does.
UNICODE_17 = (
    *(0x088F, 0x0C5C, 0x0CDC, *range(0xA7CE, 0xA7D0), 0xA7D2, 0xA7D4, 0xA7F1, *range(0x10940, 0x1095A)),
    *(*range(0x10EC5, 0x10EC8), *range(0x11DB0, 0x11DEA), *range(0x16EA0, 0x16ED4), *range(0x16FF2, 0x16FF7)),
    *(*range(0x187F8, 0x18800), *range(0x18D09, 0x18D1F), *range(0x18D80, 0x18DF3), *range(0x1E6C0, 0x1E700)),
    *(*range(0x2B73A, 0x2B740), *range(0x2CEA2, 0x2CEAE), *range(0x323B0, 0x3347A)),
)
# The Mongolian vowel separator is white space to PCRE2 alone. The long s and the Kelvin sign match s and K where a
# pattern ignores case, and the two engines need not agree on where.
UNLIKE = (0x180E, 0x017F, 0x212A)


def choose_encoder(encoder: str | None, tokenizer: AnyTokenizer, source: Source) -> AnyTokenizer:
    """Return the tokenizer to encode with: the given one or, with "fast", its `FastTokenizer`, checked on a sample.

    Raises ImportError without splintr-rs, ValueError for an unknown encoder, a tokenizer that splintr-rs does not
    support, or a sampled text that the two encode differently.
    """
    if encoder is None:
        return tokenizer
    if encoder != "fast":
        raise ValueError(f"encoder={encoder!r} is not allowed; use one of {', '.join(map(repr, ENCODERS))}")
    fast, find_difference = _faster(tokenizer)
    for text in _sample(source):
        if difference := find_difference(text):
            raise ValueError(difference)
    return fast


def _faster(tokenizer: AnyTokenizer) -> tuple[AnyTokenizer, Callable[[str], str | None]]:
    """Return the tokenizer whose texts splintr-rs encodes, and what describes a text's difference from its own ids."""
    if isinstance(tokenizer, Tokenizer):
        fast = FastTokenizer(tokenizer.encoding)
        return fast, fast.difference
    if tokenizer.byte_level is None:
        raise ValueError(
            f"encoder='fast' cannot take {tokenizer.name!r}, which is encoded by {tokenizer.encoder}; leave encoder out"
        )
    faster = tokenizer.encoded_by(by_splintr)
    try:
        byte_level = faster.byte_level
    except ValueError as error:
        raise ValueError(str(error).replace("'byte-level'", repr(tokenizer.name))) from error
    assert byte_level is not None
    return faster, byte_level.difference


def by_splintr(byte_level: ByteLevel) -> ByteLevel:
    """Return a copy whose texts splintr-rs encodes; ValueError and ImportError as `FastTokenizer` has them."""
    return byte_level.encoded_by(FastTokenizer.encoder, lambda encoding: FastTokenizer(encoding)._encode_each)


# A subclass: everything but the encoding is unchanged, the fingerprint included.
class FastTokenizer(Tokenizer):
    """A tiktoken `Encoding` whose texts splintr-rs encodes. Survives pickling and forking."""

    encoder = "splintr-rs"

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        """Raise ImportError without splintr-rs, ValueError if it does not support the encoding."""
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
            raise ImportError("encoder='fast' needs splintr-rs; pip install nanopack-gpu[fast]") from error
        ranks = self.encoding._mergeable_ranks.items()
        lines = b"".join([base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks])
        try:
            # No special tokens, so that what looks like one stays text. PCRE2, because the other regex engine is
            # slower and knows characters that tiktoken's does not.
            return splintr.Tokenizer.from_bytes(lines, self._pattern).pcre2(True)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"encoder='fast' cannot take {self.name!r}: splintr-rs says: {reason}; {REMEDY}"
            ) from error

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, (n,) uint32, and raise, as `Tokenizer.encode` does."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str | bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Return the concatenated ids, (n,) uint32, and offsets, (len(texts) + 1,) int64: see `Tokenizer.encode_batch`.

        Also raises EncoderError if a spot check finds ids that differ from tiktoken's.
        """
        ids, offsets = super().encode_batch(texts)
        for place in due_texts(texts, self._encoded, SPOT_CHECK):
            if difference := self._compare(str(texts[place]), ids[offsets[place] : offsets[place + 1]]):
                raise EncoderError(difference)
        self._encoded += sum([isinstance(text, str) for text in texts])
        return ids, offsets

    def _encode_each(self, texts: Sequence[str | bytes]) -> list[Any]:
        if self._process != os.getpid():
            # another thread may have held a lock of the core's cache during the fork
            self._core, self._process = self._make_core(), os.getpid()
        # Not its batch call: its thread pool does not survive a fork.
        encode = self._core.encode_flat
        strings = [text for text in texts if isinstance(text, str)]
        doubtful = "".join([text for text in strings if not text.isascii()])
        if max(map(len, strings), default=0) < LONG_TEXT and _means_the_same(doubtful):
            return [encode(text) if isinstance(text, str) else text for text in texts]
        # the rest: ids, and texts for tiktoken
        left = [encode(text) if isinstance(text, str) and _is_plain(text) else text for text in texts]
        return super()._encode_each(left)

    def difference(self, text: str) -> str | None:
        """Describe the first difference between a text's ids and tiktoken's; None if they are equal."""
        return self._compare(text, super().encode_batch([text])[0])

    def _compare(self, text: str, got: np.ndarray) -> str | None:
        # by unmodified tiktoken: not even the pattern is rewritten
        expected = np.frombuffer(self._encode_alone(text, own_pattern=True), np.uint32)
        if np.array_equal(expected, got):
            return None
        both = min(len(expected), len(got))
        at = int(np.argmax(np.append(expected[:both] != got[:both], True)))
        # as much context as fits on one line
        before = len(self.decode(expected[:at]))
        shown = ascii(text[max(0, before - 20) : before + 20])
        return (
            f"encoder='fast' differs from tiktoken at token {at} of a text of {len(text):,} characters, about {shown}: "
            f"expected {expected[at : at + 6].tolist()}, got {got[at : at + 6].tolist()}; {REMEDY}"
        )


def _is_plain(text: str) -> bool:
    """Whether splintr-rs may encode the text: it is not too long, and its characters mean the same to both."""
    return len(text) < LONG_TEXT and _means_the_same(text)


def _means_the_same(text: str) -> bool:
    """Whether every character means the same to both encoders."""
    if text.isascii():
        return True
    return not _for_tiktoken()[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)].any()


def for_tiktoken(category: Callable[[str], str] = unicodedata.category) -> np.ndarray:
    """Mark the code points that tiktoken must encode, (0x110000,) bool.

    These are UNICODE_17, UNLIKE, the surrogates, which tiktoken replaces, and those that `category` calls unassigned:
    there the encoders may follow different versions of Unicode.
    """
    table = np.ones(0x110000, bool)
    # planes 4 to 13 are unassigned, 15 and 16 are for private use
    for begin, end in ((0, 0x34000), (0xE0000, 0xE0200)):
        table[begin:end] = [category(chr(point)) in ("Cn", "Cs") for point in range(begin, end)]
    table[0xF0000:] = False
    table[[*UNICODE_17, *UNLIKE]] = True
    return table


_for_tiktoken = functools.cache(for_tiktoken)


def _sample(source: Source) -> Iterator[str]:
    """Yield texts of evenly spaced conversations."""
    began, characters = time.perf_counter(), 0
    for index in evenly_spaced(len(source), SAMPLE):
        try:
            conversation = check(peek(source, index, None))
        # reported when it is read for training
        except Exception:
            continue
        contents = [message.content for message in conversation.messages] or [conversation.text or ""]
        for content in contents:
            for text in [content] if isinstance(content, str) else [part.text for part in content]:
                yield text[:SAMPLE_TEXT]
                characters += min(len(text), SAMPLE_TEXT)
                if characters > SAMPLE_CHARACTERS or time.perf_counter() - began > SAMPLE_SECONDS:
                    return
