"""The packings, compared with plain scans over lists and with what each of them promises."""

from __future__ import annotations

from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopack.packing import BestFit, BestFitCrop, BestFitPad, Pad, Stream, as_packing, simulate
from nanopack.packing.best_fit import BestFitPacker
from nanopack.packing.packings import PACKINGS, PackingName
from nanopack.packing.rows import Packer, Run

BY_ROWS = [packing for packing in PACKINGS if packing != "stream"]
lengths_of_documents = st.lists(st.integers(1, 30), max_size=60)
batch_sizes = st.integers(1, 4)
seq_lens = st.integers(1, 20)
windows = st.integers(1, 8)


def reader(lengths: list[int], together: int = 1):
    """Give documents with these lengths, numbered from 0, a few at once."""
    starts = iter(range(0, len(lengths), together))

    def read():
        at = next(starts, None)
        return None if at is None else (range(len(lengths))[at : at + together], lengths[at : at + together])

    return read


def packed(packer: Packer) -> list[list[list[Run]]]:
    batches = []
    while (rows := packer.next_rows()).num_rows:
        batches.append(rows.runs())
    return batches


def cut_to_rows(packing: str, lengths: list[int], seq_len: int) -> list[int]:
    """The producer cuts before the packing sees a document, except for the two packings with a rule of their own."""
    return lengths if packing in ("stream", "best_fit_crop") else [min(n, seq_len + 1) for n in lengths]


def with_options(packing: str, **options: int):
    """The packing of that name, with those of the options that it has."""
    kind = PACKINGS[packing]
    return kind(**{name: value for name, value in options.items() if name in kind().options()})


def best_fit_by_scanning(lengths, capacity, window, refill, max_age, crop):
    """The rule as one would say it: look at every waiting document before each choice."""
    documents, waiting, rows = list(enumerate(lengths)), [], []
    while True:
        row, room = [], capacity
        while room:
            while len(waiting) < window and documents:
                waiting += [(d, n, len(rows)) for d, n in documents[:refill]]
                documents = documents[refill:]
            if not waiting:
                break
            fitting = [item for item in waiting if item[1] <= room]
            if not row and max_age is not None and len(rows) - waiting[0][2] >= max_age:
                choice = waiting[0]
            elif fitting:
                choice = max(fitting, key=lambda item: item[1])
            elif crop:
                choice = min(waiting, key=lambda item: item[1])
            else:
                break
            waiting.remove(choice)
            row.append(Run(choice[0], 0, min(choice[1], room)))
            room -= row[-1].length
        if not row:
            return rows
        rows.append(row)


@given(lengths_of_documents, batch_sizes, st.integers(2, 20), windows, st.integers(1, 4), st.integers(1, 5))
@pytest.mark.parametrize("packing", ["best_fit", "best_fit_pad", "best_fit_crop"])
def test_best_fit_chooses_what_a_scan_over_the_waiting_list_chooses(packing, lengths, B, T, window, refill, max_age):
    lengths = cut_to_rows(packing, lengths, T)
    aged = max_age if packing == "best_fit" else None
    chosen = with_options(packing, window=window, refill=refill, max_age=max_age)
    packer = chosen.build(reader(lengths), batch_size=B, seq_len=T)
    expected = best_fit_by_scanning(lengths, T + 1, window, refill, aged, packing == "best_fit_crop")
    assert [row for rows in packed(packer) for row in rows] == expected


@given(lengths_of_documents, batch_sizes, seq_lens, windows)
@pytest.mark.parametrize("packing", BY_ROWS)
def test_no_token_is_lost_and_none_comes_twice(packing, lengths, B, T, window):
    lengths = cut_to_rows(packing, lengths, T)
    packer = with_options(packing, window=window).build(reader(lengths), batch_size=B, seq_len=T)
    runs = [run for rows in packed(packer) for row in rows for run in row]
    assert sorted(run.document for run in runs) == list(range(len(lengths)))
    assert sum(run.length for run in runs) == packer.emitted == sum(lengths) - packer.cropped
    assert all(run.offset == 0 for run in runs)
    if packing != "best_fit_crop":
        assert {run.document: run.length for run in runs} == dict(enumerate(lengths))
    assert (packer.packed, packer.waiting_documents, packer.waiting_tokens) == (len(lengths), 0, 0)


