"""The ring: the slots in one block of memory that the trainer's process and the producer's share, and their counters.

slot.py fills a slot   ->   Ring   ->   upload/ copies it to the device
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np

from nanopack.ring.layout import ALIGN_BYTES, Layout
from nanopack.ring.slot import Slot
from nanopack.ring.table import TableSlot

# Stages of the producer.
STARTING, WAITING, READING, FILLING, COUNTING = range(5)
_DESCRIPTIONS = (
    "starting",
    "waiting for a free slot",
    "reading and tokenizing, from conversation {} on",
    "filling a slot",
    "counting the batches of all ranks, from conversation {} on; pass process_group, so that each counts its own",
)


class Ring:
    """All slots in one contiguous block that two processes map, with the status of the producer in front."""

    def __init__(self, layout: Layout, slots: int, memory: Any = None) -> None:
        """Use `memory`, a shared buffer of `bytes_of(layout, slots)`, or allocate some that a forked process shares."""
        self._arguments = layout, slots, memory
        # anonymous pages: they take no room in /dev/shm, and go when the last process that maps them does
        buffer = np.frombuffer(mmap.mmap(-1, self.bytes_of(layout, slots)) if memory is None else memory, np.uint8)
        aligned = buffer[-buffer.ctypes.data % ALIGN_BYTES :]
        self.status = ProducerStatus(aligned[:32].view(np.int64))
        self.buffer = aligned[ALIGN_BYTES : ALIGN_BYTES + slots * layout.nbytes]
        """(slots * layout.nbytes,) uint8: the slots."""
        slot = TableSlot if layout.resident else Slot
        self.slots = [slot(layout, part, number) for number, part in enumerate(self.buffer.reshape(slots, -1))]

    def __reduce__(self) -> tuple[type[Ring], tuple[Any, ...]]:
        return Ring, self._arguments

    @staticmethod
    def bytes_of(layout: Layout, slots: int) -> int:
        """Return the bytes of memory that a ring takes: slots, status, and what aligning them may cost."""
        return slots * layout.nbytes + 2 * ALIGN_BYTES


def _field(index: int, doc: str) -> property:
    def read(self: ProducerStatus) -> int:
        return int(self._numbers[index])

    def write(self: ProducerStatus, number: int) -> None:
        self._numbers[index] = number

    return property(read, write, doc=doc)


class ProducerStatus:
    """Status of the producer in shared memory, read at any time without a message; each field has one writer."""

    sent = _field(0, "Messages sent so far. Written by the producer.")
    stage = _field(1, "One of those above. Written by the producer.")
    conversation = _field(2, "First conversation of the chunk being read. Written by the producer.")
    released = _field(3, "Slots given back so far. Written by the trainer.")

    def __init__(self, numbers: np.ndarray) -> None:
        """Use `numbers`, (4,) int64."""
        self._numbers = numbers

    def set(self, stage: int, conversation: int = 0) -> None:
        """Report the stage, and with READING or COUNTING the first conversation of the chunk."""
        self.stage, self.conversation = stage, conversation

    def describe(self) -> str:
        """Return the stage in words, for messages about a producer that stalls or died."""
        return _DESCRIPTIONS[self.stage].format(self.conversation)
