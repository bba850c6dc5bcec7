"""Write a batch as an HTML page that shows of every token where it comes from and why it is in the loss or not.

    Batch, Loader   ->   explain_rows()   ->   save_page()   ->   one .html file that needs no other

The page itself is data/inspect.html. Each distinct text and reason is stored once, and adjacent tokens of one message
are one span: a batch of 32 x 2048 tokens takes about 600 kB. Words of a conversation reach the page only as JSON
without "<", and from there as text, so nothing in them can become markup or run.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from nanopack.batch import Batch
from nanopack.cli.plots import COLOURS
from nanopack.explain import Explanation, Token, explain_row
from nanopack.loader import Loader
from nanopack.render.renderer import Renderer


def explain_rows(batch: Batch, loader: Loader) -> list[list[Explanation]]:
    """Return `loader.explain` of every position of the batch, (B, T)."""
    config, source, tokenizer = loader.config, loader.source, loader.tokenizer
    render = Renderer(tokenizer, config.template, config.loss, config.first_assistant)
    return [
        explain_row(batch, row, source=source, tokenizer=tokenizer, render=render, config=config)
        for row in range(config.batch_size)
    ]


def page_data(rows: Sequence[Sequence[Explanation]]) -> dict[str, Any]:
    """Return the data of the page, JSON-able: for each row the numbers of its texts and reasons, and its spans.

    A row has T + 1 texts (-1 in padding): the last is only a target. A span is
    [start, stop, piece, location, message, role, index of its first token in the document].
    """
    # each distinct value and its number
    texts: dict[str, int] = {}
    reasons: dict[tuple[bool, str], int] = {}
    locations: dict[str, int] = {}
    packed = []
    for row in rows:
        tokens = [explanation.input for explanation in row] + [row[-1].target]
        packed.append(
            {
                "texts": [-1 if token is None else texts.setdefault(token.text, len(texts)) for token in tokens],
                "reasons": [reasons.setdefault((one.in_loss, one.reason), len(reasons)) for one in row],
                "spans": _spans(tokens, locations),
            }
        )
    return {
        "columns": len(rows[0]),
        "colours": COLOURS,
        "texts": list(texts),
        "reasons": list(reasons),
        "locations": list(locations),
        "rows": packed,
    }


def _spans(tokens: Sequence[Token | None], locations: dict[str, int]) -> list[list[Any]]:
    spans: list[list[Any]] = []
    piece, before = -1, None
    for column, token in enumerate(tokens):
        if token is not None:
            follows = before is not None and _origin(before, 1) == _origin(token, 0)
            piece += not follows
            if follows and before is not None and before.message == token.message:
                spans[-1][1] = column + 1
            else:
                location = locations.setdefault(token.where, len(locations))
                spans.append([column, column + 1, piece, location, token.message, token.role, token.offset])
        before = token
    return spans


def _origin(token: Token, later: int) -> tuple[int, int]:
    return token.conversation, token.offset + later


def save_page(rows: Sequence[Sequence[Explanation]], path: Path, *, title: str) -> None:
    """Write the page of a batch, given its `explain_rows`."""
    page = (resources.files("nanopack") / "data" / "inspect.html").read_text(encoding="utf-8")
    # JSON has "<" only in strings, and "</script" in one would end the data
    data = json.dumps(page_data(rows), separators=(",", ":")).replace("<", "\\u003c")
    head, _, tail = page.partition("{{data}}")
    path.write_text(head.replace("{{title}}", html.escape(title)) + data + tail, encoding="utf-8")
