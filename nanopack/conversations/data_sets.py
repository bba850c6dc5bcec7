"""Open a data set: files, a list, a datasets.Dataset or any object with len and [int].

    paths, objects   ->   open_conversations()   ->   Source[i], the record as it was stored
                               files.py                      records.py checks it

No record is read before it is asked for. A null field of an Arrow struct counts as absent at every depth: Arrow gives
every struct of a column the fields of all. A null in JSON or in Python stays.
"""

from __future__ import annotations

import glob
import logging
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from nanopack.conversations.arrow import without_nulls
from nanopack.conversations.files import SUFFIXES, files_in, open_files
from nanopack.conversations.source import Source
from nanopack.errors import describe, short

log = logging.getLogger("nanopack")


class Dataset(Protocol):
    """Any data set: a list, `datasets.Dataset`, torch `Dataset`, nanochat task or `nanopack.mixture`."""

    def __len__(self) -> int:
        """Return the number of records."""

    def __getitem__(self, index: int, /) -> Any:
        """Return record `index`, a conversation in one of the accepted shapes, for 0 <= index < len."""


Conversations: TypeAlias = Dataset | str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""What `Loader` and `mixture` take: a data set, or path(s), folders or globs of files that end in SUFFIXES."""


# Packages whose data sets take no lock that a thread of theirs could hold at a fork.
KNOWN_CODE = ("builtins", "datasets", "numpy", "pandas")


class Items(Source):
    """The records of an object with len and [int]: list, datasets.Dataset, torch Dataset, nanochat task."""

    def __init__(self, items: Any) -> None:
        # A pandas.Series takes its labels for an index, which a shuffle leaves out of order.
        self._items = items.iloc if type(items).__name__ == "Series" and hasattr(items, "iloc") else items
        self._length = len(items)
        self._features = _features_of(items)
        self.runs_foreign_code = _runs_foreign_code(items)

    def objects(self) -> tuple[object, ...]:
        return tuple(_with_inner(self._items))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> object:
        if not 0 <= index < self._length:
            raise IndexError(f"conversation {index} of {self._length}")
        # nanochat's tasks refuse numpy's integers.
        record = self._items[operator.index(index)]
        return record if self._features is None else without_nulls(record, self._features)

    def where(self, index: int) -> str:
        return f"conversation {index}"

    def version(self) -> str:
        """Return the fingerprint of a datasets.Dataset, unless it is transformed as it is read."""
        known = type(self._items).__module__.split(".")[0] == "datasets" and _format_of(self._items) != "custom"
        return str(getattr(self._items, "_fingerprint", "")) if known else ""


def _with_inner(items: Any) -> Iterator[object]:
    """Yield a data set and, where it is torch's Subset or ConcatDataset, those that it reads."""
    yield items
    for inner in _inner(items):
        yield from _with_inner(inner)


def _inner(items: Any) -> list[Any]:
    """Return the data sets that torch's Subset or ConcatDataset read; none for any other."""
    if not type(items).__module__.startswith("torch.utils.data"):
        return []
    found = getattr(items, "datasets", None) or [getattr(items, "dataset", None)]
    return [one for one in found if one is not None]


def _runs_foreign_code(items: object) -> bool:
    package = type(items).__module__.split(".")[0]
    # set_transform() calls a function of the user's
    return package not in KNOWN_CODE or (package == "datasets" and _format_of(items) == "custom")


def _format_of(items: Any) -> object:
    # ds["messages"] is a Column, or one of another
    while type(items).__name__ == "Column":
        items = items.source
    return getattr(items, "format", {}).get("type")


def _features_of(items: Any) -> object:
    """Return the features of a datasets.Dataset, or of what torch's Subset or ConcatDataset hold, else None."""
    if type(items).__module__.startswith("torch.utils.data"):
        found = [_features_of(part) for part in _inner(items)]
        return None if not found or None in found else found[0]
    # what a transform of the user's hands out has other features
    if type(items).__module__.split(".")[0] != "datasets" or _format_of(items) == "custom":
        return None
    return getattr(items, "features", None)


def open_conversations(conversations: Any, *, shuffled: bool = False) -> Source:
    """Return the conversations of an object with len and [int], or of one or more paths or globs; a Source as it is.

    `shuffled` says that they will be read in any order.

    Files end in one of SUFFIXES. A glob gives its files sorted, a folder the known files in it, sorted, or the Dataset
    that was saved there; a list keeps its order. Raises ValueError for what is empty, missing or unreadable,
    ImportError for a file that needs a package which is not installed.
    """
    if isinstance(conversations, (str, os.PathLike)):
        conversations = [conversations]
    # by class, not by its methods: a pandas.Series has all of them, and means something else by where()
    if isinstance(conversations, Source):
        source = conversations
    elif isinstance(conversations, (list, tuple)) and any(map(_is_path, conversations)):
        paths = [path for item in conversations for path in find_files(item)]
        _warn_of_doubles(paths)
        source = open_files(paths, shuffled=shuffled)
    else:
        _refuse_unusable(conversations)
        source = Items(conversations)
    if len(source) == 0:
        raise ValueError(f"conversations={short(conversations)} holds no conversation; give at least one")
    return source


