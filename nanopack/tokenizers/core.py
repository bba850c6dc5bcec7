"""Keep the Rust core of a Hugging Face tokenizer as it was given, and what is made of it once.

    tokenizers.Tokenizer   ->   Core   ->   huggingface.py: ids by the core itself, or by byte_level.py

The tokenizer may be changed later by its owner: made to cut texts short, for instance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from nanopack.tokenizers.byte_level import ByteLevel
from nanopack.tokenizers.byte_tables import NotByteLevel


class Core:
    """The Rust core of a tokenizer as it was given, and what is made of it, once for all that share it."""

    def __init__(self, given: Any) -> None:
        self.given = given
        self._size = given.get_vocab_size(with_added_tokens=True)
        # Taking the vocabulary out of Rust takes a tenth of a second.
        self._vocab: dict[str, int] = given.get_vocab(with_added_tokens=False)
        numbers = *self._vocab.values(), *given.get_added_tokens_decoder()
        self.vocab_size = max(numbers, default=-1) + 1
        self.settings: str = given.to_str()
        if not self._is_plain():
            copy = type(given).from_str(self.settings)
            copy.no_truncation()
            copy.no_padding()
            self.settings = copy.to_str()

    def _is_plain(self) -> bool:
        given = self.given
        as_it_was = given.get_vocab_size(with_added_tokens=True) == self._size
        return bool(as_it_was and not (given.truncation or given.padding or given.encode_special_tokens))

    def plain(self) -> Any:
        """Return a core without truncation and padding that finds special tokens: the given one, while it is so.

        A copy takes a second to make. Its owner may switch truncation on at any time.
        """
        return self.given if self._is_plain() else self._copy

    @cached_property
    def _copy(self) -> Any:
        return type(self.given).from_str(self.settings)

    def with_special(self, special: Sequence[str]) -> Any:
        """Return a copy without truncation and padding to which these added tokens are special too."""
        if not special:
            return type(self.given).from_str(self.settings)
        settings = json.loads(self.settings)
        for token in settings["added_tokens"]:
            token["special"] = token["special"] or token["content"] in special
        return type(self.given).from_str(json.dumps(settings))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts, special tokens found in them."""
        return [found.ids for found in self.plain().encode_batch_fast(list(texts), add_special_tokens=False)]

    @cached_property
    def byte_level(self) -> ByteLevel | NotByteLevel:
        """Its encoding by tiktoken, or why there is none."""
        vocab, self._vocab = self._vocab, {}
        try:
            return ByteLevel(self.plain(), self.settings, vocab, self.vocab_size, self.encode)
        except NotByteLevel as error:
            return error
