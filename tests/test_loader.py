"""The loader, compared with the reference packer over all of its arguments."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math

import numpy as np
import pytest
import torch
from data_sets import LARGE, PACKINGS, SMALL, byte_tokenizer, data_sets, drawn_arguments
from hypothesis import given
from hypothesis import strategies as st

import nanopack
from nanopack import ConversationError, reference
from nanopack.conversations.records import open_conversations
from nanopack.upload.device import Cpu
from nanopack.verify import compare

# In the caller's thread: tests/producer/test_process.py shows that a process gives the same batches.
Loader = functools.partial(nanopack.Loader, num_workers=0)


def first_batches(make, count):
    """Run to `count` batches, the end, or the error; the error is part of what is compared."""
    batches, error = [], None
    try:
        for batch in itertools.islice(make(), count):
            batches.append(batch)
    except ValueError as raised:
        error = type(raised)
    return batches, error


@pytest.mark.parametrize("executor", ["torch", "triton"])
@pytest.mark.parametrize("packing", PACKINGS)
@given(data=st.data())
def test_batches_equal_the_reference_in_every_field(executor, packing, data):
    conversations = data.draw(data_sets)
    arguments = data.draw(drawn_arguments(packing))
    tokenizer = data.draw(st.sampled_from([SMALL, LARGE]))
    count = 3 if executor == "triton" else 6
    expected, error = first_batches(lambda: reference.batches(conversations, tokenizer, **arguments), count)
    loader = Loader(conversations, tokenizer, executor=executor, **arguments)
    got, got_error = first_batches(lambda: loader, count)
    assert got_error == error
    assert compare(iter(expected), iter(got)).difference is None
    assert loader.ledger()["balanced"], loader.ledger()["imbalances"]


@pytest.mark.parametrize("packing", PACKINGS)
@given(data=st.data())
def test_ranks_partition_the_data_and_nothing_is_lost_or_comes_twice(packing, data):
    """Every document carries its own number as text, so what comes out says where it came from."""
    n = data.draw(st.integers(1, 30))
    world_size, epochs = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    conversations = [{"text": f"[{i}]"} for i in range(n)]
    seen = []
    for rank in range(world_size):
        loader = Loader(conversations, SMALL, 2, 11, packing=packing, epochs=epochs, rank=rank, world_size=world_size)
        words = [batch_words(batch, packing) for batch in loader]
        seen += b"".join(bytes(w for w in part if w < 256) for part in words).decode().strip("[]").split("][")
        assert loader.ledger()["conversations"]["waiting"] == 0
    if packing == "best_fit_crop":
        # this packing cuts by its own rule, and says so; what it does not cut comes once
        return
    assert sorted(int(i) for i in seen if i) == sorted([*range(n)] * epochs)


def batch_words(batch, packing):
    """The words a batch was cut from, read off its tensors."""
    inputs, targets = batch.inputs.tolist(), batch.targets.tolist()
    if packing == "stream":
        last = targets[-1][-1]
        return [t for row in inputs for t in row] + ([last] if last != -100 else [])
    return [t for i, o in zip(inputs, targets, strict=True) for t in i + ([o[-1]] if o[-1] != -100 else [])]


@pytest.mark.parametrize("packing", PACKINGS)
@given(data=st.data())
def test_host_facts_are_what_the_tensors_say(packing, data):
    arguments = data.draw(drawn_arguments(packing)) | {"extras": ("doc_ids", "positions", "cu_seqlens"), "epochs": 1}
    arguments |= {"max_pieces": arguments["seq_len"], "loss_weights": "conversation"}
    conversations = data.draw(data_sets)
    B, T = arguments["batch_size"], arguments["seq_len"]
    for step, batch in enumerate(Loader(conversations, SMALL, **arguments)):
        assert batch.step == step and batch.epoch == 1
        assert batch.num_loss_tokens == int((batch.targets != arguments["ignore_index"]).sum())
        align = arguments.get("document_align", 1)
        tails = sum(min(-p.length % align, T - p.start - p.length) for row in batch.pieces for p in row)
        assert batch.num_tokens == int((batch.doc_ids >= 0).sum()) - tails
        assert batch.weight_sum == math.fsum(batch.weights.flatten().tolist())
        assert batch.max_seqlen == int(batch.cu_seqlens.diff().max())
        assert batch.cu_seqlens.shape == (B * T + 1,) and batch.cu_seqlens[-1] == B * T
        for row, pieces in enumerate(batch.pieces):
            of_row = sum(min(-p.length % align, T - p.start - p.length) for p in pieces)
            assert sum(p.length for p in pieces) + of_row == int((batch.doc_ids[row] >= 0).sum())
            for number, piece in enumerate(pieces):
                columns = slice(piece.start, piece.start + piece.length)
                assert (batch.doc_ids[row, columns] == number).all()
                assert batch.positions[row, columns].tolist() == list(range(piece.length))


def test_pieces_say_which_tokens_of_which_conversation_stand_where():
    conversations = [{"text": "abcdef"}, {"text": "gh"}, {"text": "ijkl"}]
    for packing in PACKINGS:
        for batch in Loader(conversations, SMALL, 2, 5, packing=packing, epochs=1):
            for row, pieces in enumerate(batch.pieces):
                for index, start, length, offset in pieces:
                    ids = [256, *conversations[index]["text"].encode()]
                    assert batch.inputs[row, start : start + length].tolist() == ids[offset : offset + length]


def test_batches_stay_what_they_are_when_the_next_one_is_made():
    loader = Loader([{"text": "abc" * i} for i in range(1, 9)], SMALL, 2, 8, packing="stream", loss_weights="token")
    first = next(loader)
    kept = [t.clone() for t in (first.inputs, first.targets, first.weights)]
    for _ in range(3):
        next(loader)
    assert all(torch.equal(a, b) for a, b in zip(kept, (first.inputs, first.targets, first.weights), strict=True))


def test_dtypes_and_unpacking():
    batch = next(Loader([{"text": "abcdef"}], SMALL, 2, 4, loss_weights="token", extras=("positions", "doc_ids")))
    inputs, targets = batch
    assert inputs is batch.inputs and targets is batch.targets
    dtypes = [t.dtype for t in (inputs, targets, batch.weights, batch.positions, batch.doc_ids)]
    assert dtypes == [torch.int32, torch.int64, torch.float32, torch.int32, torch.int32]
    assert batch.cu_seqlens is None


def test_conversations_are_read_when_a_batch_needs_them_and_no_further_ahead_than_another():
    read = []

    class Watched(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    loader = Loader(Watched([{"text": "abcd"}] * 50), SMALL, 1, 9, packing="stream")
    # the sample of the fingerprint
    assert len(read) == 16
    read.clear()
    next(loader)
    assert read == [0, 1], "ten tokens are two documents of five"
    next(loader)
    assert read == [0, 1, 2, 3]


@pytest.mark.parametrize("packing", ["best_fit", "pad"])
def test_a_conversation_without_a_trained_token_is_dropped_and_counted(packing):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    untrained = [{"role": "user", "content": "alone"}]
    loader = Loader([chat, untrained, chat], SMALL, 1, 16, packing=packing, epochs=1)
    conversations = {piece.conversation for batch in loader for row in batch.pieces for piece in row}
    assert conversations == {0, 2}
    assert loader.ledger()["conversations"]["dropped"] == {"untrained": 1}
    assert loader.ledger()["tokens"]["dropped"] == len("alone") + 3


def test_an_endless_loader_over_nothing_to_train_ends_with_an_error_and_not_for_ever():
    loader = Loader([[{"role": "user", "content": "a"}]] * 3, SMALL, 1, 8)
    with pytest.raises(ValueError, match="in a whole pass over the data"):
        next(loader)


def test_a_bad_conversation_raises_with_file_line_message_and_remedy(tmp_path):
    path = tmp_path / "chats.jsonl"
    good = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    bad = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]})
    path.write_text("\n".join([*[good] * 16, bad, good]))
    with pytest.raises(ConversationError) as raised:
        list(Loader(path, SMALL, 1, 16, epochs=1))
    message = str(raised.value)
    assert "chats.jsonl:17, message 1: " in message and "'user'" in message and 'on_error="skip"' in message


GPT2 = byte_tokenizer(specials=["<|endoftext|>"])


def test_plain_text_needs_no_special_token_but_the_first():
    for template in ("nanochat", "chatml"):
        result = nanopack.verify([{"text": "abc"}, {"text": "de"}], GPT2, batch_size=1, seq_len=8, template=template)
        assert (result.difference, result.tokens) == (None, 7)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_messages_for_which_the_tokenizer_lacks_tokens_are_refused_and_never_skipped(on_error, workers):
    chat = [{"role": "user", "content": "a"}]
    arguments = {"packing": "pad", "num_workers": workers, "on_error": on_error}
    says = r"'bytes' lacks special tokens of template='nanochat': <\|user_start\|>.* Give a tokenizer that has them, "
    with Loader([{"text": "a"}, chat], GPT2, 1, 8, **arguments) as loader:
        next(loader)
        with pytest.raises(ValueError, match=says):
            next(loader)
    with pytest.raises(ValueError, match=says):
        Loader([chat], GPT2, 1, 8, **arguments)


def test_skipping_a_bad_conversation_counts_and_logs_it(tmp_path, caplog):
    path = tmp_path / "chats.jsonl"
    path.write_text('{"text": "ab"}\n{"text": 3}\n{"text": "cd"}\n')
    loader = Loader(path, SMALL, 1, 8, packing="best_fit_pad", epochs=1, on_error="skip")
    with caplog.at_level(logging.WARNING, "nanopack"):
        [batch] = loader
    assert {piece.conversation for piece in batch.pieces[0]} == {0, 2}
    counts = {"read": 3, "packed": 2, "dropped": {}, "skipped": 1, "waiting": 0, "copies": 0}
    assert loader.ledger()["conversations"] == counts
    assert "chats.jsonl:2" in caplog.text


def test_an_error_of_the_data_set_itself_names_the_conversation():
    class Broken(list):
        def __getitem__(self, index):
            raise KeyError("gone")

    with pytest.raises(ConversationError, match="conversation 0, KeyError: 'gone'") as raised:
        next(Loader(Broken([{}]), SMALL, 1, 8))
    assert isinstance(raised.value.__cause__, KeyError)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_data_set_may_use_the_arrays_of_a_record_again_for_the_next(workers):
    class Reusing(list):
        ids, mask = np.empty(5, np.uint16), np.empty(5, bool)

        def __getitem__(self, index):
            self.ids[:], self.mask[:] = range(index, index + 5), index % 2
            return {"input_ids": self.ids, "loss_mask": self.mask}

    found = nanopack.verify(Reusing([{}] * 99), SMALL, batch_size=2, seq_len=8, packing="stream", num_workers=workers)
    assert found and found.batches > 10, found.difference


@pytest.mark.parametrize("workers", [0, 1])
def test_memory_that_could_not_be_pinned_is_used_and_not_unpinned(monkeypatch, workers):
    unpinned = []
    monkeypatch.setattr(Cpu, "pin", lambda self, memory: False)
    monkeypatch.setattr(Cpu, "unpin", lambda self, memory: unpinned.append(memory))
    with Loader([{"text": "ab"}], SMALL, 1, 8, num_workers=workers) as loader:
        assert next(loader).inputs[0, :3].tolist() == [256, 97, 98]
    assert not unpinned


def test_a_document_is_cut_where_it_must_be_and_what_was_cut_is_counted():
    loader = Loader([{"text": "x" * 30}], SMALL, 1, 8, packing="best_fit_pad", max_document_tokens=20, epochs=1)
    [batch] = loader
    assert batch.inputs[0].tolist() == [256] + [120] * 7 and batch.targets[0].tolist() == [120] * 8
    assert loader.ledger()["tokens"] == {
        "read": 31,
        "emitted": 9,
        "cut": {"max_document_tokens": 11, "seq_len": 11},
        "dropped": 0,
        "waiting": 0,
    }


def test_verify_says_how_much_it_compared_and_that_it_was_equal():
    result = nanopack.verify([{"text": "abcdefg"}] * 5, SMALL, batch_size=2, seq_len=8)
    assert result and (result.batches, result.tokens, result.difference) == (3, 40, None)


def test_verify_reports_a_bad_conversation_in_the_loaders_words():
    with pytest.raises(ConversationError, match="messages must alternate user/assistant"):
        nanopack.verify([[{"role": "user", "content": "a"}] * 2], SMALL, batch_size=1, seq_len=8)


@pytest.mark.parametrize("max_batches", [-1, 0, 1.5, True, "x"])
def test_verify_refuses_a_number_of_batches_that_cannot_be(max_batches):
    with pytest.raises(ValueError, match=f"^max_batches={max_batches!r} is not allowed; use an int from 1 upwards"):
        nanopack.verify([{"text": "a"}], SMALL, max_batches=max_batches)


def test_documents_rendered_elsewhere_come_from_parquet_as_arrays(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    columns = {"input_ids": [[97, 98, 99], [100, 101]], "loss_mask": [[True, False, True], [False, True]]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "ready.parquet")
    arguments = dict(batch_size=1, seq_len=4, epochs=1)
    assert nanopack.verify(str(tmp_path / "ready.parquet"), SMALL, num_workers=0, **arguments)
    record = open_conversations(tmp_path / "ready.parquet")[0]
    assert isinstance(record["input_ids"], np.ndarray) and record["loss_mask"].tolist() == [True, False, True]


class Counted(list):
    """Conversations that count how often each is read."""

    def __init__(self, records):
        super().__init__(records)
        self.reads = [0] * len(records)

    def __getitem__(self, index):
        self.reads[index] += 1
        return super().__getitem__(index)


@pytest.mark.parametrize(
    ("use", "passes"),
    [
        (lambda loader: [batch for batch in loader], 2),
        (lambda loader: list(iter(loader)), 2),
        (lambda loader: list(loader), 3),
        (lambda loader: (len(loader), len(loader), loader.tokens_total, list(loader)), 3),
    ],
    ids=["for", "list(iter)", "list", "len, tokens_total and list"],
)
def test_the_data_are_read_once_an_epoch_and_once_more_for_all_that_counts(use, passes):
    conversations = Counted([{"text": "ab" * (k % 5)} for k in range(40)])
    loader = Loader(conversations, SMALL, 2, 8, packing="stream", epochs=2)
    # but for the sample of the fingerprint
    assert sum(conversations.reads) == 16
    conversations.reads[:] = [0] * 40
    use(loader)
    assert set(conversations.reads) == {passes}
