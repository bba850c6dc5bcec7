"""Which conversation is read when: the walk of a cursor, and permutations that are computed index by index."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nanopack.conversations.order import Shard, permute


def walk(n: int, rank: int, world_size: int) -> Iterator[tuple[int, int]]:
    """Yield what a rank reads next and the epoch before it, by a cursor that wraps by subtraction.

    With more ranks than conversations subtracting once does not suffice; there it is modulo.
    """
    cursor, epoch = rank % n, 1
    while True:
        yield cursor, epoch
        cursor += world_size
        if cursor >= n:
            cursor = cursor - n if world_size <= n else cursor % n
            epoch += 1


ranks = st.tuples(st.integers(1, 30), st.integers(1, 40)).flatmap(
    lambda sizes: st.builds(Shard, st.just(sizes[0]), st.integers(0, sizes[1] - 1), st.just(sizes[1]))
)


@given(shard=ranks)
def test_a_shard_is_the_walk_of_a_cursor(shard: Shard) -> None:
    steps = walk(shard.n, shard.number, shard.count)
    for read, step in zip(range(100), steps, strict=False):
        assert (shard.conversation(read), shard.epoch(read)) == step


@given(n=st.integers(1, 30), world_size=st.integers(1, 40), epochs=st.integers(0, 4))
def test_all_ranks_together_read_every_conversation_once_an_epoch(n: int, world_size: int, epochs: int) -> None:
    shards = [Shard(n, rank, world_size) for rank in range(world_size)]
    read = [shard.conversation(k) for shard in shards for k in range(shard.num_reads(epochs))]
    assert sorted(read) == sorted([*range(n)] * epochs)


@given(shard=ranks, epochs=st.integers(0, 4))
def test_num_reads_counts_what_lies_before_the_end(shard: Shard, epochs: int) -> None:
    end = epochs * shard.n
    assert shard.num_reads(epochs) == sum(shard.number + k * shard.count < end for k in range(end + 1))


def order(n: int, seed: int, epoch: int) -> list[int]:
    return permute(np.arange(n), n, seed, np.full(n, epoch)).tolist()


@given(n=st.integers(1, 300), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**40))
def test_a_shuffled_pass_has_every_conversation_once(n: int, seed: int, epoch: int) -> None:
    assert sorted(order(n, seed, epoch)) == list(range(n))


@given(shard=ranks, seed=st.integers(0, 2**64 - 1), start=st.integers(0, 3000))
def test_a_shuffled_shard_starts_anywhere_as_if_it_had_been_read_up_to_there(shard, seed, start) -> None:
    shuffled = Shard(shard.n, shard.number, shard.count, seed)
    whole = list(shuffled.conversations(0, start + 50))
    assert list(shuffled.conversations(start, start + 50)) == whole[start:]
    assert shuffled.conversation(start) == whole[start]


@given(n=st.integers(1, 30), world_size=st.integers(1, 40), epochs=st.integers(0, 4), seed=st.integers(0, 99))
def test_all_ranks_of_a_shuffled_order_read_every_conversation_once_an_epoch(n, world_size, epochs, seed) -> None:
    shards = [Shard(n, rank, world_size, seed) for rank in range(world_size)]
    read = [index for shard in shards for index in shard.conversations(0, shard.num_reads(epochs))]
    assert sorted(read) == sorted([*range(n)] * epochs)


def test_the_next_pass_and_the_next_seed_have_another_order() -> None:
    assert len({tuple(order(50, seed, epoch)) for seed in range(10) for epoch in range(10)}) == 100


def test_every_order_of_four_comes_equally_often() -> None:
    counts = Counter(tuple(order(4, seed, 0)) for seed in range(4800))
    # chi-squared with 23 degrees of freedom: above 49.7 once in a thousand
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 49.7 and len(counts) == 24


def test_neighbours_in_the_order_are_strangers() -> None:
    indices = np.array(order(100_000, 7, 0))
    assert abs(np.corrcoef(indices[:-1], indices[1:])[0, 1]) < 0.01
    assert abs(np.corrcoef(indices, np.arange(100_000))[0, 1]) < 0.01


def test_an_order_of_more_than_an_array_could_hold_is_no_more_work() -> None:
    n = 10**15 + 37
    found = permute(np.arange(1000), n, 3, np.zeros(1000, np.int64))
    assert len(set(found.tolist())) == 1000 and found.min() >= 0 and found.max() < n and found.max() > n // 2
