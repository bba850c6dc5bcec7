"""Render conversations by index into the documents of a store.

Source[i]   ->   render_all()   ->   Rendered, or Bad: what is wrong with a conversation, and where it is
                 render/              writer.py writes the ones, tokenize.py notes the others
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from nanopack.conversations.fetch import fetch, random_numbers_kept, storage_error
from nanopack.conversations.records import Conversation, check, choose
from nanopack.conversations.source import Source
from nanopack.errors import NEVER_SKIPPED, ConversationError, EncoderError, is_storage_error
from nanopack.render.document import Document, Plan
from nanopack.render.renderer import Renderer
from nanopack.store.format import Settings
from nanopack.store.writer import Rendered

# Conversations that are encoded together.
CHUNK = 32


class Bad(NamedTuple):
    """A conversation that cannot be rendered."""

    conversation: int
    where: str
    reason: str


class _Planned(NamedTuple):
    number: int
    conversation: Conversation
    plan: Plan | Document


def render_all(
    source: Source, indices: Iterable[int], render: Renderer, settings: Settings, *, seed: int | None = None
) -> Iterator[Rendered | Bad]:
    """Yield the document of each of these conversations, or what is wrong with it, in this order.

    Raises what is no fault of a conversation: StorageError where one cannot be read, TemplateError, EncoderError.
    """
    numbers = iter(indices)
    while part := list(islice(numbers, CHUNK)):
        with random_numbers_kept(source):
            yield from _render_chunk(source, part, render, settings, seed)


def _render_chunk(
    source: Source, part: list[int], render: Renderer, settings: Settings, seed: int | None
) -> Iterator[Rendered | Bad]:
    found = [_plan(source, index, render, seed) for index in part]
    planned = [one for one in found if isinstance(one, _Planned)]
    documents = iter(_fill_in(source, planned, render))
    for one in found:
        document = one if isinstance(one, Bad) else next(documents)
        if isinstance(document, Document):
            assert isinstance(one, _Planned)
            made = as_rendered(source, one.number, one.conversation, document, settings)
            # of an answer, the conversation that it is of
            yield made._replace(conversation=source.drawn_as(one.number))
        else:
            yield document


def _plan(source: Source, index: int, render: Renderer, seed: int | None) -> _Planned | Bad:
    try:
        conversation = check(fetch(source, index, seed))
        return _Planned(index, conversation, render.plan(conversation))
    except Exception as error:
        return _bad(source, index, error)


def _fill_in(source: Source, planned: list[_Planned], render: Renderer) -> list[Document | Bad]:
    try:
        return [*render.fill_in([one.plan for one in planned])]
    except KeyboardInterrupt:
        raise
    # one of them is at fault; a tokenizer's panic is no Exception
    except BaseException:
        return [_fill_in_alone(source, one, render) for one in planned]


def _fill_in_alone(source: Source, one: _Planned, render: Renderer) -> Document | Bad:
    try:
        return render.fill_in_one(one.plan, one.conversation)
    except Exception as error:
        return _bad(source, one.number, error)


def _bad(source: Source, index: int, error: Exception) -> Bad:
    """Return a conversation with its fault; raise what is not its own, with its place."""
    where = source.where(index)
    if is_storage_error(error):
        raise storage_error(error, where) from error
    if isinstance(error, EncoderError):
        raise EncoderError(f"{where}, {error}") from error
    if isinstance(error, NEVER_SKIPPED):
        raise error
    reason = str(error) if isinstance(error, ConversationError) else f"{type(error).__name__}: {error}"
    return Bad(index, where, reason)


def as_rendered(
    source: Source, number: int, conversation: Conversation, document: Document, settings: Settings
) -> Rendered:
    """Return a document as a store keeps it, under the number by which the source knows it."""
    starts = document.starts
    messages = choose(conversation, settings.loss, settings.first_assistant).messages if starts else ()
    mask = document.mask if settings.loss != "all" else document.mask | True
    roles = [message.role for message in messages]
    return Rendered(document.ids, mask, number, conversation.weight, source.source_of(number), starts, roles)
