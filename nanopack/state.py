"""The state of a run, and the data and arguments that it belongs to.

    producer/packed_state.py: state_of()   ->   Loader.state_dict()   ->   merge_states()   ->   load_state_dict()
                           fingerprint()                                   of all ranks          check_state()

A state is plain data (JSON-able):

    format        1
    step          batches delivered
    lanes         {number: state of the shard}: one shard a rank, or with shard="row" one a row of all ranks' batches
        waiting       reads whose documents wait for a row, in the packer's order
        digest        CRC32 of their words
        packer        the packer's own state and counters
        ledger        counters of the shard, see ledger.py
        sources       the same for each source of a mixture; [] without one
        ahead         with balance: the rows packed and not delivered, batch by batch, see producer/ahead.py
        notes         what was skipped and ignored, and why, as JSON text; see notes.py
    batches       in all epochs, where that is known; else None
    fingerprint   of data, tokenizer and arguments

Shards are called lanes there because format 1 was written so. The keys do not depend on the progress of the run, and
those of two ranks' shards differ: torch.distributed.checkpoint needs both.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import numpy as np

from nanopack.config import LoaderConfig
from nanopack.conversations.fetch import peek
from nanopack.conversations.order import evenly_spaced
from nanopack.conversations.records import Conversation, check
from nanopack.conversations.source import Source
from nanopack.errors import NEVER_SKIPPED
from nanopack.notes import Notes
from nanopack.packing.packings import PACKINGS
from nanopack.tokenizers.tokenizer import AnyTokenizer

log = logging.getLogger("nanopack")

FORMAT = 1
SHARD_KEYS = {"waiting", "digest", "packer", "ledger", "sources"}
SAMPLE = 16
# Seconds of reading the sample that are worth a warning.
SLOW = 1.5
_SLOW = (
    f"the loader reads {SAMPLE} conversations, for the fingerprint in its states, and has waited {SLOW} s for the data "
    f"set: a slow store, or a lock that another thread holds?"
)
# Arguments that do not decide which token lands where, or that the numbers of the shards already state.
_FREE = ("rank", "extras", "max_pieces", "on_error")


def fingerprint(source: Source, sample: str, tokenizer: AnyTokenizer, config: LoaderConfig) -> dict[str, Any]:
    """Return the facts of a run that a state depends on: {"conversations": their number, "sample", "tokenizer", ...}.

    `sample` and `tokenizer` are digests, `arguments` are the loader's; `sample` is `sample_of` the source.
    """
    arguments = {
        field.name: _plain(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.name not in _FREE
    }
    arguments |= {"packing": config.packing.name, **config.packing.options()}
    # states from before there was a choice still load
    if config.first_assistant == "keep":
        del arguments["first_assistant"]
    if config.turns == "all":
        del arguments["turns"]
    if config.document_align == 1:
        del arguments["document_align"]
    if config.balance is None:
        del arguments["balance"], arguments["balance_window"]
    if not config.balance_across:
        del arguments["balance_across"]
    if config.shard == "row":
        # the global batch is what counts, however many ranks share it
        del arguments["batch_size"], arguments["world_size"]
        arguments["batch_size * world_size"] = config.global_rows
    clock = getattr(tokenizer, "clock", None)
    return {
        "conversations": len(source),
        "sample": sample,
        "tokenizer": tokenizer.fingerprint(),
        "arguments": arguments,
        # When the date was that the chat template writes. The tokenizer's digest says whether that date is another.
        **({"clock": clock} if clock else {}),
    }


def shared_facts(fingerprint: Mapping[str, Any]) -> dict[str, object]:
    """Return the facts that all ranks of a run must share, so that each conversation is read by one of them."""
    names = ("seed", "epochs", "shard", "batch_size * world_size")
    return {
        "conversations": (fingerprint["conversations"], fingerprint["sample"]),
        "tokenizer": fingerprint["tokenizer"],
        **{name: fingerprint["arguments"].get(name) for name in names},
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


def sample_of(source: Source, seed: int | None) -> str:
    """Return a digest of some conversations, which are read for it. Raises StorageError where one cannot be read."""
    if own := source.fingerprint():
        return own
    slow = threading.Timer(SLOW, log.warning, (_SLOW,))
    try:
        # in here, because Ctrl-C may come while it starts
        slow.start()
        return _digest([source.picks_digest().encode(), *_sample(source, seed)])
    finally:
        slow.cancel()
        # no thread is left when a process is forked
        if slow.ident is not None:
            slow.join()


def whole_digest(source: Source, seed: int | None) -> str:
    """Return a digest that changes with any conversation; they are all read for it unless the source has a version."""
    if version := source.version():
        return version
    return _digest([source.picks_digest().encode(), *_sample(source, seed, len(source))])


def _sample(source: Source, seed: int | None, count: int = SAMPLE) -> Iterator[bytes]:
    """Yield the bytes of `count` evenly spaced conversations."""
    for index in evenly_spaced(len(source), max(2, count)):
        try:
            yield from _bytes_of(check(peek(source, index, seed)))
        except NEVER_SKIPPED:
            raise
        # a bad conversation is part of the data too; what its error says may differ from run to run
        except Exception:
            yield b"bad"


def _bytes_of(conversation: Conversation) -> Iterator[bytes]:
    """Yield what a conversation holds, in whatever form it was given."""
    if conversation.tokens is not None:
        ids, mask = conversation.tokens
        yield ids.astype(np.int64).tobytes()
        yield b"" if mask is None else mask.tobytes()
    said = [(message.role, message.content) for message in conversation.messages]
    yield repr((said, conversation.text, conversation.weight)).encode("utf-8", "surrogatepass")
    besides: list[object] = [
        (index, m.train, m.rest) for index, m in enumerate(conversation.messages) if not m.train or m.rest
    ]
    besides += [more for more in (conversation.tools, conversation.template_kwargs) if more]
    # most conversations have nothing of this, and are as before it was read
    if besides:
        yield repr(besides).encode("utf-8", "surrogatepass")


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"%d " % len(part) + part)
    return digest.hexdigest()


def check_state(state: Any, ours: Mapping[str, Any], config: LoaderConfig, *, strict: bool) -> dict[str, Any]:
    """Return {"step", "lanes": those of this rank}, as `Start` takes them.

    Raises ValueError for what is not a state, lacks shards of this rank, or (with `strict`) belongs to other data or
    arguments: the message names each difference.
    """
    state = _checked(state)
    if strict and (differences := _differences(state["fingerprint"], ours)):
        raise ValueError(
            f"the state belongs to another run: {'; '.join(differences)}; resume with what the run was started with, "
            f"or pass strict=False to resume all the same"
        )
    wanted = [str(number) for number in (config.all_shards if config.balance_across else config.shards)]
    if missing := [number for number in wanted if number not in state["lanes"]]:
        what = "rank" if config.shard == "rank" else "row"
        raise ValueError(
            f"the state has {what}s {', '.join(state['lanes'])}, but not {', '.join(missing)}, which "
            f"rank={config.rank} of world_size={config.world_size} needs; put the states of all ranks together with "
            f"nanopack.merge_states"
        )
    return {"step": state["step"], "lanes": {number: state["lanes"][number] for number in wanted}}


def batches_of(state: Mapping[str, Any], ours: Mapping[str, Any]) -> int | None:
    """Return the number of batches in all epochs, where a state of the same data and arguments knows it."""
    found = state.get("batches")
    return found if type(found) is int and not _differences(_checked(state)["fingerprint"], ours) else None


def merge_states(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge the states of all ranks into one, which any rank's loader can load.

    With shard="row" another number of ranks may load it, as long as batch_size * world_size is the same.

    Raises ValueError where the states are not of one step of one run, or a rank is missing.
    """
    states = list(states or ())
    if not states:
        raise ValueError("merge_states has nothing to merge; pass the states of all ranks")
    for number, state in enumerate(states):
        try:
            states[number] = _checked(state)
        except ValueError as error:
            raise ValueError(f"state {number}: {error}") from None
    first, shards = states[0], dict[str, Any]()
    for number, state in enumerate(states):
        if differences := _differences(first["fingerprint"], state["fingerprint"]):
            raise ValueError(f"states 0 and {number} are of different runs: {'; '.join(differences)}")
        if state["step"] != first["step"]:
            raise ValueError(
                f"states 0 and {number} are not of the same step: steps {first['step']} and {state['step']}; "
                f"save the states of all ranks at the same step"
            )
        for shard, its_state in state["lanes"].items():
            if shards.setdefault(shard, its_state) != its_state:
                raise ValueError(f"shard {shard} is in several of the states, and differs; pass each rank's state once")
    arguments = first["fingerprint"]["arguments"]
    count = arguments.get("batch_size * world_size", arguments.get("world_size"))
    if missing := [number for number in map(str, range(count)) if number not in shards]:
        what = "rank" if arguments["shard"] == "rank" else "row"
        raise ValueError(f"{what}s {', '.join(missing)} of {count} are in none of the states; pass those of all ranks")
    batches = next((state["batches"] for state in states if state.get("batches") is not None), None)
    return {**first, "batches": batches, "lanes": {str(number): shards[str(number)] for number in range(count)}}


