"""Few of many combinations: those that `make test` runs, and the rest, which are slow.

Choices are collections of values, or dicts of them by the name that they have in a test's id.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pytest


def pairs(*choices: Collection[Any]) -> list[Any]:
    """All combinations as parameters; beyond a few in which every two values meet once, they are slow."""
    return _marked(choices, _covering(choices, 2))


def each(*choices: Collection[Any]) -> list[Any]:
    """All combinations as parameters; beyond a few in which every value stands once, they are slow."""
    return _marked(choices, _covering(choices, 1))


def only(kept: Sequence[tuple[Any, ...]], *choices: Collection[Any]) -> list[Any]:
    """All combinations as parameters; beyond the kept ones, given by value or name, they are slow."""
    every = list(itertools.product(*map(list, choices)))
    return _marked(choices, {every.index(values) for values in kept})


def _covering(choices: Sequence[Collection[Any]], size: int) -> set[int]:
    """Positions of combinations, each the first that adds most, in which every `size` values meet."""
    every = itertools.product(*(range(len(values)) for values in choices))
    met = [set(itertools.combinations(enumerate(places), size)) for places in every]
    missing, kept = set().union(*met), set()
    while missing:
        best = max(range(len(met)), key=lambda n: len(met[n] & missing))
        kept.add(best)
        missing -= met[best]
    return kept


def _marked(choices: Sequence[Collection[Any]], kept: set[int]) -> list[Any]:
    named = [
        values.items() if isinstance(values, Mapping) else zip(map(_name, values), values, strict=True)
        for values in choices
    ]
    return [
        pytest.param(
            *(value for _, value in combination),
            id="-".join(name for name, _ in combination),
            marks=() if number in kept else pytest.mark.slow,
        )
        for number, combination in enumerate(itertools.product(*named))
    ]


def _name(value: Any) -> str:
    simple = value is None or isinstance(value, str | int)
    return str(value) if simple else getattr(value, "__name__", type(value).__name__)
