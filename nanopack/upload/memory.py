"""Hold what a loader must give back: the producer, what is queued on the device, and pinned memory, in this order.

Loader  ->  Memory.give_back(), at close(), when the loader is dropped, at the interpreter's exit
"""

from __future__ import annotations

import os

from nanopack.producer.feed import Feed
from nanopack.ring.ring import Ring
from nanopack.upload.device import Device
from nanopack.upload.upload import Upload


class Memory:
    """A loader's hold on processes and memory. It does not know the loader, so that this can be dropped."""

    def __init__(self, device: Device, feed: Feed, ring: Ring, owner: int) -> None:
        """`owner` is the process that may give back; in one forked from it there is nothing to be done."""
        self._device = device
        self._feed = feed
        self._ring = ring
        self._owner = owner
        self._pinned = False
        self.upload: Upload | None = None

    def pin(self) -> None:
        """Let the device know the ring, so that copies from it are asynchronous."""
        self._device.pin(self._ring.buffer)
        self._pinned = True

    def give_back(self) -> None:
        """End the producer, wait for the device, and let go of the memory."""
        if os.getpid() != self._owner:
            return
        self._feed.close()
        if self.upload is not None:
            self.upload.close()
        if self._pinned:
            self._device.unpin(self._ring.buffer)
            self._pinned = False
