"""Choose the function that turns a slot into tensors, and make the tensors that it writes.

a staged slot (upload.py)   ->   kernel(staged, outputs)   ->   Outputs, which loader.py hands out as a Batch
                                 kernels/pack.py or its torch twin
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from nanopack.device import Kernel
from nanopack.kernels import CU_ALIGN
from nanopack.kernels.pack_torch import pack_torch
from nanopack.recipe import Recipe
from nanopack.ring import Layout


class Outputs(NamedTuple):
    """The tensors of a batch, in the order in which the kernel takes them; cu_seqlens up to a multiple of CU_ALIGN."""

    inputs: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor | None
    positions: torch.Tensor | None
    doc_ids: torch.Tensor | None
    cu_seqlens: torch.Tensor | None


def make_outputs(recipe: Recipe, layout: Layout, device: torch.device) -> Outputs:
    """Return fresh tensors for a batch, uninitialised: the kernel writes every element."""
    shape = (recipe.batch_size, recipe.seq_len)

    def empty(dtype: torch.dtype, wanted: bool = True) -> Any:
        return torch.empty(shape, dtype=dtype, device=device) if wanted else None

    cu_seqlens = None
    if layout.max_segments is not None:
        size = -(-(layout.max_segments + 1) // CU_ALIGN) * CU_ALIGN
        cu_seqlens = torch.empty(size, dtype=torch.int32, device=device)
    return Outputs(
        inputs=empty(torch.int32),
        targets=empty(torch.int64),
        weights=empty(torch.float32, recipe.weights is not None),
        positions=empty(torch.int32, "positions" in recipe.extras),
        doc_ids=empty(torch.int32, "doc_ids" in recipe.extras),
        cu_seqlens=cu_seqlens,
    )


def make_kernel(executor: str | None, device: torch.device, layout: Layout, bos_id: int, ignore_index: int) -> Kernel:
    """Return kernel(staged, outputs): the executor of that name, bound to what is the same for every batch."""
    pack = _choose(executor, device)
    word = torch.int16 if layout.word_bytes == 2 else torch.int32

    def kernel(staged: torch.Tensor, outputs: Outputs) -> None:
        pack(staged.view(word), staged.view(torch.int32), *outputs, bos_id=bos_id, ignore_index=ignore_index)

    return kernel


def _choose(executor: str | None, device: torch.device) -> Callable[..., None]:
    """Return `pack` or `pack_torch`; ValueError where it cannot run here."""
    if executor not in (None, "triton", "torch"):
        raise ValueError(f"executor={executor!r} is not allowed; use 'triton', 'torch' or None")
    installed = importlib.util.find_spec("triton") is not None
    if executor == "torch" or (executor is None and not (device.type == "cuda" and installed)):
        twin: Callable[..., None] = pack_torch
        return twin
    if not installed:
        raise ValueError("executor='triton' needs Triton, which is not installed here; use executor='torch'")
    import triton

    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise ValueError(
            "executor='triton' runs on the CPU only in Triton's interpreter; set TRITON_INTERPRET=1 before anything "
            "imports triton, or use executor='torch'"
        )
    from nanopack.kernels.pack import pack

    chosen: Callable[..., None] = pack
    return chosen
