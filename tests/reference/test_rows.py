"""The reference packer's packings by rows, against examples worked out by hand."""

from __future__ import annotations

import pytest
from toy_batches import (
    BOS,
    NO,
    a,
    b,
    c,
    d,
    e,
    facts,
    inputs,
    only,
    read,
    take,
    targets,
    texts,
)

from nanopack.batch import Piece
from nanopack.packing import BestFit, BestFitCrop, BestFitPad

# packings by rows


def test_best_fit_takes_the_longest_that_fits_and_the_first_come_among_equals():
    four = texts("aa", "bbb", "cc", "ddd")
    found = take(3, four, packing=BestFitPad(window=4), batch_size=1, seq_len=6)
    assert inputs(found)[:2] == [[[BOS, b, b, b, BOS, a]], [[BOS, d, d, d, BOS, c]]]
    assert targets(found)[:2] == [[[b, b, b, BOS, a, a]], [[d, d, d, BOS, c, c]]]
    assert read(found)[:2] == [[1, 0], [3, 2]]
    # The list is filled up before each choice: four, then one more before every choice after that.
    assert facts(found, "epoch", "progress", "last") == [(2, 0.5, False), (2, 1.0, True), (3, 1.5, True)]


def test_padding_is_bos_outside_the_loss_and_one_piece_of_its_own():
    batch = only(
        texts("aaa", "bb"), packing=BestFitPad(window=2), batch_size=2, seq_len=5, epochs=1,
        loss_weights="token", extras=("positions", "doc_ids", "cu_seqlens"), max_pieces=3, ignore_index=-1,
    )  # fmt: skip
    assert batch.inputs.tolist() == [[BOS, a, a, a, BOS], [BOS, b, b, BOS, BOS]]
    assert batch.targets.tolist() == [[a, a, a, -1, -1], [b, b, -1, -1, -1]]
    assert batch.weights.tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 1]]
    assert batch.doc_ids.tolist() == [[0, 0, 0, 0, -1], [0, 0, 0, -1, -1]]
    assert batch.cu_seqlens.tolist() == [0, 4, 5, 8, 10, 10, 10]
    assert batch.word_pieces == batch.pieces == ((Piece(0, 0, 4, 0),), (Piece(1, 0, 3, 0),))
    assert (batch.num_tokens, batch.num_loss_tokens, batch.max_seqlen) == (7, 5, 4)


def test_row_of_exactly_t_words_has_no_padding_piece():
    batch = only(texts("ab"), packing="pad", batch_size=1, seq_len=3, extras=("doc_ids", "cu_seqlens"))
    assert batch.targets.tolist() == [[a, b, NO]]
    assert batch.doc_ids.tolist() == [[0, 0, 0]]
    assert batch.cu_seqlens.tolist() == [0, 3]


def test_max_seqlen_counts_padding():
    assert only(texts("a"), packing="pad", batch_size=1, seq_len=9).max_seqlen == 7


def test_crop_cuts_the_shortest_waiting_document_and_the_first_among_equals():
    three = texts("abcd", "efg", "hij")
    found = take(2, three, packing=BestFitCrop(window=3), batch_size=1, seq_len=6, loss_weights="conversation")
    assert found[0].inputs.tolist() == [[BOS, a, b, c, d, BOS]]
    assert found[0].targets.tolist() == [[a, b, c, d, BOS, e]]
    assert found[0].word_pieces == ((Piece(0, 0, 5, 0), Piece(1, 5, 2, 0)),)
    # Of the document that was cut two tokens were placed, so each weighs a half; float32 has no fifth.
    assert found[0].weights.tolist() == [[0.20000000298023224] * 4 + [0.5, 0.5]]
    assert found[0].weight_sum == 1.800000011920929
    # What was cut off is gone: the next row takes conversation 0 again, then cuts conversation 2.
    assert read(found) == [[0, 1], [0, 2]]
    assert facts(found, "progress", "last") == [(2 / 3, False), (4 / 3, True)]


