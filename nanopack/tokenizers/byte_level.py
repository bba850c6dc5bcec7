"""Encode with tiktoken what a Hugging Face tokenizer splits and merges by bytes: the same ids, several times as fast.

    the core of a tokenizer, as JSON   ->   ByteLevel()   ->   ids of texts without added tokens, and their bytes
                                                               huggingface.py keeps the added tokens

Byte-level BPE is one algorithm with two tables: tiktoken's ranks are the order in which merges make their tokens.
Taken is what provably gives the same ids, and NotByteLevel says why anything else is not. The two are compared at
construction; characters that they split differently, such as those of a newer Unicode, are left to Hugging Face.
"""

from __future__ import annotations

import copy
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import tiktoken

from nanopack.tokenizers.buffers import as_buffer
from nanopack.tokenizers.byte_tables import (
    FROM_BYTE,
    NormalForm,
    NotByteLevel,
    bytes_of,
    normal_form,
    parse,
    rank_tokens,
    trims_offsets,
)
from nanopack.tokenizers.rank_files import is_refusal
from nanopack.tokenizers.split_patterns import PatternError, grouped, of_pre_tokenizer

# tiktoken's regex engine refuses some longer texts, a million spaces for instance; which depends on how a pattern is
# written.
LONG_TEXT = 250_000
# What helps where the two differ while a run lasts.
REMEDY = "this is a bug of nanopack, so report it; until it is mended, give input_ids that the tokenizer itself made"
# Tokens whose merges are tried out at construction: all of a small vocabulary, some of a large one.
TRIED_TOKENS = 3000
# In what a character stands when it is first met: between letters, digits, blanks and marks, and after an apostrophe.
_CONTEXTS = "a{0}b A{0}Ba 1{0}1  {0}  .{0}.\n{0}\n'{0} x'l{0} {0}{0}'s "
_UNKNOWN, _ALIKE, _UNLIKE = range(3)
# UTF-8 has no such byte, and so no token either but itself.
_SPARE = 0xFF
# A special token that is never allowed, so that it stays text too.
_NEVER = "\ue000\ue001\ue002"
_NOTHING: frozenset[str] = frozenset()

# What two encoders may differ on: contractions, runs, digits, scripts, marks, white space.
_WORDS = (
    *(
        "a",
        "The",
        "HELLO",
        "don't",
        "I'LL",
        "we've",
        "'s",
        "it's5",
        "é",
        "e\u0301",
        "ß",
        "ǅ",
        "ʰ",
        "漢字",
        "かな",
        "ー゠",
    ),
    *(
        "한글",
        "Жизнь",
        "ελλ",
        "عربي",
        "हिन्दी",
        "ไทย",
        "😀",
        "👩\u200d👩",
        "🇩🇪",
        "1",
        "22",
        "12345",
        "½",
        "Ⅷ",
        "٣",
        "3a",
    ),
    *("!", "...", "://", "\\", "{}", "=>", "—", "、", "()", "/\n#", "-\r\n.", "#a", "\0", "\x7f", "\ue000", "\u200d"),
)
_BLANKS = (" ", "  ", "   ", "\n", "\n\n", "\r", "\r\n", "\t", " \n", "\n ", "\v", "\x1c", "\x85", "\xa0", "\u3000")


