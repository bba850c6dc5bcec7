"""A batch small enough to check its drawing by eye."""

from __future__ import annotations

import torch

from nanopack.batch import Batch, Piece

IGNORED = -100
# Row 0: a conversation of 5 tokens, 4 of one from its token 7 on, one of 1, padding. Row 1: padding only.
PIECES = ((Piece(30, 0, 5, 0), Piece(10, 5, 4, 7), Piece(20, 9, 1, 0)), ())
TRAINED = ("..TT..TTT...", "............")


def make_batch(pieces=PIECES, trained=TRAINED) -> Batch:
    columns = len(trained[0])
    return Batch(
        inputs=torch.arange(len(trained) * columns, dtype=torch.int32).reshape(-1, columns),
        targets=torch.tensor([[7 if mark == "T" else IGNORED for mark in row] for row in trained]),
        weights=None,
        positions=None,
        doc_ids=None,
        cu_seqlens=None,
        step=0,
        num_loss_tokens=0,
        num_tokens=0,
        weight_sum=0.0,
        max_seqlen=0,
        epoch=1,
        progress=1.0,
        last=True,
        word_pieces=pieces,
    )
