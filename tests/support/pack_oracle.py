"""What a batch must be, in plain Python lists, and random slots to make it from.

Row  ->  make_slot()  ->  an executor fills poisoned()  ->  assert_exact(): equal to expect(), else where not
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from nanopack.kernels import CU_ALIGN

DTYPES = {
    "inputs": torch.int32,
    "targets": torch.int64,
    "weights": torch.float32,
    "positions": torch.int32,
    "doc_ids": torch.int32,
    "cu_seqlens": torch.int32,
}
EXTRAS = tuple(DTYPES)[2:]
ALL_EXTRAS = frozenset(EXTRAS)
SUBSETS = [frozenset(c) for n in range(5) for c in itertools.combinations(EXTRAS, n)]
SINGLES = [s for s in SUBSETS if len(s) in (0, 1, 4)]
WORD_BYTES = [2, 4]
BOS, IGNORE, POISON = 7, -100, 111


@dataclass(frozen=True)
class Row:
    """For each word its id and whether it is in the loss; for each piece its first column and weight."""

    ids: list[int] = field(default_factory=list)
    in_loss: list[bool] = field(default_factory=list)
    pieces: list[tuple[int, float]] = field(default_factory=list)


def full_row(seq_len: int, pieces: list[tuple[int, float]], token: int = 5) -> Row:
    """T+1 words, all the same, all in the loss."""
    return Row([token] * (seq_len + 1), [True] * (seq_len + 1), pieces)


def make_rows(seed: int, batch_size: int, seq_len: int, word_bytes: int) -> list[Row]:
    """Random rows, in which empty, full and crowded ones, extreme ids and odd weights are frequent."""
    rng = random.Random(seed)
    largest = 2 ** (8 * word_bytes - 1) - 1
    rows = []
    for _ in range(batch_size):
        length = rng.choice([0, 1, seq_len, seq_len + 1, seq_len + 1, rng.randint(0, seq_len + 1)])
        ids = [rng.choice([0, largest, rng.randint(0, largest)]) for _ in range(length)]
        in_loss = [rng.random() < 0.6 for _ in range(length)]
        chance = rng.choice([0.0, 0.02, 0.2, 1.0])
        starts = [c for c in range(length) if c == 0 or rng.random() < (0.5 if c == seq_len else chance)]
        pieces = [(c, rng.choice([0.0, 1.0, 1 / 3, 1e-42, 3e38, rng.random()])) for c in starts]
        rows.append(Row(ids, in_loss, pieces))
    return rows


@dataclass(frozen=True)
class Slot:
    """The bytes of a slot, and the cu_seqlens that it holds or would hold."""

    data: torch.Tensor
    word_bytes: int
    cu: list[int]

    def views(self, data: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """`words` and `table`, of these bytes or of the same ones elsewhere."""
        data = self.data if data is None else data
        return data.view(torch.int16 if self.word_bytes == 2 else torch.int32), data.view(torch.int32)


def make_slot(rows: list[Row], seq_len: int, word_bytes: int, extras: frozenset[str], seed: int = 0) -> Slot:
    """Lay rows out in a buffer that ends, in whole int32, with the last byte that the contract lets be read.

    Whatever is not written is garbage. Rows, and their pieces, lie in random order, as the contract allows.
    """
    rng = random.Random(seed)
    per_int = 4 // word_bytes
    words: dict[int, Row] = {}
    ints: dict[int, list[int]] = {}
    entries = [[0, 0, 0, 0] for _ in range(len(rows) + 1)]
    at = 4 * len(entries) * per_int
    for b in rng.sample(range(len(rows)), len(rows)):
        at = -(-at // 16) * 16
        entries[b] = [at // 16, len(rows[b].ids), 0, len(rows[b].pieces)]
        words[at] = rows[b]
        at += len(rows[b].ids)
    at = -(-at // per_int)
    if extras - {"cu_seqlens"}:
        for b in rng.sample(range(len(rows)), len(rows)):
            entries[b][2] = at
            ints[at] = [n for col, weight in rows[b].pieces for n in (col, float_bits(weight))]
            at += len(ints[at])
    cu = flat_starts(rows, seq_len)
    if "cu_seqlens" in extras:
        entries[-1] = [at, len(cu), 0, 0]
        ints[at] = cu
        at += len(cu)
    ints[0] = [n for entry in entries for n in entry]
    size = max(at, -(-(max(words) + seq_len + 1) // per_int))
    data = np.frombuffer(rng.randbytes(4 * size), np.uint8).copy()
    for start, numbers in ints.items():
        data.view(np.int32)[start : start + len(numbers)] = numbers
    for start, row in words.items():
        word = np.array(row.ids, np.uint32) | np.array(row.in_loss, np.uint32) << (8 * word_bytes - 1)
        data.view(f"u{word_bytes}")[start : start + len(row.ids)] = word
    return Slot(torch.from_numpy(data), word_bytes, cu)


def float_bits(number: float) -> int:
    return int(np.float32(number).view(np.int32))


def flat_starts(rows: list[Row], seq_len: int) -> list[int]:
    """First columns of pieces in the flattened inputs, a row's padding as one piece; then B * T."""
    starts = []
    for b, row in enumerate(rows):
        starts += [b * seq_len + col for col, _ in row.pieces if col < seq_len]
        starts += [b * seq_len + len(row.ids)] if len(row.ids) < seq_len else []
    return [*starts, len(rows) * seq_len]


