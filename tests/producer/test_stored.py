"""Documents of a store without an object each: what is packed of them is what the same documents give as records."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import settings_of

import nanopack
from nanopack.config import LoaderConfig
from nanopack.conversations.data_sets import open_conversations
from nanopack.packing import BestFit, BestFitCrop, BestFitPad, Pad, Stream
from nanopack.producer.packed_state import add_digests, state_of
from nanopack.producer.producer import Producer, Start
from nanopack.producer.reader import Reader
from nanopack.producer.stored import StoreReader, reader_of
from nanopack.ring.ring import Ring
from nanopack.store import Rendered, Store, write_store
from nanopack.tokenizers.tokenizer import load_tokenizer
from nanopack.verify import compare

TOKENIZER = load_tokenizer("chat32k")
PACKINGS = st.one_of(
    st.builds(BestFit, window=st.integers(1, 6), max_age=st.integers(1, 4), refill=st.integers(1, 3)),
    st.builds(BestFitPad, window=st.integers(1, 6), refill=st.integers(1, 3)),
    st.builds(BestFitCrop, window=st.integers(1, 6), refill=st.integers(1, 3)),
    st.builds(Stream, overlap=st.booleans()),
    st.just(Pad()),
)


@st.composite
def configs(draw):
    world_size, seq_len = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    extras = draw(st.sampled_from([(), ("positions", "doc_ids", "cu_seqlens")]))
    return LoaderConfig(
        batch_size=draw(st.integers(1, 3)),
        seq_len=seq_len,
        packing=draw(PACKINGS),
        loss=draw(st.sampled_from(["assistant", "all"])),
        loss_weights=draw(st.sampled_from([None, "token", "conversation"])),
        boundary_loss=draw(st.booleans()),
        max_document_tokens=draw(st.none() | st.integers(1, 20)),
        extras=extras,
        seed=draw(st.none() | st.integers(0, 5)),
        epochs=draw(st.sampled_from([None, 1, 2])),
        rank=draw(st.integers(0, world_size - 1)),
        world_size=world_size,
        shard=draw(st.sampled_from(["rank", "row"])),
        max_pieces=seq_len if extras else None,
    )


@st.composite
def documents(draw):
    """Random tokens: weights of any kind, 0 included, and documents without a token in the loss."""
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    weights = draw(st.sampled_from([[1.0], [1.0, 0.0, 0.25, 3.0]]))
    longest, share = draw(st.sampled_from([3, 20, 80])), draw(st.sampled_from([0.1, 0.6, 1.0]))
    return [
        Rendered(
            ids=random.integers(0, TOKENIZER.vocab_size, length := int(random.integers(1, longest + 1))),
            mask=random.random(length) < share * random.integers(0, 2),
            conversation=number,
            weight=weights[int(random.integers(len(weights)))],
        )
        for number in range(draw(st.integers(1, 30)))
    ]


class Filled:
    """A producer with a slot of its own, compared by all that it makes."""

    def __init__(self, reader, state=None):
        self.reader = reader
        self._slot = Ring(reader.layout, 1).slots[0]
        self._producer = Producer(reader, Start(state))

    def state(self):
        state = state_of(self._producer.packed_state())
        add_digests(state, self.reader)
        return json.loads(json.dumps(state))

    def next(self):
        """The next batch: its facts, the used bytes of its slot, and the state then; or the error, by its text."""
        self._slot.buffer[:] = 0xAB
        try:
            facts = self._producer.produce(self._slot)
        except ValueError as error:
            return str(error)
        if facts is None:
            return self.state()
        return facts._replace(state=b"", states=b""), self._slot.buffer[: facts.used_bytes].tobytes(), self.state()


def check_equal(stored, recorded, batches=6):
    """The same batches, facts, ledgers and states; and each resumes from each state of the other."""
    assert isinstance(stored, StoreReader) and not isinstance(recorded, StoreReader)
    one, other = Filled(stored), Filled(recorded)
    resumed = []
    for _ in range(batches):
        got, expected = one.next(), other.next()
        assert got == expected
        for again in resumed:
            assert again.next() == expected
        if not isinstance(got, tuple):
            return
        resumed = [Filled(stored, got[-1]), Filled(recorded, got[-1])]


@given(documents(), configs(), st.sampled_from([1, 4, 100]))
def test_what_is_packed_of_a_store_is_what_its_documents_give_as_records(made, config, shard_documents):
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder) / "store", made, settings_of("chat32k"), shard_documents=shard_documents)
        records = open_conversations([store[i] for i in range(len(store))])
        records.where = store.where
        check_equal(reader_of(store, TOKENIZER, config), Reader(records, TOKENIZER, config))


@given(documents(), documents(), configs(), st.integers(1, 9))
def test_a_mixture_of_stores_is_packed_as_one_of_their_records(made, others, config, weight):
    with tempfile.TemporaryDirectory() as folder:
        stores = [
            write_store(Path(folder) / str(number), one, settings_of("chat32k"), shard_documents=4)
            for number, one in enumerate((made, others))
        ]
        mixed = nanopack.mixture([(stores[0], weight, "a"), (stores[1], 4, "b")], seed=3)
        lists = [[store[i] for i in range(len(store))] for store in stores]
        as_records = nanopack.mixture([(lists[0], weight, "a"), (lists[1], 4, "b")], seed=3)
        as_records.where = mixed.where
        check_equal(reader_of(mixed, TOKENIZER, config), Reader(as_records, TOKENIZER, config), batches=4)


class Bare(Store):
    """A store whose words are ids alone, all of them in the loss, in another width: as others' formats have them."""

    all_in_loss = True

    def as_type(self, dtype):
        self.shards = [(np.asarray(shard) & 0x7FFF).astype(dtype) for shard in self.shards]
        self.loss_tokens, self.first_in_loss = self.lengths, np.ones(len(self), bool)
        return self


