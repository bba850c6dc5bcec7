"""The reference packer against examples worked out by hand, and against nanochat's three loops.

Everything else in the library is compared with the reference, so nothing here is computed by the library.
"""

from __future__ import annotations

import random
from functools import partial
from itertools import islice
from typing import Any

import nanochat_loops
import numpy as np
import pytest
from covering import pairs
from toy_batches import (
    ASSISTANT,
    ASSISTANT_END,
    BOS,
    NO,
    ONE,
    QUESTION,
    TALK,
    TOY,
    USER,
    USER_END,
    a,
    assistant,
    b,
    c,
    d,
    e,
    f,
    facts,
    g,
    h,
    inputs,
    only,
    read,
    take,
    targets,
    texts,
    u,
    user,
)

from nanopack.batch import Piece
from nanopack.packing import BestFit, BestFitCrop, BestFitPad, Stream
from nanopack.reference.batches import batches

# stream


def test_seed_example():
    batch = only(texts("abcdefgh"), packing="stream", batch_size=2, seq_len=4)
    assert batch.inputs.tolist() == [[BOS, a, b, c], [d, e, f, g]]
    assert batch.targets.tolist() == [[a, b, c, d], [e, f, g, h]]
    assert batch.word_pieces == ((Piece(0, 0, 5, 0),), (Piece(0, 0, 5, 4),))
    assert batch.pieces == ((Piece(0, 0, 4, 0),), (Piece(0, 0, 4, 4),))
    assert (batch.step, batch.num_tokens, batch.num_loss_tokens, batch.weight_sum) == (0, 8, 8, 8.0)


def test_stream_starts_after_the_last_target_of_the_batch_before():
    found = take(4, texts("abcdefgh"), packing="stream", batch_size=1, seq_len=2)
    assert inputs(found) == [[[BOS, a]], [[c, d]], [[f, g]], [[BOS, a]]]
    assert targets(found) == [[[a, b]], [[d, e]], [[g, h]], [[a, b]]]
    assert facts(found, "step", "epoch") == [(0, 2), (1, 2), (2, 2), (3, 3)]
    assert found[1].word_pieces == ((Piece(0, 0, 3, 3),),)


def test_overlapping_stream_makes_every_token_a_target_once():
    found = take(5, texts("abcdefgh"), packing=Stream(overlap=True), batch_size=1, seq_len=2)
    assert inputs(found) == [[[BOS, a]], [[b, c]], [[d, e]], [[f, g]], [[h, BOS]]]
    assert targets(found) == [[[a, b]], [[c, d]], [[e, f]], [[g, h]], [[BOS, a]]]
    assert found[4].word_pieces == ((Piece(0, 0, 1, 8), Piece(0, 1, 2, 0)),)
    assert facts(found, "epoch") == [(2,), (2,), (2,), (2,), (3,)]


def test_word_shared_by_two_rows_is_a_piece_of_both():
    arguments = {"packing": "stream", "batch_size": 2, "seq_len": 3}
    batch = only(texts("ab", "cde"), extras=("positions", "doc_ids", "cu_seqlens"), **arguments)
    assert batch.inputs.tolist() == [[BOS, a, b], [BOS, c, d]]
    assert batch.targets.tolist() == [[a, b, BOS], [c, d, e]]
    assert batch.word_pieces == ((Piece(0, 0, 3, 0), Piece(1, 3, 1, 0)), (Piece(1, 0, 4, 0),))
    assert batch.pieces == ((Piece(0, 0, 3, 0),), (Piece(1, 0, 3, 0),))
    assert batch.positions.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert batch.doc_ids.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert batch.cu_seqlens.tolist() == [0, 3, 6]


