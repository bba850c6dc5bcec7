"""Read conversations and make them what the packing gets: rendered, cut, as words.

    conversations.py, render.py   ->   Reader.read(indexes)   ->   a Read of each   ->   lane.py counts and packs
       by number         to tokens        a chunk at a time           workers.py does it in processes

A chunk takes each step together, so that what a step costs in Python falls on a conversation or a chunk, not on a
token. What goes wrong with a conversation is part of what is read, and told in its place in the order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice, pairwise

import numpy as np

from nanopack.config import LoaderConfig
from nanopack.conversations.records import Conversation, Source, check
from nanopack.render.renderer import Document, Plan, Renderer
from nanopack.ring.layout import Layout
from nanopack.tokenizers.tokenizer import AnyTokenizer

# Conversations of a chunk: enough that what a chunk costs is nothing beside the tokenizing.
CHUNK = 32
# Tokens of a chunk, at most, where nothing is read ahead: it is waited for.
CHUNK_TOKENS = 1 << 14


@dataclass
class Read:
    """A conversation as it was read."""

    index: int
    """Its number in the data set."""
    words: np.ndarray | None = None
    """(n,) uint16 or uint32: what waits for a row, see ring.py; None where it is dropped, or bad."""
    tokens: int = 0
    """Of the document, before anything was cut."""
    cut: dict[str, int] = field(default_factory=dict)
    """Tokens that were cut off, by reason."""
    weight: float = 1.0
    """Loss weight of each trained token."""
    own_weight: float = 1.0
    """The conversation's own weight, which that follows from."""
    error: BaseException | None = None
    """What is wrong with it."""


class Reader:
    """Reads conversations by number. Nothing in it changes, so that any process may do it."""

    def __init__(self, source: Source, tokenizer: AnyTokenizer, config: LoaderConfig, layout: Layout) -> None:
        """See `Renderer` for what it raises."""
        self._arguments = source, tokenizer, config, layout
        self._source = source
        self._config = config
        self._word_dtype = layout.word_dtype
        self._loss_bit = layout.word_dtype.type(layout.loss_bit)
        self.render = Renderer(tokenizer, config.template, config.loss, config.first_assistant)

    def __reduce__(self) -> tuple[type[Reader], tuple[Source, AnyTokenizer, LoaderConfig, Layout]]:
        # closures do not pickle
        return Reader, self._arguments

    def read(self, indexes: Iterable[int]) -> list[Read]:
        """Return the conversations of these numbers, or what is wrong with them, in this order."""
        reads = [Read(index) for index in indexes]
        planned: list[tuple[Read, Conversation]] = []
        plans: list[Plan | Document] = []
        for read in reads:
            try:
                conversation = check(self._source[read.index])
                plans.append(self.render.plan(conversation))
            # an exit in a data set is no Exception, and must not be lost
            except BaseException as error:
                read.error = error
            else:
                read.own_weight = conversation.weight
                planned.append((read, conversation))
        try:
            self._prepare([read for read, _ in planned], self.render.fill_in(plans))
        except KeyboardInterrupt:
            raise
        # of one of them, but which? nor is a panic of a tokenizer an Exception
        except BaseException:
            for read, conversation in planned:
                self._read_alone(read, conversation)
        return reads

    def _read_alone(self, read: Read, conversation: Conversation) -> None:
        try:
            self._prepare([read], [self.render(conversation)])
        except BaseException as error:
            read.error = error

    def _prepare(self, reads: Sequence[Read], documents: Sequence[Document]) -> None:
        """Cut documents and decide which of their tokens are trained, as the config says; tell it in their `reads`."""
        if not documents:
            return
        config = self._config
        lengths = []
        for read, document in zip(reads, documents, strict=True):
            read.tokens = length = len(document.ids)
            for reason, limit in config.limits:
                if length > limit:
                    read.cut[reason] = length - limit
                    length = limit
            lengths.append(length)
        kept = list(zip(documents, lengths, strict=True))
        words = np.concatenate([document.ids[:n] for document, n in kept], dtype=self._word_dtype, casting="unsafe")
        mask = np.ones(len(words), bool)
        if config.loss != "all":
            np.concatenate([document.mask[:n] for document, n in kept], out=mask)
        begins = list(accumulate(lengths, initial=0))
        if not config.boundary_loss:
            mask[begins[:-1]] = False
        words |= np.multiply(mask, self._loss_bit, dtype=words.dtype)
        # no document is empty
        trained = np.add.reduceat(mask, begins[:-1], dtype=np.int64).tolist()
        for read, (begin, end), count in zip(reads, pairwise(begins), trained, strict=True):
            if count or not config.drops_untrained:
                read.words = words[begin:end]
                read.weight = weigh(config, read.own_weight, count)


def read_in_turn(
    reader: Reader, indexes: Iterable[int], *, batch_tokens: int, tell: Callable[[int], None] | None
) -> Iterator[Read]:
    """Yield the conversations of these numbers; read them here, ahead by a small chunk that is no more than a batch.

    `tell` is called with the first number of each chunk before it is read. None stands for the trainer's own process,
    where Ctrl-C is no fault of a conversation, and does not wait for its place.
    """
    numbers, size, most = iter(indexes), 1, min(CHUNK_TOKENS, batch_tokens)
    while part := list(islice(numbers, size)):
        if tell is not None:
            tell(part[0])
        reads = reader.read(part)
        for read in reads if tell is None else ():
            if isinstance(read.error, KeyboardInterrupt):
                raise read.error
        yield from reads
        # as long as these, so many would be enough
        size = max(1, min(CHUNK, most * len(part) // max(1, sum(read.tokens for read in reads))))


def weigh(config: LoaderConfig, own_weight: float, trained: int) -> float:
    """Return the loss weight of each trained token of a document that has so many."""
    if config.loss_weights == "conversation":
        return own_weight / trained if trained else 0.0
    return 1.0 if config.loss_weights is None else own_weight
