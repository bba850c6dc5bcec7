"""Gather from data and tables that lie against forbidden memory, as guard_pack.py packs slots.

    python guard_gather.py {triton,torch}    how a process ended in each case, as JSON

`overrun` names a run one word after the data, or one before them, to show that this ends the process.
"""

from __future__ import annotations

import json
import sys

import torch
from gather_oracle import Laid, lay_out
from guard_pack import BATCH_SIZE, SEQ_LENS, beside_forbidden, exit_code, tensor_at
from nanopack.kernels.gather import gather
from nanopack.kernels.gather_torch import gather_torch
from pack_oracle import BOS, IGNORE, SINGLES, WORD_BYTES, assert_exact, full_row, make_rows, poisoned

LAUNCHERS = {"triton": gather, "torch": gather_torch}
NUMBERS = {"bos_id": BOS, "ignore_index": IGNORE, "all_in_loss": False, "marked": True}


def guarded(tensor: torch.Tensor, side: str) -> torch.Tensor:
    """The same numbers against a page that may not be touched."""
    data = tensor.view(torch.uint8)
    return tensor_at(beside_forbidden(data, side), len(data)).view(tensor.dtype)


def gather_beside(executor: str, side: str, laid: Laid, seq_len: int, extras: frozenset[str]) -> None:
    words, table = guarded(laid.words, side), guarded(laid.table, side)
    outputs = poisoned((BATCH_SIZE, seq_len), extras, len(laid.cu))
    LAUNCHERS[executor](words, table, *outputs.values(), **NUMBERS)
    assert_exact(outputs, laid.seen(all_in_loss=False, marked=True), laid)


def gather_all_beside(executor: str, side: str) -> None:
    for seq_len in SEQ_LENS:
        for word_bytes in WORD_BYTES:
            for extras in SINGLES:
                rows = make_rows(5, BATCH_SIZE, seq_len, word_bytes)
                gather_beside(executor, side, lay_out(rows, seq_len, word_bytes, marked=True), seq_len, extras)


def overrun(executor: str, side: str) -> None:
    """Have the executor read a word outside the data."""
    laid = lay_out([full_row(128, [(0, 1.0)])], 128, 2)
    lie = -1 if side == "before" else 1
    table = laid.table.clone()
    origin = table.view(torch.int64)[2 * int(table[1]) + 1 :]
    origin[0] += lie
    words = guarded(laid.words, side)
    if executor == "torch":
        # The twin keeps to the tensor it is given, so it needs one that lies about its memory.
        address = words.data_ptr() + 2 * min(0, lie)
        words = tensor_at(address, 2 * len(words) + 2).view(torch.int16)
        origin[0] -= min(0, lie)
    outputs = poisoned((1, 128), frozenset(), 0)
    LAUNCHERS[executor](words, table, *outputs.values(), **NUMBERS)


if __name__ == "__main__":
    ended = {}
    for side in ("after", "before"):
        ended[f"gathered {side}"] = exit_code(gather_all_beside, sys.argv[1], side)
        ended[f"overrun {side}"] = exit_code(overrun, sys.argv[1], side)
    print(json.dumps(ended))
