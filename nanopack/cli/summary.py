"""Add up what a loader delivered and describe it, its documents and its batches in a few lines.

batches, one after the other   ->   Totals.add()
loader.ledger()                ->   Totals.rows(), Totals.report()         ->   commands.py prints them
Lengths, Batch                 ->   describe_lengths(), describe_batch()   ->   text
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from nanopack.batch import Batch
from nanopack.cli.lengths import Lengths
from nanopack.cli.options import LISTED_PIECES
from nanopack.cli.text import columns, draw_histogram, draw_rows, list_pieces, printable, screen
from nanopack.config import BALANCE_WINDOW, LoaderConfig
from nanopack.explain import text_of
from nanopack.loader import Loader
from nanopack.packing.imbalance import Imbalance
from nanopack.tokenizers.tokenizer import AnyTokenizer

REASONS = {
    "untrained": "no token in the loss",
    "max_document_tokens": "beyond max_document_tokens",
    "seq_len": "documents longer than a row",
    "crop": "to fill a row exactly",
}
WORTH = 0.05
"""Saving by `balance`, as a fraction of a step's mean work, from which it is worth turning on."""
SHOWN_TOKENS = 100
"""The text of more tokens fits on no line."""

Rows = list[tuple[str, str, str]]
"""(name, number, note) a line."""


@dataclass
class Totals:
    """Sums over the batches delivered so far."""

    config: LoaderConfig
    batches: int = 0
    seconds: float = 0.0  # waited for batches
    tokens: int = 0  # in `inputs`, without padding
    last_tokens: int = 0  # those of the latest batch
    loss_tokens: int = 0
    alone_rows: int = 0  # rows that packing="pad" would need for the same documents
    alone_tokens: int = 0  # and the tokens in them
    ended: bool = False  # whether the latest batch is the last

    def add(self, batch: Batch, seconds: float) -> None:
        """Count a batch, for which the caller waited `seconds`."""
        columns = self.config.seq_len
        pieces = [piece for row in batch.word_pieces for piece in row]
        self.batches += 1
        self.seconds += seconds
        self.tokens += batch.num_tokens
        self.last_tokens = batch.num_tokens
        self.ended = batch.last
        self.loss_tokens += batch.num_loss_tokens
        self.alone_rows += len(pieces)
        self.alone_tokens += sum(min(piece.length, columns) for piece in pieces)

    def report(self, ledger: Mapping[str, Any]) -> dict[str, Any]:
        """Return the totals as plain data (JSON-able): fractions are 0 to 1, or None if undefined."""
        config = self.config
        batch_positions = config.batch_size * config.seq_len
        full = self.tokens - self.last_tokens if self.ended else None
        return {
            "packing": config.packing.name,
            "batch_size": config.batch_size,
            "seq_len": config.seq_len,
            "batches": self.batches,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_s": _fraction(self.tokens, self.seconds),
            "padding": _padding(self.tokens, self.batches * batch_positions),
            "padding_without_last_batch": _padding(full, (self.batches - 1) * batch_positions),
            "padding_one_a_row": self._padding_one_a_row(),
            "in_loss": _fraction(self.loss_tokens, self.tokens),
            "ledger": ledger,
        }

    def _padding_one_a_row(self) -> float | None:
        # a piece shows how long its document is only if no document is cut in the middle
        whole = self.alone_tokens if self.config.packing.cuts_to_row else None
        return _padding(whole, self.alone_rows * self.config.seq_len)

    def rows(self, ledger: Mapping[str, Any], *, speed: bool = True) -> Rows:
        """Return the lines of the report on the run."""
        report = self.report(ledger)
        batches = f"of {self.config.batch_size:,} rows x {self.config.seq_len:,} tokens"
        return [
            *_conversation_rows(ledger["conversations"]),
            *_token_rows(ledger["tokens"]),
            ("batches", f"{self.batches:,}", batches),
            *([("tokens/s", f"{report['tokens_per_s'] or 0:,.0f}", "")] if speed else []),
            *_padding_rows(report),
            ("in the loss", percent(report["in_loss"]), "of the tokens"),
            *_ledger_rows(ledger),
        ]


def describe_lengths(lengths: Lengths, loader: Loader) -> str:
    """Return a table of how long the documents are, and a histogram if there are any."""
    described = table(lengths.rows(loader.config, _file_and_line(loader)))
    bins = lengths.histogram(loader.config.row_tokens)
    return f"{described}\n\n{draw_histogram(bins, **screen())}" if len(lengths.tokens) else described


def describe_imbalance(found: Mapping[int, Imbalance], config: LoaderConfig) -> str:
    """Return a table of how far the slowest rank is above the mean, before and after `balance`."""
    whose = "a Llama-3-8B's" if config.balance is None else "that of balance"
    window = config.balance_window or BALANCE_WINDOW
    rows = [
        (
            f"of {ranks} ranks",
            f"{one.as_packed:.2f}x",
            f"the mean work; {one.balanced:.2f}x with balance, {one.across_ranks:.2f}x if dealt across ranks",
        )
        for ranks, one in found.items()
    ]
    most = max((one.as_packed - one.balanced for one in found.values()), default=0.0)
    verdict = "worth turning on" if most >= WORTH else "not worth turning on"
    return f"Slowest rank a step, by the cost of documents ({whose}), windows of {window}: {verdict}\n\n{table(rows)}"


