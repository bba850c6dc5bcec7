"""With document_align every document takes a multiple of n words in its row, and counts only its own tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopack.packing import BestFit, BestFitPad, Pad, simulate
from nanopack.packing.align import AlignedPacker, build

CAPACITY = 49
packings = st.sampled_from([BestFit(window=4, max_age=3), BestFitPad(window=3), Pad()])
documents = st.lists(st.integers(1, CAPACITY), max_size=60)


def reader(lengths):
    items = iter([(range(len(lengths)), lengths)] if lengths else [])
    return lambda: next(items, None)


def packer_of(packing, lengths, align, batch_size=2):
    return build(packing, reader(lengths), batch_size=batch_size, seq_len=CAPACITY - 1, align=align)


def all_rows(packer):
    while (rows := packer.next_rows()).num_rows:
        yield from rows.runs()


@given(packings, documents, st.sampled_from([2, 3, 4, 8, 16, 48]))
def test_the_documents_of_a_row_fit_with_their_tails_and_each_is_placed_once_and_whole(packing, lengths, align):
    packer = packer_of(packing, lengths, align)
    rows = list(all_rows(packer))
    for row in rows:
        taken = [min(math.ceil(run.length / align) * align, CAPACITY) for run in row]
        assert sum(taken) <= CAPACITY
    placed = sorted((run.document, run.length) for row in rows for run in row)
    assert placed == list(enumerate(lengths))
    assert (packer.emitted, packer.packed, packer.cropped) == (sum(lengths), len(lengths), 0)
    assert packer.waiting() == [] and packer.waiting_tokens == packer.waiting_documents == 0


@given(packings, documents, st.sampled_from([2, 3, 8]))
def test_rows_are_those_of_documents_that_are_as_long_as_what_they_take(packing, lengths, align):
    longer = [min(math.ceil(length / align) * align, CAPACITY) for length in lengths]
    aligned = [[run.document for run in row] for row in all_rows(packer_of(packing, lengths, align))]
    assert aligned == [[run.document for run in row] for row in all_rows(packer_of(packing, longer, 1))]


@given(packings, documents, st.sampled_from([2, 3, 8]), st.integers(0, 20))
def test_a_packer_resumes_from_its_state(packing, lengths, align, stop):
    whole, begun = packer_of(packing, lengths, align), packer_of(packing, lengths, align)
    for _ in range(stop):
        whole.next_rows(), begun.next_rows()
    waiting = dict(begun.remaining())
    assert sum(waiting.values()) == begun.waiting_tokens
    taken = begun.packed + begun.waiting_documents
    rest = iter([(range(taken, len(lengths)), lengths[taken:])] if lengths[taken:] else [])
    resumed = AlignedPacker(packing, lambda: next(rest, None), batch_size=2, seq_len=CAPACITY - 1, align=align)
    resumed.restore(begun.state(), [(document, lengths[document]) for document in begun.waiting()])
    assert list(all_rows(resumed)) == list(all_rows(whole))
    assert resumed.emitted == whole.emitted == sum(lengths)


def test_without_alignment_the_packer_is_the_packings_own():
    assert type(packer_of(BestFit(), [3], 1)) is type(BestFit().build(reader([3]), batch_size=2, seq_len=48))


@pytest.mark.parametrize("align", [1, 16, 128])
def test_a_simulation_counts_tails_as_padding(align):
    lengths = [100, 28, 500, 3, 129] * 40
    found = simulate(BestFit(), lengths, 1024, align=align)
    rounded = np.ceil(np.array(lengths) / align) * align
    assert found.tokens == sum(lengths) and found.rows >= rounded.sum() / 1025
