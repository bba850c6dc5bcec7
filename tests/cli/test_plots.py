"""Plots are PNG files, and the padding that they show is the loader's."""

from __future__ import annotations

import numpy as np
import pytest

from nanopack import Loader, demo
from nanopack.cli.lengths import Lengths, measure
from nanopack.cli.plots import save_lengths
from nanopack.config import LoaderConfig
from nanopack.packing import BestFit, BestFitCrop, BestFitPad, Pad
from nanopack.render.renderer import Renderer


def test_no_document_at_all_can_be_drawn(tmp_path):
    nothing = np.empty(0, np.int64)
    save_lengths(Lengths(nothing, nothing, nothing), LoaderConfig(seq_len=8), tmp_path / "b.png", title="")
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("packing", [BestFit(window=1), BestFit(window=8), BestFitPad(window=4), Pad()], ids=str)
def test_the_padding_shown_is_what_the_loader_has(packing):
    conversations = demo.shipped()[:120]
    with Loader(conversations, "chat32k", 1, 64, packing=packing, loss="all", epochs=1) as loader:
        list(loader)
        positions = loader.ledger()["positions"]
        render = Renderer(loader.tokenizer, "nanochat")
        lengths = measure(loader.source, range(120), render)
        found = lengths.pack(LoaderConfig(seq_len=64, loss="all"), packing).padding
    assert found == pytest.approx(positions["padding"] / positions["total"], abs=1e-12)


def test_the_tokens_shown_as_cut_are_those_of_the_loaders_ledger():
    conversations = demo.shipped()[:120]
    config = LoaderConfig(seq_len=64, loss="all")
    for packing in (BestFitCrop(window=8), BestFit()):
        with Loader(conversations, "chat32k", 1, 64, packing=packing, loss="all", epochs=1) as loader:
            list(loader)
            tokens = loader.ledger()["tokens"]
            lengths = measure(loader.source, range(120), Renderer(loader.tokenizer, "nanochat"))
        found = lengths.pack(config, packing).cut_fraction
        assert found == pytest.approx(sum(tokens["cut"].values()) / tokens["read"], abs=1e-12) and found > 0
