"""Draw batches and numbers as text, for a terminal or a pipe.

    Batch   ->   draw_rows()     ->   one line a row: which conversation stands where, what is trained, what is padding
                 list_pieces()   ->   the pieces of one row: file and line, tokens, the first words
    rows    ->   table()         ->   columns under each other; terminal.py, commands.py
    curves  ->   draw_curves()   ->   how some numbers go up and down

Strings only: nothing here looks at the terminal, so the caller says how wide it is and whether it shows colours.
Without colours a letter stands for a conversation, and everything is ASCII but the words of the conversations.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from string import ascii_lowercase
from typing import NamedTuple

import numpy as np

from nanopack.batch import Batch
from nanopack.cli.lengths import Bin

PADDING = -1
# Of the 256-colour palette, each far from the one before it: blue, orange, violet, green, pink, teal, red, yellow.
COLOURS = (33, 208, 99, 35, 205, 44, 160, 178)
TRAINED, UNTRAINED = "█", "▒"
NO_MARK = "Where the mark is missing, the conversation is too short to show in the row."
RESET = "\x1b[0m"
RULER_STEP = 10
CURVE_WIDTH, CURVE_HEIGHT = 72, 12
LEAST_TEXT = 16
"""Columns that words get on a terminal too narrow for the table before them."""


class Cell(NamedTuple):
    """What most of the tokens behind one character are."""

    piece: int
    """Number of the piece in its row, or PADDING."""
    trained: bool


def tokens_a_cell(batch: Batch, width: int) -> int:
    """Return how many tokens one character stands for, so that a row fits into `width` characters."""
    return -(-batch.inputs.shape[1] // max(1, width))


def trained_columns(batch: Batch, row: int, ignore_index: int) -> np.ndarray:
    """Return, (T,) bool, where the row's targets are trained."""
    trained: np.ndarray = (batch.targets[row] != ignore_index).cpu().numpy()
    return trained


def row_cells(batch: Batch, row: int, *, ignore_index: int, width: int) -> list[Cell]:
    """Return the characters of a row, from left to right."""
    trained = trained_columns(batch, row, ignore_index)
    owners = np.full(len(trained), PADDING)
    for number, piece in enumerate(batch.pieces[row]):
        owners[piece.start : piece.start + piece.length] = number
    step = tokens_a_cell(batch, width)
    cells = []
    for start in range(0, len(owners), step):
        inside = owners[start : start + step]
        owner = int(np.bincount(inside - PADDING).argmax()) + PADDING
        is_trained = trained[start : start + step][inside == owner]
        cells.append(Cell(owner, bool(2 * np.count_nonzero(is_trained) > len(is_trained))))
    return cells


def piece_marks(cells: Sequence[Cell]) -> dict[int, int]:
    """Return a number, from 0, for every piece that shows in a row: neighbours in the picture differ by one.

    >>> piece_marks([Cell(0, True), Cell(0, False), Cell(7, True), Cell(PADDING, False)])
    {0: 0, 7: 1}
    """
    shown = dict.fromkeys(cell.piece for cell in cells if cell.piece != PADDING)
    return {piece: number for number, piece in enumerate(shown)}


def draw_rows(batch: Batch, rows: Sequence[int], *, ignore_index: int, width: int, colour: bool) -> str:
    """Return the rows drawn one below the other, at most `width` characters wide, under a ruler of columns."""
    digits = len(str(max(rows)))
    gutter = len("row ") + digits + 2
    step = tokens_a_cell(batch, width - gutter)
    columns = batch.inputs.shape[1]
    lines = [f"{'col':<{gutter}}{_ruler(-(-columns // step), step)}"]
    for row in rows:
        cells = row_cells(batch, row, ignore_index=ignore_index, width=width - gutter)
        lines.append(f"row {row:>{digits}}  {_draw(cells, row, colour)}")
    unit = "one character is one token" if step == 1 else f"one character is {step} tokens"
    lines.append(f"{'':<{gutter}}{_key(colour)}; {unit}")
    return "\n".join(lines)


def _ruler(cells: int, step: int) -> str:
    """Return the column that stands above every tenth cell, as far as it fits.

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
        return f"a colour is a conversation: {TRAINED} trained, {UNTRAINED} not trained, blank padding"
    return "a letter is a conversation: capital trained, small not trained, . padding"


def _draw(cells: Sequence[Cell], row: int, colour: bool) -> str:
    marks = piece_marks(cells)
    if not colour:
        return "".join(_letter(marks.get(cell.piece), cell.trained) for cell in cells)
    text = ""
    for piece, run in itertools.groupby(cells, key=lambda cell: cell.piece):
        blocks = "".join(TRAINED if cell.trained else UNTRAINED for cell in run)
        text += " " * len(blocks) if piece == PADDING else _paint(blocks, row, marks[piece])
    return text.rstrip(" ")


def _letter(mark: int | None, trained: bool) -> str:
    if mark is None:
        return "."
    letter = ascii_lowercase[mark % len(ascii_lowercase)]
    return letter.upper() if trained else letter


def _paint(text: str, row: int, mark: int) -> str:
    # Rows begin with different colours: the conversation above is another one, too.
    return f"\x1b[38;5;{COLOURS[(mark + 3 * row) % len(COLOURS)]}m{text}{RESET}"


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

    A piece that no character of the row stands for has no mark. `width` is that of the terminal.
    """
    pieces = batch.pieces[row]
    gutter = len("row ") + len(str(row)) + 2
    marks = piece_marks(row_cells(batch, row, ignore_index=ignore_index, width=width - gutter))
    trained = trained_columns(batch, row, ignore_index)
    ids = batch.inputs[row].tolist()
    lines: list[Sequence[str]] = [("", "conversation", "column", "tokens", "trained", "begins")]
    for number, piece in enumerate(pieces[:limit]):
        stop = piece.start + piece.length
        lines.append(
            (
                _mark(marks.get(number), row, colour),
                where(piece.conversation),
                f"{piece.start:,}",
                f"{piece.length:,}",
                f"{np.count_nonzero(trained[piece.start : stop]):,}",
                ("... " if piece.offset else "") + text(ids[piece.start : stop]),
            )
        )
    used = sum(piece.length for piece in pieces)
    hidden = any(number not in marks for number in range(len(pieces[:limit])))
    if limit is not None and len(pieces) > limit:
        lines.append(("", f"and {len(pieces) - limit} more", "", "", "", ""))
    if used < len(ids):
        lines.append(("" if colour else ".", "padding", f"{used:,}", f"{len(ids) - used:,}", "", ""))
    listed = columns(lines, "<<>>><", width)
    return f"{listed}\n{NO_MARK}" if hidden else listed


