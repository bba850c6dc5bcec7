"""The reference packer against examples worked out by hand, and against nanochat's three loops.

Everything else in the library is compared with the reference, so nothing here is computed by the library.
"""

from __future__ import annotations

import gzip
import random
from functools import partial
from itertools import islice
from typing import Any

import nanochat_loops
import numpy as np
import pytest
from data_sets import byte_tokenizer

from nanopack.batch import Batch, Piece
from nanopack.errors import ConversationError
from nanopack.packing import BestFit, BestFitCrop, BestFitPad, Stream
from nanopack.reference.batches import batches

NAMES = ["bos", "user_start", "user_end", "assistant_start", "assistant_end"]
NAMES += ["python_start", "python_end", "output_start", "output_end", "im_start", "im_end"]
NAMES += ["start_header_id", "end_header_id", "eot_id", "begin_of_text"]
# Every byte is a token, so that ids can be read: a is 97.
TOY = byte_tokenizer(specials=[f"<|{name}|>" for name in NAMES])
BOS, USER, USER_END, ASSISTANT, ASSISTANT_END = range(256, 261)
PYTHON, PYTHON_END, OUTPUT, OUTPUT_END, START, END = range(261, 267)
HEADER, HEADER_END, EOT = range(267, 270)
a, b, c, d, e, f, g, h = range(97, 105)
NL, o, p, q, s, t, u = 10, 111, 112, 113, 115, 116, 117
NO = -100


def user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


def assistant(content: object) -> dict[str, object]:
    return {"role": "assistant", "content": content}


TALK = {"messages": [user("u"), assistant("a")]}
QUESTION = {"messages": [user("u")]}


def texts(*strings: str) -> list[dict[str, Any]]:
    return [{"text": string} for string in strings]


def take(count: int | None, conversations: Any, **arguments: Any) -> list[Batch]:
    return list(islice(batches(conversations, TOY, **arguments), count))


def only(conversations: Any, **arguments: Any) -> Batch:
    (batch,) = take(1, conversations, **arguments)
    return batch


def inputs(found: list[Batch]) -> list[Any]:
    return [batch.inputs.tolist() for batch in found]


def targets(found: list[Batch]) -> list[Any]:
    return [batch.targets.tolist() for batch in found]


def facts(found: list[Batch], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(getattr(batch, name) for name in names) for batch in found]


def read(found: list[Batch]) -> list[list[int]]:
    """For each batch the conversations of its words."""
    return [[piece.conversation for row in batch.word_pieces for piece in row] for batch in found]


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


# share: with one letter a text, B = 1 and T = 1 a batch of the stream is one conversation

FIVE = texts("a", "b", "c", "d", "e")
ONE = {"packing": "stream", "batch_size": 1, "seq_len": 1}


def test_ranks_read_their_share_and_wrap_by_subtraction():
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


# packings by rows


def test_best_fit_takes_the_longest_that_fits_and_the_first_come_among_equals():
    four = texts("aa", "bbb", "cc", "ddd")
    found = take(3, four, packing=BestFitPad(window=4), batch_size=1, seq_len=6)
    assert inputs(found)[:2] == [[[BOS, b, b, b, BOS, a]], [[BOS, d, d, d, BOS, c]]]
    assert targets(found)[:2] == [[[b, b, b, BOS, a, a]], [[d, d, d, BOS, c, c]]]
    assert read(found)[:2] == [[1, 0], [3, 2]]
    # The list is filled up before each choice: four, then one more before every choice after that.
    assert facts(found, "epoch", "progress", "last") == [(2, 0.5, False), (2, 1.0, True), (3, 1.5, True)]


def test_padding_is_bos_untrained_and_one_piece_of_its_own():
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


# rendering