def poisoned(shape: tuple[int, int], extras: frozenset[str], n_cu: int, device: str = "cpu") -> dict[str, Any]:
    """Outputs that nobody has written yet, in the launchers' order; None for what is not asked for."""
    cu_size = -(-(n_cu + 70) // CU_ALIGN) * CU_ALIGN
    return {
        name: torch.full((cu_size,) if name == "cu_seqlens" else shape, POISON, dtype=dtype, device=device)
        if name in extras or name not in EXTRAS
        else None
        for name, dtype in DTYPES.items()
    }


def expect(rows: list[Row], seq_len: int) -> dict[str, list[Any]]:
    """Every (B, T) output, word by word, as the contract says it."""
    out: dict[str, list[Any]] = {name: [] for name in DTYPES}
    cols = range(seq_len)
    for row in rows:
        length = len(row.ids)
        starts = [start for start, _ in row.pieces]
        ends = [*starts[1:], length]
        owner = [k for k in range(len(starts)) for _ in range(starts[k], ends[k])]
        in_loss = [c + 1 < length and row.in_loss[c + 1] for c in cols]
        out["inputs"].append([row.ids[c] if c < length else BOS for c in cols])
        out["targets"].append([row.ids[c + 1] if in_loss[c] else IGNORE for c in cols])
        out["weights"].append([row.pieces[owner[c + 1]][1] if in_loss[c] else 0.0 for c in cols])
        out["positions"].append([c - (starts[owner[c]] if c < length else length) for c in cols])
        out["doc_ids"].append([owner[c] if c < length else -1 for c in cols])
    return out


def assert_exact(outputs: dict[str, Any], rows: list[Row], slot: Slot) -> None:
    """Fail at the first element that is not what it must be."""
    batch_size, seq_len = outputs["inputs"].shape
    expected = expect(rows, seq_len)
    for name, got in outputs.items():
        if got is None:
            continue
        if name == "cu_seqlens":
            expected[name] = slot.cu + [batch_size * seq_len] * (got.numel() - len(slot.cu))
        want = torch.tensor(expected[name], dtype=DTYPES[name])
        if not torch.equal(got.cpu(), want):
            at = tuple((got.cpu() != want).nonzero()[0].tolist())
            raise AssertionError(f"{name}{list(at)}: expected {want[at].item()}, got {got[at].item()}")
