"""Every exception of nanopack's own that a user can catch."""

from __future__ import annotations


class ConversationError(ValueError):
    """A bad conversation. Raised without the place: the caller adds file and line."""


class TemplateError(ValueError):
    """The tokenizer lacks special tokens of the template: not a conversation's fault, so never skipped."""


class EncoderError(RuntimeError):
    """The fast encoder's ids differ from tiktoken's: not a conversation's fault, so never skipped."""


class ProducerError(RuntimeError):
    """A producer process died, or was ended by something other than an `Exception`."""


NEVER_SKIPPED = (MemoryError, TemplateError, EncoderError, ProducerError)
"""Errors that no conversation causes: on_error="skip" does not skip them."""
