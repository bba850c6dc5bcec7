"""Statistics of lengths that can be checked by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopack.cli.lengths import Lengths, bin_edges, measure
from nanopack.config import LoaderConfig
from nanopack.conversations.records import open_conversations
from nanopack.packing import BestFit, BestFitCrop, Stream
from nanopack.render.renderer import Renderer
from nanopack.tokenizers.tokenizer import load_tokenizer


def make_lengths(tokens):
    tokens = np.array(tokens, np.int64)
    return Lengths(np.arange(len(tokens)) + 100, tokens, tokens // 2)


def where(conversation):
    return f"chats.jsonl:{conversation + 1}"


def test_summary_of_eleven_documents():
    lengths = make_lengths([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110])
    assert lengths.summary(95, where) == {
        "count": 11,
        "tokens": 660,
        "in_loss": 330,
        "mean": 60.0,
        "median": 60.0,
        "p90": 100.0,
        "p99": 109.0,
        "max": 110,
        "longest": "chats.jsonl:111",
        "longer_than_row": 2,
        "tokens_beyond_row": 20,
    }


def test_a_document_as_long_as_a_row_is_not_too_long():
    assert make_lengths([96, 95]).summary(95, where)["longer_than_row"] == 1
    assert make_lengths([95]).histogram(95)[-1].documents == 0


def test_no_document_has_no_statistics():
    summary = make_lengths([]).summary(95, where)
    assert (summary["count"], summary["tokens"], summary["median"], summary["longest"]) == (0, 0, None, None)
    assert [name for name, *_ in make_lengths([]).rows(LoaderConfig(), where)] == ["documents", "tokens"]


@given(st.lists(st.integers(1, 5000)), st.integers(1, 3000))
def test_every_document_lies_in_one_bin(tokens, row_tokens):
    bins = make_lengths(tokens).histogram(row_tokens)
    assert sum(found.documents for found in bins) == len(tokens)
    assert sum(found.tokens for found in bins) == sum(tokens)
    assert bins[0].least == 1 and bins[-1].most is None and bins[-1].least == row_tokens + 1
    assert all(left.most + 1 == right.least for left, right in itertools.pairwise(bins))


@pytest.mark.parametrize(
    ("row_tokens", "edges"),
    [(2, [2]), (33, [16, 33]), (101, [25, 50, 101]), (2049, [16, 32, 64, 128, 256, 512, 1024, 2049])],
)
def test_bins_are_halves_of_a_row(row_tokens, edges):
    assert bin_edges(row_tokens) == edges


@pytest.mark.parametrize(
    ("packing", "fate"), [(BestFit(), "are cut"), (Stream(), "next row"), (BestFitCrop(), "may be cropped")]
)
def test_rows_say_what_becomes_of_long_documents(packing, fate):
    *_, (_, number, note) = make_lengths([100, 30]).rows(LoaderConfig(seq_len=50, packing=packing), where)
    assert number == "49" and fate in note
    name, number, note = make_lengths([30]).rows(LoaderConfig(seq_len=50, packing=packing), where)[-1]
    assert (name, number) == ("too long", "0")


def test_documents_are_measured_whole_and_bad_ones_left_out():
    records = [
        {"text": "Hello there"},
        {"text": 5},
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}],
    ]
    render = Renderer(load_tokenizer("chat32k"), "nanochat")
    found = measure(open_conversations(records), [2, 1, 0], render)
    # bos, start, "hi", end, start, "yo", end; "yo" and its end are in the loss
    assert found.conversations.tolist() == [2, 0]
    assert found.tokens.tolist() == [7 + len(load_tokenizer("chat32k").encode("yo")) - 1, 3]
    assert found.in_loss.tolist() == [len(load_tokenizer("chat32k").encode("yo")) + 1, 3]
