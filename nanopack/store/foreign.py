"""Read other libraries' files of tokens in place: Megatron-LM, llm.c, nanoGPT, and Arrow (arrow.py).

    prefix.bin + prefix.idx   ->   open_megatron()   ->   ForeignDocuments, with the face of a Store
    tokens.bin                ->   open_bin()             the files are mapped; of each only the lengths are found

All tokens are in the loss, for there is no mask. What decides which ids there may be, and which one begins a sequence
(padding is written with it), the files do not say: a tokenizer does, or vocab_size and bos_id.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from nanopack.conversations.mapped import MappedFiles
from nanopack.errors import StorageError
from nanopack.store.format import Settings
from nanopack.store.store import Documents
from nanopack.tokenizers.tokenizer import load_tokenizer

# Megatron Core, core/datasets/indexed_dataset.py
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
# llm.c, dev/data/data_common.py: 256 int32, of which the first three are magic, version, number of tokens
LLMC_TYPES = {20240520: "<u2", 20240801: "<u4"}
LLMC_HEADER = 256
# Tokens that are looked at together.
CHUNK = 1 << 22


class ForeignDocuments(Documents):
    """Documents in files of another library. Pickles as the call that opened them."""

    all_in_loss = True

    def __init__(
        self,
        opened_by: tuple[Any, ...],
        files: Sequence[str],
        shards: list[np.ndarray],
        lengths: list[np.ndarray],
        settings: Settings,
    ) -> None:
        """Take for each shard its ids and the lengths of its documents; the files make the fingerprint."""
        self._opened_by, self._files = opened_by, tuple(files)
        self.path = files[0] if files else "Arrow table"
        self.settings, self.vocab_size, self.bos_id = settings, settings.vocab_size, settings.bos_id
        self.shards, self.files = shards, MappedFiles(files)
        self.shard_documents = np.cumsum([0, *map(len, lengths)], dtype=np.int64)
        self.lengths = self.loss_tokens = np.concatenate(lengths).astype(np.uint32)
        if not len(self.lengths) or not self.lengths.all():
            empty = "no document" if not len(self.lengths) else f"an empty document, {int(self.lengths.argmin())}"
            raise ValueError(f"{self.path} holds {empty}; a document has at least one token")
        self.first_in_loss = np.ones(len(self.lengths), bool)
        self.conversations = np.arange(len(self.lengths), dtype=np.int64)

    def where(self, index: int) -> str:
        """Return the file and the number of the document in all of them: 'chats.bin document 17'."""
        shard = int(np.searchsorted(self.shard_documents, index, "right")) - 1
        # of Arrow, a shard is a chunk of rows and not a file
        file = self._files[shard] if len(self._files) == len(self.shards) else self.path
        return f"{file} document {index}"

    def fingerprint(self) -> str:
        """Return a digest of the files' names, sizes and times, of all lengths and of some ids."""
        found = ((os.path.basename(file), os.stat(file)) for file in self._files)
        stats = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]
        ends = [ids[part].tolist() for ids in self.shards for part in (slice(100), slice(-100, None))]
        return hashlib.sha256(repr((stats, ends)).encode() + self.lengths.tobytes()).hexdigest()

    def __reduce__(self) -> Any:
        function, *arguments = self._opened_by
        return function, tuple(arguments)


def settings_for(tokenizer: Any, vocab_size: int | None, bos_id: int | None) -> Settings:
    """Return the settings of foreign documents: of a tokenizer, or of these two numbers."""
    if tokenizer is not None:
        known = load_tokenizer(tokenizer)
        return Settings(vocab_size=known.vocab_size, bos_id=known.bos_id)
    if vocab_size is None or bos_id is None:
        raise ValueError(
            "the files do not say which ids there are; pass the tokenizer, or vocab_size and bos_id, with which "
            "padding is written"
        )
    return Settings(vocab_size=vocab_size, bos_id=bos_id)


def open_megatron(
    prefix: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    vocab_size: int | None = None,
    bos_id: int | None = None,
    check: bool = True,
) -> Documents:
    """Open `prefix`.bin and `prefix`.idx, which Megatron-LM's preprocess_data.py wrote.

    Pass the tokenizer, or `vocab_size` and `bos_id`. `check`: read all ids once, at memory speed, and raise ValueError
    where one is not below the vocabulary's size. Raises ValueError for what is not such a pair of files, StorageError
    for one that was cut.
    """
    path = os.fspath(prefix)
    path = path.removesuffix(".bin").removesuffix(".idx")
    settings = settings_for(tokenizer, vocab_size, bos_id)
    ids, lengths = _read_megatron(f"{path}.bin", f"{path}.idx")
    if check:
        check_ids(f"{path}.bin", ids, settings.vocab_size)
    opened_by = (_reopen_megatron, path, settings.vocab_size, settings.bos_id)
    return ForeignDocuments(opened_by, [f"{path}.bin"], [ids], [lengths], settings)


def _reopen_megatron(path: str, vocab_size: int, bos_id: int) -> Documents:
    return open_megatron(path, vocab_size=vocab_size, bos_id=bos_id, check=False)


