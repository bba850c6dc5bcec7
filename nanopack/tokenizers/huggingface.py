"""Turn texts into token ids with a fast Hugging Face tokenizer, through the calls that tiktoken's are made of too.

    transformers tokenizer, tokenizers.Tokenizer   ->   HuggingFaceTokenizer   ->   tokenizers.py, chat_template.py

Works on a copy of the tokenizer's Rust core, outside the GIL, in which text that looks like a special token stays
text. Nothing of transformers or tokenizers is imported: what is given brings its own code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence, Set
from itertools import accumulate
from typing import Any

import numpy as np

# What a beginning of sequence may be called where the tokenizer does not say which it is.
BOS_TOKENS = ("<|bos|>", "<|begin_of_text|>", "<|endoftext|>", "<s>")


def is_hugging_face(tokenizer: object) -> bool:
    """Return whether this is an object of transformers or tokenizers."""
    return any(cls.__module__.split(".")[0] in ("transformers", "tokenizers") for cls in type(tokenizer).__mro__)


class HuggingFaceTokenizer:
    """A `transformers.PreTrainedTokenizerFast` or a `tokenizers.Tokenizer`, seen as nanopack's `Tokenizer` is.

    Tokens that were added without being special, such as the `<think>` of some, are found in every text, as the
    tokenizer itself finds them.
    """

    name: str
    vocab_size: int
    """One more than the largest id, special tokens included. Some ids below may be unused."""
    bos_id: int
    """Id of the tokenizer's own bos_token, else of the first of BOS_TOKENS that there is."""
    chat: Any
    """The transformers tokenizer, which may have a chat template; None where a bare one was given."""

    def __init__(self, tokenizer: Any) -> None:
        """Copy the core of `tokenizer`. ValueError where it has none (a slow one), or no beginning of sequence."""
        self._given = tokenizer
        core = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self.name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        self.chat = None if core is tokenizer else tokenizer
        if not hasattr(core, "encode_batch_fast"):
            raise ValueError(
                f"tokenizer {self.name!r} is a Hugging Face tokenizer without a fast core; give a "
                "transformers.PreTrainedTokenizerFast or a tokenizers.Tokenizer (tokenizers>=0.20)."
            )
        # A copy: the switch below, truncation and padding belong to whoever gave it.
        self._core = type(core).from_str(core.to_str())
        self._core.encode_special_tokens = True
        self._core.no_truncation()
        self._core.no_padding()
        added = self._core.get_added_tokens_decoder()
        self._special_ids: Mapping[str, int] = {t.content: number for number, t in added.items() if t.special}
        self.vocab_size = max(self._core.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_id = self._find_bos(getattr(tokenizer, "bos_token_id", None))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what was given: the core would forget that special tokens are text."""
        return HuggingFaceTokenizer, (self._given,)

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
        parts = (self._core.to_str(), self.bos_id, getattr(self.chat, "chat_template", None))
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
