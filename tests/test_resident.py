"""A loader whose words are on the device gives the batches of any other, by `next` and by graph batches."""

from __future__ import annotations

import functools
import itertools
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import LARGE, PACKINGS, SHIPPED, SMALL, data_sets, drawn_arguments
from hypothesis import given
from hypothesis import strategies as st
from stores import store_of

import nanopack
from nanopack import BestFit, mixture, reference, verify
from nanopack.store import Store
from nanopack.store.foreign import open_bin
from nanopack.upload.device import Cpu
from nanopack.upload.words import resident_words
from nanopack.verify import compare, first_difference

Loader = functools.partial(nanopack.Loader, num_workers=0, device="cpu")
EXTRAS = ("positions", "doc_ids", "cu_seqlens")


def snapshot(batch):
    """The batch as it is now: its tensors will be written again."""
    tensors = {name: getattr(batch, name) for name in ("inputs", "targets", "weights", *EXTRAS)}
    return replace(batch, **{name: tensor.clone() for name, tensor in tensors.items() if tensor is not None})


def loads(batches, counts=(99,)):
    """Load all batches, and give each; `counts`, again and again: how many before a refill."""
    count = itertools.cycle(counts)
    ready = batches.refill()
    while ready:
        now = ready[: next(count)]
        for batch in now:
            batches.load()
            # what is inside a graph is what the host knows beforehand
            assert batches.num_loss_tokens.item() == batch.num_loss_tokens
            assert batches.num_tokens.item() == batch.num_tokens
            assert batches.weight_sum.item() == batch.weight_sum
            assert batches.max_seqlen.item() == batch.max_seqlen
            yield snapshot(batch)
        ready = batches.refill(len(now))


def by_next(loader):
    return iter(loader)


def by_graph(loader):
    return loads(loader.graph_batches(3))


def by_graph_in_parts(loader):
    return loads(loader.graph_batches(5), counts=(1, 2, 4))


FORMS = {"next": by_next, "graph": by_graph, "graph, in parts": by_graph_in_parts}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def chats(count, weights=(1,), seed=0):
    random = np.random.default_rng(seed)
    return [
        {
            "messages": [
                {"role": "user", "content": "ab" * int(random.integers(1, 9))},
                {"role": "assistant", "content": "cde" * int(random.integers(1, 12))},
            ],
            "weight": float(random.choice(weights)),
        }
        for _ in range(count)
    ]


def outcome(make, count):
    batches, error = [], None
    try:
        for batch in itertools.islice(make(), count):
            batches.append(batch)
    except ValueError as raised:
        error = raised
    return batches, error


@pytest.mark.parametrize("packing", PACKINGS)
@given(data=st.data())
def test_batches_are_those_of_the_reference_in_every_field_and_form(packing, data):
    conversations = data.draw(data_sets)
    arguments = data.draw(drawn_arguments(packing)) | {"document_align": 1}
    arguments["extras"] = tuple(extra for extra in arguments["extras"] if extra != "cu_seqlens_real")
    if "cu_seqlens" not in arguments["extras"]:
        arguments.pop("max_pieces", None)
    tokenizer = data.draw(st.sampled_from([SMALL, LARGE]))
    with tempfile.TemporaryDirectory() as folder:
        store = store_of(Path(folder), conversations, tokenizer, data.draw(st.integers(1, 6)))
        expected, error = outcome(lambda: reference.batches(store, tokenizer, **arguments), 6)
        for form in FORMS.values():
            got, got_error = outcome(lambda form=form: form(Loader(store, None, resident=True, **arguments)), 6)
            assert (got_error is None) == (error is None), (error, got_error)
            assert compare(iter(expected), iter(got)).difference is None


