"""Say on a terminal what a command found: as wide as that is, and in colours where it has them.

    lengths, a batch, a run   ->   tell_lengths(), tell_batch(), tell_run()   ->   text
                                   picture.py draws                                commands.py prints it

Nothing is printed here, and nothing is counted that was not before.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence

from nanopack import demo
from nanopack.batch import Batch
from nanopack.cli.lengths import Lengths
from nanopack.cli.options import LISTED_PIECES
from nanopack.cli.text import draw_curves, draw_histogram, draw_rows, list_pieces, table
from nanopack.explain import text_of
from nanopack.loader import Loader
from nanopack.tokenizers.tokenizer import AnyTokenizer

# More than the words of these tokens fits on no line.
SHOWN_TOKENS = 100


def tell_lengths(lengths: Lengths, loader: Loader) -> str:
    """Return how long the documents are: a table, and a histogram where there is one."""
    rows = table(lengths.rows(loader.config, _file_and_line(loader)))
    bins = lengths.histogram(loader.config.row_tokens)
    return f"{rows}\n\n{draw_histogram(bins, width=_width(), colour=_colour())}" if len(lengths.tokens) else rows


def tell_batch(batch: Batch, loader: Loader, options: Namespace) -> str:
    """Return some rows of a batch, drawn, and the pieces of the row that was asked for."""
    row = options.row or 0
    rows = list(range(min(options.rows, loader.config.batch_size)))
    if row not in rows:
        rows.append(row)
    pieces = list_pieces(
        batch,
        row,
        where=_file_and_line(loader),
        text=_first_words(loader.tokenizer),
        ignore_index=loader.config.ignore_index,
        width=_width(),
        colour=_colour(),
        limit=LISTED_PIECES if options.row is None else None,
    )
    title = f"Batch {batch.step}, {len(rows)} of {loader.config.batch_size} rows:"
    return f"{title}\n\n{draw(batch, rows, loader)}\n\nRow {row}:\n\n{pieces}"


def draw(batch: Batch, rows: Sequence[int], loader: Loader) -> str:
    """Return these rows of a batch, drawn."""
    return draw_rows(batch, rows, ignore_index=loader.config.ignore_index, width=_width(), colour=_colour())


def tell_run(run: demo.Run) -> str:
    """Return how a run of the demo went: its losses as a table and as curves."""
    means = run.trained()
    held_out = [(f"{step:,}", run.held_out[step], means.get(step)) for step in sorted(run.held_out)]
    lines = [("steps", "trained on", "held out")]
    lines += [(step, f"{mean:.3f}" if mean else "", f"{loss:.3f}") for step, loss, mean in held_out]
    curves = [("o", "training", means), ("x", "held-out conversations", run.held_out)]
    size = f"{run.parameters:,} parameters, {run.tokens:,} tokens in {run.seconds:,.0f} s"
    drawn = draw_curves(curves, width=_width())
    return f"A GPT of {size}; the loss of a trained target, in nats:\n\n{table(lines)}\n\n{drawn}"


def _file_and_line(loader: Loader) -> Callable[[int], str]:
    """Return the place of a conversation, without its folders: they take the room of the words."""
    return lambda conversation: loader.source.where(conversation).rpartition(os.sep)[2]


def _first_words(tokenizer: AnyTokenizer) -> Callable[[Sequence[int]], str]:
    """Return a function that decodes ids; special tokens between two texts become a bar."""
    special = {tokenizer.special_id(token) for token in tokenizer.special_tokens}

    def text(ids: Sequence[int]) -> str:
        runs = itertools.groupby(ids[:SHOWN_TOKENS], key=lambda token: token in special)
        return " | ".join(text_of(list(run), tokenizer) for is_special, run in runs if not is_special)

    return text


def _width() -> int:
    return shutil.get_terminal_size().columns


def _colour() -> bool:
    """Return whether stdout is a terminal that shows colours and blocks, and the user wants them: https://no-color.org."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return sys.stdout.isatty() and "utf" in (sys.stdout.encoding or "").lower()