@given(lengths_of_documents, batch_sizes, seq_lens, st.booleans())
def test_stream_hands_out_every_token_once_and_in_order(lengths, B, T, overlap):
    tokens = [(document, offset) for document, n in enumerate(lengths) for offset in range(n)]
    packer = Stream(overlap=overlap).build(reader(lengths), batch_size=B, seq_len=T)
    seen, at = [], 0
    for rows in packed(packer):
        assert len(rows) <= B
        words = [[(d, o + i) for d, o, n in row for i in range(n)] for row in rows]
        flat = [word for row in words[:-1] for word in row[:T]] + words[-1]
        for row, following in pairwise(words):
            assert len(row) == T + 1 and row[-1] == following[0], "a row's last target is the next row's first input"
        carried = 1 if overlap and at else 0
        assert flat == tokens[at - carried : at - carried + B * T + 1]
        seen += flat[carried:]
        at += len(flat) - carried
    assert seen == tokens
    assert (packer.emitted, packer.packed, packer.waiting_tokens) == (len(tokens), len(lengths), 0)


@given(lengths_of_documents, batch_sizes, seq_lens, windows)
@pytest.mark.parametrize("packing", BY_ROWS)
def test_rows_never_overflow_and_only_the_last_batch_is_short(packing, lengths, B, T, window):
    lengths = cut_to_rows(packing, lengths, T)
    packer = with_options(packing, window=window).build(reader(lengths), batch_size=B, seq_len=T)
    batches = packed(packer)
    assert all(0 < sum(run.length for run in row) <= T + 1 for rows in batches for row in rows)
    assert all(len(rows) == B for rows in batches[:-1])


@given(lengths_of_documents, st.integers(1, 5), st.integers(1, 4))
def test_best_fit_crop_pads_only_when_nothing_waits(lengths, window, B):
    rows = [row for rows in packed(BestFitPacker(reader(lengths), B, 9, window=window, crop=True)) for row in rows]
    assert all(sum(run.length for run in row) == 9 for row in rows[:-1])


def test_a_document_that_has_waited_max_age_rows_opens_the_next_row():
    # document 0 is short and never the longest that fits, until its age brings it to the front of row 2
    lengths = [1] + [5] * 6
    rows = packed(BestFitPacker(reader(lengths), 1, 5, window=3, max_age=2))
    assert [[run.document for run in row] for [row] in rows] == [[1], [2], [0], [3], [4], [5], [6]]
    aged = BestFitPacker(reader(lengths), 1, 5, window=3, max_age=2)
    packed(aged)
    assert aged.longest_wait == 3, "document 5: read in row 2, once document 0 had left, and placed in row 5"
    never = packed(BestFitPacker(reader(lengths), 1, 5, window=3))
    assert [[run.document for run in row] for [row] in never][-1] == [0], "without max_age it waits to the end"


@given(st.lists(st.integers(1, 9), min_size=1, max_size=200), st.integers(1, 6), st.integers(1, 6))
def test_no_document_starves_in_best_fit(lengths, window, max_age):
    packer = BestFitPacker(reader(lengths), 1, 9, window=window, max_age=max_age)
    packed(packer)
    # one due document a row is placed, and at most window - 1 others were due before it
    assert packer.longest_wait <= max_age + window - 1


@given(lengths_of_documents, batch_sizes, seq_lens, st.booleans())
def test_a_document_is_one_run_in_a_row_of_the_stream(lengths, B, T, overlap):
    for rows in packed(Stream(overlap=overlap).build(reader(lengths), batch_size=B, seq_len=T)):
        for row in rows:
            assert len({run.document for run in row}) == len(row)


def test_equal_documents_are_placed_in_the_order_in_which_they_came():
    [rows] = packed(BestFitPacker(reader([4, 3, 4, 3, 4]), 4, 8, window=5))
    assert [[run.document for run in row] for row in rows] == [[0, 2], [4, 1], [3]]


def test_documents_longer_than_a_row_do_not_hide_the_shortest_in_best_fit_crop():
    rows = packed(BestFitPacker(reader([50, 30, 40, 30]), 1, 10, window=4, crop=True))
    assert [run.document for [row] in rows for run in row] == [1, 3, 2, 0]