@each_form
@pytest.mark.parametrize("shard", ["rank", "row"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_state_ledger_and_stats_after_every_batch_are_those_of_a_loader_without(form, shard, packing, tmp_path):
    store = store_of(tmp_path / "store", chats(60, weights=(1, 0.5, 2, 0)), SMALL, shard_documents=17)
    arguments = {"batch_size": 3, "seq_len": 48, "packing": packing, "loss_weights": "token", "epochs": 2, "seed": 3}
    arguments |= {"extras": EXTRAS, "shard": shard}
    plain, resident = (Loader(store, None, resident=kind, **arguments) for kind in (False, True))
    for batch in form(resident):
        expected = next(plain)
        assert first_difference(expected, batch) is None
        if form is by_next:
            assert resident.state_dict() == plain.state_dict()
    with pytest.raises(StopIteration):
        next(plain)
    assert resident.state_dict() == plain.state_dict() and resident.ledger() == plain.ledger()
    same = ("batches", "tokens", "padding", "longest_wait_rows")
    assert [resident.stats()[name] for name in same] == [plain.stats()[name] for name in same]
    assert len(resident) == len(plain) == plain.stats()["batches"] > 5


@pytest.mark.parametrize("packing", ["best_fit", "stream", "best_fit_crop"])
def test_a_state_counts_what_was_loaded_and_any_form_resumes_from_it(packing, tmp_path):
    store = store_of(tmp_path / "store", chats(60), SMALL, shard_documents=17)
    arguments = {"batch_size": 2, "seq_len": 40, "packing": packing, "epochs": 2, "seed": 3}
    expected = list(Loader(store, None, **arguments))
    for stop in (1, 3, 7):
        loader = Loader(store, None, resident=True, **arguments)
        batches = loader.graph_batches(4)
        left = stop
        while left:
            ready = batches.refill()[:left]
            for _ in ready:
                batches.load()
            # the rest of them are on the device, and no part of the state
            batches.refill(len(ready))
            left -= len(ready)
        state = loader.state_dict()
        plain = Loader(store, None, **arguments)
        for _ in range(stop):
            next(plain)
        assert state == plain.state_dict() and loader.ledger() == plain.ledger()
        for form in FORMS.values():
            resumed = Loader(store, None, resident=True, **arguments)
            resumed.load_state_dict(state)
            assert compare(iter(expected[stop:]), form(resumed)).difference is None
        # and the same tensors, to which a graph may be bound, resume as well
        batches.load()
        loader.load_state_dict(state)
        assert compare(iter(expected[stop:]), loads(batches)).difference is None


def test_graph_batches_begin_after_the_batch_delivered_last_and_next_then_raises(tmp_path):
    store = store_of(tmp_path / "store", chats(40), SMALL)
    arguments = {"batch_size": 2, "seq_len": 40, "epochs": 1}
    expected = list(Loader(store, None, **arguments))
    loader = Loader(store, None, resident=True, **arguments)
    assert first_difference(expected[0], next(loader)) is None
    batches = loader.graph_batches(4)
    assert compare(iter(expected[1:]), loads(batches)).difference is None
    with pytest.raises(RuntimeError, match="go to its graph_batches"):
        next(loader)


def test_a_miscount_of_the_last_batches_is_an_error_at_the_end(tmp_path):
    store = store_of(tmp_path / "store", chats(40), SMALL)
    batches = Loader(store, None, batch_size=2, seq_len=40, epochs=1, resident=True).graph_batches(1000)
    ready = batches.refill()
    for _ in range(len(ready) + 1):
        batches.load()
    with pytest.raises(RuntimeError, match=f"given {len(ready)} loads in all, and the device counted {len(ready) + 1}"):
        batches.refill(len(ready))


def test_tables_for_which_a_half_has_no_room_come_with_the_next_and_are_no_part_of_a_state(tmp_path):
    lengths = [400] * 60 + [2] * 300
    records = [{"input_ids": [5] * length, "loss_mask": [1] * length} for length in lengths]
    store = store_of(tmp_path / "store", records, SMALL, shard_documents=1000)
    arguments = {"batch_size": 2, "seq_len": 40, "epochs": 1, "packing": "stream"}
    expected = list(Loader(store, None, **arguments))
    loader = Loader(store, None, resident=True, **arguments)
    batches, state = loader.graph_batches(4), loader.state_dict()
    ready = batches.refill()
    while len(ready) == 4:
        for _ in ready:
            batches.load()
        ready = batches.refill(4)
    # one table waits for room
    assert 0 < len(ready) < 4 and loader.state_dict()["step"] + len(ready) < len(expected)
    loader.load_state_dict(state)
    assert compare(iter(expected), loads(batches)).difference is None


def test_graph_batches_that_get_no_more_batches_load_and_refill_none(tmp_path):
    loader = Loader(store_of(tmp_path / "store", chats(40), SMALL), None, batch_size=2, seq_len=40, resident=True)
    old, new = loader.graph_batches(3), loader.graph_batches(3)
    for call in (old.load, old.refill):
        with pytest.raises(RuntimeError, match="go to other graph_batches"):
            call()
    assert len(new.refill()) == 3
    loader.close()
    for call in (new.load, new.refill):
        with pytest.raises(RuntimeError, match="the loader is closed"):
            call()


def test_a_refill_inside_a_capture_is_refused_and_counts_nothing(tmp_path, monkeypatch):
    store = store_of(tmp_path / "store", chats(40), SMALL)
    arguments = {"batch_size": 2, "seq_len": 40, "epochs": 1}
    loader = Loader(store, None, resident=True, **arguments)
    batches = loader.graph_batches(3)
    for _ in batches.refill():
        batches.load()
    with monkeypatch.context() as capture:
        capture.setattr(Cpu, "capturing", lambda self: True)
        with pytest.raises(RuntimeError, match="inside a CUDA graph capture"):
            batches.refill(3)
    assert loader.state_dict()["step"] == 0
    batches.refill(3)
    assert compare(iter(list(Loader(store, None, **arguments))[3:]), loads(batches)).difference is None


def test_a_new_pass_goes_to_the_same_tensors(tmp_path):
    store = store_of(tmp_path / "store", chats(40), SMALL)
    loader = Loader(store, None, batch_size=2, seq_len=40, epochs=1, resident=True)
    batches = loader.graph_batches(3)
    address, first = batches.inputs.data_ptr(), list(loads(batches))
    assert batches.refill() == []
    loader.restart()
    assert compare(iter(first), loads(batches)).difference is None
    assert batches.inputs.data_ptr() == address


def test_a_load_before_the_first_refill_or_too_many_is_padding_and_a_miscount_an_error(tmp_path):
    store = store_of(tmp_path / "store", chats(60), SMALL)
    loader = Loader(store, None, batch_size=2, seq_len=40, resident=True, extras=EXTRAS)
    batches = loader.graph_batches(2)
    batches.load()
    assert batches.num_loss_tokens.item() == 0 and set(batches.targets.unique().tolist()) == {-100}
    assert len(batches.refill()) == 2
    for _ in range(3):
        batches.load()
    assert batches.num_tokens.item() == 0 and batches.cu_seqlens[:3].tolist() == [0, 40, 80]
    assert set(batches.inputs.unique().tolist()) == {loader.tokenizer.bos_id}
    with pytest.raises(ValueError, match="loaded=3 is not allowed: 2 batches were ready"):
        batches.refill(3)
    ready = batches.refill(2)
    with pytest.raises(RuntimeError, match="given 2 loads in all, and the device counted 3"):
        batches.refill(len(ready))


@each_form
def test_a_mixture_of_stores_is_resident_too(form, tmp_path):
    stores = [
        (store_of(tmp_path / name, chats(count, seed=count), SMALL, shard_documents=7), weight, name)
        for count, weight, name in ((12, 2, "few"), (40, 3, "many"))
    ]
    mixed = mixture(stores)
    arguments = {"batch_size": 2, "seq_len": 64, "epochs": 1, "seed": 5, "loss": "all", "boundary_loss": False}
    loader = Loader(mixed, SMALL, resident=True, **arguments)
    assert compare(reference.batches(mixed, SMALL, **arguments), form(loader)).difference is None
    assert loader.ledger() == exhausted(Loader(mixed, SMALL, **arguments)).ledger()


def exhausted(loader):
    for _ in loader:
        pass
    return loader


@each_form
def test_a_token_is_explained_as_without(form, tmp_path):
    store = store_of(tmp_path / "store", chats(20), "chat32k")
    loader, plain = (Loader(store, "chat32k", batch_size=2, seq_len=64, epochs=1, resident=r) for r in (True, False))
    for batch in form(loader):
        expected = next(plain)
        for row, col in ((0, 3), (1, 20)):
            assert loader.explain(batch, row, col) == plain.explain(expected, row, col)


def test_verify_takes_resident(tmp_path):
    store = store_of(tmp_path / "store", chats(20), SMALL)
    assert verify(store, SMALL, batch_size=2, seq_len=64, resident=True, num_workers=0, device="cpu")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_producer_in_its_own_process_fills_tables(method, tmp_path):
    store = store_of(tmp_path / "store", chats(40), SMALL)
    arguments = {"batch_size": 2, "seq_len": 40, "epochs": 1}
    expected = list(Loader(store, None, **arguments))
    with Loader(store, None, resident=True, **arguments | {"num_workers": 1, "start_method": method}) as loader:
        assert compare(iter(expected), loads(loader.graph_batches(3))).difference is None


def test_the_kernel_of_triton_gives_the_same_in_both_forms(tmp_path):
    store = store_of(tmp_path / "store", chats(30, weights=(1, 0.5, 0)), SMALL)
    arguments = {"batch_size": 2, "seq_len": 128, "epochs": 1, "extras": EXTRAS, "loss_weights": "conversation"}
    expected = list(Loader(store, None, **arguments))
    for form in (by_next, by_graph):
        got = form(Loader(store, None, resident=True, executor="triton", **arguments))
        assert compare(iter(expected), got).difference is None


@pytest.mark.parametrize("mean, most", [(550, 3_000), (135, 9_000)])
def test_a_batch_costs_few_bytes_over_the_bus(mean, most, tmp_path):
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(mean) - 0.32, 0.8, 3000), 2, 2049).astype(int)
    assert abs(lengths.mean() / mean - 1) < 0.1
    records = [{"input_ids": [5] * length, "loss_mask": [1] * length} for length in lengths.tolist()]
    store = store_of(tmp_path / "store", records, SMALL, shard_documents=10_000)
    loader = Loader(store, None, batch_size=32, seq_len=2048, resident=True)
    for _ in range(4):
        next(loader)
    assert loader.stats()["bytes_copied"] / 4 <= most


