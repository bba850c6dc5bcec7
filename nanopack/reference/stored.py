"""The slow packer's token stores: the documents of a folder that `nanopack tokenize` wrote, one by one.

A part of the definition. It shares nothing with the fast path: the format is read again here, from docs/store.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

Stored = tuple[str, Callable[[], object]]


def is_stored(path: str) -> bool:
    """Whether a path is a folder with the manifest of a token store."""
    manifest = Path(path) / "manifest.json"
    return manifest.is_file() and b'"nanopack token store"' in manifest.read_bytes()[:100]


def stored_records(path: str) -> list[Stored]:
    """For every document of a store its location, and a function that gives it as a record with input_ids."""
    folder = Path(path)
    manifest = json.loads((folder / "manifest.json").read_text())
    wide = manifest["settings"]["vocab_size"] > 2**15
    files = [np.fromfile(folder / shard["name"], "<u4" if wide else "<u2") for shard in manifest["shards"]]
    words = [word for file in files for word in file.tolist()]
    lengths = np.load(folder / "documents" / "lengths.npy").tolist()
    weights = folder / "documents" / "weights.npy"
    weighed = np.load(weights).tolist() if weights.exists() else [1.0] * len(lengths)
    numbers = np.load(folder / "documents" / "conversations.npy").tolist()
    bit, begin = 2**31 if wide else 2**15, 0
    records: list[Stored] = []
    for length, weight, number in zip(lengths, weighed, numbers, strict=True):
        own = words[begin : begin + length]
        records.append((f"{path}: conversation {number}", partial(_record, own, bit, weight)))
        begin += length
    return records


def _record(words: list[int], bit: int, weight: float) -> dict[str, Any]:
    return {"input_ids": [word % bit for word in words], "loss_mask": [word >= bit for word in words], "weight": weight}