def _mark(mark: int | None, row: int, colour: bool) -> str:
    if mark is None:
        return ""
    return _paint(TRAINED * 2, row, mark) if colour else _letter(mark, False)


def draw_histogram(bins: Sequence[Bin], *, width: int, colour: bool) -> str:
    """Return one line for each bin: how many documents, as a bar too, and their share of all tokens."""
    most_documents = max(1, max(found.documents for found in bins))
    tokens = max(1, sum(found.tokens for found in bins))
    names = [f"{found.least:,} - {found.most:,}" if found.most else f"{found.least:,} or more" for found in bins]
    gutter, room = max(map(len, names)), max(1, width - max(map(len, names)) - 36)
    lines = [f"{'length':>{gutter}}  {'documents':>9}  {'':<{room}}  of all tokens"]
    for name, found in zip(names, bins, strict=True):
        bar = ("█" if colour else "#") * -(-found.documents * room // most_documents)
        share = f"{found.tokens / tokens:.1%}"
        lines.append(f"{name:>{gutter}}  {found.documents:>9,}  {bar:<{room}}  {share:>13}")
    return "\n".join(lines)


def draw_curves(curves: Sequence[tuple[str, str, Mapping[int, float]]], *, width: int) -> str:
    """Return curves of (mark, name, y by x) over one another, the later on top, above their key.

    >>> print(draw_curves([("o", "loss", {0: 3.0, 4: 1.5, 10: 1.0})], width=18))
     3.00  o
           :
           :
           :
           :
           :
           :
           :
           :   o
           :
           :
     1.00  :        o
           0       10
           o loss
    """
    xs = [x for _, _, points in curves for x in points]
    ys = [y for _, _, points in curves for y in points.values()]
    top, bottom, right = max(ys), min(ys), max(xs) or 1
    room = max(2, min(width, CURVE_WIDTH) - 8)
    lines = [[":"] + [" "] * (room - 1) for _ in range(CURVE_HEIGHT)]
    for mark, _, points in curves:
        for x, y in points.items():
            height = (top - y) / (top - bottom or 1)
            lines[round(height * (CURVE_HEIGHT - 1))][round(x / right * (room - 1))] = mark
    names = [f"{top:5.2f}", *[""] * (CURVE_HEIGHT - 2), f"{bottom:5.2f}"]
    drawn = [f"{name:>5}  {''.join(line)}".rstrip() for name, line in zip(names, lines, strict=True)]
    key = "   ".join(f"{mark} {name}" for mark, name, _ in curves)
    return "\n".join([*drawn, f"{'':7}0{right:>{room - 1}}", f"{'':7}{key}"])


def table(rows: Sequence[tuple[str, str, str]]) -> str:
    """Return rows of (name, number, note) under each other.

    >>> print(table([("batches", "12", "of 4 rows"), ("padding", "0.4%", "")]))
    batches    12  of 4 rows
    padding  0.4%
    """
    return columns(rows, "<><")


def columns(lines: Sequence[Sequence[str]], align: str, width: int | None = None) -> str:
    """Return cells set into columns, each as wide as it needs; what is longer than `width` is clipped at the end."""
    widths = [max(map(text_width, column)) for column in zip(*lines, strict=True)]
    drawn = []
    for line in lines:
        cells = [
            " " * (size - text_width(cell)) + cell if side == ">" else cell + " " * (size - text_width(cell))
            for cell, size, side in zip(line[:-1], widths, align, strict=False)
        ]
        room = None if width is None else max(LEAST_TEXT, width - sum(widths[:-1]) - 2 * len(cells))
        drawn.append("  ".join([*cells, clip(line[-1], room)]).rstrip())
    return "\n".join(drawn)


def text_width(text: str) -> int:
    """Return how many columns a terminal needs for the text, colours not counted.

    >>> text_width("日本"), text_width("\\x1b[38;5;33m██\\x1b[0m")
    (4, 2)
    """
    plain = "".join(part.partition("m")[2] if number else part for number, part in enumerate(text.split("\x1b[")))
    return sum(_char_width(character) for character in plain)


def _char_width(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def clip(text: str, room: int | None) -> str:
    """Return the text on one line, cut with dots to `room` columns; control characters, which a terminal obeys, as '?'.

    >>> clip("one\\n two\\x1b[31m three", 14)
    'one two?[31...'
    """
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    if room is None or text_width(line) <= room:
        return line
    used = list(itertools.accumulate(map(_char_width, line)))
    return line[: sum(end <= room - 3 for end in used)] + "..."[:room]