def test_on_the_cpu_the_words_of_one_shard_are_the_mapped_file_itself(tmp_path):
    store = store_of(tmp_path / "store", chats(20), SMALL, shard_documents=100)
    words = resident_words(store.shards, store.word_dtype, Cpu()).words
    assert words.data_ptr() == store.shards[0].ctypes.data
    several = store_of(tmp_path / "more", chats(20), SMALL, shard_documents=3)
    joined = resident_words(several.shards, several.word_dtype, Cpu()).words
    assert torch.equal(joined, words)


@pytest.mark.parametrize("conversations", [chats(3), str(SHIPPED)], ids=["list", "file"])
def test_what_is_no_store_cannot_be_resident(conversations):
    with pytest.raises(ValueError, match="resident needs documents that are tokens already"):
        Loader(conversations, SMALL, resident=True)


@pytest.mark.parametrize("more", [{"document_align": 8}, {"extras": ("cu_seqlens", "cu_seqlens_real")}])
def test_words_that_are_in_no_store_cannot_be_resident(more, tmp_path):
    store = store_of(tmp_path / "store", chats(20), SMALL)
    with pytest.raises(ValueError, match="no place for the tails"):
        Loader(store, None, resident=True, **more)


@each_form
def test_a_pass_packed_as_a_whole_and_dealt_rows_are_resident_too(form, tmp_path):
    store = store_of(tmp_path / "store", chats(60), SMALL, shard_documents=17)
    for more in ({"packing": BestFit(window="all"), "seed": 2}, {"balance": (1, 0.01), "balance_window": 2}):
        arguments = {"batch_size": 2, "seq_len": 64, "epochs": 1, **more}
        loader = Loader(store, None, resident=True, **arguments)
        assert compare(iter(Loader(store, None, **arguments)), form(loader)).difference is None


