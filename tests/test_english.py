"""The house's English where a machine can judge it: docstrings say what a thing is, and some words are not used."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = {path for folder in ("nanopack", "kernels", "bench", "tests") for path in (ROOT / folder).rglob("*.py")}
PROSE = [
    *ROOT.glob("*.md"),
    ROOT / "Makefile",
    ROOT / "bench" / "LOG.md",
    *ROOT.glob("docs/*.md"),
]
# Words that English has a plainer one for: after, next to, faster, again, instead, n, resume, compare with.
AVOIDED = re.compile(
    r"\b(behind|beside|whoever|sooner|anew|in vain|in its stead|in \w+'s stead|so many|go on|goes on|gone on"
    r"|holds? against|held against)\b",
    re.IGNORECASE,
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", sorted(CODE), ids=name)
def test_docstrings_open_with_the_thing(path):
    defined = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docs = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, defined)]
    assert not [doc.splitlines()[0] for doc in docs if re.match(r"Return (what|where)\b", doc)]


@pytest.mark.parametrize("path", sorted({*CODE, *PROSE} - {Path(__file__)}), ids=name)
def test_some_words_are_not_used(path):
    assert not [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if AVOIDED.search(line)]