def test_conversation_with_parts():
    said = [("text", "t"), ("python", "p"), ("python_output", "o")]
    parts = [{"type": kind, "text": text} for kind, text in said]
    batch = only([[user("q"), assistant(parts)]], packing="pad", batch_size=1, seq_len=12)
    assert batch.inputs.tolist() == [
        [BOS, USER, q, USER_END, ASSISTANT, t, PYTHON, p, PYTHON_END, OUTPUT, o, OUTPUT_END],
    ]
    assert batch.targets.tolist() == [[NO, NO, NO, NO, t, PYTHON, p, PYTHON_END, NO, NO, NO, ASSISTANT_END]]
    assert batch.num_loss_tokens == 5


SYSTEM = {"messages": [{"role": "system", "content": "s"}, *TALK["messages"]]}


def test_system_message_is_put_before_the_first_question():
    batch = only([SYSTEM], packing="pad", batch_size=1, seq_len=9)
    assert batch.inputs.tolist() == [[BOS, USER, s, NL, NL, u, USER_END, ASSISTANT, a]]
    assert batch.targets.tolist() == [[NO, NO, NO, NO, NO, NO, NO, a, ASSISTANT_END]]


def test_chatml():
    batch = only([SYSTEM], packing="pad", batch_size=1, seq_len=34, template="chatml")
    system = [START, *b"system", NL, s, END, NL]
    question = [START, *b"user", NL, u, END, NL]
    answer = [START, *b"assistant", NL, a, END]
    assert batch.inputs.tolist() == [[BOS, *system, *question, *answer]]
    # Of the 35 tokens the last is a new line that is not in the loss.
    assert batch.targets.tolist() == [[NO] * 31 + [a, END, NO]]


def test_llama3():
    spaced = [{"role": "system", "content": " s\n"}, user("\n\nu"), assistant(" a ")]
    batch = only([spaced], packing="pad", batch_size=1, seq_len=38, template="llama3")
    system = [HEADER, *b"system", HEADER_END, NL, NL, s, EOT]
    question = [HEADER, *b"user", HEADER_END, NL, NL, u, EOT]
    answer = [HEADER, *b"assistant", HEADER_END, NL, NL, a, EOT]
    assert batch.inputs.tolist() == [[BOS, *system, *question, *answer]]
    assert batch.targets.tolist() == [[NO] * 35 + [a, EOT, NO]]


@pytest.mark.parametrize(
    ("template", "before", "end"),
    [
        ("chatml", [START, *b"tool", NL], [END, NL]),
        ("llama3", [HEADER, *b"ipython", HEADER_END, NL, NL], [EOT]),
    ],
)
@pytest.mark.parametrize("role", ["tool", "ipython"])
def test_what_a_tool_gave_back_is_not_trained(template, before, end, role):
    talk = {"messages": [{"role": role, "content": "o"}]}
    seq_len = len(before) + 2 + len(end)
    batch = only([talk], packing="best_fit_pad", batch_size=1, seq_len=seq_len, template=template)
    assert batch.inputs.tolist() == [[BOS, *before, o, *end]]
    assert batch.num_loss_tokens == 0


def test_a_function_call_of_sharegpt_is_the_assistants_and_an_observation_the_tools():
    said = [("function_call", "a"), ("observation", "o")]
    talk = {"conversations": [{"from": role, "value": text} for role, text in said]}
    call, result = [START, *b"assistant", NL, a, END, NL], [START, *b"tool", NL, o, END]
    batch = only([talk], packing="pad", batch_size=1, seq_len=23, template="chatml")
    assert batch.inputs.tolist() == [[BOS, *call, *result]]
    assert batch.targets.tolist() == [[NO] * 11 + [a, END] + [NO] * 10]


def test_nanochat_has_no_tool():
    with pytest.raises(ConversationError, match=r"message 1: role is 'tool'"):
        take(1, [[user("q"), {"role": "tool", "content": "o"}]], batch_size=1, seq_len=9)


def test_text_that_looks_like_a_special_token_stays_text():
    batch = only(texts("<|bos|>"), packing="pad", batch_size=1, seq_len=7)
    assert batch.targets.tolist() == [[60, 124, 98, 111, 115, 124, 62]]