def describe_batch(batch: Batch, loader: Loader, rows: int, row: int | None) -> str:
    """Return the first `rows` rows of a batch, drawn, and the pieces of `row`; None: the first pieces of row 0."""
    listed = row or 0
    drawn = list(range(min(rows, loader.config.batch_size)))
    if listed not in drawn:
        drawn.append(listed)
    pieces = list_pieces(
        batch,
        listed,
        where=_file_and_line(loader),
        text=_first_words(loader.tokenizer),
        ignore_index=loader.config.ignore_index,
        limit=LISTED_PIECES if row is None else None,
        **screen(),
    )
    title = f"Batch {batch.step}, {len(drawn)} of {loader.config.batch_size} rows:"
    return f"{title}\n\n{draw(batch, drawn, loader)}\n\nRow {listed}:\n\n{pieces}"


def draw(batch: Batch, rows: Sequence[int], loader: Loader) -> str:
    """Return these rows of a batch, drawn for stdout."""
    return draw_rows(batch, rows, ignore_index=loader.config.ignore_index, **screen())


def table(rows: Rows) -> str:
    """Return the rows as a table for stdout."""
    lines = [
        (Text.assemble((name, "bold")), number, Text.assemble((printable(note), "dim"))) for name, number, note in rows
    ]
    return columns(lines, "<><", colour=screen()["colour"])


def _file_and_line(loader: Loader) -> Callable[[int], str]:
    """Return the function that locates a conversation, without its folders: the words need the room."""
    return lambda conversation: loader.source.where(conversation).rpartition(os.sep)[2]


def _first_words(tokenizer: AnyTokenizer) -> Callable[[Sequence[int]], str]:
    """Return a function that decodes ids, with a bar for the special tokens between two texts."""
    special = {tokenizer.special_id(token) for token in tokenizer.special_tokens}

    def text(ids: Sequence[int]) -> str:
        runs = itertools.groupby(ids[:SHOWN_TOKENS], key=lambda token: token in special)
        return " | ".join(text_of(list(run), tokenizer) for is_special, run in runs if not is_special)

    return text


def _fraction(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _padding(tokens: int | None, positions: int) -> float | None:
    return 1 - tokens / positions if positions and tokens is not None else None


def count_batches(number: int) -> str:
    """Return a number of batches as text.

    >>> count_batches(1), count_batches(1200)
    ('1 batch', '1,200 batches')
    """
    return f"{number:,} batch{'' if number == 1 else 'es'}"


def percent(fraction: float | None) -> str:
    """Return a fraction in percent.

    >>> percent(0.0312), percent(None)
    ('3.1%', '-')
    """
    return "-" if fraction is None else f"{100 * fraction:.1f}%"


def _reason(what: str, reason: str) -> str:
    return f"{what}: {REASONS.get(reason, reason)}"


def _conversation_rows(counts: Mapping[str, Any]) -> Rows:
    notes = [
        *((number, _reason("dropped", reason)) for reason, number in counts["dropped"].items()),
        (counts["skipped"], "skipped: invalid"),
        (counts["waiting"], "read, still waiting for a row"),
        (counts["copies"], "of those read repeat a history, for a later answer"),
    ]
    return [
        ("conversations", f"{counts['packed']:,}", "packed"),
        *(("", f"{number:,}", note) for number, note in notes if number),
    ]


def _token_rows(counts: Mapping[str, Any]) -> Rows:
    notes = [
        *((number, _reason("cut", reason)) for reason, number in counts["cut"].items()),
        (counts["dropped"], "dropped with their conversations"),
        (counts["waiting"], "read, still waiting for a row"),
    ]
    return [
        ("tokens", f"{counts['emitted']:,}", f"packed, of {counts['read']:,} read"),
        *(("", f"{number:,}", note) for number, note in notes if number),
    ]


def _padding_rows(report: dict[str, Any]) -> Rows:
    padding, without, alone = (report[name] for name in ("padding", "padding_without_last_batch", "padding_one_a_row"))
    rows = [("padding", percent(padding), "")]
    if without is not None and percent(without) != percent(padding):
        rows.append(("", percent(without), "without the last batch, which the data does not fill"))
    if alone is not None and report["packing"] != "pad":
        rows.append(("", percent(alone), "with one conversation a row instead"))
    return rows


def _ledger_rows(ledger: Mapping[str, Any]) -> Rows:
    if ledger["balanced"]:
        return [("ledger", "balanced", "every conversation and every token accounted for")]
    first, *others = ledger["imbalances"]
    return [("ledger", "UNBALANCED", first), *(("", "", other) for other in others)]
