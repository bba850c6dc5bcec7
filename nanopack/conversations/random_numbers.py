"""Give each conversation random numbers of its own, and leave the trainer's as they were.

    a data set's objects   ->   generators()   ->   seed() before a record is read   ->   fetch.py reads it
                                                    kept() around the reading

A data set draws from the generators of Python, numpy and torch, or from some that it keeps as attributes. A process
that is forked has a copy of each, so that two would draw the same.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np


def seed(number: int, objects: Iterable[object]) -> int:
    """Seed the process's generators, and those of the objects, with a number below 2^64; return how many these have."""
    for generator in _of_process():
        _seed(generator, number)
    own = generators(objects)
    # two of one kind draw different numbers
    for further, generator in enumerate(own, 1):
        _seed(generator, (number + further) % 2**64)
    return len(own)


@contextlib.contextmanager
def kept(objects: Iterable[object]) -> Iterator[None]:
    """Leave the process's generators, and those of the objects, as they were before the block."""
    restore = [_restorer(generator) for generator in (*_of_process(), *generators(objects))]
    try:
        yield
    finally:
        for one in restore:
            one()


def _of_process() -> list[Any]:
    # of the modules' own functions
    found: list[Any] = [random._inst, np.random.mtrand._rand]
    # torch.manual_seed would also seed every GPU
    return [*found, torch.default_generator] if (torch := sys.modules.get("torch")) else found


def generators(objects: Iterable[object]) -> list[Any]:
    """Return the generators that are attributes of the objects now."""
    return [value for one in objects for value in getattr(one, "__dict__", {}).values() if _is_generator(value)]


def _is_generator(value: Any) -> bool:
    if isinstance(value, (random.Random, np.random.RandomState, np.random.Generator)):
        # what the system draws has no seed
        return not isinstance(value, random.SystemRandom)
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Generator) and value.device.type == "cpu"


def _seed(generator: Any, number: int) -> None:
    if isinstance(generator, random.Random):
        generator.seed(number)
    elif isinstance(generator, np.random.RandomState):
        generator.seed(number % 2**32)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(number).state
    else:
        generator.manual_seed(number)


def _restorer(generator: Any) -> Callable[[], None]:
    """Return a function that gives a generator the state that it has now."""
    if isinstance(generator, np.random.Generator):
        bits, state = generator.bit_generator, generator.bit_generator.state
        return lambda: setattr(bits, "state", state)
    if isinstance(generator, random.Random):
        python = generator.getstate()
        return lambda: generator.setstate(python)
    other = generator.get_state()
    return lambda: generator.set_state(other)
