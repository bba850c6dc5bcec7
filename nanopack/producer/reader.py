"""Read conversations by index and prepare them for packing: render, truncate, encode as token words.

    conversations/, render/   ->   Reader.read(indices)   ->   a Chunk of documents   ->   arrivals.py, shard.py
                                    workers.py does so in processes

A chunk takes each step as a whole, so that what a step costs in Python falls on a conversation or a chunk, not on a
token. An error is part of what is read, and is reported when its conversation's turn comes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from nanopack.config import LoaderConfig
from nanopack.conversations.fetch import fetch, peek, random_numbers_kept, storage_error
from nanopack.conversations.records import Conversation, check
from nanopack.conversations.source import Source
from nanopack.errors import StorageError, TemplateError, interrupt_in, is_storage_error
from nanopack.producer.chunk import Chunk, Trouble
from nanopack.render.document import Document, Plan
from nanopack.render.renderer import Renderer, missing_tokens
from nanopack.ring.layout import Layout
from nanopack.ring.pieces import Marks
from nanopack.store.cache import Cache
from nanopack.store.rendering import as_rendered
from nanopack.tokenizers.tokenizer import AnyTokenizer

# Conversations of a chunk: enough that its fixed cost is nothing next to the tokenizing.
CHUNK = 32
# Most tokens of a chunk where nothing is read ahead and the trainer waits for it.
CHUNK_TOKENS = 1 << 15
# What ignored keys call a conversation's own weight where loss_weights is None.
UNUSED_WEIGHT = "weight (loss_weights is None)"
# What ignored keys call a thought that a chat template leaves out once the next question was asked.
EARLIER_THOUGHT = "thought of an earlier turn"


class Reader:
    """Reads conversations by index. Nothing in it changes, so any process may use it."""

    def __init__(
        self, source: Source, tokenizer: AnyTokenizer, config: LoaderConfig, cache: Cache | None = None
    ) -> None:
        """Raise as `Renderer` and `Layout` do. `cache` keeps what is rendered, until it is a store and is read."""
        self.source, self.cache = source, cache
        self._stored: Reader | None = None
        self.tokenizer = tokenizer
        self.config = config
        self.layout = _layout(config, tokenizer.vocab_size, tokenizer.bos_id)
        template = "nanochat" if source.rendered else config.template
        self.render = Renderer(tokenizer, template, config.loss, config.first_assistant)
        self._loss_bit = self.layout.word_dtype.type(self.layout.loss_bit)
        self._special = re.compile("|".join(map(re.escape, sorted(tokenizer.special_tokens))) or r"(?!)")

    def __reduce__(self) -> tuple[type[Reader], tuple[Source, AnyTokenizer, LoaderConfig, Cache | None]]:
        # closures do not pickle
        return Reader, (self.source, self.tokenizer, self.config, self.cache)

    def check_files(self) -> None:
        """Raise StorageError as `Source.check_files` does."""
        for part in self.source.parts:
            part.check_files()

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
        if self.cache is not None and self._stored is None and (stored := self.cache.stored()) is not None:
            self._stored = Reader(stored, self.tokenizer, self.config)
        if self._stored is not None:
            return self._stored.read(indices)
        with random_numbers_kept(self.source):
            return self._read(indices)

    def _read(self, indices: Iterable[int]) -> Chunk:
        numbers = list(indices)
        troubles: dict[int, Trouble] = {}
        planned: list[tuple[int, Conversation]] = []
        plans: list[Plan | Document] = []
        unreadable: StorageError | None = None
        for position, index in enumerate(numbers):
            # it ends the run at its turn, and each further try would wait
            if unreadable is not None:
                troubles[position] = Trouble(unreadable)
                continue
            try:
                conversation = check(fetch(self.source, index, self.config.seed))
                plan = self.render.plan(conversation)
            # SystemExit in a data set is no Exception, and must not be lost
            except BaseException as error:
                if is_storage_error(error):
                    unreadable = storage_error(error, self.source.where(index))
                troubles[position] = Trouble(unreadable or error)
            else:
                plans.append(plan)
                planned.append((position, conversation))
                if (trouble := self._trouble(conversation, plan)) is not None:
                    troubles[position] = trouble
        try:
            rendered = self.render.fill_in(plans)
        # one of them is at fault, but which? a tokenizer's panic is no Exception either
        except BaseException as error:
            if interrupt_in(error) is not None:
                raise
            rendered = self._fill_in_alone(planned, plans, troubles)
        if self.cache is not None:
            self._keep(self.cache, numbers, planned, rendered)
        return self._prepare(numbers, planned, rendered, troubles)

    def _trouble(self, conversation: Conversation, plan: Plan | Document) -> Trouble | None:
        """Return the note on a sound conversation; None where there is nothing to say."""
        keys, special_token, weight = conversation.ignored_keys, "", conversation.weight
        if self.config.loss_weights is None and weight not in (0, 1):
            keys += (UNUSED_WEIGHT,)
        # with turns="each" it was in the loss of the answer that it belongs to
        if plan.forgets and self.config.turns == "all":
            keys += (EARLIER_THOUGHT,)
        if conversation.text is not None and (found := self._special.search(conversation.text)):
            special_token = found[0]
        return Trouble(None, keys, special_token) if keys or special_token else None

    def _keep(
        self,
        cache: Cache,
        numbers: list[int],
        planned: Sequence[tuple[int, Conversation]],
        rendered: Sequence[Document],
    ) -> None:
        """Put documents into the cache, uncut."""
        cache.add(
            as_rendered(self.source, numbers[position], conversation, one, cache.settings)
            for (position, conversation), one in zip(planned, rendered, strict=True)
        )

    def _fill_in_alone(
        self,
        planned: list[tuple[int, Conversation]],
        plans: Sequence[Plan | Document],
        troubles: dict[int, Trouble],
    ) -> list[Document]:
        """Return the documents one by one; those that fail are no longer `planned`, but have an error."""
        rendered, sound = [], []
        for (position, conversation), plan in zip(planned, plans, strict=True):
            try:
                # of the same plan: a new one need not be compared with what the chat template writes
                rendered.append(self.render.fill_in_one(plan, conversation))
                sound.append((position, conversation))
            except BaseException as error:
                if interrupt_in(error) is not None:
                    raise
                troubles[position] = Trouble(error)
        planned[:] = sound
        return rendered

    def _prepare(
        self,
        numbers: list[int],
        planned: Sequence[tuple[int, Conversation]],
        rendered: Sequence[Document],
        troubles: dict[int, Trouble],
    ) -> Chunk:
        """Cut the rendered documents and mark their tokens in the loss."""
        num_tokens, counts = np.zeros((2, len(numbers)), np.int64)
        at = [position for position, _ in planned]
        num_tokens[at] = [len(one.ids) for one in rendered]
        lengths = num_tokens
        if self.config.limits and num_tokens.max(initial=0) > (limit := min(n for _, n in self.config.limits)):
            lengths = np.minimum(num_tokens, limit)
        ends = np.cumsum(lengths)
        words = np.empty(0, self.layout.word_dtype)
        if planned:
            begins = (ends - lengths)[at]
            words, in_loss = self._words(list(zip(rendered, lengths[at].tolist(), strict=True)), begins)
            # no document is empty
            counts[at] = np.add.reduceat(in_loss, begins, dtype=np.int64)
        own = None
        weights = [conversation.weight for _, conversation in planned]
        if weights.count(1.0) < len(weights):
            own = np.ones(len(numbers))
            own[at] = weights
        array = np.zeros(len(numbers), np.int64)
        conversations = np.array(numbers, np.int64)
        return Chunk(conversations, num_tokens, lengths, counts, own, [words], array, ends - lengths, troubles)

    def _words(self, kept: Sequence[tuple[Document, int]], begins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the words of documents, each cut to its length, end to end, and which are in the loss."""
        words = np.concatenate([one.ids[:n] for one, n in kept], dtype=self.layout.word_dtype, casting="unsafe")
        in_loss = np.ones(len(words), bool)
        if self.config.loss != "all":
            np.concatenate([one.mask[:n] for one, n in kept], out=in_loss)
        if not self.config.boundary_loss:
            in_loss[begins] = False
        words |= np.multiply(in_loss, self._loss_bit, dtype=words.dtype)
        return words, in_loss

    def marks(self, own_weights: np.ndarray | None) -> Marks | None:
        """Return the changes that a slot makes to the loss bits of pieces of documents of these weights: none."""
        return None

    def words(self, chunk: Chunk, position: int) -> np.ndarray:
        """Return the words of a document as a slot has them."""
        return chunk.words(position)


