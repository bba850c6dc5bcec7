"""Let an error travel from one process to another: with its type where that can be, always with its traceback.

producer.py or workers.py fails   ->   Failure.of(error)   -- a pipe -->   Failure.error()   ->   raised, in its place
"""

from __future__ import annotations

import contextlib
import pickle
import traceback
from dataclasses import dataclass


class ProducerError(RuntimeError):
    """A process of the producer is gone, or was stopped by what is no ordinary exception."""


class ProducerTraceback(Exception):
    """The traceback of an error as the producer process saw it; the cause of the error raised in the trainer's."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass(frozen=True)
class Failure:
    """An error as it travels."""

    pickled: bytes | None
    """The exception; None if it cannot be pickled, or is no ordinary one."""
    what: str
    """Type and message."""
    ordinary: bool
    """Whether it is an Exception."""
    trace: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Return what is to be told of an error."""
        pickled = None
        if isinstance(error, Exception):
            with contextlib.suppress(Exception):
                dumped = pickle.dumps(error)
                pickled = dumped if type(pickle.loads(dumped)) is type(error) else None
        what = type(error).__name__
        # an error that cannot even be told must not end in silence
        with contextlib.suppress(Exception):
            what += f": {error}"
        return cls(pickled, what, isinstance(error, Exception), "".join(traceback.format_exception(error)))

    def error(self) -> Exception:
        """Return the error, or a ProducerError that tells of it; its cause is the traceback."""
        error: Exception = ProducerError(f"the producer was stopped by {self.what}")
        if self.pickled:
            with contextlib.suppress(Exception):
                error = pickle.loads(self.pickled)
        error.__cause__ = ProducerTraceback(self.trace)
        return error