def test_document_goes_on_counting_in_the_next_row_but_its_positions_restart():
    arguments = {"packing": "stream", "batch_size": 2, "seq_len": 4}
    batch = only(texts("a", "bcdefg"), extras=("positions", "doc_ids"), **arguments)
    assert batch.inputs.tolist() == [[BOS, a, BOS, b], [c, d, e, f]]
    assert batch.word_pieces == ((Piece(0, 0, 2, 0), Piece(1, 2, 3, 0)), (Piece(1, 0, 5, 2),))
    assert batch.positions.tolist() == [[0, 1, 0, 1], [0, 1, 2, 3]]
    assert batch.doc_ids.tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    "text, overlap, last_inputs, last_targets, last_pieces",
    [
        ("abcde", False, [[e, BOS], [BOS, BOS]], [[NO, NO], [NO, NO]], [[(0, 0, 1, 5)], []]),
        ("abcde", True, [[d, e], [BOS, BOS]], [[e, NO], [NO, NO]], [[(0, 0, 2, 4)], []]),
        ("abcdefg", False, [[e, f], [g, BOS]], [[f, g], [NO, NO]], [[(0, 0, 3, 5)], [(0, 0, 1, 7)]]),
    ],
    ids=["one word left", "one word left after the carried one", "the last word is shared"],
)
def test_end_of_a_stream_is_padded(text, overlap, last_inputs, last_targets, last_pieces):
    found = take(None, texts(text), packing=Stream(overlap=overlap), batch_size=2, seq_len=2, epochs=1)
    assert inputs(found) == [[[BOS, a], [b, c]], last_inputs]
    assert targets(found) == [[[a, b], [c, d]], last_targets]
    assert [[tuple(piece) for piece in row] for row in found[1].word_pieces] == last_pieces
    assert found[1].num_tokens == sum(piece.length for row in found[1].pieces for piece in row)
    assert facts(found, "progress", "last", "epoch") == [(1.0, True, 1), (1.0, True, 1)]


def test_no_batch_is_made_of_the_carried_word_alone():
    found = take(None, texts("abcd"), packing=Stream(overlap=True), batch_size=2, seq_len=2, epochs=1)
    assert inputs(found) == [[[BOS, a], [b, c]]]


# shards: with one letter a text, and ONE, a batch is one conversation

FIVE = texts("a", "b", "c", "d", "e")


def test_ranks_read_their_shard_and_wrap_by_subtraction():
    zero = take(6, FIVE, rank=0, world_size=2, **ONE)
    assert targets(zero) == [[[a]], [[c]], [[e]], [[b]], [[d]], [[a]]]
    assert facts(zero, "epoch", "progress", "last") == [
        (1, 0.4, False), (1, 0.8, False), (2, 0.2, True), (2, 0.6, True), (3, 0.0, True), (3, 0.4, True),
    ]  # fmt: skip
    one = take(6, FIVE, rank=1, world_size=2, **ONE)
    assert targets(one) == [[[b]], [[d]], [[a]], [[c]], [[e]], [[b]]]
    assert facts(one, "epoch", "progress", "last") == [
        (1, 0.6, False), (2, 0.0, True), (2, 0.4, True), (2, 0.8, True), (3, 0.2, True), (3, 0.6, True),
    ]  # fmt: skip


def test_finite_epochs_give_every_conversation_that_often_over_all_ranks():
    zero = take(None, FIVE, rank=0, world_size=2, epochs=2, **ONE)
    one = take(None, FIVE, rank=1, world_size=2, epochs=2, **ONE)
    assert read(zero) == [[0], [2], [4], [1], [3]]
    assert read(one) == [[1], [3], [0], [2], [4]]
    ends = [False, False, False, False, True]
    assert facts(zero, "epoch") == [(1,), (1,), (2,), (2,), (2,)]
    assert facts(zero, "progress", "last") == list(zip([0.2, 0.4, 0.6, 0.8, 1.0], ends, strict=True))
    assert facts(one, "progress", "last") == list(zip([0.3, 0.5, 0.7, 0.9, 1.0], ends, strict=True))


