"""Keep the tables of many batches on the device, in two halves: one is read by loads while the other is filled.

    tables in host memory   ->   Halves.point(): copy, on its own stream; the counter names the first   ->   load(),
        refills.py                                                                        on the caller's stream, or
                                                                                          captured in a graph there

A load writes the batch that the device's counter names, and advances it, so that a captured one does so at each replay.
Which batches are loaded is decided on the device: the host is given their number, and compares it with the counter
when it next needs a half. As upload.py, this says which stream waits for which event, and is called from the consumer's
thread only.

Memory:  S[h]  host memory, pinned if there is a GPU    D[h]  the halves, on the device, of the same size
         C     the counter, on the device               N[h]  host memory: the counter as it was when D[h] was left
Events:  copied[h]  the copy out of S[h] is done        left[h]  nothing before this point needs D[h] any more

An edge orders two accesses to the same memory:

    G1  D and C are made on the caller's stream          before  the first copy into D, on another stream
    G2  loads have read D[h]                             before  the next copy into it
    G3  the copy into D[h] is done                       before  the counter points into it
    G4  the copy has read S[h]                           before  the host fills it again
    G5  all loads, and what reads them, on one stream    before  the counter is read, and set, on another
    G6  the counter is copied to N[h]                    before  the host reads it
    G7  everything queued on a stream used here          before  the memory is released

left[h] is recorded when D[h] is made, and then when all its loads are queued, after the copy to N[h]; the host waits
for it before it fills S[h]: so it is never further ahead of the device than one half, and G1, G2, G4 and G6 follow. The
copy into D[h] was waited for on the stream before left[h].

tests/upload/test_halves.py runs this on a simulated device and shows, for every edge and every line that makes one,
that the tests fail without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nanopack.upload.device import Device, Kernel

COUNTER_BYTES = 24


class Halves:
    """Moves tables to the device and points the counter at them: follow(), leave(), wait() and point().

    `staged`: two times host memory, (half_bytes,) uint8. `seen`: two times (8,) uint8. `make_load(tables, counter)`
    returns load(half, outputs), which reads the tables, (2 * half_bytes,) uint8, of which `half` is the part that it
    needs, and the counter, (24,) uint8, and writes the counter and `outputs`. It runs once here on zeros.
    """

    def __init__(
        self,
        device: Device,
        staged: Sequence[Any],
        seen: Sequence[Any],
        make_load: Callable[[Any, Any], Kernel],
        outputs: Any,
    ) -> None:
        self._device = device
        self._staged = staged
        self._seen = seen
        self._outputs = outputs
        self._last_stream = device.current_stream()
        self._copies = device.new_stream()
        tables = device.zeros(2 * len(staged[0]))
        self._counter = device.zeros(COUNTER_BYTES)
        self._halves = device.halves(tables)
        self._load = make_load(tables, self._counter)
        self._copied = [device.new_event() for _ in staged]
        self._left = [device.new_event() for _ in staged]
        self._switch = device.new_event()
        self.current = 1
        """The half that the counter points into."""
        self.load()
        for event in self._left:
            device.record(event, self._last_stream)  # G1

    @property
    def other(self) -> int:
        """The half that is filled next."""
        return 1 - self.current

    def load(self) -> None:
        """Queue a load on the current stream, or have it captured there."""
        self._device.launch(self._load, self._halves[self.current], self._outputs, self._device.current_stream())

    def follow(self) -> None:
        """From now on loads are queued on the current stream: order it after the one that they were queued on."""
        device, stream = self._device, self._device.current_stream()
        if stream != self._last_stream:
            device.record(self._switch, self._last_stream)  # G5
            device.wait(stream, self._switch)  # G5
        self._last_stream = stream

    def leave(self) -> None:
        """Leave the current half: all its loads are queued, on the current stream or before it (follow)."""
        device, stream = self._device, self._last_stream
        device.copy(self._seen[self.current], self._counter[:8], stream)
        device.record(self._left[self.current], stream)  # G2, G4, G6

    def wait(self, half: int) -> int:
        """Wait until all loads of a half that was left are done; return how many loads the counter then had."""
        self._device.synchronize(self._left[half])  # G1, G2, G4, G6
        return self._device.number(self._seen[half])

    def point(self, used_bytes: int) -> None:
        """Copy `staged[other][:used_bytes]` to the device, and set the counter to the three int64 at its front."""
        device, stream, other = self._device, self._last_stream, self.other
        device.copy(self._halves[other][:used_bytes], self._staged[other][:used_bytes], self._copies)
        device.record(self._copied[other], self._copies)  # G3
        device.wait(stream, self._copied[other])  # G3
        device.copy(self._counter, self._halves[other][:COUNTER_BYTES], stream)
        self.current = other

    def close(self) -> None:
        """Wait for everything queued here. May be called twice."""
        for stream in (self._copies, self._last_stream):
            self._device.record(self._switch, stream)  # G7
            self._device.synchronize(self._switch)  # G7
