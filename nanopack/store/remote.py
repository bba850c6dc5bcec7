"""Read conversations from, and write a store to, any place that fsspec knows: s3://, gs://, hf://, memory://, …

    urls             ->   RemoteFiles   ->   Source[i]: a file is fetched when its first conversation is read
    url of a store   ->   RemoteFolder  ->   what Folder does, there

file:// is this machine. A Loader maps files, so a store that was written elsewhere is fetched before it is read.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from nanopack.conversations.files import SUFFIXES, Files, open_files
from nanopack.conversations.source import Source
from nanopack.store.folder import TEMPORARY, FileFacts, Folder

# Where a file is there whole or not at all: elsewhere it is renamed once it is.
ATOMIC = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf", "memory", "oci", "r2"}


def is_url(path: object) -> bool:
    """Return whether a path names another place than a file of this machine."""
    return isinstance(path, str) and "://" in path and not path.startswith("file://")


def local_path(path: Any) -> Any:
    """Return file:///data/x as /data/x, and anything else as it is."""
    return path.removeprefix("file://") if isinstance(path, str) else path


def open_folder(path: str | os.PathLike[str]) -> Folder:
    """Return the folder of a path or a URL."""
    return RemoteFolder(path) if isinstance(path, str) and is_url(path) else Folder(local_path(path))


class RemoteFolder(Folder):
    """A folder at a URL."""

    def __init__(self, path: str) -> None:
        super().__init__(path.rstrip("/"))

    def write(self, name: str, chunks: Iterable[Any]) -> FileFacts:
        """Write a file of these chunks; under its name it is whole, for it is sent once it is."""
        with tempfile.TemporaryDirectory() as here:
            facts = Folder(here).write("file", chunks)
            fs, target = self._at(name)
            if self.path.partition("://")[0] in ATOMIC:
                fs.put_file(os.path.join(here, "file"), target)
            else:
                fs.makedirs(target.rpartition("/")[0], exist_ok=True)
                temporary = f"{target}.{uuid.uuid4().hex}{TEMPORARY}"
                fs.put_file(os.path.join(here, "file"), temporary)
                fs.mv(temporary, target)
        return facts

    def read(self, name: str) -> bytes:
        fs, target = self._at(name)
        found: bytes = fs.cat_file(target)
        return found

    def names(self, folder: str = "") -> list[str]:
        fs, target = self._at(folder)
        # what another machine wrote since must be seen
        fs.invalidate_cache()
        try:
            found = fs.ls(target, detail=True)
        except FileNotFoundError:
            return []
        return sorted(one["name"].rstrip("/").rpartition("/")[2] for one in found if one["type"] == "file")

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            fs, target = self._at(name)
            with contextlib.suppress(FileNotFoundError):
                fs.rm_file(target)

    def remove_folder(self, folder: str) -> None:
        self.remove(f"{folder}/{name}" for name in self.names(folder))

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Do nothing: there are no locks."""
        yield

    def _at(self, name: str) -> tuple[Any, str]:
        url = f"{self.path}/{name}" if name else self.path
        fs, target = _fsspec(url).core.url_to_fs(url)
        return fs, target


class RemoteFiles(Source):
    """The records of files at URLs, one file after the other. One is kept on this machine at a time."""

    def __init__(self, urls: Sequence[str], counts: Sequence[int]) -> None:
        """Take the URLs and the number of records in each; `count_records` finds it."""
        self._urls, self._counts, self._ends = tuple(urls), tuple(counts), [*accumulate(counts)]
        self._open: tuple[int, Any, Files] | None = None

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> object:
        file, row = self._find(index)
        return self._fetched(file)[row]

    def where(self, index: int) -> str:
        """Return the URL and the place in it."""
        file, row = self._find(index)
        place = self._fetched(file).where(row)
        # after the path of the copy
        return self._urls[file] + place[place.index(_name(self._urls[file])) + len(_name(self._urls[file])) :]

    def __reduce__(self) -> Any:
        return RemoteFiles, (self._urls, self._counts)

    def _find(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"conversation {index} of {len(self)}")
        file = bisect_right(self._ends, index)
        return file, index - (self._ends[file - 1] if file else 0)

    def _fetched(self, file: int) -> Files:
        if self._open is None or self._open[0] != file:
            self._open = None
            self._open = (file, *fetch_file(self._urls[file]))
        return self._open[2]


def fetch_file(url: str) -> tuple[Any, Files]:
    """Fetch a file, and return the temporary folder that holds it, and its records."""
    folder = tempfile.TemporaryDirectory(prefix="nanopack-")
    here = os.path.join(folder.name, _name(url))
    fs, source = _fsspec(url).core.url_to_fs(url)
    fs.get_file(source, here)
    return folder, open_files([here])


def count_records(url: str) -> int:
    """Return the number of records in a file at a URL, which is fetched for it."""
    folder, files = fetch_file(url)
    count = len(files)
    folder.cleanup()
    return count


def expand(paths: Sequence[str]) -> list[str]:
    """Return the files of URLs, of which some may be globs or folders, sorted within each; ValueError for none."""
    found = []
    for url in paths:
        fs, target = _fsspec(url).core.url_to_fs(url)
        names = sorted(fs.glob(target)) if "*" in target else sorted(fs.find(target))
        # a folder may hold other files; a file that is named is meant
        known = [name for name in names if name.lower().endswith(SUFFIXES)]
        if not known:
            raise ValueError(f"conversations={url!r} matches no file; known suffixes are {', '.join(SUFFIXES)}")
        found += [fs.unstrip_protocol(name) for name in known]
    return found


def open_remote(paths: Sequence[str], count: Callable[[Sequence[str]], list[int]]) -> tuple[Source, list[list[Any]]]:
    """Return the records of URLs, and of each file its URL and size; `count` counts the records of each."""
    urls = expand(paths)
    sizes = []
    for url in urls:
        fs, target = _fsspec(url).core.url_to_fs(url)
        sizes.append([url, fs.size(target)])
    return RemoteFiles(urls, count(urls)), sizes


def count_here(urls: Sequence[str]) -> list[int]:
    """Return the number of records in each file."""
    return [count_records(url) for url in urls]


def _name(url: str) -> str:
    return url.rpartition("/")[2]


def _fsspec(url: str) -> Any:
    try:
        return importlib.import_module("fsspec")
    except ImportError as error:
        raise ImportError(f"{url} is read through fsspec; pip install nanopack-gpu[ray], or fsspec") from error
