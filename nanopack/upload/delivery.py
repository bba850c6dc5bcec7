"""Have what the producer filled copied to the device, ahead of need, and deliver it batch by batch.

    feed.py: slots that are ready   ->   Delivery.next()   ->   tensors, and what the host knows of them
                                          upload.py               loader.py makes them a Batch

What ends the batches is kept until all before it are delivered, and is then told at every further call.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from nanopack.producer.feed import End, Feed, News
from nanopack.producer.producer import Produced
from nanopack.upload.device import Device
from nanopack.upload.outputs import Outputs
from nanopack.upload.upload import Upload


class Delivery:
    """Takes slots from a feed, and gives them back to it when they are copied."""

    def __init__(self, device: Device, feed: Feed, upload: Upload, books: bytes, *, ahead: bool) -> None:
        """Begin where `books` say; with `ahead`, copies that can begin do so behind each batch that is delivered."""
        self._device = device
        self._feed = feed
        self._upload = upload
        self._ahead = ahead
        self._facts: deque[Produced] = deque()
        self._end: Callable[[], BaseException] | None = None
        self.books = books
        """Where the producer stood with what is delivered so far, and nothing more; see `Produced.books`."""
        self._last_books = books
        self.waited_for_producer = 0.0
        """Seconds in which nothing was ready."""

    def next(self) -> tuple[Outputs, Produced]:
        """Return the tensors of the next batch and its facts; raise what ends the batches, StopIteration included."""
        self.check_open()
        if self._end is _interrupted:
            # what is submitted may be the batch behind one that is lost
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
            produced = self._facts.popleft()
            if self._ahead:
                with self._device.named("nanopack copy ahead"):
                    self._submit_ready(ahead=True)
        except BaseException as error:
            # Ctrl-C may have come between a message and what it means
            if not isinstance(error, Exception):
                self._end = _interrupted
            raise
        # only now can nothing keep the batch from whoever asked for it
        self.books = produced.books
        return outputs, produced

    def is_over(self) -> bool:
        """Return whether every batch is delivered; waits for the next one, or the end."""
        self.check_open()
        self._submit_ready()
        return not self._upload.can_deliver and self._end is StopIteration

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._end is _closed

    def close(self) -> None:
        """Deliver nothing any more."""
        self._end = _closed

    def check_open(self) -> None:
        """Raise RuntimeError where `close` was called."""
        if self._end is _closed:
            raise _closed()

    def _submit_ready(self, *, ahead: bool = False) -> None:
        """Submit what is ready; unless it is work ahead, wait until there is something to deliver, or the end."""
        upload = self._upload
        wait = not (ahead or upload.can_deliver)
        # where every slot is being copied the producer has none to fill, and there would be nothing to wait for
        for slot in upload.reclaim(wait=wait and upload.all_in_use):
            self._feed.free(slot)
        while upload.can_submit and self._end is None:
            news = self._take(wait=wait and not upload.can_deliver)
            if news is None:
                break
            try:
                upload.submit(news.slot, news.produced.filled.used_bytes)
            except Exception as error:
                self._fail(error)
                break
            self._facts.append(news.produced)

    def _take(self, *, wait: bool) -> News | None:
        """Return the next ready slot, or None; what ends the loader is kept until the batches before it are out."""
        nothing_ready = wait and not self._feed.ready
        began = time.perf_counter()
        try:
            news = self._feed.take(wait=wait)
        except Exception as error:
            # the row that was being filled is gone: to go on would lose its documents in silence
            self._fail(error)
            return None
        if nothing_ready:
            self.waited_for_producer += time.perf_counter() - began
        if isinstance(news, End):
            self._last_books = news.books
            self._end = StopIteration
            return None
        return news

    def _fail(self, error: Exception) -> None:
        self._end = lambda: error

    def _at_the_end(self) -> BaseException:
        """Return what ends the batches, now that every batch before it is delivered."""
        assert self._end is not None
        if self._end is StopIteration:
            self.books = self._last_books
        return self._end()


def _closed() -> RuntimeError:
    return RuntimeError("the loader is closed; make a new one")


def _interrupted() -> RuntimeError:
    return RuntimeError("the loader was interrupted in the middle of a batch; make a new one")
