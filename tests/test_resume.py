"""An interrupted run gives the batches of an uninterrupted one: at every step, for every packing, on other ranks."""

from __future__ import annotations

import functools
import itertools
import threading

import numpy as np
import pytest
from data_sets import PACKINGS, SMALL, data_sets, drawn_arguments
from faulty import wait_until
from hypothesis import given
from hypothesis import strategies as st
from saved_states import BASE, CHATS, differences, refusal, same_state, state_after, through_json

import nanopack
from nanopack import merge_states, reference
from nanopack.verify import first_difference

Loader = functools.partial(nanopack.Loader, num_workers=0)
# Arguments that do not decide what a batch is: they may change when a run resumes.
FREE = st.fixed_dictionaries({"prefetch": st.integers(1, 8)})


@pytest.mark.parametrize("packing", PACKINGS)
@given(data=st.data())
def test_interrupted_any_number_of_times_equals_uninterrupted(packing, data):
    conversations, arguments = data.draw(data_sets), data.draw(drawn_arguments(packing))
    expected, whole, error = [], Loader(conversations, SMALL, **arguments), None
    try:
        expected = list(itertools.islice(whole, 9))
    except ValueError as raised:
        error = raised
    if error is not None:
        return
    loader, got = Loader(conversations, SMALL, **arguments), []
    for stop in sorted(data.draw(st.lists(st.integers(0, len(expected)), max_size=4))):
        got += itertools.islice(loader, stop - len(got))
        state = through_json(loader.state_dict())
        assert state["step"] == stop
        # for nothing: what is delivered from here on is not part of the state
        for _ in itertools.islice(loader, data.draw(st.integers(0, 2))):
            pass
        loader = Loader(conversations, SMALL, **arguments, **data.draw(FREE))
        loader.load_state_dict(state)
        assert loader.state_dict() == state
        assert loader.ledger()["balanced"]
    got += itertools.islice(loader, 9 - len(got))
    assert differences(expected, got) == [None] * len(expected)
    assert same_state(loader, whole)


@given(data=st.data())
def test_a_producer_process_goes_on_as_exactly_whatever_its_workers_and_prefetch(data):
    conversations, packing = data.draw(data_sets), data.draw(st.sampled_from(PACKINGS))
    arguments = {**data.draw(drawn_arguments(packing)), "epochs": 2}
    expected = list(Loader(conversations, SMALL, **arguments))
    stop, got = data.draw(st.integers(0, len(expected))), []
    settings_of = st.fixed_dictionaries({"num_workers": st.sampled_from([0, 1, 2]), "prefetch": st.integers(1, 8)})
    with nanopack.Loader(conversations, SMALL, **arguments, **data.draw(settings_of)) as loader:
        got += itertools.islice(loader, stop)
        state = through_json(loader.state_dict())
    with nanopack.Loader(conversations, SMALL, **arguments, **data.draw(settings_of)) as loader:
        next(loader, None)
        loader.load_state_dict(state)
        got += loader
    assert differences(expected, got) == [None] * len(expected)


