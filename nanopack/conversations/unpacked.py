"""Unpack once what has no random access: gzip and zstd when they are opened, row groups as they are first read.

    compressed bytes, decoded rows   ->   Scratch   ->   UnpackedBytes.read(start, stop), Scratch.map(begin)
                                          a temporary file without a name     files.py reads records from them

It takes the disk space of what is unpacked, in TMPDIR, until the last process that reads it ends. Forked processes
share it; a spawned one unpacks for itself.
"""

from __future__ import annotations

import errno
import importlib
import mmap
import os
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from nanopack.conversations.random_access import SCAN_BYTES, PlainBytes
from nanopack.errors import StorageError

# Compressed bytes that are decompressed at a time: their text may be a thousand times as long.
READ_BYTES = 16 << 10
# Where Arrow wants its buffers to begin.
ALIGN_BYTES = 64
# Where an open file can be opened once more.
FDS = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"


class Scratch:
    """A temporary file that grows, shared with the processes that are forked once it is there. It pickles empty."""

    def __init__(self) -> None:
        self._file: Any = None

    def __reduce__(self) -> tuple[type[Scratch], tuple[()]]:
        return Scratch, ()

    def __del__(self) -> None:
        # Python warns of files that are dropped open
        if self._file is not None:
            self._file.close()

    def create(self) -> None:
        """Create the file, if there is none yet. OSError where no folder for temporary files can be written."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (open as long as this is)

    def append(self, pieces: Iterable[bytes]) -> tuple[int, int]:
        """Append bytes; return where they begin, a multiple of ALIGN_BYTES, and how many they are.

        Processes may append at once where each appends one piece, of a multiple of ALIGN_BYTES. OSError where there is
        no room.
        """
        self.create()
        # opened once more: its position is nobody else's, and says where the bytes went
        with open(f"{FDS}/{self._file.fileno()}", "ab", buffering=0) as file:
            size = 0
            for piece in pieces:
                size += _write(file, piece)
            padding = _write(file, b"\0" * (-size % ALIGN_BYTES))
            return file.tell() - padding - size, size

    def read(self, start: int, stop: int) -> bytes:
        """Return these bytes of the file."""
        return os.pread(self._file.fileno(), stop - start, start)

    def map(self, begin: int) -> memoryview:
        """Return the file from `begin` on, mapped into memory."""
        low = begin - begin % mmap.ALLOCATIONGRANULARITY
        size = os.fstat(self._file.fileno()).st_size - low
        return memoryview(mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_READ, offset=low))[begin - low :]


def _write(file: Any, data: bytes) -> int:
    if file.write(data) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return len(data)


def no_room(path: str, error: OSError) -> str:
    """Return in words why a file cannot be unpacked, and what to do."""
    return (
        f"{path} does not fit unpacked into the folder for temporary files, {tempfile.gettempdir()} ({error}); set "
        f"TMPDIR to one with more room, or store it as .jsonl"
    )


class UnpackedBytes:
    """The decompressed bytes of a gzip or zstd file, read anywhere. Memory: none; disk: that of the text."""

    def __init__(self, raw: PlainBytes, scratch: Scratch) -> None:
        self.path = raw.path
        self._arguments = raw, scratch
        self._scratch = scratch
        pieces = inflate_zstd if raw.path.lower().endswith(".zst") else inflate_gzip
        try:
            self._begin, self.size = scratch.append(pieces(raw))
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(no_room(raw.path, error)) from error

    def __reduce__(self) -> tuple[type[UnpackedBytes], tuple[PlainBytes, Scratch]]:
        return UnpackedBytes, self._arguments

    def chunks(self) -> Iterator[bytes]:
        for start in range(0, self.size, SCAN_BYTES):
            yield self.read(start, min(start + SCAN_BYTES, self.size))

    def read(self, start: int, stop: int) -> bytes:
        return self._scratch.read(self._begin + start, self._begin + stop)


def inflate_gzip(raw: PlainBytes) -> Iterator[bytes]:
    """Yield the text of a gzip file of one or more members; StorageError where it is damaged or cut off."""
    member: Any = None
    begun, lines = False, 0
    for start in range(0, raw.size, READ_BYTES):
        data = raw.read(start, min(start + READ_BYTES, raw.size))
        while data:
            # gzip allows zero bytes after a member: tapes and archives fill up their blocks with them.
            if member is None and begun and not (data := data.lstrip(b"\0")):
                break
            member, begun = member or zlib.decompressobj(wbits=31), True
            try:
                piece = member.decompress(data)
            except zlib.error as error:
                why = f"is damaged, noticed after line {lines} ({error})"
                raise StorageError(f"{raw.path} {why}; test it with gzip -t, then make or copy it again") from error
            lines += piece.count(b"\n")
            yield piece
            data, member = member.unused_data, None if member.eof else member
    if member is not None:
        why = f"is cut off in line {lines + 1}"
        raise StorageError(f"{raw.path} {why}; test it with gzip -t, then make or copy it again")


def inflate_zstd(raw: PlainBytes) -> Iterator[bytes]:
    """Yield the text of a zstd file of one or more frames; StorageError where it is damaged or cut off."""
    zstandard = import_zstandard(raw.path)
    frame: Any = None
    try:
        for data in raw.chunks():
            while data:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
                yield frame.decompress(data)
                data, frame = frame.unused_data, None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise StorageError(f"{raw.path} is damaged ({error}); test it with zstd -t, then copy it again") from error
    if frame is not None:
        raise StorageError(f"{raw.path} is cut off; test it with zstd -t, then make or copy it again")


def import_zstandard(path: str) -> Any:
    """Return the package; ImportError that says how to install it."""
    try:
        return importlib.import_module("zstandard")
    except ImportError as error:
        raise ImportError(f"{path} is zstd, which needs zstandard; pip install nanopack-gpu[zstd]") from error
