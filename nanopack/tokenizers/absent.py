"""Stand in for the tokenizer of documents that are tokens already, where none was given.

what a token store says of its tokenizer   ->   NoTokenizer   ->   what a rendered document asks of one
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class NoTokenizer:
    """What stands for the tokenizer of documents that are tokens already, where none was given."""

    encoder = "none"
    special_tokens: frozenset[str] = frozenset()
    added_tokens: frozenset[str] = frozenset()
    clock = ""

    def __init__(self, vocab_size: int, bos_id: int, digest: str, name: str) -> None:
        self.vocab_size, self.bos_id, self.name = vocab_size, bos_id, name or "of a token store"
        self._digest = digest

    def fingerprint(self) -> str:
        """Return the fingerprint of the tokenizer that made the documents."""
        return self._digest

    def encode_batch(self, texts: Sequence[str | bytes]) -> Any:
        """Raise ValueError: there is nothing to encode with."""
        raise ValueError("there is no tokenizer to encode a text with; give Loader the one that made the store")

    def decode(self, ids: Any) -> str:
        """Raise ValueError: there is nothing to decode with."""
        raise ValueError("there is no tokenizer to decode ids with; give Loader the one that made the store")
