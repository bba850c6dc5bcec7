"""Say what a row is made of, and what every packing can do.

documents, by length   ->   Packer.next_rows()   ->   rows of runs (document, offset, length)
                         packing.py, best_fit.py              ring.py writes them out
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

Read = Callable[[], "tuple[Any, int] | None"]
"""Returns the next document and its length, None at the end of the data."""
State = dict[str, Any]
"""Numbers and lists of numbers, by name."""

COUNTERS = ("emitted", "cropped", "packed", "longest_wait")


class Run(NamedTuple):
    """Tokens `offset` to `offset + length` of one document, side by side in one row."""

    document: Any
    offset: int
    length: int


Row = list[Run]


class Packer(Protocol):
    """What the producer and the ledger need of a packing."""

    emitted: int
    """Tokens handed out so far, each counted once."""
    cropped: int
    """Tokens cut from documents that were placed in part."""
    packed: int
    """Documents of which nothing is left to come."""
    longest_wait: int
    """Most rows that a document has waited before it was placed."""

    def next_rows(self) -> list[Row]:
        """Return the rows of the next batch; at the end of the data fewer than its rows, then none."""

    def held(self) -> list[Any]:
        """Return the documents of which later rows will take something, in the order that `restore` wants."""

    def left(self) -> list[tuple[Any, int]]:
        """Return each document of which something is still to come, and how many of its tokens."""

    def state(self) -> State:
        """Return what else than the documents held decides the rows to come, and the counters."""

    def restore(self, state: State, held: Sequence[tuple[Any, int]]) -> None:
        """Stand where a packer stood: its state, and (document, length) of what it held."""

    @property
    def waiting_documents(self) -> int:
        """Documents read of which something is still to come."""

    @property
    def waiting_tokens(self) -> int:
        """Their tokens that are still to come."""


def counters(packer: Packer) -> State:
    """Return the counters of a packer, by name."""
    return {name: getattr(packer, name) for name in COUNTERS}


def set_counters(packer: Packer, state: State) -> None:
    """Set the counters of a packer to those of a state."""
    for name in COUNTERS:
        setattr(packer, name, state[name])
