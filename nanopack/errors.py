"""Every exception of nanopack's own that a user can catch."""

from __future__ import annotations

import reprlib


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


def short(value: object, length: int = 60) -> str:
    """Return the value as Python writes it, on one line, cut in the middle to about `length` characters.

    >>> short("a" * 1000, 20)
    "'aaaaaa...aaaaaaaa'"
    """
    writer = reprlib.Repr()
    writer.maxlevel, writer.maxstring, writer.maxother = 2, length, length
    text = " ".join(map(str.strip, writer.repr(value).splitlines()))
    return text if len(text) <= length else f"{text[: length - 3]}..."


def describe(value: object) -> str:
    """Return the value and its type, as errors name it."""
    return f"{short(value)} of type {type(value).__name__}"
