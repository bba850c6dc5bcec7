"""Draw batches and numbers as text, for a terminal or a pipe.

    Batch    ->   draw_rows()        ->   one line a row: where each conversation is, what is in the loss, padding
                  list_pieces()      ->   the pieces of one row: file and line, tokens, the first words
    Bins     ->   draw_histogram()   ->   documents by length
    losses   ->   draw_losses()      ->   a table whose last column is the curve, turned by 90 degrees
    rows     ->   columns()          ->   aligned columns, by rich

Functions take the width and whether to use colours, and return strings; screen() finds out both for stdout. Without
colours a letter stands for a conversation, and everything is ASCII except the words of the conversations.
"""

from __future__ import annotations

import io
import itertools
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from string import ascii_lowercase
from typing import Any, NamedTuple

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from nanopack.batch import Batch
from nanopack.cli.lengths import Bin

PADDING = -1
# From the 256-colour palette, each far from its predecessor: blue, orange, violet, green, pink, teal, red, yellow.
COLOURS = (33, 208, 99, 35, 205, 44, 160, 178)
IN_LOSS, NOT_IN_LOSS = "█", "▒"
NO_MARK = "Pieces without a mark are too short to show in the row."
RULER_STEP = 10
CURVE_WIDTH = 48
LEAST_TEXT = 16
"""Columns that a conversation's words get even if the terminal is too narrow for them."""
ENDLESS = 10_000
"""Width at which nothing is wrapped."""


def screen() -> dict[str, Any]:
    """Return the `width` of stdout and whether it shows `colour`: https://no-color.org."""
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    colour = wanted and sys.stdout.isatty() and "utf" in (sys.stdout.encoding or "").lower()
    return {"width": shutil.get_terminal_size().columns, "colour": colour}


def render(drawing: RenderableType, *, colour: bool = False) -> str:
    """Return a drawing as rich prints it, without wrapping or trailing spaces; ANSI codes only with `colour`."""
    system: Any = "256" if colour else None
    console = Console(
        file=io.StringIO(), width=ENDLESS, force_terminal=colour, color_system=system, highlight=False, markup=False,
        emoji=False, legacy_windows=False, no_color=False,
    )  # fmt: skip
    with console.capture() as captured:
        console.print(drawing)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def columns(
    lines: Sequence[Sequence[str | Text]], align: str, *, width: int | None = None, colour: bool = False
) -> str:
    """Return cells aligned in columns, "<" left and ">" right; only the last one is clipped, to fit into `width`.

    >>> print(columns([("batches", "12", "of 4 rows"), ("padding", "0.4%", "")], "<><"))
    batches    12  of 4 rows
    padding  0.4%
    """
    cells = [[Text(printable(cell)) if isinstance(cell, str) else cell for cell in line] for line in lines]
    if width is not None:
        used = [max(cell.cell_len for cell in column) + 2 for column in zip(*cells, strict=True)][:-1]
        for line in cells:
            line[-1] = Text(clip(line[-1].plain, max(LEAST_TEXT, width - sum(used))))
    table = Table.grid(padding=(0, 2), pad_edge=False)
    for side in align:
        table.add_column(justify="right" if side == ">" else "left", no_wrap=True)
    for line in cells:
        table.add_row(*line)
    return render(table, colour=colour)


