"""Show progress and warnings on stderr; the bar appears only if stderr is a terminal.

fraction done, label   ->   progress()             ->   a bar that disappears when its block ends
nanopack's log         ->   warnings_on_stderr()   ->   one line each, above the bar
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from nanopack.cli.text import printable

SECONDS_BETWEEN = 0.05
STDERR = Console(stderr=True, highlight=False, markup=False, emoji=False)

Show = Callable[[float, str], None]
"""Takes the fraction done, 0 to 1, and a label such as "12 batches"."""


@contextlib.contextmanager
def progress(title: str, *, eta: bool = False) -> Iterator[Show]:
    """Show a bar while the block runs, with `eta` the time that is left; yield the function that updates it."""
    title_column, label_column = (
        TextColumn(f"{{task.{name}}}", markup=False) for name in ("description", "fields[label]")
    )
    bar = Progress(
        title_column,
        BarColumn(),
        TaskProgressColumn(),
        label_column,
        *([TimeRemainingColumn()] if eta else []),
        console=STDERR,
        # drawn by hand: a thread that draws would be forked into the loader's processes
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not sys.stderr.isatty(),
    )
    drawn_at = 0.0
    # at its end a disabled one of rich 14.1 and before writes an empty line
    with contextlib.nullcontext() if bar.disable else bar:
        task = bar.add_task(title, total=1.0, label="")
        bar.refresh()

        def show(fraction: float, label: str) -> None:
            nonlocal drawn_at
            if time.monotonic() - drawn_at > SECONDS_BETWEEN:
                bar.update(task, completed=min(fraction, 1.0), label=label, refresh=True)
                drawn_at = time.monotonic()

        yield show


@contextlib.contextmanager
def warnings_on_stderr(*, verbose: bool = False) -> Iterator[None]:
    """Print nanopack's warnings as lines on stderr; `verbose`: and each conversation that is skipped."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            STDERR.print(f"nanopack: {printable(record.getMessage())}", soft_wrap=True)

    log, handler = logging.getLogger("nanopack"), Handler()
    log.addHandler(handler)
    level = log.level
    # set before there are processes, which inherit it
    log.setLevel(logging.DEBUG if verbose else level)
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeHandler(handler)
