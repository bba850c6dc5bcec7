"""What a state is: small, whose it is, and what of it is refused."""

from __future__ import annotations

import functools
import itertools
import json

import pytest
from data_sets import PACKINGS, SMALL
from saved_states import BASE, CHATS, differences, refusal, state_after, through_json

import nanopack
from nanopack import merge_states

Loader = functools.partial(nanopack.Loader, num_workers=0)


def test_a_state_of_another_run_is_refused_and_every_difference_named():
    state = state_after(2)
    line = refusal(state, seq_len=9, loss="all")
    assert "seq_len was 8, is 9" in line and "loss was 'assistant', is 'all'" in line and "strict=False" in line
    assert "conversations were 20, are 19" in refusal(state, CHATS[:19])
    assert "other contents or another order" in refusal(state, CHATS[::-1])
    other = nanopack.tokenizers.load_tokenizer("chat32k").encoding
    assert "tokenizer is another one" in refusal(state, tokenizer=other)


def test_a_difference_is_let_through_on_request():
    loader = Loader([*CHATS[:-1], {"text": "another end"}], SMALL, **BASE)
    loader.load_state_dict(state_after(2), strict=False)
    assert next(loader).step == 2


def test_data_that_changed_where_the_sample_does_not_look_are_noticed_by_what_waits():
    state = state_after(1, packing=nanopack.BestFitPad(window=4))
    waiting = state["lanes"]["0"]["waiting"][0]
    changed = [*CHATS]
    changed[waiting] = {"text": "longer than it was"}
    assert "have changed" in refusal(state, changed, packing=nanopack.BestFitPad(window=4), strict=False)


def overwritten(state, other):
    """A state of which each value is replaced in place, as torch.distributed.checkpoint loads."""
    for key, value in state.items():
        if isinstance(value, dict):
            overwritten(value, other[key])
        elif key in other:
            state[key] = other[key]
    return state


def test_a_state_belongs_to_who_asked_for_it_and_loading_into_it_does_not_blind_the_loader():
    loader = Loader(CHATS, SMALL, **BASE, loss="all")
    with pytest.raises(ValueError, match="loss was 'assistant', is 'all'"):
        loader.load_state_dict(overwritten(loader.state_dict(), state_after(2)))


def test_states_serve_as_torchdata_asks_of_a_stateful_data_set():
    """Before the first batch, in the middle, and at the end; taken up before, between and after batches."""
    arguments = dict(batch_size=2, seq_len=8, epochs=1)
    whole = Loader(CHATS, SMALL, **arguments)
    states, batches = [whole.state_dict()], []
    for batch in whole:
        batches.append(batch)
        states.append(whole.state_dict())
    assert len(batches) > 4
    loader = Loader(CHATS, SMALL, **arguments)
    for moment in (3, 0, len(batches), 2, 3):
        loader.load_state_dict(through_json(states[moment]))
        iterator = iter(loader)
        first = list(itertools.islice(iterator, 2))
        # a loop that is left and begun again resumes where it was
        rest = list(loader) if moment < len(batches) else []
        assert differences(batches[moment:], first + rest) == [None] * len(batches[moment:])
        assert list(iterator) == [], "an iterator stays at its end"
        assert differences(batches, list(loader)) == [None] * len(batches), "a new loop is a new pass"


def test_what_is_no_state_is_refused():
    assert "a list is not a state of nanopack" in refusal([])
    assert "a dict is not a state of nanopack" in refusal({"step": 3})
    assert "has format 99" in refusal({**state_after(1), "format": 99})


def test_the_state_of_another_rank_is_refused_and_a_merged_one_taken():
    states = [state_after(2, rank=rank, world_size=2) for rank in range(2)]
    line = refusal(states[0], rank=1, world_size=2)
    assert "the state has ranks 0, but not 1" in line and "merge_states" in line
    loader = Loader(CHATS, SMALL, **BASE, rank=1, world_size=2)
    loader.load_state_dict(merge_states(states[::-1]))
    assert loader.state_dict() == states[1]


def test_states_that_do_not_belong_together_are_not_merged():
    def merging(*states):
        with pytest.raises(ValueError) as caught:
            merge_states(states)
        return str(caught.value)

    zero, one = (state_after(2, rank=rank, world_size=2) for rank in range(2))
    assert "pass the states of all ranks" in merging()
    assert "ranks 1 of 2 are in none of the states" in merging(zero)
    assert "steps 2 and 3" in merging(zero, state_after(3, rank=1, world_size=2))
    assert "seq_len was 8, is 9" in merging(zero, state_after(2, rank=1, world_size=2, seq_len=9))
    assert "state 1: a str is not a state" in merging(zero, "x")
    assert merge_states([one, zero])["lanes"].keys() == {"0", "1"}


def test_a_run_sharded_by_ranks_is_not_taken_up_by_other_ranks():
    merged = merge_states([state_after(2, rank=rank, world_size=2) for rank in range(2)])
    assert "world_size was 2, is 1" in refusal(merged)


def test_a_closed_loader_takes_no_state():
    loader = Loader(CHATS, SMALL, **BASE)
    state = loader.state_dict()
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        loader.load_state_dict(state)


def test_keys_of_a_state_do_not_depend_on_how_far_the_run_is():
    def keys(state):
        return {name: keys(value) for name, value in state.items()} if isinstance(state, dict) else None

    assert keys(state_after(0)) == keys(state_after(7))


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_state_takes_kilobytes(packing):
    loader = Loader(CHATS * 500, SMALL, 8, 32, packing=packing)
    for _ in itertools.islice(loader, 50):
        pass
    assert len(json.dumps(loader.state_dict())) < 12_000, "a thousand documents wait in best_fit_crop"


def test_a_waiting_document_of_the_same_length_is_noticed_too():
    state = state_after(1, packing=nanopack.BestFitPad(window=4))
    waiting = state["lanes"]["0"]["waiting"][0]
    changed = [*CHATS]
    changed[waiting] = {"text": CHATS[waiting]["text"].replace("text", "TEXT")}
    assert "or others" in refusal(state, changed, packing=nanopack.BestFitPad(window=4), strict=False)


@pytest.mark.parametrize("missing", ["step", "lanes", "fingerprint"])
def test_a_damaged_state_is_refused_by_what_it_lacks(missing):
    state = state_after(1)
    del state[missing]
    assert f"the state is damaged: its '{missing}' is None" in refusal(state)


def test_a_damaged_shard_and_a_shard_of_another_packing_are_refused_by_name():
    state = state_after(1)
    del state["lanes"]["0"]["ledger"]
    assert "shard 0 lacks ledger" in refusal(state)
    assert "of another packing" in refusal(state_after(1), packing="stream", strict=False)


def test_two_states_of_one_rank_that_differ_are_not_merged():
    zero, one = (state_after(2, rank=rank, world_size=2) for rank in range(2))
    other = through_json(zero)
    other["lanes"]["0"]["waiting"] = []
    assert merge_states(iter([zero, zero, one])) == merge_states([zero, one])
    with pytest.raises(ValueError, match="shard 0 is in several of the states, and differs"):
        merge_states([zero, other, one])
