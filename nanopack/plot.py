"""Draw for people who look at pictures: PNG files, made by matplotlib.

    demo.Run   ->   save_curve()   ->   a loss curve

matplotlib is the extra `plot`, and is imported when something is to be drawn.
"""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from typing import Any

from nanopack.demo import Run

# Of Okabe and Ito's palette, which colour-blind readers tell apart: https://jfly.uni-koeln.de/color/
BLUE, ORANGE = "#0072B2", "#D55E00"
DOTS_PER_INCH = 120


def load_matplotlib(path: Path) -> Any:
    """Return the class of matplotlib's figures; ImportError where it is missing, naming what needs it."""
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise ImportError(f"{path} needs matplotlib; pip install nanopack[plot]") from error


def save_curve(run: Run, path: Path) -> None:
    """Write the losses of a run, step by step."""
    figure = load_matplotlib(path)(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(run.losses) + 1), run.losses, color=BLUE, alpha=0.3, linewidth=1)
    held_out = dict(sorted(run.held_out.items()))
    # a mean stands in the middle of the steps that it is of
    middles = [(start + end) / 2 for start, end in itertools.pairwise(held_out)]
    axes.plot(middles, run.trained().values(), color=BLUE, linewidth=2, label="training (pale: every step)")
    axes.plot(held_out.keys(), held_out.values(), "o-", color=ORANGE, markersize=4, label="held-out conversations")
    axes.set(xlabel="step", ylabel="loss of a trained target (nats)", xlim=(0, None))
    title = f"A GPT of {run.parameters / 1e6:.2f} million parameters on the conversations that ship with nanopack"
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=DOTS_PER_INCH)
