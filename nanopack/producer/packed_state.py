"""The state of a producer, as bytes for every batch, and as plain data when it is asked for.

ShardPacker.state() of each shard   ->   pack_state()   ->   state_of(), add_digests()   ->   state.py
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from nanopack.conversations.order import Shard
from nanopack.ledger import Ledger
from nanopack.notes import Notes
from nanopack.producer.ahead import plain
from nanopack.producer.chunk import checksum, digest_of
from nanopack.producer.reader import Reader

if TYPE_CHECKING:
    from nanopack.producer.shard import ShardPacker


def pack_state(step: int, shards: Iterable[ShardPacker]) -> bytes:
    """Return the state after `step` batches, pickled: it is made for every batch, and few are ever looked at."""
    return pickle.dumps((step, {str(packer.shard.number): packer.state() for packer in shards}))


def state_of(packed: bytes) -> dict[str, Any]:
    """Return a packed state as plain data (JSON-able): {"step", "lanes": {number: state of the shard}}.

    Keys as state.py describes them; the digest of stored documents is None until `add_digests`.
    """
    step, shards = pickle.loads(packed)
    for shard in shards.values():
        shard["ledger"] = Ledger.total(map(Ledger.of, (shard["ledger"], *shard["sources"]))).state()
        if not shard.pop("mixed"):
            shard["sources"] = []
        if "ahead" in shard:
            shard["ahead"] = plain(shard["ahead"])
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
