"""Copy filled slots to the device and launch the kernel that makes tensors of them; the host never waits for it.

    slots the producer filled   ->   Upload.submit(): copy, on its own stream   ->   Upload.deliver(): kernel, on the
        ring/                                                                        caller's stream

This file says which stream waits for which event; every action on the device itself goes through device.py. `Upload`
is a passive state machine, called from the consumer's thread only: a CUDA call from another thread can break the
user's graph capture.

Memory:  H[s]  host slots, pinned if there is a GPU         D[d]  staging buffers on the device, of the same size
Events:  copied[s]  the copy out of H[s] is done            packed[d]  nothing before this point needs D[d] any more

An edge orders two accesses to the same memory:

    E0  D[d] is made on the caller's stream          before  the first copy into it, on another stream
    E2  the kernel has read D[d]                     before  the next copy into it
    E3  the copy into D[d] is done                   before  the kernel reads it
    E4  the copy has read H[s]                       before  the producer fills it again
    E5  all that reads or writes static outputs      before  the kernel rewrites them from another stream
    E7  everything queued on a stream used here      before  the memory is released

(E1, the slot is filled before it is copied, follows from the order of the producer's messages.) Waiting for an event
that was never recorded does not wait, and a wait refers to the latest record before it. So copied[s] is recorded again
only after s was reclaimed; packed[d] when D[d] is made, and then only by the kernel that reads it.

tests/upload/test_upload.py runs this on a simulated device and shows, for every edge and every line that makes one,
that the tests fail without it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from nanopack.upload.device import Device, Kernel


class Upload:
    """Moves slots through the device: submit() and deliver() in the same order, reclaim() once a copy is done.

    `slots`: the host slots, (slot_bytes,) uint8 each. `make_outputs()` returns tensors for a batch, allocated on the
    caller's stream; with `static` it is called once. `kernel(staged, outputs)` fills them from a staging buffer,
    (slot_bytes,) uint8; it runs once here on zeros, a batch of padding, so that it is compiled before the first batch.
    `staging`: number of staging buffers. `overlap_copy`: copies run on their own stream; False: on the caller's, with
    the same edges and nothing left to overlap.

    The outputs belong to the stream that is current in deliver(): work that reads them on another must be ordered
    after it.
    """

    def __init__(
        self,
        device: Device,
        slots: Sequence[Any],
        make_outputs: Callable[[], Any],
        kernel: Kernel,
        *,
        staging: int = 2,
        overlap_copy: bool = True,
        static: bool = False,
    ) -> None:
        self._device = device
        self._slots = slots
        self._make_outputs = make_outputs
        self._kernel = kernel
        self._last_stream = device.current_stream()
        self._copies = device.new_stream() if overlap_copy else None
        self._static_outputs = make_outputs() if static else None
        self._staging = [device.zeros(len(slots[0])) for _ in range(staging)]
        self._copied = [device.new_event() for _ in slots]
        self._packed = [device.new_event() for _ in self._staging]
        self._switch = device.new_event()
        self._idle = deque(range(staging))
        self._in_use: deque[int] = deque()
        self._submitted: deque[tuple[int, int]] = deque()
        self._streams: set[Any] = set()
        device.launch(kernel, self._staging[0], self._static_outputs or make_outputs(), self._last_stream)
        for event in self._packed:
            device.record(event, self._last_stream)  # E0

    @property
    def can_submit(self) -> bool:
        """Whether a staging buffer is idle."""
        return bool(self._idle)

    @property
    def can_deliver(self) -> bool:
        """Whether a submitted batch has not been delivered."""
        return bool(self._submitted)

    @property
    def all_in_use(self) -> bool:
        """Whether every slot was submitted and none reclaimed."""
        return len(self._in_use) == len(self._slots)

    def submit(self, slot: int, used_bytes: int) -> None:
        """Queue the copy of `slots[slot][:used_bytes]` into an idle staging buffer; there must be one (can_submit)."""
        device, staged = self._device, self._idle.popleft()
        stream = device.current_stream() if self._copies is None else self._copies
        self._streams.add(stream)
        device.wait(stream, self._packed[staged])  # E0, E2
        device.copy(self._staging[staged][:used_bytes], self._slots[slot][:used_bytes], stream)
        device.record(self._copied[slot], stream)  # E3, E4
        self._in_use.append(slot)
        self._submitted.append((slot, staged))

    def deliver(self) -> Any:
        """Queue the kernel for the oldest submitted batch, on the caller's stream; return its output tensors.

        If that raises, out of memory for instance, nothing has changed: the next call delivers the same batch.
        """
        device, stream = self._device, self._device.current_stream()
        slot, staged = self._submitted[0]
        outputs = self._static_outputs
        if outputs is None:
            outputs = self._make_outputs()
        elif stream != self._last_stream:
            device.record(self._switch, self._last_stream)  # E5
            device.wait(stream, self._switch)  # E5
        self._last_stream = stream
        self._streams.add(stream)
        device.wait(stream, self._copied[slot])  # E3
        device.launch(self._kernel, self._staging[staged], outputs, stream)
        device.record(self._packed[staged], stream)  # E2
        self._submitted.popleft()
        self._idle.append(staged)
        return outputs

    def reclaim(self, *, wait: bool = False) -> list[int]:
        """Return the indices of slots whose copy is done, oldest first; with `wait`, first wait for the oldest."""
        if wait and self._in_use:
            self._device.synchronize(self._copied[self._in_use[0]])
        free = []
        while self._in_use and self._device.query(self._copied[self._in_use[0]]):  # E4
            free.append(self._in_use.popleft())
        return free

    def close(self) -> None:
        """Wait for everything queued here, and release the memory. May be called twice."""
        # Whole streams rather than events: an exception may have come between a copy and its record, and static
        # outputs return to the stream they were made on while the trainer's steps still read them on another.
        for stream in self._streams:
            self._device.record(self._switch, stream)  # E7
            self._device.synchronize(self._switch)  # E7
        self._streams.clear()
        self._static_outputs = None
        self._in_use.clear()
        self._submitted.clear()
        self._idle.clear()
        self._staging.clear()
