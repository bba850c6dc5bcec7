"""Everything that a device is asked to do: one interface, and its two real forms, each thin enough to be read.

    upload.py   ->   Device   ->   Cuda: torch.cuda, which also serves ROCm
                                   Cpu: the host, where all is done at once

The tests have a third form, which runs what is queued as late, and in as bad an order, as the rules of streams allow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch

Kernel = Callable[[Any, Any], None]


class Device(Protocol):
    """What a device can be asked to do. Streams and events are its own objects; memory is uint8 tensors."""

    def current_stream(self) -> Any:
        """Return the stream that the caller's work goes to."""

    def new_stream(self) -> Any:
        """Return a stream of our own."""

    def new_event(self) -> Any:
        """Return an event; until it is recorded it counts as done."""

    def zeros(self, nbytes: int) -> Any:
        """Return (nbytes,) uint8 zeros on the device, allocated and written on the current stream."""

    def copy(self, to: Any, source: Any, stream: Any) -> None:
        """Queue a copy of bytes from host to device."""

    def launch(self, kernel: Kernel, staged: Any, outputs: Any, stream: Any) -> None:
        """Queue kernel(staged, outputs), which reads the one and writes the others, on the current stream."""

    def record(self, event: Any, stream: Any) -> None:
        """Queue the event: it is done when all that is now in the stream is."""

    def wait(self, stream: Any, event: Any) -> None:
        """Let what is queued from now on wait for the event, as it is recorded now."""

    def query(self, event: Any) -> bool:
        """Return whether the event is done, without waiting."""

    def synchronize(self, event: Any) -> None:
        """Make the host wait for the event."""

    def capturing(self) -> bool:
        """Return whether the current stream is being captured into a graph."""

    def pin(self, memory: np.ndarray) -> None:
        """Make host memory known to the device, so that copies from it are asynchronous."""

    def unpin(self, memory: np.ndarray) -> None:
        """Take that back, before the memory goes."""

    def named(self, what: str) -> AbstractContextManager[None]:
        """Let a profiler show the block under this name."""


class Cuda:
    """A GPU, through torch: CUDA, and ROCm under the same names."""

    def __init__(self, device: torch.device) -> None:
        # "cuda" alone would mean another card once the caller makes that one current
        self.device = device if device.index is not None else torch.device("cuda", torch.cuda.current_device())

    def current_stream(self) -> Any:
        """Return the stream that the caller's work goes to."""
        return torch.cuda.current_stream(self.device)

    def new_stream(self) -> Any:
        """Return a stream of our own."""
        return torch.cuda.Stream(self.device)

    def new_event(self) -> Any:
        """Return an event; until it is recorded it counts as done."""
        # blocking: while the host waits for it, it sleeps, and leaves its core to the producer
        return torch.cuda.Event(blocking=True)

    def zeros(self, nbytes: int) -> torch.Tensor:
        """Return (nbytes,) uint8 zeros on the device, allocated and written on the current stream."""
        return torch.zeros(nbytes, dtype=torch.uint8, device=self.device)

    def copy(self, to: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        """Queue a copy of bytes from host to device.

        Both are contiguous bytes, so this is one cudaMemcpyAsync, and asynchronous where the driver knows `source` as
        pinned. Torch asks nothing more, and keeps no watch over memory that it did not pin itself.
        """
        with torch.cuda.stream(stream):
            to.copy_(source, non_blocking=True)

    def launch(self, kernel: Kernel, staged: torch.Tensor, outputs: Any, stream: Any) -> None:
        """Queue kernel(staged, outputs), which reads the one and writes the others, on the current stream."""
        # Triton launches on the current device, which is the thread's and not the tensor's
        with torch.cuda.device(self.device):
            kernel(staged, outputs)

    def record(self, event: Any, stream: Any) -> None:
        """Queue the event: it is done when all that is now in the stream is."""
        event.record(stream)

    def wait(self, stream: Any, event: Any) -> None:
        """Let what is queued from now on wait for the event, as it is recorded now."""
        stream.wait_event(event)

    def query(self, event: Any) -> bool:
        """Return whether the event is done, without waiting."""
        return bool(event.query())

    def synchronize(self, event: Any) -> None:
        """Make the host wait for the event."""
        event.synchronize()

    def capturing(self) -> bool:
        """Return whether the current stream is being captured into a graph."""
        with torch.cuda.device(self.device):
            return torch.cuda.is_current_stream_capturing()

    def pin(self, memory: np.ndarray) -> None:
        """Register host memory, which may be shared with another process, as pinned for every context (flag 1)."""
        self._check(torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, 1), "pinning", memory)

    def unpin(self, memory: np.ndarray) -> None:
        """Take that back, before the memory goes."""
        self._check(torch.cuda.cudart().cudaHostUnregister(memory.ctypes.data), "unpinning", memory)

    def named(self, what: str) -> AbstractContextManager[None]:
        """Let a profiler show the block under this name, as an NVTX range."""
        shown: AbstractContextManager[None] = torch.cuda.nvtx.range(what)
        return shown

    def _check(self, code: Any, what: str, memory: np.ndarray) -> None:
        if int(code) != 0:
            raise RuntimeError(
                f"{what} {memory.nbytes} bytes of host memory failed with CUDA error {int(code)}; use a smaller "
                f"prefetch, or raise the limit of locked memory (ulimit -l)"
            )


