"""Write a store in the formats of other libraries.

    Store   ->   export(store, OUT, "megatron" | "llmc" | "arrow")   ->   OUT.bin + OUT.idx, OUT.bin, OUT.arrow

Megatron-LM's and llm.c's have no mask: which tokens are in the loss is lost. Every file is written atomically.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator

import numpy as np

from nanopack.store.arrow import to_arrow
from nanopack.store.folder import Folder
from nanopack.store.foreign import LLMC_HEADER, LLMC_TYPES, MEGATRON_MAGIC, MEGATRON_TYPES
from nanopack.store.store import Documents

# Words that are written together.
CHUNK = 1 << 20


def export(store: Documents, path: str | os.PathLike[str], to: str) -> list[str]:
    """Write the documents of a store as `to`, one of FORMATS, and return the files; `path` has no suffix.

    Raises ValueError where the format cannot hold them, OSError where they cannot be written.
    """
    if to not in FORMATS:
        raise ValueError(f"to={to!r} is not allowed; use one of {', '.join(map(repr, FORMATS))}")
    folder, name = os.path.split(os.path.abspath(path))
    files = FORMATS[to](store, Folder(folder), name)
    return [os.path.join(folder, file) for file in files]


def _ids(store: Documents, dtype: str) -> Iterator[memoryview]:
    """Yield the ids of all documents, end to end."""
    bit = store.word_dtype.type(store.loss_bit)
    for words in store.shards:
        for at in range(0, len(words), CHUNK):
            chunk = words[at : at + CHUNK]
            yield np.ascontiguousarray((chunk if store.all_in_loss else chunk & ~bit).astype(dtype)).data


def _megatron(store: Documents, folder: Folder, name: str) -> list[str]:
    # as Megatron chooses the type
    code = 8 if store.vocab_size < 65500 else 4
    dtype, count = np.dtype(MEGATRON_TYPES[code]), len(store)
    folder.write(f"{name}.bin", _ids(store, dtype.str))
    head = MEGATRON_MAGIC + struct.pack("<QBQQ", 1, code, count, count + 1)
    pointers = (store.ends[:-1] * dtype.itemsize).astype("<i8")
    bounds = np.arange(count + 1, dtype="<i8")
    folder.write(f"{name}.idx", [head, store.lengths.astype("<i4").data, pointers.data, bounds.data])
    return [f"{name}.bin", f"{name}.idx"]


def _llmc(store: Documents, folder: Folder, name: str) -> list[str]:
    magic, version = (20240520, 1) if store.vocab_size <= 1 << 16 else (20240801, 7)
    tokens = int(store.ends[-1])
    if tokens >= 2**31:
        raise ValueError(f"{store.path} has {tokens:,} tokens, and a file of llm.c holds fewer than {2**31:,}")
    header = np.zeros(LLMC_HEADER, "<i4")
    header[:3] = magic, version, tokens
    folder.write(f"{name}.bin", _with_header(header, _ids(store, LLMC_TYPES[magic])))
    return [f"{name}.bin"]


def _with_header(header: np.ndarray, chunks: Iterator[memoryview]) -> Iterator[memoryview]:
    yield header.data
    yield from chunks


def _arrow(store: Documents, folder: Folder, name: str) -> list[str]:
    import pyarrow as arrow

    table = to_arrow(store)
    sink = arrow.BufferOutputStream()
    with arrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    folder.write(f"{name}.arrow", [memoryview(sink.getvalue())])
    return [f"{name}.arrow"]


FORMATS: dict[str, Callable[[Documents, Folder, str], list[str]]] = {
    "megatron": _megatron,
    "llmc": _llmc,
    "arrow": _arrow,
}
