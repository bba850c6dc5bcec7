"""A record is read again where a store fails for a moment, and draws the same random numbers wherever it is read."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from faulty import SMALL, TOKENIZER

import nanopack
from nanopack import Loader, reference
from nanopack.verify import compare


class Drawing:
    """Texts of random numbers, as a data set with random system prompts would have them."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        numbers = random.random(), np.random.rand(), torch.rand(1).item()
        return {"text": " ".join(f"{number:.6f}" for number in numbers)}


class Keeping:
    """Texts of random numbers from generators that the data set keeps; one is made when it is first needed."""

    def __init__(self):
        self.python, self.old, self.torch = random.Random(0), np.random.RandomState(0), torch.Generator().manual_seed(0)
        self.new, self.system = None, random.SystemRandom()

    def __len__(self):
        return 64

    def __getitem__(self, index):
        self.new = self.new or np.random.default_rng(0)
        numbers = self.python.random(), self.old.rand(), self.new.random(), torch.rand(1, generator=self.torch).item()
        return {"text": " ".join(f"{number:.6f}" for number in numbers)}


def drawn(data, workers, **arguments):
    with Loader(data, TOKENIZER, epochs=1, num_workers=workers, **(SMALL | arguments)) as loader:
        return list(loader), len(loader)


def transformed():
    datasets = pytest.importorskip("datasets", reason="needs datasets, of the extra test")
    rows = datasets.Dataset.from_dict({"text": [""] * 64})
    return rows.with_transform(lambda batch: {"text": [Drawing()[0]["text"] for _ in batch["text"]]})


def column():
    datasets = pytest.importorskip("datasets", reason="needs datasets, of the extra test")
    rows = datasets.Dataset.from_dict({"text": [""] * 64})
    return rows.with_transform(lambda batch: {"text": [Drawing()[0] for _ in batch["text"]]})["text"]


DATA_SETS = {
    "alone": Drawing,
    "mixed": lambda: nanopack.mixture([(Drawing(), 1), ([{"text": "a"}] * 8, 1)]),
    "transformed": transformed,
    "transformed, a column": column,
    "keeping": Keeping,
    "keeping, mixed": lambda: nanopack.mixture([(Keeping(), 1), (Keeping(), 1)]),
    "keeping, split": lambda: torch.utils.data.ConcatDataset(torch.utils.data.random_split(Keeping(), [40, 24])),
}


@pytest.mark.parametrize("make", DATA_SETS.values(), ids=DATA_SETS)
def test_a_random_data_set_gives_the_same_batches_in_however_many_processes(make):
    data = make()
    expected = list(reference.batches(data, TOKENIZER, epochs=1, **SMALL))
    for workers in (0, 1, 2, 4):
        got, length = drawn(data, workers)
        assert compare(iter(expected), iter(got)).difference is None
        assert length == len(got)


@pytest.mark.parametrize("make", [Drawing, Keeping])
def test_two_conversations_never_draw_the_same_and_another_seed_draws_others(make):
    texts = []
    for seed in (None, 1, 2):
        with Loader(make(), TOKENIZER, 1, 64, packing="pad", epochs=1, num_workers=2, seed=seed) as loader:
            texts += [tuple(batch.inputs.flatten().tolist()) for batch in loader]
    assert len(set(texts)) == len(texts) == 3 * 64


@pytest.mark.parametrize("make", [Drawing, Keeping])
def test_a_random_data_set_resumes_and_is_explained_as_it_was(make):
    expected, _ = drawn(make(), 0)
    with Loader(make(), TOKENIZER, epochs=1, num_workers=2, **SMALL) as loader:
        batch = [next(loader) for _ in range(20)][-1]
        asked = [loader.explain(batch, 0, column).input.id for column in range(8)]
        state = loader.state_dict()
    assert asked == batch.inputs[0].tolist()
    with Loader(make(), TOKENIZER, epochs=1, num_workers=1, **SMALL) as loader:
        loader.load_state_dict(state)
        assert compare(iter(expected[20:]), iter(list(loader))).difference is None


@pytest.mark.parametrize("workers", [0, 1])
def test_the_trainers_random_numbers_are_left_alone(workers):
    def numbers():
        return random.random(), np.random.rand(), torch.rand(1).item()

    def seed():
        random.seed(0), np.random.seed(0), torch.manual_seed(0)

    seed()
    expected = numbers()
    seed()
    with Loader(Drawing(), TOKENIZER, epochs=1, num_workers=workers, **SMALL) as loader:
        batch = next(loader)
        loader.explain(batch, 0, 0)
        loader.state_dict()
        assert len(loader)
    list(reference.batches(Drawing(), TOKENIZER, epochs=1, **SMALL))
    assert numbers() == expected


def test_the_generators_that_a_data_set_keeps_are_left_alone_in_the_trainer():
    data, untouched = Keeping(), Keeping()
    data[0], untouched[0]
    with Loader(data, TOKENIZER, epochs=1, num_workers=0, **SMALL) as loader:
        assert len(list(loader)) == len(loader)
    list(reference.batches(data, TOKENIZER, epochs=1, **SMALL))
    assert data[1] == untouched[1]
