"""Rows are dealt by cost: equally many to each step, at about the same cost on all ranks, in an order that is drawn."""

from __future__ import annotations

import itertools
import math
import random
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopack.packing import BestFit, BestFitCrop, BestFitPad, Pad
from nanopack.packing.balance import BalancedPacker, costs_of, deal, deal_across, order_of_steps
from nanopack.packing.cost import Cost, ModelSizes
from nanopack.packing.imbalance import LLAMA_3_8B, imbalance, row_costs
from nanopack.packing.rows import Rows

COST = Cost(57_000.0, 1.0)


def lognormal(count, mean=1700, sigma=1.5, seed=0):
    """Lengths of documents as those of long-context mixtures: at T = 32k a rank of 8 is 1.23 times the mean."""
    draw, mu = random.Random(seed), math.log(mean) - sigma**2 / 2
    return [max(1, int(draw.lognormvariate(mu, sigma))) for _ in range(count)]


@pytest.fixture(scope="module")
def costs():
    """Of about 17,000 rows of 32k tokens."""
    return row_costs(BestFit(), lognormal(400_000), 32_768, COST)


heaps_of_rows = st.integers(1, 6).flatmap(
    lambda groups: st.tuples(
        st.just(groups),
        st.integers(1, 5).flatmap(
            lambda rows: st.lists(st.floats(0, 1e9) | st.integers(0, 3), min_size=groups * rows, max_size=groups * rows)
        ),
    )
)


@given(heaps_of_rows)
def test_each_heap_gets_equally_many_rows_and_each_row_lands_in_one(drawn):
    groups, rows = drawn
    dealt = deal(np.array(rows, float), groups).tolist()
    assert [len(group) for group in dealt] == [len(rows) // groups] * groups
    assert sorted(itertools.chain.from_iterable(dealt)) == [*range(len(rows))]
    assert all(group == sorted(group) for group in dealt)


@given(heaps_of_rows)
def test_two_heaps_differ_by_no_more_than_the_costliest_row_from_the_cheapest(drawn):
    groups, rows = drawn
    work = [sum(rows[i] for i in group) for group in deal(np.array(rows, float), groups)]
    assert max(work) - min(work) <= (max(rows) - min(rows)) * (1 + 1e-9) + 1e-6


@given(heaps_of_rows, st.integers(1, 4))
def test_dealt_across_ranks_a_step_has_the_same_rows_on_any_number_of_ranks(drawn, times):
    groups, rows = drawn
    rows = np.array(rows * times, float)
    alone = deal_across(rows, groups, 1).tolist()
    for ranks in (ranks for ranks in range(1, 7) if len(rows) % (groups * ranks) == 0):
        shared = deal_across(rows, groups, ranks).tolist()
        assert [sorted(itertools.chain.from_iterable(step)) for step in shared] == [step[0] for step in alone]
        assert {len(group) for step in shared for group in step} == {len(rows) // groups // ranks}


@given(st.none() | st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(1, 40))
def test_the_order_of_steps_is_a_permutation_of_which_fewer_steps_are_a_part(seed, window, steps):
    order = order_of_steps(seed, window, steps)
    assert sorted(order) == [*range(steps)]
    assert order_of_steps(seed, window, steps - 1) == [step for step in order if step < steps - 1]


def test_the_order_of_steps_changes_with_window_and_seed_and_favours_no_step():
    orders = {tuple(order_of_steps(seed, window, 8)) for seed in (None, 1, 2) for window in range(100)}
    assert len(orders) > 290
    mean = [sum(order_of_steps(3, window, 8)[place] for window in range(4000)) / 4000 for place in range(8)]
    assert all(abs(step - 3.5) < 0.2 for step in mean)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 8, 16])
def test_of_8_ranks_the_slowest_is_at_most_a_tenth_above_the_mean_without_communication(costs, batch_size):
    found = imbalance(costs, ranks=8, batch_size=batch_size, window=8)
    assert found.balanced <= 1.10 and found.balanced < found.as_packed
    assert found.across_ranks <= 1.03


def test_unbalanced_the_slowest_of_8_ranks_is_a_fifth_above_the_mean(costs):
    assert imbalance(costs, ranks=8, batch_size=1, window=8).as_packed == pytest.approx(1.23, abs=0.02)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_of_64_ranks_with_a_window_of_32_the_slowest_is_within_a_twentieth_dealt_across_ranks(costs, batch_size):
    found = imbalance(costs, ranks=64, batch_size=batch_size, window=32)
    assert found.across_ranks <= 1.05 < found.as_packed
    # without communication
    assert found.balanced <= 1.07


