"""Turn texts into token ids with a fast Hugging Face tokenizer, with the interface that tiktoken's have.

    transformers tokenizer, tokenizers.Tokenizer   ->   HuggingFaceTokenizer   ->   tokenizer.py, hf_template.py

Works on a copy of the tokenizer's Rust core, outside the GIL, in which text that looks like a special token stays
text. Nothing of transformers or tokenizers is imported: what is given brings its own code.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from datetime import datetime
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

# What a beginning of sequence may be called where the tokenizer does not say which it is.
BOS_TOKENS = ("<|bos|>", "<|begin_of_text|>", "<|endoftext|>", "<s>")
# A chat template asks for today's date so.
_CLOCK = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")


def is_hugging_face(tokenizer: object) -> bool:
    """Return whether this is an object of transformers or tokenizers."""
    return any(cls.__module__.split(".")[0] in ("transformers", "tokenizers") for cls in type(tokenizer).__mro__)


class HuggingFaceTokenizer:
    """A `transformers.PreTrainedTokenizerFast` or a `tokenizers.Tokenizer`, seen as nanopack's `Tokenizer` is.

    Tokens that were added without being special, such as the `<think>` of some, are found in every text, as the
    tokenizer itself finds them, unless `with_special` names them.
    """

    name: str
    vocab_size: int
    """One more than the largest id, special tokens included. Some ids below may be unused."""
    bos_id: int
    """Id of the tokenizer's own bos_token, else of the first of BOS_TOKENS that there is."""
    chat: Any
    """The transformers tokenizer, which may have a chat template; None where a bare one was given."""
    added_tokens: Mapping[str, int]
    """Ids of all added tokens, special or not."""
    clock: str | None
    """The moment, in ISO format, whose date the chat template writes; None where it writes none."""

    def __init__(self, tokenizer: Any, *, special: Sequence[str] = (), clock: str | None = None) -> None:
        """Copy the core of `tokenizer`. ValueError where it has none (a slow one), or no beginning of sequence.

        `special`: added tokens that count as special though they are not marked so. `clock`: now, if not given.
        """
        self._given, self._special = tokenizer, tuple(special)
        core = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self.name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        self.chat = None if core is tokenizer else tokenizer
        if not hasattr(core, "encode_batch_fast"):
            raise ValueError(
                f"tokenizer {self.name!r} is a Hugging Face tokenizer without a fast core; give a "
                "transformers.PreTrainedTokenizerFast or a tokenizers.Tokenizer (tokenizers>=0.20)."
            )
        # A copy: the switch below, truncation and padding belong to whoever gave it.
        self._core = type(core).from_str(_flagged(core.to_str(), special))
        self._core.encode_special_tokens = True
        self._core.no_truncation()
        self._core.no_padding()
        added = self._core.get_added_tokens_decoder()
        self.added_tokens = {token.content: number for number, token in added.items()}
        self._special_ids: Mapping[str, int] = {t.content: number for number, t in added.items() if t.special}
        self.vocab_size = max(self._core.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_id = self._find_bos(getattr(tokenizer, "bos_token_id", None))
        dated = "strftime_now" in str(getattr(self.chat, "chat_template", None))
        self.clock = (clock or datetime.now().isoformat(timespec="seconds")) if dated else None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what was given: the core would forget that special tokens are text."""
        return _remade, (self._given, self._special, self.clock)

    def with_special(self, tokens: Iterable[str]) -> HuggingFaceTokenizer:
        """Return one to which these of its added tokens are special: texts that look like them stay text."""
        more = [token for token in tokens if token in self.added_tokens and token not in self._special_ids]
        return _remade(self._given, (*self._special, *more), self.clock) if more else self

    def at(self, clock: str | None) -> HuggingFaceTokenizer:
        """Return one whose chat template writes the date of this moment, in ISO format."""
        return self if clock in (None, self.clock) else _remade(self._given, self._special, clock)

    def chat_template(self, *, tools: bool = False) -> str:
        """Return the chat template's source, with the date of `clock` in place of today's.

        ValueError where it computes the date's format, so that the date cannot be fixed.
        """
        source: str = self.chat.get_chat_template(tools=[{}] if tools else None)
        if self.clock is None:
            return source
        now = datetime.fromisoformat(self.clock)
        fixed = _CLOCK.sub(lambda call: repr(now.strftime(call[2])), source)
        if "strftime_now(" in fixed:
            raise ValueError(
                f"tokenizer {self.name!r}: its chat template computes the format of the date that it writes, so the "
                "date would change while the run lasts; write the format as a string in the template"
            )
        return fixed

    @cached_property
    def stop_tokens(self) -> tuple[str, ...]:
        """The added tokens at which generation stops: eos_token, and those of a generation config on this machine."""
        import transformers

        numbers = {getattr(self.chat, "eos_token_id", None)}
        if getattr(self.chat, "name_or_path", ""):
            try:
                config = transformers.GenerationConfig.from_pretrained(self.chat.name_or_path, local_files_only=True)
            # There is none.
            except (OSError, ValueError):
                pass
            else:
                stops = config.eos_token_id
                numbers |= set(stops) if isinstance(stops, (list, tuple)) else {stops}
        return tuple(sorted(token for token, number in self.added_tokens.items() if number in numbers))

    def encode_whole(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of `text` as the tokenizer itself has them, special tokens found in it, and their characters.

        The characters of a token are those from its first to before its second number.
        """
        encoding = self._whole.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    @cached_property
    def _whole(self) -> Any:
        core = type(self._core).from_str(self._core.to_str())
        core.encode_special_tokens = False
        return core

    def _find_bos(self, own: int | None) -> int:
        if own is not None:
            return own
        names = [name for name in BOS_TOKENS if name in self._special_ids]
        if not names:
            raise ValueError(
                f"tokenizer {self.name!r} has no bos_token, and none of {', '.join(BOS_TOKENS)}, with one of which "
                "plain texts begin and rows are padded; set its bos_token to one of its special tokens."
            )
        return self._special_ids[names[0]]

    def fingerprint(self) -> str:
        """Return a digest of all that decides which ids a text or a conversation has."""
        # What a tokenizer holds besides, such as its name or the length that it was made for, decides nothing here.
        parts: tuple[Any, ...] = (self._core.to_str(), self.bos_id, getattr(self.chat, "chat_template", None))
        if self.clock:
            parts += (self.chat_template(), self.chat_template(tools=True))
        if self.chat is not None and len(self.stop_tokens) > 1:
            parts += (self.stop_tokens,)
        return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def special_tokens(self) -> Set[str]:
        """The special tokens by name."""
        return self._special_ids.keys()

    def special_id(self, token: str) -> int:
        """Return the id of the special token `token`. ValueError where it has none, naming those it has."""
        if token in self._special_ids:
            return self._special_ids[token]
        known = ", ".join(list(self._special_ids)[:20]) + (", …" if len(self._special_ids) > 20 else "")
        raise ValueError(
            f"tokenizer {self.name!r} has no special token {token!r}; it has: {known or 'none'}. "
            "Give a tokenizer that has it."
        )

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, (n,) uint32, without those that the tokenizer would put around it.

        A lone surrogate becomes U+FFFD.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str | bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all texts in a row, (n,) uint32, and offsets, (len(texts) + 1,) int64.

        The ids of text i are `ids[offsets[i] : offsets[i + 1]]`: what `encode` gives for it alone. Ids that are known
        already may stand among the texts, as bytes of uint32s.
        """
        to_encode = [text for text in texts if isinstance(text, str)]
        try:
            encodings = self._core.encode_batch_fast(to_encode, add_special_tokens=False)
        except TypeError:
            # That is how it refuses a lone surrogate. The same mending as in tiktoken's encode_ordinary.
            mended = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in to_encode]
            encodings = self._core.encode_batch_fast(mended, add_special_tokens=False)
        encoded = iter([np.array(encoding.ids, np.uint32) for encoding in encodings])
        arrays = [np.frombuffer(text, np.uint32) if isinstance(text, bytes) else next(encoded) for text in texts]
        offsets = np.fromiter(accumulate(map(len, arrays), initial=0), np.int64, len(arrays) + 1)
        return (np.concatenate(arrays) if arrays else np.empty(0, np.uint32)), offsets

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of `ids`: special tokens by their names, U+FFFD for broken UTF-8."""
        numbers = np.asarray(ids).tolist()
        size, token_of = self.vocab_size, self._core.id_to_token
        # An id that is not used would vanish from the text.
        if not all(isinstance(n, int) and 0 <= n < size and token_of(n) is not None for n in numbers):
            raise ValueError(
                f"tokenizer {self.name!r} cannot decode these ids; give a flat sequence of its ids, "
                f"from 0 to {size - 1}."
            )
        text: str = self._core.decode(numbers, skip_special_tokens=False)
        return text


def _remade(given: Any, special: Sequence[str], clock: str | None) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(given, special=special, clock=clock)


def _flagged(core: str, special: Sequence[str]) -> str:
    """Return the core's JSON with these added tokens flagged special."""
    if not special:
        return core
    settings = json.loads(core)
    for token in settings["added_tokens"]:
        token["special"] = token["special"] or token["content"] in special
    return json.dumps(settings)
