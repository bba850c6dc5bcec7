"""Alternate contenders, so that whatever else the machine does affects all of them; medians, spread, ratios.

a Measure each, round after round   ->   in_rounds()   ->   Spread of each   ->   ratio(), Result, Table
                                                                                  report.py shows them
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

Work = Callable[[], int]
"""Does one unit of work, such as fetching a batch, and returns its tokens without padding."""
Contender = Callable[[], AbstractContextManager[Work]]
"""Opens what is measured: `with contender() as work: tokens = work() + work()`."""
Measure = Callable[[float], T]
"""Measures for about this many seconds: `tokens_per_s(contender)(0.5)` is 3_400_000.0."""


class Spread(NamedTuple):
    """A number, measured in every round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Return the median of the rounds."""
        return statistics.median(self.rounds)

    def as_json(self) -> dict[str, Any]:
        """Return median, minimum, maximum and the rounds, as plain data."""
        return {"median": self.median, "low": min(self.rounds), "high": max(self.rounds), "rounds": list(self.rounds)}


Number = Spread | float | int


@dataclass(frozen=True)
class Result:
    """A line of a table: numbers by name, which ends in the unit; or a note why there are none."""

    name: str
    numbers: dict[str, Number] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Results that answer one question."""

    title: str
    rows: list[Result]
    axis: str = ""  # what the names of the rows count, if they are numbers


@dataclass(frozen=True)
class Pace:
    """How long to measure, and where to show what is being measured."""

    rounds: int
    seconds: float  # of one measurement
    quick: bool
    show: Callable[[str], None]

    @property
    def drain(self) -> int:
        """Batches to fetch until none is left that was made ahead: a ring holds five, staging two."""
        return 2 if self.quick else 8


def not_measured(name: str, why: str) -> Result:
    """Return the line of a contender that could not be measured."""
    return Result(name, note=f"not measured: {why}")


def in_rounds(contenders: Mapping[str, Measure[T]], pace: Pace, seconds: float | None = None) -> dict[str, list[T]]:
    """Measure each contender in each round, and return the results by name. Every round starts with another contender.

    >>> clock = iter(range(6))
    >>> pace = Pace(rounds=2, seconds=0.1, quick=True, show=lambda label: None)
    >>> in_rounds({"a": lambda seconds: next(clock), "b": lambda seconds: next(clock)}, pace)
    {'a': [0, 3], 'b': [1, 2]}
    """
    names = list(contenders)
    measured: dict[str, list[T]] = {name: [] for name in names}
    for number in range(pace.rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            pace.show(f"round {number + 1} of {pace.rounds}: {name}")
            measured[name].append(contenders[name](pace.seconds if seconds is None else seconds))
    return measured


def spreads(measured: Mapping[str, list[float]]) -> dict[str, Spread]:
    """Return the spread of each contender's rounds."""
    return {name: Spread(tuple(rounds)) for name, rounds in measured.items()}


def ratio(of: Spread, to: Spread) -> Spread:
    """Return the ratio round by round: both sides of each were measured within moments of each other.

    >>> ratio(Spread((6.0, 8.0)), Spread((2.0, 4.0)))
    Spread(rounds=(3.0, 2.0))
    """
    return Spread(tuple(a / b for a, b in zip(of.rounds, to.rounds, strict=True)))


def tokens_per_s(contender: Contender, *, warm: int = 0) -> Measure[float]:
    """Return the measurement that opens the contender, does `warm` units of work, and then counts."""

    def measure(seconds: float) -> float:
        with contender() as work:
            for _ in range(warm):
                work()
            return count(work, seconds)

    return measure


def count(work: Work, seconds: float) -> float:
    """Return tokens per second over about `seconds`, one unit of work at least."""
    tokens, began = 0, time.perf_counter()
    while True:
        tokens += work()
        elapsed = time.perf_counter() - began
        if elapsed >= seconds:
            return tokens / elapsed
