"""balance= moves rows between the steps of a window, and changes nothing else: to the token, at every resume."""

from __future__ import annotations

import functools
import itertools
import json

import pytest
from data_sets import SMALL, costs, data_sets, drawn_arguments
from hypothesis import given
from hypothesis import strategies as st
from stores import store_of

import nanopack
from nanopack import merge_states, reference
from nanopack.verify import first_difference

Loader = functools.partial(nanopack.Loader, num_workers=0)
PACKINGS = ["best_fit", "best_fit_pad", "best_fit_crop", "pad"]
CHATS = [{"text": "abcdefghijklmnopqrstuvwxyz"[: 1 + k * k % 23]} for k in range(200)]


def rows_of(batches):
    """All that is in the rows of batches, as a sorted list; rows of padding left out."""
    return sorted(
        (
            batch.inputs[row].tolist(),
            batch.targets[row].tolist(),
            [] if batch.weights is None else batch.weights[row].tolist(),
            batch.word_pieces[row],
        )
        for batch in batches
        for row in range(len(batch.inputs))
        if batch.word_pieces[row]
    )


@pytest.mark.parametrize("packing", PACKINGS)
@given(data=st.data(), cost=costs, window=st.integers(1, 5))
def test_with_a_window_of_the_accumulated_batches_a_step_has_exactly_the_rows_that_it_had(packing, data, cost, window):
    conversations = data.draw(data_sets)
    arguments = {**data.draw(drawn_arguments(packing)), "epochs": 2}
    arguments.pop("balance", None), arguments.pop("balance_window", None)
    before = list(Loader(conversations, SMALL, **arguments))
    after = list(Loader(conversations, SMALL, **arguments, balance=cost, balance_window=window))
    assert len(before) == len(after)
    for start in range(0, len(before), window):
        step = slice(start, start + window)
        assert rows_of(before[step]) == rows_of(after[step])
        for name in ("num_tokens", "num_loss_tokens"):
            assert sum(getattr(b, name) for b in before[step]) == sum(getattr(b, name) for b in after[step])


@given(data=st.data(), cost=costs, window=st.integers(1, 5), shard=st.sampled_from(["rank", "row"]))
def test_all_ranks_together_give_each_token_of_an_epoch_as_often_as_without(data, cost, window, shard):
    conversations, packing = data.draw(data_sets), data.draw(st.sampled_from(PACKINGS))
    arguments = {**data.draw(drawn_arguments(packing)), "epochs": 1, "shard": shard}
    del arguments["rank"]
    arguments |= {"balance": cost, "balance_window": window}
    world_size = arguments["world_size"]
    plain = {name: value for name, value in arguments.items() if not name.startswith("balance")}
    found = []
    for given_ in (plain, arguments):
        loaders = [Loader(conversations, SMALL, **given_, rank=rank) for rank in range(world_size)]
        delivered = [list(loader) for loader in loaders]
        assert len({len(batches) for batches in delivered}) == 1
        assert all(loader.ledger()["balanced"] for loader in loaders)
        found.append(rows_of(itertools.chain.from_iterable(delivered)))
    assert found[0] == found[1]


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_run_resumes_at_every_step_of_a_window_on_another_number_of_ranks(packing):
    arguments = dict(seq_len=24, packing=packing, shard="row", balance=(3, 1), balance_window=4, seed=2, epochs=1)
    rows, steps = 6, 10

    def ranks(world_size):
        size = rows // world_size
        return [Loader(CHATS, SMALL, size, rank=rank, world_size=world_size, **arguments) for rank in range(world_size)]

    def global_rows(loaders):
        batches = [next(loader) for loader in loaders]
        return [row.tolist() for batch in batches for row in batch.inputs]

    expected = [global_rows(whole) for whole in [ranks(1)] for _ in range(steps)]
    for stop, before, after in zip(
        range(steps), itertools.cycle([1, 2, 3, 6]), itertools.cycle([3, 6, 1]), strict=False
    ):
        loaders = ranks(before)
        for step in range(stop):
            assert global_rows(loaders) == expected[step]
        state = json.loads(json.dumps(merge_states([loader.state_dict() for loader in loaders])))
        loaders = ranks(after)
        for loader in loaders:
            loader.load_state_dict(state)
        assert [global_rows(loaders) for _ in range(stop, steps)] == expected[stop:]