def _layout(config: LoaderConfig, vocab_size: int, pad_id: int) -> Layout:
    return Layout.of(
        config.batch_size,
        config.seq_len,
        vocab_size,
        pieces=config.loss_weights is not None or "positions" in config.extras or "doc_ids" in config.extras,
        max_pieces=config.max_pieces if "cu_seqlens" in config.extras else None,
        real="cu_seqlens_real" in config.extras,
        align=config.document_align,
        pad_id=pad_id,
    )


def read_in_turn(
    reader: Reader,
    indices: Iterable[int],
    *,
    batch_tokens: int,
    on_chunk: Callable[[int], None] | None = None,
    raise_interrupts: bool = False,
) -> Iterator[Chunk]:
    """Yield the conversations of these indices, read here, ahead by a small chunk of at most a batch's tokens.

    `on_chunk` is called with the first index of each chunk before it is read. `raise_interrupts`: in the trainer's own
    process an interrupt is no fault of a conversation, and is raised at once.
    """
    numbers, size, most = iter(indices), 1, min(CHUNK_TOKENS, batch_tokens)
    while part := list(islice(numbers, size)):
        if on_chunk is not None:
            on_chunk(part[0])
        chunk = reader.read(part)
        for trouble in chunk.troubles.values() if raise_interrupts else ():
            if (interrupt := interrupt_in(trouble.error)) is not None:
                raise interrupt
        yield chunk
        # as many as would fill a batch if they are as long as these
        tokens = int(chunk.num_tokens.sum())
        size = max(1, min(CHUNK, most * len(part) // max(1, tokens)))
