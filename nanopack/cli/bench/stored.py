"""How fast are documents packed whose lengths are known, as those of a token store are?

    synthetic documents of three mean lengths   ->   slots, batches, other packers, a copy   ->   tokens per second

One thread each, in seconds of processor time. A slot is what the device gets: words and tables; a GPU unpacks it. A CPU
batch is what `next` gives where there is none. TRL makes packed Arrow rows of the same documents. The copy moves the
words of a batch from the store to a slot, in the store's order: the least that any packer does.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from nanopack.cli.bench import other_packers
from nanopack.cli.bench.other_packers import NotHereError, PackedContender
from nanopack.cli.bench.rounds import Measure, Number, Pace, Result, Spread, Table, in_rounds, not_measured, ratio
from nanopack.config import LoaderConfig
from nanopack.loader import Loader
from nanopack.packing.packings import PackingName, as_packing
from nanopack.producer.producer import Producer
from nanopack.producer.stored import reader_of
from nanopack.render.document import Document
from nanopack.ring.ring import Ring
from nanopack.store.format import Settings
from nanopack.store.store import Documents
from nanopack.tokenizers.absent import NoTokenizer
from nanopack.tokenizers.tokenizer import load_tokenizer

TOKENS, QUICK_TOKENS = 24_000_000, 400_000
VOCAB = 32_768
COPY, BFD, WRAPPED = "a copy of the words", "TRL pack_dataset, bfd", "TRL pack_dataset, wrapped"


class Profile(NamedTuple):
    """Lengths of documents, lognormal, and the batches that they go into."""

    mean: int
    batch_size: int
    seq_len: int


PROFILES = (Profile(135, 32, 2048), Profile(550, 32, 2048), Profile(1750, 8, 8192))


class Synthetic(Documents):
    """Documents of random tokens in memory, cut to a row, as a store presents them."""

    path = "synthetic"
    vocab_size, bos_id = VOCAB, 0

    def __init__(self, profile: Profile, tokens: int) -> None:
        random = np.random.default_rng(0)
        spread = 0.6
        drawn = random.lognormal(np.log(profile.mean) - spread**2 / 2, spread, tokens // profile.mean)
        self.lengths = np.clip(drawn, 8, profile.seq_len).astype(np.uint32)
        words = random.integers(0, VOCAB, int(self.lengths.sum()), np.uint16)
        words[random.random(len(words)) < 0.6] |= np.uint16(self.loss_bit)
        self.settings = Settings(vocab_size=VOCAB, bos_id=0)
        self.shards, self.shard_documents = [words], np.array([0, len(self.lengths)])
        in_loss = words >= self.loss_bit
        self.loss_tokens = np.add.reduceat(in_loss, self.ends[:-1], dtype=np.int64).astype(np.uint32)
        self.first_in_loss = in_loss[self.ends[:-1]]
        self.conversations = np.arange(len(self.lengths))

    def fingerprint(self) -> str:
        """Return a digest: that of nothing is enough."""
        return "synthetic"


Work = Callable[[], int]


def to_slots(documents: Documents, profile: Profile, packing: PackingName, seed: int | None) -> Work:
    """Make the work that fills a slot and returns its tokens."""
    config = LoaderConfig(
        batch_size=profile.batch_size, seq_len=profile.seq_len, packing=as_packing(packing), seed=seed
    )
    reader = reader_of(documents, load_tokenizer(NoTokenizer(VOCAB, 0, "", "")), config)
    producer, slot = Producer(reader), Ring(reader.layout, slots=1).slots[0]

    def work() -> int:
        facts = producer.produce(slot)
        assert facts is not None
        return facts.num_tokens

    return work


def to_batches(documents: Documents, profile: Profile) -> Work:
    """Make the work that takes a batch on the CPU and returns its tokens."""
    loader = Loader(documents, None, profile.batch_size, profile.seq_len, seed=1, num_workers=0, device="cpu")
    return lambda: next(loader).num_tokens


def copy(documents: Documents, profile: Profile) -> Work:
    """Make the work that copies the words of a batch."""
    words, tokens = documents.shards[0], profile.batch_size * profile.seq_len
    places = itertools.cycle(range(0, len(words) - tokens + 1, tokens))
    slot = np.empty(tokens, words.dtype)

    def work() -> int:
        at = next(places)
        slot[:] = words[at : at + tokens]
        return tokens

    return work


def _trl(documents: Documents, profile: Profile, strategy: str) -> Work:
    bit = documents.word_dtype.type(documents.loss_bit)
    words = [documents.words(number) for number in range(min(len(documents), TOKENS // 8 // profile.mean))]
    rendered = [Document((one & ~bit).astype(np.uint32), one >= bit, ()) for one in words]
    contender: PackedContender = other_packers.trl(rendered, strategy, row=profile.seq_len)

    def work() -> int:
        with contender() as pack:
            return pack()[0]

    return work


def _measure(work: Work, warm: int) -> Measure[float]:
    """Return the measurement of tokens per second of processor time."""

    def measure(seconds: float) -> float:
        for _ in range(warm):
            work()
        tokens, began = 0, time.process_time()
        while not tokens or time.process_time() - began < seconds:
            tokens += work()
        return tokens / (time.process_time() - began)

    return measure


def tables(pace: Pace) -> list[Table]:
    """Return a table of each mean length."""
    return [_table(profile, pace) for profile in PROFILES]


def _table(profile: Profile, pace: Pace) -> Table:
    pace.show(f"making documents of {profile.mean} tokens")
    documents = Synthetic(profile, QUICK_TOKENS if pace.quick else TOKENS)
    slots = partial(to_slots, documents, profile)
    makers: dict[str, Callable[[], Work]] = {
        "best_fit, shuffled, to slots": lambda: slots("best_fit", 1),
        "stream, shuffled, to slots": lambda: slots("stream", 1),
        "stream, in order, to slots": lambda: slots("stream", None),
        "best_fit, shuffled, to CPU batches": lambda: to_batches(documents, profile),
        BFD: lambda: _trl(documents, profile, "bfd"),
        WRAPPED: lambda: _trl(documents, profile, "wrapped"),
        COPY: lambda: copy(documents, profile),
    }
    contenders, absent = {}, []
    for name, make in makers.items():
        try:
            contenders[name] = _measure(make(), 1)
        except NotHereError as why:
            absent.append(not_measured(name, str(why)))
    title = f"From a store of documents of {profile.mean} tokens, T={profile.seq_len}, in processor time"
    return Table(title, [*_rows(in_rounds(contenders, pace)), *absent])


def _rows(measured: dict[str, list[float]]) -> Sequence[Result]:
    speeds = {name: Spread(tuple(rounds)) for name, rounds in measured.items()}
    bases = {"of_copy_fraction": COPY, "to_trl_bfd_x": BFD, "to_trl_wrapped_x": WRAPPED}
    rows = []
    for name, speed in speeds.items():
        numbers: dict[str, Number] = {"tokens_per_s": speed}
        numbers |= {column: ratio(speed, speeds[base]) for column, base in bases.items() if base in speeds}
        rows.append(Result(name, numbers))
    return rows
