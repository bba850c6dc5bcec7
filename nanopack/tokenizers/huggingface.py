"""Turn texts into token ids with a fast Hugging Face tokenizer, with the interface that tiktoken's have.

    transformers tokenizer, tokenizers.Tokenizer   ->   HuggingFaceTokenizer   ->   tokenizer.py, render/hf_template.py
                                                        byte_level.py encodes where it can

Text that looks like a special token stays text. A byte-level BPE is encoded by tiktoken, and one text in a thousand is
compared with the tokenizer's own ids; any other is encoded by its Rust core. Nothing of transformers or tokenizers is
imported: what is given brings its own code.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from datetime import datetime
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from nanopack.errors import EncoderError
from nanopack.tokenizers.added_tokens import AddedTokens, Found
from nanopack.tokenizers.buffers import as_buffer, due_texts, joined, mended_text
from nanopack.tokenizers.byte_level import REMEDY, ByteLevel, describe_difference
from nanopack.tokenizers.byte_tables import NotByteLevel
from nanopack.tokenizers.core import Core
from nanopack.tokenizers.rank_files import first_line

Faster: TypeAlias = Callable[[ByteLevel], ByteLevel]
# What a beginning of sequence may be called where the tokenizer does not say which it is.
BOS_TOKENS = ("<|bos|>", "<|begin_of_text|>", "<|endoftext|>", "<s>")
# Every n-th text is compared with the tokenizer's own ids, starting with the first of each process.
SPOT_CHECK = 1000
# A chat template asks for today's date so.
_CLOCK = re.compile(r"\bstrftime_now\s*\(\s*(['\"])(.*?)\1\s*\)")
# Or it asks whether it could: what is left otherwise is a date by another way.
_OTHER_CLOCK = re.compile(r"\bstrftime_now\b(?!\s+is\s+(not\s+)?(un)?defined\b)")
_RANDOM = re.compile(r"\|\s*random\b")


def is_hugging_face(tokenizer: object) -> bool:
    """Return whether this is an object of transformers or tokenizers."""
    return any(cls.__module__.split(".")[0] in ("transformers", "tokenizers") for cls in type(tokenizer).__mro__)


class HuggingFaceTokenizer:
    """A `transformers.PreTrainedTokenizerFast` or a `tokenizers.Tokenizer`, seen as nanopack's `Tokenizer` is.

    Tokens that were added without being special, such as the `<think>` of some, are found in every text, as the
    tokenizer itself finds them, unless `with_special` names them.
    """

    name: str
    core: Core
    """Its Rust core as it was given."""
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

    def __init__(
        self,
        tokenizer: Any,
        *,
        special: Sequence[str] = (),
        clock: str | None = None,
        core: Core | None = None,
        training: bool = False,
        faster: Faster | None = None,
    ) -> None:
        """Take `tokenizer`. ValueError where it has no fast core (a slow one), or no beginning of sequence.

        `special`: added tokens that count as special though they are not marked so. `clock`: now, if not given.
        `core`: its core, if known. `training`: its chat template is the one that trl trains by in place of its own.
        `faster`: makes a faster encoder of its byte-level one.
        """
        self._given, self._special, self._training = tokenizer, tuple(special), training
        self._faster = faster
        given = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self.name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        self.chat = None if given is tokenizer else _for_training(tokenizer) if training else tokenizer
        if not hasattr(given, "encode_batch_fast"):
            raise ValueError(
                f"tokenizer {self.name!r} is a Hugging Face tokenizer without a fast core; give a "
                "transformers.PreTrainedTokenizerFast or a tokenizers.Tokenizer (tokenizers>=0.20)."
            )
        self.core = core or Core(given)
        added = given.get_added_tokens_decoder()
        self.added_tokens = {token.content: number for number, token in added.items()}
        self._special_ids: Mapping[str, int] = {
            t.content: number for number, t in added.items() if t.special or t.content in special
        }
        self._added, self._not_special = AddedTokens(added), AddedTokens(added, self._special_ids.keys())
        self.vocab_size = self.core.vocab_size
        self.bos_id = self._find_bos(getattr(tokenizer, "bos_token_id", None))
        dated = "strftime_now" in str(getattr(self.chat, "chat_template", None))
        self.clock = (clock or datetime.now().isoformat(timespec="seconds")) if dated else None
        self._encoded = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what was given: the core would forget that special tokens are text."""
        return _unpickled, (self._given, self._special, self.clock, self._training, self._faster)

    @cached_property
    def byte_level(self) -> ByteLevel | None:
        """What encodes texts in place of the tokenizer; None where only the tokenizer itself can."""
        found = self.core.byte_level
        # Its tokens that stand in a word only would have to be looked for in the words.
        if not isinstance(found, ByteLevel) or self._added.single_words:
            return None
        return self._faster(found) if self._faster else found

    @property
    def encoder(self) -> str:
        """What encodes texts: "tiktoken", with encoder="fast" "splintr-rs", or "tokenizers" and why."""
        if self.byte_level:
            return self.byte_level.encoder
        why = self.core.byte_level
        return f"tokenizers: {why if isinstance(why, NotByteLevel) else 'it has added tokens of single_word=True'}"

    @cached_property
    def _core(self) -> Any:
        """A copy of the core in which special tokens are text."""
        copy = self.core.with_special(self._special)
        copy.encode_special_tokens = True
        return copy

    def with_special(self, tokens: Iterable[str]) -> HuggingFaceTokenizer:
        """Return one to which these of its added tokens are special: texts that look like them stay text."""
        more = [token for token in tokens if token in self.added_tokens and token not in self._special_ids]
        return self._remade(special=(*self._special, *more)) if more else self

    def at(self, clock: str | None) -> HuggingFaceTokenizer:
        """Return one whose chat template writes the date of this moment, in ISO format."""
        return self if clock in (None, self.clock) else self._remade(clock=clock)

    def for_training(self) -> HuggingFaceTokenizer:
        """Return one whose chat template is the one that trl trains by: answers are marked in it.

        ImportError without trl; ValueError where the tokenizer has no chat template, or trl knows none in its place.
        """
        return self if self._training else self._remade(training=True)

    def encoded_by(self, faster: Faster) -> HuggingFaceTokenizer:
        """Return one whose texts are encoded by what `faster` makes of its byte-level encoder."""
        return self._remade(faster=faster)

    def _remade(self, **changed: Any) -> HuggingFaceTokenizer:
        same: dict[str, Any] = {"special": self._special, "clock": self.clock, "core": self.core}
        same |= {"training": self._training, "faster": self._faster}
        return HuggingFaceTokenizer(self._given, **{**same, **changed})

    def chat_template(self, *, tools: bool = False) -> str:
        """Return the chat template's source, with the date of `clock` in place of today's.

        ValueError where it computes the date's format, so that the date cannot be fixed, or draws at random.
        """
        source: str = self.chat.get_chat_template(tools=[{}] if tools else None)
        if drawn := _RANDOM.search(source):
            raise ValueError(
                f"tokenizer {self.name!r}: its chat template draws at random ({drawn[0]!r}), so that a conversation "
                "would not have the same tokens again; take that out of the template"
            )
        if self.clock is None:
            return source
        now = datetime.fromisoformat(self.clock)
        fixed = _CLOCK.sub(lambda call: repr(now.strftime(call[2])), source)
        if _OTHER_CLOCK.search(fixed):
            raise ValueError(
                f"tokenizer {self.name!r}: its chat template computes the format of the date that it writes, or calls "
                "strftime_now by another name, so the date would change while the run lasts; write "
                "strftime_now('...') with the format as a string in the template"
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
        encoding = self.core.plain().encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def cut(self, text: str) -> list[Found]:
        """Return the added tokens, special or not, that the tokenizer finds in `text`."""
        return self._added.cut(text)

    def _find_bos(self, own: int | None) -> int:
        if own is not None:
            return own
        names = [name for name in BOS_TOKENS if name in self._special_ids]
        if not names:
            raise ValueError(
                f"tokenizer {self.name!r} has no bos_token, and none of {', '.join(BOS_TOKENS)}, with one of which "
                "plain texts begin and rows are padded; set its bos_token (on disk: in tokenizer_config.json) to one."
            )
        return self._special_ids[names[0]]

    def fingerprint(self) -> str:
        """Return a digest of all that decides which ids a text or a conversation has."""
        # What a tokenizer holds besides, such as its name or the length that it was made for, decides nothing here.
        settings = self._core.to_str() if self._special else self.core.settings
        parts: tuple[Any, ...] = (settings, self.bos_id, getattr(self.chat, "chat_template", None))
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

    def encode_batch(self, texts: Sequence[str | bytes], *, are_cut: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all texts in a row, (n,) uint32, and offsets, (len(texts) + 1,) int64.

        The ids of text i are `ids[offsets[i] : offsets[i + 1]]`: what `encode` gives for it alone. Ids that are known
        already may stand among the texts, as bytes of uint32s. `are_cut`: no added token is in the texts. EncoderError
        where a spot check finds ids that differ from the tokenizer's own.
        """
        if self.byte_level is None:
            return joined(self._encode_each(texts))
        strings = [text for text in texts if isinstance(text, str)]
        if not self.byte_level.takes(strings):
            texts = [text if self._takes(text) else self._encode_each([text])[0] for text in texts]
        if are_cut:
            ids, offsets = joined(self.byte_level.encode_each(texts))
        else:
            ids, offsets = self._encode_uncut(self.byte_level, texts)
        self._check_some(texts, ids, offsets)
        self._encoded += len(strings)
        return ids, offsets

    def _takes(self, text: str | bytes) -> bool:
        assert self.byte_level
        return isinstance(text, bytes) or self.byte_level.takes([text])

    def _check_some(self, texts: Sequence[str | bytes], ids: np.ndarray, offsets: np.ndarray) -> None:
        """Raise EncoderError where a text that is due has other ids than the tokenizer's own."""
        for place in due_texts(texts, self._encoded, SPOT_CHECK):
            text = str(texts[place])
            got = ids[offsets[place] : offsets[place + 1]].tolist()
            if difference := describe_difference(text, self.encode_exactly([text])[0], got):
                raise EncoderError(f"{difference}; {REMEDY}")

    def encode_exactly(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts as the tokenizer's own core has them, special tokens being text."""
        mended = [mended_text(text) for text in texts]
        # The copy takes a second to make, and most texts need none.
        if not self._special_ids or not any(self._added.within(text) for text in mended):
            return self.core.encode(mended)
        return [found.ids for found in self._core.encode_batch_fast(mended, add_special_tokens=False)]

    def _encode_each(self, texts: Sequence[str | bytes]) -> list[bytes]:
        exact = iter(self.encode_exactly([text for text in texts if isinstance(text, str)]))
        return [text if isinstance(text, bytes) else as_buffer(next(exact)) for text in texts]

    def _encode_uncut(self, fast: ByteLevel, texts: Sequence[str | bytes]) -> tuple[np.ndarray, np.ndarray]:
        pieces: list[str | bytes] = []
        ends = [0]
        for text in texts:
            if isinstance(text, bytes) or not self._not_special.within(text):
                pieces.append(text)
            else:
                pieces += self._cut_at_tokens(text)
            ends.append(len(pieces))
        ids, offsets = joined(fast.encode_each(pieces))
        return ids, offsets if len(pieces) == len(texts) else offsets[ends]

    def _cut_at_tokens(self, text: str) -> list[str | bytes]:
        """Return the text in pieces, with the ids of the added tokens in it that are not special."""
        pieces: list[str | bytes] = []
        done = 0
        for token in self._not_special.cut(text):
            pieces += (text[done : token.begin], as_buffer([token.id]))
            done = token.end
        return [*pieces, text[done:]]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of `ids`: special tokens by their names, U+FFFD for broken UTF-8."""
        numbers = np.asarray(ids).tolist()
        size, token_of = self.vocab_size, self.core.given.id_to_token
        # An id that is not used would vanish from the text.
        if not all(isinstance(n, int) and 0 <= n < size and token_of(n) is not None for n in numbers):
            raise ValueError(
                f"tokenizer {self.name!r} cannot decode these ids; give a flat sequence of its ids, "
                f"from 0 to {size - 1}."
            )
        text: str = self.core.given.decode(numbers, skip_special_tokens=False)
        return text


def _unpickled(
    given: Any, special: Sequence[str], clock: str | None, training: bool, faster: Faster | None
) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(given, special=special, clock=clock, training=training, faster=faster)


def _for_training(chat: Any) -> Any:
    """Return a copy with the chat template that trl trains by."""
    try:
        from trl.chat_template_utils import get_training_chat_template
    except ModuleNotFoundError as error:
        raise ImportError("template='hf-training' needs trl; pip install 'nanopack-gpu[hf]'") from error
    if not chat.chat_template:
        raise ValueError(
            "template='hf-training' is trl's in place of a tokenizer's own; it has none: use another template"
        )
    try:
        # None: its own marks the answers already
        source = get_training_chat_template(chat) or chat.chat_template
    except ValueError as error:
        raise ValueError(f"template='hf-training': {first_line(error)}") from error
    trained = copy.copy(chat)
    trained.chat_template = source
    return trained
