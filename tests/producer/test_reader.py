"""Promises of nanopack/producer/reader.py: a chunk is read as each of its conversations alone would be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from read_documents import documents_of

from nanopack.config import LoaderConfig
from nanopack.conversations.records import check, open_conversations
from nanopack.packing import BestFit, Stream
from nanopack.producer.reader import CHUNK, Reader, read_in_turn
from nanopack.tokenizers.tokenizer import Tokenizer, load_tokenizer

TOKENIZER = load_tokenizer("chat32k")
REFUSED = "a" + " " * 1_000_001 + "b"


def say(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


class Faulty:
    """Conversations of which some raise what they are when they are read. It remembers what it was asked for."""

    def __init__(self, records):
        self.records, self.asked = records, []

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        self.asked.append(index)
        if isinstance(record := self.records[index], BaseException):
            raise record
        return record


TEXTS = st.sampled_from(["", "hi", "naïve \0 text", "<|bos|> is text", "\ud800", "x" * 300, "a\n\n  b", "漢字 かな"])
KINDS = st.sampled_from(["text", "python", "python_output"])
PARTS = st.lists(st.builds(lambda kind, text: {"type": kind, "text": text}, KINDS, TEXTS))
RECORDS = st.one_of(
    st.lists(TEXTS, min_size=1, max_size=5).map(lambda texts: say(*texts)),
    st.builds(lambda ask, parts: [*say(ask), {"role": "assistant", "content": parts}], TEXTS, PARTS),
    st.builds(lambda text, weight: {"text": text, "weight": weight}, TEXTS, st.sampled_from([0, 0.5, 3])),
    st.builds(
        lambda n, kind, step: {"input_ids": np.arange(n).astype(kind), "loss_mask": np.arange(n) % step == 0},
        st.integers(1, 40),
        st.sampled_from(["int64", "uint16", "uint32"]),
        st.integers(1, 3),
    ),
    st.sampled_from(
        [
            {"text": 5},
            [{"role": "assistant", "content": "first"}],
            {"input_ids": [1, 99_999]},
            {"text": REFUSED},
            say("fine", REFUSED),
            KeyError("gone"),
            SystemExit(3),
        ]
    ),
)
CONFIGS = st.builds(
    LoaderConfig,
    loss=st.sampled_from(["assistant", "all"]),
    loss_weights=st.sampled_from([None, "token", "conversation"]),
    boundary_loss=st.booleans(),
    max_document_tokens=st.sampled_from([None, 1, 2, 30]),
    packing=st.sampled_from([BestFit(), Stream()]),
    seq_len=st.sampled_from([16, 128]),
)


def reader_of(records, config=None):
    config = config or LoaderConfig()
    return Reader(open_conversations(Faulty(records)), TOKENIZER, config)


def facts_of(chunks, config):
    return [document.facts() for document in documents_of(chunks, config)]


@given(st.lists(RECORDS, min_size=1, max_size=12), CONFIGS)
def test_a_chunk_is_read_as_each_of_its_conversations_alone(records, config):
    reader = reader_of(records, config)
    alone = facts_of([reader.read([index]) for index in range(len(records))], config)
    assert facts_of(reader.read(range(len(records))), config) == alone
    assert facts_of(read_in_turn(reader, range(len(records)), batch_tokens=64), config) == alone


@given(st.lists(RECORDS, min_size=1, max_size=12), CONFIGS)
def test_what_is_read_is_the_document_cut_and_marked(records, config):
    """Token by token, from what the renderer gives for one conversation; that has its own plain renderer."""
    reader = reader_of(records, config)
    limit = min([2**31, *(limit for _, limit in config.limits)])
    for record, read in zip(records, documents_of(reader.read(range(len(records))), config), strict=True):
        if read.error is not None:
            continue
        document = reader.render(check(record))
        assert read.own_weight == check(record).weight
        trained = [config.loss == "all" or bool(one) for one in document.mask]
        trained[0] &= config.boundary_loss
        kept = list(zip(document.ids.tolist(), trained, strict=True))[:limit]
        assert (read.num_tokens, read.length) == (len(trained), len(kept))
        assert read.dropped == (config.drops_untrained and not any(one for _, one in kept))
        assert [(int(word) & 0x7FFF, bool(word >> 15)) for word in read.words] == kept
        count = sum(one for _, one in kept)
        weight = {None: 1.0, "token": read.own_weight, "conversation": read.own_weight / max(1, count)}[
            config.loss_weights
        ]
        assert read.loss_tokens == count
        assert read.weight == np.float32(weight if count or config.loss_weights != "conversation" else 0.0)


def test_a_panic_of_a_tokenizer_is_reported_with_its_conversation(monkeypatch):
    class Panic(BaseException):
        pass

    plain = Tokenizer.encode_batch

    def panicking(self, texts):
        if "bad" in texts:
            raise Panic("no")
        return plain(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", panicking)
    reads = documents_of(reader_of([{"text": "a"}, {"text": "bad"}, {"text": "c"}]).read(range(3)), LoaderConfig())
    assert [type(read.error) for read in reads] == [type(None), Panic, type(None)]
    assert [len(read.words) for read in reads] == [2, 0, 2]


def test_ctrl_c_does_not_wait_for_its_place_where_the_trainer_reads():
    reader = reader_of([{"text": "a"}, {"text": "b"}, KeyboardInterrupt(), {"text": "c"}])
    reads = read_in_turn(reader, range(4), batch_tokens=1000, raise_interrupts=True)
    assert next(reads).conversations.tolist() == [0]
    with pytest.raises(KeyboardInterrupt):
        next(reads)
    reads = documents_of(read_in_turn(reader, range(4), batch_tokens=1000), LoaderConfig())
    assert [type(read.error) for read in reads] == [type(None)] * 2 + [KeyboardInterrupt, type(None)]


def test_ctrl_c_while_tokenizing_is_raised(monkeypatch):
    def interrupted(self, texts):
        raise KeyboardInterrupt

    monkeypatch.setattr(Tokenizer, "encode_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reader_of([{"text": "a"}]).read([0])


@pytest.mark.parametrize(("tokens", "most"), [(4, CHUNK), (40, 5), (4000, 1)])
def test_no_more_is_read_ahead_than_a_batch_takes(tokens, most):
    config, watched = LoaderConfig(), Faulty([{"input_ids": [7] * tokens}] * 400)
    reader = Reader(open_conversations(watched), TOKENIZER, config)
    starts = []
    reads = read_in_turn(reader, range(400), batch_tokens=200, on_chunk=starts.append)
    count = 0
    while count < 300:
        chunk = next(reads)
        assert chunk.conversations.tolist() == list(range(count, len(watched.asked))) and len(chunk.lengths) <= most
        count += len(chunk.lengths)
    assert starts[0] == 0 and max(b - a for a, b in itertools.pairwise(starts)) == most
