"""A store holds the documents as they were rendered, and a Loader makes the same batches of it as of their data."""

from __future__ import annotations

import functools
import gc
import itertools
import json
import pickle
import tempfile
import weakref
from pathlib import Path

import numpy as np
import pytest
from data_sets import LARGE, PACKINGS, SHIPPED, SMALL, data_sets, drawn_arguments
from hypothesis import given
from hypothesis import strategies as st
from stores import settings_of, store_of

import nanopack
from nanopack import StorageError, reference
from nanopack.ledger import Ledger
from nanopack.store import Rendered, Store, is_store, write_store
from nanopack.verify import compare

Loader = functools.partial(nanopack.Loader, num_workers=0)
TALK = [
    {"messages": [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "de"}], "weight": 0.5},
    {"text": "plain"},
    {"messages": [{"role": "user", "content": "f"}, {"role": "assistant", "content": "ghij"}]},
]


@pytest.mark.parametrize("packing", PACKINGS)
@given(data=st.data())
def test_batches_of_a_store_are_those_of_its_conversations_and_of_the_reference_in_every_field(packing, data):
    conversations = data.draw(data_sets)
    arguments = data.draw(drawn_arguments(packing))
    tokenizer = data.draw(st.sampled_from([SMALL, LARGE]))
    with tempfile.TemporaryDirectory() as folder:
        store = store_of(Path(folder), conversations, tokenizer, data.draw(st.integers(1, 6)))
        given = data.draw(st.sampled_from([None, tokenizer]))
        kinds = [
            lambda: Loader(conversations, tokenizer, **arguments),
            lambda: Loader(folder, given, **arguments),
            lambda: reference.batches(store, tokenizer, **arguments),
        ]
        (expected, error), *others = (outcome(make, 6) for make in kinds)
        for got, got_error in others:
            assert (got_error is None) == (error is None)
            assert compare(iter(expected), iter(got)).difference is None


def outcome(make, count):
    batches, error = [], None
    try:
        for batch in itertools.islice(make(), count):
            batches.append(batch)
    except ValueError as raised:
        error = raised
    return batches, error


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_run_over_a_store_resumes_in_its_middle_with_the_ledger_that_its_conversations_have(packing, tmp_path):
    chats = [json.loads(line) for line in itertools.islice(SHIPPED.open(encoding="utf-8"), 300)]
    store_of(tmp_path, chats, "chat32k", 7)
    arguments = dict(batch_size=2, seq_len=128, packing=packing, epochs=1, seed=3)
    with Loader(chats, "chat32k", **arguments) as loader, Loader(tmp_path, **arguments) as stored:
        for _ in range(2):
            next(loader), next(stored)
        state = stored.state_dict()
        assert Ledger.of(state["lanes"]["0"]["ledger"]) == Ledger.of(loader.state_dict()["lanes"]["0"]["ledger"])
        with Loader(tmp_path, **arguments) as resumed:
            resumed.load_state_dict(state)
            assert compare(iter(loader), iter(resumed))
            assert loader.ledger() == resumed.ledger()


@pytest.mark.parametrize("tokenizer", [SMALL, LARGE])
def test_each_document_can_be_located_and_its_words_are_a_view_of_the_shard(tokenizer, tmp_path):
    store = store_of(tmp_path, TALK, tokenizer, shard_documents=2)
    shards, offsets = store.locate(np.array([2, 0, 1]))
    assert shards.tolist() == [1, 0, 0] and offsets.tolist() == [0, 0, store.lengths[0]]
    for document in range(3):
        words = store.words(document)
        assert any(np.shares_memory(words, shard) for shard in store.shards)
        record = store[document]
        assert record["input_ids"].tolist() == (words & ~words.dtype.type(store.loss_bit)).tolist()
        assert record["loss_mask"].sum() == store.loss_tokens[document]
        assert record["loss_mask"][0] == store.first_in_loss[document]
    assert store.word_dtype == (np.uint16 if tokenizer is SMALL else np.uint32) == store.shards[0].dtype
    assert store.weights.tolist() == [0.5, 1, 1] and store.conversations.tolist() == [0, 1, 2]


