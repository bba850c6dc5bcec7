"""The interface of a data set of conversations, as every other module uses it.

files.py, records.py, mixture.py implement it   ->   Source[i]   ->   producer/reader.py reads record i
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np


class Source(ABC):
    """Random-access conversations. Implementations must subclass it."""

    names: tuple[str, ...] = ()
    """Names of the sources that it mixes; none where it is one."""
    runs_foreign_code = False
    """Whether a record is read by code of the user's, which may hold locks and draw random numbers."""
    rendered = False
    """Whether the records are tokens that a template rendered before, so that none is needed here."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> object:
        """Return the record as it was stored, for 0 <= index < len; IndexError elsewhere."""

    @abstractmethod
    def where(self, index: int) -> str:
        """Return the location of the record: 'chats.jsonl:17', 'chats.parquet row 17' or 'conversation 17'.

        Lines count from 1, as in an editor; rows and conversations from 0, as in Python.
        """

    def source_of(self, index: int) -> int:
        """Return the number, in `names`, of the source that the record is from; 0 where there is only one."""
        return 0

    def sources_of(self, indices: np.ndarray) -> np.ndarray:
        """Return `source_of` of records, (n,) int64."""
        if not self.names:
            return np.zeros(len(indices), np.int64)
        return np.array([self.source_of(index) for index in indices.tolist()], np.int64)

    @property
    def parts(self) -> tuple[Source, ...]:
        """Where its records are: the sources that it mixes, theirs in place of those that mix; else itself."""
        return (self,)

    def find(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return for records, (n,) int64, which of the `parts` each is in, and its index there: (n,) int64 each."""
        return np.zeros(len(indices), np.int64), indices

    def check_files(self) -> None:  # noqa: B027 (most sources have nothing to check)
        """Raise StorageError where a file that is mapped into memory was cut off: reading it would end the process."""

    def objects(self) -> tuple[object, ...]:
        """Return the objects of the user's that the records come from, and those within these."""
        return ()

    def picks_digest(self) -> str:
        """Return a digest of which records are mixed or split; "" where nothing is."""
        return ""

    def fingerprint(self) -> str:
        """Return a digest of all records, where it is known without reading them; "" elsewhere."""
        return ""

    def version(self) -> str:
        """Return a text that changes with any record, where one is known without reading them; "" elsewhere."""
        return ""

    def messages_of(self, index: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Return the token that each message of a record begins with, and its role, where it was `rendered`."""
        return (), ()

    def drawn_as(self, index: int) -> int:
        """Return the number that decides which random numbers are drawn while the record is read."""
        return index

    def is_copy(self, index: int) -> bool:
        """Return whether the record repeats the history of the one before it, for a later answer."""
        return False

    def are_copies(self, indices: np.ndarray) -> np.ndarray | None:
        """Return `is_copy` of records, (n,) bool; None where none ever is."""
        return None
