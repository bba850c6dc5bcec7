"""Choose the function that turns a slot into tensors.

a staged slot (upload.py)   ->   kernel(staged, outputs)   ->   Outputs, the tensors of a Batch
                                 kernels/pack.py, or gather.py where words are resident, or their torch twins
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from nanopack.kernels.gather_torch import advance_torch, gather_torch
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


class Gathering(NamedTuple):
    """What a kernel that gathers is bound to."""

    words: torch.Tensor
    bos_id: int
    ignore_index: int
    all_in_loss: bool
    marked: bool


def make_gather(executor: str | None, device: torch.device, layout: Layout, what: Gathering) -> Kernel:
    """Return kernel(staged, outputs) as `make_kernel` does, for slots that hold a table. ValueError as there."""
    gather = _gather(executor, device, layout, what)

    def kernel(staged: torch.Tensor, outputs: Outputs) -> None:
        gather(what.words, staged.view(torch.int32), *outputs, **_numbers(what))

    return kernel


def make_load(
    executor: str | None,
    device: torch.device,
    layout: Layout,
    what: Gathering,
    tables: torch.Tensor,
    counter: torch.Tensor,
    facts: torch.Tensor,
) -> Kernel:
    """Return load(half, outputs) for `Halves`, bound to the tables, the counter, and `facts`, (4,) int64."""
    gather = _gather(executor, device, layout, what)
    runs_triton = _runs_triton(executor, device)
    if runs_triton:
        from nanopack.kernels.advance import advance
    advancing: Callable[..., None] = advance if runs_triton else advance_torch
    table, records, numbers = tables.view(torch.int32), tables.view(torch.int64), counter.view(torch.int64)

    def load(half: torch.Tensor, outputs: Outputs) -> None:
        gather(what.words, table, *outputs, counter=numbers, **_numbers(what))
        advancing(records, numbers, facts)

    return load


def _numbers(what: Gathering) -> dict[str, Any]:
    numbers = what._asdict()
    del numbers["words"]
    return numbers


def _gather(executor: str | None, device: torch.device, layout: Layout, what: Gathering) -> Callable[..., None]:
    """Return `gather` or its twin; ValueError if it does not run here."""
    if _runs_triton(executor, device):
        from nanopack.kernels.gather import gather

        chosen: Callable[..., None] = gather
        return chosen
    if device.type != what.words.device.type:
        raise ValueError("resident='host' needs executor='triton': torch does not read the host's memory from a GPU")
    if device.type == "cpu":
        return partial(gather_torch, scratch=make_scratch(what.words, layout.batch_size, layout.seq_len))
    twin: Callable[..., None] = gather_torch
    return twin


def _choose(executor: str | None, device: torch.device) -> Callable[..., None]:
    """Return `pack` or `pack_torch`; ValueError if it does not run here."""
    if _runs_triton(executor, device):
        from nanopack.kernels.pack import pack

        chosen: Callable[..., None] = pack
        return chosen
    twin: Callable[..., None] = pack_torch
    return twin


def _runs_triton(executor: str | None, device: torch.device) -> bool:
    """Return whether Triton is asked for; ValueError if that does not run here."""
    if executor not in (None, "triton", "torch"):
        raise ValueError(f"executor={executor!r} is not allowed; use 'triton', 'torch' or None")
    installed = importlib.util.find_spec("triton") is not None
    if executor == "torch" or (executor is None and not (device.type == "cuda" and installed)):
        return False
    if not installed:
        raise ValueError("executor='triton' needs Triton, which is not installed here; use executor='torch'")
    import triton

    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise ValueError(
            "executor='triton' runs on the CPU only in Triton's interpreter; set TRITON_INTERPRET=1 before anything "
            "imports triton, or use executor='torch'"
        )
    return True
