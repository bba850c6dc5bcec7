"""Read documents that were tokenized before, from files mapped into memory.

    OUT/, a store   ->   Store(path)   ->   lengths, locate(), words(): the producer packs lengths and copies words
    format.py                               store[i], a record with input_ids: a data set like any other

Nothing is read before it is asked for, and nothing is copied. A store in use may be replaced only under another name.
"""

from __future__ import annotations

import operator
import os
from functools import cached_property
from typing import Any

import numpy as np

from nanopack.conversations.mapped import MappedFiles
from nanopack.conversations.source import Source
from nanopack.store.format import COLUMNS, Manifest, Settings, column_file, damaged, is_store

__all__ = ["Documents", "Store", "is_store"]


class Documents(Source):
    """Documents of tokens in mapped files: what a `Store` and the formats of foreign.py have in common.

    A subclass sets all of these before anything else is asked for.
    """

    vocab_size: int
    """The largest id that there may be, plus 1."""
    bos_id: int
    shards: list[np.ndarray]
    """Words of each shard, (its tokens,), of an unsigned or signed integer type, mapped."""
    shard_documents: np.ndarray
    """(shards + 1,) int64: the first document of each shard, and the number of documents."""
    lengths: np.ndarray
    """(n,) uint32: tokens of each document."""
    loss_tokens: np.ndarray
    """(n,) uint32: of these in the loss."""
    first_in_loss: np.ndarray
    """(n,) bool: whether the first one is."""
    conversations: np.ndarray
    """(n,) int64: index of the conversation in the data that they were made from."""
    weights: np.ndarray | None = None
    """(n,) float64; None: all are 1."""
    settings: Settings
    """How they were made."""
    rendered = True
    all_in_loss = False
    """Whether every token is in the loss, and the words are bare ids without a loss bit."""
    path: str
    files: MappedFiles | None = None
    """Those that are mapped, of which `check_files` knows."""

    @property
    def word_dtype(self) -> np.dtype[Any]:
        """Type of a slot's word for these ids: uint16 or uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 15 else np.uint32)

    @property
    def loss_bit(self) -> int:
        """The bit of a word that says that the token is in the loss."""
        return 1 << (8 * self.word_dtype.itemsize - 1)

    @cached_property
    def ends(self) -> np.ndarray:
        """(n + 1,) int64: tokens before each document, all shards counted through, and all tokens."""
        ends = np.zeros(len(self.lengths) + 1, np.int64)
        np.cumsum(self.lengths, out=ends[1:])
        return ends

    def check_files(self) -> None:
        """Raise StorageError where a mapped file was cut off."""
        if self.files is not None:
            self.files.check()

    @cached_property
    def _shard_words(self) -> np.ndarray:
        words: np.ndarray = self.ends[self.shard_documents]
        return words

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.lengths)

    def locate(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the shard, (k,) int64, and the first word in it, (k,) int64, of documents, (k,) int64."""
        if len(self.shards) == 1:
            return np.zeros(len(documents), np.int64), self.ends[documents]
        shards = np.searchsorted(self.shard_documents, documents, "right") - 1
        return shards, self.ends[documents] - self._shard_words[shards]

    def words(self, document: int) -> np.ndarray:
        """Return the words of a document, (length,): a view of the mapped file."""
        shard = int(np.searchsorted(self.shard_documents, document, "right")) - 1
        begin = int(self.ends[document] - self._shard_words[shard])
        return self.shards[shard][begin : begin + int(self.lengths[document])]

    def starts(self, document: int) -> tuple[int, ...]:
        """Return the token that each message of a document begins with; none where that is not known."""
        return self.messages_of(document)[0]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return document `index` as a record: {"input_ids": (n,) uint32, "loss_mask": (n,) bool, "weight"}."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        words = self.words(index)
        weight = 1.0 if self.weights is None else float(self.weights[index])
        if self.all_in_loss:
            return {"input_ids": words.astype(np.uint32), "loss_mask": np.ones(len(words), bool), "weight": weight}
        bit = words.dtype.type(self.loss_bit)
        ids = (words & ~bit).astype(np.uint32, copy=False)
        return {"input_ids": ids, "loss_mask": words >= bit, "weight": weight}

    def where(self, index: int) -> str:
        """Return the origin of the document: 'OUT/: conversation 17'."""
        return f"{self.path}: conversation {int(self.conversations[index])}"

    def __reduce__(self) -> Any:
        return type(self), (self.path,)


