"""Every exception of nanopack's own that a user can catch."""

from __future__ import annotations


class ConversationError(ValueError):
    """A bad conversation. The message does not name the place: the caller adds file and line."""


class TemplateError(ValueError):
    """The tokenizer lacks special tokens of the template: no fault of a conversation, so none is skipped for it."""


class EncoderError(RuntimeError):
    """The fast encoder gave other ids than tiktoken: no fault of a conversation, so none is skipped for it."""


class ProducerError(RuntimeError):
    """A process of the producer is gone, or was stopped by what is no ordinary exception."""


NEVER_SKIPPED = (MemoryError, TemplateError, EncoderError, ProducerError)
"""Errors that are no fault of the conversation at which they come: on_error="skip" does not skip them."""
