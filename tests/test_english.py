"""The house's English where a machine can judge it: docstrings say what a thing is, and some words are not used."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What has been gone through so far; a folder joins once it passes.
CHECKED = (
    "kernels/*.py",
    "nanopack/attention.py",
    "nanopack/errors.py",
    "nanopack/explain.py",
    "nanopack/render/templates.py",
    "nanopack/tokenizers/[rst]*.py",
    "nanopack/upload/device.py",
    "nanopack/upload/[eou]*.py",
)
FILES = [path for pattern in CHECKED for path in sorted(ROOT.glob(pattern))]
AVOIDED = re.compile(r"\b(whoever|anew|in its stead|in \w+'s stead)\b", re.IGNORECASE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_open_with_the_thing_and_the_source_avoids_some_words(path):
    source = path.read_text(encoding="utf-8")
    defined = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, defined)]
    assert not [doc.splitlines()[0] for doc in docs if re.match(r"Return (what|where)\b", doc)]
    assert not [line.strip() for line in source.splitlines() if AVOIDED.search(line)]
