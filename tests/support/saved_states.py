"""States as files give them back, runs to take them of, and what a loader says that refuses one."""

from __future__ import annotations

import functools
import itertools
import json

import pytest
from data_sets import SMALL

import nanopack
from nanopack.verify import first_difference

Loader = functools.partial(nanopack.Loader, num_workers=0)
CHATS = [{"text": f"text {k}"} for k in range(20)]
BASE = dict(batch_size=2, seq_len=8, packing=nanopack.BestFit(window=4))


def through_json(state):
    """A state as it comes back from a file; its keys and values survive."""
    text = json.dumps(state)
    assert json.loads(text) == state
    return json.loads(text)


def differences(expected, got):
    return [first_difference(a, b) for a, b in zip(expected, got, strict=True)]


def same_state(one, other):
    return one.ledger() == other.ledger() and one.state_dict() == other.state_dict()


def refusal(state, conversations=CHATS, tokenizer=SMALL, strict=True, **changes):
    with pytest.raises(ValueError) as caught:
        Loader(conversations, tokenizer, **{**BASE, **changes}).load_state_dict(state, strict=strict)
    return str(caught.value)


def state_after(steps, conversations=CHATS, **changes):
    loader = Loader(conversations, SMALL, **{**BASE, **changes})
    for _ in itertools.islice(loader, steps):
        pass
    return loader.state_dict()
