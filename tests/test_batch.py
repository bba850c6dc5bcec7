"""Promises of nanopack/batch.py: the batch as one row is the batch itself."""

from __future__ import annotations

import itertools

import pytest
import torch

from nanopack import Batch, Loader

CHATS = [
    [{"role": "user", "content": f"{i} + {i}?"}, {"role": "assistant", "content": f"{2 * i}. " * (i % 5 + 1)}]
    for i in range(40)
]


def batches(packing: str = "best_fit", **arguments: object) -> list[Batch]:
    with Loader(CHATS, "chat32k", 3, 64, packing=packing, epochs=1, num_workers=0, device="cpu", **arguments) as loader:
        return list(loader)


@pytest.mark.parametrize("packing", ["best_fit", "stream", "pad"])
def test_a_flat_batch_is_the_same_tensors_in_another_shape(packing):
    for batch in batches(packing, loss_weights="token", extras=("positions", "doc_ids", "cu_seqlens")):
        flat = batch.flat()
        for name in ("inputs", "targets", "weights", "positions"):
            rows, row = getattr(batch, name), getattr(flat, name)
            assert torch.equal(row, rows.reshape(3 * 64))
            assert row.data_ptr() == rows.data_ptr()
        assert flat.cu_seqlens is batch.cu_seqlens
        assert flat.max_seqlen == batch.max_seqlen


@pytest.mark.parametrize("packing", ["best_fit", "stream", "pad"])
def test_cu_seqlens_of_a_flat_batch_cut_out_every_piece_and_the_padding_of_each_row(packing):
    padded = 0
    for batch in batches(packing, extras=("positions", "cu_seqlens")):
        flat = batch.flat()
        bounds = flat.cu_seqlens.tolist()
        spans = [span for span in itertools.pairwise(bounds) if span[0] < span[1]]
        expected = []
        for row, pieces in enumerate(batch.pieces):
            for piece in pieces:
                begin = row * 64 + piece.start
                expected.append((begin, begin + piece.length))
                cut = flat.inputs[expected[-1][0] : expected[-1][1]]
                assert torch.equal(cut, batch.inputs[row, piece.start : piece.start + piece.length])
            end = max((piece.start + piece.length for piece in pieces), default=0)
            if end < 64:
                expected.append((row * 64 + end, row * 64 + 64))
                padded += 1
        assert spans == expected
        for begin, end in spans:
            assert flat.positions[begin:end].tolist() == list(range(end - begin))
        assert max(end - begin for begin, end in spans) == flat.max_seqlen
    # the end of the data, at the latest
    assert padded


def test_what_was_not_asked_for_is_none_in_a_flat_batch_too():
    flat = batches()[0].flat()
    assert (flat.weights, flat.positions, flat.cu_seqlens) == (None, None, None)