def test_weights_are_not_stored_where_all_are_1(tmp_path):
    assert store_of(tmp_path, TALK[1:], SMALL).weights is None
    assert not (tmp_path / "documents" / "weights.npy").exists()


def test_a_store_pickles_as_its_path(tmp_path):
    store = store_of(tmp_path, TALK, SMALL)
    assert len(pickle.dumps(store)) < 300 and pickle.loads(pickle.dumps(store))[2]["loss_mask"].any()


def test_a_store_of_a_mixture_knows_the_sources(tmp_path):
    mixed = nanopack.mixture([([{"text": "a"}, {"text": "b"}], 1, "letters"), ([{"text": "1"}], 1, "numbers")])
    store = store_of(tmp_path, mixed, SMALL)
    assert store.names == ("letters", "numbers")
    assert [store.source_of(i) for i in range(4)] == [mixed.source_of(i) for i in range(4)]
    arguments = dict(batch_size=1, seq_len=4, packing="stream", epochs=1)
    with Loader(mixed, SMALL, **arguments) as loader, Loader(tmp_path, **arguments) as stored:
        list(iter(loader)), list(iter(stored))
        assert loader.ledger()["sources"] == stored.ledger()["sources"]


def test_a_store_of_answers_is_one_document_an_answer(tmp_path):
    chat = {"messages": TALK[0]["messages"] * 2}
    store_of(tmp_path, [chat, *TALK], SMALL, turns="each")
    arguments = dict(batch_size=2, seq_len=64, epochs=1)
    with Loader([chat, *TALK], SMALL, turns="each", **arguments) as loader, Loader(tmp_path, **arguments) as stored:
        assert compare(iter(loader), iter(stored)) and stored.config.turns == "each"
        assert loader.ledger() == stored.ledger()


@pytest.mark.parametrize("damage", ["cut", "gone", "longer"])
@pytest.mark.parametrize("name", ["part-00000.words", "documents/lengths.npy"])
def test_a_damaged_file_is_named_when_the_store_is_opened(damage, name, tmp_path):
    store_of(tmp_path, TALK, SMALL)
    file = tmp_path / name
    whole = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(whole[:-1] if damage == "cut" else whole + b"\0")
    with pytest.raises(StorageError, match=rf"{name}: expected {len(whole):,} bytes, found"):
        Loader(tmp_path)


@pytest.mark.parametrize("old, new", [(b"NUMPY", b"NUMPZ"), (b"(3,)", b"(2,)"), (b"(3,)", b"(9,)"), (b"<u4", b"<i4")])
def test_a_column_whose_header_is_damaged_is_named_when_the_store_is_opened(old, new, tmp_path):
    store_of(tmp_path, TALK, SMALL)
    file = tmp_path / "documents" / "lengths.npy"
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new))
    with pytest.raises(
        StorageError, match=r"lengths\.npy: expected uint32 of 3 documents, found .*; copy the store again"
    ):
        Loader(tmp_path)


def test_a_manifest_that_was_cut_is_named_and_not_taken_for_conversations(tmp_path):
    store_of(tmp_path, TALK, SMALL)
    file = tmp_path / "manifest.json"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read as the manifest of a token store"):
        Loader(tmp_path, SMALL)


def test_a_loader_that_is_dropped_leaves_no_mapped_file_to_the_garbage_collector(tmp_path):
    store_of(tmp_path, TALK, SMALL)
    gc.collect()
    gc.disable()
    try:
        with Loader(tmp_path, batch_size=1, seq_len=8, epochs=1) as loader:
            words = weakref.ref(loader.source.shards[0])
            list(iter(loader))
        del loader
        assert words() is None
    finally:
        gc.enable()


