"""Read bytes of a file anywhere, and notice when it has become another file.

    path   ->   Version, PlainBytes   ->   read(start, stop), chunks()
                                           files.py finds lines in them, unpacked.py decompresses them

What lies in the bytes is not known here. They are read with os.pread: no position is shared and no lock is ours, so
forked processes and threads may read at the same time. Open files are not pickled.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from nanopack.errors import StorageError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

Value = TypeVar("Value")

SCAN_BYTES = 256 << 10


class Recent(Generic[Value]):
    """What `make` returned last, by its arguments: decompressed blocks, row groups.

    It pickles empty. functools.lru_cache may be shared by threads, and a fork at any moment leaves it whole.
    """

    def __init__(self, keep: int, make: Callable[..., Value]) -> None:
        self._arguments = keep, make
        self.get: Callable[..., Value] = functools.lru_cache(keep)(make)

    def __reduce__(self) -> tuple[type[Recent[Value]], tuple[int, Callable[..., Value]]]:
        return Recent, self._arguments


# Bytes of a file that say whether it is still the same: CHECKED_BYTES at each of CHECKED_PLACES places.
CHECKED_BYTES = 4 << 10
CHECKED_PLACES = 8


class Version(NamedTuple):
    """A file as it was when its conversations were counted."""

    path: str
    size: int
    mtime_ns: int
    checksum: int
    """CRC32 of the bytes at CHECKED_PLACES."""
    place: str
    """The absolute path, which leads there from any working directory."""

    @classmethod
    def of(cls, path: str) -> Version:
        """Return the version of the file that is there now."""
        with open(path, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            checksum = _checksum(file.fileno(), status.st_size)
        return cls(path, status.st_size, status.st_mtime_ns, checksum, os.path.abspath(path))

    def check(self, fd: int, known_mtime_ns: int, *, may_grow: bool) -> int:
        """Return the time at which the open file was last modified; StorageError if its content is another one.

        A file that was only touched, or copied again, has the same content; with `may_grow`, also one that has more
        after it. `known_mtime_ns` is the last answer: bytes are compared where it is another one.
        """
        status = os.fstat(fd)
        if status.st_mtime_ns == known_mtime_ns and status.st_size == self.size:
            return known_mtime_ns
        if status.st_size < self.size:
            raise StorageError(f"{self.path} was cut off while in use; open the conversations again")
        grown = status.st_size > self.size and not may_grow
        if grown or (status.st_mtime_ns != known_mtime_ns and _checksum(fd, self.size) != self.checksum):
            raise StorageError(f"{self.path} has changed since it was opened; open the conversations again")
        return status.st_mtime_ns


def _checksum(fd: int, size: int) -> int:
    last = max(0, size - CHECKED_BYTES)
    places = sorted({last * k // (CHECKED_PLACES - 1) for k in range(CHECKED_PLACES)})
    return functools.reduce(lambda crc, at: zlib.crc32(os.pread(fd, CHECKED_BYTES, at)[: size - at], crc), places, 0)


class OpenFile(io.FileIO):
    """A file that is open while anybody holds it; StorageError if it is not that version any more."""

    def __init__(self, version: Version, *, may_grow: bool = False) -> None:
        super().__init__(version.place)
        self._version, self._may_grow, self._mtime_ns = version, may_grow, version.mtime_ns
        self.check()

    def check(self) -> None:
        """Raise StorageError if it is not that version any more."""
        self._mtime_ns = self._version.check(self.fileno(), self._mtime_ns, may_grow=self._may_grow)

    def __del__(self) -> None:
        # Closing is left to the last holder, and Python warns of files that are dropped open.
        self.close()


def _limit_of_open_files() -> int:
    # Windows has none to ask for; unlimited is negative
    limit: int = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if resource else 512
    return limit if limit >= 0 else 1 << 20


def most_open_files() -> int:
    """Return how many files of conversations may be open in this process: a share of what the system allows."""
    return max(4, min(1024, _limit_of_open_files() // 4))


class Holder(Protocol):
    """What holds an open file; None where it was closed to make room."""

    file: Any


# Whose files are open, of all data sets together, the oldest first.
_holders: deque[weakref.ref[Holder]] = deque()


def count_open(holder: Holder) -> None:
    """Count a file among those of conversations that are open, and close the oldest where these are too many."""
    _holders.append(weakref.ref(holder))
    while len(_holders) > most_open_files():
        _close_oldest()


def open_file(version: Version, *, may_grow: bool = False) -> OpenFile:
    """Open a file; where too many are open, close those of conversations first, the oldest first."""
    while True:
        try:
            return OpenFile(version, may_grow=may_grow)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            if not _close_oldest():
                why = f"too many open files, with a limit of {_limit_of_open_files()}; raise it with ulimit -n"
                raise StorageError(f"{version.path}: {why}") from error


def _close_oldest() -> bool:
    """Close the file that has been open longest; False where there is none."""
    while _holders:
        with contextlib.suppress(IndexError):  # another thread took it
            holder = _holders.popleft()()
            if holder is not None:
                holder.file = None
                return True
    return False


class PlainBytes:
    """The bytes of a file, read anywhere."""

    def __init__(self, version: Version) -> None:
        self.path, self.size = version.path, version.size
        self._version = version
        self.file: OpenFile | None = None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"file": None}

    @staticmethod
    def head(path: str) -> bytes:
        """Return the first bytes of a file, which say of what kind it is."""
        with open(path, "rb") as file:
            return file.read(512)

    def chunks(self) -> Iterator[bytes]:
        for start in range(0, self.size, SCAN_BYTES):
            yield self.read(start, min(start + SCAN_BYTES, self.size))

    def read(self, start: int, stop: int) -> bytes:
        # Held to the end: a file that is closed to make room closes when nobody holds it.
        file = self.file or self._open()
        data = os.pread(file.fileno(), stop - start, start)
        # after the read: what came is what was checked
        file.check()
        if len(data) < stop - start:
            raise StorageError(f"{self.path} was cut off while in use; open the conversations again")
        return data

    def _open(self) -> OpenFile:
        file = self.file = open_file(self._version, may_grow=True)
        count_open(self)
        return file