def printable(text: str) -> str:
    """Return the text with "?" for control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text)


def clip(text: str, room: int) -> str:
    """Return the text cut to `room` columns of a terminal.

    >>> clip("the words", 7), clip("日本語", 5)
    ('the ...', '日...')
    """
    return text if cell_len(text) <= room else set_cell_size(text, max(0, room - 3)) + "..."


class Cell(NamedTuple):
    """What most of the tokens under one character are."""

    piece: int  # its number in the row, or PADDING
    in_loss: bool


def tokens_a_cell(batch: Batch, width: int) -> int:
    """Return how many tokens one character stands for, so that a row fits into `width` characters."""
    return -(-batch.inputs.shape[1] // max(1, width))


def loss_columns(batch: Batch, row: int, ignore_index: int) -> np.ndarray:
    """Return which targets of the row are in the loss, (T,) bool."""
    in_loss: np.ndarray = (batch.targets[row] != ignore_index).cpu().numpy()
    return in_loss


def row_cells(batch: Batch, row: int, *, ignore_index: int, width: int) -> list[Cell]:
    """Return the characters of a row, from left to right, at most `width`."""
    in_loss = loss_columns(batch, row, ignore_index)
    owners = np.full(len(in_loss), PADDING)
    for number, piece in enumerate(batch.pieces[row]):
        owners[piece.start : piece.start + piece.length] = number
    step = tokens_a_cell(batch, width)
    cells = []
    for start in range(0, len(owners), step):
        inside = owners[start : start + step]
        owner = int(np.bincount(inside - PADDING).argmax()) + PADDING
        of_owner = in_loss[start : start + step][inside == owner]
        cells.append(Cell(owner, bool(2 * np.count_nonzero(of_owner) > len(of_owner))))
    return cells


def piece_marks(cells: Sequence[Cell]) -> dict[int, int]:
    """Return a number, from 0, for every piece that shows in a row: neighbours in the picture differ by one.

    >>> piece_marks([Cell(0, True), Cell(0, False), Cell(7, True), Cell(PADDING, False)])
    {0: 0, 7: 1}
    """
    shown = dict.fromkeys(cell.piece for cell in cells if cell.piece != PADDING)
    return {piece: number for number, piece in enumerate(shown)}


def draw_rows(batch: Batch, rows: Sequence[int], *, ignore_index: int, width: int, colour: bool) -> str:
    """Return the rows drawn under a ruler of columns, at most `width` characters wide."""
    digits = len(str(max(rows)))
    gutter = len("row ") + digits + 2
    step = tokens_a_cell(batch, width - gutter)
    n_columns = batch.inputs.shape[1]
    lines = [Text(f"{'col':<{gutter}}{_ruler(-(-n_columns // step), step)}")]
    for row in rows:
        cells = row_cells(batch, row, ignore_index=ignore_index, width=width - gutter)
        lines.append(Text(f"row {row:>{digits}}  ") + _draw(cells, row, colour))
    unit = "one character is one token" if step == 1 else f"one character is {step} tokens"
    lines.append(Text(f"{'':<{gutter}}{_key(colour)}; {unit}"))
    return render(Text("\n").join(lines), colour=colour)


def _ruler(cells: int, step: int) -> str:
    """Return the number of the column above every tenth cell, as far as it fits.

    >>> _ruler(25, 4)
    '0         40        80'
    """
    ruler = ""
    for cell in range(0, cells, RULER_STEP):
        mark = str(cell * step)
        if cell + len(mark) <= cells:
            ruler = ruler.ljust(cell) + mark
    return ruler


def _key(colour: bool) -> str:
    if colour:
        return f"a colour is a conversation: {IN_LOSS} in the loss, {NOT_IN_LOSS} not, blank padding"
    return "a letter is a conversation: capital in the loss, small not, . padding"


def _draw(cells: Sequence[Cell], row: int, colour: bool) -> Text:
    marks = piece_marks(cells)
    if not colour:
        return Text("".join(_letter(marks.get(cell.piece), cell.in_loss) for cell in cells))
    text = Text()
    for piece, same in itertools.groupby(cells, key=lambda cell: cell.piece):
        blocks = "".join(IN_LOSS if cell.in_loss else NOT_IN_LOSS for cell in same)
        text += Text(" " * len(blocks)) if piece == PADDING else _paint(blocks, row, marks[piece])
    return text


def _letter(mark: int | None, in_loss: bool) -> str:
    if mark is None:
        return "."
    letter = ascii_lowercase[mark % len(ascii_lowercase)]
    return letter.upper() if in_loss else letter


def _paint(text: str, row: int, mark: int) -> Text:
    # rows begin with different colours, so that a piece differs from the one above it as well
    return Text(text, f"color({COLOURS[(mark + 3 * row) % len(COLOURS)]})")


def list_pieces(
    batch: Batch,
    row: int,
    *,
    where: Callable[[int], str],
    text: Callable[[Sequence[int]], str],
    ignore_index: int,
    width: int,
    colour: bool,
    limit: int | None = None,
) -> str:
    """Return one line for each piece of a row, at most `limit`: its mark, `where(conversation)`, tokens, `text(ids)`.

    A piece that is too short to show in the row has no mark. `width` is that of the terminal.
    """
    pieces = batch.pieces[row]
    gutter = len("row ") + len(str(row)) + 2
    marks = piece_marks(row_cells(batch, row, ignore_index=ignore_index, width=width - gutter))
    in_loss = loss_columns(batch, row, ignore_index)
    ids = batch.inputs[row].tolist()
    lines: list[Sequence[str | Text]] = [("", "conversation", "column", "tokens", "in loss", "begins")]
    for number, piece in enumerate(pieces[:limit]):
        stop = piece.start + piece.length
        lines.append(
            (
                _mark(marks.get(number), row, colour),
                where(piece.conversation),
                f"{piece.start:,}",
                f"{piece.length:,}",
                f"{np.count_nonzero(in_loss[piece.start : stop]):,}",
                " ".join([*(["..."] if piece.offset else []), *text(ids[piece.start : stop]).split()]),
            )
        )
    used = sum(piece.length for piece in pieces)
    hidden = any(number not in marks for number in range(len(pieces[:limit])))
    if limit is not None and len(pieces) > limit:
        lines.append(("", f"and {len(pieces) - limit} more", "", "", "", ""))
    if used < len(ids):
        lines.append(("" if colour else ".", "padding", f"{used:,}", f"{len(ids) - used:,}", "", ""))
    listed = columns(lines, "<<>>><", width=width, colour=colour)
    return f"{listed}\n{NO_MARK}" if hidden else listed


def _mark(mark: int | None, row: int, colour: bool) -> str | Text:
    if mark is None:
        return ""
    return _paint(IN_LOSS * 2, row, mark) if colour else _letter(mark, False)


def draw_histogram(bins: Sequence[Bin], *, width: int, colour: bool) -> str:
    """Return one line a bin: its documents, as a number and a bar, and their fraction of all tokens."""
    most_documents = max(1, *(found.documents for found in bins))
    tokens = max(1, sum(found.tokens for found in bins))
    names = [f"{found.least:,} - {found.most:,}" if found.most else f"{found.least:,} or more" for found in bins]
    room = max(1, width - max(map(len, names)) - 36)
    lines = [("length", "documents", " " * room, "of all tokens")]
    for name, found in zip(names, bins, strict=True):
        bar = ("█" if colour else "#") * -(-found.documents * room // most_documents)
        lines.append((name, f"{found.documents:,}", bar, f"{found.tokens / tokens:.1%}"))
    return columns(lines, ">><>", colour=colour)


def draw_losses(means: Mapping[int, float], held_out: Mapping[int, float], *, colour: bool) -> str:
    """Return a line an evaluation: steps, mean training loss until it, held-out loss, and both as a curve.

    >>> print(draw_losses({5: 2.0}, {0: 3.0, 5: 2.5}, colour=False))
    steps  training o  held out x  2.00                                        3.00
        0                   3.000                                                 x
        5       2.000       2.500  o                       x
    """
    losses = [*means.values(), *held_out.values()]
    least, most = min(losses), max(losses)
    lines = [("steps", "training o", "held out x", f"{least:.2f}{most:{CURVE_WIDTH - 4}.2f}")]
    for step in sorted(held_out):
        curve = [" "] * CURVE_WIDTH
        for mark, loss in (("o", means.get(step)), ("x", held_out[step])):
            if loss is not None:
                curve[round((loss - least) / (most - least or 1) * (CURVE_WIDTH - 1))] = mark
        mean = f"{means[step]:.3f}" if step in means else ""
        lines.append((f"{step:,}", mean, f"{held_out[step]:.3f}", "".join(curve)))
    return columns(lines, ">>><", colour=colour)
