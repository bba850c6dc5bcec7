"""The workers against a reader in this process: the same conversations, in the same order, errors in their places."""

from __future__ import annotations

import numpy as np
import pytest
from faulty import NotPicklable, is_gone
from read_documents import documents_of

from nanopack import ConversationError, ProducerError
from nanopack.config import LoaderConfig
from nanopack.conversations.records import open_conversations
from nanopack.producer.reader import Reader
from nanopack.producer.workers import UNANSWERED, Workers
from nanopack.tokenizers.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("chat32k")
CONFIG = LoaderConfig(batch_size=2, seq_len=16, loss_weights="conversation", loss="assistant", max_document_tokens=20)


class Harmful(list):
    """Conversations of which some fail when they are read."""

    def __getitem__(self, index):
        if isinstance(record := super().__getitem__(index), type):
            raise record("no", "good") if record is NotPicklable else record("no good")
        return record


def reader_of(records):
    return Reader(open_conversations(records), TOKENIZER, CONFIG)


def chats(count):
    talk = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "that and more " * 9}]
    return [
        [talk, {"text": f"text {k}", "weight": k}, {"messages": talk[:1]}, {"text": 5}][k % 4] for k in range(count)
    ]


@pytest.fixture
def started():
    """Workers that are ended with the test."""
    made = []

    def start(count, records, method="fork"):
        made.append(Workers(count, reader_of(records), method=method))
        return made[-1]

    yield start
    for each in made:
        for process in each._processes:
            process.kill()
            process.join()


def facts_of(chunks):
    return [document.facts() for document in documents_of(chunks, CONFIG)]


@pytest.mark.parametrize(
    "method, count", [("fork", 1), ("fork", 3), ("spawn", 1), pytest.param("spawn", 3, marks=pytest.mark.slow)]
)
def test_workers_read_what_one_reader_reads_in_the_same_order(started, count, method):
    records = chats(200)
    order = [7 * k % 200 for k in range(400)]
    found = started(count, records, method).read_all(order, shards=1)
    assert facts_of(found) == facts_of(reader_of(records).read(order))


def test_shards_read_side_by_side_and_each_gets_its_own(started):
    records = chats(3000)
    running = started(2, records)
    shards = [running.read_all(range(shard, 3000, 300), shards=300) for shard in range(300)]
    firsts = [next(shard) for shard in shards]
    assert len(firsts) > UNANSWERED
    assert [first.conversations.tolist() for first in firsts] == [[shard] for shard in range(300)]
    assert [[int(chunk.conversations[0]) for chunk in shard] for shard in shards] == [
        list(range(shard + 300, 3000, 300)) for shard in range(300)
    ]


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (KeyError, KeyError, "no good"),
        (NotPicklable, ConversationError, "NotPicklable: no"),
        (MemoryError, MemoryError, "no good"),
        (SystemExit, ProducerError, "the producer was stopped by SystemExit: no good"),
        (KeyboardInterrupt, ProducerError, "the producer was stopped by KeyboardInterrupt: no good"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_goes_wrong_comes_in_its_place_with_its_traceback(started, fault, kind, message):
    records = Harmful([{"text": "a"}] * 40 + [fault] + [{"text": "b"}] * 40)
    reads = documents_of(started(2, records).read_all(range(81), shards=1), CONFIG)
    assert [read.conversation for read in reads if read.error is not None] == [40]
    assert type(reads[40].error) is kind and message in str(reads[40].error)
    assert "in __getitem__" in str(reads[40].error.__cause__)


def test_a_chunk_of_bad_conversations_alone_comes_too(started):
    found = documents_of(started(2, [{"text": 5}] * 40).read_all(range(40), shards=1), CONFIG)
    assert [document.conversation for document in found] == list(range(40))
    assert {type(document.error) for document in found} == {ConversationError}


def test_words_are_those_of_the_slot(started):
    [read] = documents_of(started(1, [{"text": "a b"}]).read_all([0], shards=1), CONFIG)
    assert read.words.dtype == np.uint16 and (read.words >> 15).all()


def test_a_worker_that_is_gone_is_named_with_what_it_was_at(started):
    running = started(2, Harmful([{"text": "a"}] * 100))
    reads = running.read_all(range(100), shards=4)
    next(reads)
    for process in running._processes:
        process.kill()
        assert is_gone(process.pid)
    message = r"was killed by SIGKILL \(reading and tokenizing, from conversation \d+ on\)"
    with pytest.raises(ProducerError, match=message):
        list(reads)
