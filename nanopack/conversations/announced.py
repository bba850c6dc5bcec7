"""Log how far a long count of conversations is: answers.py and producer/counting.py read all of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

log = logging.getLogger("nanopack")

# Seconds of counting that are worth a warning, and again at each doubling.
PATIENCE = 1.5

Item = TypeVar("Item")


def announced(
    items: Iterable[Item], n: int, message: str, size: Callable[[Item], int] = lambda item: 1
) -> Iterator[Item]:
    """Yield the items, of the total size n; where that takes long, log the message.

    It formats (size so far, n, seconds so far).
    """
    began, patience, done = time.perf_counter(), PATIENCE, 0
    for item in items:
        done += size(item)
        if (spent := time.perf_counter() - began) >= patience:
            patience *= 2
            log.warning(message, done, n, spent)
        yield item
