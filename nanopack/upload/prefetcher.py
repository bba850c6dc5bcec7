"""Copy filled slots to the device ahead of time and deliver the batches in order.

    producer/feed.py: filled slots   ->   Prefetcher.next()   ->   tensors, and what the host knows of them
                                           upload.py               loader.py makes them a Batch

Whatever ends the batches, an error or the end of the data, is kept until all batches before it are delivered, and then
raised at every further call.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from nanopack.errors import interrupt_in
from nanopack.producer.feed import End, Feed
from nanopack.producer.packed_state import PackedState
from nanopack.ring.facts import BatchFacts
from nanopack.upload.device import Device
from nanopack.upload.refills import HostTables
from nanopack.upload.upload import Upload


class Prefetcher:
    """Gets slots from a feed, and releases them once they are copied."""

    def __init__(self, device: Device, feed: Feed, upload: Upload | HostTables, *, ahead: bool) -> None:
        """With `ahead`, each call of `next` also starts the copies for later batches that can start."""
        self._device = device
        self._feed = feed
        self._upload = upload
        self._ahead = ahead
        self._facts: deque[BatchFacts] = deque()
        self._end: Callable[[], BaseException] | None = None
        self._waits = False
        self.state: PackedState | None = None
        """The producer's state after the batch delivered last; None before the first one."""
        self._end_state: PackedState | None = None
        self.waited_s = 0.0
        """Seconds in which no filled slot was ready."""

    def next(self) -> tuple[Any, BatchFacts]:
        """Return the tensors of the next batch and its facts; raise what ends the batches, StopIteration included.

        Of HostTables it is the batch's table.
        """
        self.check_open()
        if self._end is _interrupted:
            # what is submitted may be the batch after one that is lost
            raise _interrupted()
        if self._device.capturing():
            raise RuntimeError(
                "next(loader) inside a CUDA graph capture: its copies would become part of the graph; take the batch "
                "before the capture begins"
            )
        try:
            with self._device.named("nanopack wait and copy"):
                self._submit_ready()
            if not self._upload.can_deliver:
                raise self._at_the_end()
            with self._device.named("nanopack kernel"):
                outputs = self._upload.deliver()
            facts = self._facts.popleft()
            if self._ahead:
                with self._device.named("nanopack copy ahead"):
                    self._submit_ready(ahead=True)
        except BaseException as error:
            self._note_interrupt(error)
            raise
        # only now can nothing keep the batch from the caller
        self.state = PackedState.of(facts)
        return outputs, facts

    def is_over(self) -> bool:
        """Return whether every batch is delivered; waits until the next one is ready, or the end is known.

        False where `next` has an error to raise, and where it is not allowed to wait.
        """
        if self._end is None and not self._device.capturing():
            try:
                self._submit_ready()
            except BaseException as error:
                self._note_interrupt(error)
                raise
        return self._end is StopIteration and not self._upload.can_deliver

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._end is _closed

    def close(self) -> None:
        """Deliver nothing more: `next` raises from now on."""
        self._end = _closed

    def check_open(self) -> None:
        """Raise RuntimeError once `close` was called."""
        if self._end is _closed:
            raise _closed()

    def _submit_ready(self, *, ahead: bool = False) -> None:
        """Submit what is ready; unless it is work ahead, wait until there is something to deliver, or the end."""
        upload = self._upload
        wait = not (ahead or upload.can_deliver)
        # while every slot is being copied the producer has none to fill, and there would be nothing to wait for
        for slot in upload.reclaim(wait=wait and upload.all_in_use):
            self._feed.release(slot)
        while upload.can_submit and self._end is None:
            facts = self._get(wait=wait and not upload.can_deliver)
            if facts is None:
                break
            try:
                upload.submit(facts.slot, facts.used_bytes)
            except Exception as error:
                self._fail(error)
                break
            self._facts.append(facts)

    def _note_interrupt(self, error: BaseException) -> None:
        """End the batches where an interrupt may have come between receiving a message and acting on it."""
        interrupts = not isinstance(error, Exception) or interrupt_in(error) is not None
        if interrupts and not (self._waits and self._feed.waits):
            self._end = _interrupted
        self._waits = False

    def _get(self, *, wait: bool) -> BatchFacts | None:
        """Return the next filled slot, or None; what ends the batches is kept in `_end`."""
        self._waits = wait
        nothing_ready = wait and not self._feed.qsize()
        began = time.perf_counter()
        try:
            got = self._feed.get(wait=wait)
        except Exception as error:
            # the row that was being filled is gone: to continue would lose its documents in silence
            self._fail(error)
            return None
        self._waits = False
        if nothing_ready:
            self.waited_s += time.perf_counter() - began
        if isinstance(got, End):
            self._end_state = got.state
            self._end = StopIteration
            return None
        return got

    def _fail(self, error: Exception) -> None:
        """End the batches with an error; raise it at once where it interrupts the program."""
        if interrupt_in(error) is not None:
            raise error
        self._end = lambda: error

    def _at_the_end(self) -> BaseException:
        """Return the exception that ends the batches, now that every batch before it is delivered."""
        assert self._end is not None
        if self._end is StopIteration:
            self.state = self._end_state
        return self._end()


def _closed() -> RuntimeError:
    return RuntimeError("the loader is closed; make a new one")


def _interrupted() -> RuntimeError:
    return RuntimeError("the loader was interrupted in the middle of a batch; make a new one")
