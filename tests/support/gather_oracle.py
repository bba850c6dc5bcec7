"""Random data of which the rows of pack_oracle.py are runs, and tables that name them.

Row  ->  lay_out()  ->  an executor fills poisoned()  ->  assert_exact(): equal to expect() of `seen` rows
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from pack_oracle import Row, flat_starts, float_bits


@dataclass(frozen=True)
class Laid:
    """The words of all data, a table of some rows, and what a batch of them has."""

    words: torch.Tensor
    table: torch.Tensor
    cu: list[int]
    rows: list[Row]
    marks: list[list[str]]
    """For each piece what is taken out of the loss: "", "first" or "all"."""

    def seen(self, *, all_in_loss: bool, marked: bool) -> list[Row]:
        """The rows, with what is in the loss by these arguments."""
        rows = []
        for row, marks in zip(self.rows, self.marks, strict=True):
            in_loss = [True] * len(row.ids) if all_in_loss else list(row.in_loss)
            bounds = pairwise([*(column for column, _ in row.pieces), len(row.ids)])
            for (begin, end), mark in zip(bounds, marks, strict=False):
                for column in range(begin, end):
                    in_loss[column] &= not marked or mark == "" or (mark == "first" and column > begin)
            rows.append(replace(row, in_loss=in_loss))
        return rows


def lay_out(rows: list[Row], seq_len: int, word_bytes: int, seed: int = 0, *, marked: bool = False) -> Laid:
    """Scatter the pieces over data that begin and end with the word of a piece; garbage lies between them.

    Entries of pieces lie in any order of the rows, with garbage between them, as the contract allows.
    """
    rng = random.Random(seed)
    choice = ["", "", "first", "first", "all"] if marked else [""]
    marks = [[rng.choice(choice) for _ in row.pieces] for row in rows]
    runs = []
    for b, row in enumerate(rows):
        columns = [column for column, _ in row.pieces]
        runs += [(b, k, c, e) for k, (c, e) in enumerate(pairwise([*columns, len(row.ids)]))]
    parts, origins, at = [np.empty(0, np.uint32)], {}, 0
    for b, k, column, end in rng.sample(runs, len(runs)):
        if at:
            parts.append(np.array([rng.getrandbits(8 * word_bytes) for _ in range(rng.randrange(4))], np.uint32))
            at += len(parts[-1])
        row = rows[b]
        word = np.array(row.ids[column:end], np.uint32)
        parts.append(word | np.array(row.in_loss[column:end], np.uint32) << (8 * word_bytes - 1))
        origins[b, k] = at - column
        at += end - column
    # an empty tensor has no address, and there are no data without a word
    words = np.concatenate(parts).astype(f"u{word_bytes}") if at else np.zeros(1, f"u{word_bytes}")
    return Laid(
        torch.from_numpy(words.view(f"i{word_bytes}")),
        torch.from_numpy(_table(rows, seq_len, marks, origins, rng).reshape(-1)),
        flat_starts(rows, seq_len),
        rows,
        marks,
    )


def _table(
    rows: list[Row], seq_len: int, marks: list[list[str]], origins: dict[tuple[int, int], int], rng: random.Random
) -> np.ndarray:
    at = len(rows) + 1
    heads: list[list[int]] = [[] for _ in rows]
    entries: dict[int, list[int]] = {}
    for b in rng.sample(range(len(rows)), len(rows)):
        at += rng.randrange(2)
        heads[b] = [len(rows[b].ids), at, len(rows[b].pieces)]
        for k, (column, weight) in enumerate(rows[b].pieces):
            bits = {"": float_bits(weight), "first": float_bits(weight) | -(2**31), "all": 2**31 - 1}[marks[b][k]]
            origin = origins[b, k] & (2**64 - 1)
            entries[at] = [column, bits, *np.array([origin], np.uint64).view(np.int32).tolist()]
            at += 1
    table = np.frombuffer(rng.randbytes(16 * at), np.int32).reshape(-1, 4).copy()
    segments = 0
    for b, head in enumerate(heads):
        table[b] = [*head, segments]
        segments += len(flat_starts([rows[b]], seq_len)) - 1
    table[len(rows)] = [segments, 0, 0, 0]
    for number, entry in entries.items():
        table[number] = entry
    return table


@dataclass(frozen=True)
class Many:
    """The tables of several batches in one buffer, with records, as graph batches have them."""

    table: torch.Tensor
    counter: torch.Tensor
    facts: list[list[int]]
    """Of each batch, then of the padding after the last one."""


def many(tables: list[torch.Tensor], batch_size: int, seq_len: int, seed: int = 0) -> Many:
    """Put the tables into one buffer, after garbage, and a table of padding after the last one."""
    rng = random.Random(seed)
    padding = np.zeros((batch_size + 1, 4), np.int32)
    padding[:, 3] = np.arange(batch_size + 1)
    padding[-1] = [batch_size, 0, 0, 0]
    parts = [table.numpy().reshape(-1, 4) for table in tables] + [padding]
    first = rng.randrange(3)
    facts = [[rng.getrandbits(62) for _ in range(4)] for _ in parts]
    at = 4 * (first + len(parts))
    buffer = np.frombuffer(rng.randbytes(16 * (at + 4 * (1 + sum(len(part) for part in parts)))), np.int32)
    buffer = buffer[: len(buffer) // 16 * 16].reshape(-1, 4).copy()
    records = buffer.reshape(-1).view(np.int64).reshape(-1, 8)
    for number, part in enumerate(parts):
        records[first + number, :5] = [at, *facts[number]]
        buffer[at : at + len(part)] = part
        at += len(part)
    counter = torch.tensor([0, first, first + len(tables)])
    return Many(torch.from_numpy(buffer.reshape(-1)), counter, facts)
