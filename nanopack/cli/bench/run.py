"""Run the sections in order, and show each table as soon as it is measured.

data, sections, pace   ->   run()   ->   the whole report, as plain data
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from nanopack.cli.bench import report
from nanopack.cli.bench.corpus import Data
from nanopack.cli.bench.rounds import Pace, Table
from nanopack.cli.progress import Show, progress

ROUNDS, SECONDS = 5, 1.0
QUICK_ROUNDS, QUICK_SECONDS = 2, 0.1
NO_PLOT = "matplotlib is not installed; pip install nanopack-gpu[plot]"


def run(
    data: Data, only: Sequence[str], *, quick: bool, plot: Path | None, say: Callable[[str], object]
) -> dict[str, Any]:
    """Measure these sections, passing each table's text to `say`; return the report as plain data (JSON-able)."""
    facts, summary = report.machine(), data.summary()
    head = report.head(facts, summary)
    say(f"{head}\n\nquick: too short to be quoted" if quick else head)
    sections: dict[str, dict[str, Any]] = {}
    tables: list[Table] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number, name in enumerate(only):
            section = importlib.import_module(f"nanopack.cli.bench.{name}")
            question = (section.__doc__ or "").splitlines()[0]
            say(f"\n{name}: {question}")
            found = []
            for table in _measured(section.measure, name, data, number / len(only), quick):
                say(f"\n{report.as_text(table)}")
                found.append(table)
            sections[name] = {"question": question, "tables": [report.as_json(table) for table in found]}
            tables += found
    finally:
        torch.set_num_threads(threads)
    drawn = _draw(plot, head, tables, say)
    return {"machine": facts, "data": summary, "quick": quick, "plot": drawn, "sections": sections}


def _measured(
    measure: Callable[[Data, Pace], Iterable[Table]], name: str, data: Data, fraction: float, quick: bool
) -> Iterator[Table]:
    """Yield each table when it is measured; while one is shown there is no bar."""
    shows: list[Show] = []
    rounds, seconds = (QUICK_ROUNDS, QUICK_SECONDS) if quick else (ROUNDS, SECONDS)
    pace = Pace(rounds, seconds, quick, lambda label: shows[-1](fraction, label))
    tables: Iterator[Table] | None = None
    while True:
        with progress(name) as show:
            shows.append(show)
            # a section that returns a list measures in this call
            tables = tables or iter(measure(data, pace))
            table = next(tables, None)
        if table is None:
            return
        yield table


def _draw(plot: Path | None, head: str, tables: Sequence[Table], say: Callable[[str], object]) -> str | None:
    if plot is None:
        return None
    if importlib.util.find_spec("matplotlib") is None:
        say(f"\nno plot: {NO_PLOT}")
        return None
    report.draw(plot, head, tables)
    say(f"\nplot: {plot}")
    return str(plot)
