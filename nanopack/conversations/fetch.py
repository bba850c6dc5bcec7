"""Read a record in whatever process: again where a store fails for a moment, and with random numbers of its own.

    index   ->   fetch()   ->   the record, as it was stored   ->   records.py checks it

A data set may draw random numbers of Python, numpy and torch, and from generators of theirs that it keeps as
attributes: a conversation always gets the same ones, whichever process reads it, so that resuming, counting and
explaining see what the batches hold. The trainer's are left alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Iterator

from nanopack.conversations import random_numbers
from nanopack.conversations.source import Source
from nanopack.errors import StorageError, interrupt_in, is_storage_error

log = logging.getLogger("nanopack")

# Seconds to wait before each further try, where a file or a store fails for a moment.
RETRIES = (0.1, 0.3, 1.0)


def fetch(source: Source, index: int, seed: int | None) -> object:
    """Return a record, after a few tries where it cannot be read for a moment; `seed` is the loader's."""
    for delay in RETRIES:
        try:
            return _drawn(source, index, seed)
        except StorageError:
            raise
        except OSError as error:
            if interrupt_in(error) is not None:
                raise
            where = source.where(index)
            log.warning("%s, %s: %s; trying again in %s s", where, type(error).__name__, error, delay)
        time.sleep(delay)
    return _drawn(source, index, seed)


def _drawn(source: Source, index: int, seed: int | None) -> object:
    if not source.runs_foreign_code:
        return source[index]
    digest = hashlib.blake2b(f"{seed} {source.drawn_as(index)}".encode(), digest_size=8).digest()
    number, objects = int.from_bytes(digest, "big"), source.objects()
    seeded = random_numbers.seed(number, objects)
    record = source[index]
    if seeded == len(random_numbers.generators(objects)):
        return record
    # some data sets make their generators when they first read
    random_numbers.seed(number, objects)
    return source[index]


@contextlib.contextmanager
def random_numbers_kept(source: Source) -> Iterator[None]:
    """Leave random numbers as they were before the block, in which records are fetched."""
    with random_numbers.kept(source.objects()) if source.runs_foreign_code else contextlib.nullcontext():
        yield


def peek(source: Source, index: int, seed: int | None) -> object:
    """Fetch one record in the trainer's process. Raises StorageError, with its place, where it cannot be read."""
    with random_numbers_kept(source):
        try:
            return fetch(source, index, seed)
        except Exception as error:
            if is_storage_error(error):
                raise storage_error(error, source.where(index)) from error
            raise


def storage_error(error: BaseException, where: str) -> StorageError:
    """Return the error that stops a run because a conversation cannot be read, with its place."""
    what = str(error) if isinstance(error, StorageError) else f"{type(error).__name__}: {error}"
    why = "the data could not be read, which is no fault of this conversation: repair them, and resume"
    named = StorageError(f"{where}, {what} ({why})")
    named.__cause__ = error
    return named
