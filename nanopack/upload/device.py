"""Everything that a device is asked to do: one interface and its two implementations, Cuda and Cpu.

    upload.py   ->   Device   ->   Cuda: torch.cuda, which also serves ROCm
                                   Cpu: the host, where everything is done at once

The tests have a third implementation, which runs queued work as late, and in as unlucky an order, as the rules of
streams allow.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch

log = logging.getLogger("nanopack")

Kernel = Callable[[Any, Any], None]


class Device(Protocol):
    """What a device is asked to do. Streams and events are its own objects; memory is (n,) uint8 tensors."""

    def current_stream(self) -> Any:
        """The stream that receives the caller's work."""

    def new_stream(self) -> Any:
        """Return a stream other than the caller's, for copies."""

    def new_event(self) -> Any:
        """Return an event, which counts as done until it is recorded."""

    def zeros(self, nbytes: int) -> Any:
        """Return (nbytes,) uint8 zeros on the device, 64-byte aligned, allocated and written on the current stream."""

    def halves(self, memory: Any) -> tuple[Any, Any]:
        """Return the two halves of memory on the device."""
        ...

    def copy(self, to: Any, source: Any, stream: Any) -> None:
        """Queue on `stream` a copy of contiguous bytes, of one size, from host (`source`) to device (`to`).

        Either may be on the other side.
        """

    def number(self, memory: Any) -> int:
        """Return the int64 at the front of host memory."""
        ...

    def launch(self, kernel: Kernel, staged: Any, outputs: Any, stream: Any) -> None:
        """Queue on `stream`, the current one, kernel(staged, outputs), which reads `staged` and writes `outputs`."""

    def record(self, event: Any, stream: Any) -> None:
        """Queue the event: it is done once everything now in the stream is."""

    def wait(self, stream: Any, event: Any) -> None:
        """Make work queued on `stream` from now on wait for the event's latest record before this call."""

    def query(self, event: Any) -> bool:
        """Whether the event is done, without waiting."""
        ...

    def synchronize(self, event: Any) -> None:
        """Make the host wait for the event."""

    def capturing(self) -> bool:
        """Whether the current stream is being captured into a graph."""
        ...

    def pin(self, memory: np.ndarray) -> bool:
        """Page-lock host memory, so that copies from it are asynchronous. False, and a warning, if that is refused."""
        ...

    def unpin(self, memory: np.ndarray) -> None:
        """Undo a pin() that returned True, before the memory is released."""

    def named(self, what: str) -> AbstractContextManager[None]:
        """Show the block under this name in a profiler."""
        ...


def _halves(memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = memory.chunk(2)
    return first, second


def _number(memory: torch.Tensor) -> int:
    return int(memory[:8].view(torch.int64)[0])


class Cuda(Device):
    """A GPU, through torch: CUDA, and ROCm under the same names."""

    def __init__(self, device: torch.device) -> None:
        # "cuda" alone would mean another card once the caller makes that one current
        self.device = device if device.index is not None else torch.device("cuda", torch.cuda.current_device())

    def current_stream(self) -> Any:
        return torch.cuda.current_stream(self.device)

    def new_stream(self) -> Any:
        return torch.cuda.Stream(self.device)

    def new_event(self) -> Any:
        # blocking: a host that waits for it sleeps, and leaves its core to the producer
        return torch.cuda.Event(blocking=True)

    def zeros(self, nbytes: int) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, device=self.device)

    def halves(self, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _halves(memory)

    def number(self, memory: torch.Tensor) -> int:
        return _number(memory)

    def free_bytes(self) -> tuple[int, int]:
        """Return the bytes of device memory that can be allocated, and all there are."""
        free, total = torch.cuda.mem_get_info(self.device)
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + cached, total

    def copy(self, to: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        # One cudaMemcpyAsync, asynchronous if the driver knows `source` as pinned. Torch does not track memory that
        # it did not pin itself.
        with torch.cuda.stream(stream):
            to.copy_(source, non_blocking=True)

    def launch(self, kernel: Kernel, staged: torch.Tensor, outputs: Any, stream: Any) -> None:
        # Triton launches on the thread's current device, not the tensor's
        with torch.cuda.device(self.device):
            kernel(staged, outputs)

    def record(self, event: Any, stream: Any) -> None:
        event.record(stream)

    def wait(self, stream: Any, event: Any) -> None:
        stream.wait_event(event)

    def query(self, event: Any) -> bool:
        return bool(event.query())

    def synchronize(self, event: Any) -> None:
        event.synchronize()

    def capturing(self) -> bool:
        with torch.cuda.device(self.device):
            return torch.cuda.is_current_stream_capturing()

    def pin(self, memory: np.ndarray) -> bool:
        # The memory may be shared with another process. Flag 1: pinned in every CUDA context.
        code = int(torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, 1))
        if code != 0:
            log.warning(
                "%d bytes of host memory cannot be pinned (CUDA error %d): each copy to the device makes the host "
                "wait; use a smaller prefetch, or raise the limit of locked memory (ulimit -l)",
                *(memory.nbytes, code),
            )
            self._take_error()
        return code == 0

    def _take_error(self) -> None:
        """Let an operation fail in place of the caller's next one: CUDA keeps an error until somebody has seen it."""
        with contextlib.suppress(RuntimeError):
            self.zeros(1)

    def unpin(self, memory: np.ndarray) -> None:
        code = int(torch.cuda.cudart().cudaHostUnregister(memory.ctypes.data))
        if code != 0:
            self._take_error()
            raise RuntimeError(f"unpinning {memory.nbytes} bytes of host memory failed with CUDA error {code}")

    def named(self, what: str) -> AbstractContextManager[None]:
        shown: AbstractContextManager[None] = torch.cuda.nvtx.range(what)
        return shown


def _on_one_thread(work: Callable[..., object], *arguments: Any) -> None:
    """Keep torch from splitting an operation across its threads, which a batch is barely large enough for.

    While the producer is busy too, waiting for the last thread costs a scheduler's time slice: milliseconds for an
    operation of microseconds.
    """
    if (threads := torch.get_num_threads()) > 1:
        torch.set_num_threads(1)
    try:
        work(*arguments)
    finally:
        if threads > 1:
            torch.set_num_threads(threads)


class Cpu(Device):
    """The host itself: one stream, None, and queued work is done at once."""

    device = torch.device("cpu")

    def current_stream(self) -> None:
        pass

    def new_stream(self) -> None:
        pass

    def new_event(self) -> None:
        pass

    def zeros(self, nbytes: int) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, device="cpu")

    def halves(self, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _halves(memory)

    def number(self, memory: torch.Tensor) -> int:
        return _number(memory)

    def copy(self, to: torch.Tensor, source: torch.Tensor, stream: None) -> None:
        _on_one_thread(to.copy_, source)

    def launch(self, kernel: Kernel, staged: torch.Tensor, outputs: Any, stream: None) -> None:
        _on_one_thread(kernel, staged, outputs)

    def record(self, event: None, stream: None) -> None:
        pass

    def wait(self, stream: None, event: None) -> None:
        pass

    def query(self, event: None) -> bool:
        return True

    def synchronize(self, event: None) -> None:
        pass

    def capturing(self) -> bool:
        return False

    def pin(self, memory: np.ndarray) -> bool:
        return True

    def unpin(self, memory: np.ndarray) -> None:
        pass

    def named(self, what: str) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


def open_device(device: str | torch.device | None) -> Cuda | Cpu:
    """Return the device of that name; None means the current GPU if there is one, else the CPU.

    ValueError for what torch does not know, and for devices other than CUDA (ROCm included) and the CPU.
    """
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
