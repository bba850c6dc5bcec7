"""What does a batch cost where the words of all data are on the device?

    a token store   ->   next with the words copied, next with a table, graph batches   ->   tokens per second, bytes

On the CPU, where the words are the mapped file and torch operations take the kernel's place: this is the host's work
and the bytes. The device's time is in the section gpu. All in the caller's thread.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from nanopack.cli.bench.corpus import ROW, ROWS, Data, at_least
from nanopack.cli.bench.rounds import Measure, Pace, Result, Spread, Table, in_rounds, ratio
from nanopack.loader import Loader
from nanopack.producer.producer import Producer
from nanopack.producer.stored import reader_of
from nanopack.render.document import Document
from nanopack.ring.ring import Ring
from nanopack.store.format import Settings
from nanopack.store.store import Store
from nanopack.store.writer import Rendered, write_store

TOKENS, QUICK_TOKENS = 4_000_000, 300_000
BATCHES = 16
"""Of graph batches, in a half."""
COPIED = "next, words copied"
KINDS: dict[str, dict[str, Any]] = {
    COPIED: {},
    "next, resident": {"resident": True},
    "graph batches, resident": {"resident": True, "graph": True},
}
PRODUCED = {f"a slot {kind}": resident for kind, resident in (("with words", False), ("with a table", True))}


class Measured(NamedTuple):
    """Measured once."""

    tokens_per_s: float
    copied_bytes_a_batch: float


@contextlib.contextmanager
def stored(documents: Sequence[Document], data: Data) -> Iterator[Store]:
    """Write the documents into a store, which lasts as long as the block."""
    tokenizer = data.tokenizer
    settings = Settings(
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        tokenizer=tokenizer.fingerprint(),
        tokenizer_name=tokenizer.name,
    )
    rendered = (Rendered(np.asarray(one.ids), np.asarray(one.mask), i) for i, one in enumerate(documents))
    with tempfile.TemporaryDirectory() as folder:
        yield write_store(os.path.join(folder, "store"), rendered, settings, shard_documents=1 << 20)


@contextlib.contextmanager
def batches(store: Store, *, graph: bool = False, **settings: Any) -> Iterator[tuple[Callable[[], int], Loader]]:
    """Open a loader; yield what makes the next batch, or batches, and returns their tokens, and the loader."""
    with Loader(store, None, ROWS, ROW, num_workers=0, **{"device": "cpu", **settings}) as loader:
        if not graph:
            yield lambda: next(loader).num_tokens, loader
            return
        made = loader.graph_batches(BATCHES)

        def work() -> int:
            ready = made.refill(len(before))
            before[:] = ready
            for _ in ready:
                made.load()
            return sum(batch.num_tokens for batch in ready)

        before: list[Any] = []
        yield work, loader


def _measure(store: Store, settings: dict[str, Any], seconds: float) -> Measured:
    with batches(store, **settings) as (work, loader):
        work()
        copied, count, tokens, began = loader.stats()["bytes_copied"], loader.stats()["batches"], 0, time.perf_counter()
        while not tokens or time.perf_counter() - began < seconds:
            tokens += work()
        elapsed, stats = time.perf_counter() - began, loader.stats()
        # graph batches count when they are reported as loaded
        counted = max(1, stats["batches"] - count)
        return Measured(tokens / elapsed, (stats["bytes_copied"] - copied) / counted)


def _produced(store: Store, data: Data, resident: bool) -> Measure[float]:
    """Return the measurement of a document's CPU microseconds from the store to a filled slot."""

    def measure(seconds: float) -> float:
        with Loader(store, None, ROWS, ROW, num_workers=0, device="cpu") as loader:
            reader = reader_of(store, loader.tokenizer, loader.config, resident=resident)
        producer, slot, documents = Producer(reader), Ring(reader.layout, 1).slots[0], 0
        producer.produce(slot)
        began, cpu = time.perf_counter(), time.process_time()
        while not documents or time.perf_counter() - began < seconds:
            facts = producer.produce(slot)
            # without epochs there is no end
            assert facts is not None
            documents += len(facts.pieces) // 32
        return (time.process_time() - cpu) / documents * 1e6

    return measure


def measure(data: Data, pace: Pace) -> list[Table]:
    """Return the costs of each form, and those of filling a slot."""
    documents = at_least(data.documents, QUICK_TOKENS if pace.quick else TOKENS)
    with stored(documents, data) as store:
        forms = in_rounds({name: partial(_measure, store, settings) for name, settings in KINDS.items()}, pace)
        slots = in_rounds({name: _produced(store, data, resident) for name, resident in PRODUCED.items()}, pace)
    speeds = {name: Spread(tuple(one.tokens_per_s for one in found)) for name, found in forms.items()}
    rows = [
        Result(
            name,
            {
                "tokens_per_s": speeds[name],
                "to_copied_x": ratio(speeds[name], speeds[COPIED]),
                "copied_bytes_a_batch": Spread(tuple(one.copied_bytes_a_batch for one in found)),
            },
        )
        for name, found in forms.items()
    ]
    filled = [Result(name, {"document_us": Spread(tuple(found))}) for name, found in slots.items()]
    return [Table("From a token store to batches, on the CPU", rows), Table("From a token store to a slot", filled)]