def test_too_few_rows_for_a_window_have_no_imbalance():
    assert imbalance(np.ones(63), ranks=4, batch_size=2, window=8) is None
    assert imbalance(np.ones(64), ranks=4, batch_size=2, window=8) == (1.0, 1.0, 1.0)


def test_the_cost_where_none_is_given_is_that_of_llama_3_8b():
    assert ModelSizes(layers=32, hidden=4096, heads=32, kv_heads=8, mlp=14336, vocab=128256).cost() == LLAMA_3_8B


def reader(lengths):
    documents = iter([(range(len(lengths)), lengths)] if lengths else [])
    return lambda: next(documents, None)


def packed_and_balanced(packing, lengths, batch_size, window, seed=None, cap=17):
    """The batches of a packer, and those of the same packer balanced."""
    lengths = [min(length, cap) for length in lengths] if packing.cuts_to_row else lengths

    def build(read):
        return packing.build(read, batch_size=batch_size, seq_len=cap - 1)

    plain = build(reader(lengths))
    dealt = BalancedPacker(build(reader(lengths)), batch_size, cost=COST, window=window, seed=seed)
    return [list(batches_of(packer)) for packer in (plain, dealt)], plain, dealt


def batches_of(packer):
    while (rows := packer.next_rows()).num_rows:
        yield rows.runs()


packings = st.sampled_from([BestFit(window=4, max_age=3), BestFitPad(window=3), BestFitCrop(window=3), Pad()])


@given(packings, st.lists(st.integers(1, 25), max_size=60), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_a_window_has_the_rows_that_its_batches_had(packing, lengths, batch_size, window, seed):
    """Where the window is the accumulated batches, each step of the optimizer has its content, to the token."""
    (before, after), plain, dealt = packed_and_balanced(packing, lengths, batch_size, window, seed)
    assert len(before) == len(after)
    for start in range(0, len(before), window):
        was, now = (
            sorted(row for batch in batches[start : start + window] for row in batch if row)
            for batches in (before, after)
        )
        assert was == now
    for counter in ("emitted", "cropped", "packed", "longest_wait", "waiting_documents", "waiting_tokens"):
        assert getattr(dealt, counter) == getattr(plain, counter)


@given(st.lists(st.integers(1, 16), min_size=24, max_size=24))
def test_step_k_of_each_rank_is_its_kth_costliest_where_it_has_one_row(lengths):
    (_, after), *_ = packed_and_balanced(Pad(), lengths, 1, 8, seed=5)
    for window in range(3):
        costliest = sorted(lengths[8 * window :][:8], reverse=True)
        delivered = [batch[0][0].length for batch in after[8 * window :][:8]]
        assert delivered == [costliest[step] for step in order_of_steps(5, window, 8)]


def test_padding_costs_nothing_and_a_document_as_many_pairs_as_its_square():
    rows = Rows(np.arange(3), np.zeros(3, int), np.array([3, 5, 4]), np.array([0, 2, 2, 3]))
    assert costs_of(rows.lengths, rows.bounds, Cost(2.0, 10.0)).tolist() == [2 * 8 + 10 * (9 + 25), 0, 2 * 4 + 10 * 16]


def test_balancing_costs_a_row_about_a_microsecond():
    """Of process time, with all it takes: costs, dealing, and the names for states. A loaded machine gets room."""
    lengths = np.minimum(lognormal(20_000, 585, 1.0), 2049)

    def build(read):
        return BestFit().build(read, batch_size=32, seq_len=2048)

    batches = []
    packer = build(reader(lengths.tolist()))
    while (rows := packer.next_rows()).num_rows:
        batches.append(rows)

    class Again:
        """Gives the batches that were packed."""

        cropped = longest_wait = 0

        def __init__(self):
            self.next_rows = iter([*batches, batches[-1]._replace(bounds=np.zeros(1, int))]).__next__

    def work():
        balanced = BalancedPacker(Again(), 32, cost=COST, window=8, seed=0)
        for _ in range(len(batches) - 8):
            balanced.next_rows()

    best = min(_time(work) for _ in range(5))
    assert best / (32 * (len(batches) - 8)) < 5e-6


def _time(work):
    began = time.process_time()
    work()
    return time.process_time() - began
