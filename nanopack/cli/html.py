"""Write a batch as a page for a browser, where every token tells where it comes from and why it is trained or not.

    Batch, Loader   ->   explain_rows()   ->   save_page()   ->   one .html file that needs no other

The page itself is data/inspect.html. Texts and reasons come in tables, each once, and what stands side by side in one
message is one span: a batch of 32 x 2048 tokens takes about 600 kB. Words of a conversation reach the page only as JSON
without "<", and from there as text, so nothing in them can become markup or run.
"""

from __future__ import annotations

import html
import json
from collections.abc import Hashable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from nanopack.batch import Batch
from nanopack.cli.plots import COLOURS
from nanopack.explain import Explanation, Token, explain_row
from nanopack.loader import Loader
from nanopack.render.renderer import Renderer


class _Table:
    """Values, each once, and the number of each."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}

    def number(self, value: Hashable) -> int:
        return self._numbers.setdefault(value, len(self._numbers))

    def values(self) -> list[Any]:
        return list(self._numbers)


def explain_rows(batch: Batch, loader: Loader) -> list[list[Explanation]]:
    """Return what `loader.explain` says of every slot."""
    config, source, tokenizer = loader.config, loader.source, loader.tokenizer
    render = Renderer(tokenizer, config.template, config.loss, config.first_assistant)
    return [
        explain_row(batch, row, source=source, tokenizer=tokenizer, render=render, config=config)
        for row in range(config.batch_size)
    ]


def page_data(rows: Sequence[Sequence[Explanation]]) -> dict[str, Any]:
    """Return what the page knows, JSON-able: for each row the numbers of its texts and reasons, and its spans.

    A row has T + 1 texts (-1 in padding): the last is only a target. A span is
    [start, stop, piece, place, message, role, token of the document at start].
    """
    texts, reasons, places = _Table(), _Table(), _Table()
    told = []
    for row in rows:
        tokens = [explanation.input for explanation in row] + [row[-1].target]
        told.append(
            {
                "texts": [-1 if token is None else texts.number(token.text) for token in tokens],
                "reasons": [reasons.number((explanation.trained, explanation.reason)) for explanation in row],
                "spans": _spans(tokens, places),
            }
        )
    return {
        "columns": len(rows[0]),
        "colours": COLOURS,
        "texts": texts.values(),
        "reasons": reasons.values(),
        "places": places.values(),
        "rows": told,
    }


def _spans(tokens: Sequence[Token | None], places: _Table) -> list[list[Any]]:
    spans: list[list[Any]] = []
    piece, before = -1, None
    for column, token in enumerate(tokens):
        if token is not None:
            follows = before is not None and _place(before, 1) == _place(token, 0)
            piece += not follows
            if follows and before is not None and before.message == token.message:
                spans[-1][1] = column + 1
            else:
                place = places.number(token.where)
                spans.append([column, column + 1, piece, place, token.message, token.role, token.offset])
        before = token
    return spans


def _place(token: Token, later: int) -> tuple[int, int]:
    return token.conversation, token.offset + later


def save_page(rows: Sequence[Sequence[Explanation]], path: Path, *, title: str) -> None:
    """Write the page of a batch, of which `explain_rows` tells."""
    page = (resources.files("nanopack") / "data" / "inspect.html").read_text(encoding="utf-8")
    # JSON has "<" only in strings, and "</script" in one would end the data
    data = json.dumps(page_data(rows), separators=(",", ":")).replace("<", "\\u003c")
    head, _, tail = page.partition("{{data}}")
    path.write_text(head.replace("{{title}}", html.escape(title)) + data + tail, encoding="utf-8")
