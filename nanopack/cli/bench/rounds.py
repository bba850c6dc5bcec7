"""Let contenders take turns, so that whatever else the machine does falls on all of them; medians, spread, ratios.

a turn each, round after round   ->   take_turns()   ->   Spread of each   ->   ratio(), Row, Table
                                                                                report.py tells them
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
Turn = Callable[[float], T]
"""Measures for about so many seconds."""
Take = Callable[[], int]
"""Takes a batch, or another piece of work, and returns its tokens, padding not counted."""
Open = Callable[[], AbstractContextManager[Take]]


class Spread(NamedTuple):
    """One number of every round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Return the median of the rounds."""
        return statistics.median(self.rounds)

    def as_json(self) -> dict[str, Any]:
        """Return median, least and greatest, and the rounds, as plain data."""
        return {"median": self.median, "low": min(self.rounds), "high": max(self.rounds), "rounds": list(self.rounds)}


Number = Spread | float | int


@dataclass(frozen=True)
class Row:
    """One line: numbers by name, with the unit in it; or why there are none."""

    name: str
    numbers: dict[str, Number] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows that answer one question."""

    title: str
    rows: list[Row]
    axis: str = ""
    """What the rows are numbered by, where their names are numbers."""


@dataclass(frozen=True)
class Pace:
    """How long to measure, and whom to tell what is being measured."""

    rounds: int
    seconds: float
    """Of a turn."""
    quick: bool
    tell: Callable[[str], None]

    @property
    def drain(self) -> int:
        """Batches to take until a loader has none left that it made ahead: its ring holds five, staging two."""
        return 2 if self.quick else 8


def not_measured(name: str, why: str) -> Row:
    """Return the row of what could not be measured."""
    return Row(name, note=f"not measured: {why}")


def take_turns(turns: Mapping[str, Turn[T]], pace: Pace, seconds: float | None = None) -> dict[str, list[T]]:
    """Return what each contender measured in each round. Another one begins every round."""
    names = list(turns)
    measured: dict[str, list[T]] = {name: [] for name in names}
    for number in range(pace.rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            pace.tell(f"round {number + 1} of {pace.rounds}: {name}")
            measured[name].append(turns[name](pace.seconds if seconds is None else seconds))
    return measured


def spreads(measured: Mapping[str, list[float]]) -> dict[str, Spread]:
    """Return the spread of each contender's rounds."""
    return {name: Spread(tuple(rounds)) for name, rounds in measured.items()}


def ratio(of: Spread, to: Spread) -> Spread:
    """Return the ratio round by round, so that both sides of each were measured within moments.

    >>> ratio(Spread((6.0, 8.0)), Spread((2.0, 4.0)))
    Spread(rounds=(3.0, 2.0))
    """
    return Spread(tuple(a / b for a, b in zip(of.rounds, to.rounds, strict=True)))


def tokens_per_s(open_: Open, *, warm: int = 0) -> Turn[float]:
    """Return the turn that opens the contender, takes `warm` times, and then measures."""

    def turn(seconds: float) -> float:
        with open_() as take:
            for _ in range(warm):
                take()
            return count(take, seconds)

    return turn


def count(take: Take, seconds: float) -> float:
    """Return the tokens per second of taking for so many seconds, and once at least."""
    tokens, began = 0, time.perf_counter()
    while True:
        tokens += take()
        elapsed = time.perf_counter() - began
        if elapsed >= seconds:
            return tokens / elapsed