def test_the_state_counts_what_is_packed_ahead_as_waiting():
    loader = Loader(CHATS, SMALL, 2, 24, balance=(1, 1), balance_window=4, epochs=1)
    next(loader)
    shard = loader.state_dict()["lanes"]["0"]
    ahead = [length for _, lengths, _ in shard["ahead"] for length in lengths]
    assert len(shard["ahead"]) == 3 and len(ahead) > 6
    assert loader.ledger()["conversations"]["waiting"] == len(shard["waiting"]) + len(ahead)
    assert loader.ledger()["balanced"]


def test_a_document_that_changed_while_its_row_waited_is_noticed():
    arguments = dict(batch_size=2, seq_len=24, balance=(1, 1), balance_window=8, packing="pad")
    loader = Loader(CHATS, SMALL, **arguments)
    next(loader)
    state = loader.state_dict()
    read = next(read for reads, *_ in state["lanes"]["0"]["ahead"] for read in reads if read % 13)
    changed = [*CHATS]
    changed[read] = {"text": changed[read]["text"] + "!"}
    with pytest.raises(ValueError, match="the data or the tokenizer have changed"):
        Loader(changed, SMALL, **arguments).load_state_dict(state, strict=False)


def test_work_is_counted_by_batch_by_rank_and_over_time():
    loader = Loader(CHATS, SMALL, 3, 24, balance=(5, 2), balance_window=4, epochs=1)
    batches = list(loader)
    work = [sum(5 * p.length + 2 * p.length**2 for row in batch.word_pieces for p in row) for batch in batches]
    assert [batch.work for batch in batches] == work
    assert loader.ledger()["work"] == loader.stats()["work"] == sum(work) > 0
    assert loader.stats()["work_per_s"] > 0
    resumed = Loader(CHATS, SMALL, 3, 24, balance=(5, 2), balance_window=4, epochs=1)
    resumed.load_state_dict(loader.state_dict())
    assert resumed.ledger()["work"] == sum(work) and resumed.stats()["work"] == 0.0
    plain = Loader(CHATS, SMALL, 3, 24, epochs=1)
    assert next(plain).work == plain.ledger()["work"] == plain.stats()["work"] == 0.0


def test_how_long_documents_wait_for_a_row_is_counted_as_without():
    plain, dealt = (Loader(CHATS, SMALL, 2, 24, epochs=1, **more) for more in ({}, dict(balance=(1, 1))))
    assert len(list(plain)) == len(list(dealt))
    assert plain.stats()["longest_wait_rows"] == dealt.stats()["longest_wait_rows"] > 0


def test_step_k_costs_every_rank_about_the_same():
    """Each rank's costliest rows come in the same step, so the slowest rank is nearer to the mean than without."""

    def slowest(**balance):
        ranks = [
            Loader(CHATS, SMALL, 1, 24, packing="pad", rank=r, world_size=4, epochs=2, **balance) for r in range(4)
        ]
        work = [[sum(p.length**2 for p in batch.word_pieces[0]) for batch in loader] for loader in ranks]
        return sum(map(max, zip(*work, strict=True))) / (sum(map(sum, work)) / 4)

    assert slowest(balance=(0, 1), balance_window=8) < 1 + (slowest() - 1) / 2


@pytest.mark.parametrize("packing", PACKINGS)
def test_verify_covers_it(packing):
    sizes = nanopack.ModelSizes(layers=2, hidden=8, heads=2, kv_heads=1, mlp=24, vocab=300)
    shared = dict(batch_size=2, seq_len=24, packing=packing, num_workers=0)
    for more in (dict(balance=sizes), dict(balance=(1, 0.5), balance_window=3, shard="row", rank=1, world_size=2)):
        assert nanopack.verify(CHATS, SMALL, **shared, **more)


def test_a_state_of_another_balance_is_refused_by_name():
    state = Loader(CHATS, SMALL, 2, 24, balance=(1, 1)).state_dict()
    with pytest.raises(ValueError, match=r"balance was .*1\.0.*, is .*2\.0"):
        Loader(CHATS, SMALL, 2, 24, balance=(1, 2)).load_state_dict(state)
    with pytest.raises(ValueError, match="balance_window was 8, is 4"):
        Loader(CHATS, SMALL, 2, 24, balance=(1, 1), balance_window=4).load_state_dict(state)
    with pytest.raises(ValueError, match=r"balance was .*, is None"):
        Loader(CHATS, SMALL, 2, 24).load_state_dict(state)