@each_form
@pytest.mark.parametrize("loss", ["assistant", "all"])
@pytest.mark.parametrize("boundary_loss", [True, False])
def test_bare_ids_are_resident_and_one_that_is_unknown_is_an_error(form, loss, boundary_loss, tmp_path):
    ids = np.random.default_rng(0).integers(0, 250, 900).astype(np.uint16)
    ids[::37] = 256
    ids.tofile(tmp_path / "train.bin")
    arguments = {"batch_size": 2, "seq_len": 64, "epochs": 1, "loss": loss, "boundary_loss": boundary_loss}
    bare = open_bin(tmp_path / "train.bin", SMALL, begin_id=256)
    expected = list(Loader(bare, SMALL, **arguments))
    assert len(expected) > 3
    got = form(Loader(bare, SMALL, resident=True, **arguments))
    assert compare(iter(expected), got).difference is None
    ids[500] = 1000
    ids.tofile(tmp_path / "train.bin")
    with pytest.raises(ValueError, match="word 500 of the data has the id 1000; ids are from 0 to"):
        Loader(open_bin(tmp_path / "train.bin", SMALL, begin_id=256, check=False), SMALL, resident=True, **arguments)


@pytest.mark.parametrize("resident", ["device", 2, None])
def test_other_places_are_refused(resident):
    with pytest.raises(ValueError, match="use True, False or 'host'"):
        Loader(chats(3), SMALL, resident=resident)


