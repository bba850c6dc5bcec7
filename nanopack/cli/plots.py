"""Draw for people who look at pictures: PNG files, made by matplotlib.

    demo.Run   ->   save_curve()     ->   a loss curve
    Batch      ->   save_batch()     ->   which conversation stands where, what is trained, what is padding
    Lengths    ->   save_lengths()   ->   how long the documents are, and what padding each packing needs for them

matplotlib is the extra `plot`, and is imported when something is to be drawn.
"""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from nanopack.batch import Batch
from nanopack.cli.lengths import Lengths
from nanopack.cli.text import trained_columns
from nanopack.config import LoaderConfig
from nanopack.demo import Run

# Of Okabe and Ito's palette, which colour-blind readers tell apart: https://jfly.uni-koeln.de/color/
BLUE, VERMILION = "#0072B2", "#D55E00"
COLOURS = (BLUE, "#E69F00", "#009E73", "#CC79A7", "#56B4E9", VERMILION)
PALE = 0.72
"""How much white there is in the colour of what is not trained."""
WINDOWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
DOTS_PER_INCH = 120


def piece_colour(row: int, number: int) -> str:
    """Return the colour of a piece: never that of its neighbours, seldom that of the one above."""
    return COLOURS[(number + 2 * row) % len(COLOURS)]


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
    axes.plot(held_out.keys(), held_out.values(), "o-", color=VERMILION, markersize=4, label="held-out conversations")
    axes.set(xlabel="step", ylabel="loss of a trained target (nats)", xlim=(0, None))
    title = f"A GPT of {run.parameters / 1e6:.2f} million parameters on the conversations that ship with nanopack"
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def save_batch(batch: Batch, path: Path, *, title: str, ignore_index: int) -> None:
    """Write a batch: one line a row, one pixel or more a token."""
    figure_class = load_matplotlib(path)
    rows, columns = batch.inputs.shape
    figure = figure_class(figsize=(16, min(12.0, 1.6 + 0.24 * rows)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(_pixels(batch, ignore_index), aspect="auto", interpolation="nearest", extent=(0, columns, rows, 0))
    starts = [(piece.start, row) for row, pieces in enumerate(batch.pieces) for piece in pieces]
    if starts:
        at, row = np.array(starts).T
        axes.vlines(at, row, row + 1, color="black", linewidth=0.8)
    axes.hlines(range(rows + 1), 0, columns, color="white", linewidth=min(4.0, 60 / rows))
    step = -(-rows // 16)
    axes.set_yticks([row + 0.5 for row in range(0, rows, step)], [f"{row}" for row in range(0, rows, step)])
    axes.set(xlabel="column (tokens)", ylabel="row", xlim=(0, columns))
    axes.set_title(title, fontsize=13, loc="left", pad=28)
    axes.tick_params(left=False)
    patch, line = _legend_makers()
    strong, pale = COLOURS[:3], [_mixed(colour, PALE) for colour in COLOURS[:3]]
    marks = [
        tuple(patch(color=colour) for colour in strong),
        tuple(patch(color=colour) for colour in pale),
        patch(facecolor="white", edgecolor="grey"),
        line([], [], color="black", linewidth=0, marker="|", markersize=12),
    ]
    words = ["target is trained", "target is not trained", "padding", "a conversation begins; each has one colour"]
    tuples = importlib.import_module("matplotlib.legend_handler").HandlerTuple(None, pad=0)
    place = {"loc": "lower left", "bbox_to_anchor": (-0.005, 1.0), "ncols": 4, "frameon": False, "handlelength": 3}
    axes.legend(marks, words, handler_map={tuple: tuples}, borderaxespad=0.2, **place)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _pixels(batch: Batch, ignore_index: int) -> np.ndarray:
    """Return, (B, T, 3) of 0 to 1, the colour of every slot."""
    pixels = np.ones((*batch.inputs.shape, 3))
    for row, pieces in enumerate(batch.pieces):
        trained = trained_columns(batch, row, ignore_index)[:, None]
        for number, piece in enumerate(pieces):
            inside = slice(piece.start, piece.start + piece.length)
            colour = piece_colour(row, number)
            pixels[row, inside] = np.where(trained[inside], _mixed(colour, 0.0), _mixed(colour, PALE))
    return pixels


def _mixed(colour: str, white: float) -> tuple[float, ...]:
    """Return red, green and blue, of 0 to 1, with so much white in it."""
    return tuple(white + (1 - white) * part / 255 for part in bytes.fromhex(colour[1:]))


def _legend_makers() -> tuple[Any, Any]:
    return importlib.import_module("matplotlib.patches").Patch, importlib.import_module("matplotlib.lines").Line2D


def save_lengths(lengths: Lengths, config: LoaderConfig, path: Path, *, title: str) -> None:
    """Write two panels: documents and their tokens by length, and padding by packing and window."""
    figure = load_matplotlib(path)(figsize=(13, 5), layout="constrained")
    figure.suptitle(title, fontsize=13)
    left, right = figure.subplots(1, 2)
    _draw_lengths(left, lengths, config)
    _draw_padding(right, lengths, config)
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
    axes.set(xlabel="length of a document (tokens)", ylabel="share (%)", title="How long documents are")


def _draw_padding(axes: Any, lengths: Lengths, config: LoaderConfig) -> None:
    alone = 100 * lengths.padding(config, "pad", None)
    axes.axhline(alone, color="black", linestyle="--", label=f"pad, one document a row: {alone:.0f}%")
    for packing, mark, colour in (("best_fit", "o-", BLUE), ("best_fit_pad", "x--", VERMILION)):
        padding = [100 * lengths.padding(config, packing, window) for window in WINDOWS]
        axes.plot(WINDOWS, padding, mark, color=colour, label=packing)
    axes.axhline(0, color=COLOURS[2], linewidth=3, label="stream, best_fit_crop: no padding")
    axes.set_xscale("log", base=2)
    axes.set_xticks(WINDOWS, [f"{window:,}" for window in WINDOWS])
    title = "What padding each packing needs for them"
    axes.set(
        xlabel="window (documents to choose from)", ylabel="padding (% of the slots)", ylim=(-2, None), title=title
    )
