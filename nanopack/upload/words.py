"""Bring all words of the data to the device, once.

    mapped files of token stores   ->   resident_words()   ->   words, end to end: kernels/gather.py reads them

The host reads the files a chunk at a time into one of two pinned buffers, while the other is copied.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from nanopack.upload.device import Cpu, Cuda

log = logging.getLogger("nanopack")

CHUNK_BYTES = 32 << 20

Progress = Callable[[int, int], None]
"""Takes the bytes that are done and all bytes."""


class Words:
    """All words, (n,) int16 or int32, and what they lie in, which `release` gives back."""

    def __init__(self, words: torch.Tensor, kept: Any = None, release: Callable[[], None] = lambda: None) -> None:
        self.words = words
        self.release = release
        self._kept = kept


def resident_words(
    arrays: Sequence[np.ndarray],
    dtype: np.dtype[Any],
    device: Cuda | Cpu,
    *,
    on_host: bool = False,
    progress: Progress | None = None,
) -> Words:
    """Return the words of all arrays end to end, as `dtype`, on the device, or with `on_host` in pinned host memory.

    On the CPU a single array of that type is used as it is, without being read. MemoryError where the device has not
    the room, or the host's memory cannot be pinned.
    """
    if isinstance(device, Cpu) and len(arrays) == 1 and arrays[0].itemsize == dtype.itemsize:
        return Words(_as_tensor(arrays[0], dtype), arrays[0])
    nbytes = sum(len(array) for array in arrays) * dtype.itemsize
    if on_host or isinstance(device, Cpu):
        return _in_host_memory(arrays, dtype, nbytes, device, progress or _log)
    return Words(_on_device(arrays, dtype, nbytes, device, progress or _log).view(_tensor_type(dtype)))


def check_ids(arrays: Sequence[np.ndarray], vocab_size: int) -> None:
    """Raise ValueError for an id that the vocabulary does not have; reads all words."""
    at = 0
    for part in _chunks(arrays, CHUNK_BYTES // 4):
        if len(part) and (largest := int(part.max())) >= vocab_size:
            raise ValueError(
                f"word {at + int(part.argmax())} of the data has the id {largest}; ids are from 0 to {vocab_size - 1}: "
                f"give the tokenizer, or the vocab_size, that the tokens were made with"
            )
        at += len(part)


def _tensor_type(dtype: np.dtype[Any]) -> torch.dtype:
    return torch.int16 if dtype.itemsize == 2 else torch.int32


def _as_tensor(array: np.ndarray, dtype: np.dtype[Any]) -> torch.Tensor:
    """Return the array as a tensor; torch would warn that a file mapped to be read can be written through one."""
    memory = (ctypes.c_char * array.nbytes).from_address(array.ctypes.data)
    return torch.frombuffer(memory, dtype=_tensor_type(dtype))


def _chunks(arrays: Sequence[np.ndarray], words: int) -> Iterator[np.ndarray]:
    """Yield all words as parts of at most `words`, each of one array."""
    for array in arrays:
        for begin in range(0, len(array), words):
            yield array[begin : begin + words]


def _in_host_memory(
    arrays: Sequence[np.ndarray], dtype: np.dtype[Any], nbytes: int, device: Cuda | Cpu, progress: Progress
) -> Words:
    memory = np.empty(nbytes // dtype.itemsize, dtype)
    with contextlib.ExitStack() as held:
        if not device.pin(memory):
            raise MemoryError(
                f"resident='host' needs {nbytes} bytes of pinned host memory for the words of the store, and they are "
                f"refused; raise the limit of locked memory (ulimit -l), or use resident=True or False"
            )
        held.callback(device.unpin, memory)
        at = 0
        for part in _chunks(arrays, CHUNK_BYTES // dtype.itemsize):
            np.copyto(memory[at : at + len(part)], part, casting="unsafe")
            at += len(part)
            progress(at * dtype.itemsize, nbytes)
        return Words(torch.from_numpy(memory.view(f"i{dtype.itemsize}")), memory, held.pop_all().close)


def _on_device(
    arrays: Sequence[np.ndarray], dtype: np.dtype[Any], nbytes: int, device: Cuda, progress: Progress
) -> torch.Tensor:
    free, total = device.free_bytes()
    if nbytes > free:
        raise MemoryError(
            f"resident=True needs {nbytes} bytes on {device.device} for the words of the store, and {free} of {total} "
            f"are free: use resident='host', which reads them in place from the host's memory, or resident=False"
        )
    whole = device.zeros(nbytes)
    size = min(nbytes, CHUNK_BYTES)
    buffers = np.empty((2, size), np.uint8)
    stream, done = device.current_stream(), [device.new_event(), device.new_event()]
    with contextlib.ExitStack() as held:
        if device.pin(buffers):
            held.callback(device.unpin, buffers)
        for event in done:
            held.callback(device.synchronize, event)
        at = 0
        for number, part in enumerate(_chunks(arrays, size // dtype.itemsize)):
            buffer, event, part_bytes = buffers[number % 2], done[number % 2], len(part) * dtype.itemsize
            device.synchronize(event)
            np.copyto(buffer[:part_bytes].view(dtype), part, casting="unsafe")
            device.copy(whole[at : at + part_bytes], torch.from_numpy(buffer[:part_bytes]), stream)
            device.record(event, stream)
            at += part_bytes
            progress(at, nbytes)
    return whole


def _log(done: int, nbytes: int) -> None:
    if done == nbytes:
        log.info("%d bytes of words are resident", nbytes)
    else:
        log.debug("%d of %d bytes of words are resident", done, nbytes)
