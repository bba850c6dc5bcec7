"""Read bytes of a file anywhere, whether it is compressed or not.

    path, Version   ->   PlainBytes, GzipBytes   ->   read(start, stop), chunks()
                                                      files.py finds lines in them

What lies in the bytes is not known here. They are read with os.pread: no position is shared and no lock is ours, so
forked processes and threads may read at the same time. Pickling leaves every open file behind.
"""

from __future__ import annotations

import importlib
import io
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar

Value = TypeVar("Value")

SCAN_BYTES = 256 << 10
BLOCK_BYTES = 8 << 20
# Every kept decompressor holds on to what it has not consumed of its last read, so reads are small.
GZIP_READ_BYTES = 16 << 10


class Recent(Generic[Value]):
    """What `make` returned last, by its arguments: open files, decompressed blocks, row groups.

    It pickles empty. lru_cache may be shared by threads, and a fork at any moment leaves it whole.
    """

    def __init__(self, keep: int, make: Callable[..., Value]) -> None:
        self._arguments = keep, make
        self.get: Callable[..., Value] = lru_cache(keep)(make)

    def __reduce__(self) -> tuple[type[Recent[Value]], tuple[int, Callable[..., Value]]]:
        return Recent, self._arguments


class Version(NamedTuple):
    """A file as it was when its conversations were counted."""

    path: str
    size: int
    mtime_ns: int


class OpenFile(io.FileIO):
    """A file that is open while anybody holds it; ValueError if it is not that version any more."""

    def __init__(self, version: Version) -> None:
        super().__init__(version.path)
        status = os.fstat(self.fileno())
        if (status.st_size, status.st_mtime_ns) != (version.size, version.mtime_ns):
            raise ValueError(f"{version.path} has changed since it was opened; open the conversations again")

    def __del__(self) -> None:
        # Closing is left to the last holder, and Python warns of files that are dropped open.
        self.close()


class PlainBytes:
    """The bytes of a file, read anywhere."""

    def __init__(self, version: Version, files: Recent[OpenFile]) -> None:
        self.path, self.size = version.path, version.size
        self._version, self._files = version, files

    @staticmethod
    def head(path: str) -> bytes:
        """Return the first bytes of a file, which say of what kind it is."""
        with open(path, "rb") as file:
            return file.read(64)

    def chunks(self) -> Iterator[bytes]:
        for start in range(0, self.size, SCAN_BYTES):
            yield self.read(start, min(start + SCAN_BYTES, self.size))

    def read(self, start: int, stop: int) -> bytes:
        # Held to the end: a file that other threads crowd out of `files` closes when nobody holds it.
        file = self._files.get(self._version)
        data = os.pread(file.fileno(), stop - start, start)
        if len(data) < stop - start:
            raise ValueError(f"{self.path} was cut off while in use; open the conversations again")
        return data


class ZstdBytes:
    """The decompressed bytes of a zstd file, read anywhere.

    zstd cannot seek, and its decompressor cannot be copied. So the file is decompressed once in each process that opens
    it, into a temporary file without a name: that needs the disk space, and no more memory than a chunk.
    """

    def __init__(self, raw: PlainBytes) -> None:
        self.path = raw.path
        self._raw = raw
        self._unpack()

    def __reduce__(self) -> tuple[type[ZstdBytes], tuple[PlainBytes]]:
        return ZstdBytes, (self._raw,)

    def _unpack(self) -> None:
        zstandard = import_zstandard(self.path)
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as this is)
        frame = None
        try:
            for chunk in self._raw.chunks():
                # a file may be several frames
                while chunk:
                    frame = frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
                    self._file.write(frame.decompress(chunk))
                    chunk, frame = frame.unused_data, None if frame.eof else frame
        except zstandard.ZstdError as error:
            raise ValueError(f"{self.path} is damaged ({error}); test it with zstd -t, then copy it again") from error
        if frame is not None:
            raise ValueError(f"{self.path} is cut off; test it with zstd -t, then make or copy it again")
        self._file.flush()
        self.size = self._file.tell()

    def chunks(self) -> Iterator[bytes]:
        for start in range(0, self.size, SCAN_BYTES):
            yield self.read(start, min(start + SCAN_BYTES, self.size))

    def read(self, start: int, stop: int) -> bytes:
        return os.pread(self._file.fileno(), stop - start, start)


def import_zstandard(path: str) -> Any:
    """Return the package; ImportError that says how to install it."""
    try:
        return importlib.import_module("zstandard")
    except ImportError as error:
        raise ImportError(f"{path} is zstd, which needs zstandard; pip install nanopack[zstd]") from error


class Place(NamedTuple):
    """Where decompressing can go on."""

    at: int
    """Next byte of the gzip file."""
    member: Any
    """The decompressor as it stands there, to be copied, never advanced; None between two members."""
    lines: int
    """Line ends before this place."""


class GzipBytes:
    """The decompressed bytes of a gzip file of one or more members, read anywhere.

    gzip cannot seek. So the decompressor is kept as it stands at every 8 MB of text, and a read decompresses
    the block of 8 MB (or the two) that it needs. Memory: at most 64 KB for every 8 MB of text, and the 4
    blocks read last in all files together.
    """

    def __init__(self, raw: PlainBytes, blocks: Recent[bytes]) -> None:
        self.path = raw.path
        self._raw, self._blocks = raw, blocks
        self._places = {0: Place(0, None, 0)}

    def __getstate__(self) -> dict[str, object]:
        # Decompressors cannot be pickled; the first read finds its place again.
        return self.__dict__ | {"_places": {0: self._places[0]}}

    def chunks(self) -> Iterator[bytes]:
        number = 0
        while block := self._blocks.get(self, number):
            yield block
            number += 1

    def read(self, start: int, stop: int) -> bytes:
        first, last = start // BLOCK_BYTES, (stop - 1) // BLOCK_BYTES
        data = b"".join(self._blocks.get(self, number) for number in range(first, last + 1))
        return data[start - first * BLOCK_BYTES : stop - first * BLOCK_BYTES]

    def inflate(self, number: int) -> bytes:
        """Return block `number`, empty behind the end, and keep every place on the way to it."""
        known = number
        while known not in self._places:
            known -= 1
        while True:
            block, place = self._inflate_at(self._places[known])
            known += 1
            self._places.setdefault(known, place)
            if known > number:
                return block

    def _inflate_at(self, place: Place) -> tuple[bytes, Place]:
        at, member, lines = place
        member = member and member.copy()
        pieces: list[bytes] = []
        room = BLOCK_BYTES
        while room and (member or at < self._raw.size):
            data = self._raw.read(at, min(at + GZIP_READ_BYTES, self._raw.size))
            # gzip allows zero bytes behind a member: tapes and archives fill up their blocks with them.
            if at and not member and data[0] == 0:
                at += len(data) - len(data.lstrip(b"\0"))
                continue
            member = member or zlib.decompressobj(wbits=31)
            piece = self._decompress(member, data, room, lines)
            at += len(data) - len(member.unused_data) - len(member.unconsumed_tail)
            pieces.append(piece)
            room -= len(piece)
            lines += piece.count(b"\n")
            member = None if member.eof else member
        return b"".join(pieces), Place(at, member, lines)

    def _decompress(self, member: Any, data: bytes, room: int, lines: int) -> bytes:
        try:
            piece: bytes = member.decompress(data, room)
        except zlib.error as error:
            why = f"is damaged, noticed after line {lines} ({error})"
        else:
            if data or piece or member.eof:
                return piece
            why = f"is cut off in line {lines + 1}"
        raise ValueError(f"{self.path} {why}; test it with gzip -t, then make or copy it again")
