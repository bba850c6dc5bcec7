"""Compile a kernel for GPUs that need not be there, and print, as JSON, what came out.

    python compile_kernel.py sm_90 few pack advance   registers, stack and memory instructions of each variant of these
                                                      kernels on that target; few: without extras and with all of
                                                      them, all: with each extra alone as well, every: all combinations
    python compile_kernel.py launches pack            how often a thousand launches compile

The kernels are pack, gather, graph, which is gather with a counter, and advance, which has but one variant. A stand-in
for Triton's driver lets the launcher itself run, so what is compiled is what would be launched: its block, its warps,
and the facts on alignment that Triton finds in the tensors. Needs a process of its own, in which TRITON_INTERPRET is
not set. test_compile.py runs it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from nanopack.kernels import advance, gather, pack
from pack_oracle import SINGLES, SUBSETS, WORD_BYTES, poisoned
from triton.backends.compiler import GPUTarget

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
USUAL, UNUSUAL = 2048, 1001


class Driver:
    """As much of a driver as a launch asks for."""

    target = "sm_90"
    utils = SimpleNamespace(
        load_binary=lambda *args: (None, None, 0, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 1 << 16},
    )

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *args: None


def launch(
    kernel: str, word_bytes: int, seq_len: int, extras: frozenset[str], batch_size: int = 4, ignore_index: int = -100
) -> None:
    data = torch.empty(batch_size * (seq_len + 17) * 8, dtype=torch.int32)
    words = data.view(torch.int16) if word_bytes == 2 else data
    outputs = poisoned((batch_size, seq_len), extras, 1000).values()
    numbers = {"bos_id": batch_size, "ignore_index": ignore_index}
    counter = torch.zeros(3, dtype=torch.int64)
    if kernel == "pack":
        pack.pack(words, data, *outputs, **numbers)
    elif kernel == "advance":
        advance.advance(data.view(torch.int64), counter, torch.zeros(4, dtype=torch.int64))
    else:
        if kernel == "gather":
            counter = None
        gather.gather(words, data, *outputs, **numbers, all_in_loss=False, marked=False, counter=counter)


FUNCTIONS = {"pack": pack._pack, "gather": gather._gather, "graph": gather._gather, "advance": advance._advance}


def compiled(kernel: str) -> list[Any]:
    """Every kernel that launches have compiled, the latest last."""
    return list(FUNCTIONS[kernel].device_caches[0][0].values())


def variants(driver: Driver, kernel: str, target: str, which: str) -> list[dict[str, Any]]:
    """What each variant becomes on one target."""
    ends = (SINGLES[0], SINGLES[-1])
    driver.target = target
    pack._WARP = TARGETS[target].warp_size
    usual = {"few": ends, "all": SINGLES, "every": SUBSETS}[which]
    shapes = [(USUAL, word_bytes, extras) for word_bytes in WORD_BYTES for extras in usual]
    shapes += [(UNUSUAL, word_bytes, extras) for word_bytes in WORD_BYTES for extras in ends]
    if kernel == "advance":
        shapes = shapes[:1]
    facts = []
    for seq_len, word_bytes, extras in shapes:
        launch(kernel, word_bytes, seq_len, extras)
        last = compiled(kernel)[-1]
        found = nvidia(last) if TARGETS[target].backend == "cuda" else amd(last)
        facts.append({"seq_len": seq_len, "word_bytes": word_bytes, "extras": sorted(extras), **found})
    return facts


def nvidia(kernel: Any) -> dict[str, Any]:
    """Read `cuobjdump`: STL and LDL are what spills become, STG and LDG reach global memory."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "pack.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        dump = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(cubin)]
        text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    used = {key.lower(): int(n) for key, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    ops = Counter(re.findall(r"/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text))
    return {
        "registers": used["reg"],
        "stack": used["stack"] + used["local"],
        "spills": [op for op in ops if re.match(r"(STL|LDL)\b", op)],
        "instructions": sum(n for op, n in ops.items() if op != "NOP"),
        "stores": {op: n for op, n in ops.items() if re.match(r"(STG|ST|RED|ATOMG?)(\.|$)", op)},
        "loads": {op: n for op, n in ops.items() if re.match(r"(LDG|LD)(\.|$)", op)},
    }


def amd(kernel: Any) -> dict[str, Any]:
    """Read the assembly: scratch is where spills and stacks live, global, buffer and flat reach global memory."""
    text = kernel.asm["amdgcn"]
    used = {key: int(n) for key, n in re.findall(r"\.(\w+):\s+(\d+)", text)}
    ops = Counter(re.findall(r"^\s+((?:global|buffer|flat|scratch)_\w+)", text, re.MULTILINE))
    return {
        "registers": used["vgpr_count"],
        "stack": used["private_segment_fixed_size"],
        "spills": [op for op in ops if op.startswith("scratch")]
        + ["spill"] * (used["vgpr_spill_count"] + used["sgpr_spill_count"]),
        "instructions": len(re.findall(r"^\s+[a-z]+_\w+", text, re.MULTILINE)),
        "stores": {op: n for op, n in ops.items() if "store" in op or "atomic" in op},
        "loads": {op: n for op, n in ops.items() if "load" in op},
    }


def launches(kernel: str) -> list[int]:
    """Compilations after a thousand launches with 16-bit words, and after as many more with 32-bit words."""
    after = []
    for word_bytes in WORD_BYTES:
        for i in range(1000):
            # 1, multiples of 16 and numbers beyond 32 bits are what Triton would compile apart.
            ignore_index = (-100, 1, 0, -(2**40))[i % 4]
            launch(kernel, word_bytes, 128, SINGLES[-1], batch_size=1 + i % 33, ignore_index=ignore_index)
        after.append(len(compiled(kernel)))
    return after


if __name__ == "__main__":
    stand_in = Driver()
    triton.runtime.driver.set_active(stand_in)
    if sys.argv[1] == "launches":
        print(json.dumps({kernel: launches(kernel) for kernel in sys.argv[2:]}))
    else:
        target, which, *kernels = sys.argv[1:]
        print(json.dumps({kernel: variants(stand_in, kernel, target, which) for kernel in kernels}))