def test_more_ranks_than_conversations():
    found = take(3, texts("a", "b"), rank=3, world_size=5, **ONE)
    assert read(found) == [[1], [0], [1]]
    assert facts(found, "epoch", "progress", "last") == [(2, 0.0, True), (3, 0.5, True), (4, 0.0, True)]
    shares = [take(None, texts("a", "b"), rank=rank, world_size=5, epochs=3, **ONE) for rank in range(5)]
    assert [read(share) for share in shares] == [[[0], [1]], [[1], []], [[0], []], [[1], []], [[0], []]]


# loss and weights


def test_loss_all_puts_every_token_in_the_loss():
    batch = only([TALK], packing="best_fit", batch_size=1, seq_len=6, loss="all")
    assert batch.targets.tolist() == [[USER, u, USER_END, ASSISTANT, a, ASSISTANT_END]]


def test_first_token_of_a_document_is_a_target_only_with_boundary_loss():
    arguments = {"packing": "stream", "batch_size": 1, "seq_len": 5}
    assert targets(take(1, texts("ab", "cd"), **arguments)) == [[[a, b, BOS, c, d]]]
    assert targets(take(1, texts("ab", "cd"), boundary_loss=False, **arguments)) == [[[a, b, NO, c, d]]]


def test_max_tokens_cuts_every_document():
    arguments = {"packing": "stream", "batch_size": 1, "seq_len": 4}
    found = take(2, texts("abcd", "ef"), max_document_tokens=3, loss_weights="conversation", **arguments)
    assert inputs(found) == [[[BOS, a, b, BOS]], [[f, BOS, a, b]]]
    assert found[1].word_pieces == ((Piece(1, 0, 1, 2), Piece(0, 1, 3, 0), Piece(1, 4, 1, 0)),)
    assert found[0].weights.tolist() == [[0.3333333432674408] * 4]


def test_token_weights_are_the_conversations_own():
    two = [{"text": "ab", "weight": 0.5}, {"text": "c", "weight": 2}]
    batch = only(two, batch_size=1, seq_len=4, packing=BestFit(window=2), loss_weights="token")
    assert batch.targets.tolist() == [[a, b, BOS, c]]
    assert batch.weights.tolist() == [[0.5, 0.5, 2.0, 2.0]]
    assert batch.weight_sum == 5.0
    assert (
        only([{"text": "ab", "weight": np.float16(0.5)}], batch_size=1, seq_len=2, loss_weights="token").weight_sum
        == 1.0
    )


def test_conversation_weights_are_shared_among_its_tokens_in_the_loss():
    two = [{"text": "ab", "weight": 0.5}, {"text": "c", "weight": 2}]
    batch = only(two, batch_size=1, seq_len=4, packing=BestFit(window=2), loss_weights="conversation")
    # A half among three tokens, one of them no target here: a weight does not depend on the place in the row.
    assert batch.weights.tolist() == [[0.1666666716337204, 0.1666666716337204, 1.0, 1.0]]
    assert batch.weight_sum == 2.333333343267441
    talk = only([TALK], batch_size=1, seq_len=6, loss_weights="conversation")
    assert talk.weights.tolist() == [[0, 0, 0, 0, 0.5, 0.5]]


def test_without_weights_the_sum_counts_targets():
    batch = only([{"text": "ab", "weight": 0.5}], packing="pad", batch_size=1, seq_len=4)
    assert batch.weights is None
    assert batch.weight_sum == 2.0


def test_weight_sum_is_exact():
    two = [{"text": "a", "weight": 2.0**60}, {"text": "b" * 255}]
    batch = only(two, packing="stream", batch_size=1, seq_len=257, loss_weights="token")
    # Added one by one, each of the 256 ones would be lost in 2**60.
    assert batch.weight_sum == 2.0**60 + 256


# what is dropped, what is too much