def test_arguments_that_the_store_has_decided_are_its_own_or_refused(tmp_path):
    store_of(tmp_path, TALK, SMALL, template="chatml", loss="last")
    with Loader(tmp_path) as loader:
        assert (loader.config.template, loader.config.loss) == ("chatml", "last")
    with Loader(tmp_path, template="chatml", loss="all") as loader:
        assert loader.config.loss == "all"
    with pytest.raises(ValueError, match=r"template='llama3', and the documents of .* made with template='chatml'"):
        Loader(tmp_path, template="llama3")
    with pytest.raises(ValueError, match=r"turns='each', and the documents of .* with turns='all': leave it out"):
        Loader(tmp_path, turns="each")
    with pytest.raises(ValueError, match=r"tokenizer 'bytes' \(fingerprint .* is not the one that made"):
        Loader(tmp_path, LARGE)


def test_a_template_of_ones_own_comes_back(tmp_path):
    template = nanopack.Template(
        name="own",
        special_tokens=("<|im_end|>",),
        user=nanopack.Turn(before="Q"),
        assistant=nanopack.Turn(end="<|im_end|>", trained=True),
    )
    store_of(tmp_path, TALK, SMALL, template=template)
    with Loader(tmp_path, template=template) as loader:
        assert loader.config.template == template


def test_conversations_without_a_tokenizer_are_refused():
    with pytest.raises(ValueError, match="tokenizer=None is for a token store alone"):
        Loader(TALK)


def test_a_state_names_the_store_that_it_is_of(tmp_path):
    store = store_of(tmp_path / "one", TALK, SMALL)
    store_of(tmp_path / "other", [*TALK[:-1], {"text": "defgh"}], SMALL)
    arguments = dict(batch_size=1, seq_len=16)
    with Loader(tmp_path / "one", **arguments) as loader, Loader(tmp_path / "other", **arguments) as other:
        next(loader)
        state = loader.state_dict()
        assert state["fingerprint"]["sample"] == store.fingerprint()
        with pytest.raises(ValueError, match="the state belongs to another run"):
            other.load_state_dict(state)


def test_explain_knows_message_and_role_of_a_stored_token(tmp_path):
    store_of(tmp_path, TALK, SMALL)
    arguments = dict(batch_size=1, seq_len=64, packing="stream")
    with Loader(TALK, SMALL, **arguments) as loader, Loader(tmp_path, SMALL, **arguments) as stored:
        batch, its = next(loader), next(stored)
        for column in range(64):
            expected, got = loader.explain(batch, 0, column), stored.explain(its, 0, column)
            assert (got.in_loss, got.reason) == (expected.in_loss, expected.reason)
            assert (got.input.message, got.input.role, got.input.text, got.input.offset) == (
                expected.input.message, expected.input.role, expected.input.text, expected.input.offset
            )  # fmt: skip
        assert got.input.where.startswith(f"{tmp_path}: conversation ")
    with Loader(tmp_path, **arguments) as without:
        assert without.explain(next(without), 0, 1).input.text == "<257>"


def test_what_is_no_store_is_not_taken_for_one(tmp_path):
    assert not is_store(tmp_path) and not is_store(tmp_path / "none")
    (tmp_path / "manifest.json").write_text('{"format": 1}')
    assert not is_store(tmp_path)
    with pytest.raises(ValueError, match=r"manifest\.json is not the manifest of a token store"):
        Store(tmp_path)


def test_a_store_without_a_document_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no document to store"):
        write_store(tmp_path, [], settings_of(SMALL))
    assert not is_store(tmp_path)


def test_the_manifest_sums_up_the_documents(tmp_path):
    documents = [Rendered(np.arange(n), np.arange(n) > 0, i) for i, n in enumerate([1, 2, 3, 6])]
    manifest = write_store(tmp_path, documents, settings_of(SMALL), conversations=5, skipped=1).manifest
    assert (manifest.documents, manifest.conversations, manifest.skipped) == (4, 5, 1)
    assert (manifest.tokens, manifest.loss_tokens, manifest.lengths["max"]) == (12, 8, 6)
    assert sum(one.tokens for one in manifest.shards) == 12
