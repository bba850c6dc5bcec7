"""Stored batches are planned together: what is delivered, and every state, is as if they were planned one by one."""

from __future__ import annotations

import functools
import itertools
import json
import tempfile
from pathlib import Path

import pytest
from data_sets import PACKINGS, SMALL, data_sets, drawn_arguments
from hypothesis import given
from hypothesis import strategies as st
from stores import store_of

import nanopack
from nanopack import BestFit, merge_states, reference
from nanopack.verify import first_difference

CHATS = [{"text": "abcdefghijklmnopqrstuvwxyz"[: 1 + k * k % 23]} for k in range(200)]
Loader = functools.partial(nanopack.Loader, device="cpu")


def made_of(loader, count=None):
    """The next batches, each with the state after it, and the state at the end where that comes."""
    found = []
    for batch in itertools.islice(loader, count):
        found.append((batch, json.loads(json.dumps(loader.state_dict()))))
    return found, loader.state_dict()


def planned(together, store, tokenizer, **arguments):
    """A loader that plans as many batches together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanopack.producer.producer.TOGETHER", together)
        return Loader(store, tokenizer, **{"num_workers": 0, **arguments})


def check_equal(made, expected):
    for (batch, state), (other, other_state) in zip(made, expected, strict=True):
        assert first_difference(other, batch) is None
        assert state == other_state


@pytest.mark.parametrize("packing", [*PACKINGS, "whole pass"])
@given(data=st.data(), together=st.sampled_from([2, 3, 16]), resident=st.booleans())
def test_batches_and_states_do_not_depend_on_how_many_are_planned_together(packing, data, together, resident):
    conversations = data.draw(data_sets)
    arguments = data.draw(drawn_arguments("stream" if packing == "whole pass" else packing))
    arguments |= {"loss": "all", "world_size": min(arguments["world_size"], 3), "epochs": arguments["epochs"] or 2}
    arguments["rank"] = min(arguments["rank"], arguments["world_size"] - 1)
    if packing == "whole pass":
        arguments["packing"] = BestFit(window="all")
    if "balance" in arguments:
        arguments["balance_across"] = data.draw(st.booleans())
    if arguments.get("document_align", 1) > 1 or "cu_seqlens_real" in arguments["extras"]:
        resident = False
    with tempfile.TemporaryDirectory() as folder:
        store = store_of(Path(folder), conversations, SMALL, loss="all")
        one, end = made_of(planned(1, store, SMALL, resident=resident, **arguments), 40)
        several, end_of_several = made_of(planned(together, store, SMALL, resident=resident, **arguments), 40)
    check_equal(several, one)
    assert end_of_several == end


RUNS = {
    "best fit": {},
    "in rows": {"shard": "row"},
    "stream": {"packing": "stream"},
    "whole pass": {"packing": BestFit(window="all")},
    "balanced": {"balance": (3, 1), "balance_window": 4},
    "balanced in rows": {"balance": (3, 1), "balance_window": 3, "shard": "row"},
    "balanced across ranks": {"balance": (3, 1), "balance_window": 4, "balance_across": True},
}


@pytest.mark.parametrize("resident", [False, True], ids=["words", "resident"])
@pytest.mark.parametrize("arguments", RUNS.values(), ids=RUNS)
def test_a_run_resumes_at_every_step_of_what_is_planned_together(tmp_path, arguments, resident):
    arguments = dict(batch_size=2, seq_len=24, seed=2, epochs=1, world_size=2, resident=resident) | arguments
    store = store_of(tmp_path / "store", CHATS, SMALL)
    wholes = [made_of(planned(5, store, SMALL, rank=rank, **arguments))[0] for rank in range(2)]
    for step in range(0, len(wholes[0])):
        state = merge_states([whole[step][1] for whole in wholes])
        for rank, whole in enumerate(wholes):
            resumed = planned(4, store, SMALL, rank=rank, **arguments)
            resumed.load_state_dict(state)
            check_equal(made_of(resumed, 6)[0], whole[step + 1 : step + 7])
            assert resumed.ledger()["balanced"]


@pytest.mark.parametrize("arguments", RUNS.values(), ids=RUNS)
def test_a_producer_process_gives_the_same_states_and_sends_those_planned_together_once(tmp_path, arguments):
    arguments = dict(batch_size=2, seq_len=24, seed=2, epochs=1, world_size=2, rank=1) | arguments
    store = store_of(tmp_path / "store", CHATS, SMALL)
    expected, end = made_of(planned(5, store, SMALL, **arguments))
    with planned(5, store, SMALL, num_workers=1, **arguments) as loader:
        sent, pipe = [], loader._run.feed._messages
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loader._run.feed, "_messages", Watched(pipe, sent))
            made, end_here = made_of(loader)
        check_equal(made, expected)
        assert end_here == end
    facts = [message for message in sent if type(message) is tuple]
    assert [bool(message[-1]) for message in facts] == [number % 5 == 0 for number in range(len(facts))]


class Watched:
    """A pipe whose messages are noted."""

    def __init__(self, pipe, sent):
        self._pipe, self._sent = pipe, sent
        self.poll, self.close = pipe.poll, pipe.close

    def recv(self):
        self._sent.append(self._pipe.recv())
        return self._sent[-1]


def test_a_resident_rank_counts_the_targets_of_its_own_rows_where_rows_are_dealt_across_ranks(tmp_path):
    store = store_of(tmp_path / "store", CHATS, SMALL)
    arguments = dict(batch_size=2, seq_len=24, balance=(3, 1), balance_across=True, seed=2, epochs=1, world_size=3)
    for rank in range(3):
        got = list(Loader(store, SMALL, num_workers=0, resident=True, rank=rank, **arguments))
        expected = list(reference.batches(CHATS, SMALL, rank=rank, **arguments))
        assert [first_difference(a, b) for a, b in zip(expected, got, strict=True)] == [None] * len(expected)
