"""Keep the documents that a run renders, so that the next pass and the next run read them from a store.

    reader.py: rendered documents   ->   Cache.add()      ->   DIR/KEY/spool/*.spool, one a process, whatever the order
    producer.py, at a pass's end    ->   Cache.finish()   ->   DIR/KEY/, a store, once every conversation is there
                                         Cache.stored()   ->   CachedStore: the source itself, but its documents stored

KEY is a digest of the data, the tokenizer and the arguments that decide the tokens. Any rank, worker or run that has
the same key adds to the same spool, in whatever order it reads; a document is appended whole or is not there. So a run
that is killed and resumed continues the spool, and what decides the batches is the same with a cache and without.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import struct
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from nanopack.conversations.messages import OUR_ROLES as ROLES
from nanopack.conversations.source import Source
from nanopack.store.folder import Folder
from nanopack.store.format import DOCUMENTS, Settings, is_store
from nanopack.store.job import part_size
from nanopack.store.store import Store
from nanopack.store.writer import Rendered, write_store

log = logging.getLogger("nanopack")

SPOOL = "spool"
# Of a frame: documents, messages, tokens, and the CRC32 of what follows.
HEAD = struct.Struct("<IIQI")


class CachedStore(Store):
    """The store of a source, with the source's own places and names."""

    def __init__(self, path: str, source: Source) -> None:
        """Map the store; `source` is what it was made of."""
        super().__init__(path)
        self._source, self.names = source, source.names

    def where(self, index: int) -> str:
        """Return the location in the source."""
        return self._source.where(index)

    def source_of(self, index: int) -> int:
        return self._source.source_of(index)

    def is_copy(self, index: int) -> bool:
        return self._source.is_copy(index)

    def picks_digest(self) -> str:
        return self._source.picks_digest()

    def __reduce__(self) -> Any:
        return CachedStore, (self.path, self._source)


class Cache:
    """The documents of one source, made in one way, in a folder."""

    def __init__(self, folder: str | os.PathLike[str], source: Source, settings: Settings, data: str) -> None:
        """`folder` is Loader's `cache`; `data` is a digest of the source."""
        # another process may be started in another working directory
        folder = os.path.abspath(folder)
        self._arguments = folder, source, settings, data
        self.source, self.settings = source, settings
        parts = json.dumps([dataclasses.asdict(settings) | {"clock": ""}, len(source), data], sort_keys=True)
        self.path = os.path.join(folder, hashlib.sha256(parts.encode()).hexdigest()[:16])
        self._owner, self._logged = -1, False
        self._file: Any = None
        self._kept = np.zeros(len(source), bool)

    def __reduce__(self) -> Any:
        return Cache, self._arguments

    def stored(self) -> CachedStore | None:
        """Return the finished store, None where there is none yet."""
        if not os.path.exists(os.path.join(self.path, "manifest.json")) or not is_store(self.path):
            return None
        return CachedStore(self.path, self.source)

    def add(self, documents: Iterable[Rendered]) -> None:
        """Append documents; `conversation` is their index in the source. Those that are there already are left out."""
        self._open()
        new = [one for one in documents if not self._kept[one.conversation]]
        if new:
            # what a killed process leaves torn is the last frame
            rest = memoryview(_packed(new, self.settings))
            while rest:
                rest = rest[self._file.write(rest) :]
            self._kept[[one.conversation for one in new]] = True

    def _open(self) -> None:
        """Open a spool file of this process alone."""
        if self._owner == os.getpid():
            return
        folder = os.path.join(self.path, SPOOL)
        os.makedirs(folder, exist_ok=True)
        for frame in self._frames():
            self._kept[frame.numbers] = True
        name = os.path.join(folder, f"{uuid.uuid4().hex}.spool")
        self._owner, self._file = os.getpid(), open(name, "ab", buffering=0)  # noqa: SIM115

    def _frames(self) -> Iterator[Frame]:
        """Yield the whole frames of all spool files."""
        folder = os.path.join(self.path, SPOOL)
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            # another rank removes them once there is a store
            with contextlib.suppress(FileNotFoundError), open(os.path.join(folder, name), "rb") as file:
                if os.path.getsize(file.fileno()):
                    yield from _unpacked(np.memmap(file, np.uint8, "r"), self.settings)

    def finish(self) -> bool:
        """Make the store where every conversation is in the spool, and return whether there is one.

        Of several ranks, the one that comes first makes it while the others wait.
        """
        if self.stored() is not None:
            return True
        kept = np.zeros(len(self.source), bool)
        for frame in self._frames():
            kept[frame.numbers] = True
        if not kept.all():
            if self.stored() is not None:
                # another rank has made it and removed the spool
                return True
            self._say_what_lacks(int(len(kept) - kept.sum()))
            return False
        folder = Folder(self.path)
        with folder.alone("lock"):
            if self.stored() is None:
                folder.sweep(DOCUMENTS)
                documents = _in_order([*self._frames()], self.source, self.settings)
                write_store(self.path, documents, self.settings, shard_documents=part_size(len(kept)))
                log.info("cache: the documents of these data are stored in %s, and read there from now on", self.path)
            folder.remove_folder(SPOOL)
        return True

    def finish_before(self) -> bool:
        """Make the store of what an earlier run spooled, where that is all; say nothing where it is not."""
        self._logged, logged = True, self._logged
        try:
            return os.path.isdir(os.path.join(self.path, SPOOL)) and self.finish()
        finally:
            self._logged = logged

    def _say_what_lacks(self, count: int) -> None:
        if not self._logged:
            self._logged = True
            log.info(
                "cache: %d conversations are not in %s yet: other ranks have not read them, or they are bad; there is "
                "no store until all are there",
                *(count, self.path),
            )


