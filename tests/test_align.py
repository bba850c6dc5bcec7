"""document_align=n: every document takes a multiple of n columns; its tail is padding inside its piece."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from data_sets import SMALL, data_sets, drawn_arguments
from hypothesis import given
from hypothesis import strategies as st
from stores import store_of

import nanopack
from nanopack import reference
from nanopack.verify import first_difference

Loader = functools.partial(nanopack.Loader, num_workers=0)
PACKINGS = ["best_fit", "best_fit_pad", "pad"]
EXTRAS = ("positions", "doc_ids", "cu_seqlens", "cu_seqlens_real")
CHATS = [{"text": "abcdefghijklmnopqrstuvwxyz"[: 1 + k * k % 23]} for k in range(200)]
N, T = 8, 64


def batches(**arguments):
    return list(Loader(CHATS, SMALL, 3, T, epochs=1, extras=EXTRAS, max_pieces=T, document_align=N, **arguments))


def tails(batch):
    """(B, T) bool: the columns after a document, up to the next multiple of n."""
    found = torch.zeros(batch.inputs.shape, dtype=torch.bool)
    for row, pieces in enumerate(batch.pieces):
        for piece in pieces:
            end = piece.start + piece.length
            found[row, end : -(-end // N) * N] = True
    return found


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("loss", [{"loss": "all"}, {"loss": "all", "loss_weights": "token"}, {"boundary_loss": False}])
def test_a_tail_is_bos_out_of_the_loss_inside_its_piece_and_counts_as_padding(packing, loss):
    for batch in batches(packing=packing, **loss):
        tail = tails(batch)
        assert packing == "pad" or tail.any()
        assert (batch.inputs[tail] == SMALL.encode_single_token("<|bos|>")).all()
        assert (batch.targets[tail] == -100).all()
        assert batch.weights is None or (batch.weights[tail] == 0).all()
        for row, pieces in enumerate(batch.pieces):
            for number, piece in enumerate(pieces):
                assert piece.start % N == 0
                taken = slice(piece.start, min(-(-(piece.start + piece.length) // N) * N, T))
                assert batch.doc_ids[row, taken].tolist() == [number] * (taken.stop - taken.start)
                assert batch.positions[row, taken].tolist() == [*range(taken.stop - taken.start)]
        assert batch.num_tokens == sum(p.length for row in batch.pieces for p in row)
        assert batch.num_tokens == int(((batch.doc_ids >= 0) & ~tail).sum())
        assert batch.num_loss_tokens == int((batch.targets != -100).sum())


def test_cu_seqlens_are_of_aligned_lengths_and_the_real_ones_of_documents():
    for batch in batches(packing="best_fit"):
        starts, real = batch.cu_seqlens.tolist(), batch.cu_seqlens_real.tolist()
        assert len(starts) == len(real) == 3 * T + 1
        assert all(start % N == 0 for start in starts)
        at = {row * T + p.start: min(p.length, T - p.start) for row, pieces in enumerate(batch.pieces) for p in pieces}
        lengths = [b - a for a, b in itertools.pairwise(real)]
        for start, length in zip(starts[:-1], lengths, strict=True):
            # padding at a row's end, and what fills cu_seqlens up, has none
            assert length == at.get(start, 0)
        assert real[-1] == batch.num_tokens


def test_real_lengths_bring_the_starts_with_them_and_need_no_alignment():
    batch = next(Loader(CHATS, SMALL, 2, T, extras=("cu_seqlens_real",), max_pieces=T))
    ends = [row * T + min(p.start + p.length, T) for row, pieces in enumerate(batch.pieces) for p in pieces]
    assert batch.cu_seqlens is not None and batch.cu_seqlens_real[-1] == batch.num_tokens
    assert {*ends} <= {*batch.cu_seqlens.tolist()}


@pytest.mark.parametrize("packing", PACKINGS)
@given(data=st.data(), align=st.sampled_from([2, 4, 8]))
def test_nothing_is_lost_and_the_ledger_balances(packing, data, align):
    conversations = data.draw(data_sets)
    arguments = {**data.draw(drawn_arguments(packing)), "seq_len": 24, "epochs": 2, "document_align": align}
    arguments.pop("max_pieces", None)
    arguments["extras"] = ()
    loader = Loader(conversations, SMALL, **arguments)
    got = list(loader)
    assert len(got) == len(Loader(conversations, SMALL, **arguments))
    ledger = loader.ledger()
    assert ledger["balanced"]
    assert ledger["positions"]["tokens"] == sum(batch.num_tokens for batch in got)
    pieces = [piece.length for batch in got for row in batch.word_pieces for piece in row]
    assert ledger["tokens"]["emitted"] == sum(pieces)
    expected = list(reference.batches(conversations, SMALL, **arguments))
    assert [first_difference(a, b) for a, b in zip(expected, got, strict=True)] == [None] * len(expected)


def test_explain_calls_a_tail_padding():
    loader = Loader(CHATS, SMALL, 3, T, document_align=N, loss="all")
    batch = next(loader)
    row, column = next((r, p.start + p.length) for r, ps in enumerate(batch.pieces) for p in ps if p.length % N)
    for col in range(column, -(-column // N) * N):
        found = loader.explain(batch, row, col)
        assert found.input is None and not found.in_loss and "padding" in found.reason
        assert batch.targets[row, col] == -100


@pytest.mark.parametrize("loss_weights", [None, "conversation"])
def test_from_a_store_the_same(tmp_path, loss_weights):
    store = store_of(tmp_path / "store", CHATS, SMALL)
    arguments = dict(loss="all", loss_weights=loss_weights, document_align=N, extras=EXTRAS, max_pieces=T, epochs=1)
    plain, stored = (list(Loader(data, SMALL, 3, T, **arguments)) for data in (CHATS, store))
    assert [first_difference(a, b) for a, b in zip(plain, stored, strict=True)] == [None] * len(plain)


def test_a_state_of_another_alignment_is_refused_by_name():
    state = Loader(CHATS, SMALL, 2, T, document_align=N).state_dict()
    with pytest.raises(ValueError, match="document_align was 8, is None"):
        Loader(CHATS, SMALL, 2, T).load_state_dict(state)


WRONG = [
    (dict(document_align=0), "document_align=0 is not allowed"),
    (dict(document_align=7), "document_align=7 does not divide seq_len=64"),
    (dict(document_align=8, packing=nanopack.BestFit(window="all")), "document_align and packing=BestFit"),
    (dict(document_align=8, packing="stream"), "has no meaning with packing='stream'"),
    (dict(document_align=8, packing="best_fit_crop"), "has no meaning with packing='best_fit_crop'"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_what_cannot_be_aligned_is_refused_at_construction_by_the_reference_too(arguments, message):
    with pytest.raises(ValueError) as caught:
        Loader(CHATS, SMALL, 2, T, **arguments)
    assert message in str(caught.value)
    with pytest.raises(ValueError):
        next(iter(reference.batches(CHATS, SMALL, batch_size=2, seq_len=T, **arguments)))
