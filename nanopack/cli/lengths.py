"""Measure how long the documents of a data set are, compared with the rows they must fit.

    conversations, render   ->   measure()   ->   Lengths   ->   summary.py and plots.py show them

Documents are measured as rendered, before anything is cut. Only numbers are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from nanopack.config import BALANCE_WINDOW, LoaderConfig
from nanopack.conversations.records import Conversation, check
from nanopack.conversations.source import Source
from nanopack.packing import Packed, Packing, simulate
from nanopack.packing.imbalance import LLAMA_3_8B, Imbalance, drawn, row_costs
from nanopack.render.document import Document

# shorter documents share one bin
SHORTEST_BIN = 16
# numbers of ranks for which the imbalance is shown, and most documents that are packed to find it
RANKS = (8, 64)
MEASURED = 50_000


class Bin(NamedTuple):
    """Documents of `least` to `most` tokens; `most` is None in the last bin: longer than a row."""

    least: int
    most: int | None
    documents: int
    tokens: int


@dataclass(frozen=True, eq=False)
class Lengths:
    """Documents in the order in which they were read; three arrays, (n,) int64."""

    conversations: np.ndarray  # index in the data set
    tokens: np.ndarray
    in_loss: np.ndarray  # of these, in the loss by the template

    def summary(self, row_tokens: int, where: Callable[[int], str]) -> dict[str, Any]:
        """Return the statistics as plain data (JSON-able); None if there is no document."""
        some = len(self.tokens) > 0
        p50, p90, p99 = (float(p) for p in np.percentile(self.tokens, (50, 90, 99))) if some else (None, None, None)
        longer = self.tokens > row_tokens
        return {
            "count": len(self.tokens),
            "tokens": int(self.tokens.sum()),
            "in_loss": int(self.in_loss.sum()),
            "mean": float(self.tokens.mean()) if some else None,
            "median": p50,
            "p90": p90,
            "p99": p99,
            "max": int(self.tokens.max()) if some else None,
            "longest": where(int(self.conversations[self.tokens.argmax()])) if some else None,
            "longer_than_row": int(np.count_nonzero(longer)),
            "tokens_beyond_row": int((self.tokens[longer] - row_tokens).sum()),
        }

    def rows(self, config: LoaderConfig, where: Callable[[int], str]) -> list[tuple[str, str, str]]:
        """Return (name, number, note) of the statistics."""
        found = self.summary(config.row_tokens, where)
        rows = [
            ("documents", f"{found['count']:,}", ""),
            ("tokens", f"{found['tokens']:,}", "before anything is cut"),
        ]
        if not found["count"]:
            return rows
        rows += [
            ("in the loss", f"{found['in_loss'] / found['tokens']:.1%}", "by the template"),
            ("mean", f"{found['mean']:,.1f}", "tokens a document"),
            ("median", f"{found['median']:,.0f}", ""),
            ("90%", f"{found['p90']:,.0f}", "or fewer"),
            ("99%", f"{found['p99']:,.0f}", "or fewer"),
            ("longest", f"{found['max']:,}", found["longest"]),
            ("too long", f"{found['longer_than_row']:,}", f"documents, for a row of {config.row_tokens:,} tokens"),
        ]
        if found["longer_than_row"]:
            rows.append(("", f"{found['tokens_beyond_row']:,}", f"of their tokens {_fate(config)}"))
        return rows

    def histogram(self, row_tokens: int) -> list[Bin]:
        """Return bins that double up to `row_tokens`, and one for longer documents."""
        bins = []
        edges = bin_edges(row_tokens)
        for least, most in zip([1, *(edge + 1 for edge in edges)], [*edges, None], strict=True):
            inside = self.tokens[(self.tokens >= least) & (self.tokens <= (np.inf if most is None else most))]
            bins.append(Bin(least, most, len(inside), int(inside.sum())))
        return bins

    def pack(self, config: LoaderConfig, packing: Packing) -> Packed:
        """Pack these documents in one pass with this packing.

        A document of which cutting leaves no token in the loss counts here; a loader may drop it.
        """
        kept = self.tokens[self.in_loss > 0] if packing.drops_untrained(config.loss) else self.tokens
        align = 1 if packing.splits or packing.crops else config.document_align
        return simulate(packing, kept.tolist(), config.seq_len, align=align)

    def imbalance(self, config: LoaderConfig) -> dict[int, Imbalance]:
        """Return the imbalance of work, by number of ranks, of the rows that these documents are packed into.

        The rows of a pass over the first MEASURED documents are drawn, with repetition, for two windows of all ranks.
        The cost is that of `balance`, or a Llama-3-8B's. Empty where documents are split.
        """
        if config.packing.splits:
            return {}
        kept = self.tokens[self.in_loss > 0] if config.drops_untrained else self.tokens
        cut = min([config.row_tokens, *(limit for _, limit in config.limits)])
        lengths = np.minimum(kept[:MEASURED], cut).tolist()
        cost, align = config.balance or LLAMA_3_8B, config.document_align
        costs = row_costs(config.packing, lengths, config.seq_len, cost, align=align)
        shape = {"batch_size": config.batch_size, "window": config.balance_window or BALANCE_WINDOW}
        found = {ranks: drawn(costs, ranks=ranks, windows=2, **shape) for ranks in RANKS}
        return {ranks: one for ranks, one in found.items() if one is not None}


def _fate(config: LoaderConfig) -> str:
    if config.packing.cuts_to_row:
        return "are cut"
    return "go into the next row" if config.packing.splits else "may be cropped"


def bin_edges(row_tokens: int) -> list[int]:
    """Return the upper edge of each bin: a row, and halves of it down to about SHORTEST_BIN.

    >>> bin_edges(129)
    [16, 32, 64, 129]
    """
    edges = [row_tokens]
    half = (row_tokens - 1) // 2
    while half >= SHORTEST_BIN:
        edges.append(half)
        half //= 2
    return edges[::-1]


def measure(source: Source, indices: Iterable[int], render: Callable[[Conversation], Document]) -> Lengths:
    """Return the lengths of the conversations that can be rendered; the loader has reported the others already."""
    found = []
    for index in indices:
        try:
            document = render(check(source[index]))
        except MemoryError:
            raise
        except Exception:
            continue
        found.append((index, len(document.ids), int(np.count_nonzero(document.mask))))
    conversations, tokens, in_loss = np.array(found, np.int64).reshape(-1, 3).T
    return Lengths(conversations, tokens, in_loss)
