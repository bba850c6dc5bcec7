"""The manifest of a token store: how its documents were made, and the size and hash of each of its files.

manifest.json   ->   Manifest.read()   ->   Manifest   ->   check_sizes()   ->   store.py maps the files
                     Manifest.write()  <-   writer.py, when every other file is written

OUT/manifest.json           written last: a folder without it is no store
OUT/NAME.words              one a shard: words end to end, uint16 or uint32, little-endian (ring/layout.py)
OUT/documents/COLUMN.npy    one value a document of the whole store, see COLUMNS
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanopack.errors import StorageError
from nanopack.store.folder import Folder

MANIFEST = "manifest.json"
FORMAT = 1
# What tells our manifest from anybody else's.
KIND = "nanopack token store"
DOCUMENTS = "documents"
COLUMNS = {
    "lengths": np.dtype("<u4"),
    "loss_tokens": np.dtype("<u4"),
    "first_in_loss": np.dtype("?"),
    "conversations": np.dtype("<i8"),
    "weights": np.dtype("<f8"),
    "sources": np.dtype("<u2"),
    "starts": np.dtype("<u4"),
    "start_bounds": np.dtype("<i8"),
    "roles": np.dtype("u1"),
}
"""Tokens; of these in the loss; whether the first one is; index in the data; loss weight (none where all are 1); number
in `names` (none unless mixed); then ragged: the token and the role that each message begins with, document i having the
entries start_bounds[i] to start_bounds[i + 1]."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the documents of a store were made."""

    vocab_size: int
    bos_id: int
    tokenizer: str = ""
    """Its fingerprint."""
    tokenizer_name: str = ""
    clock: str = ""
    """When it was that the chat template writes, ISO 8601; empty where it writes no date."""
    template: Any = None
    """Its name, or all of a nanopack.Template as a dict; None where the documents came as tokens."""
    first_assistant: str = "keep"
    turns: str = "all"
    loss: str = "assistant"
    """Which tokens have the loss bit."""
    names: tuple[str, ...] = ()
    """Sources of a mixture."""

    @property
    def word_bytes(self) -> int:
        """Bytes of a word: 2 where all ids are below 32,768, else 4."""
        return 2 if self.vocab_size <= 1 << 15 else 4

    @property
    def word_dtype(self) -> np.dtype[Any]:
        """Type of a word, little-endian."""
        return np.dtype(f"<u{self.word_bytes}")

    @property
    def loss_bit(self) -> int:
        """The bit of a word that says that the token is in the loss."""
        return 1 << (8 * self.word_bytes - 1)


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of a store."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ShardFile(File):
    """A file of words."""

    documents: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that is known of a store without opening its other files."""

    settings: Settings
    documents: int
    conversations: int
    """Of the data, those that were skipped among them; with turns="each" their answers."""
    skipped: int
    tokens: int
    loss_tokens: int
    lengths: dict[str, float]
    """mean, median, p99 and max of the documents' tokens."""
    shards: tuple[ShardFile, ...]
    columns: tuple[File, ...]
    roles: tuple[str, ...] = ()
    """The role that each number of the column `roles` stands for."""
    data: str = ""
    """Digest of a sample of the data."""
    version: str = ""
    """Of nanopack, which wrote it."""

    @property
    def files(self) -> tuple[File, ...]:
        """Every file but the manifest itself, by its name in the folder."""
        return (*self.shards, *self.columns)

    @classmethod
    def read(cls, path: str) -> Manifest:
        """Return the manifest of a folder on this machine. ValueError where it is not one, or of another format."""
        return cls.of(Folder(path))

    @classmethod
    def of(cls, folder: Folder) -> Manifest:
        """Return the manifest of a folder. ValueError as `read`."""
        file = os.path.join(folder.path, MANIFEST)
        try:
            found = json.loads(folder.read(MANIFEST))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{file} cannot be read as the manifest of a token store ({error}); copy the store again, or delete "
                "its folder and tokenize again"
            ) from error
        if not _is_ours(found):
            raise ValueError(f"{file} is not the manifest of a token store; `nanopack tokenize` makes one")
        if found["format"] != FORMAT:
            raise ValueError(
                f"{file} has format {found['format']!r}, and this version of nanopack reads format {FORMAT}: "
                "tokenize again, or use the version that wrote it"
            )
        try:
            return cls._of(found)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({type(error).__name__}: {error}); tokenize again") from error

    @classmethod
    def _of(cls, found: dict[str, Any]) -> Manifest:
        kept = {key: value for key, value in found.items() if key not in ("kind", "format")}
        kept["settings"] = Settings(**kept["settings"] | {"names": tuple(kept["settings"]["names"])})
        kept["shards"] = tuple(ShardFile(**one) for one in kept["shards"])
        kept["columns"] = tuple(File(**one) for one in kept["columns"])
        return cls(**kept | {"roles": tuple(kept["roles"])})

    def write(self, folder: Folder) -> None:
        """Write it into a Folder, atomically."""
        text = json.dumps({"kind": KIND, "format": FORMAT, **dataclasses.asdict(self)}, indent=1)
        folder.write(MANIFEST, [text.encode()])

    def fingerprint(self) -> str:
        """Return the digest, hex, of all of its files and of how they are to be read."""
        settings = json.dumps(dataclasses.asdict(self.settings), sort_keys=True)
        return hashlib.sha256(
            "\n".join([settings, *(f"{one.name} {one.sha256}" for one in self.files)]).encode()
        ).hexdigest()

    def check_sizes(self, path: str) -> None:
        """Raise StorageError for the first file that is missing or has another size."""
        for one in self.files:
            file = os.path.join(path, one.name)
            try:
                size = os.stat(file).st_size
            except OSError as error:
                raise damaged(file, f"{one.bytes:,} bytes", error.strerror or str(error)) from error
            if size != one.bytes:
                raise damaged(file, f"{one.bytes:,} bytes", f"{size:,}")


def _is_ours(found: object) -> bool:
    return isinstance(found, dict) and found.get("kind") == KIND and "format" in found


def is_store(path: str | os.PathLike[str]) -> bool:
    """Return whether this is a folder that holds a token store."""
    try:
        # one that was cut, too, is ours: reading it says so
        return f'"{KIND}"'.encode() in Folder(path).read(MANIFEST)[:100]
    except OSError:
        return False


def damaged(file: str, expected: str, found: str) -> StorageError:
    """Return the error that names a damaged file, and what it should be."""
    return StorageError(
        f"{file}: expected {expected}, found {found}; copy the store again, or delete its folder and tokenize again"
    )


def summarize(lengths: np.ndarray) -> dict[str, float]:
    """Return mean, median, 99th percentile and maximum of lengths, (n,), n > 0.

    >>> summarize(np.array([1, 2, 3, 6]))
    {'mean': 3.0, 'median': 2.5, 'p99': 5.91, 'max': 6}
    """
    median, most = np.percentile(lengths, (50, 99))
    return {
        "mean": round(float(lengths.mean()), 3),
        "median": round(float(median), 3),
        "p99": round(float(most), 3),
        "max": int(lengths.max()),
    }


def column_file(name: str) -> str:
    """Return the name, in the store's folder, of a column's file."""
    return f"{DOCUMENTS}/{name}.npy"


def shard_names(count: int) -> Iterable[str]:
    """Return the names of `count` shards: part-00000.words, part-00001.words, …"""
    return (f"part-{number:05d}.words" for number in range(count))
