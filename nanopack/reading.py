"""Read and render conversations one after the other, or chunks of them in threads, and hand them on in order.

    conversations.py, render.py   ->   read_documents()   ->   lane.py
       by number         to tokens        in order

Tokenizers work outside the GIL, so threads render at the same time. Records are read by the caller's thread alone:
a data set need not be safe for threads. What goes wrong with a conversation travels in its place in the order.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass

from nanopack.conversations import Conversation, Source, check
from nanopack.render import Document

# Conversations that a thread renders at a time: enough that handing them over costs nothing beside the tokenizing.
CHUNK = 32


@dataclass
class Read:
    """A conversation as it was read: the document, or what went wrong."""

    index: int
    """Its number in the data set."""
    weight: float = 1.0
    document: Document | None = None
    error: BaseException | None = None


def read_documents(
    source: Source,
    render: Callable[[Conversation], Document],
    indexes: Iterable[int],
    pool: Executor | None = None,
    *,
    ahead: int = 1,
    chunk: int = CHUNK,
) -> Iterator[Read]:
    """Yield the conversations of these numbers, rendered, in this order.

    Without a pool each is read when it is asked for and not before. With one, `ahead` chunks of so many conversations
    are in work in its threads, and one waits to be handed on.
    """
    if pool is None:
        for index in indexes:
            yield _render(render, *_record(source, index))
        return
    numbers = iter(indexes)
    work: deque[Future[list[Read]]] = deque()
    while records := [_record(source, index) for index in itertools.islice(numbers, chunk)]:
        work.append(pool.submit(_render_chunk, render, records))
        if len(work) > ahead:
            yield from work.popleft().result()
    while work:
        yield from work.popleft().result()


def _record(source: Source, index: int) -> tuple[Read, object]:
    """Return the record of a conversation beside what is to be told of it."""
    try:
        return Read(index), source[index]
    except BaseException as error:
        return Read(index, error=error), None


def _render_chunk(render: Callable[[Conversation], Document], records: list[tuple[Read, object]]) -> list[Read]:
    return [_render(render, read, record) for read, record in records]


def _render(render: Callable[[Conversation], Document], read: Read, record: object) -> Read:
    if read.error is None:
        try:
            conversation = check(record)
            read.document, read.weight = render(conversation), conversation.weight
        # a panic of the tokenizer and an exit in a data set are no Exceptions, and must not be lost in a thread
        except BaseException as error:
            read.error = error
    return read
