"""Draw docs/batch.svg: a batch of the conversations that ship with nanopack, `python bench/picture.py`.

Batch   ->   svg()   ->   a bar for each row: pieces, dark in the loss, and padding, hatched
"""

from __future__ import annotations

from itertools import groupby, islice
from pathlib import Path

import nanopack
from nanopack.data import CONVERSATIONS

PICTURE = Path(__file__).parent.parent / "docs" / "batch.svg"
ROWS, COLUMNS = 10, 640
WIDTH, BAR, STEP, LEFT, TOP = 920, 20, 27, 50, 46
SCALE = (WIDTH - LEFT - 10) / COLUMNS
# hues that differ for all eyes, in the order in which neighbours take them; for light and dark alike
HUES = (205, 28, 150, 320, 55, 265)
STYLE = """
text{font:12px system-ui,sans-serif;fill:#24292f}.head{font-size:14px;font-weight:600}.pad{fill:url(#hatch)}
.edge{fill:none;stroke:#fff;stroke-width:1.5}#hatch path{stroke:#8c959f}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.edge{stroke:#0d1117}#hatch path{stroke:#6e7681}}
"""


def drawn_batch() -> nanopack.Batch:
    """Return the second batch: the first is of the longest chats."""
    with nanopack.Loader(CONVERSATIONS, "chat32k", ROWS, COLUMNS, seed=2, device="cpu", num_workers=0) as loader:
        return list(islice(loader, 2))[1]


def svg(batch: nanopack.Batch) -> str:
    """Return the picture of a batch."""
    parts = [_head(batch)]
    for number, (pieces, targets) in enumerate(zip(batch.pieces, batch.targets.tolist(), strict=True)):
        y = TOP + number * STEP
        parts.append(f'<text x="{LEFT - 8}" y="{y + 15}" text-anchor="end">row {number}</text>')
        end = 0
        for index, piece in enumerate(pieces):
            stop = min(COLUMNS, piece.start + piece.length)
            parts += _piece(y, piece.start, stop, HUES[index % len(HUES)], targets)
            end = stop
        if end < COLUMNS:
            parts.append(_box(y, end, COLUMNS, 'class="pad"'))
    return "\n".join([*parts, "</svg>\n"])


def _head(batch: nanopack.Batch) -> str:
    padding = 1 - batch.num_tokens / batch.inputs.numel()
    height = TOP + ROWS * STEP + 34
    title = (
        f"One batch of {ROWS} rows of {COLUMNS} tokens: {sum(map(len, batch.pieces))} chats, {padding:.1%} padding, "
        f"{batch.num_loss_tokens:,} tokens in the loss"
    )
    keys = [("light: read by the model, not in the loss", 'fill="hsl(205 55% 78%)"')]
    keys += [("dark: in the loss", 'fill="hsl(205 65% 42%)"'), ("hatched: padding", 'class="pad"')]
    legend = "".join(
        f'<rect x="{LEFT + 290 * n}" y="{height - 22}" width="14" height="14" {how}/>'
        f'<text x="{LEFT + 290 * n + 20}" y="{height - 10}">{what}</text>'
        for n, (what, how) in enumerate(keys)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}">'
        f'<style>{STYLE}</style><defs><pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse">'
        f'<path d="M0 5L5 0" stroke-width="1"/></pattern></defs>\n'
        f'<text class="head" x="{LEFT}" y="24">{title}</text>{legend}'
    )


def _piece(y: int, start: int, stop: int, hue: int, targets: list[int]) -> list[str]:
    """Return the boxes of a piece: columns whose target is in the loss are dark."""
    boxes, at = [], start
    for in_loss, run in groupby(targets[start:stop], key=lambda target: target != -100):
        until = at + len(list(run))
        colour = f"hsl({hue} 65% 42%)" if in_loss else f"hsl({hue} 55% 78%)"
        boxes.append(_box(y, at, until, f'fill="{colour}"'))
        at = until
    return [*boxes, _box(y, start, stop, 'class="edge"')]


def _box(y: int, start: int, stop: int, how: str) -> str:
    x, width = LEFT + start * SCALE, (stop - start) * SCALE
    return f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" {how}/>'


if __name__ == "__main__":
    PICTURE.write_text(svg(drawn_batch()), encoding="utf-8")