def _warn_of_doubles(paths: list[str]) -> None:
    """Log that files are given twice, as overlapping globs and links do."""
    first: dict[tuple[int, int], str] = {}
    doubles = []
    for path in paths:
        status = os.stat(path)
        if (file := (status.st_dev, status.st_ino)) in first:
            doubles.append((path, first[file]))
        first.setdefault(file, path)
    if doubles:
        log.warning(
            "%d of the files are given again, and so are their conversations: %s, after %s; if that is meant, "
            "nanopack.mixture says how often each comes",
            *(len(doubles), *doubles[0]),
        )


def find_files(item: Any) -> list[str]:
    """Return the files that a path, folder or glob stands for; ValueError where there is none that can be read."""
    if not _is_path(item):
        raise ValueError(f"conversations mixes paths with {describe(item)}; give paths or records, not both")
    path = os.fsdecode(item)
    # A file whose name looks like a glob, or like a home directory, is meant itself.
    path = path if os.path.exists(path) else os.path.expanduser(path)
    paths = (
        [path]
        if os.path.exists(path) or not glob.has_magic(path)
        else sorted(glob.glob(_pattern(path), recursive=True))
    )
    if not paths:
        # a glob says nothing of a folder that cannot be listed
        os.listdir(_existing_folder(path) or ".")
        raise ValueError(f"conversations={path!r} matches no file; the working directory is {os.getcwd()}")
    paths = [file for path in paths for file in (files_in(path) if os.path.isdir(path) else [path])]
    for path in paths:
        _refuse_unreadable(path)
    return paths


def _pattern(path: str) -> str:
    """Return a glob in which the folders that exist under just that name, such as run[1], stand for themselves."""
    folder = _existing_folder(path)
    return glob.escape(folder) + path[len(folder) :]


def _existing_folder(path: str) -> str:
    """Return the part of a glob that is the path of a folder; "" where it begins with a pattern."""
    folder = os.path.dirname(path)
    while folder and not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return folder


def _is_path(item: object) -> bool:
    return isinstance(item, (str, os.PathLike))


def _is_record(item: object) -> bool:
    return isinstance(item, (dict, Mapping, list, tuple)) or type(item).__name__ == "ndarray"


def _refuse_unreadable(path: str) -> None:
    if not os.path.exists(path):
        why = f"does not exist; the working directory is {os.getcwd()}, and a text goes in as {{'text': ...}}"
    elif not path.lower().endswith(SUFFIXES):
        why = f"has an unknown suffix; known are {', '.join(SUFFIXES)}"
    elif not os.path.isfile(path) or not os.access(path, os.R_OK):
        why = "is not a file that can be read; give a plain file and check its permissions"
    else:
        return
    raise ValueError(f"conversations={short(path, 200)} {why}")


def _only_raises(method: Any) -> bool:
    """Return whether it is that of torch's Dataset, which IterableDataset inherits."""
    names = getattr(method, "__module__", ""), getattr(method, "__qualname__", "")
    return names == ("torch.utils.data.dataset", "Dataset.__getitem__")


def _refuse_unusable(items: Any) -> None:
    kind = type(items)
    if isinstance(items, Mapping):
        why = "is one dict; put a conversation into a list, give one split of a DatasetDict: data['train']"
    elif isinstance(items, (bytes, bytearray)):
        why = "is not a path; give it as str"
    elif isinstance(items, Iterator) or not (hasattr(kind, "__len__") and hasattr(kind, "__getitem__")):
        why = "has no len() and [int]; give list(...) of it, or files"
    elif _only_raises(kind.__getitem__):
        why = "can only be iterated; give a data set with [int], list(...) of it, or files"
    elif kind.__name__ == "DataFrame":
        why = "hands out columns; give the file, df.to_dict('records'), or datasets.Dataset.from_polars(df)"
    elif kind.__module__.startswith("pyarrow"):
        why = "hands out columns or Arrow's values; give datasets.Dataset(table), or the file"
    elif isinstance(items, (list, tuple)) and items and not any(map(_is_record, items)):
        why = "holds no records; give dicts such as {'messages': [...]}, or paths"
    else:
        return
    raise ValueError(f"conversations={describe(items)} {why}")
