"""States saved before the arguments had their names of today still load, with the batches that came next then."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import nanopack
from nanopack import BestFit, BestFitCrop, Stream

# Written by the code at 774d51e, after three batches; with each the inputs of the fourth.
SAVED = json.loads((Path(__file__).parent / "support" / "states_774d51e.json").read_text())
CHATS = [
    [
        {"role": "user", "content": f"{i} + 1?"},
        {"role": "assistant", "content": f"{i + 1}." + " yes" * (i % 7)},
    ]
    for i in range(40)
]
ARGUMENTS = {
    "best_fit": dict(packing=BestFit(window=5, max_age=3), loss_weights="token", seed=7, max_document_tokens=15),
    "stream": dict(packing=Stream(overlap=True), max_document_tokens=12, loss="all"),
    "best_fit_crop": dict(packing=BestFitCrop(window=4, refill=3), shard="row", seed=3),
    "pad": dict(packing="pad", epochs=1),
    "best_fit_pad of a mixture": dict(packing="best_fit_pad", max_document_tokens=14),
}


def loader_of(name, **changes):
    conversations = nanopack.mixture([(CHATS[:30], 2), (CHATS[30:], 1)]) if "mixture" in name else CHATS
    arguments = {**ARGUMENTS[name], **changes}
    return nanopack.Loader(conversations, "chat32k", 2, 24, num_workers=0, device="cpu", **arguments)


@pytest.mark.parametrize("name", list(SAVED))
def test_an_old_state_resumes_with_the_batch_that_came_next(name):
    loader = loader_of(name)
    loader.load_state_dict(SAVED[name]["state"])
    batch = next(loader)
    assert (batch.step, batch.inputs.tolist()) == (3, SAVED[name]["next"])
    assert loader.ledger()["balanced"]


@pytest.mark.parametrize("name", list(SAVED))
def test_an_old_state_becomes_the_one_that_is_saved_today(name):
    loader = loader_of(name)
    loader.load_state_dict(SAVED[name]["state"])
    today = loader.state_dict()
    again = loader_of(name)
    for _ in range(3):
        next(again)
    assert today == again.state_dict() != SAVED[name]["state"]


def test_old_states_of_all_ranks_are_merged_into_one_of_today():
    state = SAVED["best_fit_crop"]["state"]
    arguments = nanopack.merge_states([state])["fingerprint"]["arguments"]
    assert arguments["seed"] == 3 and "shuffle_seed" not in arguments and "overlap" not in arguments


@pytest.mark.parametrize(
    ("name", "changes", "difference"),
    [
        ("best_fit", {"seed": 8}, "seed was 7, is 8"),
        ("best_fit", {"loss_weights": None}, "loss_weights was 'token', is None"),
        ("best_fit", {"packing": BestFit(window=6, max_age=3)}, "window was 5, is 6"),
        ("stream", {"packing": "stream"}, "overlap was True, is False"),
        ("pad", {"packing": "stream"}, "packing was 'pad', is 'stream'"),
    ],
)
def test_what_differs_from_an_old_state_is_named_as_today(name, changes, difference):
    with pytest.raises(ValueError, match=difference):
        loader_of(name, **changes).load_state_dict(SAVED[name]["state"])
