"""Draw docs/balance.svg: what eight ranks work in eight steps, with rows dealt by cost and without.

    lengths that are drawn, packed   ->   works()   ->   svg(): a bar for each rank and step; grey: it waits

`python bench/picture_balance.py`. Lengths, model and packing are those of `nanopack bench --only balance`.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np

from nanopack.cli.bench.balance import MEAN, SIGMA
from nanopack.packing import BestFit
from nanopack.packing.balance import deal, deal_across
from nanopack.packing.imbalance import LLAMA_3_8B, row_costs

PICTURE = Path(__file__).parent.parent / "docs" / "balance.svg"
RANKS, STEPS, COLUMNS, SEQ_LEN = 8, 8, 3, 32_768
WIDTH, HEIGHT, TOP, LEFT, GAP = 940, 300, 74, 10, 16
FIELD, TALL = (WIDTH - 2 * LEFT - (COLUMNS - 1) * GAP) / COLUMNS, HEIGHT - TOP - 40
STYLE = """
text{font:12px system-ui,sans-serif;fill:#24292f}.head{font-size:14px;font-weight:600}
.work{fill:#2f81c7}.wait{fill:#d0d7de}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.work{fill:#3d93dd}.wait{fill:#30363d}}
"""


def works() -> dict[str, np.ndarray]:
    """Return the costs of one window's rows, one a rank and step, (steps, ranks), by how they are dealt."""
    draw, mu = random.Random(0), math.log(MEAN) - SIGMA**2 / 2
    lengths = [max(1, int(draw.lognormvariate(mu, SIGMA))) for _ in range(20_000)]
    costs = row_costs(BestFit(), lengths, SEQ_LEN, LLAMA_3_8B)
    rows = np.random.default_rng(0).choice(costs, RANKS * STEPS)
    own = rows.reshape(STEPS, RANKS).T
    return {
        "as packed": own.T,
        "balance=": np.stack([one[deal(one, STEPS)[:, 0]] for one in own], axis=1),
        "balance_across=True": rows[deal_across(rows, STEPS, RANKS)][:, :, 0],
    }


def slowest(work: np.ndarray) -> float:
    """Return the slowest rank's work over the mean, on average over the steps."""
    return float((work.max(axis=1) / work.mean(axis=1)).mean())


def svg(found: dict[str, np.ndarray]) -> str:
    """Return the picture."""
    title = f"Work of {RANKS} ranks in steps 0 to {STEPS - 1}, rows of {SEQ_LEN:,} tokens: all wait for the slowest"
    most = max(work.max() for work in found.values())
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">'
        f'<style>{STYLE}</style>\n<text class="head" x="{LEFT}" y="24">{title}</text>'
    ]
    for number, (name, work) in enumerate(found.items()):
        parts += _field(LEFT + number * (FIELD + GAP), name, work, TALL / most)
    return "\n".join([*parts, "</svg>\n"])


def _field(left: float, name: str, work: np.ndarray, scale: float) -> list[str]:
    """Return the bars of one way to deal: a group a step, a bar a rank."""
    parts = [f'<text x="{left:.1f}" y="{TOP - 18}">{name}: slowest over mean {slowest(work):.2f}x</text>']
    group = FIELD / STEPS
    bar = (group - 5) / RANKS
    for step, costs in enumerate(work.tolist()):
        for rank, cost in enumerate(costs):
            x, bottom = left + step * group + rank * bar, TOP + TALL
            for kind, height in (("wait", max(costs) * scale), ("work", cost * scale)):
                box = f'x="{x:.1f}" y="{bottom - height:.1f}" width="{bar - 0.6:.1f}" height="{height:.1f}"'
                parts.append(f'<rect class="{kind}" {box}/>')
        parts.append(f'<text x="{left + step * group:.1f}" y="{TOP + TALL + 18}">{step}</text>')
    return parts


if __name__ == "__main__":
    PICTURE.write_text(svg(works()), encoding="utf-8")
