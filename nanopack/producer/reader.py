"""Read conversations by index and prepare them for packing: render, truncate, encode as token words.

    conversations/, render/   ->   Reader.read(indices)   ->   a Chunk of documents   ->   shard.py counts and packs
                                    workers.py does so in processes

A chunk takes each step as a whole, so that what a step costs in Python falls on a conversation or a chunk, not on a
token. An error is part of what is read, and is reported when its conversation's turn comes.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, islice, pairwise
from typing import NamedTuple

import numpy as np

from nanopack.config import LoaderConfig
from nanopack.conversations.fetch import fetch, peek, random_numbers_kept, storage_error
from nanopack.conversations.records import Conversation, check
from nanopack.conversations.source import Source
from nanopack.errors import StorageError, TemplateError, is_storage_error
from nanopack.render.document import Document, Plan
from nanopack.render.renderer import Renderer, missing_tokens
from nanopack.ring.layout import Layout
from nanopack.tokenizers.tokenizer import AnyTokenizer

# Conversations of a chunk: enough that its fixed cost is nothing next to the tokenizing.
CHUNK = 32
# Most tokens of a chunk where nothing is read ahead and the trainer waits for it.
CHUNK_TOKENS = 1 << 14
_NO_WORDS = np.empty(0, np.uint16)
# What ignored keys call a conversation's own weight where loss_weights is None.
UNUSED_WEIGHT = "weight (loss_weights is None)"
# What ignored keys call a thought that a chat template leaves out once the next question was asked.
EARLIER_THOUGHT = "thought of an earlier turn"


@dataclass(eq=False)
class ReadDocument:
    """A conversation as it was read, on its way from the reader to a slot. Equal only to itself."""

    conversation: int
    """Index in the data set."""
    words: np.ndarray = field(default_factory=lambda: _NO_WORDS)
    """(n,) uint16 or uint32: token ids with the loss bit on top, see ring/layout.py; none where there is an error."""
    num_tokens: int = 0
    """Before anything was cut."""
    cut: dict[str, int] = field(default_factory=dict)
    """Tokens cut off, by reason."""
    weight: float = 1.0
    """Loss weight of each of its tokens in the loss."""
    own_weight: float = 1.0
    """The conversation's own weight, from which `weight` follows."""
    dropped: bool = False
    """Whether it is dropped because nothing in it is in the loss."""
    error: BaseException | None = None
    """What is wrong with it."""
    read: int = -1
    """Number of the read in its shard."""
    source: int = 0
    """Which source of a mixture it is from."""
    taken: int = 0
    """Tokens of it that are in rows so far."""
    ignored_keys: tuple[str, ...] = ()
    """Keys of its record that nothing reads."""
    special_token: str = ""
    """A special token of the tokenizer that its plain text spells."""

    @cached_property
    def checksum(self) -> bytes:
        """CRC32 of the words, 4 bytes."""
        return zlib.crc32(self.words.data).to_bytes(4, "little")


class Chunk(NamedTuple):
    """Documents that were read together."""

    documents: list[ReadDocument]
    words: np.ndarray
    """(n,) uint16 or uint32: the words of all documents, end to end; their own are views of it."""