def test_too_many_pieces_is_an_error_that_names_the_argument():
    two = texts("abcde", "a")
    arguments: dict[str, Any] = {"packing": "pad", "batch_size": 2, "seq_len": 5, "max_pieces": 1}
    with pytest.raises(ValueError, match=r"max_pieces=1: batch 0 has 3 .* for 2\. Pass max_pieces=2 or"):
        take(1, two, extras=("cu_seqlens",), **arguments)
    assert only(two, **arguments).cu_seqlens is None
    enough = only(two, extras=("cu_seqlens",), **{**arguments, "max_pieces": 2})
    assert enough.cu_seqlens.tolist() == [0, 5, 7, 10, 10]


@pytest.mark.parametrize(
    "packing, loss, conversations, progress",
    [
        (BestFit(window=1), "assistant", [1, 1], 2.0),
        ("pad", "assistant", [1], 1.0),
        (BestFitPad(window=1), "assistant", [0], 0.5),
        (BestFitCrop(window=1), "assistant", [0], 0.5),
        (BestFit(window=1), "all", [0], 0.5),
        ("pad", "all", [0], 0.5),
    ],
)
def test_document_without_a_token_in_the_loss_is_dropped_by_our_own_packings(packing, loss, conversations, progress):
    batch = only([QUESTION, {"text": "a"}], packing=packing, loss=loss, batch_size=1, seq_len=3)
    assert read([batch]) == [conversations]
    assert batch.progress == progress


def test_stream_keeps_documents_without_a_token_in_the_loss():
    batch = only([QUESTION], packing="stream", batch_size=1, seq_len=3)
    assert batch.inputs.tolist() == [[BOS, USER, u]]
    assert (batch.num_loss_tokens, batch.weight_sum) == (0, 0.0)


def test_bits_are_counted_after_the_boundary_is_cleared():
    arguments = {"packing": "pad", "batch_size": 1, "seq_len": 1, "boundary_loss": False, "epochs": 1}
    assert read(take(None, texts("", "a"), **arguments)) == [[1]]
    assert read(take(None, texts("", "a"), loss="all", **arguments)) == [[0], [1]]


def test_endless_pass_without_a_document_is_an_error():
    with pytest.raises(ValueError, match="has no token in the loss"):
        take(1, [QUESTION], batch_size=1, seq_len=3)
    assert take(None, [QUESTION], batch_size=1, seq_len=3, epochs=2) == []


# nanochat's loops, written down again in nanochat_loops.py: what its generators give, ours must give


def random_talks(seed: int, n: int, most: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)

    def say() -> str:
        return "".join(rng.choices("abcdefgh", k=rng.randint(0, most)))

    return [
        {"messages": [(user, assistant)[i % 2](say()) for i in range(rng.randint(1, 4))]}
        if rng.random() < 0.7
        else {"text": say()}
        for _ in range(n)
    ]


# Each loop with its settings, ours, and how long a text may be: in SFT, every document must fit a row.
CASES: dict[str, tuple[Any, dict[str, int], dict[str, Any], int]] = {
    "midtraining": (nanochat_loops.midtraining, {}, {"packing": "stream", "loss": "all"}, 30),
    "sft": (nanochat_loops.sft, {"buffer_size": 10}, {"packing": BestFitPad(window=10)}, 4),
    "base": (
        nanochat_loops.base,
        {"buffer_size": 12, "chunk": 5},
        {"packing": BestFitCrop(window=12, refill=5), "loss": "all"},
        30,
    ),
}


@pytest.mark.parametrize(("name", "n", "rank"), pairs(list(CASES), [4, 37], range(3)))
def test_batches_are_nanochats(name, n, rank):
    loop, settings, arguments, most = CASES[name]
    dataset = random_talks(seed=n, n=n, most=most)
    size = {"batch_size": 3, "seq_len": 31, "ignore_index": -1}
    ours = batches(dataset, TOY, rank=rank, world_size=3, **size, **arguments)
    theirs = loop(dataset, partial(nanochat_loops.render, TOY), 3, 31, rank, 3, **settings)
    for made, batch in islice(zip(theirs, ours, strict=False), 300):
        given = (batch.inputs.tolist(), batch.targets.tolist(), batch.progress, batch.last, batch.epoch)
        assert given == made, f"batch {batch.step}"