def test_crop_deals_with_a_document_longer_than_a_row():
    found = take(2, texts("abcdefgh"), packing=BestFitCrop(window=1), batch_size=1, seq_len=3)
    assert targets(found) == [[[a, b, c]], [[a, b, c]]]


def test_crop_pads_only_when_nothing_waits():
    arguments = {"packing": BestFitCrop(window=2), "epochs": 1}
    found = take(None, texts("abc", "de"), batch_size=2, seq_len=4, **arguments)
    assert inputs(found) == [[[BOS, a, b, c], [BOS, BOS, BOS, BOS]]]
    assert targets(found) == [[[a, b, c, BOS], [NO, NO, NO, NO]]]
    found = take(None, texts("abc"), batch_size=1, seq_len=5, **arguments)
    assert targets(found) == [[[a, b, c, NO, NO]]]


@pytest.mark.parametrize("packing", ["best_fit", "best_fit_pad", "pad"])
def test_document_longer_than_a_row_is_cut_before_it_waits(packing):
    found = take(2, texts("abcdef"), packing=packing, batch_size=1, seq_len=3, loss_weights="conversation")
    assert inputs(found) == [[[BOS, a, b]]] * 2
    assert targets(found) == [[[a, b, c]]] * 2
    assert found[0].word_pieces == ((Piece(0, 0, 4, 0),),)
    assert found[0].pieces == ((Piece(0, 0, 3, 0),),)
    assert found[0].weights.tolist() == [[0.25, 0.25, 0.25]]


def test_pad_gives_each_row_one_document():
    found = take(2, texts("a", "bb", "c"), packing="pad", batch_size=2, seq_len=5)
    assert read(found) == [[0, 1], [2, 0]]
    assert facts(found, "epoch", "progress", "last") == [(1, 2 / 3, False), (2, 4 / 3, True)]


STARVING = texts("a", "bbb", "ccc", "ddd")


@pytest.mark.parametrize(
    "packing, rows",
    [
        (BestFit(window=2, max_age=2), [[1], [2], [0, 0], [3], [1], [2], [3], [1]]),
        (BestFit(window=2, max_age=3), [[1], [2], [3], [0, 0]]),
        (BestFit(window=2), [[1], [2], [3], [0, 0]]),
        (BestFit(window=2, max_age=1), [[1], [0], [2], [3]]),
        (BestFitPad(window=2), [[1], [2], [3], [0, 0]]),
    ],
)
def test_document_that_waited_max_age_rows_opens_the_next_one(packing, rows):
    found = take(len(rows), STARVING, packing=packing, batch_size=1, seq_len=3)
    assert read(found) == rows


def test_only_one_document_a_row_is_placed_for_its_age():
    four = texts("a", "b", "cccc", "dd")
    found = take(2, four, packing=BestFit(window=3, max_age=1), batch_size=1, seq_len=4)
    # Conversation 1 has waited as long as 0, but 3 is longer and fits.
    assert read(found) == [[2], [0, 3]]


def test_refill_reads_in_chunks():
    three = texts("a", "b", "ccc")
    one = take(2, three, packing=BestFitCrop(window=2, refill=1), batch_size=1, seq_len=3)
    assert read(one) == [[0, 1], [2]]
    assert facts(one, "epoch") == [(2,), (2,)]
    chunks = take(2, three, packing=BestFitCrop(window=2, refill=3), batch_size=1, seq_len=3)
    assert read(chunks) == [[2], [0, 1]]
    assert facts(chunks, "epoch") == [(2,), (3,)]


def test_end_of_the_data_is_flushed_into_padded_rows():
    found = take(None, texts("a", "b", "c"), packing="best_fit", batch_size=2, seq_len=1, epochs=1)
    assert targets(found) == [[[a], [b]], [[c], [NO]]]
    assert inputs(found) == [[[BOS], [BOS]], [[BOS], [BOS]]]
    assert found[1].word_pieces == ((Piece(2, 0, 2, 0),), ())
    assert facts(found, "step", "num_tokens", "progress", "last") == [(0, 2, 2 / 3, False), (1, 1, 1.0, True)]
