"""Turn texts into token ids: a small interface over tiktoken, and the ways to get a tokenizer.

    Encoding, nanochat folder, bundled name   ->   load_tokenizer()           ->   Tokenizer
    Hugging Face tokenizer                    ->   load_tokenizer()           ->   HuggingFaceTokenizer
    ranks file                                ->   from_ranks()               ->   Tokenizer
                                rank_files.py reads them
    many texts                                ->   Tokenizer.encode_batch()   ->   flat ids and offsets
                                                                                   rendering

Every text is ordinary text: what looks like a special token stays text. No Python list of ids is made, and tiktoken's
core runs outside the GIL, with an equivalent split pattern that its regex engine runs faster (split_patterns.py).
Nothing here uses the network, and a pickle is read, not executed.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Sequence, Set
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
import tiktoken

from nanopack.tokenizers.absent import NoTokenizer
from nanopack.tokenizers.buffers import joined, mended_text
from nanopack.tokenizers.byte_level import LONG_TEXT
from nanopack.tokenizers.huggingface import HuggingFaceTokenizer, is_hugging_face
from nanopack.tokenizers.rank_files import first_line, is_refusal, new_encoding, read_pickle, read_ranks
from nanopack.tokenizers.split_patterns import grouped

NANOCHAT_SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
# Names of the beginning-of-sequence token, in order of preference.
BOS_TOKENS = ("<|bos|>", "<|begin_of_text|>", "<|endoftext|>")

# Name of each ranks file in nanopack/data, and its split pattern: GPT-4's with at most two digits.
_BUNDLED = {
    "chat32k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
}
_ACCEPTED = (
    f"a bundled name ({', '.join(map(repr, _BUNDLED))}), a tiktoken.Encoding, a fast Hugging Face "
    "tokenizer, a nanochat tokenizer, its folder or its tokenizer.pkl, or what nanopack.tokenizers.from_ranks returns"
)
_NOTHING: frozenset[str] = frozenset()


class Tokenizer:
    """A tiktoken `Encoding`, reduced to the few calls that rendering needs. Pickles."""

    name: str
    encoding: tiktoken.Encoding
    vocab_size: int
    """The largest id, special tokens included, plus 1. Some ids below may be unused."""
    encoder: str = "tiktoken"
    """What encodes texts."""
    bos_id: int
    """Id of the first of `<|bos|>`, `<|begin_of_text|>` (Llama 3) and `<|endoftext|>` that the encoding has."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        """Wrap `encoding`. ValueError if it has no beginning of sequence, or ids of more than 31 bits."""
        self.name = encoding.name
        self.encoding = encoding
        largest = encoding.max_token_value
        # a token word holds the loss bit above the id
        if largest >= 2**31:
            raise ValueError(f"tokenizer {self.name!r} has id {largest}; give one whose ids are below 2**31.")
        self.vocab_size = largest + 1
        self.bos_id = self.special_id(
            next((token for token in BOS_TOKENS if token in self.special_tokens), BOS_TOKENS[0])
        )
        self._faster = _core_encode(regrouped(encoding))
        self._fingerprint = ""

    def __reduce__(self) -> tuple[Any, ...]:
        # the faster encoding is rebuilt
        return type(self), (self.encoding,)

    @property
    def special_tokens(self) -> Set[str]:
        """The names of the special tokens."""
        return self.encoding.special_tokens_set

    def fingerprint(self) -> str:
        """Return a digest (hex) of everything that determines the ids of a text; computed once, in 40 ms."""
        self._fingerprint = self._fingerprint or self._computed_fingerprint()
        return self._fingerprint

    def _computed_fingerprint(self) -> str:
        digest = hashlib.sha256(self.encoding._pat_str.encode())
        for token, rank in sorted(self.encoding._mergeable_ranks.items()):
            digest.update(b"%d %d " % (len(token), rank) + token)
        digest.update(repr(sorted(self.encoding._special_tokens.items())).encode())
        return digest.hexdigest()

    def special_id(self, token: str) -> int:
        """Return the id of the special token `token`. ValueError if there is none; it names those there are."""
        specials = self.encoding._special_tokens
        if token in specials:
            return specials[token]
        # Some vocabularies reserve a thousand of them.
        known = ", ".join(list(specials)[:20]) + (", …" if len(specials) > 20 else "")
        raise ValueError(
            f"tokenizer {self.name!r} has no special token {token!r}; it has: {known or 'none'}. "
            "Give a tokenizer that has it."
        )

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, (n,) uint32, equal to those of `Encoding.encode_ordinary`.

        A lone surrogate becomes U+FFFD. ValueError if tiktoken refuses the text, a million spaces for instance.
        """
        return np.frombuffer(self._encode_alone(text), np.uint32)

    def encode_batch(self, texts: Sequence[str | bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Return the concatenated ids of all texts, (n,) uint32, and offsets, (len(texts) + 1,) int64.

        The ids of text i are `ids[offsets[i] : offsets[i + 1]]`, equal to `encode(texts[i])`. An item of type bytes is
        taken as ids, uint32s, and passed through.

        >>> ids, offsets = load_tokenizer("chat32k").encode_batch(["hello", "", np.uint32(7).tobytes(), "hello world"])
        >>> offsets.tolist()
        [0, 1, 1, 2, 4]
        """
        return joined(self._encode_each(texts))

    def _encode_each(self, texts: Sequence[str | bytes]) -> list[Any]:
        """Return one buffer of uint32s per text."""
        faster = self._faster
        if max(map(len, texts), default=0) < LONG_TEXT:
            try:
                return [text if isinstance(text, bytes) else faster(text, _NOTHING) for text in texts]
            except BaseException as error:
                if not is_refusal(error):
                    raise
        # one of them needs repair, or the encoding's own pattern, or is refused
        return [text if isinstance(text, bytes) else self._encode_alone(text) for text in texts]

    def _encode_alone(self, text: str, *, own_pattern: bool = False) -> Any:
        """Return a buffer of uint32s; ValueError if tiktoken refuses the text."""
        own_pattern = own_pattern or len(text) >= LONG_TEXT
        try:
            return (_core_encode(self.encoding) if own_pattern else self._faster)(text, _NOTHING)
        except UnicodeEncodeError:
            return self._encode_alone(mended_text(text), own_pattern=own_pattern)
        except BaseException as error:
            if not is_refusal(error):
                raise
            raise ValueError(
                f"tiktoken cannot encode this text of {len(text):,} characters ({first_line(error)}); "
                "a very long run of white space has this effect: shorten it"
            ) from None

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of `ids`: special tokens by name, U+FFFD for invalid UTF-8. ValueError for unknown ids."""
        try:
            return self.encoding.decode(np.asarray(ids).tolist(), errors="replace")
        except (KeyError, OverflowError, TypeError) as error:
            raise ValueError(
                f"tokenizer {self.name!r} cannot decode these ids ({error}); "
                f"give a flat sequence of its ids, from 0 to {self.vocab_size - 1}."
            ) from error


def _core_encode(encoding: tiktoken.Encoding) -> Callable[[str, frozenset[str]], Any]:
    encode: Callable[[str, frozenset[str]], Any] = encoding._core_bpe.encode_to_tiktoken_buffer
    return encode


def regrouped(encoding: tiktoken.Encoding) -> tiktoken.Encoding:
    """Return the encoding with the equivalent pattern that runs fastest, or itself if none is known."""
    pattern = grouped(encoding._pat_str)
    if pattern == encoding._pat_str:
        return encoding
    ranks, specials = encoding._mergeable_ranks, encoding._special_tokens
    return tiktoken.Encoding(encoding.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)


AnyTokenizer: TypeAlias = Tokenizer | HuggingFaceTokenizer


class HasEncoding(Protocol):
    """nanochat's `RustBPETokenizer`, or any object that holds a tiktoken encoding."""

    @property
    def enc(self) -> tiktoken.Encoding:
        """The encoding."""


class HasFastTokenizer(Protocol):
    """nanochat's `HuggingFaceTokenizer`, or any object that holds a fast tokenizer of Hugging Face."""

    @property
    def tokenizer(self) -> Any:
        """A `transformers.PreTrainedTokenizerFast` or a `tokenizers.Tokenizer`."""


class FastTokenizerLike(Protocol):
    """A `transformers.PreTrainedTokenizerFast`."""

    @property
    def backend_tokenizer(self) -> Any:
        """Its `tokenizers.Tokenizer`."""


class CoreLike(Protocol):
    """A `tokenizers.Tokenizer`."""

    def to_str(self, pretty: bool = False) -> str:
        """Return it as JSON."""


TokenizerLike: TypeAlias = (
    AnyTokenizer
    | tiktoken.Encoding
    | HasEncoding
    | HasFastTokenizer
    | FastTokenizerLike
    | CoreLike
    | str
    | os.PathLike[str]
)
"""What `load_tokenizer`, and so `Loader`, takes."""


def for_template(tokenizer: AnyTokenizer, template: object) -> AnyTokenizer:
    """Return the tokenizer itself, or with template="hf-training" one with the chat template that trl trains by.

    ImportError without trl; ValueError where the tokenizer has no chat template, or trl knows none in its place.
    """
    if template != "hf-training":
        return tokenizer
    if not isinstance(tokenizer, HuggingFaceTokenizer) or tokenizer.chat is None:
        raise ValueError(
            f"template='hf-training' is trl's chat template in place of a transformers tokenizer's own, and tokenizer "
            f"{tokenizer.name!r} is no such tokenizer; use another template"
        )
    return tokenizer.for_training()


def load_tokenizer(tokenizer: object) -> AnyTokenizer:
    """Return the `Tokenizer` or `HuggingFaceTokenizer` that the argument names, wraps or is.

    Accepted: the name of a bundled one ("chat32k"; it wins over a folder of that name), a `Tokenizer`, a
    `tiktoken.Encoding`, an object whose `.enc` is one (nanochat's), the path of a nanochat tokenizer folder
    or of its tokenizer.pkl; a `transformers.PreTrainedTokenizerFast`, a `tokenizers.Tokenizer` or an object whose
    `.tokenizer` is one (nanochat's). ValueError otherwise; it says what was given and what is accepted.
    """
    if isinstance(tokenizer, (Tokenizer, HuggingFaceTokenizer)):
        return tokenizer
    if isinstance(tokenizer, NoTokenizer):
        # it has all that a rendered document asks of one
        return cast(AnyTokenizer, tokenizer)
    encoding = getattr(tokenizer, "enc", tokenizer)
    if isinstance(encoding, tiktoken.Encoding):
        return Tokenizer(encoding)
    if isinstance(tokenizer, str) and tokenizer in _BUNDLED:
        return _bundled(tokenizer)
    if isinstance(tokenizer, str) and not tokenizer:
        raise ValueError(f"tokenizer='' is empty; give {_ACCEPTED}.")
    if isinstance(tokenizer, (str, os.PathLike)):
        return Tokenizer(_read_path(Path(tokenizer)))
    held = getattr(tokenizer, "tokenizer", tokenizer)
    if is_hugging_face(held):
        return HuggingFaceTokenizer(held)
    raise ValueError(f"tokenizer is of type {type(tokenizer).__name__}; give {_ACCEPTED}.")


def from_ranks(
    path: str | os.PathLike[str],
    *,
    pattern: str,
    special_tokens: Sequence[str] = NANOCHAT_SPECIAL_TOKENS,
    name: str | None = None,
) -> Tokenizer:
    """Return the tokenizer of a `.tiktoken` ranks file: a base64 token, a space and its rank on each line.

    `pattern` is the regular expression that splits a text before merging. Text that it does not match is lost, so it
    must match everything. The special tokens get the ids after the ranks, in order; `name` defaults to the file's stem.
    ValueError names the faulty line.
    """
    path = Path(path)
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"pattern={pattern!r} must be the tokenizer's split pattern, a regular expression.")
    ranks = read_ranks(path)
    _check_special_tokens(special_tokens, ranks)
    specials = {token: len(ranks) + i for i, token in enumerate(special_tokens)}
    return Tokenizer(new_encoding(path, path.stem if name is None else name, pattern, ranks, specials))


@functools.cache
def _bundled(name: str) -> Tokenizer:
    with resources.as_file(resources.files("nanopack") / "data" / f"{name}.tiktoken") as path:
        return from_ranks(path, pattern=_BUNDLED[name], name=name)


def _read_path(path: Path) -> tiktoken.Encoding:
    folder = os.path.isdir(path)
    file = path / "tokenizer.pkl" if folder else path
    if os.path.isfile(file) and file.suffix == ".pkl":
        return read_pickle(file)
    if path.name == "tokenizer.json" or os.path.exists(path / "tokenizer.json"):
        what = "a Hugging Face tokenizer on disk; pass transformers.AutoTokenizer.from_pretrained(folder)"
    elif folder:
        what = "a folder without a tokenizer.pkl"
    elif not os.path.exists(path):
        what = "neither a bundled name nor an existing file or folder"
    elif path.suffix == ".tiktoken":
        raise ValueError(
            f"tokenizer={str(path)!r} is a ranks file, which carries no split pattern; "
            "give nanopack.tokenizers.from_ranks(path, pattern=...)."
        )
    else:
        what = "not a .pkl file"
    raise ValueError(f"tokenizer={str(path)!r} is {what}; give {_ACCEPTED}.")


def _check_special_tokens(special_tokens: Sequence[str], ranks: dict[bytes, int]) -> None:
    if isinstance(special_tokens, str) or not all(isinstance(t, str) and t for t in special_tokens):
        raise ValueError(f"special_tokens={special_tokens!r} must be a sequence of strings, none empty.")
    for i, token in enumerate(special_tokens):
        if token in special_tokens[:i]:
            raise ValueError(f"special_tokens: {token!r} comes twice; remove one.")
        if token.encode("utf-8", "replace") in ranks:
            raise ValueError(f"special_tokens: {token!r} is an ordinary token of the ranks; rename it.")
