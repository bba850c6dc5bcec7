"""Pack slots that lie against forbidden memory: a read outside the slot ends a process by SIGSEGV.

    python guard_pack.py {triton,torch}    how a process ended in each case, as JSON

`after` puts a slot's last byte before a forbidden page, `before` its first byte after one. `overrun` makes the
executor read too far, by one word after or by sixteen before, to show that this ends the process. Each case is a fork,
so that torch and Triton are imported once.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import traceback
from collections.abc import Callable

import torch
from nanopack.kernels.pack import pack
from nanopack.kernels.pack_torch import pack_torch
from pack_oracle import BOS, IGNORE, SINGLES, WORD_BYTES, Slot, assert_exact, make_rows, make_slot, poisoned

LAUNCHERS = {"triton": pack, "torch": pack_torch}
# A masked and an unmasked variant; with 127, T+1 words fill a slot to its very end.
SEQ_LENS = (127, 128)
BATCH_SIZE = 3
kept: list[mmap.mmap] = []


def beside_forbidden(data: torch.Tensor, side: str) -> int:
    """Copy a slot's bytes against a page that may not be touched, and return their address."""
    page = mmap.PAGESIZE
    room = -(-len(data) // page) * page
    memory = mmap.mmap(-1, room + 2 * page)
    kept.append(memory)
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + page
    address = first if side == "before" else first + room - len(data)
    ctypes.memmove(address, data.data_ptr(), len(data))
    libc = ctypes.CDLL(None, use_errno=True)
    for forbidden in (first - page, first + room):
        if libc.mprotect(ctypes.c_void_p(forbidden), ctypes.c_size_t(page), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    return address


def tensor_at(address: int, size: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=torch.uint8)


def pack_beside(executor: str, side: str, seq_len: int, word_bytes: int, extras: frozenset[str]) -> None:
    rows = make_rows(5, BATCH_SIZE, seq_len, word_bytes)
    slot = make_slot(rows, seq_len, word_bytes, extras)
    data = tensor_at(beside_forbidden(slot.data, side), len(slot.data))
    outputs = poisoned((BATCH_SIZE, seq_len), extras, len(slot.cu))
    LAUNCHERS[executor](*slot.views(data), *outputs.values(), bos_id=BOS, ignore_index=IGNORE)
    assert_exact(outputs, rows, slot)


def overrun(executor: str, side: str) -> None:
    """Have the executor read outside: T one larger than the slot was made for, or a row before the slot."""
    slot: Slot = make_slot(make_rows(5, BATCH_SIZE, 127, 2), 127, 2, frozenset())
    size = len(slot.data)
    address = beside_forbidden(slot.data, side)
    words, table = slot.views(tensor_at(address, size))
    if side == "before":
        table[0] = -1
    if executor == "torch":
        # The twin keeps to the tensor it is given, so it needs one that lies about its memory.
        words, _ = slot.views(tensor_at(address - 32 if side == "before" else address, size + 32))
        table[0] += side == "before"
    outputs = poisoned((BATCH_SIZE, 127 if side == "before" else 128), frozenset(), 0)
    LAUNCHERS[executor](words, table, *outputs.values(), bos_id=BOS, ignore_index=IGNORE)


def pack_all_beside(executor: str, side: str) -> None:
    for seq_len in SEQ_LENS:
        for word_bytes in WORD_BYTES:
            for extras in SINGLES:
                pack_beside(executor, side, seq_len, word_bytes, extras)


def exit_code(run: Callable[[str, str], None], executor: str, side: str) -> int:
    if (pid := os.fork()) == 0:
        try:
            run(executor, side)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    ended = {}
    for side in ("after", "before"):
        ended[f"packed {side}"] = exit_code(pack_all_beside, sys.argv[1], side)
        ended[f"overrun {side}"] = exit_code(overrun, sys.argv[1], side)
    print(json.dumps(ended))
