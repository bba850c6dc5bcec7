"""Notice that a file was cut off while it is mapped into memory: the system kills a process that reads beyond its end.

    paths             ->   MappedFiles.check()   ->   StorageError that names the file, before it is read
    /proc/self/maps   ->   cut_off()             ->   the files, for the message about a process that died of it

A look at the size takes a microsecond, so there is one every PER_FILE seconds a file. What is read until then of the
last page that is left may be zeros; the next look ends the run all the same.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Iterable

from nanopack.errors import StorageError

PER_FILE = 1e-4
"""Seconds between two looks, times the number of files."""
REMEDY = "copy it again and resume from a checkpoint; replace a file in use by renaming a new one over it"


class MappedFiles:
    """Files that are mapped, with their sizes when they were."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._known = [(os.path.abspath(path), os.stat(path)) for path in paths]
        self._looked = time.monotonic()

    def check(self) -> None:
        """Raise StorageError if one is shorter than it was; one that was replaced or deleted lives on while mapped."""
        now = time.monotonic()
        if now - self._looked < PER_FILE * len(self._known):
            return
        self._looked = now
        for path, known in self._known:
            with contextlib.suppress(FileNotFoundError):
                found = os.stat(path)
                if found.st_size < known.st_size and os.path.samestat(found, known):
                    sizes = f"to {found.st_size:,} of {known.st_size:,} bytes"
                    raise StorageError(f"{path} was cut off while in use, {sizes}; {REMEDY}")


def cut_off() -> list[str]:
    """Return which files end before what this process has mapped of them, each with its size. Linux alone knows."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            span, access, offset, device, inode, *path = line.rstrip("\n").split(maxsplit=5)
            # data are mapped to be shared, libraries are not
            if not path or not access.endswith("s"):
                continue
            first, last = (int(number, 16) for number in span.split("-"))
            with contextlib.suppress(OSError):
                status = os.stat(path[0])
                there = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
                pages = -(-status.st_size // mmap.PAGESIZE) * mmap.PAGESIZE
                if (str(status.st_ino), there) == (inode, device) and pages < int(offset, 16) + last - first:
                    found[path[0]] = f"{path[0]}, which has {status.st_size:,} bytes left"
    return list(found.values())