class Frame(NamedTuple):
    """Documents that were appended together: arrays with an entry a document, a message or a token."""

    numbers: np.ndarray
    """Index in the source."""
    weights: np.ndarray
    lengths: np.ndarray
    messages: np.ndarray
    """How many there are whose beginning is known."""
    starts: np.ndarray
    """Of all messages."""
    words: np.ndarray
    """Of all documents."""
    roles: np.ndarray
    """Of all messages, by number."""


def _types(settings: Settings) -> list[np.dtype[Any]]:
    return [np.dtype(kind) for kind in ("<i8", "<f8", "<u4", "<u4", "<u4", settings.word_dtype, "u1")]


def _packed(documents: Sequence[Rendered], settings: Settings) -> bytes:
    """Return documents as the bytes of a frame."""
    words = np.concatenate([one.ids for one in documents]).astype(settings.word_dtype)
    mask = np.concatenate([one.mask for one in documents])
    words |= np.multiply(mask, words.dtype.type(settings.loss_bit), dtype=words.dtype)
    frame = Frame(
        np.array([one.conversation for one in documents]),
        np.array([one.weight for one in documents]),
        np.array([len(one.ids) for one in documents]),
        np.array([len(one.starts) for one in documents]),
        np.array([start for one in documents for start in one.starts]),
        words,
        np.array([ROLES.index(role) for one in documents for role in one.roles]),
    )
    body = b"".join(array.astype(kind).tobytes() for array, kind in zip(frame, _types(settings), strict=True))
    return HEAD.pack(len(documents), len(frame.starts), len(words), zlib.crc32(body)) + body


def _unpacked(raw: np.ndarray, settings: Settings) -> Iterator[Frame]:
    """Yield the whole frames of a spool file, (n,) uint8, as views; one that is torn ends it."""
    at, types = 0, _types(settings)
    while at + HEAD.size <= len(raw):
        documents, messages, tokens, checksum = HEAD.unpack(raw[at : at + HEAD.size].tobytes())
        counts = [documents] * 4 + [messages, tokens, messages]
        at, arrays = at + HEAD.size, []
        ends = at + np.cumsum([count * kind.itemsize for count, kind in zip(counts, types, strict=True)])
        if ends[-1] > len(raw) or zlib.crc32(raw[at : ends[-1]].data) != checksum:
            return
        for end, kind in zip(ends.tolist(), types, strict=True):
            arrays.append(raw[at:end].view(kind))
            at = end
        yield Frame(*arrays)


def _in_order(frames: Sequence[Frame], source: Source, settings: Settings) -> Iterator[Rendered]:
    """Yield the documents of all frames in the order of the source."""
    numbers = np.concatenate([frame.numbers for frame in frames])
    of_frame = np.repeat(np.arange(len(frames)), [len(frame.numbers) for frame in frames])
    rows = np.concatenate([np.arange(len(frame.numbers)) for frame in frames])
    bounds = [(_bounds(frame.lengths), _bounds(frame.messages)) for frame in frames]
    bit = settings.word_dtype.type(settings.loss_bit)
    # each number once, wherever it comes first
    for number, at in zip(*(one.tolist() for one in np.unique(numbers, return_index=True)), strict=True):
        frame, row = frames[of_frame[at]], rows[at]
        tokens, messages = (slice(ends[row], ends[row + 1]) for ends in bounds[of_frame[at]])
        words = frame.words[tokens]
        yield Rendered(
            words & ~bit,
            words >= bit,
            source.drawn_as(number),
            float(frame.weights[row]),
            source.source_of(number),
            frame.starts[messages].tolist(),
            [ROLES[role] for role in frame.roles[messages].tolist()],
        )


def _bounds(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
