"""Show on stderr how far a run has come, where stderr is a terminal; say nothing elsewhere.

share done, a few words   ->   Bar.show()   ->   one line that overwrites itself
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

WIDTH = 40
SECONDS_BETWEEN = 0.05
CLEAR_LINE = "\r\x1b[K"


class Bar:
    """A progress bar: stays, full, when its block is left in peace, and goes when it is left by an error."""

    def __init__(self, title: str) -> None:
        self._title = f"{title:<9}"
        self._on = sys.stderr.isatty()
        self._share, self._words, self._drawn_at = 0.0, "", 0.0

    def __enter__(self) -> Bar:
        self._draw()
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if self._on and error:
            print(end=CLEAR_LINE, file=sys.stderr, flush=True)
        elif self._on:
            self._share = 1.0
            self._draw()
            print(file=sys.stderr)

    def show(self, share: float, words: str) -> None:
        """Draw the bar with `share` of 1 done, unless it was drawn a moment ago."""
        self._share, self._words = min(share, 1.0), words
        if time.monotonic() - self._drawn_at > SECONDS_BETWEEN:
            self._draw()

    def _draw(self) -> None:
        if not self._on:
            return
        self._drawn_at = time.monotonic()
        columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
        room = max(0, min(WIDTH, columns - len(self._title) - len(self._words) - len("   100%  ")))
        done = round(self._share * room)
        line = f"{self._title}  {'#' * done}{'.' * (room - done)} {self._share:4.0%}  {self._words}"
        print(CLEAR_LINE + line[: columns - 1], end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def warnings_on_stderr() -> Iterator[None]:
    """Print nanopack's warnings, such as of conversations skipped, as lines on stderr, over a bar that stands there."""

    class Handler(logging.StreamHandler[Any]):
        def format(self, record: logging.LogRecord) -> str:
            return f"{CLEAR_LINE if sys.stderr.isatty() else ''}nanopack: {record.getMessage()}"

    log, handler = logging.getLogger("nanopack"), Handler(sys.stderr)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
