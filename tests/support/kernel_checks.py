"""What the tests of all kernels share: edges, marks, and a watch over what an interpreted kernel reads and writes."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nanopack.kernels import pack_torch
from pack_oracle import BOS, IGNORE, SUBSETS, WORD_BYTES, Row, full_row


def name_of(extras: frozenset[str]) -> str:
    return "+".join(sorted(extras)) or "no extras"


# Where there is a GPU, conftest.py leaves the interpreter off, and Triton then takes the GPU's tensors only.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUMBERS = {"bos_id": BOS, "ignore_index": IGNORE}
interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="watches Triton's interpreter, which is off with a GPU")
guarded = pytest.mark.skipif(sys.platform != "linux", reason="forbids memory by Linux's mprotect")
each_width = pytest.mark.parametrize("word_bytes", WORD_BYTES, ids=["16-bit words", "32-bit words"])
each_subset = pytest.mark.parametrize("extras", SUBSETS, ids=name_of)
on_a_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device: nothing else shows what one does")


def each_executor_of(kernel: Callable[..., None], twin: Callable[..., None]) -> pytest.MarkDecorator:
    """Run a test with the kernel, the twin, and the twin as where it does not know the pieces of the fullest row."""

    def elsewhere(*args: Any, **kwargs: Any) -> None:
        most_pieces = pack_torch._most_pieces
        pack_torch._most_pieces = lambda n_pieces, seq_len: seq_len + 1
        try:
            twin(*args, **kwargs)
        finally:
            pack_torch._most_pieces = most_pieces

    names = ["triton", "torch", "torch as on an accelerator"]
    return pytest.mark.parametrize("executor", [kernel, twin, elsewhere], ids=names)


EDGES = {
    "all rows empty": (4, [Row(), Row(), Row()]),
    "empty between full": (128, [full_row(128, [(0, 0.5)]), Row(), full_row(128, [(0, 2.0)])]),
    "a piece whose only word is in column T": (128, [full_row(128, [(0, 0.25), (128, 4.0)])]),
    "every word a piece": (129, [full_row(129, [(c, c / 8) for c in range(130)])]),
    "one column": (1, [full_row(1, [(0, 0.5), (1, 2.0)]), Row([3], [True], [(0, 1.0)]), Row()]),
    "largest id of a 16-bit word": (384, [full_row(384, [(0, 1.0)], token=32767)]),
    "row ends at a block's end": (640, [Row([9] * 128, [True] * 128, [(0, 0.5), (127, 0.25)])]),
    "row ends one word into a block": (640, [Row([9] * 129, [True] * 129, [(0, 0.5), (128, 0.25)])]),
    "nothing in the loss": (128, [Row([1] * 129, [False] * 129, [(0, 1.0)])]),
    "in the loss in column 0 alone, which is no target": (2, [Row([1, 1, 1], [True, False, False], [(0, 1.0)])]),
}


class Watch:
    """Counts how often the interpreted kernel reads and writes each byte, by address."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import interpreter_builder as builder

        self.read: Counter[int] = Counter()
        self.written: Counter[int] = Counter()
        load, store = builder.create_masked_load, builder.create_masked_store

        def watched_load(ptrs, mask, *rest):
            self.count(self.read, ptrs, mask)
            return load(ptrs, mask, *rest)

        def watched_store(ptrs, value, mask, *rest):
            self.count(self.written, ptrs, mask)
            return store(ptrs, value, mask, *rest)

        monkeypatch.setattr(builder, "create_masked_load", watched_load)
        monkeypatch.setattr(builder, "create_masked_store", watched_store)

    @staticmethod
    def count(counts: Counter[int], ptrs, mask) -> None:
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        first = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)].astype(np.int64)
        counts.update((first[:, None] + np.arange(size)).flatten().tolist())


def bytes_of(tensor: torch.Tensor) -> range:
    return range(tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size())


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)


@contextmanager
def syncs_raise() -> Iterator[None]:
    """Let whatever makes the host wait for the GPU raise."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