def _on_one_thread(work: Callable[..., object], *arguments: Any) -> None:
    """Keep torch from sharing an operation among its threads, for which a batch is just large enough.

    Where the producer is at work too, the wait for the last thread is a time slice of the scheduler: milliseconds for
    an operation of microseconds.
    """
    if (threads := torch.get_num_threads()) > 1:
        torch.set_num_threads(1)
    try:
        work(*arguments)
    finally:
        if threads > 1:
            torch.set_num_threads(threads)


class Cpu:
    """The host itself: one stream, and what is queued is done at once."""

    device = torch.device("cpu")

    def current_stream(self) -> None:
        """Return the only stream."""

    def new_stream(self) -> None:
        """Return the only stream."""

    def new_event(self) -> None:
        """Return an event that is always done."""

    def zeros(self, nbytes: int) -> torch.Tensor:
        """Return (nbytes,) uint8 zeros; torch aligns them to 64 bytes."""
        return torch.zeros(nbytes, dtype=torch.uint8, device="cpu")

    def copy(self, to: torch.Tensor, source: torch.Tensor, stream: None) -> None:
        """Copy bytes, on this thread alone."""
        _on_one_thread(to.copy_, source)

    def launch(self, kernel: Kernel, staged: torch.Tensor, outputs: Any, stream: None) -> None:
        """Run the kernel, on this thread alone."""
        _on_one_thread(kernel, staged, outputs)

    def record(self, event: None, stream: None) -> None:
        """Do nothing: all is done already."""

    def wait(self, stream: None, event: None) -> None:
        """Do nothing: all is done already."""

    def query(self, event: None) -> bool:
        """Return True: all is done already."""
        return True

    def synchronize(self, event: None) -> None:
        """Do nothing: all is done already."""

    def capturing(self) -> bool:
        """Return False: there are no graphs."""
        return False

    def pin(self, memory: np.ndarray) -> None:
        """Do nothing: the host reads its own memory."""

    def unpin(self, memory: np.ndarray) -> None:
        """Do nothing: the host reads its own memory."""

    def named(self, what: str) -> AbstractContextManager[None]:
        """Do nothing: Python's profilers know the names of functions."""
        return contextlib.nullcontext()


def open_device(device: str | torch.device | None) -> Cuda | Cpu:
    """Return the device of that name; None means the current GPU where there is one, else the CPU."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r} is not a device of torch ({error}); use 'cuda', 'cpu' or None") from error
    if chosen.type == "cuda" and torch.cuda.is_available():
        return Cuda(chosen)
    if chosen.type == "cpu":
        return Cpu()
    why = (
        "there is no CUDA device here" if chosen.type == "cuda" else "only CUDA (ROCm included) and the CPU are served"
    )
    raise ValueError(f"device={device!r} is not allowed: {why}; use 'cpu' and move the batches yourself")
