"""What producer and trainer see of each other without a message: numbers in shared memory, each of one writer.

producer.py, process.py say what they are at   ->   Signs   ->   process.py tells it when the trainer waits long
"""

from __future__ import annotations

import numpy as np

# What a producer can be at.
WAITING, READING, FILLING = range(3)
_DOING = ("waiting for a free slot", "reading and tokenizing, from conversation {} on", "filling a slot")


class Signs:
    """Counts and states, read and written at any time."""

    def __init__(self, numbers: np.ndarray) -> None:
        """Use (4,) int64."""
        self._numbers = numbers

    @property
    def posted(self) -> int:
        """Messages that the producer has sent."""
        return int(self._numbers[0])

    @posted.setter
    def posted(self, count: int) -> None:
        self._numbers[0] = count

    @property
    def freed(self) -> int:
        """Slots that the trainer has given back, over all turns."""
        return int(self._numbers[3])

    @freed.setter
    def freed(self, count: int) -> None:
        self._numbers[3] = count

    def say(self, doing: int, conversation: int = 0) -> None:
        """Tell what is going on."""
        self._numbers[1] = doing
        self._numbers[2] = conversation

    def __str__(self) -> str:
        return _DOING[int(self._numbers[1])].format(int(self._numbers[2]))
