"""Add up what a run of the loader delivered, and tell it in a few lines.

Batches, one after the other   ->   Totals.add()
loader.ledger()                ->   Totals.rows(), Totals.report()   ->   commands.py prints them
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nanopack.batch import Batch
from nanopack.config import LoaderConfig

REASONS = {
    "untrained": "nothing in them is trained",
    "max_document_tokens": "beyond max_document_tokens",
    "seq_len": "documents longer than a row",
    "crop": "to fill a row exactly",
}


@dataclass
class Totals:
    """What the batches so far hold together."""

    config: LoaderConfig
    batches: int = 0
    seconds: float = 0.0
    """Waited for batches."""
    tokens: int = 0
    """In `inputs`, padding not counted."""
    last_tokens: int = 0
    """Those of the batch added last."""
    trained: int = 0
    alone_rows: int = 0
    """Rows that packing="pad" would need for the same documents, and the tokens in them."""
    alone_tokens: int = 0
    ended: bool = False
    """Whether the batch added last is the last there is."""

    def add(self, batch: Batch, seconds: float) -> None:
        """Count a batch, and how long it took to come."""
        columns = self.config.seq_len
        pieces = [piece for row in batch.word_pieces for piece in row]
        self.batches += 1
        self.seconds += seconds
        self.tokens += batch.num_tokens
        self.last_tokens = batch.num_tokens
        self.ended = batch.last
        self.trained += batch.num_loss_tokens
        self.alone_rows += len(pieces)
        self.alone_tokens += sum(min(piece.length, columns) for piece in pieces)

    def report(self, ledger: dict[str, Any]) -> dict[str, Any]:
        """Return the totals as plain data (JSON-able); shares are of 1, None where there is nothing to share."""
        config = self.config
        batch_slots = config.batch_size * config.seq_len
        full = self.tokens - self.last_tokens if self.ended else None
        return {
            "packing": config.packing,
            "batch_size": config.batch_size,
            "seq_len": config.seq_len,
            "batches": self.batches,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": _share(self.tokens, self.seconds),
            "padding": _padding(self.tokens, self.batches * batch_slots),
            "padding_without_last_batch": _padding(full, (self.batches - 1) * batch_slots),
            "padding_one_a_row": self._padding_one_a_row(),
            "trained": _share(self.trained, self.tokens),
            "ledger": ledger,
        }

    def _padding_one_a_row(self) -> float | None:
        # Only where no document is cut in the middle does a piece tell how long its document is.
        whole = self.alone_tokens if self.config.cuts_to_row else None
        return _padding(whole, self.alone_rows * self.config.seq_len)

    def rows(self, ledger: dict[str, Any], *, speed: bool = True) -> list[tuple[str, str, str]]:
        """Return (name, number, note) of everything that a reader wants to know of the run."""
        report = self.report(ledger)
        batches = f"of {self.config.batch_size:,} rows x {self.config.seq_len:,} tokens"
        return [
            *_conversation_rows(ledger["conversations"]),
            *_token_rows(ledger["tokens"]),
            ("batches", f"{self.batches:,}", batches),
            *([("tokens/s", f"{report['tokens_per_second'] or 0:,.0f}", "")] if speed else []),
            *_padding_rows(report),
            ("trained", percent(report["trained"]), "of the tokens"),
            *_ledger_rows(ledger),
        ]


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _padding(tokens: int | None, slots: int) -> float | None:
    return 1 - tokens / slots if slots and tokens is not None else None


def count_batches(number: int) -> str:
    """Return the number of batches in words.

    >>> count_batches(1), count_batches(1200)
    ('1 batch', '1,200 batches')
    """
    return f"{number:,} batch{'' if number == 1 else 'es'}"


def percent(share: float | None) -> str:
    """Return a share of 1 in percent.

    >>> percent(0.0312), percent(None)
    ('3.1%', '-')
    """
    return "-" if share is None else f"{100 * share:.1f}%"


def _reason(what: str, reason: str) -> str:
    return f"{what}: {REASONS.get(reason, reason)}"


def _conversation_rows(counts: dict[str, Any]) -> list[tuple[str, str, str]]:
    notes = [
        *((number, _reason("dropped", reason)) for reason, number in counts["dropped"].items()),
        (counts["skipped"], "skipped: not valid"),
        (counts["waiting"], "read, still waiting for a row"),
    ]
    return [
        ("conversations", f"{counts['packed']:,}", "packed"),
        *(("", f"{number:,}", note) for number, note in notes if number),
    ]


def _token_rows(counts: dict[str, Any]) -> list[tuple[str, str, str]]:
    notes = [
        *((number, _reason("cut", reason)) for reason, number in counts["cut"].items()),
        (counts["dropped"], "dropped with their conversations"),
        (counts["waiting"], "read, still waiting for a row"),
    ]
    return [
        ("tokens", f"{counts['emitted']:,}", f"packed, of {counts['read']:,} read"),
        *(("", f"{number:,}", note) for number, note in notes if number),
    ]


def _padding_rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    padding, without, alone = (report[name] for name in ("padding", "padding_without_last_batch", "padding_one_a_row"))
    rows = [("padding", percent(padding), "")]
    if without is not None and percent(without) != percent(padding):
        rows.append(("", percent(without), "without the last batch, which the data do not fill"))
    if alone is not None and report["packing"] != "pad":
        rows.append(("", percent(alone), "it would be with one conversation a row"))
    return rows


def _ledger_rows(ledger: dict[str, Any]) -> list[tuple[str, str, str]]:
    if ledger["balanced"]:
        return [("ledger", "balanced", "every conversation and every token is accounted for")]
    first, *others = ledger["imbalances"]
    return [("ledger", "UNBALANCED", first), *(("", "", other) for other in others)]
