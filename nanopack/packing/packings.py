"""The packings to choose from, each with its options.

    Loader(packing="best_fit")            ->   as_packing()   ->   BestFit()   ->   .build(read, ...)   ->   a Packer
    Loader(packing=BestFit(window=256))                                             shard.py drives it

Each also says what it does to documents (cuts, crops, splits, drops), so that no other module compares names.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from nanopack.checks import check_bool, check_choice, check_int
from nanopack.packing.best_fit import BestFitPacker
from nanopack.packing.pad import PadPacker
from nanopack.packing.rows import Packer, Read
from nanopack.packing.stream import StreamPacker
from nanopack.packing.whole_pass import RowOrder, WholePassPacker

PackingName: TypeAlias = Literal["best_fit", "stream", "best_fit_pad", "best_fit_crop", "pad"]


@dataclass(frozen=True)
class Packing(ABC):
    """How documents are placed in rows, with its options checked. Immutable; use one of the subclasses."""

    name: ClassVar[PackingName]
    """What `Loader(packing=...)` and `--packing` call it with its default options."""
    cuts_to_row: ClassVar[bool] = False
    """Whether a document longer than a row, T + 1 tokens, is cut to that before it waits."""
    crops: ClassVar[bool] = False
    """Whether a row may end with the beginning of a document whose rest is dropped."""
    splits: ClassVar[bool] = False
    """Whether a document may continue in the next row."""
    drops: ClassVar[bool] = False
    """Whether documents without any token in the loss are dropped; see `drops_untrained`."""

    @property
    def whole_passes(self) -> bool:
        """Whether all documents of a pass are placed together, so that their lengths must be known beforehand."""
        return False

    def __post_init__(self) -> None:
        """Raise ValueError for an option that is not an int from 1."""
        for name, value in self.options().items():
            check_int(name, value, least=1)

    @abstractmethod
    def build(self, read: Read, *, batch_size: int, seq_len: int, row_order: RowOrder | None = None) -> Packer:
        """Return a packer that fills batches of `batch_size` rows of seq_len + 1 tokens.

        `read()` returns the numbers of the next documents, ascending from 0, and their lengths (tokens, from 1), or
        None at the end of the data. The packer reads when its rule needs another document; of several that it gets at
        once it takes one by one. `row_order` is for `whole_passes`, which need all documents of a pass at once.
        """

    def options(self) -> dict[str, Any]:
        """Return the options by name: plain ints, bools and strings.

        >>> BestFit(window=8).options()
        {'window': 8, 'max_age': 128, 'refill': 1}
        """
        return dataclasses.asdict(self)

    def drops_untrained(self, loss: str) -> bool:
        """Return whether a document without any token in the loss is dropped, when `loss` decides which these are."""
        return self.drops and loss != "all"


@dataclass(frozen=True, kw_only=True)
class BestFit(Packing):
    """Rows of whole documents: hardly any padding, and no document waits long.

    Each row takes the longest waiting document that fits, again and again, as in TRL's "bfd" within a window.

    Args:
        window: documents to choose from; `"all"`: those of a whole pass, for data whose lengths are known, such as a
            token store. Documents of like lengths then meet, and with a seed the rows are delivered in a random order.
        max_age: a document that has waited this many rows opens the next one; not with window="all".
        refill: documents to read at a time when fewer than `window` wait; not with window="all".
    """

    window: int | Literal["all"] = 64
    max_age: int = 128
    refill: int = 1
    name = "best_fit"
    cuts_to_row = True
    drops = True

    def __post_init__(self) -> None:
        """Raise ValueError for an option that is not an int from 1, or window="all"."""
        check_int("max_age", self.max_age, least=1)
        check_int("refill", self.refill, least=1)
        if self.window != "all":
            check_int("window", self.window, least=1)

    @property
    def whole_passes(self) -> bool:
        """Whether all documents of a pass are placed together."""
        return self.window == "all"

    def build(self, read: Read, *, batch_size: int, seq_len: int, row_order: RowOrder | None = None) -> Packer:
        """Return the packer; see `Packing.build`."""
        if self.window == "all":
            return WholePassPacker(read, batch_size, seq_len + 1, row_order)
        return BestFitPacker(
            read, batch_size, seq_len + 1, window=self.window, refill=self.refill, max_age=self.max_age
        )


@dataclass(frozen=True, kw_only=True)
class BestFitPad(Packing):
    """Rows of whole documents, as nanochat's SFT packs them: as `BestFit`, but a short document may wait forever.

    Documents without any token in the loss are kept.

    Args:
        window: documents to choose from.
        refill: documents to read at a time when fewer than `window` wait.
    """

    window: int = 100
    refill: int = 1
    name = "best_fit_pad"
    cuts_to_row = True

    def build(self, read: Read, *, batch_size: int, seq_len: int, row_order: RowOrder | None = None) -> Packer:
        """Return the packer; see `Packing.build`."""
        return BestFitPacker(read, batch_size, seq_len + 1, window=self.window, refill=self.refill)


@dataclass(frozen=True, kw_only=True)
class BestFitCrop(Packing):
    """Full rows, as nanochat's pretraining packs them: the shortest document that waits is cropped to fill the rest.

    Args:
        window: documents to choose from.
        refill: documents to read at a time when fewer than `window` wait; nanochat reads 128.
    """

    window: int = 1000
    refill: int = 1
    name = "best_fit_crop"
    crops = True

    def build(self, read: Read, *, batch_size: int, seq_len: int, row_order: RowOrder | None = None) -> Packer:
        """Return the packer; see `Packing.build`."""
        return BestFitPacker(read, batch_size, seq_len + 1, window=self.window, refill=self.refill, crop=True)


@dataclass(frozen=True, kw_only=True)
class Stream(Packing):
    """Documents end to end, split wherever a row ends: nanochat's midtraining, TRL's "wrapped".

    Args:
        overlap: the last target of a batch is also the first input of the next, so that every token is a target: a
            batch advances by B * T tokens instead of B * T + 1.
    """

    overlap: bool = False
    name = "stream"
    splits = True

    def __post_init__(self) -> None:
        """Raise ValueError unless `overlap` is a bool."""
        check_bool("overlap", self.overlap)

    def build(self, read: Read, *, batch_size: int, seq_len: int, row_order: RowOrder | None = None) -> Packer:
        """Return the packer; see `Packing.build`."""
        return StreamPacker(read, batch_size, seq_len, overlap=self.overlap)


@dataclass(frozen=True, kw_only=True)
class Pad(Packing):
    """One document a row: the baseline, and what a DataLoader with a padding collator does."""

    name = "pad"
    cuts_to_row = True
    drops = True

    def build(self, read: Read, *, batch_size: int, seq_len: int, row_order: RowOrder | None = None) -> Packer:
        """Return the packer; see `Packing.build`."""
        return PadPacker(read, batch_size)


PACKINGS: dict[str, type[Packing]] = {kind.name: kind for kind in (BestFit, Stream, BestFitPad, BestFitCrop, Pad)}
"""The packings by name."""


def as_packing(packing: PackingName | Packing) -> Packing:
    """Return the packing of that name with its default options; a packing as it is. ValueError for anything else.

    >>> as_packing("stream")
    Stream(overlap=False)
    """
    if isinstance(packing, Packing):
        return packing
    check_choice("packing", packing, tuple(PACKINGS), otherwise=", or a packing such as nanopack.BestFit(window=64)")
    return PACKINGS[packing]()
