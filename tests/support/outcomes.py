"""What a record means to the product and to the reference, in the form of key_oracle.py."""

from __future__ import annotations

from typing import Any

from key_oracle import REFUSED

from nanopack.conversations.records import Conversation, Message, Part, check
from nanopack.errors import ConversationError
from nanopack.reference import records as reference


def parts_of(message: Message) -> list[tuple[str, str]]:
    return [(part.type, part.text) for part in message.content if isinstance(part, Part)]


def as_oracle(conversation: Conversation) -> Any:
    """A conversation in the oracle's form."""
    messages = [
        (
            m.role,
            m.content if isinstance(m.content, str) else [(p.type, p.text) for p in m.content],
            dict(m.rest or {}),
            m.train,
        )
        for m in conversation.messages
    ]
    tokens = conversation.tokens
    listed = None
    if tokens is not None:
        mask = [True] * len(tokens.ids) if tokens.mask is None else tokens.mask.tolist()
        listed = list(zip(tokens.ids.tolist(), mask, strict=True))
    return messages, conversation.text, listed, conversation.weight, conversation.tools, conversation.template_kwargs


def outcome(record: object) -> Any:
    try:
        return as_oracle(check(record))
    except ConversationError:
        return REFUSED


def reference_outcome(record: object) -> Any:
    try:
        found = reference.conversation(record)
    except ConversationError:
        return REFUSED
    messages = [tuple(message) for message in found.messages]
    return messages, found.text, found.tokens, found.weight, found.tools, found.template_kwargs
