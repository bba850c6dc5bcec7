"""Run the sections in turn, and tell each as soon as it is measured.

which data, which sections, how long   ->   run()   ->   the whole report, as plain data
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from nanopack.cli.bench import gpu, report
from nanopack.cli.bench import padding as quality
from nanopack.cli.bench import pretokenized as ready_tokens
from nanopack.cli.bench import scaling as growth
from nanopack.cli.bench import stalls as waiting
from nanopack.cli.bench import throughput as end_to_end
from nanopack.cli.bench.corpus import Data
from nanopack.cli.bench.rounds import Pace, Table
from nanopack.cli.progress import Bar

SECTIONS: dict[str, ModuleType] = {
    "a": end_to_end,
    "b": ready_tokens,
    "c": waiting,
    "d": quality,
    "e": growth,
    "f": gpu,
}
ROUNDS, SECONDS = 5, 1.0
QUICK_ROUNDS, QUICK_SECONDS = 2, 0.1
NO_PLOT = "matplotlib is not installed; pip install nanopack[plot]"


def question(section: ModuleType) -> str:
    """Return what a section answers: the first line of its docstring."""
    return (section.__doc__ or "").splitlines()[0]


def run(
    data: Data, only: Sequence[str], *, quick: bool, plot: Path | None, tell: Callable[[str], object]
) -> dict[str, Any]:
    """Measure these sections and tell them; return the report as plain data (JSON-able)."""
    facts, summary = report.machine(), data.summary()
    head = report.tell_head(facts, summary)
    tell(f"{head}\n\nquick: too short to be quoted" if quick else head)
    tables: dict[str, list[Table]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number, letter in enumerate(only):
            with Bar(f"section {letter}") as bar:
                share = number / len(only)
                pace = Pace(
                    QUICK_ROUNDS if quick else ROUNDS,
                    QUICK_SECONDS if quick else SECONDS,
                    quick,
                    lambda words, share=share, bar=bar: bar.show(share, words),  # type: ignore[misc]
                )
                tables[letter] = SECTIONS[letter].measure(data, pace)
            tell(f"\n{letter}. {question(SECTIONS[letter])}")
            for table in tables[letter]:
                tell(f"\n{report.tell(table)}")
    finally:
        torch.set_num_threads(threads)
    drawn = _draw(plot, head, [table for each in tables.values() for table in each], tell)
    sections = {
        letter: {"question": question(SECTIONS[letter]), "tables": [report.as_json(table) for table in each]}
        for letter, each in tables.items()
    }
    return {"machine": facts, "data": summary, "quick": quick, "plot": drawn, "sections": sections}


def _draw(plot: Path | None, head: str, tables: Sequence[Table], tell: Callable[[str], object]) -> str | None:
    if plot is None:
        return None
    if importlib.util.find_spec("matplotlib") is None:
        tell(f"\nno plot: {NO_PLOT}")
        return None
    report.draw(plot, head, tables)
    tell(f"\nplot: {plot}")
    return str(plot)
