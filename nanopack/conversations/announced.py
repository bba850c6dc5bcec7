"""Log how far a long count of conversations is: answers.py and producer/counting.py read all of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

log = logging.getLogger("nanopack")

# Seconds of counting that are worth a warning, and again at each doubling.
PATIENCE = 1.5

Item = TypeVar("Item")


def announced(items: Iterable[Item], n: int, message: str) -> Iterator[Item]:
    """Yield the n items; where that takes long, log the message, which formats (items so far, n, seconds so far)."""
    began, patience = time.perf_counter(), PATIENCE
    for done, item in enumerate(items, start=1):
        if (spent := time.perf_counter() - began) >= patience:
            patience *= 2
            log.warning(message, done, n, spent)
        yield item
