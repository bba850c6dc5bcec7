"""The ring: slots side by side in memory that the trainer's process and the producer's share.

slot.py fills a slot   ->   Ring   ->   upload/ copies it to the device
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np

from nanopack.ring.layout import ALIGN_BYTES, Layout
from nanopack.ring.signs import Signs
from nanopack.ring.slot import Slot


class Ring:
    """Slots side by side in one run of memory, which the producer's process shares, and the producer's signs."""

    def __init__(self, layout: Layout, slots: int, memory: Any = None) -> None:
        """Use `memory`, a shared buffer of `bytes_of(layout, slots)`, or make some that a forked process shares."""
        self._arguments = layout, slots, memory
        # pages of no file: they need no room in /dev/shm, and go when the last process that maps them does
        buffer = np.frombuffer(mmap.mmap(-1, self.bytes_of(layout, slots)) if memory is None else memory, np.uint8)
        aligned = buffer[-buffer.ctypes.data % ALIGN_BYTES :]
        self.signs = Signs(aligned[:32].view(np.int64))
        self.buffer = aligned[ALIGN_BYTES : ALIGN_BYTES + slots * layout.nbytes]
        self.slots = [Slot(layout, part) for part in self.buffer.reshape(slots, -1)]

    def __reduce__(self) -> tuple[type[Ring], tuple[Any, ...]]:
        return Ring, self._arguments

    @staticmethod
    def bytes_of(layout: Layout, slots: int) -> int:
        """Return how much memory a ring takes: slots, signs, and what aligning them may cost."""
        return slots * layout.nbytes + 2 * ALIGN_BYTES
