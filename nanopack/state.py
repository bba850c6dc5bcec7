"""Say where a run stands, and for which data and arguments that holds.

    Producer.state() + fingerprint()   ->   Loader.state_dict()   ->   merge_states()   ->   Loader.load_state_dict()
     where each lane stands                                        of all ranks                check_state()

A state is plain data (JSON-able): a step, and for each lane (a rank's, or with shard="row" a row's) where it stands.
Its keys do not depend on the progress of the run, and those of two ranks' lanes differ: torch.distributed.checkpoint
needs both.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import numpy as np

from nanopack.config import LoaderConfig
from nanopack.conversations.records import Conversation, Source, check
from nanopack.mixture import Mixture
from nanopack.tokenizers.tokenizer import AnyTokenizer

FORMAT = 1
LANE = {"waiting", "digest", "packer", "ledger", "sources"}
SAMPLE = 16
# What does not decide which token lands where, and what the lanes themselves tell.
_FREE = ("rank", "extras", "max_pieces", "on_error")


def fingerprint(source: Source, tokenizer: AnyTokenizer, config: LoaderConfig) -> dict[str, Any]:
    """Return what a state depends on: number of conversations and a sample of them, tokenizer, arguments."""
    arguments = {
        field.name: _plain(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.name not in _FREE
    }
    # states from before there was a choice still load
    if config.first_assistant == "keep":
        del arguments["first_assistant"]
    if config.shard == "row":
        # the global batch is what counts, however many ranks share it
        del arguments["batch_size"], arguments["world_size"]
        arguments["batch_size * world_size"] = config.global_rows
    clock = getattr(tokenizer, "clock", None)
    mixed = source.picks_digest().encode() if isinstance(source, Mixture) else b""
    return {
        "conversations": len(source),
        "sample": _digest([mixed, *_sample(source)]),
        "tokenizer": tokenizer.fingerprint(),
        "arguments": arguments,
        # When the date was that the chat template writes. The tokenizer's digest says whether that date is another.
        **({"clock": clock} if clock else {}),
    }


def clock_of(state: Any) -> str | None:
    """Return the moment whose date the chat template wrote in the run of this state, None where it wrote none."""
    fingerprint = state.get("fingerprint") if isinstance(state, Mapping) else None
    clock = fingerprint.get("clock") if isinstance(fingerprint, Mapping) else None
    if clock is not None:
        try:
            datetime.fromisoformat(clock)
        except (TypeError, ValueError):
            raise ValueError(
                f"the state is damaged: its 'clock' is {clock!r}; pass what state_dict() returned"
            ) from None
    return clock


def _plain(value: object) -> object:
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def _sample(source: Source) -> Iterator[bytes]:
    """Yield what stands at evenly spaced places, the first and the last among them."""
    for index in sorted({round(k * (len(source) - 1) / (SAMPLE - 1)) for k in range(SAMPLE)}):
        try:
            yield from _bytes_of(check(source[index]))
        except MemoryError:
            raise
        # a bad conversation is part of the data too; what its error says may differ from run to run
        except Exception:
            yield b"bad"


def _bytes_of(conversation: Conversation) -> Iterator[bytes]:
    """Yield what a conversation holds, in whatever form it came."""
    if conversation.tokens is not None:
        ids, mask = conversation.tokens
        yield ids.astype(np.int64).tobytes()
        yield b"" if mask is None else mask.tobytes()
    said = [(message.role, message.content) for message in conversation.messages]
    yield repr((said, conversation.text, conversation.weight)).encode("utf-8", "surrogatepass")


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"%d " % len(part) + part)
    return digest.hexdigest()


def check_state(state: Any, ours: Mapping[str, Any], config: LoaderConfig, *, strict: bool) -> dict[str, Any]:
    """Return step and lanes of a state, as `Producer.restore` takes them.

    Raises ValueError where it is no state, lacks lanes of this rank, or (with `strict`) is one of other data or
    arguments: the message names each difference.
    """
    _refuse_foreign(state)
    if strict and (differences := _differences(state["fingerprint"], ours)):
        raise ValueError(
            f"the state belongs to another run: {'; '.join(differences)}; resume with what the run was started with, "
            f"or pass strict=False to go on all the same"
        )
    wanted = [str(number) for number in config.lanes]
    if missing := [number for number in wanted if number not in state["lanes"]]:
        what = "rank" if config.shard == "rank" else "row"
        raise ValueError(
            f"the state has {what}s {', '.join(state['lanes'])}, but not {', '.join(missing)}, which "
            f"rank={config.rank} of world_size={config.world_size} needs; put the states of all ranks together with "
            f"nanopack.merge_states"
        )
    return {"step": state["step"], "lanes": {number: state["lanes"][number] for number in wanted}}


def merge_states(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one state of the states of all ranks, which any rank's loader takes.

    With shard="row" it may be loaded by another number of ranks, as long as batch_size * world_size is the same.

    Raises ValueError where the states are not of one moment of one run, or a rank is missing.
    """
    states = list(states or ())
    if not states:
        raise ValueError("merge_states has nothing to merge; pass the states of all ranks")
    for number, state in enumerate(states):
        try:
            _refuse_foreign(state)
        except ValueError as error:
            raise ValueError(f"state {number}: {error}") from None
    first, lanes = states[0], dict[str, Any]()
    for number, state in enumerate(states):
        if differences := _differences(first["fingerprint"], state["fingerprint"]):
            raise ValueError(f"states 0 and {number} are of different runs: {'; '.join(differences)}")
        if state["step"] != first["step"]:
            raise ValueError(
                f"states 0 and {number} are of different moments: steps {first['step']} and {state['step']}; "
                f"save the states of all ranks at the same step"
            )
        for lane, stands in state["lanes"].items():
            if lanes.setdefault(lane, stands) != stands:
                raise ValueError(f"lane {lane} is in several of the states, and differs; pass each rank's state once")
    arguments = first["fingerprint"]["arguments"]
    count = arguments.get("batch_size * world_size", arguments.get("world_size"))
    if missing := [number for number in map(str, range(count)) if number not in lanes]:
        what = "rank" if arguments["shard"] == "rank" else "row"
        raise ValueError(f"{what}s {', '.join(missing)} of {count} are in none of the states; pass those of all ranks")
    return {**first, "lanes": {str(number): lanes[str(number)] for number in range(count)}}