def global_batches(conversations, world_size, rows, arguments):
    """The loaders of all ranks, side by side."""
    return [
        Loader(conversations, SMALL, rows // world_size, rank=rank, world_size=world_size, **arguments)
        for rank in range(world_size)
    ]


def global_rows(batches):
    """What all ranks' batches hold together, row by row."""
    return [
        (batch.inputs[row].tolist(), batch.targets[row].tolist(), batch.weights[row].tolist(), batch.word_pieces[row])
        for batch in batches
        for row in range(len(batch.inputs))
    ]


@pytest.mark.parametrize("packing", PACKINGS)
@given(data=st.data())
def test_the_global_batch_sharded_by_rows_does_not_depend_on_the_ranks_though_they_change_twice(packing, data):
    conversations = data.draw(data_sets)
    arguments = {**data.draw(drawn_arguments(packing)), "loss_weights": "conversation", "shard": "row", "epochs": 2}
    for name in ("rank", "world_size", "batch_size"):
        del arguments[name]
    rows, steps = 24, 6
    [whole] = global_batches(conversations, 1, rows, arguments)
    expected = [global_rows([batch]) for batch in itertools.islice(whole, steps)]
    got, state = [], None
    world_sizes = st.sampled_from([1, 2, 3, 4, 6, 8])
    for stop in [*sorted(data.draw(st.lists(st.integers(0, steps), min_size=2, max_size=2))), steps]:
        loaders = global_batches(conversations, data.draw(world_sizes), rows, arguments)
        if state is not None:
            for loader in loaders:
                loader.load_state_dict(state)
        while len(got) < min(stop, len(expected)):
            got.append(global_rows([next(loader) for loader in loaders]))
        state = through_json(merge_states([loader.state_dict() for loader in loaders]))
    assert got == expected
    assert state["lanes"] == whole.state_dict()["lanes"] or len(expected) < steps


def test_micro_batches_are_ranks():
    """Accumulating over two micro-batches on two ranks is what four ranks do, in the same order of rows."""
    chats = [{"text": "abcdefg"[: 1 + k % 7] * (1 + k % 3)} for k in range(60)]
    arguments = dict(seq_len=12, shard="row", loss_weights=None)
    four = [next(Loader(chats, SMALL, 3, rank=rank, world_size=4, **arguments)) for rank in range(4)]
    accumulated = [next(Loader(chats, SMALL, 6, rank=rank, world_size=2, **arguments)) for rank in range(2)]
    micro = [inputs for batch in accumulated for inputs in batch.inputs.chunk(2)]
    assert [inputs.tolist() for inputs in micro] == [batch.inputs.tolist() for batch in four]


@given(data=st.data())
def test_all_ranks_give_equally_many_batches_and_together_everything_just_as_often(data):
    packing = data.draw(st.sampled_from(PACKINGS))
    conversations = data.draw(data_sets)
    arguments = {**data.draw(drawn_arguments(packing)), "loss": "all", "max_document_tokens": None}
    arguments["epochs"] = data.draw(st.integers(1, 3))
    world_size = arguments["world_size"]
    loaders = [Loader(conversations, SMALL, **{**arguments, "rank": rank}) for rank in range(world_size)]
    delivered = [list(loader) for loader in loaders]
    assert {len(batches) for batches in delivered} == {len(loaders[0])}
    read = sum(loader.ledger()["conversations"]["read"] for loader in loaders)
    packed = sum(loader.ledger()["conversations"]["packed"] for loader in loaders)
    assert read == packed == arguments["epochs"] * len(conversations)
    assert all(loader.ledger()["balanced"] for loader in loaders)
    for batches, loader in zip(delivered, loaders, strict=True):
        assert loader.tokens_total == loader.ledger()["tokens"]["emitted"]
        ends = itertools.dropwhile(lambda batch: batch.num_tokens, batches)
        assert all(batch.num_loss_tokens == batch.num_tokens == 0 and batch.last for batch in ends)


def test_len_is_refused_where_there_is_no_end_and_a_loader_is_true():
    loader = Loader([{"text": "ab"}], SMALL, 1, 4)
    with pytest.raises(TypeError, match="pass epochs"):
        len(loader)
    with pytest.raises(TypeError, match="pass epochs"):
        _ = loader.tokens_total
    assert loader


def test_a_finished_run_is_finished_when_it_goes_on():
    chats = [{"text": "abc"}] * 5
    loader = Loader(chats, SMALL, 2, 8, epochs=1)
    count = len(list(loader))
    again = Loader(chats, SMALL, 2, 8, epochs=1)
    again.load_state_dict(loader.state_dict())
    assert list(again) == [] and again.state_dict()["step"] == count and again.ledger() == loader.ledger()


def test_a_run_that_met_a_bad_conversation_goes_on_with_skipping():
    chats = [{"text": "abc"}] * 4 + [{"text": 5}] + [{"text": "de"}] * 4
    arguments = dict(batch_size=1, seq_len=4, packing="pad", epochs=1)
    loader = Loader(chats, SMALL, **arguments)
    before = list(itertools.islice(loader, 4))
    with pytest.raises(nanopack.ConversationError):
        next(loader)
    again = Loader(chats, SMALL, **arguments, on_error="skip")
    again.load_state_dict(loader.state_dict())
    skipping = reference.batches(chats, SMALL, **arguments, on_error="skip")
    assert differences(list(skipping), before + list(again)) == [None] * 8


def test_going_on_reads_only_what_waits(tmp_path):
    reads = []

    class Counting(list):
        def __getitem__(self, index):
            reads.append(index)
            return super().__getitem__(index)

    chats = Counting([{"text": "abcdefghij"[: 1 + k % 10]} for k in range(5000)])
    loader = Loader(chats, SMALL, 2, 16, packing=nanopack.BestFit(window=20))
    for _ in itertools.islice(loader, 200):
        pass
    state = loader.state_dict()
    again = Loader(chats, SMALL, 2, 16, packing=nanopack.BestFit(window=20))
    _ = again.state_dict()
    reads.clear()
    again.load_state_dict(state)
    assert len(reads) == len(state["lanes"]["0"]["waiting"]) <= 20 < state["lanes"]["0"]["ledger"]["conversations_read"]


MIXED = nanopack.mixture(
    [(CHATS, 3, "chats"), ([{"text": "x" * k} for k in range(9)], 1, "letters"), ([{"text": 5}], 0.5, "bad")]
)


@pytest.mark.parametrize("packing", PACKINGS)
@given(data=st.data())
def test_the_sources_of_a_mixture_balance_after_every_batch_and_continue_when_a_run_resumes(packing, data):
    arguments = {**data.draw(drawn_arguments(packing)), "on_error": "skip", "epochs": 2}
    loader = Loader(MIXED, SMALL, **arguments)
    while next(loader, None) is not None:
        ledger = loader.ledger()
        assert ledger["balanced"], ledger["imbalances"]
        if data.draw(st.booleans()):
            state = through_json(loader.state_dict())
            loader = Loader(MIXED, SMALL, **arguments)
            loader.load_state_dict(state)
            assert loader.ledger() == ledger
    ledger = loader.ledger()
    sources = ledger["sources"]
    assert sum(source["conversations"]["read"] for source in sources.values()) == ledger["conversations"]["read"]
    assert sources["bad"]["conversations"]["skipped"] == sources["bad"]["conversations"]["read"]


@pytest.mark.parametrize("source", [0, 1])
@pytest.mark.parametrize(
    "counter", ["conversations_read", "conversations_packed", "tokens_read", "tokens_emitted", "tokens_waiting"]
)
def test_the_ledger_notices_a_counter_of_a_source_that_is_off_by_one(source, counter):
    loader = Loader(MIXED, SMALL, 2, 8, on_error="skip")
    next(loader)
    assert loader.ledger()["balanced"]
    state = through_json(loader.state_dict())
    state["lanes"]["0"]["sources"][source][counter] += 1
    loader.load_state_dict(state)
    name = MIXED.names[source]
    assert any(line.startswith(name) for line in loader.ledger()["imbalances"])


@pytest.mark.parametrize(("counter", "line"), [("packed", "conversations_packed"), ("emitted", "tokens_emitted")])
def test_the_ledger_notices_that_the_packing_has_counted_otherwise(counter, line):
    loader = Loader(CHATS, SMALL, 2, 8)
    next(loader)
    state = through_json(loader.state_dict())
    state["lanes"]["0"]["packer"][counter] += 1
    loader.load_state_dict(state)
    [wrong] = loader.ledger()["imbalances"]
    assert wrong.startswith(line)


def test_a_mixture_of_other_picks_is_another_run():
    other = nanopack.mixture([(CHATS, 1)], seed=5), nanopack.mixture([(CHATS, 1)], seed=6)
    assert "other contents or another order" in refusal(state_after(1, other[0]), other[1])


def test_tokens_are_estimated_by_the_progress_also_when_a_run_goes_on_and_exact_when_counted():
    loader = Loader(CHATS * 10, SMALL, 2, 16, epochs=1)
    assert loader.stats()["tokens_total_estimated"] is None
    for _ in itertools.islice(loader, 20):
        pass
    again = Loader(CHATS * 10, SMALL, 2, 16, epochs=1)
    again.load_state_dict(loader.state_dict())
    next(again)
    batches = list(again)
    assert again.tokens_total == again.ledger()["tokens"]["emitted"]
    assert again.stats()["tokens_total_estimated"] == again.ledger()["positions"]["tokens"] and batches[-1].last
    assert abs(loader.stats()["tokens_total_estimated"] / again.tokens_total - 1) < 0.2
    assert Loader(CHATS, SMALL, 2, 16).stats()["tokens_total_estimated"] is None


@pytest.mark.parametrize("workers", [0, 1])
def test_a_good_document_that_a_lane_rarely_meets_is_waited_for(workers):
    """With a shuffle and two ranks, whole passes may go by without it."""
    useless = [{"messages": [{"role": "user", "content": "x"}]}] * 3
    arguments = dict(batch_size=1, seq_len=8, packing="pad", seed=0, rank=0, world_size=2)
    with nanopack.Loader([*useless, {"text": "hello"}], SMALL, **arguments, num_workers=workers) as loader:
        batches = list(itertools.islice(loader, 60))
    expected = itertools.islice(reference.batches([*useless, {"text": "hello"}], SMALL, **arguments), 60)
    assert differences(list(expected), batches) == [None] * 60
    with pytest.raises(ValueError, match=r"nothing to pack: in a whole pass over the data \(3 conversations\)"):
        next(Loader(useless, SMALL, **arguments))


def test_a_state_can_be_saved_though_a_sampled_conversation_cannot_be_read():
    class Bad(list):
        def __getitem__(self, index):
            if index == 0:
                raise KeyError(f"missing column of {object()}")
            return super().__getitem__(index)

    loader = Loader(Bad(CHATS), SMALL, **BASE, on_error="skip")
    next(loader)
    again = Loader(Bad(CHATS), SMALL, **BASE, on_error="skip")
    again.load_state_dict(loader.state_dict())
    assert first_difference(next(loader), next(again)) is None


@pytest.mark.parametrize("slow", [False, True])
def test_a_sample_that_takes_long_is_announced_once_and_leaves_no_thread(monkeypatch, caplog, slow):
    class Slow(list):
        def __getitem__(self, index):
            if slow:
                wait_until(lambda: caplog.messages)
            return super().__getitem__(index)

    monkeypatch.setattr("nanopack.state.SLOW", 0.1 if slow else 20.0)
    threads = threading.active_count()
    Loader(Slow(CHATS), SMALL, **BASE)
    assert threading.active_count() == threads
    assert len(caplog.messages) == slow and ("reads 16 conversations" in caplog.text) == slow


def test_ready_tokens_differ_by_all_of_them_and_not_by_the_form_they_come_in():
    def ready(seed, form=np.array):
        body = np.random.default_rng(seed).integers(0, 200, (5, 2000))
        return [{"input_ids": form([1, 2, 3, *row.tolist(), 4, 5])} for row in body]

    state = state_after(1, ready(0), packing="stream")
    assert "other contents" in refusal(state, ready(1), packing="stream")
    Loader(ready(0, list), SMALL, 2, 8, packing="stream").load_state_dict(state)


def test_with_fewer_epochs_than_it_has_finished_a_run_ends():
    arguments = dict(batch_size=1, seq_len=8, rank=0, world_size=2)
    loader = Loader(CHATS, SMALL, epochs=3, **arguments)
    for _ in itertools.islice(loader, 28):
        pass
    again = Loader(CHATS, SMALL, epochs=1, **arguments)
    again.load_state_dict(loader.state_dict(), strict=False)
    flushed = list(itertools.islice(again, 50))
    assert len(flushed) < 5 and next(again, None) is None


def test_a_load_that_fails_leaves_the_loader_where_it_stood():
    state = state_after(1, packing=nanopack.BestFitPad(window=4))
    changed = [*CHATS]
    changed[state["lanes"]["0"]["waiting"][0]] = {"text": "other"}
    loader = Loader(changed, SMALL, **{**BASE, "packing": nanopack.BestFitPad(window=4)})
    expected = list(itertools.islice(Loader(changed, SMALL, **{**BASE, "packing": nanopack.BestFitPad(window=4)}), 3))
    got = [next(loader)]
    with pytest.raises(ValueError, match="have changed"):
        loader.load_state_dict(state, strict=False)
    assert differences(expected, [*got, *itertools.islice(loader, 2)]) == [None] * 3


def test_static_outputs_stay_where_they_are_when_a_state_is_taken_up():
    loader = Loader(CHATS, SMALL, **BASE, static=True)
    place = next(loader).inputs.data_ptr()
    loader.load_state_dict(loader.state_dict())
    assert next(loader).inputs.data_ptr() == place
