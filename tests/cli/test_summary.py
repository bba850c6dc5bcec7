"""Totals of invented batches."""

from __future__ import annotations

import pytest
import torch

from nanopack.batch import Batch, Piece
from nanopack.cli.summary import Totals
from nanopack.config import LoaderConfig
from nanopack.ledger import Ledger
from nanopack.packing import BestFitCrop, Stream


def make_batch(num_tokens, num_loss_tokens=0, last=False, lengths=()):
    empty = torch.empty(0)
    pieces = (tuple(Piece(i, 0, length, 0) for i, length in enumerate(lengths)),)
    return Batch(
        inputs=empty, targets=empty, weights=None, positions=None, doc_ids=None, cu_seqlens=None, step=0,
        num_loss_tokens=num_loss_tokens, num_tokens=num_tokens, weight_sum=0.0, max_seqlen=0, epoch=1, progress=0.5,
        last=last, word_pieces=pieces,
    )  # fmt: skip


def add_up(*batches, **config):
    totals = Totals(LoaderConfig(**{"batch_size": 2, "seq_len": 50, **config}))
    for batch in batches:
        totals.add(batch, seconds=0.5)
    return totals


def report(*batches, **config):
    return add_up(*batches, **config).report(Ledger().report())


def test_report_adds_batches_up():
    found = report(make_batch(90, 45), make_batch(70, 35), make_batch(40, 40, last=True))
    assert (found["batches"], found["tokens"], found["seconds"], found["tokens_per_s"]) == (3, 200, 1.5, 200 / 1.5)
    assert found["padding"] == pytest.approx(1 / 3)
    assert found["padding_without_last_batch"] == pytest.approx(0.2)
    assert found["in_loss"] == 0.6


def test_padding_without_the_last_batch_is_reported_only_at_the_end_of_the_data():
    assert report(make_batch(90), make_batch(90))["padding_without_last_batch"] is None
    assert report(make_batch(40, last=True))["padding_without_last_batch"] is None


def test_one_conversation_a_row_pads_each_to_a_row():
    # of 51 tokens, the most that fit into a row, 50 are inputs
    found = report(make_batch(71, lengths=(51, 21)))
    assert found["padding_one_a_row"] == pytest.approx(1 - 71 / 100)


@pytest.mark.parametrize("packing", [Stream(), BestFitCrop()], ids=str)
def test_packings_that_split_documents_do_not_report_the_padding_of_one_a_row(packing):
    assert report(make_batch(71, lengths=(51, 21)), packing=packing)["padding_one_a_row"] is None


def test_nothing_delivered_has_no_fractions():
    found = report()
    assert all(found[name] is None for name in ("padding", "padding_without_last_batch", "in_loss", "tokens_per_s"))


def test_rows_name_every_loss_that_is_not_zero():
    ledger = Ledger(
        conversations_read=17, conversations_packed=5, conversations_skipped=4, conversations_waiting=5,
        tokens_read=1500, tokens_emitted=1000, tokens_dropped=70, tokens_waiting=60,
    )  # fmt: skip
    ledger.conversations_dropped["untrained"] = 3
    ledger.tokens_cut.update(seq_len=200, max_document_tokens=100, crop=70)
    rows = add_up(make_batch(90, 45)).rows(ledger.report())
    assert rows[:10] == [
        ("conversations", "5", "packed"),
        ("", "3", "dropped: no token in the loss"),
        ("", "4", "skipped: invalid"),
        ("", "5", "read, still waiting for a row"),
        ("tokens", "1,000", "packed, of 1,500 read"),
        ("", "100", "cut: beyond max_document_tokens"),
        ("", "200", "cut: documents longer than a row"),
        ("", "70", "cut: to fill a row exactly"),
        ("", "70", "dropped with their conversations"),
        ("", "60", "read, still waiting for a row"),
    ]
    assert rows[-1] == ("ledger", "balanced", "every conversation and every token accounted for")


def test_rows_leave_out_what_did_not_happen():
    rows = add_up(make_batch(90, 45)).rows(Ledger().report())
    assert [name for name, *_ in rows] == [
        "conversations", "tokens", "batches", "tokens/s", "padding", "in the loss", "ledger"
    ]  # fmt: skip


def test_rows_report_what_does_not_balance():
    ledger = Ledger(conversations_read=2, tokens_read=9)
    rows = add_up(make_batch(90)).rows(ledger.report())
    assert rows[-2:] == [
        ("ledger", "UNBALANCED", "conversations read: 2 counted, 0 accounted for"),
        ("", "", "tokens read: 9 counted, 0 accounted for"),
    ]


def test_rows_without_speed_leave_it_out():
    totals, ledger = add_up(make_batch(90)), Ledger().report()
    assert ("tokens/s", "180", "") in totals.rows(ledger)
    assert "tokens/s" not in [name for name, *_ in totals.rows(ledger, speed=False)]
