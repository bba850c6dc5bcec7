"""Draw PNG files, with matplotlib.

    losses    ->   save_curve()     ->   a loss curve
    Lengths   ->   save_lengths()   ->   documents by length, and what each packing pads and cuts of them

matplotlib is the extra `plot`, imported when something is drawn.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanopack.cli.lengths import Lengths
from nanopack.config import LoaderConfig
from nanopack.packing import BestFit, BestFitCrop, BestFitPad, Pad

# From Okabe and Ito's palette, which colour-blind readers can distinguish: https://jfly.uni-koeln.de/color/
BLUE, VERMILION = "#0072B2", "#D55E00"
COLOURS = (BLUE, "#E69F00", "#009E73", "#CC79A7", "#56B4E9", VERMILION)
WINDOWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
DOTS_PER_INCH = 120
LEAST_PERCENT = 0.01
"""Where a logarithmic axis of fractions begins."""


def load_matplotlib(path: Path) -> Any:
    """Return matplotlib's Figure class; ImportError naming `path` and the extra if it is missing."""
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise ImportError(f"{path} needs matplotlib; pip install nanopack-gpu[plot]") from error


def save_curve(
    path: Path, losses: Sequence[float], means: Mapping[int, float], held_out: Mapping[int, float], *, title: str
) -> None:
    """Write a loss curve: the loss of every step, mean losses between evaluations, and held-out losses by step."""
    figure = load_matplotlib(path)(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, color=BLUE, alpha=0.3, linewidth=1)
    # a mean is drawn in the middle of its steps
    middles = [(start + end) / 2 for start, end in itertools.pairwise(sorted(held_out))]
    axes.plot(middles, means.values(), color=BLUE, linewidth=2, label="training (pale: every step)")
    steps = sorted(held_out)
    axes.plot(steps, [held_out[step] for step in steps], "o-", color=VERMILION, markersize=4, label="held out")
    axes.set(xlabel="step", ylabel="loss of a target (nats)", xlim=(0, None))
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def save_lengths(lengths: Lengths, config: LoaderConfig, path: Path, *, title: str) -> None:
    """Write two panels: documents and their tokens by length, and by window what each packing pads and cuts."""
    figure = load_matplotlib(path)(figsize=(13, 5), layout="constrained")
    figure.suptitle(title, fontsize=13)
    left, right = figure.subplots(1, 2)
    _draw_lengths(left, lengths, config)
    _draw_losses(right, lengths, config)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _draw_lengths(axes: Any, lengths: Lengths, config: LoaderConfig) -> None:
    tokens = lengths.tokens
    longest = max(config.row_tokens, int(tokens.max(initial=1)))
    edges = np.geomspace(1, longest + 1, 41)
    for offset, weights, colour, label in (
        (0.0, np.ones(len(tokens)), BLUE, "of the documents"),
        (0.5, tokens, COLOURS[1], "of the tokens"),
    ):
        heights, _ = np.histogram(tokens, edges, weights=100 * weights / max(1, weights.sum()))
        widths = np.diff(edges) / 2
        axes.bar(edges[:-1] + offset * np.diff(edges), heights, widths, align="edge", color=colour, label=label)
    axes.axvline(config.row_tokens, color="black", linestyle="--", label=f"a row: {config.row_tokens:,} tokens")
    axes.set_xscale("log", base=2)
    ticks = [2**power for power in range(0, longest.bit_length() + 1, 2)]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set(xlabel="length of a document (tokens)", ylabel="fraction (%)", title="Documents by length")


def _draw_losses(axes: Any, lengths: Lengths, config: LoaderConfig) -> None:
    """Draw the padding by packing and window, and the tokens that are cut off; a stream has neither."""
    alone = 100 * lengths.pack(config, Pad()).padding
    axes.axhline(alone, color="black", linestyle="--", label=f"padding of pad, one document a row: {alone:.0f}%")
    for packing, mark, colour in ((BestFit, "o-", BLUE), (BestFitPad, "x--", VERMILION)):
        padding = [100 * lengths.pack(config, packing(window=window)).padding for window in WINDOWS]
        axes.plot(WINDOWS, padding, mark, color=colour, label=f"padding of {packing.name}")
    cropped = [100 * lengths.pack(config, BestFitCrop(window=window)).cut_fraction for window in WINDOWS]
    axes.plot(WINDOWS, cropped, "s-", color=COLOURS[3], label="tokens cropped by best_fit_crop")
    cut = 100 * lengths.pack(config, BestFit()).cut_fraction
    label = f"tokens cut to a row by best_fit, best_fit_pad, pad: {cut:.2g}%"
    axes.axhline(cut or LEAST_PERCENT, color=COLOURS[1], linestyle=":", linewidth=2, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(WINDOWS, [f"{window:,}" for window in WINDOWS])
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda percent, _: f"{percent:g}")
    title = "Padding and tokens cut off; a stream has neither"
    label = "% of the positions, % of the tokens"
    axes.set(xlabel="window (documents to choose from)", ylabel=label, ylim=(LEAST_PERCENT, 100), title=title)