class Reader:
    """Reads conversations by index. Nothing in it changes, so any process may use it."""

    def __init__(self, source: Source, tokenizer: AnyTokenizer, config: LoaderConfig) -> None:
        """Raise as `Renderer` and `Layout` do."""
        self.source = source
        self.tokenizer = tokenizer
        self.config = config
        self.layout = _layout(config, tokenizer.vocab_size)
        template = "nanochat" if source.rendered else config.template
        self.render = Renderer(tokenizer, template, config.loss, config.first_assistant)
        self._loss_bit = self.layout.word_dtype.type(self.layout.loss_bit)
        self._special = re.compile("|".join(map(re.escape, sorted(tokenizer.special_tokens))) or r"(?!)")

    def __reduce__(self) -> tuple[type[Reader], tuple[Source, AnyTokenizer, LoaderConfig]]:
        # closures do not pickle
        return Reader, (self.source, self.tokenizer, self.config)

    def check_template(self) -> None:
        """Raise TemplateError where the first conversation needs special tokens that the tokenizer lacks.

        So the tokenizer is refused at once, rather than with the first batch, where the data begin with messages.
        """
        if not missing_tokens(self.tokenizer, self.config.template):
            return
        try:
            self.render(check(peek(self.source, 0, self.config.seed)))
        except TemplateError:
            raise
        except Exception:
            # whatever else is wrong with it is reported when its turn comes
            return

    def read(self, indices: Iterable[int]) -> Chunk:
        """Return the conversations of these indices, or what is wrong with them, in this order."""
        with random_numbers_kept(self.source):
            return self._read(indices)

    def _read(self, indices: Iterable[int]) -> Chunk:
        documents = [ReadDocument(index) for index in indices]
        planned: list[tuple[ReadDocument, Conversation]] = []
        plans: list[Plan | Document] = []
        unreadable: StorageError | None = None
        for document in documents:
            # it ends the run at its turn, and each further try would wait
            if unreadable is not None:
                document.error = unreadable
                continue
            try:
                conversation = check(fetch(self.source, document.conversation, self.config.seed))
                plan = self.render.plan(conversation)
                plans.append(plan)
            # SystemExit in a data set is no Exception, and must not be lost
            except BaseException as error:
                document.error = error
                if is_storage_error(error):
                    document.error = unreadable = storage_error(error, self.source.where(document.conversation))
            else:
                document.own_weight = conversation.weight
                document.ignored_keys = conversation.ignored_keys
                if self.config.loss_weights is None and conversation.weight not in (0, 1):
                    document.ignored_keys += (UNUSED_WEIGHT,)
                # with turns="each" it was in the loss of the answer that it belongs to
                if plan.forgets and self.config.turns == "all":
                    document.ignored_keys += (EARLIER_THOUGHT,)
                if conversation.text is not None and (found := self._special.search(conversation.text)):
                    document.special_token = found[0]
                planned.append((document, conversation))
        try:
            rendered = self.render.fill_in(plans)
        except KeyboardInterrupt:
            raise
        # one of them is at fault, but which? a tokenizer's panic is no Exception either
        except BaseException:
            alone = zip(planned, plans, strict=True)
            rendered = [one for (document, said), plan in alone for one in self._fill_in_alone(document, said, plan)]
        sound = [document for document, _ in planned if document.error is None]
        return Chunk(documents, self._prepare(sound, rendered))

    def _fill_in_alone(
        self, document: ReadDocument, conversation: Conversation, plan: Plan | Document
    ) -> list[Document]:
        try:
            # of the same plan: a new one need not be compared with what the chat template writes
            return [self.render.fill_in_one(plan, conversation)]
        except BaseException as error:
            document.error = error
            return []

    def _prepare(self, documents: Sequence[ReadDocument], rendered: Sequence[Document]) -> np.ndarray:
        """Cut the rendered documents and mark their tokens in the loss; return the words of all, end to end."""
        if not documents:
            return np.empty(0, self.layout.word_dtype)
        config = self.config
        lengths = []
        for document, one in zip(documents, rendered, strict=True):
            document.num_tokens = length = len(one.ids)
            for reason, limit in config.limits:
                if length > limit:
                    document.cut[reason] = length - limit
                    length = limit
            lengths.append(length)
        kept = list(zip(rendered, lengths, strict=True))
        words = np.concatenate([one.ids[:n] for one, n in kept], dtype=self.layout.word_dtype, casting="unsafe")
        in_loss = np.ones(len(words), bool)
        if config.loss != "all":
            np.concatenate([one.mask[:n] for one, n in kept], out=in_loss)
        begins = list(accumulate(lengths, initial=0))
        if not config.boundary_loss:
            in_loss[begins[:-1]] = False
        words |= np.multiply(in_loss, self._loss_bit, dtype=words.dtype)
        # no document is empty
        counts = np.add.reduceat(in_loss, begins[:-1], dtype=np.int64).tolist()
        for document, (begin, end), count in zip(documents, pairwise(begins), counts, strict=True):
            document.words = words[begin:end]
            document.dropped = not count and config.drops_untrained
            document.weight = weigh(config, document.own_weight, count)
        return words


def _layout(config: LoaderConfig, vocab_size: int) -> Layout:
    return Layout.of(
        config.batch_size,
        config.seq_len,
        vocab_size,
        pieces=config.loss_weights is not None or "positions" in config.extras or "doc_ids" in config.extras,
        max_pieces=config.max_pieces if "cu_seqlens" in config.extras else None,
    )


def read_in_turn(
    reader: Reader,
    indices: Iterable[int],
    *,
    batch_tokens: int,
    on_chunk: Callable[[int], None] | None = None,
    raise_interrupts: bool = False,
) -> Iterator[ReadDocument]:
    """Yield the conversations of these indices, read here, ahead by a small chunk of at most a batch's tokens.

    `on_chunk` is called with the first index of each chunk before it is read. `raise_interrupts`: in the trainer's own
    process Ctrl-C is no fault of a conversation, and is raised at once.
    """
    numbers, size, most = iter(indices), 1, min(CHUNK_TOKENS, batch_tokens)
    while part := list(islice(numbers, size)):
        if on_chunk is not None:
            on_chunk(part[0])
        documents = reader.read(part).documents
        for document in documents if raise_interrupts else ():
            if isinstance(document.error, KeyboardInterrupt):
                raise document.error
        yield from documents
        # as many as would fill a batch if they are as long as these
        tokens = sum(document.num_tokens for document in documents)
        size = max(1, min(CHUNK, most * len(part) // max(1, tokens)))


def weigh(config: LoaderConfig, own_weight: float, loss_tokens: int) -> float:
    """Return the loss weight of each token in the loss, of a document with `loss_tokens` of them."""
    if config.loss_weights == "conversation":
        return own_weight / loss_tokens if loss_tokens else 0.0
    return 1.0 if config.loss_weights is None else own_weight