def test_every_packing_has_a_name_that_stands_for_it():
    assert tuple(PACKINGS) == get_args(PackingName)
    for name, kind in PACKINGS.items():
        assert as_packing(name) == kind() and kind.name == name


@pytest.mark.parametrize("packing", list(PACKINGS))
@given(lengths_of_documents, batch_sizes, seq_lens, windows)
def test_a_simulation_counts_what_the_packer_gives(packing, lengths, B, T, window):
    chosen = with_options(packing, window=window)
    packer = chosen.build(reader(cut_to_rows(packing, lengths, T)), batch_size=B, seq_len=T)
    batches = packed(packer)
    found = simulate(chosen, lengths, T, batch_size=B)
    rows = [row for rows in batches for row in rows]
    assert (found.batches, found.rows, found.emitted) == (len(batches), len(rows), packer.emitted)
    assert found.tokens == sum(min(T, sum(run.length for run in row)) for row in rows)
    assert found.cut == sum(lengths) - found.emitted
    assert found.longest_wait_rows == packer.longest_wait
    assert found.padding == (1 - found.tokens / (len(rows) * T) if rows else 0.0)


def test_a_simulation_that_stops_with_the_data_counts_no_row_that_only_the_end_left_empty():
    # the document of length 1 never fits next to those of 5, and would wait forever
    endless = simulate(BestFitPad(window=2), [1] + [5] * 6, 4, to_end=False)
    assert (endless.rows, endless.longest_wait_rows, endless.padding) == (6, 6, 0)
    assert simulate(BestFitPad(window=2), [1] + [5] * 6, 4).rows == 7


@pytest.mark.parametrize("loss", ["assistant", "all"])
def test_nanochat_s_packings_keep_documents_without_a_token_in_the_loss(loss):
    dropping = [
        packing
        for packing in (BestFit(), BestFitPad(), BestFitCrop(), Stream(), Pad())
        if packing.drops_untrained(loss)
    ]
    assert dropping == ([BestFit(), Pad()] if loss == "assistant" else [])


def passes_of(*passes: list[int], first: int = 0):
    """Give all documents of each pass at once, numbered through; from the pass on that begins with number `first`."""
    numbered, begin = [], 0
    for lengths in passes:
        numbered.append((range(begin, begin + len(lengths)), lengths))
        begin += len(lengths)
    items = iter([documents for documents in numbered if documents[0][0] >= first])
    return lambda: next(items, None)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=80), batch_sizes, st.integers(1, 20))
def test_with_everything_waiting_rows_are_those_of_the_rule_row_by_row(lengths, B, T):
    lengths = cut_to_rows("best_fit", lengths, T)
    packer = BestFit(window="all").build(passes_of(lengths), batch_size=B, seq_len=T)
    expected = best_fit_by_scanning(lengths, T + 1, len(lengths), 1, None, False)
    assert [row for rows in packed(packer) for row in rows] == expected
    assert (packer.packed, packer.emitted) == (len(lengths), sum(lengths))
    assert (packer.waiting_documents, packer.waiting_tokens) == (0, 0)


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=20), max_size=4), batch_sizes, st.integers(0, 9))
def test_each_pass_has_its_own_rows_in_the_order_that_is_asked_for_and_resumes(passes, B, steps):
    def backwards(places, n, first):
        assert (places >= 0).all() and (places < n).all()
        return n - 1 - places if first % 2 else places

    def build(first=0):
        return BestFit(window="all").build(
            passes_of(*passes, first=first), batch_size=B, seq_len=8, row_order=backwards
        )

    packer = build()
    batches = packed(packer)
    rows, begin = [], 0
    for lengths in passes:
        own = best_fit_by_scanning(lengths, 9, len(lengths), 1, None, False)
        own = [[run._replace(document=run.document + begin) for run in row] for row in own]
        rows += own[::-1] if begin % 2 else own
        begin += len(lengths)
    assert [row for batch in batches for row in batch] == rows
    first = build()
    before = [first.next_rows().runs() for _ in range(min(steps, len(batches)))]
    state = first.state()
    again = build(max(0, state["first"]))
    again.restore(state, [])
    assert before + packed(again) == batches
    assert again.state() == packer.state()
