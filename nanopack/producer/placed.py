"""Count what becomes of the tokens of one shard, by the source of a mixture.

Rows, and their documents in Live   ->   Placed.count()   ->   Ledger of each source
 packing/          chunk.py                                    arrivals.py holds them
"""

from __future__ import annotations

import numpy as np

from nanopack.packing.rows import Rows
from nanopack.producer.arrivals import Arrivals
from nanopack.producer.chunk import Live
from nanopack.producer.reader import Reader


class Placed:
    """Counts tokens as they are placed, and as they are cut off to fill a row."""

    def __init__(self, arrivals: Arrivals, reader: Reader, live: Live) -> None:
        """`arrivals` has the ledgers, `live` the documents."""
        self._arrivals, self._live = arrivals, live
        self._source, self._packing = reader.source, reader.config.packing
        # the document placed last, and before which of its tokens: the stream repeats one in the next row
        self._last = -1, 0

    def count(self, rows: Rows) -> None:
        """Count the tokens of rows that are delivered."""
        if len(self._arrivals.sources) == 1 and not self._packing.splits:
            self._arrivals.sources[0].emit(int(np.add.reduce(rows.lengths)), ended=len(rows.lengths))
            return
        at = self._live.find(rows.documents)
        if self._packing.splits and len(at):
            self._count_stream(rows, at)
        else:
            self._emit(rows.lengths, np.ones(len(at), bool), at)

    def resume(self, first: int, remaining: list[tuple[int, int]]) -> None:
        """Continue a stream: `first` is the document that it placed last, or will place next.

        `remaining` are the documents with tokens still to come, and their number.
        """
        length = int(self._live.lengths[self._live.find(np.array([first], np.int64))][0])
        self._last = first, length - dict(remaining).get(first, 0)

    def count_cropped(self, rows: Rows) -> None:
        """Count what is cut off from documents that fill a row."""
        if not self._packing.crops:
            return
        live, at = self._live, self._live.find(rows.documents)
        cut = live.lengths[at] - rows.lengths
        cropped = np.flatnonzero(cut)
        sources = self._source.sources_of(live.conversations[at[cropped]])
        for piece, source in zip(cropped.tolist(), sources.tolist(), strict=True):
            self._arrivals.sources[source].crop(int(cut[piece]))

    def _count_stream(self, rows: Rows, at: np.ndarray) -> None:
        """Count the tokens of the stream's rows, each once."""
        if len(self._arrivals.sources) > 1:
            ends = rows.offsets + rows.lengths
            same = np.empty(len(at), bool)
            same[0], same[1:] = rows.documents[0] == self._last[0], rows.documents[1:] == rows.documents[:-1]
            before = np.concatenate([[self._last[1]], ends[:-1]])
            new = ends - np.where(same, before, rows.offsets)
            self._emit(new, (ends == self._live.lengths[at]) & (new > 0), at)
            self._last = int(rows.documents[-1]), int(ends[-1])
            return
        # all documents from the first to the last, but for what was placed of the first
        first, last, live = int(at[0]), int(at[-1]), self._live
        document, end = int(rows.documents[-1]), int(rows.offsets[-1]) + int(rows.lengths[-1])
        placed = self._last[1] if self._last[0] == int(rows.documents[0]) else 0
        tokens = int(np.add.reduce(live.lengths[first:last])) + end - placed
        ended = last - first + (end == int(live.lengths[last])) - (placed == int(live.lengths[first]))
        self._arrivals.sources[0].emit(tokens, ended=ended)
        self._last = document, end

    def _emit(self, tokens: np.ndarray, ended: np.ndarray, at: np.ndarray) -> None:
        """Count tokens placed, (P,), and whether a document ended with them, (P,) bool, by source."""
        sources = self._arrivals.sources
        of = self._source.sources_of(self._live.conversations[at])
        for source in np.unique(of).tolist():
            own = of == source
            sources[source].emit(int(tokens[own].sum()), ended=int(np.count_nonzero(ended[own])))
