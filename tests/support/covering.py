"""Few of many combinations: those that `make test` runs, and the rest, which are slow."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Any

import pytest


def pairs(*choices: Collection[Any]) -> list[Any]:
    """All combinations as parameters; beyond a few in which every two values meet once, they are slow."""
    return _covering(choices, 2)


def each(*choices: Collection[Any]) -> list[Any]:
    """All combinations as parameters; beyond a few in which every value stands once, they are slow."""
    return _covering(choices, 1)


def only(kept: Sequence[tuple[Any, ...]], *choices: Collection[Any]) -> list[Any]:
    """All combinations as parameters; beyond the kept ones they are slow."""
    every = list(itertools.product(*choices))
    assert all(values in every for values in kept)
    return [pytest.param(*values, marks=() if values in kept else pytest.mark.slow) for values in every]


def _covering(choices: Sequence[Collection[Any]], of: int) -> list[Any]:
    places = list(itertools.product(*(range(len(values)) for values in choices)))
    met = {place: set(itertools.combinations(enumerate(place), of)) for place in places}
    missing = set().union(*met.values())
    kept = set()
    while missing:
        best = max(places, key=lambda place: len(met[place] & missing))
        kept.add(best)
        missing -= met[best]
    found = zip(places, itertools.product(*choices), strict=True)
    return [pytest.param(*values, marks=() if place in kept else pytest.mark.slow) for place, values in found]