class ByteLevel:
    """The split, the ranks and the ids of one tokenizer. Special and other added tokens are not its business."""

    form: NormalForm | None
    """The form that the tokenizer normalizes texts to; None where it leaves them as they are."""
    num_bytes: np.ndarray
    """(vocab_size,) int64: bytes of the text of each token; 0 for added tokens and unused ids."""
    leading: np.ndarray | None
    """(vocab_size,) int64: blanks that a token begins with, where offsets leave them out; else None."""
    trailing: np.ndarray | None
    """(vocab_size,) int64: likewise, blanks that a token ends with."""
    encoding: tiktoken.Encoding
    """Its pattern and ranks; `_ids` has the ids of the ranks."""
    encoder = "tiktoken"
    """What encodes texts."""

    def __init__(
        self,
        core: Any,
        settings: str,
        vocab: Mapping[str, int],
        vocab_size: int,
        encode_exactly: Callable[[Sequence[str]], list[list[int]]],
    ) -> None:
        """Take the settings, a tokenizer.json, and the vocabulary; NotByteLevel where its ids might differ.

        `encode_exactly` gives the ids of texts as the tokenizer itself has them.
        """
        self._encode_exactly = encode_exactly
        head, model, products = parse(settings)
        self.form = normal_form(head["normalizer"])
        try:
            pattern = of_pre_tokenizer(head["pre_tokenizer"])
        except PatternError as error:
            raise NotByteLevel(str(error)) from None
        tokens = bytes_of(vocab)
        ranks, self._ids = rank_tokens(tokens, products, model.get("ignore_merges", False))
        found = _encoding(pattern, ranks)
        lost = _unreachable(found, ranks)
        self._try_merges(core, [token for token in ranks if len(token) > 1 and token not in lost])
        if lost and model.get("ignore_merges", False):
            _refuse_other_splits(lost, ranks, set(products))
        elif lost:
            found = _encoding(pattern, {token: rank for token, rank in ranks.items() if token not in lost})
        self.pattern, self._found = pattern, found
        self._encode_texts: Callable[[Sequence[str | bytes]], list[Any]] = partial(_by_tiktoken, found._core_bpe)
        self._describe_tokens(tokens, vocab_size, head["post_processor"])
        self._states: np.ndarray = np.zeros(0x110000, np.int8)
        # Lone surrogates are mended elsewhere.
        self._states[0xD800:0xE000] = _UNLIKE
        if difference := next(filter(None, map(self.difference, _fuzz())), None):
            raise NotByteLevel(difference)

    def _describe_tokens(self, tokens: dict[bytes, int], vocab_size: int, post: Any) -> None:
        numbers = np.fromiter(tokens.values(), np.int64, len(tokens))

        def table(count: Callable[[bytes], int]) -> np.ndarray:
            found = np.zeros(vocab_size, np.int64)
            found[numbers] = np.fromiter(map(count, tokens), np.int64, len(tokens))
            return found

        self.num_bytes = table(len)
        trims = trims_offsets(post)
        self.leading = table(lambda token: len(token) - len(token.lstrip(b" "))) if trims else None
        self.trailing = table(lambda token: len(token) - len(token.rstrip(b" "))) if trims else None

    def takes(self, texts: Sequence[str]) -> bool:
        """Return whether all of the texts may be encoded here."""
        doubtful = [text for text in texts if not text.isascii()]
        if max(map(len, texts), default=0) >= LONG_TEXT or not all(map(self.is_normal, doubtful)):
            return False
        points = np.frombuffer("".join(doubtful).encode("utf-32-le", "surrogatepass"), np.uint32)
        states = self._states[points]
        if doubtful and not states.all():
            self._meet(np.unique(points[states == _UNKNOWN]))
            states = self._states[points]
        return not (states == _UNLIKE).any()

    def is_normal(self, text: str) -> bool:
        """Return whether the tokenizer's normalizer would leave the text as it is."""
        return self.form is None or text.isascii() or unicodedata.is_normalized(self.form, text)

    def encode_each(self, texts: Sequence[str | bytes]) -> list[Any]:
        """Return a buffer of ids, uint32, of each text; all of them must be taken. Bytes are such a buffer already."""
        try:
            buffers = self._encode_texts(texts)
        except BaseException as error:
            if not is_refusal(error):
                raise
            # tiktoken refuses one of them; Hugging Face refuses none
            exact = iter(self._encode_exactly([text for text in texts if isinstance(text, str)]))
            return [text if isinstance(text, bytes) else as_buffer(next(exact)) for text in texts]
        if self._ids is None:
            return buffers
        return [
            buffer if isinstance(buffer, bytes) else self._ids[np.frombuffer(buffer, np.uint32)].tobytes()
            for buffer in buffers
        ]

    def encoded_by(self, encoder: str, make: Callable[[tiktoken.Encoding], Any]) -> ByteLevel:
        """Return a copy whose texts are encoded by what `make` makes of its pattern and ranks: `_encode_each` of it."""
        copied = copy.copy(self)
        copied.encoder = encoder
        # with a beginning of sequence, which tiktoken's users ask for and no text holds
        special = {"<|bos|>": max(self._found._mergeable_ranks.values()) + 1}
        copied._encode_texts = make(
            tiktoken.Encoding(
                "byte-level",
                pat_str=self.pattern,
                mergeable_ranks=self._found._mergeable_ranks,
                special_tokens=special,
            )
        )
        return copied

    def difference(self, text: str) -> str | None:
        """Describe the first difference between the ids here and the tokenizer's own; None if they are equal."""
        if not self.takes([text]):
            return None
        got = np.frombuffer(self.encode_each([text])[0], np.uint32).tolist()
        return describe_difference(text, self._encode_exactly([text])[0], got)

    def _meet(self, points: np.ndarray) -> None:
        """Try out whether characters that were not met before are split alike."""
        characters = [chr(point) for point in points.tolist()]
        texts = [_CONTEXTS.format(character) for character in characters]
        buffers = self.encode_each(texts)
        for point, character, buffer, exact in zip(
            points.tolist(), characters, buffers, self._encode_exactly(texts), strict=True
        ):
            # A form that Python does not know yet cannot be checked.
            new = self.form is not None and unicodedata.category(character) == "Cn"
            alike = not new and np.frombuffer(buffer, np.uint32).tolist() == exact
            self._states[point] = _ALIKE if alike else _UNLIKE

    def _try_merges(self, core: Any, tokens: Sequence[bytes]) -> None:
        """Raise NotByteLevel where merges do not make a token as tiktoken does: as many are tried as take no time."""
        end = FROM_BYTE[_SPARE]
        for token in tokens[:: max(1, len(tokens) // TRIED_TOKENS)]:
            written = "".join([FROM_BYTE[byte] for byte in token])
            made = core.model.tokenize(written + end)
            if len(made) != 2 or made[0].value != written:
                raise NotByteLevel(f"its merges do not make its token {written!r}")
        if hasattr(core.model, "_clear_cache"):
            core.model._clear_cache()


def _by_tiktoken(core: Any, texts: Sequence[str | bytes]) -> list[Any]:
    encode = core.encode_to_tiktoken_buffer
    return [text if isinstance(text, bytes) else encode(text, _NOTHING) for text in texts]


def _encoding(pattern: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    # With no special token at all, tiktoken would find the empty one before each letter.
    special = {_NEVER: max(ranks.values()) + 1}
    return tiktoken.Encoding("byte-level", pat_str=grouped(pattern), mergeable_ranks=ranks, special_tokens=special)


def _unreachable(encoding: tiktoken.Encoding, ranks: dict[bytes, int]) -> set[bytes]:
    """Return the tokens that merging their bytes does not make."""
    encode_piece = encoding._core_bpe.encode_single_piece
    end = bytes([_SPARE])
    # With one more byte it is no token itself, so that it must be merged.
    return {token for token, rank in ranks.items() if encode_piece(token + end)[0] != rank}


def _refuse_other_splits(tokens: set[bytes], ranks: dict[bytes, int], made: set[str]) -> None:
    """Raise NotByteLevel where tiktoken would make one of these of two others that do not merge."""
    for token in tokens:
        written = "".join([FROM_BYTE[byte] for byte in token])
        if written not in made and any(token[:at] in ranks and token[at:] in ranks for at in range(1, len(token))):
            raise NotByteLevel(f"no merge makes its token {written!r}")


def describe_difference(text: str, expected: Sequence[int], got: Sequence[int]) -> str | None:
    """Say where ids that should be equal differ; None if they do not."""
    if list(expected) == list(got):
        return None
    both = zip(expected, got, strict=False)
    at = next((i for i, (one, other) in enumerate(both) if one != other), min(len(expected), len(got)))
    shown = text if len(text) <= 200 else f"{text[:200]}…"
    return (
        f"the ids differ from the tokenizer's own at token {at} of the text {shown!r}: "
        f"expected {list(expected[at : at + 6])}, got {list(got[at : at + 6])}"
    )


def _fuzz() -> list[str]:
    """Return a few hundred texts, the same ones each time."""
    chance = np.random.default_rng(0)
    words = (*_WORDS, *_BLANKS * 2)
    texts = ["".join(words[k] for k in chance.integers(0, len(words), 12)) for _ in range(300)]
    runs = [f"x{word * count}y" for word in ("a", " ", "\n", "=", "1", "é", "漢", " \n", "'s") for count in (99, 120)]
    return ["", *words, *texts, *runs]