def _checked(state: Any) -> Mapping[str, Any]:
    """Return a state in today's names. ValueError where it is damaged, or not a state of nanopack."""
    if not isinstance(state, Mapping) or "format" not in state:
        raise ValueError(f"a {type(state).__name__} is not a state of nanopack; pass what state_dict() returned")
    if state["format"] != FORMAT:
        raise ValueError(f"the state has format {state['format']!r}; this version of nanopack reads format {FORMAT}")
    kinds = {"step": int, "lanes": Mapping, "fingerprint": Mapping}
    for name, kind in kinds.items():
        if not isinstance(state.get(name), kind):
            what = f"the state is damaged: its {name!r} is {state.get(name)!r}"
            raise ValueError(f"{what}; pass what state_dict() returned")
    for shard, its_state in state["lanes"].items():
        if not isinstance(its_state, Mapping) or not SHARD_KEYS.issubset(its_state):
            lacks = ", ".join(sorted(SHARD_KEYS - set(its_state)))
            raise ValueError(f"the state is damaged: shard {shard} lacks {lacks}")
    return _with_new_names(state)


# Arguments by the names that states before 0.1.0 have for them.
_RENAMED = {"weights": "loss_weights", "shuffle_seed": "seed", "max_tokens": "max_document_tokens"}
_RENAMED_COUNTERS = {
    **{"slots": "positions", "slots_tokens": "positions_tokens", "slots_padding": "positions_padding"},
    "targets_trained": "targets_in_loss",
}
_PACKING_OPTIONS = {"window", "max_age", "refill", "overlap"}


