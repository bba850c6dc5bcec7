"""Turn the text of one option into its value; what is wrong with it is an error of argparse.

"0,17", "all", "batches.npz"   ->   row_and_column(), window(), path_of(".npz")   ->   options.py, as `type=`
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanopack.packing.cost import Cost, as_cost

SECTIONS = ("throughput", "files", "pretokenized", "resident", "stalls", "padding", "balance", "scaling", "gpu")
"""Modules of nanopack.cli.bench, each named for its question."""


def at_least(least: int) -> Any:
    """Make the type of a number from `least` upwards."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least} upwards")
        return int(text)

    return number


def row_and_column(text: str) -> tuple[int, int]:
    """Return the numbers of ROW,COL."""
    row, comma, column = text.partition(",")
    if not (comma and row.isdecimal() and column.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not ROW,COL, such as 0,17")
    return int(row), int(column)


def cost_pair(text: str) -> Cost:
    """Return the cost that A,B stands for."""
    try:
        return as_cost(tuple(map(float, text.split(","))))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not A,B, two numbers from 0, such as 57000,1") from None


def sections(text: str) -> list[str]:
    """Return the sections of bench that A,B,... names, in their own order."""
    wanted = text.split(",")
    if unknown := [name for name in wanted if name not in SECTIONS]:
        raise argparse.ArgumentTypeError(f"there is no section {unknown[0]!r}; use any of {','.join(SECTIONS)}")
    return [name for name in SECTIONS if name in wanted]


def path_of(*suffixes: str) -> Callable[[str], Path]:
    """Make the type of a file to write, with one of these suffixes, in a folder that exists."""

    def path(text: str) -> Path:
        found = Path(text)
        if found.suffix not in suffixes:
            raise argparse.ArgumentTypeError(f"{text!r} does not end in {' or '.join(suffixes)}")
        if not found.parent.is_dir():
            raise argparse.ArgumentTypeError(f"{text!r} cannot be written: there is no folder {str(found.parent)!r}")
        if found.is_dir():
            raise argparse.ArgumentTypeError(f"{text!r} cannot be written: it is a folder")
        return found

    return path


def window(text: str) -> int | str:
    """Return a window: a number of documents, or "all", which BestFit takes where lengths are known."""
    try:
        return text if text == "all" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of documents, or all") from None
