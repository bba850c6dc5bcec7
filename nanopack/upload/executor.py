"""Choose the function that turns a slot into tensors.

a staged slot (upload.py)   ->   kernel(staged, outputs)   ->   Outputs, the tensors of a Batch
                                 kernels/pack.py or its torch twin
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import torch

from nanopack.kernels.pack_torch import make_scratch, pack_torch
from nanopack.ring.layout import Layout
from nanopack.upload.device import Kernel
from nanopack.upload.outputs import Outputs


def make_kernel(executor: str | None, device: torch.device, layout: Layout, bos_id: int, ignore_index: int) -> Kernel:
    """Return kernel(staged, outputs): the named executor, with everything bound that is the same for every batch.

    It fills `outputs` from `staged`, (slot_bytes,) uint8. ValueError if the executor does not run here.
    """
    pack = _choose(executor, device)
    word = torch.int16 if layout.word_bytes == 2 else torch.int32
    # Not on a GPU: batches that are taken on streams in turn would write to one work space at once.
    if pack is pack_torch and device.type == "cpu":
        scratch = make_scratch(torch.empty(0, dtype=word, device=device), layout.batch_size, layout.seq_len)
        pack = partial(pack_torch, scratch=scratch)

    def kernel(staged: torch.Tensor, outputs: Outputs) -> None:
        pack(staged.view(word), staged.view(torch.int32), *outputs, bos_id=bos_id, ignore_index=ignore_index)

    return kernel


def _choose(executor: str | None, device: torch.device) -> Callable[..., None]:
    """Return `pack` or `pack_torch`; ValueError if it does not run here."""
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