def _refuse_foreign(state: Any) -> None:
    if not isinstance(state, Mapping) or "format" not in state:
        raise ValueError(f"a {type(state).__name__} is no state of nanopack; pass what state_dict() returned")
    if state["format"] != FORMAT:
        raise ValueError(f"the state has format {state['format']!r}; this version of nanopack reads format {FORMAT}")
    kinds = {"step": int, "lanes": Mapping, "fingerprint": Mapping}
    for name, kind in kinds.items():
        if not isinstance(state.get(name), kind):
            what = f"the state is damaged: its {name!r} is {state.get(name)!r}"
            raise ValueError(f"{what}; pass what state_dict() returned")
    for lane, stands in state["lanes"].items():
        if not isinstance(stands, Mapping) or not LANE.issubset(stands):
            raise ValueError(f"the state is damaged: lane {lane} lacks {', '.join(sorted(LANE - set(stands)))}")


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Return what differs between two fingerprints, in words."""
    found = []
    if theirs["conversations"] != ours["conversations"]:
        found.append(f"conversations were {theirs['conversations']}, are {ours['conversations']}")
    elif theirs["sample"] != ours["sample"]:
        found.append("conversations have other contents or another order (seen in a sample)")
    if theirs["tokenizer"] != ours["tokenizer"]:
        found.append("tokenizer is another one")
    was, now = theirs["arguments"], ours["arguments"]
    for name in {**was, **now}:
        if was.get(name) != now.get(name):
            found.append(f"{name} was {was.get(name)!r}, is {now.get(name)!r}")
    return found
