"""Pictures of a batch small enough to check pixel by pixel."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from drawn_batch import IGNORED, PIECES, TRAINED, make_batch

from nanopack import Loader, demo
from nanopack.cli.lengths import Lengths, measure
from nanopack.cli.plots import COLOURS, _mixed, _pixels, piece_colour, save_batch, save_lengths
from nanopack.config import LoaderConfig
from nanopack.render.renderer import Renderer


def luminance(pixel):
    return float(np.dot(pixel, (0.2126, 0.7152, 0.0722)))


def test_pixels_show_conversations_trained_targets_and_padding():
    pixels = _pixels(make_batch(), IGNORED)
    colours = [[pixel for pixel, _ in itertools.groupby(map(tuple, row))] for row in pixels.tolist()]
    white = (1.0, 1.0, 1.0)
    strong = [_mixed(piece_colour(0, number), 0.0) for number in range(3)]
    pale = [_mixed(piece_colour(0, number), 0.72) for number in range(3)]
    assert TRAINED[0] == "..TT..TTT..." and [piece.length for piece in PIECES[0]] == [5, 4, 1]
    assert colours == [[pale[0], strong[0], pale[0], pale[1], strong[1], pale[2], white], [white]]


def test_neighbours_never_have_the_same_colour_and_trained_is_darker_in_all():
    for row in range(4):
        colours = [piece_colour(row, number) for number in range(20)]
        assert all(left != right for left, right in itertools.pairwise(colours))
    assert all(luminance(_mixed(colour, 0.0)) + 0.1 < luminance(_mixed(colour, 0.72)) < 0.95 for colour in COLOURS)


@pytest.mark.parametrize("rows", [1, 300])
def test_any_number_of_rows_and_no_document_at_all_can_be_drawn(tmp_path, rows):
    save_batch(make_batch(((),) * rows, ("." * 12,) * rows), tmp_path / "a.png", title="", ignore_index=IGNORED)
    nothing = np.empty(0, np.int64)
    save_lengths(Lengths(nothing, nothing, nothing), LoaderConfig(seq_len=8), tmp_path / "b.png", title="")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("a.png", "b.png"))


@pytest.mark.parametrize(("packing", "window"), [("best_fit", 1), ("best_fit", 8), ("best_fit_pad", 4), ("pad", None)])
def test_the_padding_shown_is_what_the_loader_has(packing, window):
    conversations = demo.shipped()[:120]
    with Loader(conversations, "chat32k", 1, 64, packing=packing, window=window, loss="all", epochs=1) as loader:
        list(loader)
        slots = loader.ledger()["slots"]
        render = Renderer(loader.tokenizer, "nanochat")
        lengths = measure(loader.source, range(120), render)
        found = lengths.padding(LoaderConfig(seq_len=64, loss="all"), packing, window)
    assert found == pytest.approx(slots["padding"] / slots["total"], abs=1e-12)