def _read_megatron(data: str, index: str) -> tuple[np.ndarray, np.ndarray]:
    """Return all ids, mapped, and the lengths of the documents, which are one or more sequences each."""
    with open(index, "rb") as file:
        magic, head = file.read(len(MEGATRON_MAGIC)), file.read(25)
    if magic != MEGATRON_MAGIC or len(head) < 25:
        raise ValueError(f"{index} is not an index of Megatron-LM; it begins with {magic!r}")
    version, code, sequences, bounds = struct.unpack("<QBQQ", head)
    if version != 1 or code not in MEGATRON_TYPES:
        raise ValueError(f"{index} has version {version} and type {code}; known are version 1 and {MEGATRON_TYPES}")
    begin, needed = len(MEGATRON_MAGIC) + 25, 12 * sequences + 8 * bounds
    if os.path.getsize(index) < begin + needed:
        raise StorageError(f"{index} was cut: expected {begin + needed:,} bytes, found {os.path.getsize(index):,}")
    raw = np.memmap(index, np.uint8, "r", begin)
    own = raw[: 4 * sequences].view("<i4")
    pointers = raw[4 * sequences : 12 * sequences].view("<i8")
    of_documents = raw[12 * sequences : needed].view("<i8")
    dtype = np.dtype(MEGATRON_TYPES[code])
    ends = np.concatenate([[0], np.cumsum(own, dtype=np.int64)])
    if not np.array_equal(pointers, ends[:-1] * dtype.itemsize):
        raise ValueError(f"{index}: its sequences do not follow each other in {data}; write them again in order")
    if os.path.getsize(data) != ends[-1] * dtype.itemsize:
        expected = ends[-1] * dtype.itemsize
        raise StorageError(f"{data}: expected {expected:,} bytes, found {os.path.getsize(data):,}; copy it again")
    lengths = np.diff(ends[of_documents])
    # the tool writes a document of no sequence where a text was empty
    return np.memmap(data, dtype, "r"), lengths[lengths > 0]


def open_bin(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    tokenizer: Any = None,
    *,
    end_id: int | None = None,
    begin_id: int | None = None,
    vocab_size: int | None = None,
    bos_id: int | None = None,
    dtype: Any = np.uint16,
    check: bool = True,
) -> Documents:
    """Open .bin files of llm.c (with its header) or nanoGPT (bare ids of `dtype`), in this order.

    Documents end with each `end_id` (nanoGPT's prepare.py), or begin with each `begin_id` (llm.c's fineweb.py, whose
    end-of-text token comes first): pass one of them. Finding them reads the files once, at memory speed. The rest as
    `open_megatron`.
    """
    if (end_id is None) == (begin_id is None):
        raise ValueError(f"end_id={end_id!r} and begin_id={begin_id!r}: pass one, which ends or begins each document")
    settings = settings_for(tokenizer, vocab_size, bos_id)
    files = [os.fspath(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
    shards = [_read_bin(file, np.dtype(dtype)) for file in files]
    for file, ids in zip(files, shards, strict=True):
        if check:
            check_ids(file, ids, settings.vocab_size)
    lengths = [_lengths(ids, end_id, begin_id) for ids in shards]
    opened_by = (_reopen_bin, files, end_id, begin_id, settings.vocab_size, settings.bos_id, np.dtype(dtype).str)
    return ForeignDocuments(opened_by, files, shards, lengths, settings)


def _reopen_bin(files: list[str], end_id: Any, begin_id: Any, vocab_size: int, bos_id: int, dtype: str) -> Documents:
    known: dict[str, Any] = dict(vocab_size=vocab_size, bos_id=bos_id, dtype=dtype, check=False)
    return open_bin(files, end_id=end_id, begin_id=begin_id, **known)


def _read_bin(file: str, dtype: np.dtype[Any]) -> np.ndarray:
    """Return the ids of a file, mapped; StorageError where it was cut."""
    head = np.fromfile(file, "<i4", 3)
    begin = 0
    if len(head) == 3 and int(head[0]) in LLMC_TYPES:
        dtype, begin = np.dtype(LLMC_TYPES[int(head[0])]), 4 * LLMC_HEADER
        expected = begin + int(head[2]) * dtype.itemsize
        if os.path.getsize(file) != expected:
            raise StorageError(f"{file}: expected {expected:,} bytes, found {os.path.getsize(file):,}; copy it again")
    elif os.path.getsize(file) % dtype.itemsize:
        raise StorageError(f"{file}: its {os.path.getsize(file):,} bytes are no whole number of {dtype}; copy it again")
    if os.path.getsize(file) == begin:
        raise ValueError(f"{file} holds no token; leave it out")
    return np.memmap(file, dtype, "r", begin)


def _lengths(ids: np.ndarray, end_id: int | None, begin_id: int | None) -> np.ndarray:
    """Return the lengths of the documents: up to and with each end, or from each beginning on."""
    wanted = end_id if begin_id is None else begin_id
    found = [at + np.flatnonzero(chunk == wanted) for at, chunk in _chunks(ids)]
    cuts = np.concatenate(found) + (begin_id is None)
    bounds = np.unique(np.concatenate([[0], cuts, [len(ids)]]))
    return np.diff(bounds)


def _chunks(ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for at in range(0, len(ids), CHUNK):
        yield at, ids[at : at + CHUNK]


def check_ids(file: str, ids: np.ndarray, vocab_size: int) -> None:
    """Raise ValueError for an id that is not from 0 to below `vocab_size`."""
    for at, chunk in _chunks(ids):
        most, least = int(chunk.max()), int(chunk.min())
        if most >= vocab_size or least < 0:
            wrong = most if most >= vocab_size else least
            raise ValueError(
                f"{file} has id {wrong} at token {at + int(np.argmax(chunk == wrong))}, and ids go from 0 to "
                f"{vocab_size - 1}: it was made with another tokenizer, or has another type of ids"
            )
