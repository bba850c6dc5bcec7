"""Write files so that each is there whole or not at all: a temporary name, fsync, a rename.

    bytes, chunk by chunk   ->   Folder.write(name)   ->   the file under its name, its size and SHA-256

What is killed on the way leaves a file that ends in TEMPORARY, which nothing reads and `sweep` removes.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import uuid
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("nanopack")

TEMPORARY = ".tmp"


class FileFacts(NamedTuple):
    """Size and hash of a file that was written."""

    bytes: int
    sha256: str


class Folder:
    """A folder on this machine; it is made where it is missing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)

    def write(self, name: str, chunks: Iterable[Any]) -> FileFacts:
        """Write a file of these chunks, buffers of bytes, atomically; OSError names the file and what helps."""
        path = os.path.join(self.path, name)
        temporary = f"{path}.{uuid.uuid4().hex}{TEMPORARY}"
        digest, size = hashlib.sha256(), 0
        with _explained(path, temporary):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(temporary, "wb") as file:
                for chunk in chunks:
                    size += file.write(chunk)
                    digest.update(chunk)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(os.path.dirname(path))
        return FileFacts(size, digest.hexdigest())

    def read(self, name: str) -> bytes:
        """Return the bytes of a file; FileNotFoundError where there is none."""
        with open(os.path.join(self.path, name), "rb") as file:
            return file.read()

    def names(self, folder: str = "") -> list[str]:
        """Return the names of the files in this folder or in one of its folders, sorted; none where it is missing."""
        path = os.path.join(self.path, folder)
        if not os.path.isdir(path):
            return []
        return sorted(entry.name for entry in os.scandir(path) if entry.is_file())

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; those that are not there are no matter."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(self.path, name))

    def remove_folder(self, folder: str) -> None:
        """Remove one of its folders and the files in it."""
        self.remove(f"{folder}/{name}" for name in self.names(folder))
        # gone already, or another process has just written into it
        with contextlib.suppress(OSError):
            os.rmdir(os.path.join(self.path, folder))

    def sweep(self, *folders: str) -> None:
        """Remove what killed writers left, here and in these folders."""
        for folder in ("", *folders):
            self.remove(os.path.join(folder, name) for name in self.names(folder) if name.endswith(TEMPORARY))

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Hold the lock that the file of this name is; it ends with the process. Another process waits for it."""
        path = os.path.join(self.path, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            # not every system has locks, nor every file system
            if fcntl is not None:
                with contextlib.suppress(OSError):
                    _lock(file, self.path)
            yield

    def __str__(self) -> str:
        return self.path


def _lock(file: Any, folder: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.warning("another process is writing into %s; waiting for it", folder)
        fcntl.flock(file, fcntl.LOCK_EX)


@contextlib.contextmanager
def _explained(path: str, temporary: str) -> Iterator[None]:
    """Remove the temporary file where the block fails, and name the file in what an OSError says."""
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        if not isinstance(error, OSError):
            raise
        what = f"{error.strerror or error}; nothing is under this name, and what was finished before stays: repair it"
        raise OSError(error.errno, f"{what} (free some space, say), and run the same again", path) from error


def _sync_folder(path: str) -> None:
    """Bring a rename to the disk; only POSIX opens folders."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
