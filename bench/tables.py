"""Write the tables of figures in README.md and docs/ from the results in bench/results/.

    <!-- table: results/NAME.json, SECTION, N: COLUMN, COLUMN -->   ->   the N-th table of that section
    <!-- end of table -->

Between the two lines stands what this script last wrote: `python bench/tables.py`. tests/test_docs.py sees that it is
what the results say.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from nanopack.cli.bench import report
from nanopack.cli.bench.rounds import Number, Spread

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = re.compile(
    r"(<!-- table: (?P<file>[\w./-]+), (?P<section>\w+), (?P<number>\d+): (?P<columns>[^>]*?) -->\n)"
    r"(?P<written>.*?)(?P<end><!-- end of table -->)",
    re.DOTALL,
)


def filled(text: str) -> str:
    """Return a page with its tables as the results have them. KeyError, IndexError where they have no such table."""
    return MARKED.sub(lambda found: f"{found[1]}\n{_table(found)}\n\n{found['end']}", text)


def _table(found: re.Match[str]) -> str:
    results = json.loads((ROOT / "bench" / found["file"]).read_text(encoding="utf-8"))
    rows = results["sections"][found["section"]]["tables"][int(found["number"])]["rows"]
    columns = found["columns"].split(", ")
    titles = [report.title(name) for name in columns]
    lines = [f"| | {' | '.join(titles)} |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = [_cell(name, row["numbers"].get(name)) for name in columns]
        if any(cells):
            lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(name: str, number: dict[str, Any] | float | None) -> str:
    value: Number | None = Spread(tuple(number["rounds"])) if isinstance(number, dict) else number
    return report.cell(name, value)


def main() -> None:
    """Write the tables of all pages."""
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        if (after := filled(before)) != before:
            page.write_text(after, encoding="utf-8")
            print(f"{page.relative_to(ROOT)} is written", file=sys.stderr)


if __name__ == "__main__":
    main()