def test_graph_batches_need_resident_words_and_a_number(tmp_path):
    store = store_of(tmp_path / "store", chats(20), SMALL)
    with pytest.raises(ValueError, match="make the loader with resident=True"):
        Loader(store, None).graph_batches(3)
    for k in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="k="):
            Loader(store, None, resident=True).graph_batches(k)


class Full(Cpu):
    """A GPU without room, and a host that pins nothing."""

    def free_bytes(self):
        return 1000, 2000

    def pin(self, memory):
        return False


def test_want_of_room_is_said_in_bytes(tmp_path):
    from nanopack.upload import words

    store: Store = store_of(tmp_path / "store", chats(40), SMALL)
    need = 2 * int(store.lengths.sum())
    assert need > 1000
    with pytest.raises(MemoryError, match=f"needs {need} bytes on cpu for the words of the store, and 1000 of 2000"):
        words._on_device(store.shards, store.word_dtype, need, Full(), lambda done, all: None)
    with pytest.raises(MemoryError, match=f"'host' needs {need} bytes of pinned host memory"):
        words._in_host_memory(store.shards, store.word_dtype, need, Full(), lambda done, all: None)


def test_memory_is_unpinned_where_the_words_cannot_be_read():
    from nanopack.upload import words

    pinned = []

    class Pinning(Full):
        def pin(self, memory):
            pinned.append(memory.ctypes.data)
            return True

        def unpin(self, memory):
            pinned.remove(memory.ctypes.data)

    def fail(done, all):
        raise OSError("no such page")

    for bring in (words._on_device, words._in_host_memory):
        with pytest.raises(OSError, match="no such page"):
            bring([np.ones(9, np.uint16)], np.dtype(np.uint16), 18, Pinning(), fail)
    assert not pinned


def test_progress_of_the_upload_is_reported_and_wide_words_are_made_of_narrow_ones():
    from nanopack.upload import words

    arrays = [np.arange(7, dtype=np.uint16), np.arange(5, dtype=np.uint16) + 65_000]
    reports = []

    class Roomy(Full):
        def free_bytes(self):
            return 1 << 40, 1 << 40

    before, words.CHUNK_BYTES = words.CHUNK_BYTES, 16
    try:
        whole = words._on_device(arrays, np.dtype(np.uint32), 48, Roomy(), lambda *report: reports.append(report))
    finally:
        words.CHUNK_BYTES = before
    assert whole.view(torch.int32).tolist() == [*range(7), *range(65_000, 65_005)]
    assert reports == [(16, 48), (28, 48), (44, 48), (48, 48)]
