"""Show what was measured: as text, as plain data, as a plot.

    Table, Result, Spread   ->   as_text()   ->   text
                                 as_json()   ->   plain data
                                 draw()      ->   a PNG file, with matplotlib

The name of a number ends in its unit: _x a ratio, _fraction 0 to 1, _per_s, _ms, _us, _mb, _rows and so on.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nanopack import __version__
from nanopack.cli.bench.rounds import Number, Result, Spread, Table
from nanopack.cli.text import columns

PACKAGES = ("torch", "tiktoken", "numpy")
PEERS = ("triton", "trl", "grain", "transformers")
RATIOS = ("_x", "_fraction")
# below this a logarithmic axis of fractions is linear, down to 0
LEAST_FRACTION = 1e-4


def machine() -> dict[str, Any]:
    """Return the conditions of the run as plain data: date, CPU, cores, load, GPU, versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": cores,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(terse=True),
        "nanopack": __version__,
        "python": platform.python_version(),
        **{name: version for name in (*PACKAGES, *PEERS) if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def head(facts: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """Return the head of the report."""
    names = [name for name in ("nanopack", "python", *PACKAGES, *PEERS) if name in facts]
    versions = ", ".join(f"{name} {facts[name]}" for name in names)
    left_out = f", {data['left_out']:,} left out" if data["left_out"] else ""
    load = "" if facts["load"] is None else f", load before this run {facts['load']}"
    return (
        f"{facts['date']}\n{facts['cpu']}, {facts['cores']} cores, {facts['gpu'] or 'no GPU'}{load}\n"
        f"{facts['system']}, {versions}\n"
        f"{data['name']}: {data['conversations']:,} conversations{left_out}, {data['tokens']:,} tokens "
        f"(median {data['tokens_median']:,.0f}, longest {data['tokens_max']:,})"
    )


def as_text(table: Table) -> str:
    """Return the table as text: medians, and for speeds and times the minimum and maximum of the rounds."""
    names = _names(table)
    lines = [[table.axis, *map(title, names), ""]] if names else []
    for row in table.rows:
        lines.append([row.name, *(cell(name, row.numbers.get(name)) for name in names), row.note])
    return f"{table.title}\n\n{columns(lines, '<' + '>' * len(names) + '<')}"


def _names(table: Table) -> list[str]:
    return list(dict.fromkeys(name for row in table.rows for name in row.numbers))


def title(name: str) -> str:
    """Return the head of a column."""
    for ending in RATIOS:
        name = name.removesuffix(ending)
    return name.replace("_per_s", "/s").replace("_", " ")


def cell(name: str, number: Number | None) -> str:
    """Return a number of that name as text: its median, for speeds and times with the minimum and maximum."""
    if number is None:
        return ""
    if not isinstance(number, Spread):
        return _text(name, number)
    middle = _text(name, number.median)
    if name.endswith(RATIOS):
        return middle
    return f"{middle} ({_text(name, min(number.rounds))} - {_text(name, max(number.rounds))})"


def _text(name: str, number: float) -> str:
    """Return a number formatted for its unit.

    >>> _text("tokens_per_s", 3_421_000), _text("to_sft_x", 2.345), _text("padding_fraction", 0.0123), _text("n", 4096)
    ('3.42 M', '2.35x', '1.23%', '4,096')
    """
    if name.endswith("_per_s"):
        return f"{number / 1e6:,.2f} M"
    if name.endswith("_x"):
        return f"{number:,.2f}x"
    if name.endswith("_fraction"):
        return f"{100 * number:,.2f}%"
    return f"{number:,}" if isinstance(number, int) else f"{number:,.3g}" if abs(number) < 100 else f"{number:,.0f}"


def as_json(table: Table) -> dict[str, Any]:
    """Return the table as plain data."""
    return {"title": table.title, "rows": [_row_as_json(row) for row in table.rows]}


def _row_as_json(row: Result) -> dict[str, Any]:
    numbers = {name: number.as_json() if isinstance(number, Spread) else number for name, number in row.numbers.items()}
    return {"name": row.name, "numbers": numbers, "note": row.note}


def draw(path: Path, title: str, tables: Sequence[Table]) -> None:
    """Plot the first number of every table: as bars, or as lines over the table's axis."""
    # not pyplot, which would look for a display
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [table for table in tables if any(row.numbers for row in table.rows)]
    figure = Figure(figsize=(14, 2 + 3.2 * -(-len(drawn) // 2)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=8)
    grid = figure.subplots(max(1, -(-len(drawn) // 2)), 2, squeeze=False)
    for axes, table in zip(grid.flat, drawn, strict=False):
        (_draw_lines if table.axis else _draw_bars)(axes, table)
        axes.set_title(table.title, fontsize=9)
        axes.tick_params(labelsize=7)
    for axes in grid.flat[len(drawn) :]:
        axes.axis("off")
    figure.savefig(path, dpi=120)


def _draw_bars(axes: Any, table: Table) -> None:
    first = _names(table)[0]
    rows = [row for row in table.rows if first in row.numbers][::-1]
    spreads = [_spread(row.numbers[first]) for row in rows]
    medians = [spread.median for spread in spreads]
    below = [spread.median - min(spread.rounds) for spread in spreads]
    above = [max(spread.rounds) - spread.median for spread in spreads]
    contest = any(row.name.startswith("nanopack") for row in rows)
    ours = ["tab:gray" if contest and not row.name.startswith("nanopack") else "tab:blue" for row in rows]
    axes.barh([row.name for row in rows], medians, xerr=[below, above], color=ours, capsize=2)
    # otherwise the smallest bars would not show
    if min(medians) < max(medians) / 100:
        axes.set_xscale("symlog", linthresh=LEAST_FRACTION) if first.endswith("_fraction") else axes.set_xscale("log")
    axes.set_xlabel(first.replace("_per_s", "/s").replace("_", " "), fontsize=8)


def _draw_lines(axes: Any, table: Table) -> None:
    names = _names(table)
    unit = names[0].rpartition("_")[2]
    for name in (name for name in names if name.rpartition("_")[2] == unit):
        rows = [row for row in table.rows if name in row.numbers]
        medians = [_spread(row.numbers[name]).median for row in rows]
        axes.plot([int(row.name) for row in rows], medians, marker="o", label=title(name))
    axes.set_xscale("log", base=2)
    if unit == "fraction":
        axes.set_yscale("symlog", linthresh=LEAST_FRACTION)
        axes.set_ylim(bottom=0)
    else:
        axes.set_yscale("log")
    axes.set_xlabel(table.axis, fontsize=8)
    axes.set_ylabel(unit, fontsize=8)
    axes.legend(fontsize=7)


def _spread(number: Number) -> Spread:
    return number if isinstance(number, Spread) else Spread((number,))
