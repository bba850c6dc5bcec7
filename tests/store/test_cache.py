"""Loader(cache=...): the same batches with and without, a store once a pass has read all, whatever reads and dies."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
from covering import each
from data_sets import PACKINGS, SHIPPED, SMALL, data_sets, drawn_arguments
from hypothesis import given
from hypothesis import strategies as st
from stores import settings_of

import nanopack
from nanopack.conversations.data_sets import open_conversations
from nanopack.store import Rendered, Store
from nanopack.store.cache import HEAD, Cache, CachedStore
from nanopack.verify import compare

Loader = functools.partial(nanopack.Loader, num_workers=0)
ARGUMENTS = dict(batch_size=4, seq_len=256, epochs=1)
BAD = {"messages": [{"role": "judge", "content": "no"}]}


def stores(folder: Path) -> list[Path]:
    return [path.parent for path in folder.glob("*/manifest.json")]


def outcome(make, count):
    batches, error = [], None
    try:
        for batch in itertools.islice(make(), count):
            batches.append(batch)
    except ValueError as raised:
        error = type(raised)
    return batches, error


@pytest.mark.parametrize("packing", PACKINGS)
@given(data=st.data())
def test_the_batches_with_a_cache_are_those_without_in_every_pass_and_field(packing, data):
    conversations, arguments = data.draw(data_sets), data.draw(drawn_arguments(packing))
    with tempfile.TemporaryDirectory() as folder:
        expected, error = outcome(lambda: Loader(conversations, SMALL, **arguments), 12)
        for _ in range(3):
            got, its_error = outcome(lambda: Loader(conversations, SMALL, cache=folder, **arguments), 12)
            assert its_error == error and compare(iter(expected), iter(got)).difference is None


@pytest.mark.parametrize(("workers", "seed"), each([0, 1, 3], [None, 5]))
def test_a_pass_writes_the_store_and_the_next_one_does_not_tokenize(tmp_path, caplog, workers, seed):
    arguments = {**ARGUMENTS, "num_workers": workers, "seed": seed}
    caplog.set_level(logging.INFO, "nanopack")
    with Loader(SHIPPED, "chat32k", **arguments) as plain:
        expected = list(iter(plain))
        with Loader(SHIPPED, "chat32k", cache=tmp_path, **arguments) as loader:
            assert compare(iter(expected), iter(loader))
            (folder,) = stores(tmp_path)
            assert len(Store(folder)) == 2486 and not (folder / "spool").exists()
            # a second pass of the same loader
            assert compare(iter(expected), iter(loader))
            assert isinstance(loader._run.reader.source, CachedStore)
            assert loader.ledger()["balanced"]
        with Loader(SHIPPED, "chat32k", cache=tmp_path, **arguments) as again:
            assert isinstance(again._run.reader.source, CachedStore)
            assert compare(iter(expected), iter(again))
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("cache: ")]
    assert f"cache: no documents of these data yet; they are written to {folder}" in lines
    assert f"cache: the documents are read from {folder}" in lines


def test_an_endless_run_reads_the_store_from_its_second_pass_on(tmp_path):
    data = [{"text": "a" * n} for n in range(1, 20)]
    arguments = dict(batch_size=1, seq_len=32, packing="stream")
    with Loader(data, SMALL, **arguments) as plain, Loader(data, SMALL, cache=tmp_path, **arguments) as loader:
        for _ in range(30):
            assert compare(iter([next(plain)]), iter([next(loader)]))
        assert stores(tmp_path) and loader._run.reader._stored is not None


def test_ranks_fill_one_cache_together(tmp_path):
    arguments = {**ARGUMENTS, "world_size": 2, "packing": "stream"}
    for rank in (0, 1):
        assert not stores(tmp_path)
        with Loader(SHIPPED, SMALL, cache=tmp_path, rank=rank, **arguments) as loader:
            # the last one to have read its share finds all there
            list(itertools.islice(iter(loader), 10_000))
    assert len(Store(*stores(tmp_path))) == 2486


def test_a_run_that_is_killed_and_resumed_continues_the_cache(tmp_path):
    arguments = {**ARGUMENTS, "num_workers": 2}
    with Loader(SHIPPED, "chat32k", **arguments) as plain:
        expected = list(iter(plain))
    loader = Loader(SHIPPED, "chat32k", cache=tmp_path, **arguments)
    for batch in expected[:20]:
        assert compare(iter([batch]), iter([next(loader)]))
    state = loader.state_dict()
    os.kill(loader.producer_pid, signal.SIGKILL)
    loader.close()
    spooled = {path: path.stat().st_size for path in tmp_path.glob("*/spool/*")}
    # as a kill in the middle of a write leaves them: too short, or with zeros for the last conversation's words
    torn, other = list(spooled)[:2]
    with torn.open("ab") as file:
        file.write(b"\1\0\0\0torn")
    lengths = np.array([2485], "<i8").tobytes() + np.ones(1, "<f8").tobytes() + np.array([5, 0], "<u4").tobytes()
    with other.open("ab") as file:
        file.write(HEAD.pack(1, 0, 5, 0) + lengths + bytes(10))
    with Loader(SHIPPED, "chat32k", cache=tmp_path, **arguments) as resumed:
        resumed.load_state_dict(state)
        assert compare(iter(expected[20:]), iter(resumed))
    assert len(Store(*stores(tmp_path))) == 2486
    with Loader(SHIPPED, "chat32k", cache=tmp_path, **arguments) as again:
        assert compare(iter(expected), iter(again))


def cache_of(folder: Path, count: int) -> Cache:
    source = open_conversations([{"text": "a"}] * count)
    return Cache(folder, source, settings_of(SMALL), "")


def rendered(number: int) -> Rendered:
    return Rendered(np.array([number, 7]), np.array([False, True]), number)


def test_a_rank_that_comes_while_another_makes_the_store_finds_it(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "nanopack")
    one, other = cache_of(tmp_path, 2), cache_of(tmp_path, 2)
    one.add([rendered(1), rendered(0)])
    listdir = os.listdir

    def while_one_finishes(path):
        monkeypatch.setattr(os, "listdir", listdir)
        names = listdir(path)
        assert names and one.finish()
        return names

    monkeypatch.setattr(os, "listdir", while_one_finishes)
    assert other.finish() and len(other.stored()) == 2
    assert "are not in" not in caplog.text


def test_documents_that_the_system_writes_piece_by_piece_are_all_kept(tmp_path):
    class Slow:
        def write(self, data):
            return file.write(data[:5])

    cache = cache_of(tmp_path, 3)
    cache.add([rendered(0)])
    file, cache._file = cache._file, Slow()
    cache.add([rendered(2), rendered(1)])
    assert cache.finish() and [cache.stored()[i]["input_ids"].tolist() for i in range(3)] == [[0, 7], [1, 7], [2, 7]]


def test_a_state_goes_from_a_run_with_a_cache_to_one_without_and_back(tmp_path):
    with Loader(SHIPPED, SMALL, **ARGUMENTS) as plain, Loader(SHIPPED, SMALL, cache=tmp_path, **ARGUMENTS) as cached:
        list(iter(cached))
        cached.restart()
        for _ in range(5):
            next(plain), next(cached)
        one, other = plain.state_dict(), cached.state_dict()
        assert one["fingerprint"] == other["fingerprint"] and one["lanes"] == other["lanes"]
        plain.load_state_dict(other)
        cached.load_state_dict(one)
        assert compare(iter(plain), iter(cached))
        batch = plain.restart() or next(plain)
        assert str(cached.explain(batch, 0, 9)) == str(plain.explain(batch, 0, 9))


def test_other_arguments_have_another_store_and_free_ones_the_same(tmp_path):
    data = [{"text": "abc"}, {"text": "d"}]
    for more in ({}, {"seq_len": 8}, {"packing": "pad"}, {"loss": "all"}, {"template": "chatml"}, {"loss": "last"}):
        with Loader(data, SMALL, cache=tmp_path, **{**ARGUMENTS, **more}) as loader:
            list(iter(loader))
    assert len(stores(tmp_path)) == 3


def test_a_mixture_and_answers_are_cached_with_their_sources_and_copies(tmp_path):
    chat = {"messages": [{"role": role, "content": role} for role in ("user", "assistant") * 3]}
    mixed = nanopack.mixture([([chat, {"text": "b"}], 1, "chats"), ([{"text": "1"}], 1, "numbers")])
    for more in ({}, {"turns": "each"}):
        arguments = {**ARGUMENTS, **more}
        with Loader(mixed, SMALL, **arguments) as plain:
            expected = list(iter(plain))
            for _ in range(2):
                with Loader(mixed, SMALL, cache=tmp_path, **arguments) as cached:
                    assert compare(iter(expected), iter(cached)) and cached.ledger() == plain.ledger()


def test_while_a_conversation_is_bad_there_is_no_store_and_the_log_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO, "nanopack")
    with Loader([{"text": "a"}, BAD], SMALL, cache=tmp_path, on_error="skip", **ARGUMENTS) as loader:
        list(iter(loader))
    assert not stores(tmp_path) and "1 conversations are not in" in caplog.text


@pytest.mark.parametrize("kind", ["list", "file", "dataset", "mixture"])
def test_a_changed_conversation_is_never_read_from_the_cache_of_the_old_ones(tmp_path, kind):
    """Not even one that the fingerprint of a state does not see."""

    def data(changed):
        records = [{"text": f"{i}b" if changed and i == 33 else f"{i}a"} for i in range(100)]
        if kind == "file":
            (tmp_path / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            return tmp_path / "chats.jsonl"
        if kind == "dataset":
            return pytest.importorskip("datasets").Dataset.from_list(records)
        return nanopack.mixture([(records, 1)]) if kind == "mixture" else records

    for changed in (False, True):
        with Loader(data(changed), SMALL, cache=tmp_path / "cache", **ARGUMENTS) as loader:
            batches = list(iter(loader))
        with Loader(data(changed), SMALL, **ARGUMENTS) as plain:
            assert compare(iter(plain), iter(batches))
    assert len(stores(tmp_path / "cache")) == 2


def test_a_store_is_not_cached(tmp_path):
    nanopack.store.tokenize.tokenize([{"text": "a"}], SMALL, tmp_path / "out", num_workers=0)
    with pytest.raises(ValueError, match="has no meaning with a token store"):
        Loader(tmp_path / "out", cache=tmp_path / "cache")
