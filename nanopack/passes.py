"""Iterate over a loader pass by pass: a pass is all batches of its `epochs`.

    iter(loader)   ->   Pass: the rest of this pass, or a new one   ->   next(loader)

Every pass has the same batches in the same order, so that len(loader) holds for each and evaluations can be compared.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from nanopack.batch import Batch

log = logging.getLogger("nanopack")

NOT_A_DATA_SET = (
    "A loader is not a data set for a DataLoader: it gives ready batches, so iterate over the loader itself, or use "
    "Batches of nanopack.adapters.hf or nanopack.adapters.lightning"
)


class Pass:
    """An iterator over what is left of one pass; at its end it stays there. It has no length: see `Loader.__len__`."""

    def __init__(self, take: Callable[[], Batch], passes: Callable[[], int]) -> None:
        """`take` returns the next batch, `passes` how many passes were begun: once it grows, this one is over."""
        self._take, self._passes, self._number = take, passes, passes()

    def __iter__(self) -> Iterator[Batch]:
        """Return itself."""
        return self

    def __next__(self) -> Batch:
        """Return the next batch."""
        if self._number != self._passes():
            raise StopIteration
        return self._take()


def warn_of_empty_loop() -> None:
    """Log that a loop has nothing to give because the run was finished when its state was saved."""
    log.warning(
        "the state that was loaded is that of the end of the data: no batch is left, and the loop is empty; the next "
        "iter(loader), or restart(), begins a new pass"
    )


def warn_of_same_order(seed: int, epochs: int | None) -> None:
    """Log that a shuffled pass is repeated, and how to get a new order in each pass over the data."""
    log.warning(
        "a new pass begins: it has the same batches in the same order, that of seed=%d; for a new order in each pass "
        "over the data give the loader all of them, epochs= their number instead of %s",
        *(seed, epochs),
    )