def _with_new_names(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state saved before the arguments were renamed as it would be saved now; any other as it is."""
    arguments = state["fingerprint"].get("arguments", {})
    if "shuffle_seed" not in arguments:
        return state
    # every packing had all options then, whether they meant anything or not
    meant = PACKINGS[arguments["packing"]]().options()
    renamed = {
        _RENAMED.get(name, name): value
        for name, value in arguments.items()
        if name in meant or name not in _PACKING_OPTIONS
    }
    shards = {number: _of_today(its_state) for number, its_state in state["lanes"].items()}
    return {**state, "lanes": shards, "fingerprint": {**state["fingerprint"], "arguments": renamed}}


def _of_today(shard: Mapping[str, Any]) -> dict[str, Any]:
    def renamed(ledger: Mapping[str, Any]) -> dict[str, Any]:
        cut = {_RENAMED.get(reason, reason): tokens for reason, tokens in ledger["tokens_cut"].items()}
        counts = {_RENAMED_COUNTERS.get(name, name): count for name, count in ledger.items()}
        return {"work": 0.0, **counts, "conversations_copies": 0, "tokens_cut": cut}

    sources = [renamed(ledger) for ledger in shard["sources"]]
    return {"notes": Notes().dump(), **shard, "ledger": renamed(shard["ledger"]), "sources": sources}


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Return the differences of two fingerprints, in words."""
    found = []
    if theirs["conversations"] != ours["conversations"]:
        found.append(f"conversations were {theirs['conversations']}, are {ours['conversations']}")
    elif theirs["sample"] != ours["sample"]:
        found.append("conversations have other contents or another order (seen in a sample)")
    if theirs["tokenizer"] != ours["tokenizer"]:
        found.append("the tokenizer is another one")
    was, now = theirs["arguments"], ours["arguments"]
    for name in {**was, **now}:
        if was.get(name) != now.get(name):
            found.append(f"{name} was {was.get(name)!r}, is {now.get(name)!r}")
    return found