WRONG = [
    (dict(balance_window=4), "balance_window=4 has no meaning without balance"),
    (dict(balance=(1, 1), balance_window=0), "balance_window=0 is not allowed"),
    (dict(balance=(1, 1), packing=nanopack.BestFit(window="all")), "balance and packing=BestFit"),
    (dict(balance=(1, 1), packing="stream"), "balance has no meaning with packing='stream'"),
    (dict(balance_across=True), "balance_across=True has no meaning without balance"),
    (dict(balance="llama"), "balance='llama' is not allowed"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_what_it_cannot_do_is_refused_at_construction_by_the_reference_too(arguments, message):
    with pytest.raises(ValueError) as caught:
        Loader(CHATS, SMALL, **arguments)
    assert message in str(caught.value)
    with pytest.raises((ValueError, TypeError, AttributeError)):
        next(iter(nanopack.reference.batches(CHATS, SMALL, **arguments)))


def test_a_store_gives_the_same_and_resumes_within_a_window(tmp_path):
    store = store_of(tmp_path / "store", CHATS, SMALL)
    arguments = dict(batch_size=3, seq_len=24, balance=(1, 1), balance_window=4, epochs=1, seed=7)
    expected = list(Loader(CHATS, SMALL, **arguments))
    loader, got = Loader(store, SMALL, **arguments), []
    while (batch := next(loader, None)) is not None:
        got.append(batch)
        state = json.loads(json.dumps(loader.state_dict()))
        loader = Loader(store, SMALL, **arguments)
        loader.load_state_dict(state)
    assert [first_difference(a, b) for a, b in zip(expected, got, strict=True)] == [None] * len(expected)


ACROSS = dict(seq_len=24, balance=(3, 1), balance_window=4, balance_across=True, seed=2, epochs=1)


@pytest.mark.parametrize("shard", ["rank", "row"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_across_ranks_a_store_gives_what_the_reference_gives(tmp_path, packing, shard):
    store = store_of(tmp_path / "store", CHATS, SMALL)
    arguments = dict(batch_size=2, packing=packing, shard=shard, world_size=3, loss_weights="conversation", **ACROSS)
    for rank in range(3):
        loader = Loader(store, SMALL, rank=rank, **arguments)
        got = list(loader)
        expected = list(reference.batches(CHATS, SMALL, rank=rank, **arguments))
        assert [first_difference(a, b) for a, b in zip(expected, got, strict=True)] == [None] * len(expected)
        assert len(loader) == len(got) and loader.ledger()["balanced"]


@given(data=st.data(), cost=costs, window=st.integers(1, 5))
def test_across_ranks_a_window_has_the_rows_that_it_had_and_nothing_is_lost(data, cost, window):
    packing, world_size = data.draw(st.sampled_from(PACKINGS)), data.draw(st.integers(1, 4))
    conversations = data.draw(data_sets)
    arguments = {**data.draw(drawn_arguments(packing)), "epochs": 2, "world_size": world_size, "rank": 0}
    plain = {name: value for name, value in arguments.items() if not name.startswith("balance")}
    dealt = {**plain, "balance": cost, "balance_window": window, "balance_across": True}
    before, after = (
        [list(reference.batches(conversations, SMALL, **{**given_, "rank": rank})) for rank in range(world_size)]
        for given_ in (plain, dealt)
    )
    assert [len(batches) for batches in before] == [len(batches) for batches in after]
    for start in range(0, len(before[0]), window):
        was, now = ([b for batches in ranks for b in batches[start : start + window]] for ranks in (before, after))
        assert rows_of(was) == rows_of(now)


@pytest.mark.parametrize("packing", ["best_fit", "best_fit_crop"])
def test_across_ranks_a_run_resumes_at_every_step_of_a_window_on_another_number_of_ranks(tmp_path, packing):
    """A step has the same rows on any number of ranks; which rank has which differs."""
    store, rows = store_of(tmp_path / "store", CHATS, SMALL), 6

    def ranks(world_size):
        shape = dict(batch_size=rows // world_size, world_size=world_size, packing=packing, shard="row")
        return [Loader(store, SMALL, rank=rank, **shape, **ACROSS) for rank in range(world_size)]

    def step(loaders):
        return rows_of([next(loader) for loader in loaders])

    expected = [step(whole) for whole in [ranks(1)] for _ in range(10)]
    for stop, before, after in zip(range(10), itertools.cycle([1, 2, 3, 6]), itertools.cycle([3, 6, 1]), strict=False):
        loaders = ranks(before)
        assert [step(loaders) for _ in range(stop)] == expected[:stop]
        state = json.loads(json.dumps(merge_states([loader.state_dict() for loader in loaders])))
        loaders = ranks(after)
        for loader in loaders:
            loader.load_state_dict(state)
        assert merge_states([loader.state_dict() for loader in loaders])["lanes"] == state["lanes"]
        # its own, also before its first batch
        assert [len(loader.state_dict()["lanes"]) for loader in loaders] == [rows // after] * after
        assert [step(loaders) for _ in range(stop, 10)] == expected[stop:]
        assert all(loader.ledger()["balanced"] for loader in loaders)


def test_across_ranks_the_ledgers_of_all_ranks_add_up(tmp_path):
    store = store_of(tmp_path / "store", CHATS, SMALL)
    loaders = [Loader(store, SMALL, 2, world_size=3, rank=rank, **ACROSS) for rank in range(3)]
    delivered = [list(loader) for loader in loaders]
    ledgers = [loader.ledger() for loader in loaders]
    assert sum(ledger["conversations"]["packed"] for ledger in ledgers) == len(CHATS)
    for ledger, batches in zip(ledgers, delivered, strict=True):
        assert ledger["positions"]["tokens"] == sum(batch.num_tokens for batch in batches)
        assert ledger["work"] == sum(batch.work for batch in batches)


def test_across_ranks_each_rank_does_about_the_same_in_each_step(tmp_path):
    store = store_of(tmp_path / "store", CHATS * 3, SMALL)
    arguments = {**ACROSS, "balance": (1, 1), "balance_window": 8, "packing": "pad"}
    delivered = [list(Loader(store, SMALL, 2, world_size=4, rank=rank, **arguments)) for rank in range(4)]
    work = [[batch.work for batch in step] for step in zip(*delivered, strict=True)][:-8]
    assert sum(map(max, work)) / (sum(map(sum, work)) / 4) < 1.1


def test_without_a_store_dealing_across_ranks_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="only a token store knows"):
        Loader(CHATS, SMALL, 2, world_size=2, rank=0, **ACROSS)
    # one rank reads all there is anyway
    assert nanopack.verify(CHATS, SMALL, batch_size=2, num_workers=0, **ACROSS)


def test_a_state_of_one_rank_alone_is_refused_across_ranks_with_the_remedy(tmp_path):
    store = store_of(tmp_path / "store", CHATS, SMALL)
    loader = Loader(store, SMALL, 2, world_size=2, rank=1, shard="row", **ACROSS)
    next(loader)
    with pytest.raises(ValueError, match="merge_states"):
        Loader(store, SMALL, 2, world_size=2, rank=1, shard="row", **ACROSS).load_state_dict(loader.state_dict())


@pytest.mark.parametrize("across", [False, True])
def test_rows_ahead_are_not_forgotten_when_documents_are(tmp_path, monkeypatch, across):
    monkeypatch.setattr("nanopack.producer.shard.TOGETHER", 8)
    arguments = dict(batch_size=2, seq_len=24, balance=(1, 1), balance_window=16, balance_across=across)
    got = list(itertools.islice(Loader(CHATS, SMALL, **arguments), 60))
    expected = itertools.islice(reference.batches(CHATS, SMALL, **arguments), 60)
    assert [first_difference(a, b) for a, b in zip(expected, got, strict=True)] == [None] * 60


def test_an_endless_run_with_a_producer_process_gives_what_the_reference_gives():
    arguments = dict(batch_size=2, seq_len=24, balance=(1, 1), balance_window=3)
    with nanopack.Loader(CHATS, SMALL, **arguments, num_workers=2) as loader:
        got = list(itertools.islice(loader, 25))
    expected = itertools.islice(nanopack.reference.batches(CHATS, SMALL, **arguments), 25)
    assert [first_difference(a, b) for a, b in zip(expected, got, strict=True)] == [None] * 25
