"""Every exception of nanopack's own that a user can catch."""

from __future__ import annotations

import functools
import reprlib
import signal
import traceback
from typing import Any


class ConversationError(ValueError):
    """A bad conversation. Raised without the place: the caller adds file and line."""


class TemplateError(ValueError):
    """The tokenizer lacks special tokens of the template: not a conversation's fault, so never skipped."""


class EncoderError(RuntimeError):
    """An encoder's ids differ from the tokenizer's own: not a conversation's fault, so never skipped."""


class StorageError(OSError, ValueError):
    """Data could not be read: a file that changed, was cut, damaged or deleted, or a store that does not answer.

    No fault of a conversation, so none is skipped for it.
    """


class ProducerError(RuntimeError):
    """A producer process died, or was ended by something other than an `Exception`."""


NEVER_SKIPPED = (MemoryError, TemplateError, EncoderError, ProducerError, StorageError)
"""Errors that no conversation causes: on_error="skip" does not skip them."""


# Packages whose errors are about files, archives, networks and databases, and no OSErrors.
_STORAGE_MODULES = (
    "zlib",
    "_lzma",
    "lzma",
    "zipfile",
    "tarfile",
    "sqlite3",
    "pyarrow.lib",
    "lmdb",
    "zstandard",
    "boto3",
    "botocore",
    "s3transfer",
    "azure.core",
    "http.client",
    "urllib3",
    "aiohttp",
    "httpx",
    "httpcore",
    "redis",
    "pymongo",
    "grpc",
    "google.api_core",
    "elastic_transport",
    "concurrent.futures",
    "ray.exceptions",
)
# What an error of a database or a client is called, whatever the package (PEP 249).
_STORAGE_NAMES = {"OperationalError", "InterfaceError", "TimeoutError", "ConnectionError"}


def is_storage_error(error: BaseException | None) -> bool:
    """Return whether an error is, or was caused by, one of what the data are stored in rather than of a record."""
    while error is not None:
        if isinstance(error, (OSError, EOFError)):
            return True
        if isinstance(error, Exception) and any(map(_is_of_storage, type(error).__mro__)):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def _is_of_storage(kind: type) -> bool:
    return kind.__name__ in _STORAGE_NAMES or kind.__module__.startswith(_STORAGE_MODULES)


def interrupt_in(error: BaseException | None) -> BaseException | None:
    """Return the exception, the error or a cause of it, by which Ctrl-C or a signal handler interrupts the program.

    A handler may raise any, anywhere: whatever is read or tokenized at that moment is not at fault.
    """
    handlers = {_code_of(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
    while error is not None:
        frames = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
        if isinstance(error, KeyboardInterrupt) or not handlers.isdisjoint(frames):
            return error
        # not its context: a program may continue within `except KeyboardInterrupt`
        error = error.__cause__
    return None


def _code_of(handler: Any) -> Any:
    while isinstance(handler, functools.partial):
        handler = handler.func
    if callable(handler) and not hasattr(handler, "__code__"):
        handler = type(handler).__call__
    return getattr(handler, "__code__", None)


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