@pytest.mark.parametrize(
    "record",
    [
        TALK["messages"],
        {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
        {"messages": TALK["messages"], "conversations": None, "text": None, "weight": None, "source": "x"},
    ],
    ids=["bare list", "ShareGPT", "what is null is absent"],
)
def test_other_shapes_give_the_same_batch(record):
    batch = only([record], packing="pad", batch_size=1, seq_len=6)
    assert batch.inputs.tolist() == [[BOS, USER, u, USER_END, ASSISTANT, a]]
    assert batch.targets.tolist() == [[NO, NO, NO, NO, a, ASSISTANT_END]]


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


def test_conversation_weights_are_shared_among_its_trained_tokens():
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


# files and bad input


def test_files_are_read_in_order_without_blank_lines(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n\n  \n{"text": "c"}')
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n')
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "d"}\n'))
    files = [tmp_path / "d.jsonl.gz", str(tmp_path / "*.jsonl")]
    assert targets(take(None, files, epochs=1, **ONE)) == [[[d]], [[a]], [[b]], [[c]]]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "two.parquet"
    rows = [{**TALK, "text": None, "weight": None}, {"messages": None, "text": "a", "weight": 0.5}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = take(None, str(path), packing="pad", batch_size=2, seq_len=6, loss_weights="token", epochs=1)
    assert targets(found) == [[[NO, NO, NO, NO, a, ASSISTANT_END], [a, NO, NO, NO, NO, NO]]]
    assert found[0].weights.tolist() == [[0, 0, 0, 0, 1, 1], [0.5, 0, 0, 0, 0, 0]]


BAD = {
    "not a dict": 3,
    "a string": "hello",
    "no shape": {"prompt": "x"},
    "two shapes": {"text": "x", "messages": [user("x")]},
    "text is no string": {"text": 3},
    "messages is no list": {"messages": "x"},
    "no messages": {"messages": []},
    "message is no dict": ["x"],
    "message without content": [{"role": "user"}],
    "content is null": [user(None)],
    "first is the assistant": [assistant("x")],
    "user twice": [user("x"), user("y")],
    "unknown role": [user("x"), {"role": "tool", "content": "y"}],
    "role is no string": [{"role": 1, "content": "y"}],
    "a judge": [{"role": "judge", "content": "x"}],
    "system alone": [{"role": "system", "content": "x"}],
    "system before the assistant": [{"role": "system", "content": "x"}, assistant("y")],
    "system in the middle": [user("x"), {"role": "system", "content": "y"}],
    "system with code": [{"role": "system", "content": [{"type": "python", "text": "x"}]}, user("x")],
    "user with code": [user([{"type": "text", "text": "x"}, {"type": "python", "text": "x"}])],
    "unknown part": [user("x"), assistant([{"type": "image", "text": "x"}])],
    "part without text": [user("x"), assistant([{"type": "text"}])],
    "part is a string": [user("x"), assistant(["x"])],
    "role and from": {"conversations": [user("x") | {"from": "human"}]},
    "ShareGPT from nobody": {"conversations": [{"from": "tool", "value": "x"}]},
    "weight below 0": {"text": "x", "weight": -1},
    "weight is not a number": {"text": "x", "weight": float("nan")},
    "weight is infinite": {"text": "x", "weight": float("inf")},
    "weight beyond float32": {"text": "x", "weight": 1e39},
    "weight is a bool": {"text": "x", "weight": True},
    "weight is a string": {"text": "x", "weight": "1"},
}


@pytest.mark.parametrize("record", BAD.values(), ids=BAD.keys())
def test_bad_conversation_is_named_or_skipped(record):
    three = [{"text": "a"}, record, {"text": "b"}]
    with pytest.raises(ConversationError, match=r"^conversation 1, .*\. Fix it or pass on_error=\"skip\"\.$"):
        take(None, three, epochs=1, **ONE)
    found = take(None, three, epochs=1, on_error="skip", **ONE)
    assert read(found) == [[0], [2]]
    rows = take(None, three, packing=BestFit(window=1), batch_size=1, seq_len=1, epochs=1, on_error="skip")
    # Skipped is consumed.
    assert facts(rows, "progress", "last") == [(1 / 3, False), (1.0, True)]


def test_parts_and_unknown_roles_are_bad_in_chatml():
    for messages in ([assistant([{"type": "python", "text": "x"}])], [{"role": "judge", "content": "x"}]):
        with pytest.raises(ConversationError, match="message 0"):
            take(1, [messages], template="chatml", batch_size=1, seq_len=9)


BROKEN = {
    "JSON": b'{"text": "a"',
    "UTF-8": b'{"text": "\xff"}',
    "UTF-16": '{"text": "a"}'.encode("utf-16-le"),
}


@pytest.mark.parametrize("line", BROKEN.values(), ids=BROKEN.keys())
def test_broken_line_is_named_or_skipped(tmp_path, line):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    with pytest.raises(ConversationError) as error:
        take(None, path, epochs=1, **ONE)
    assert str(error.value).startswith(f"{path}:3, ")
    assert targets(take(None, path, epochs=1, on_error="skip", **ONE)) == [[[a]], [[b]]]


class Exhausted:
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> object:
        raise MemoryError


def test_lack_of_memory_is_not_a_bad_conversation():
    with pytest.raises(MemoryError):
        take(1, Exhausted(), on_error="skip", batch_size=1, seq_len=1)


@pytest.mark.parametrize("name", ["packing", "loss", "loss_weights", "template", "on_error"])
def test_unknown_choice_is_refused_before_the_first_batch(name):
    with pytest.raises(ValueError, match=f"{name}='none'"):
        batches(texts("a"), TOY, **{name: "none"})
    with pytest.raises(ValueError, match="extras='length'"):
        batches(texts("a"), TOY, extras=["positions", "length"])


COUNTS = [
    "batch_size",
    "seq_len",
    "world_size",
    "max_pieces",
    "max_document_tokens",
    "epochs",
]


@pytest.mark.parametrize("name", COUNTS)
def test_impossible_number_is_refused_before_the_first_batch(name):
    for value in (0, -1, 1.0, True, "1"):
        with pytest.raises(ValueError, match=f"^{name}={value!r} is impossible"):
            batches(texts("a"), TOY, **{name: value})


def test_rank_outside_the_world_and_room_for_too_many_pieces_are_refused():
    for rank in (-1, 2, 0.0, None):
        with pytest.raises(ValueError, match=f"^rank={rank} of world_size=2 is impossible"):
            batches(texts("a"), TOY, rank=rank, world_size=2)
    with pytest.raises(ValueError, match=r"^max_pieces=9 is more than seq_len=8"):
        batches(texts("a"), TOY, seq_len=8, max_pieces=9)


def test_tokenizer_without_a_special_token_is_not_taken_for_bad_conversations():
    bare = byte_tokenizer(specials=["<|bos|>"])
    mixed = [{"text": "a"}, TALK, {"text": "b"}]
    found = batches(mixed, bare, on_error="skip", **ONE)
    assert next(found).targets.tolist() == [[a]]
    with pytest.raises(ValueError, match=r"^conversation 1: template='nanochat' needs .*user_start"):
        next(found)


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


@pytest.mark.parametrize("rank", range(3))
@pytest.mark.parametrize("n", [4, 37])
@pytest.mark.parametrize("name", CASES)
def test_batches_are_nanochats(name, n, rank):
    loop, settings, arguments, most = CASES[name]
    dataset = random_talks(seed=n, n=n, most=most)
    size = {"batch_size": 3, "seq_len": 31, "ignore_index": -1}
    ours = batches(dataset, TOY, rank=rank, world_size=3, **size, **arguments)
    theirs = loop(dataset, partial(nanochat_loops.render, TOY), 3, 31, rank, 3, **settings)
    for made, batch in islice(zip(theirs, ours, strict=False), 300):
        given = (batch.inputs.tolist(), batch.targets.tolist(), batch.progress, batch.last, batch.epoch)
        assert given == made, f"batch {batch.step}"