class Store(Documents):
    """A folder that `nanopack tokenize` wrote."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Map all files. ValueError where it is no store, StorageError where a file is missing or has another size."""
        self.path, self._place = os.fspath(path), os.path.abspath(path)
        self.manifest = Manifest.read(self.path)
        self.manifest.check_sizes(self.path)
        self.settings = settings = self.manifest.settings
        self.vocab_size, self.bos_id, self.names = settings.vocab_size, settings.bos_id, settings.names
        self.shards = [self._map(one.name, settings.word_dtype) for one in self.manifest.shards]
        self.shard_documents = np.cumsum([0, *(one.documents for one in self.manifest.shards)], dtype=np.int64)
        self._columns = {one.name for one in self.manifest.columns}
        self.lengths = self._column("lengths")
        self.loss_tokens, self.first_in_loss = self._column("loss_tokens"), self._column("first_in_loss")
        self.conversations = self._column("conversations")
        self.weights = self._column("weights") if column_file("weights") in self._columns else None
        self.sources = self._column("sources") if self.names else None
        mapped = (*self.manifest.shards, *self.manifest.columns)
        self.files = MappedFiles(os.path.join(self.path, one.name) for one in mapped)

    def __reduce__(self) -> Any:
        return type(self), (self._place,)

    def _map(self, name: str, dtype: np.dtype[Any]) -> np.ndarray:
        path = os.path.join(self.path, name)
        # nothing cannot be mapped
        return np.memmap(path, dtype, "r") if os.path.getsize(path) else np.empty(0, dtype)

    def _column(self, name: str) -> np.ndarray:
        file = os.path.join(self.path, column_file(name))
        wanted = f"{COLUMNS[name]} of {self.manifest.documents:,} documents"
        try:
            found: np.ndarray = np.load(file, mmap_mode="r")
        # of a header that cannot be read
        except (ValueError, SyntaxError) as error:
            raise damaged(file, wanted, "a header that cannot be read") from error
        counts = {"starts": None, "roles": None, "start_bounds": self.manifest.documents + 1}
        count = counts.get(name, self.manifest.documents)
        if found.dtype != COLUMNS[name] or found.ndim != 1 or count not in (None, len(found)):
            raise damaged(file, wanted, f"{found.dtype}{found.shape}")
        return found

    @cached_property
    def _messages(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._column("start_bounds"), self._column("starts"), self._column("roles")

    def messages_of(self, index: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Return the token that each message of a document begins with, and its role."""
        bounds, starts, roles = self._messages
        own, names = slice(bounds[index], bounds[index + 1]), self.manifest.roles
        return tuple(starts[own].tolist()), tuple(names[role] for role in roles[own].tolist())

    def source_of(self, index: int) -> int:
        """Return the number, in `names`, of the source of a mixture that the document is from."""
        return 0 if self.sources is None else int(self.sources[index])

    def is_copy(self, index: int) -> bool:
        """Return whether it repeats the history of the document before it, for a later answer (turns="each")."""
        return index > 0 and bool(self.conversations[index] == self.conversations[index - 1])

    def sources_of(self, indices: np.ndarray) -> np.ndarray:
        """Return `source_of` of documents, (n,) int64."""
        return np.zeros(len(indices), np.int64) if self.sources is None else self.sources[indices].astype(np.int64)

    def are_copies(self, indices: np.ndarray) -> np.ndarray | None:
        """Return `is_copy` of documents, (n,) bool; None where none ever is."""
        if self.settings.turns != "each":
            return None
        before = self.conversations[np.maximum(indices - 1, 0)]
        copies: np.ndarray = (self.conversations[indices] == before) & (indices > 0)
        return copies

    def fingerprint(self) -> str:
        """Return the digest, hex, of all of its files."""
        return self.manifest.fingerprint()
