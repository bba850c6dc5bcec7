"""Define what a row is made of, and what every packer can do.

documents, by length   ->   Packer.next_rows()   ->   rows of runs (document, offset, length)
  shard.py                best_fit.py, stream.py, pad.py      slot.py writes them out

Only lengths count here: no tokens, no tensors, no GPU. A packer asks for documents itself, because when to read is part
of each rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

Read = Callable[[], "tuple[Any, int] | None"]
"""Returns the next document, any hashable object equal only to itself, and its length; None at the end of the data."""
State = dict[str, Any]
"""Numbers and lists of numbers, by name."""

COUNTERS = ("emitted", "cropped", "packed", "longest_wait")


class Run(NamedTuple):
    """Tokens `offset` to `offset + length` of one document, in adjacent columns of one row."""

    document: Any
    offset: int
    length: int


Row = list[Run]


class Packer(Protocol):
    """Decides which documents fill the next rows, and counts what it does. Made by `Packing.build`."""

    emitted: int
    """Tokens placed so far, each counted once."""
    cropped: int
    """Tokens cut from documents that were placed in part."""
    packed: int
    """Documents with no token still to come."""
    longest_wait: int
    """Most rows that a document has waited before it was placed."""

    def next_rows(self) -> list[Row]:
        """Return the rows of the next batch; at the end of the data fewer than its rows, then none."""

    def waiting(self) -> list[Any]:
        """Return the documents that later rows need, in the order that `restore` takes."""

    def remaining(self) -> list[tuple[Any, int]]:
        """Return each document with tokens still to come, and their number."""

    def state(self) -> State:
        """Return the rest of the packer's state, which `waiting()` leaves out, and the counters, by name."""

    def restore(self, state: State, waiting: Sequence[tuple[Any, int]]) -> None:
        """Restore a saved state: `state()`, and (document, length) of each document of `waiting()`."""

    @property
    def waiting_documents(self) -> int:
        """Documents read that have tokens still to come."""

    @property
    def waiting_tokens(self) -> int:
        """Their tokens that are still to come."""


def counters(packer: Packer) -> State:
    """Return the counters of a packer, by name."""
    return {name: getattr(packer, name) for name in COUNTERS}


def set_counters(packer: Packer, state: State) -> None:
    """Set a packer's counters to those of a state."""
    for name in COUNTERS:
        setattr(packer, name, state[name])
