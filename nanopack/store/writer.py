"""Write rendered documents into a store.

    Rendered, in order   ->   write_shard()   ->   words, columns   ->   finish()   ->   OUT/, a store
                              one file a part                            joins the columns, writes the manifest last

A shard's bytes follow from its documents alone, so writing it again gives the same.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from nanopack.conversations.messages import OUR_ROLES as ROLES
from nanopack.store.folder import Folder
from nanopack.store.format import COLUMNS, File, Manifest, Settings, ShardFile, column_file, shard_names, summarize
from nanopack.store.store import Store

# Documents whose words are joined and written together.
CHUNK = 256

Columns = dict[str, np.ndarray]


class Rendered(NamedTuple):
    """A rendered document, and what a store keeps of it."""

    ids: np.ndarray
    """(n,) of integers."""
    mask: np.ndarray
    """(n,) bool: in the loss."""
    conversation: int
    weight: float = 1.0
    source: int = 0
    starts: Sequence[int] = ()
    """The token that each message begins with."""
    roles: Sequence[str] = ()
    """Of each message that has a start."""


def write_store(
    path: str | os.PathLike[str],
    documents: Iterable[Rendered],
    settings: Settings,
    *,
    shard_documents: int = 1 << 16,
    conversations: int | None = None,
    skipped: int = 0,
) -> Store:
    """Write documents into a new store, `shard_documents` a shard, and open it; `conversations` is their number.

    ValueError where there is no document. What is killed on the way leaves no manifest, and so no store.
    """
    folder, waiting = Folder(path), iter(documents)
    shards: list[ShardFile] = []
    columns: list[Columns] = []
    while part := list(islice(waiting, shard_documents)):
        (name,) = islice(shard_names(len(shards) + 1), len(shards), None)
        shard, its_columns = write_shard(folder, name, part, settings)
        shards.append(shard)
        columns.append(its_columns)
    count = sum(shard.documents for shard in shards) if conversations is None else conversations
    finish(folder, shards, columns, settings, conversations=count, skipped=skipped)
    return Store(path)


def write_shard(
    folder: Folder, name: str, documents: Iterable[Rendered], settings: Settings
) -> tuple[ShardFile, Columns]:
    """Write the words of documents as one file, and return its facts and the columns of its documents."""
    parts: list[Columns] = []
    facts = folder.write(name, _words(iter(documents), settings, parts))
    columns = join(parts)
    lengths = columns["lengths"]
    shard = ShardFile(
        name=name,
        documents=len(lengths),
        tokens=int(lengths.sum(dtype=np.int64)),
        bytes=facts.bytes,
        sha256=facts.sha256,
    )
    return shard, columns


def _words(documents: Iterator[Rendered], settings: Settings, parts: list[Columns]) -> Iterator[memoryview]:
    """Yield the words of the documents, chunk by chunk, and append the columns of each chunk."""
    bit = settings.word_dtype.type(settings.loss_bit)
    while chunk := list(islice(documents, CHUNK)):
        ids, mask = (np.concatenate([getattr(one, name) for one in chunk]) for name in ("ids", "mask"))
        words = ids.astype(settings.word_dtype)
        words |= np.multiply(mask, bit, dtype=words.dtype)
        parts.append(_columns(chunk, mask))
        yield words.data


def _columns(chunk: Sequence[Rendered], mask: np.ndarray) -> Columns:
    """Return the columns of documents; `mask` is theirs, end to end."""
    lengths = [len(one.ids) for one in chunk]
    begins = np.cumsum([0, *lengths[:-1]])
    values = {
        "lengths": lengths,
        "loss_tokens": np.add.reduceat(mask, begins, dtype=np.int64),
        "first_in_loss": mask[begins],
        "conversations": [one.conversation for one in chunk],
        "weights": [one.weight for one in chunk],
        "sources": [one.source for one in chunk],
        "starts": [start for one in chunk for start in one.starts],
        "start_bounds": np.cumsum([0, *(len(one.starts) for one in chunk)]),
        "roles": [ROLES.index(role) for one in chunk for role in one.roles],
    }
    return {name: np.array(value, COLUMNS[name]) for name, value in values.items()}


def join(parts: Sequence[Columns]) -> Columns:
    """Return the columns of several groups of documents as those of all, in order."""
    joined = {name: np.concatenate([np.empty(0, COLUMNS[name]), *(part[name] for part in parts)]) for name in COLUMNS}
    counts = [np.diff(part["start_bounds"]) for part in parts]
    joined["start_bounds"] = np.cumsum(np.concatenate([[0], *counts]), dtype=COLUMNS["start_bounds"])
    return {name: column.astype(COLUMNS[name], copy=False) for name, column in joined.items()}


def finish(
    folder: Folder,
    shards: Sequence[ShardFile],
    columns: Sequence[Columns],
    settings: Settings,
    *,
    conversations: int,
    skipped: int,
    data: str = "",
) -> Manifest:
    """Write the columns of all documents, then the manifest: from then on it is a store."""
    joined = join(columns)
    lengths = joined["lengths"]
    if not len(lengths):
        raise ValueError(f"{folder}: there is no document to store; give conversations that can be rendered")
    manifest = Manifest(
        settings=settings,
        documents=len(lengths),
        conversations=conversations,
        skipped=skipped,
        tokens=int(lengths.sum(dtype=np.int64)),
        loss_tokens=int(joined["loss_tokens"].sum(dtype=np.int64)),
        lengths=summarize(lengths),
        shards=tuple(shards),
        columns=tuple(_write_columns(folder, _needed(joined, settings))),
        roles=ROLES,
        data=data,
        version=_version(),
    )
    manifest.write(folder)
    return manifest


def _needed(columns: Columns, settings: Settings) -> Mapping[str, np.ndarray]:
    """Return the columns without those that say nothing."""
    left_out = {"weights"} if bool((columns["weights"] == 1).all()) else set()
    left_out |= set() if settings.names else {"sources"}
    return {name: column for name, column in columns.items() if name not in left_out}


def _write_columns(folder: Folder, columns: Mapping[str, np.ndarray]) -> Iterator[File]:
    for name, column in columns.items():
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, column, allow_pickle=False)
        facts = folder.write(column_file(name), [buffer.getbuffer()])
        yield File(name=column_file(name), bytes=facts.bytes, sha256=facts.sha256)


def _version() -> str:
    # the package imports this module
    from nanopack import __version__

    return __version__
