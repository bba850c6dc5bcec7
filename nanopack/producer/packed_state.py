"""The state of a producer, as bytes for every batch, and as plain data when it is asked for.

    ShardPacker.state() of each shard and batch   ->   pack_states()    ->   state_of(), add_digests()   ->   state.py
    positions, once the batch is in a slot        ->   pack_position()

Batches that are planned together have their states in one piece, in which what they share stands once: the names of
rows that are ahead, which many of these states need.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nanopack.conversations.order import Shard
from nanopack.ledger import POSITIONS, Ledger
from nanopack.notes import Notes
from nanopack.packing.rows import Rows
from nanopack.producer.ahead import Named, named, plain
from nanopack.producer.chunk import checksum, digest_of
from nanopack.producer.reader import Reader
from nanopack.ring.facts import BatchFacts

if TYPE_CHECKING:
    from nanopack.producer.shard import ShardPacker


_POSITIONS = attrgetter(*POSITIONS)


class PackedState(NamedTuple):
    """A state that few ever look at, as bytes."""

    states: bytes
    """See `pack_states`."""
    position: bytes
    """See `pack_position`."""

    @classmethod
    def of(cls, facts: BatchFacts) -> PackedState:
        """Return the state once a batch is delivered."""
        return cls(facts.states, facts.state)


def pack_states(batches: Sequence[dict[str, Any]]) -> bytes:
    """Return the states after each of some batches, pickled: {number: state of the shard}, which it changes."""
    names = dict[int, Named]()
    for shards in batches:
        for shard in shards.values():
            if "ahead" in shard:
                shard["ahead"] = [_name(rows, names) for rows in shard["ahead"]]
    return pickle.dumps(batches)


def _name(rows: Rows, known: dict[int, Named]) -> Named:
    """Return the name of rows, one and the same for the same rows, so that it is pickled once."""
    return known.get(id(rows)) or known.setdefault(id(rows), named(rows))


def pack_position(step: int, batch: int, shards: Iterable[ShardPacker]) -> bytes:
    """Return which of the states holds after `step` batches, and the shards' ledgers of positions, pickled."""
    return pickle.dumps((step, batch, [_POSITIONS(packer.positions) for packer in shards]))


def state_of(packed: PackedState) -> dict[str, Any]:
    """Return a packed state as plain data (JSON-able): {"step", "lanes": {number: state of the shard}}.

    Keys as state.py describes them; the digest of stored documents is None until `add_digests`.
    """
    step, batch, positions = pickle.loads(packed.position)
    shards = pickle.loads(packed.states)[batch]
    for shard, of_shard in zip(shards.values(), positions, strict=True):
        counted = Ledger.of(dict(zip(POSITIONS, of_shard, strict=True)))
        shard["ledger"] = Ledger.total((counted, *map(Ledger.of, shard["sources"]))).state()
        if not shard.pop("mixed"):
            shard["sources"] = []
        if "ahead" in shard:
            shard["ahead"] = [plain(names) for names in shard["ahead"]]
        shard["notes"] = Notes(**shard["notes"]).dump()
    return {"step": step, "lanes": shards}


def add_digests(state: dict[str, Any], reader: Reader) -> None:
    """Find the digests that a state lacks: those of stored documents."""
    for number, shard_state in state["lanes"].items():
        if shard_state["digest"] is None:
            count = len(reader.config.all_shards)
            shard = Shard(len(reader.source), int(number), count, reader.config.seed)
            chunk = reader.read(shard.at(np.array(shard_state["waiting"], np.int64)))
            words = (reader.words(chunk, position) for position in range(len(chunk.lengths)))
            shard_state["digest"] = digest_of(map(checksum, words))