@given(documents(), configs(), st.sampled_from([np.uint16, np.int16]))
def test_bare_ids_are_in_the_loss_but_where_a_weight_is_0(made, config, dtype):
    made = [one._replace(ids=np.minimum(one.ids, 32_000)) for one in made]
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder) / "store", made, settings_of("chat32k"), shard_documents=8)
        store = Bare(Path(folder) / "store").as_type(dtype)
        records = open_conversations([store[i] for i in range(len(store))])
        records.where = store.where
        check_equal(reader_of(store, TOKENIZER, config), Reader(records, TOKENIZER, config), batches=4)


@given(documents(), configs(), st.sampled_from([1, 2]))
def test_with_window_all_the_batches_are_those_of_the_reference_and_resume_at_every_step(made, config, epochs):
    arguments = dict(vars(config), packing=BestFit(window="all"), epochs=epochs)
    arguments.pop("limits", None)
    if "cu_seqlens" not in config.extras:
        arguments["max_pieces"] = None
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder) / "store", made, settings_of("chat32k"), shard_documents=9)
        expected = list(nanopack.reference.batches(store, TOKENIZER, **arguments))
        loader = nanopack.Loader(store, None, num_workers=0, **arguments)
        counted = len(loader)
        got, states = [], []
        for batch in iter(loader):
            got.append(batch)
            states.append(json.loads(json.dumps(loader.state_dict())))
        assert counted == len(got) == len(expected)
        assert compare(iter(expected), iter(got)).difference is None
        assert loader.ledger()["balanced"]
        for step, state in list(enumerate(states))[:: 1 + len(states) // 4]:
            again = nanopack.Loader(store, None, num_workers=0, **arguments)
            again.load_state_dict(state)
            rest, then = [], []
            for batch in iter(again):
                rest.append(batch)
                then.append(json.loads(json.dumps(again.state_dict())))
            assert compare(iter(expected[step + 1 :]), iter(rest)).difference is None
            assert then == states[step + 1 :]


def test_window_all_needs_lengths():
    with pytest.raises(ValueError, match=r"window='all'.*nanopack tokenize"):
        nanopack.Loader([{"text": "a"}], "chat32k", packing=BestFit(window="all"))


@pytest.mark.parametrize("shard", ["rank", "row"])
def test_a_store_is_counted_without_reading_a_word(tmp_path, shard):
    made = [Rendered(np.full(k % 40 + 1, 7), np.ones(k % 40 + 1, bool), k) for k in range(500)]
    store = write_store(tmp_path / "store", made, settings_of("chat32k"))
    arguments = dict(batch_size=4, seq_len=64, epochs=3, seed=1, shard=shard, num_workers=0)
    loaders = [nanopack.Loader(store, None, rank=rank, world_size=2, **arguments) for rank in range(2)]
    for loader in loaders:
        loader._run.reader._arrays = [None]
    counted = [len(loader) for loader in loaders]
    delivered = [
        len(list(iter(nanopack.Loader(store, None, rank=rank, world_size=2, **arguments)))) for rank in range(2)
    ]
    assert counted == delivered and len(set(counted)) == 1
