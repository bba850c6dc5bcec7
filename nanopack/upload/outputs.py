"""Allocate the tensors that the kernel writes.

Loader(device=, static=)   ->   outputs_maker()   ->   Outputs for each batch, filled by the kernel
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from nanopack.config import LoaderConfig
from nanopack.kernels import CU_ALIGN
from nanopack.ring.layout import ALIGN_BYTES, Layout


class Outputs(NamedTuple):
    """The tensors of a batch, in the kernel's order: (B, T), but for cu_seqlens, (a multiple of CU_ALIGN,)."""

    inputs: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor | None
    positions: torch.Tensor | None
    doc_ids: torch.Tensor | None
    cu_seqlens: torch.Tensor | None


def outputs_maker(config: LoaderConfig, layout: Layout, device: torch.device) -> Callable[[], Outputs]:
    """Return a function that allocates a batch's tensors, uninitialised: the kernel writes every element."""

    def maker(dtype: torch.dtype, size: int | None = None, wanted: bool = True) -> Callable[[], Any]:
        shape = (config.batch_size, config.seq_len) if size is None else (size,)
        if not wanted:
            return lambda: None
        # on a GPU torch itself caches freed memory
        return HostMemory(shape, dtype).empty if device.type == "cpu" else _allocator(shape, dtype, device)

    # the kernel writes both cu_seqlens as one
    cu_size = -(-(layout.real_at + (layout.max_segments or 0) + 1) // CU_ALIGN) * CU_ALIGN
    inputs, targets = maker(torch.int32), maker(torch.int64)
    weights = maker(torch.float32, wanted=config.loss_weights is not None)
    positions = maker(torch.int32, wanted="positions" in config.extras)
    doc_ids = maker(torch.int32, wanted="doc_ids" in config.extras)
    cu_seqlens = maker(torch.int32, cu_size, wanted=layout.max_segments is not None)
    return lambda: Outputs(inputs(), targets(), weights(), positions(), doc_ids(), cu_seqlens())


def _allocator(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Callable[[], torch.Tensor]:
    return lambda: torch.empty(shape, dtype=dtype, device=device)


class _Lent(weakref.ref):  # type: ignore[type-arg]
    """A weak reference that is itself wherever it is looked up, and holds what its referent is a view of."""

    memory: np.ndarray
    __hash__ = object.__hash__
    __eq__ = object.__eq__


class HostMemory:
    """Pool of host buffers of one shape and dtype; a buffer is reused once no tensor refers to it.

    Fresh pages from the system cost several times what it takes to write a batch into them.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._shape = shape
        self._dtype = torch.empty(0, dtype=dtype, device="cpu").numpy().dtype
        # About what a training loop holds at a time; if many batches are dropped at once, the rest is freed.
        self._idle: deque[_Lent] = deque(maxlen=4)
        self._out: dict[_Lent, _Lent] = {}

    def empty(self) -> torch.Tensor:
        """Return an uninitialised tensor of the pool's shape and dtype, 64-byte aligned."""
        memory = self._idle.pop().memory if self._idle else self._fresh()
        # the tensor, its views and what autograd saves of it refer to `view`: it dies with the last of them
        view = memory.view()
        # no function of ours is called when it dies: a Ctrl-C that came in it would be lost
        lent = _Lent(view, self._idle.append)
        lent.memory = memory
        self._out[_Lent(view, self._out.pop)] = lent
        return torch.from_numpy(view)

    def _fresh(self) -> np.ndarray:
        nbytes = math.prod(self._shape) * self._dtype.itemsize
        memory = np.empty(nbytes + ALIGN_BYTES, np.uint8)
        aligned = memory[-memory.ctypes.data % ALIGN_BYTES :][:nbytes]
        return aligned.view(self._dtype).reshape(self._shape)
